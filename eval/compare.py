"""`cm3 compare`: figures of several evaluations side by side, runs that differ in their seed taken together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cm3.checkpoint import read_json
from cm3.errors import ConfigError
from cm3.eval.report import Estimate

_T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""0.975 quantiles of Student's t for 1 to 10 degrees of freedom; more runs take the last, which is a little wide."""


def over_runs(values: Sequence[float]) -> Estimate:
    """Mean of independent runs with Student's 95% interval; one run has none."""
    count, value = len(values), float(np.mean(values))
    if count == 1:
        return Estimate(value, math.nan, math.nan, 1)
    quantile = _T_QUANTILES[min(count - 1, len(_T_QUANTILES)) - 1]
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(value, value - half, value + half, count)


def compare(groups: Mapping[str, Sequence[str | Path]]) -> str:
    """A Markdown table: a row for each metric, a column for each group of evaluation folders.

    Args:
        groups: by name the folders that `cm3 eval` wrote for the runs of a group.

    Raises:
        ModelFilesError: a folder has no readable results.json.
        ConfigError: the folders of a group measured different things.
    """
    columns = {name: _column(name, folders) for name, folders in groups.items()}
    metrics = list(dict.fromkeys(metric for column in columns.values() for metric in column))
    lines = [
        f"| task | metric | {' | '.join(_heading(name, len(groups[name])) for name in columns)} |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for task, metric in metrics:
        cells = [_cell(column.get((task, metric))) for column in columns.values()]
        lines.append(f"| {task} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _heading(name: str, count: int) -> str:
    return f"{name} ({count} run{'s' if count > 1 else ''})"


def _column(name: str, folders: Sequence[str | Path]) -> dict[tuple[str, str], Estimate]:
    runs = [_figures(Path(folder)) for folder in folders]
    if any(run.keys() != runs[0].keys() for run in runs):
        raise ConfigError(
            f"the runs of {name} were not measured by the same tasks; give each group one config of `cm3 eval`"
        )
    return {key: over_runs([run[key] for run in runs]) for key in runs[0]}


def _figures(folder: Path) -> dict[tuple[str, str], float]:
    results = read_json(folder / "results.json")["results"]
    return {
        (result["task"], metric): math.nan if estimate["value"] is None else estimate["value"]
        for result in results
        for metric, estimate in result["metrics"].items()
    }


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if not estimate.has_interval:
        return f"{estimate.value:.4g}"
    return f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g})"
