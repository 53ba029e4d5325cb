"""`cm3 bench train`: what a training step costs, part by part, and what Chameleon of `transformers` costs instead.

Three models are compared. `ours` is the size's own architecture with its own packing. `ours-chameleon` has the switches
of Chameleon and reads plain causal rows, and `transformers` is the same function in the class of that library: same
sizes, batch, number format and AdamW, its image logits unmasked. Each runs in a process of its own, whose peak of
memory is its own.

The step is that of one device without a launcher: weights and gradients in the number format, AdamW on copies in
float32, gradients clipped. Losses of ours make the gradient of the output head in the forward pass, so their share of
`forward` is larger and that of `backward` smaller than with a plain loss.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cm3.data.loader import PackedLoader
from cm3.errors import ConfigError
from cm3.eval.bench_shapes import Shape, shape, write_documents
from cm3.eval.machine import MatrixPeak, describe, memory_in_use, peak_memory, synchronize
from cm3.interop.chameleon import as_chameleon, foreign_chameleon, foreign_loss, has_transformers
from cm3.model.config import ModelConfig, flops_per_token
from cm3.model.loss import next_token_loss
from cm3.model.objective import ObjectiveConfig
from cm3.model.transformer import Transformer

TrainedModel = Literal["ours", "ours-chameleon", "transformers"]
Batch = dict[str, Tensor]

PARTS = ("data", "forward", "backward", "optimizer")

_WARMUP_STEPS = 2
_PEAK_INTERVAL = 4
"""Steps between two measurements of the rate of matrix products."""


@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """A model, a batch, and what is compared."""

    size: str = "demo"
    """Of the model, see `cm3.eval.bench_shapes.SIZES`."""
    steps: int = 20
    """Steps that are timed, after two that are not."""
    rows: int | None = None
    """Rows of a step; None is what the size usually has on one device."""
    sequence_length: int | None = None
    """Positions of a row; None is the size's own."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of weights, activations and gradients; the optimiser has float32."""
    compile: bool = False
    """Compile every block with torch.compile, ours and theirs."""
    models: tuple[TrainedModel, ...] = ("ours", "ours-chameleon", "transformers")
    """What is compared."""
    seed: int = 0
    """Draws the documents, their masks and the weights."""

    def __post_init__(self) -> None:
        shape(self.size)
        for name in ("steps", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; choose 1 or more")

    def resolved(self) -> Shape:
        """The shape of the size, with the rows and the length that were asked for."""
        found = shape(self.size)
        length = self.sequence_length or found.sequence_length
        model = replace(found.model, max_positions=max(length, found.model.max_positions))
        return replace(found, model=model, sequence_length=length, rows=self.rows or found.rows)


@dataclass(frozen=True, kw_only=True)
class TrainCost:
    """What the steps of one model cost."""

    model: str
    parameters: int
    step_seconds: float
    """Median of a step."""
    tokens_per_second: float
    """Tokens of a step, padding left out, in the median time."""
    peak_flops: float
    """Best rate of matrix products beside the steps, FLOP/s."""
    utilisation: float
    """FLOP/s of the median step, counted as `flops_per_token` counts them, over `peak_flops`."""
    peak_bytes: float
    """Most memory that model, optimiser and steps took at a time; nan on a CPU whose system is not Linux."""
    shares: dict[str, float]
    """Share of the time of all steps in each of `PARTS`."""
    loss: float
    """Of the last step."""


def measure(config: TrainBench) -> Iterator[TrainCost]:
    """Train every model for a few steps, each in its own process."""
    for model in config.models:
        if model == "transformers" and not has_transformers():
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield process.submit(measure_model, config, model).result()


def measure_model(config: TrainBench, name: TrainedModel) -> TrainCost:
    """Train one model for a few steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    found = config.resolved()
    with TemporaryDirectory(prefix="cm3-bench-") as folder:
        documents = write_documents(Path(folder), found, config.seed)
        loader = PackedLoader(
            documents,
            found.vocabulary,
            ObjectiveConfig(),
            sequence_length=found.sequence_length,
            rows=found.rows,
            seed=config.seed,
            packing=found.packing if name == "ours" else "stream",
        )
        peak = MatrixPeak(device, dtype)
        peak.measure()
        before = memory_in_use(device)
        torch.manual_seed(config.seed)
        model_config = found.model if name == "ours" else as_chameleon(found.model)
        module, loss_of = _build(name, model_config, found, device, dtype)
        if config.compile:
            compile_blocks(module)
        optimizer = MasterAdamW(module)
        steps: list[tuple[dict[str, float], Batch]] = []
        batches = iter(loader)
        for step in range(_WARMUP_STEPS + config.steps):
            if step % _PEAK_INTERVAL == 0:
                peak.measure()
            parts, batch, loss = _step(batches, loss_of, optimizer, device)
            steps.append((parts, batch))
        peak.measure()
        batches.close()
    timed = steps[_WARMUP_STEPS:]
    seconds = statistics.median(sum(parts.values()) for parts, _ in timed)
    counted = [tokens_and_context(batch["document_ids_BT"]) for _, batch in timed]
    tokens = statistics.mean(tokens for tokens, _ in counted)
    flops = statistics.mean(tokens * flops_per_token(model_config, context) for tokens, context in counted)
    total = sum(sum(parts.values()) for parts, _ in timed)
    return TrainCost(
        model=name,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_flops=peak.flops_per_second,
        utilisation=flops / seconds / peak.flops_per_second,
        peak_bytes=peak_memory(device) - before,
        shares={name: sum(parts[name] for parts, _ in timed) / total for name in PARTS},
        loss=loss,
    )


class MasterAdamW:
    """AdamW in float32 for weights in any number format, as mixed-precision training has it.

    Args:
        module: Whose weights are trained; they get their gradients.
    """

    def __init__(self, module: nn.Module) -> None:
        self._weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._masters = [weight.detach().float().clone().requires_grad_() for weight in self._weights]
        self._adam = torch.optim.AdamW(self._masters, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.1, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Clip the gradients, update, and write the new weights into the module."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            assert weight.grad is not None, "a weight without gradient"
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._adam.step()
        for weight, master in zip(self._weights, self._masters, strict=True):
            weight.copy_(master)
            master.grad = None


def tokens_and_context(document_ids_BT: Tensor) -> tuple[int, float]:
    """The tokens of a batch, and how many others (and itself) each attends to on average."""
    tokens, attended = 0, 0.0
    for row_T in document_ids_BT.cpu():
        lengths = torch.unique_consecutive(row_T[row_T >= 0], return_counts=True)[1].double()
        tokens += int(lengths.sum())
        attended += float((lengths * (lengths + 1) / 2).sum())
    return tokens, attended / tokens


def compile_blocks(module: Any) -> None:
    """Compile the blocks of either library's model, as the trainer does with ours."""
    for block in module.blocks if isinstance(module, Transformer) else module.model.layers:
        block.compile(dynamic=False)


def table(config: TrainBench, costs: Iterable[TrainCost]) -> Iterator[str]:
    """The lines of a table in Markdown, each as soon as its model is measured, then the ratios."""
    found = config.resolved()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield (
        f"{config.size}: {found.rows} rows of {found.sequence_length}, {config.precision}, {config.steps} steps"
        f"{', compiled' if config.compile else ''}, seed {config.seed}; {describe(device)}"
    )
    yield ""
    parts = " | ".join(f"{name} %" for name in PARTS)
    yield f"| model | parameters | step ms | tokens/s | TFLOP/s of products | utilisation % | peak GB | {parts} |"
    yield "|---|" + "---|" * (6 + len(PARTS))
    speed = {}
    for cost in costs:
        speed[cost.model] = cost.tokens_per_second
        shares = " | ".join(f"{100 * cost.shares[name]:.1f}" for name in PARTS)
        yield (
            f"| {cost.model} | {cost.parameters / 1e6:.1f} M | {1e3 * cost.step_seconds:.1f} "
            f"| {cost.tokens_per_second:.0f} | {cost.peak_flops / 1e12:.3f} | {100 * cost.utilisation:.1f} "
            f"| {cost.peak_bytes / 1e9:.3f} | {shares} |"
        )
    yield ""
    for model in ("ours", "ours-chameleon"):
        if model in speed and "transformers" in speed:
            yield f"{model}: {speed[model] / speed['transformers']:.2f} times the tokens/s of transformers"
    if "transformers" in config.models and "transformers" not in speed:
        yield "transformers is not installed: nothing to compare with; `pip install open-cm3[interop]`"


def _build(
    name: TrainedModel, config: ModelConfig, found: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    """A model on its device, and what makes a loss of a batch."""
    with device:
        module = foreign_chameleon(config) if name == "transformers" else Transformer(config)
    for parameter in module.parameters():  # not `module.to`, which would round the foreign model's rotary table
        parameter.data = parameter.data.to(dtype)
    image_range = (found.vocabulary.image_range.start, found.vocabulary.image_range.stop)

    def loss_of(batch: Batch) -> Tensor:
        ids_BT, document_ids_BT = batch["ids_BT"], batch["document_ids_BT"]
        if name == "transformers":
            return foreign_loss(module, ids_BT, document_ids_BT >= 0)
        assert isinstance(module, Transformer)
        # a row of a stream is one document: without its ids it takes the plain causal path, as the foreign model does
        packed = document_ids_BT if name == "ours" else None
        return next_token_loss(
            module, ids_BT, packed, image_range=image_range, weights_BT=batch["weights_BT"] if name == "ours" else None
        ).loss

    return module, loss_of


def _step(
    batches: Iterator[Batch], loss_of: Callable[[Batch], Tensor], optimizer: MasterAdamW, device: torch.device
) -> tuple[dict[str, float], Batch, float]:
    """One training step: the seconds of each part, its batch and its loss."""
    moments = [time.perf_counter()]

    def lap() -> None:
        synchronize(device)
        moments.append(time.perf_counter())

    batch = {name: tensor.to(device) for name, tensor in next(batches).items()}
    lap()
    loss = loss_of(batch)
    lap()
    loss.backward()
    lap()
    optimizer.step()
    lap()
    value = float(loss.detach())
    assert math.isfinite(value), "the loss is not finite"
    seconds = [stop - start for start, stop in zip(moments[:-1], moments[1:], strict=True)]
    return dict(zip(PARTS, seconds, strict=True)), batch, value
