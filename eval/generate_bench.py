"""`cm3 bench generate`: tokens a second of our engine and of `generate` of `transformers`, on the same weights.

Both sides get random weights of one Chameleon, the same prompts and the same number of new tokens, each in a process of
its own that holds one model at a time. The two take turns, repeat after repeat, so that whatever else the machine does
falls on both. Ours draws the codes of a picture. Theirs draws among all ids, with no grammar at all. Of its settings
(see `cm3.interop.chameleon_generate`) the fastest one counts, found in a second round, after one
that warms up.

The limit is the time to read once what a step cannot do without: the weights of the blocks, the part of the output head
that is drawn from, and the filled part of the cache. The rate of reading is measured in the same run.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import torch

from cm3.errors import ConfigError
from cm3.eval.bench_shapes import SIZES, shape
from cm3.eval.generate_sides import Case, Side, Timing, load_side, time_side
from cm3.eval.machine import ReadRate, describe
from cm3.interop.chameleon import as_chameleon, has_transformers
from cm3.interop.chameleon_generate import generate_settings
from cm3.model.config import ModelConfig, parameter_count
from cm3.tokenizers.vocabulary import Vocabulary

Precision = Literal["fp32", "bf16", "int8"]

GENERATE_SIZES = ("small", "100m", *(size for size in SIZES if size != "demo"))
"""`small` is for tests; the others are those of `cm3.eval.bench_shapes`."""

_SHORTEST_SHARE = 8
"""Of the prompts of one batch the longest has this many times the ids of the shortest."""


@dataclass(frozen=True, kw_only=True)
class GenerateBench:
    """A model, prompts, and what is compared."""

    size: str = "100m"
    """Of the model, one of `GENERATE_SIZES`; its architecture is Chameleon's."""
    batches: tuple[int, ...] = (1, 8)
    """Prompts that are served together."""
    prompt_length: int = 128
    """Ids of the longest prompt; the shortest of a batch has an eighth of them."""
    new_tokens: int = 128
    """Of every prompt."""
    guidance: tuple[float, ...] = (1.0, 3.0)
    """Weights of classifier-free guidance; 1 is off."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    """Number formats of weights and cache. int8 is ours alone: the weights of blocks have 8 bits, all else is bf16."""
    repeats: int = 3
    """Of which the median is reported."""
    compile: bool = False
    """Compile our step, and let `transformers` compile its own where that is faster."""
    seed: int = 0
    """Draws weights, prompts and ids."""

    def __post_init__(self) -> None:
        if self.size not in GENERATE_SIZES:
            raise ConfigError(f"size {self.size!r} is unknown; choose one of {', '.join(GENERATE_SIZES)}")
        least = {"prompt_length": 1, "new_tokens": 2, "repeats": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name}={getattr(self, name)}; choose {minimum} or more")
        if min(self.batches, default=0) < 1:
            raise ConfigError(f"batches={self.batches}; choose 1 or more of them, each of 1 prompt or more")

    def model(self) -> tuple[ModelConfig, Vocabulary]:
        """The model of the size, with room for prompt and new tokens."""
        positions = self.prompt_length + self.new_tokens
        if self.size == "small":
            vocabulary = Vocabulary.build(128, 64, num_sentinels=8)
            config = ModelConfig(vocabulary_size=vocabulary.size, width=64, num_layers=2, num_heads=4)
        elif self.size == "100m":
            vocabulary = Vocabulary.build(8_192, 8_192, num_sentinels=512)
            config = ModelConfig(vocabulary_size=vocabulary.size, width=768, num_layers=12, num_heads=12)
        else:
            found = shape(self.size)
            vocabulary, config = found.vocabulary, found.model
        return as_chameleon(replace(config, max_positions=positions, init_std=0.02)), vocabulary

    def cases(self, precision: Precision) -> Iterator[Case]:
        """What is measured in one number format."""
        _, vocabulary = self.model()
        for batch in self.batches:
            for scale in self.guidance:
                yield Case(
                    prompts=random_prompts(batch, self.prompt_length, vocabulary, self.seed),
                    unconditional=(vocabulary.eos_id, vocabulary.break_id),
                    new_tokens=self.new_tokens,
                    guidance_scale=scale,
                    precision=precision,
                    seed=self.seed,
                )


@dataclass(frozen=True, kw_only=True)
class GenerateCost:
    """What one side needs for one case."""

    side: str
    setting: str
    """Of `transformers` the fastest one."""
    case: Case
    seconds: float
    """Median time of all new tokens, prefill included."""
    first_seconds: float
    """Median time until the first new token of all rows."""
    peak_bytes: float
    """Most memory of the process; nan where the system does not say."""
    limit: float
    """Time to read what a step must read, over the time of a step; nan where that is nothing to go by."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all prompts."""
        return len(self.case.prompts) * self.case.new_tokens / self.seconds

    @property
    def step_seconds(self) -> float:
        """Mean time of a step after the first."""
        return max(self.seconds - self.first_seconds, 0.0) / (self.case.new_tokens - 1)


def random_prompts(batch: int, longest: int, vocabulary: Vocabulary, seed: int) -> tuple[tuple[int, ...], ...]:
    """Prompts of random text ids: one is as long as asked, several have lengths evenly down to an eighth of that."""
    generator = torch.Generator().manual_seed(seed)
    shortest = max(1, longest // _SHORTEST_SHARE)
    lengths = [longest] if batch == 1 else torch.linspace(shortest, longest, batch).round().int().tolist()
    text = vocabulary.text_to_ids(range(4, vocabulary.text_size))  # 0 to 3 are special
    return tuple(
        tuple(int(text[piece]) for piece in torch.randint(len(text), (length,), generator=generator))
        for length in lengths
    )


def bytes_of_step(config: ModelConfig, vocabulary: Vocabulary, case: Case) -> float:
    """Bytes that a step of a case must read on average: weights once, and the filled cache of every row."""
    block_size, size = {"fp32": (4, 4), "bf16": (2, 2), "int8": (1, 2)}[case.precision]
    heads = 2 - config.tie_embeddings
    blocks = parameter_count(config) - heads * config.vocabulary_size * config.width
    head = vocabulary.image_range.size * config.width
    prompts = list(case.prompts)
    if case.guidance_scale != 1:
        prompts += [case.unconditional] * len(case.prompts)
    slots = sum(len(prompt) + (case.new_tokens - 1) / 2 for prompt in prompts)
    per_slot = 2 * config.num_layers * config.key_value_heads * config.head_width
    return block_size * blocks + size * (head + slots * per_slot)


def measure(config: GenerateBench) -> Iterator[GenerateCost]:
    """Every case on both sides; on ours alone where `transformers` is not installed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = ReadRate(device)
    model, vocabulary = config.model()
    for precision in config.precisions:
        sides: dict[Side, list[str]] = {"ours": ["engine, compiled" if config.compile else "engine"]}
        if has_transformers() and precision != "int8":
            sides["transformers"] = []
        workers = {}
        for side in sides:
            workers[side] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            workers[side].submit(load_side, side, model, vocabulary, precision, config.seed, config.compile).result()
        for case in config.cases(precision):
            best: dict[Side, str] = {}
            for side in sides:
                settings = sides[side] or generate_settings(case.guidance_scale != 1, config.compile)
                for setting in settings:  # warms up, and compiles
                    workers[side].submit(time_side, case, setting).result()
                tried = {setting: workers[side].submit(time_side, case, setting).result() for setting in settings}
                best[side] = min(tried, key=lambda setting: tried[setting].seconds)
            timings: dict[Side, list[Timing]] = {side: [] for side in sides}
            for _ in range(config.repeats):
                rate.measure()
                for side in sides:
                    timings[side].append(workers[side].submit(time_side, case, best[side]).result())
            for side, found in timings.items():
                cost = GenerateCost(
                    side=side,
                    setting=best[side],
                    case=case,
                    seconds=statistics.median(timing.seconds for timing in found),
                    first_seconds=statistics.median(timing.first_seconds for timing in found),
                    peak_bytes=max(timing.peak_bytes for timing in found),
                    limit=float("nan"),
                )
                least = bytes_of_step(model, vocabulary, case) / rate.bytes_per_second
                yield replace(cost, limit=least / cost.step_seconds) if cost.step_seconds else cost
        for worker in workers.values():
            worker.shutdown()


def table(config: GenerateBench, costs: Iterable[GenerateCost]) -> Iterator[str]:
    """The lines of a table in Markdown, each as soon as its case is measured, then the ratios."""
    model, vocabulary = config.model()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield (
        f"{config.size}: {parameter_count(model) / 1e6:.0f} M parameters, {vocabulary.image_range.size} of "
        f"{vocabulary.size} ids are codes; prompts of up to {config.prompt_length} ids, {config.new_tokens} new ones "
        f"each, median of {config.repeats}, seed {config.seed}; {describe(device)}"
    )
    yield ""
    yield "| precision | batch | guidance | side | setting | tokens/s | first ms | step ms | peak GB | of the limit % |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    speed: dict[tuple[str, int, float], dict[str, float]] = {}
    for cost in costs:
        case = cost.case
        key = (case.precision, len(case.prompts), case.guidance_scale)
        speed.setdefault(key, {})[cost.side] = cost.tokens_per_second
        yield (
            f"| {key[0]} | {key[1]} | {key[2]:g} | {cost.side} | {cost.setting} | {cost.tokens_per_second:.1f} "
            f"| {1e3 * cost.first_seconds:.1f} | {1e3 * cost.step_seconds:.2f} | {cost.peak_bytes / 1e9:.3f} "
            f"| {100 * cost.limit:.0f} |"
        )
    yield ""
    for (precision, batch, scale), found in speed.items():
        plain = speed.get(("bf16", batch, scale))
        if precision == "int8" and plain:
            yield f"int8, batch {batch}, guidance {scale:g}: {found['ours'] / plain['ours']:.2f} times those of bf16"
        if "transformers" in found:
            ratio = found["ours"] / found["transformers"]
            yield f"{precision}, batch {batch}, guidance {scale:g}: {ratio:.2f} times the tokens/s of transformers"
    if not has_transformers():
        yield "transformers is not installed: nothing to compare with; `pip install open-cm3[interop]`"
