"""What an evaluation writes: estimates with intervals, `results.json` and a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from cm3.checkpoint import write_json, write_text
from cm3.gallery import save_image


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` samples with its 95% interval, in the metric's own unit.

    Where nothing can be said about the error, as of a single sample, `low` and `high` are NaN, and reports say so.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    def __str__(self) -> str:
        interval = f"[{self.low:.4g}, {self.high:.4g}]" if self.has_interval else "[no interval]"
        return f"{self.value:.4g} {interval} (n={self.count})"


def proportion(successes: float, count: int, z: float = 1.96) -> Estimate:
    """A share of successes with its Wilson score interval (Wilson 1927), which stays inside [0, 1]."""
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    share = successes / count
    denominator = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / denominator
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / denominator
    return Estimate(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)), count)


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


def of_sums(
    rows_NF: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0, draws: int = 2000
) -> list[Estimate]:
    """Figures of a whole set, such as BLEU, with a percentile bootstrap over samples.

    Args:
        rows_NF: What each sample adds to the sums.
        statistic: From sums, along the last axis, to one or more figures along the last axis.
        seed: Of the draws.
        draws: How many.
    """
    if len(rows_NF) == 0:
        return [Estimate(math.nan, math.nan, math.nan, 0) for _ in statistic(np.ones(rows_NF.shape[1]))]
    rng, parts = np.random.default_rng(seed), []
    even = np.full(len(rows_NF), 1 / len(rows_NF))
    for start in range(0, draws, 100):  # all draws at once of a large set would not fit into memory
        times_KN = rng.multinomial(len(rows_NF), even, size=min(100, draws - start))
        parts.append(statistic(times_KN @ rows_NF))
    lows, highs = np.percentile(np.concatenate(parts), [2.5, 97.5], axis=0)
    values = statistic(rows_NF.sum(0))
    return [Estimate(float(v), float(low), float(high), len(rows_NF)) for v, low, high in zip(values, lows, highs)]


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of independent estimates, its interval made of theirs (Zou and Donner 2008,
    Statistics in Medicine 27(10)): the distances to their bounds are added as squares."""
    if not estimates:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = sum(item.value for item in estimates) / len(estimates)
    below = math.hypot(*(item.value - item.low for item in estimates)) / len(estimates)
    above = math.hypot(*(item.high - item.value for item in estimates)) / len(estimates)
    return Estimate(value, value - below, value + above, sum(item.count for item in estimates))


def mean(values: Sequence[float], z: float = 1.96) -> Estimate:
    """The mean of real values with its normal interval; one value has none, and neither have infinite ones."""
    array = np.asarray(values, float)
    if len(array) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(array.mean())
    if len(array) == 1 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan, len(array))
    half = z * array.std(ddof=1) / math.sqrt(len(array))
    return Estimate(value, value - half, value + half, len(array))


@dataclass(frozen=True)
class TaskResult:
    """What one task measured, and the protocol under which the figures hold."""

    task: str
    metrics: dict[str, Estimate]
    protocol: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    sheet: Image | None = field(default=None, compare=False)
    """Some of the pictures that the figures are of."""


def markdown(results: Sequence[TaskResult]) -> str:
    """One table of all metrics: task, metric, value, 95% interval, sample count."""
    lines = ["| task | metric | value | 95% interval | n |", "|---|---|---|---|---|"]
    for result in results:
        for name, estimate in result.metrics.items():
            interval = f"{estimate.low:.4g} to {estimate.high:.4g}" if estimate.has_interval else "none"
            lines.append(f"| {result.task} | {name} | {estimate.value:.4g} | {interval} | {estimate.count} |")
    return "\n".join(lines) + "\n"


def write_report(folder: Path, results: Sequence[TaskResult], header: dict[str, Any]) -> None:
    """Write `results.json` (everything, with the protocol record), `results.md` (the table), and the sheets as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", {**header, "results": [_plain(result) for result in results]})
    write_text(folder / "results.md", markdown(results))
    for result in results:
        if result.sheet is not None:
            save_image(folder / f"{result.task.replace(' ', '_')}.png", result.sheet)


def _plain(result: TaskResult) -> dict[str, Any]:
    """A result as JSON values, without its sheet."""
    return {
        "task": result.task,
        "metrics": {name: _finite(asdict(estimate)) for name, estimate in result.metrics.items()},
        "protocol": _finite(result.protocol),
        "seconds": result.seconds,
    }


def _finite(value: Any) -> Any:
    """`value` with null in the place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
