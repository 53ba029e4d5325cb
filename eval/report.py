"""What an evaluation writes: estimates with intervals, `results.json` and a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cm3.checkpoint import write_json, write_text


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` samples with its 95% interval, in the metric's own unit."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n={self.count})"


def proportion(successes: int, count: int, z: float = 1.96) -> Estimate:
    """A share of successes with its Wilson score interval (Wilson 1927), which stays inside [0, 1]."""
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    share = successes / count
    denominator = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / denominator
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / denominator
    return Estimate(share, min(centre - half, share), max(centre + half, share), count)


def share(values: Iterable[bool | None]) -> Estimate:
    """The share of True among the values that are stated; None is not."""
    stated = [value for value in values if value is not None]
    return proportion(sum(stated), len(stated))


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Estimate:
    """sum(numerators) / sum(denominators) with a percentile bootstrap over samples (2,000 draws).

    For shares whose unit is not the sample, such as objects named per picture.
    """
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    if len(top) == 0 or bottom.sum() == 0:
        return Estimate(math.nan, math.nan, math.nan, len(top))
    draws = np.random.default_rng(seed).integers(len(top), size=(2000, len(top)))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = top[draws].sum(1) / bottom[draws].sum(1)
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high), len(top))


def mean(values: Sequence[float], z: float = 1.96) -> Estimate:
    """The mean of real values with its normal interval."""
    array = np.asarray(values, float)
    if len(array) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    half = z * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    value = float(array.mean())
    return Estimate(value, value - half, value + half, len(array))


@dataclass(frozen=True)
class TaskResult:
    """What one task measured, and the protocol under which the figures hold."""

    task: str
    metrics: dict[str, Estimate]
    protocol: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def markdown(results: Sequence[TaskResult]) -> str:
    """One table of all metrics: task, metric, value, 95% interval, sample count."""
    lines = ["| task | metric | value | 95% interval | n |", "|---|---|---|---|---|"]
    for result in results:
        for name, estimate in result.metrics.items():
            interval = f"{estimate.low:.4g} to {estimate.high:.4g}"
            lines.append(f"| {result.task} | {name} | {estimate.value:.4g} | {interval} | {estimate.count} |")
    return "\n".join(lines) + "\n"


def write_report(folder: Path, results: Sequence[TaskResult], header: dict[str, Any]) -> None:
    """Write `results.json` (everything, with the protocol record) and `results.md` (the table)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", {**header, "results": [_finite(asdict(result)) for result in results]})
    write_text(folder / "results.md", markdown(results))


def _finite(value: Any) -> Any:
    """`value` with null in the place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
