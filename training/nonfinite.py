"""Steps whose loss or gradient is not finite: which documents they had, and when to give up."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cm3.errors import CM3Error
from cm3.tokenizers.document import TokenizedDocument
from cm3.training.metrics import open_metrics
from cm3.training.state import RunState

SKIPPED_FILE = "skipped.jsonl"


class DivergedError(CM3Error):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Documents(Protocol):
    """Training data: `ShardedDocuments`, or a mixture of several."""

    def __getitem__(self, index: int) -> TokenizedDocument: ...


class SkippedSteps:
    """Writes `skipped.jsonl`, a line for every step that did not update the weights.

    Args:
        folder: Of the run.
        documents: The training data.
        start_step: Step that the run goes on after; lines of later ones are dropped.
    """

    def __init__(self, folder: Path, documents: Documents, start_step: int) -> None:
        self._path, self._documents = folder / SKIPPED_FILE, documents
        if self._path.exists():
            open_metrics(self._path, start_step).close()

    def write(self, step: int, losses: Sequence[float], rows: Sequence[Sequence[int]]) -> None:
        """Write down a step.

        Args:
            step: Its number.
            losses: The mean loss of every micro batch, in the order of the rows.
            rows: Documents of every row of the step; each micro batch has as many rows.
        """
        size = len(rows) // len(losses)
        micro_batches = []
        for index, loss in enumerate(losses):
            numbers = [number for row in rows[index * size : (index + 1) * size] for number in row]
            told = loss if math.isfinite(loss) else str(loss)
            micro_batches.append({"loss": told, "documents": [self._described(number) for number in numbers]})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "micro_batches": micro_batches}) + "\n")

    def _described(self, number: int) -> dict[str, Any]:
        """The number of a document, its raw row, and where it is one of several, its source."""
        metadata = self._documents[number].metadata
        return {"number": number} | {name: metadata[name] for name in ("row", "source") if name in metadata}


def check_divergence(state: RunState, most_in_row: int, folder: Path) -> None:
    """Raise where the last steps were skipped and are as many as a run may skip in a row.

    Raises:
        DivergedError: they are.
    """
    if state.skipped_in_row >= most_in_row:
        raise DivergedError(
            f"the last {state.skipped_in_row} steps, up to step {state.step}, had a loss or gradient that is not "
            f"finite and were skipped; {folder / SKIPPED_FILE} names their documents. Look at those, lower "
            "optimizer.learning_rate, or write the name of an earlier checkpoint into checkpoints/latest"
        )
