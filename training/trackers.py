"""Where a run's numbers and sample sheets go besides its folder: TensorBoard, and Weights & Biases where asked for."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image as PILImage

from cm3.checkpoint import write_text
from cm3.errors import MissingDependencyError

WANDB_ID_FILE = "wandb_id.txt"
"""Holds the name under which Weights & Biases knows the run, so that a run that goes on goes on there too."""


class Tracker(Protocol):
    """Takes what a run reports."""

    def numbers(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step; NaN where there is none."""

    def sheet(self, step: int, sheet: PILImage.Image, text: str) -> None:
        """Take a sample sheet and the captions on it, a line each."""

    def close(self) -> None:
        """Hand over what is still held back."""


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def numbers(self, split: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def sheet(self, step: int, sheet: PILImage.Image, text: str) -> None:
        self._writer.add_image("samples", np.asarray(sheet.convert("RGB")), step, dataformats="HWC")
        self._writer.add_text("captions", text.replace("\n", "  \n"), step)  # two spaces: a line break of Markdown

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run on the service, or in its folder where WANDB_MODE=offline.

    A run that goes on from a checkpoint reports the steps since then again, and the service shows them twice: unlike
    lines of metrics.jsonl, what it has cannot be taken back.

    Args:
        folder: Of the run; its last part is the name.
        project: Project of the user's account.
        settings: Of the run, to be shown beside it.
    """

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        self._wandb = require_wandb()
        path = folder / WANDB_ID_FILE
        if not path.exists():
            write_text(path, secrets.token_hex(4))
        self._run = self._wandb.init(
            project=project,
            name=folder.name,
            id=path.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )
        self._run.define_metric("*", step_metric="step")  # its own count of steps never goes back

    def numbers(self, split: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{f"{split}/{name}": value for name, value in values.items()}})

    def sheet(self, step: int, sheet: PILImage.Image, text: str) -> None:
        self._run.log({"step": step, "samples": self._wandb.Image(sheet, caption=text)})

    def close(self) -> None:
        self._run.finish()


def open_trackers(folder: Path, wandb_project: str | None, settings: Mapping[str, Any]) -> list[Tracker]:
    """Open TensorBoard where it is installed, and Weights & Biases where a project is named.

    Raises:
        MissingDependencyError: a project is named, and wandb is not installed.
    """
    trackers: list[Tracker] = []
    try:
        trackers.append(TensorBoard(folder / "tensorboard"))
    except ImportError:
        print(f"tensorboard is not installed: metrics go to the console and {folder / 'metrics.jsonl'} only")
    if wandb_project is not None:
        trackers.append(WeightsAndBiases(folder, wandb_project, settings))
    return trackers


def require_wandb() -> Any:
    """Import wandb.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise MissingDependencyError(
            f"wandb_project needs wandb, which is not installed ({error}); run `pip install 'open-cm3[wandb]'`, or "
            "leave wandb_project out: metrics.jsonl and TensorBoard have the same numbers"
        ) from error
    return wandb
