"""What a run reports: one console line per logging step, metrics.jsonl, and the trackers."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image as PILImage
from torch import Tensor

from cm3.checkpoint import write_text
from cm3.training.engine import Engine
from cm3.training.loss import SUMS
from cm3.training.spikes import WINDOW, SpikeDetector
from cm3.training.trackers import Tracker


class MetricsWriter:
    """Writes the same numbers to the console, `metrics.jsonl` and the trackers."""

    def __init__(self, folder: Path, total_steps: int, start_step: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        """Open the files of a run that goes on after `start_step`; lines of later steps are dropped."""
        self.total_steps = total_steps
        path = folder / "metrics.jsonl"
        self._file = open_metrics(path, start_step, redo_validation=start_step in (0, total_steps))
        self._spikes = SpikeDetector(_last_losses(path))
        self._trackers = trackers

    def training(self, step: int, values: dict[str, Any]) -> None:
        """Report a training step; `values` has the keys of `training_line`, but for `loss_spike`, which is added."""
        values = values | {"loss_spike": self._spikes.excess(values["loss"])}
        print(training_line(step, self.total_steps, values), flush=True)
        self._write("train", step, values)

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Report an evaluation; `values` are those of `Window.losses`."""
        parts = [f"{k} {values[f'{k}_loss']:.3f} (ppl {values[f'{k}_perplexity']:.1f})" for k in ("text", "image")]
        line = f"step {step}/{self.total_steps} | validation loss {values['loss']:.4f} | {' | '.join(parts)}"
        print(f"{line} | {values['bits']:.3f} bits/token", flush=True)
        self._write("validation", step, values)

    def samples(self, step: int, sheet: PILImage.Image, captions: Sequence[str]) -> None:
        """Hand a sample sheet and the captions on it to the trackers."""
        for tracker in self._trackers:
            tracker.sheet(step, sheet, "\n".join(captions))

    def _write(self, split: str, step: int, values: dict[str, Any]) -> None:
        told = {name: value if _is_json(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"split": split, "step": step, **told}) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        for tracker in self._trackers:
            tracker.numbers(split, step, numbers)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


class Window:
    """Sums of the losses since the last report, over micro batches and processes, and the time they took."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.start_lap()
        self._clear()

    def _clear(self) -> None:
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self._engine.device)
        self._tokens = self._seconds = 0.0

    def add(self, sums: Tensor) -> None:
        """Add the `SUMS` of a micro batch; waits for no device."""
        self._sums += sums

    def start_lap(self) -> None:
        """Start the clock of a training step."""
        self._start = time.perf_counter()

    def lap(self, tokens: float) -> float:
        """Stop the clock of a training step that saw `tokens`; return its seconds."""
        seconds = time.perf_counter() - self._start
        self._tokens += tokens
        self._seconds += seconds
        return seconds

    def losses(self) -> dict[str, float]:
        """Return the mean losses since the last report. A collective."""
        return self._means(self._totals())

    def values(self) -> dict[str, float]:
        """Return the mean losses, z-loss, output norm and tokens per second, and start anew. A collective."""
        totals = self._totals()
        values = self._means(totals)
        values["z_loss"] = _mean(totals["z_loss"], totals["weight"])
        values["output_norm"] = _mean(totals["output_norm"], totals["tokens"])
        values["tokens_per_second"] = self._tokens / max(1e-9, self._seconds)
        self._clear()
        return values

    def _totals(self) -> dict[str, float]:
        return dict(zip(SUMS, self._engine.sum_over_processes(self._sums.tolist()), strict=True))

    def _means(self, totals: dict[str, float]) -> dict[str, float]:
        loss = totals["text_loss"] + totals["image_loss"]
        values = {"loss": _mean(loss, totals["text_count"] + totals["image_count"])}
        values["bits"] = values["loss"] / math.log(2)
        for name in ("text", "image"):
            mean = _mean(totals[f"{name}_loss"], totals[f"{name}_count"])
            values |= {f"{name}_loss": mean, f"{name}_perplexity": math.exp(min(mean, 80.0))}
        return values


def _mean(total: float, count: float) -> float:
    """Return the mean of what was counted, NaN of nothing: no target of that kind, or no step with an update."""
    return total / count if count else math.nan


def _is_json(value: float | str) -> bool:
    """Return whether JSON knows a value: a text, or a number that is finite."""
    return isinstance(value, str) or math.isfinite(value)


def open_metrics(path: Path, start_step: int, *, redo_validation: bool = False) -> TextIO:
    """Open the lines of a run that goes on after `start_step`; later steps and a half-written line are dropped.

    With `redo_validation` an evaluation at `start_step` is dropped too: those before the first step and after the last
    come again.
    """
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        values = json.loads(line) if line.endswith("\n") else {"step": math.inf}
        again = redo_validation and values["step"] == start_step and values.get("split") == "validation"
        if values["step"] <= start_step and not again:
            kept.append(line)
    write_text(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def _last_losses(path: Path) -> list[float]:
    """Return the last training losses of a run's lines."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    return [loss for loss in losses if loss is not None][-WINDOW:]


def training_line(step: int, total_steps: int, values: dict[str, Any]) -> str:
    """Return the console line of a training step; what is wrong stands at its end."""
    parts = [
        f"step {step}/{total_steps}",
        f"loss {values['loss']:.3f} (text {values['text_loss']:.2f} image {values['image_loss']:.2f})",
        f"grad {values['gradient_norm']:.2f}",
        f"lr {values['learning_rate']:.1e}",
        f"{_count(values['tokens_per_second'])} tok/s",
        f"mfu {100 * values['mfu']:.0f}%",
        f"eta {duration(values['eta_seconds'])}",
    ]
    if values["loss_spike"]:
        parts.append(f"LOSS SPIKE: {values['loss_spike']:.2f} above the median")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """Return a length of time to read: `45 s`, `12.3 min`, `9.4 h`, `3.1 days`."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= (2 if unit == "days" else 1) * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _count(value: float) -> str:
    return f"{value / 1000:.0f}k" if value >= 10_000 else f"{value:.0f}"
