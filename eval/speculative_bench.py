"""`cm3 bench speculative`: what drawing several ids of a picture in one forward pass saves, on a trained model.

A gain is a property of a model and of how it is drawn from: where the next code is hard to guess, no window helps. So
this draws pictures with trained weights, each plainly and in every window in turn, so that whatever else the machine
does falls on all alike. Time is that of the processor, or on a GPU that of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from cm3.data.scenes import example
from cm3.errors import ConfigError
from cm3.eval.machine import describe, synchronize
from cm3.generation.request import Request
from cm3.generation.settings import SamplingSettings
from cm3.pipeline import CM3


@dataclass(frozen=True, kw_only=True)
class SpeculativeBench:
    """A model, pictures, and what is compared."""

    model: str = "demo"
    """A model folder, a name on the Hugging Face Hub, or `demo`."""
    windows: tuple[int, ...] = (4, 8, 16)
    """Of `speculative_window`, each compared with 0."""
    guidance: tuple[float, ...] = (1.0, 1.75)
    """Weights of classifier-free guidance; 1 is off."""
    temperatures: tuple[float, ...] = (0.3, 1.0)
    """Of the draw."""
    pictures: int = 8
    """Drawn in every case, of captions of scenes."""
    batch: int = 1
    """Pictures that are drawn together."""
    seed: int = 0
    """Of the first picture."""

    def __post_init__(self) -> None:
        if min(self.pictures, self.batch) < 1:
            raise ConfigError(f"pictures={self.pictures}, batch={self.batch}; choose 1 or more of each")
        if min(self.windows, default=0) < 2:
            raise ConfigError(f"windows={self.windows}; choose one or more, each of 2 or more")


@dataclass(frozen=True, kw_only=True)
class SpeculativeCost:
    """What all pictures cost in one window."""

    settings: SamplingSettings
    passes: float
    """Forward passes of a batch, those over the prompts included."""
    seconds: float
    """All pictures."""
    same: int
    """Pictures with exactly the codes of plain decoding."""


def measure(config: SpeculativeBench) -> Iterator[list[SpeculativeCost]]:
    """For every guidance and temperature the plain way, then each window."""
    model = CM3.from_pretrained(config.model)
    requests = [
        model.prompts.text_to_image(
            model.tokenizer.text.encode(example(0, "validation", number).caption), seeds=(config.seed + number,)
        )
        for number in range(config.pictures)
    ]
    batches = [requests[start : start + config.batch] for start in range(0, config.pictures, config.batch)]
    for scale in config.guidance:
        for temperature in config.temperatures:
            chosen = replace(model.defaults, sampler="top-p", guidance_scale=scale, temperature=temperature)
            ways = [replace(chosen, speculative_window=window) for window in (0, *config.windows)]
            yield _measure_case(model, batches, ways)


def _measure_case(model: CM3, batches: list[list[Request]], ways: list[SamplingSettings]) -> list[SpeculativeCost]:
    device = model.engine.device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    passes, seconds, same = [0] * len(ways), [0.0] * len(ways), [0] * len(ways)
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    for way in ways:  # warms up
        model.engine.run(batches[0], way)
    hook = model.transformer.register_forward_pre_hook(counted)
    for requests in batches:
        plain: list[list[int]] = []
        for number, way in enumerate(ways):
            count = 0
            synchronize(device)
            start = clock()
            outputs = model.engine.run(requests, way)
            synchronize(device)
            seconds[number] += clock() - start
            passes[number] += count
            ids = [samples[0].tolist() for samples in outputs]
            plain = plain or ids
            same[number] += sum(found == expected for found, expected in zip(ids, plain, strict=True))
    hook.remove()
    return [
        SpeculativeCost(
            settings=way,
            passes=passes[number] / len(batches),
            seconds=seconds[number],
            same=same[number],
        )
        for number, way in enumerate(ways)
    ]


def table(config: SpeculativeBench, cases: Iterable[list[SpeculativeCost]]) -> Iterator[str]:
    """The lines of a table in Markdown, those of a case as soon as it is measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield (
        f"{config.model}: {config.pictures} pictures in batches of {config.batch}, captions of scenes, seeds from "
        f"{config.seed}; {describe(device)}"
    )
    yield ""
    yield "| guidance | temperature | window | passes | of plain % | ms a picture | of plain % | same pictures |"
    yield "|---|---|---|---|---|---|---|---|"
    for costs in cases:
        plain = costs[0]
        for cost in costs:
            chosen = cost.settings
            yield (
                f"| {chosen.guidance_scale:g} | {chosen.temperature:g} | {chosen.speculative_window or 'off'} "
                f"| {cost.passes:.1f} | {100 * cost.passes / plain.passes:.0f} "
                f"| {1e3 * cost.seconds / config.pictures:.0f} | {100 * cost.seconds / plain.seconds:.0f} "
                f"| {cost.same} of {config.pictures} |"
            )
