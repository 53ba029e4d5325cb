"""The decoding engine: many requests, many samples of each, one static cache, one step for all rows.

Every row has its own length, place in its grammar, seed and settings; nothing a row produces depends on its
neighbours. The prompts that a row is compared with (guidance, contrast) are further rows of the same forward
pass with their own caches, there only while they are needed. Letters added: R rows of the forward pass (B rows
that produce ids, then those they are compared with), U distinct prompts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from cm3.errors import RequestError
from cm3.generation.grammar import END, GrammarTables
from cm3.generation.request import Request, Row, check_request
from cm3.generation.sampler import Sampler
from cm3.generation.settings import SamplingSettings
from cm3.generation.speculative import course, run_ahead
from cm3.model.cache import KeyValueCache, similar_runs
from cm3.model.transformer import Transformer
from cm3.tokenizers.vocabulary import Vocabulary

CHECK_INTERVAL = 8
"""Steps between two looks at the device while rows may end at any time; images have a known length."""

_CAPACITY_STEP = 256
"""Where the step is compiled, caches and outputs have room for a multiple of this, so that requests of many lengths
share one graph."""

_Stream = tuple[int, tuple[int, ...]]
"""A row of the forward pass: the row whose new ids it is fed, and the prompt before these."""


@dataclass
class _Streams:
    """The rows of the forward pass, all static in shape until the next change of `Row.compared_at`."""

    rows: list[_Stream]
    cache: KeyValueCache
    last_R: Int[Tensor, " R"]
    owner_R: Int[Tensor, " R"]
    sampler: Sampler


@dataclass
class _Batch:
    """All that a step reads and writes: tensors of static shapes, updated in place."""

    tables: GrammarTables
    state_B: Int[Tensor, " B"]
    taken_B: Int[Tensor, " B"]
    left_B: Int[Tensor, " B"]
    step_1: Int[Tensor, " 1"]
    output_BT: Int[Tensor, "B T"]


class Engine:
    """Runs requests on a model.

    Args:
        model: it stays where it is; the cache takes its device and number type.
        vocabulary: the id space of the model.
        max_batch_rows: most rows of one forward pass, those of compared prompts included; more work is split.
        compile: compile the step with `torch.compile`, once for every number of rows and every `_CAPACITY_STEP` of
            their length: the first steps of each take long. Attention then reads the whole cache, filled or not.
            torch gives up compiling after `torch._dynamo.config.recompile_limit` (8) of these.
    """

    def __init__(
        self, model: Transformer, vocabulary: Vocabulary, *, max_batch_rows: int = 64, compile: bool = False
    ) -> None:
        if max_batch_rows < 2:
            raise RequestError(f"max_batch_rows={max_batch_rows}, but a row with guidance takes 2; choose 2 or more")
        self.model = model
        self.vocabulary = vocabulary
        self.max_batch_rows = max_batch_rows
        self._is_compiled = compile
        self._step: Callable[[_Batch, _Streams, bool], None] = self._decode_step
        if compile:
            self._step = torch.compile(self._decode_step, dynamic=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embedding.weight.device

    def run(
        self, requests: Sequence[Request], settings: SamplingSettings | Sequence[SamplingSettings]
    ) -> list[list[np.ndarray]]:
        """Generate every sample of every request.

        Args:
            settings: for all requests, or one for each.

        Returns:
            For each request, for each of its seeds, the new ids (int64), with the one that ended the row.

        Raises:
            RequestError: a request does not fit the model's context or budget, or guidance or contrast
                lacks a prompt, or a compiled engine is asked for a speculative window.
        """
        if isinstance(settings, SamplingSettings):
            settings = [settings] * len(requests)
        if self._is_compiled and any(chosen.speculative_window for chosen in settings):
            raise RequestError(
                "speculative_window was asked for, but this engine's step is compiled, and that draws one id of each "
                "row; build the engine with compile=False, or set speculative_window=0"
            )
        rows = []
        for index, (request, chosen) in enumerate(zip(requests, settings, strict=True)):
            check_request(index, request, chosen, self.model.config.max_positions)
            rows += [Row(request, chosen.of_sample(number), seed) for number, seed in enumerate(request.seeds)]
        # neighbours of similar length share passes and calls, see `similar_runs`
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].request.prompt_ids))
        with _evaluating(self.model), torch.inference_mode():
            made = [ids for part in self._parts([rows[index] for index in order]) for ids in self._run_rows(part)]
        by_row = dict(zip(order, made, strict=True))
        outputs = (by_row[index] for index in range(len(rows)))
        return [[next(outputs) for _ in request.seeds] for request in requests]

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """Log-probability (nats, over the whole vocabulary) of each continuation after its prompt.

        Args:
            sequences: pairs of prompt ids and continuation ids; neither is empty.
        """
        scores = []
        with _evaluating(self.model), torch.inference_mode():
            for start in range(0, len(sequences), self.max_batch_rows):
                part = sequences[start : start + self.max_batch_rows]
                rows = [[*prompt, *continuation] for prompt, continuation in part]
                hidden_BTD = self.model(self._padded(rows))
                for (prompt, continuation), hidden_TD in zip(part, hidden_BTD, strict=True):
                    places = slice(len(prompt) - 1, len(prompt) + len(continuation) - 1)
                    log_p_TV = self.model.logits(hidden_TD[places]).float().log_softmax(dim=-1)
                    targets_T1 = torch.tensor(continuation, device=self.device)[:, None]
                    scores.append(log_p_TV.gather(1, targets_T1).sum().item())
        return scores

    def _parts(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """The rows in order, in batches of at most `max_batch_rows` rows, those of compared prompts included."""
        part: list[Row] = []
        size = 0
        for row in rows:
            cost = len({row.request.prompt_ids, *row.compared})
            if cost > self.max_batch_rows:
                raise RequestError(
                    f"guidance by picture and text takes {cost} rows of a forward pass, but max_batch_rows="
                    f"{self.max_batch_rows}; choose {cost} or more"
                )
            if size + cost > self.max_batch_rows:
                yield part
                part, size = [], 0
            part.append(row)
            size += cost
        if part:
            yield part

    def _run_rows(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Prefill and decode one batch; the new ids of each row."""
        window = max(row.settings.speculative_window for row in rows)
        batch = self._start(rows)
        streams = self._regroup(rows, range(len(rows)), batch, 0, None)
        changes = sorted(set().union(*(row.changes for row in rows)) - {0})
        step = 0
        while True:
            states, taken, left = torch.stack([batch.state_B, batch.taken_B, batch.left_B]).tolist()
            running = [index for index, state in enumerate(states) if state != END]
            longest = max((left[index] for index in running), default=0)
            if longest == 0:
                break
            if step in changes:
                streams = self._regroup(rows, running, batch, step, streams)
            until_change = min((change - step for change in changes if change > step), default=longest)
            image_steps = batch.tables.image_steps(states, taken)
            num_steps = min(image_steps or CHECK_INTERVAL, longest, until_change)
            if image_steps and window:
                self._run_ahead(batch, streams, step, num_steps, window)
            else:
                for _ in range(num_steps):
                    self._step(batch, streams, image_steps > 0)
            step += num_steps
        output_BT = batch.output_BT.cpu().numpy()
        lengths = [row.request.max_new_tokens - count for row, count in zip(rows, left, strict=True)]
        return [ids_T[:length].copy() for ids_T, length in zip(output_BT, lengths, strict=True)]

    def _start(self, rows: Sequence[Row]) -> _Batch:
        """The batch before its first step."""
        device = self.device
        budgets = [row.request.max_new_tokens for row in rows]
        tables = GrammarTables([row.request.grammar for row in rows], self.vocabulary, device)
        return _Batch(
            tables=tables,
            state_B=torch.tensor(tables.starts, device=device),
            taken_B=torch.zeros(len(rows), dtype=torch.long, device=device),
            left_B=torch.tensor(budgets, device=device),
            step_1=torch.zeros(1, dtype=torch.long, device=device),
            output_BT=torch.full((len(rows), self._rounded(max(budgets))), self.vocabulary.pad_id, device=device),
        )

    def _regroup(
        self, rows: Sequence[Row], running: Iterable[int], batch: _Batch, step: int, before: _Streams | None
    ) -> _Streams:
        """The rows of the forward pass from a step on, those that produce ids first.

        What was there before keeps its cache. Every other row catches up in one prefill of its prompt and the new
        ids up to here, but for the last id, which the step feeds. Rows no longer needed are left behind.

        Args:
            running: rows that have not ended; the others are compared with nothing any more.
        """
        device = self.device
        wanted: list[_Stream] = [(index, row.request.prompt_ids) for index, row in enumerate(rows)]
        wanted += [(index, prompt) for index in running for prompt in rows[index].compared_at(step)]
        places = {stream: place for place, stream in enumerate(before.rows if before else [])}
        kept = [stream for stream in dict.fromkeys(wanted) if stream in places]
        new = [stream for stream in dict.fromkeys(wanted) if stream not in places]
        made_ids = batch.output_BT[:, :step].tolist()
        capacity = self._capacity(rows)
        caches = []
        if before:
            caches.append(before.cache.select(torch.tensor([places[stream] for stream in kept], device=device)))
        if new:
            caches.append(self._prefill([(*prompt, *made_ids[owner])[:-1] for owner, prompt in new], capacity))
        streams = kept + new
        number = {stream: index for index, stream in enumerate(streams)}
        compared: list[list[int]] = [[] for _ in rows]
        for index in running:
            compared[index] = [number[index, prompt] for prompt in rows[index].compared_at(step)]
        cache = _joined(caches)
        if not self._is_compiled:
            cache = cache.bounded([len(prompt) + step - 1 for _, prompt in streams])
        return _Streams(
            rows=streams,
            cache=cache,
            last_R=torch.tensor([(*prompt, *made_ids[owner])[-1] for owner, prompt in streams], device=device),
            owner_R=torch.tensor([owner for owner, _ in streams], device=device),
            sampler=Sampler(
                [row.settings for row in rows],
                [row.seed for row in rows],
                compared,
                self.vocabulary,
                device,
                before.sampler.seen_BV if before else None,
            ),
        )

    def _capacity(self, rows: Sequence[Row]) -> int:
        """Tokens that every row of the cache must have room for."""
        longest = max(
            len(prompt) + row.request.max_new_tokens
            for row in rows
            for prompt in (row.request.prompt_ids, *row.compared)
        )
        return min(self._rounded(longest), self.model.config.max_positions)

    def _rounded(self, length: int) -> int:
        """A length that few graphs of a compiled step are made for."""
        return -(-length // _CAPACITY_STEP) * _CAPACITY_STEP if self._is_compiled else length

    def _prefill(self, prompts: Sequence[tuple[int, ...]], capacity: int) -> KeyValueCache:
        """A cache that holds the prompts; each distinct one goes through the model once, beside similarly long ones."""
        numbers = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        distinct = list(numbers)
        weight = self.model.embedding.weight
        cache = KeyValueCache.create(self.model.config, len(distinct), capacity, weight.dtype, weight.device)
        for run in similar_runs([len(prompt) for prompt in distinct]):
            part = distinct[run.rows]
            if run.longest:
                lengths_U = torch.tensor([len(prompt) for prompt in part], device=weight.device)
                rows = cache.rows(run.rows).bounded([0] * len(part))
                self.model(self._padded(part), cache=rows, num_new_B=lengths_U)
        if len(distinct) == len(prompts):
            return cache
        return cache.select(torch.tensor([numbers[prompt] for prompt in prompts], device=weight.device))

    def _padded(self, sequences: Sequence[Sequence[int]]) -> Int[Tensor, "B T"]:
        """Sequences of ids, padded on the right to the longest."""
        rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
        pad_id = self.vocabulary.pad_id
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id).to(self.device)

    def _run_ahead(self, batch: _Batch, streams: _Streams, step: int, num_steps: int, window: int) -> None:
        """What as many steps with `image_only` do, in fewer passes."""
        image = self.vocabulary.image_range
        named_BT, num_new_B, state_B, taken_B = course(
            batch.tables, batch.state_B, batch.taken_B, num_steps, image.start
        )
        ids_BT = run_ahead(
            self.model,
            streams.cache,
            streams.sampler,
            streams.last_R[: len(named_BT)],
            streams.owner_R,
            named_BT,
            num_new_B,
            first_step=step,
            image_ids=(image.start, image.stop),
            window=window,
        )
        batch.output_BT[:, step : step + num_steps] = ids_BT
        streams.last_R.copy_(ids_BT[streams.owner_R, -1])
        batch.state_B.copy_(state_B)
        batch.taken_B.copy_(taken_B)
        batch.left_B.sub_(num_new_B)
        batch.step_1.add_(num_steps)

    def _decode_step(self, batch: _Batch, streams: _Streams, image_only: bool) -> None:
        """Feed the last ids, draw the next ones. No branch on data and no synchronisation with the host.

        Args:
            image_only: no row can choose among anything but image ids: only their part of the head is used.
        """
        active_B = batch.state_B != END
        hidden_R1D = self.model(
            streams.last_R[:, None], cache=streams.cache, num_new_B=active_B[streams.owner_R].long()
        )
        image = self.vocabulary.image_range
        id_range = (image.start, image.stop) if image_only else None
        logits_RV = self.model.logits(hidden_R1D[:, 0], id_range).float().contiguous()
        if image_only:
            drawn_B = streams.sampler.draw(logits_RV, batch.step_1, None, first_id=image.start)
        else:
            allowed_BV = batch.tables.allowed(batch.state_B, batch.left_B)
            drawn_B = streams.sampler.draw(logits_RV, batch.step_1, allowed_BV, first_id=0)

        literal_B = batch.tables.literal(batch.state_B)
        ids_B = torch.where(literal_B >= 0, literal_B, drawn_B)
        if not image_only:
            streams.sampler.see(ids_B, batch.tables.text_V[ids_B])
        state_B, taken_B = batch.tables.advance(batch.state_B, batch.taken_B, ids_B)
        batch.output_BT.index_copy_(1, batch.step_1, ids_B[:, None])
        streams.last_R.copy_(ids_B[streams.owner_R])
        batch.state_B.copy_(state_B)
        batch.taken_B.copy_(taken_B)
        batch.left_B.sub_(active_B.long())
        batch.step_1.add_(1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _joined(caches: Sequence[KeyValueCache]) -> KeyValueCache:
    """The rows of caches of one capacity, one after the other."""
    if len(caches) == 1:
        return caches[0]
    return KeyValueCache(
        torch.cat([cache.keys_LBSGK for cache in caches], dim=1),
        torch.cat([cache.values_LBSGK for cache in caches], dim=1),
        torch.cat([cache.lengths_B for cache in caches]),
    )
