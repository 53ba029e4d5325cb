"""Instruction data: one JSON object a line, a conversation of turns of texts and pictures. Reading it.

    {"task": "vqa", "turns": [
        {"role": "user", "content": [{"image": "images/7.png"}, {"text": "How many circles are there?"}]},
        {"role": "assistant", "content": [{"text": "two"}]}]}

(on one line). Turns alternate and end with the assistant's, which is what is learnt. A turn holds any number of
segments in any order, each a text or the path of a picture; paths are relative to the file and stay inside its
folder. `task` names a template of `cm3.tokenizers.instruct_tasks`; without it the segments are laid out as they are.
Where a task asks and is answered in words, further questions about the same picture may follow as turns without it.
`id` may say where a row comes from. Other keys are refused. A row of a task in `CONDITIONS` may leave the condition
picture out; it is then computed from the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from cm3.data.conditions import CONDITIONS
from cm3.data.instruct_rows import InstructRow, RowError, lacks_condition, parse_row
from cm3.errors import DataError
from cm3.tokenizers.document import Document, Image, Text
from cm3.tokenizers.image import load_image
from cm3.tokenizers.instruct import Layout, lay_out
from cm3.tokenizers.instruct_tasks import TASKS

_BLANK = Image(PIL.Image.new("RGB", (1, 1)))


class InstructFile:
    """The rows of a JSONL file, one by one: `len`, `name(index)`, `row(index)`, `document(index)`.

    Raises:
        DataError: there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path} is not a file; give a .jsonl file with one row a line")
        lines = enumerate(self.path.read_bytes().splitlines(), start=1)
        self._lines = [(number, line) for number, line in lines if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def line_number(self, index: int) -> int:
        """Where a row stands in the file, from 1; empty lines count."""
        return self._lines[index][0]

    def name(self, index: int) -> str:
        """File and line of a row."""
        return f"{self.path}:{self.line_number(index)}"

    def row(self, index: int) -> InstructRow:
        """A row, its pictures not opened.

        Raises:
            RowError: with all of its faults but those inside pictures.
        """
        return parse_row(self._lines[index][1])

    def document(self, index: int, layout: Layout = "text_first", seed: int = 0) -> Document:
        """A row laid out as a document that knows its answers, in a wording drawn by `seed`.

        Raises:
            RowError: with all of its faults.
        """
        row = self.row(index)
        return self._laid_out(index, row, self._opened(row), layout, seed)

    def texts(self, index: int, seed: int = 0) -> list[str]:
        """The texts of that document, without opening pictures; to train a text tokenizer.

        Raises:
            RowError: as `row`.
        """
        row = self.row(index)
        turns = [tuple(part if isinstance(part, Text) else _BLANK for part in turn) for turn in row.turns]
        document = self._laid_out(index, row, turns, "text_first", seed)
        return [part.text for part in document.segments if isinstance(part, Text)]

    def _laid_out(
        self, index: int, row: InstructRow, turns: Sequence[tuple[Text | Image, ...]], layout: Layout, seed: int
    ) -> Document:
        if row.task and lacks_condition(row.task, row.turns):
            picture = next(part for part in turns[1] if isinstance(part, Image))
            turns = ((Image(CONDITIONS[row.task](picture.pixels)), *turns[0]), turns[1])
        num_wordings = len(TASKS[row.task].wordings) if row.task else 1
        wording = int(np.random.default_rng((seed, index)).integers(num_wordings))
        document = lay_out(turns, task=row.task, layout=layout, wording=wording)
        return Document(document.segments, {**document.metadata, "row": self.name(index), "id": row.id})

    def _opened(self, row: InstructRow) -> list[tuple[Text | Image, ...]]:
        faults: list[str] = []
        turns: list[tuple[Text | Image, ...]] = []
        for number, turn in enumerate(row.turns):
            opened: list[Text | Image] = []
            for place, part in enumerate(turn):
                if isinstance(part, Text):
                    opened.append(part)
                    continue
                try:
                    opened.append(Image(load_image(self.path.parent / part.path)))
                except DataError as error:
                    faults.append(f"turns[{number}].content[{place}].image: {error}")
            turns.append(tuple(opened))
        if faults:
            raise RowError(faults)
        return turns
