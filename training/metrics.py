"""What a run reports: one console line per logging step, metrics.jsonl, TensorBoard, and the machine's peak."""

import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from cm3.checkpoint import write_text
from cm3.training.engine import Engine


class MetricsWriter:
    """Writes the same numbers to the console, `metrics.jsonl` and, where installed, TensorBoard."""

    def __init__(self, folder: Path, total_steps: int, start_step: int = 0) -> None:
        """Open the files of a run that goes on after `start_step`; lines of later steps are dropped."""
        self.total_steps = total_steps
        self._file = open_metrics(folder / "metrics.jsonl", start_step)
        self._board = _tensorboard(folder / "tensorboard")

    def training(self, step: int, values: dict[str, float]) -> None:
        """Report a training step; `values` has the keys of `training_line`."""
        print(training_line(step, self.total_steps, values), flush=True)
        self._write("train", step, values)

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Report an evaluation; `values` are those of `Window.losses`."""
        parts = [f"{k} {values[f'{k}_loss']:.3f} (ppl {values[f'{k}_perplexity']:.1f})" for k in ("text", "image")]
        line = f"step {step}/{self.total_steps} | validation loss {values['loss']:.4f} | {' | '.join(parts)}"
        print(f"{line} | {values['bits']:.3f} bits/token", flush=True)
        self._write("validation", step, values)

    def _write(self, split: str, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"split": split, "step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class Window:
    """Sums of the losses since the last report, over micro batches and processes, and the time they took."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.start_lap()
        self._clear()

    def _clear(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=self._engine.device)
        self._tokens = self._seconds = 0.0

    def add(self, sums: Tensor) -> None:
        """Add text loss sum, text count, image loss sum and image count of a micro batch; waits for no device."""
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
        """Return the mean losses, and forget the sums. A collective."""
        text_sum, text_count, image_sum, image_count = self._engine.sum_over_processes(self._sums.tolist())
        self._sums.zero_()
        values = {"loss": (text_sum + image_sum) / max(1.0, text_count + image_count)}
        values["bits"] = values["loss"] / math.log(2)
        for name, total, count in (("text", text_sum, text_count), ("image", image_sum, image_count)):
            values[f"{name}_loss"] = total / max(1.0, count)
            values[f"{name}_perplexity"] = math.exp(min(80.0, values[f"{name}_loss"]))
        return values

    def values(self) -> dict[str, float]:
        """Return the mean losses and the tokens per second, and start anew. A collective."""
        values = self.losses() | {"tokens_per_second": self._tokens / max(1e-9, self._seconds)}
        self._clear()
        return values


def open_metrics(path: Path, start_step: int) -> TextIO:
    """Open the lines of a run that goes on after `start_step`; later steps and a half-written line are dropped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= start_step))
    return path.open("a", encoding="utf-8")


def training_line(step: int, total_steps: int, values: dict[str, float]) -> str:
    """Return the console line of a training step."""
    return " | ".join(
        (
            f"step {step}/{total_steps}",
            f"loss {values['loss']:.3f} (text {values['text_loss']:.2f} image {values['image_loss']:.2f})",
            f"grad {values['gradient_norm']:.2f}",
            f"lr {values['learning_rate']:.1e}",
            f"{_count(values['tokens_per_second'])} tok/s",
            f"mfu {100 * values['mfu']:.0f}%",
            f"eta {duration(values['eta_seconds'])}",
        )
    )


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measure this process's matrix-multiply rate (FLOP/s), the 100% of MFU.

    MFU here is model FLOPs per second over what a large matrix product reaches on the same machine, so it needs
    no table of hardware (PaLM, appendix B, uses the data sheet's peak instead).
    """
    size = 8192 if device.type == "cuda" else 1024
    a_NN = torch.ones(size, size, device=device, dtype=dtype)
    torch.matmul(a_NN, a_NN)
    _wait(device)
    runs, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        torch.matmul(a_NN, a_NN)
        _wait(device)
        runs += 1
    return 2 * size**3 * runs / elapsed


def duration(seconds: float) -> str:
    """Return a length of time to read: `45 s`, `12.3 min`, `9.4 h`, `3.1 days`."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= (2 if unit == "days" else 1) * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _count(value: float) -> str:
    return f"{value / 1000:.0f}k" if value >= 10_000 else f"{value:.0f}"


def _tensorboard(folder: Path) -> Any:
    """Return a TensorBoard writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(f"tensorboard is not installed: metrics go to the console and {folder.parent / 'metrics.jsonl'} only")
        return None
    return SummaryWriter(str(folder))
