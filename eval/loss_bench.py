"""`cm3 bench loss`: time and peak memory of the chunked cross-entropy beside the plain one, on one long row.

Each runs in a process of its own: a transformer of one block, forward and backward.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from cm3.errors import ConfigError
from cm3.eval.machine import describe, memory_in_use, peak_memory, synchronize
from cm3.model.config import ModelConfig
from cm3.model.loss import next_token_loss
from cm3.model.transformer import Transformer

_HEAD_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class LossBench:
    """A row, a vocabulary, and the chunks that are compared."""

    tokens: int = 4096
    """Of the row."""
    vocabulary: int = 65_536
    """Ids."""
    width: int = 1024
    """Of the model, a multiple of 64."""
    chunks: tuple[int, ...] = (2048, 512)
    """Tokens whose logits exist at once; the first is the default of `next_token_loss`."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of weights and activations; losses are made in float32."""
    seed: int = 0
    """Draws weights and ids."""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("vocabulary", 2), ("width", _HEAD_WIDTH)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}; choose {least} or more")
        if self.width % _HEAD_WIDTH or min(self.chunks, default=0) < 1:
            raise ConfigError(
                f"width={self.width}, chunks={self.chunks}; choose a multiple of {_HEAD_WIDTH}, and chunks of 1 or more"
            )


@dataclass(frozen=True, kw_only=True)
class LossCost:
    """One way to make the loss."""

    name: str
    peak_bytes: float
    """Most memory beside the model, its gradients included; nan on a CPU whose system is not Linux."""
    seconds: float
    """Forward and backward, once."""
    loss: float


def measure(config: LossBench) -> Iterator[LossCost]:
    """The plain loss, then each chunk size; each in its own process."""
    for chunk in (None, *config.chunks):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield process.submit(measure_loss, config, chunk).result()


def measure_loss(config: LossBench, chunk: int | None) -> LossCost:
    """One loss and its gradients; `chunk` None is the plain loss, whose logits are all there in float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    with device:
        model = Transformer(
            ModelConfig(
                vocabulary_size=config.vocabulary,
                width=config.width,
                num_layers=1,
                num_heads=config.width // _HEAD_WIDTH,
                max_positions=config.tokens,
            )
        ).to(torch.bfloat16 if config.precision == "bf16" else torch.float32)
        ids_BT = torch.randint(config.vocabulary, (1, config.tokens))
    before = memory_in_use(device)
    synchronize(device)
    start = time.perf_counter()
    if chunk is None:
        logits_BTV = model.logits(model(ids_BT)).float()
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    else:
        loss = next_token_loss(model, ids_BT, image_range=(0, 0), chunk_size=chunk).loss
    loss.backward()
    synchronize(device)
    return LossCost(
        name="plain" if chunk is None else f"chunks of {chunk}",
        peak_bytes=peak_memory(device) - before,
        seconds=time.perf_counter() - start,
        loss=float(loss.detach()),
    )


def table(config: LossBench, costs: Iterable[LossCost]) -> Iterator[str]:
    """The lines of a table in Markdown, each as soon as its loss is measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield (
        f"{config.tokens} tokens, {config.vocabulary} ids, width {config.width}, {config.precision}, "
        f"seed {config.seed}; {describe(device)}"
    )
    yield ""
    yield "| loss | peak GB beside the model | seconds | value |"
    yield "|---|---|---|---|"
    for cost in costs:
        yield f"| {cost.name} | {cost.peak_bytes / 1e9:.3f} | {cost.seconds:.2f} | {cost.loss:.4f} |"
