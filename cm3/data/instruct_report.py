"""What a file of instruction data holds, and everything in it that would not train."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from cm3.data.instruct import InstructFile
from cm3.data.instruct_rows import ImageFile, InstructRow, RowError
from cm3.errors import ConfigError, DataError
from cm3.tokenizers.document import Document, DocumentTokenizer, Image, Text
from cm3.tokenizers.instruct import ANSWER_CHARACTERS, Layout, cut_at_answers


@dataclass(frozen=True)
class Fault:
    """Why a row would not train."""

    line: int
    """Where it stands in the file, from 1."""
    text: str
    """What is wrong, and how to mend it."""


@dataclass
class InstructReport:
    """Counts over a file; tokens, answers and lengths are those of the rows without faults or merely too long."""

    path: Path
    context_length: int
    """Ids that a row may have."""
    rows: int = 0
    bad: int = 0
    """Rows that would not train."""
    faults: list[Fault] = field(default_factory=list)
    """The first ones, in the order of the file."""
    num_faults: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    turns: int = 0
    images: int = 0
    """Pictures, those computed as conditions included."""
    text_answers: int = 0
    image_answers: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    """Ids of each row, delimiters included."""
    too_long: int = 0
    """Rows longer than the context."""
    duplicates: int = 0
    """Rows that say what an earlier one said, with pictures of the same content."""
    good_rows: list[int] = field(default_factory=list)
    """Indices of the rows that train."""

    def lines(self) -> list[str]:
        """The report in words, one fact a line."""
        lines = [f"{self.path}:{fault.line}: {fault.text}" for fault in self.faults]
        if self.num_faults > len(self.faults):
            lines.append(f"and {self.num_faults - len(self.faults)} faults more")
        tasks = ", ".join(f"{name} {count}" for name, count in sorted(self.tasks.items()))
        lines += [
            f"{self.rows} rows, {self.bad} would not train",
            f"tasks: {tasks or 'none'}",
            f"{self.turns} turns, {self.images} pictures; answers: {self.text_answers} texts, "
            f"{self.image_answers} pictures",
        ]
        if self.lengths:
            mean = sum(self.lengths) / len(self.lengths)
            lines += [
                f"{self.text_tokens} text tokens, {self.image_tokens} image tokens; a row has {mean:.0f} ids on "
                f"average, {max(self.lengths)} at most",
                f"longer than the context of {self.context_length}: {self.too_long} rows "
                f"({self.too_long / len(self.lengths):.1%})",
            ]
        return [*lines, f"duplicates: {self.duplicates} rows"]


def check_file(
    path: str | Path,
    tokenizer: DocumentTokenizer,
    *,
    context_length: int,
    layout: Layout = "text_first",
    max_faults: int = 50,
) -> InstructReport:
    """Read every row as training would, its pictures too, and count.

    Args:
        path: A JSONL file, see `cm3.data.instruct`.
        tokenizer: Of the model that is to be trained.
        context_length: Ids of its longest context; longer rows are left out of training.
        layout: As in training.
        max_faults: How many faults are kept; all are counted.

    Raises:
        DataError: there is no such file, or no row in it.
        ConfigError: the context has no room for a row.
    """
    if context_length < 3:
        raise ConfigError(f"a context of {context_length} ids holds no row; give the length that training will use")
    file = InstructFile(path)
    if not len(file):
        raise DataError(f"{path} has no rows; write one JSON object a line")
    report = InstructReport(path=file.path, context_length=context_length)
    seen: set[bytes] = set()
    digests: dict[str, bytes] = {}
    for index in tqdm(range(len(file)), desc="rows", unit=" rows", disable=None):
        report.rows += 1
        try:
            row, document = file.row(index), file.document(index, layout)
        except RowError as error:
            _add_faults(report, file.line_number(index), error.faults, max_faults)
            continue
        _count(report, row, document, tokenizer)
        content = _digest(row, file.path.parent, digests)
        report.duplicates += content in seen
        seen.add(content)
        if report.lengths[-1] <= context_length:
            report.good_rows.append(index)
            continue
        report.too_long += 1
        fault = (
            f"the row has {report.lengths[-1]} ids, the context {context_length}; shorten its texts, give it fewer "
            "turns or pictures, or leave it out"
        )
        _add_faults(report, file.line_number(index), (fault,), max_faults)
    return report


def _add_faults(report: InstructReport, line: int, faults: tuple[str, ...], max_faults: int) -> None:
    report.bad += 1
    report.num_faults += len(faults)
    room = max(0, max_faults - len(report.faults))
    report.faults += [Fault(line, text) for text in faults[:room]]


def _count(report: InstructReport, row: InstructRow, document: Document, tokenizer: DocumentTokenizer) -> None:
    pieces = cut_at_answers(document).segments
    text_tokens = sum(len(tokenizer.text.encode(part.text)) for part in pieces if isinstance(part, Text))
    images = sum(isinstance(part, Image) for part in pieces)
    image_tokens = images * tokenizer.image.codes_per_image
    answers = [document.segments[segment] for segment, _, _ in document.metadata[ANSWER_CHARACTERS]]
    report.tasks[row.task or "conversation"] += 1
    report.turns += len(row.turns)
    report.images += images
    report.text_answers += sum(isinstance(part, Text) for part in answers)
    report.image_answers += sum(isinstance(part, Image) for part in answers)
    report.text_tokens += text_tokens
    report.image_tokens += image_tokens
    report.lengths.append(text_tokens + image_tokens + len(document.segments) + 1)


def _digest(row: InstructRow, folder: Path, digests: dict[str, bytes]) -> bytes:
    """A hash of what a row says and of the files that it shows, whatever they are called."""
    digest = hashlib.sha256(repr((row.task, [len(turn) for turn in row.turns])).encode())
    for part in (part for turn in row.turns for part in turn):
        if isinstance(part, ImageFile):
            if part.path not in digests:
                digests[part.path] = hashlib.sha256((folder / part.path).read_bytes()).digest()
            digest.update(b"image" + digests[part.path])
        else:
            digest.update(b"text" + hashlib.sha256(part.text.encode()).digest())
    return digest.digest()
