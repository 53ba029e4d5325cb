"""`cm3 bench loader`: how fast batches are made, beside how fast training consumes them; and how full the rows are.

The loader works in a thread beside the training step, so it is no bottleneck while it alone is faster than training
alone. Wanted are 20 times the tokens of the demo model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cm3.data.loader import PackedLoader
from cm3.data.shards import ShardedDocuments
from cm3.errors import ConfigError
from cm3.eval.bench_shapes import shape, write_documents
from cm3.eval.train_bench import TrainBench, TrainCost
from cm3.eval.train_bench import measure as measure_training
from cm3.model.objective import ObjectiveConfig

WANTED_RATIO = 20


@dataclass(frozen=True, kw_only=True)
class LoaderBench:
    """What is loaded, and which model's training it is compared with."""

    data: str | None = None
    """Prepared folder; None makes random documents such as the model reads."""
    size: str = "demo"
    """Of the model, see `cm3.eval.bench_shapes.SIZES`."""
    sequence_length: int | None = None
    """Positions of a row; None is the size's own."""
    rows: int | None = None
    """Rows of a batch; None is what the size usually has."""
    batches: int = 200
    """Batches that are timed."""
    steps: int = 10
    """Training steps that are timed; 0 leaves training out."""
    seed: int = 0
    """Of order and masks."""

    def __post_init__(self) -> None:
        shape(self.size)
        for name, least in (("batches", 1), ("steps", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}; choose {least} or more")


@dataclass(frozen=True, kw_only=True)
class LoaderCost:
    """What the loader did."""

    tokens: int
    """Tokens in all batches, padding left out."""
    positions: int
    """Positions in all batches."""
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def padding(self) -> float:
        """Share of the positions that hold nothing."""
        return 1 - self.tokens / self.positions


def measure(config: LoaderBench) -> LoaderCost:
    """Make batches, and do nothing with them."""
    found = shape(config.size)
    with TemporaryDirectory(prefix="cm3-bench-") as folder:
        if config.data is None:
            documents = write_documents(Path(folder), found, config.seed)
        else:
            documents = ShardedDocuments(config.data)
        loader = PackedLoader(
            documents,
            documents.vocabulary,
            ObjectiveConfig(),
            sequence_length=config.sequence_length or found.sequence_length,
            rows=config.rows or found.rows,
            seed=config.seed,
            packing=found.packing,
        )
        batches = iter(loader)
        next(batches)  # opens what is mapped, and plans the first rows
        tokens = positions = 0
        start = time.perf_counter()
        for _ in range(config.batches):
            document_ids_BT = next(batches)["document_ids_BT"]
            tokens += int((document_ids_BT >= 0).sum())
            positions += document_ids_BT.numel()
        seconds = time.perf_counter() - start
        batches.close()
    return LoaderCost(tokens=tokens, positions=positions, seconds=seconds)


def train(config: LoaderBench) -> TrainCost | None:
    """The training step of the model, on random documents; None where it was left out."""
    if not config.steps:
        return None
    bench = TrainBench(
        size=config.size,
        steps=config.steps,
        rows=config.rows,
        sequence_length=config.sequence_length,
        models=("ours",),
        seed=config.seed,
    )
    return next(iter(measure_training(bench)))


def report(config: LoaderBench) -> Iterator[str]:
    """Lines to print, each as soon as it is measured."""
    cost = measure(config)
    yield (
        f"loader alone: {cost.tokens_per_second:.0f} tokens/s ({config.data or f'random documents of {config.size}'}, "
        f"{config.batches} batches), {100 * cost.padding:.2f}% of the positions are padding"
    )
    training = train(config)
    if training is not None:
        ratio = cost.tokens_per_second / training.tokens_per_second
        yield f"training step of {config.size}: {training.tokens_per_second:.0f} tokens/s"
        yield f"the loader makes {ratio:.1f} times what training consumes ({WANTED_RATIO} wanted)"
