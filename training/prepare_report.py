"""What became of the rows of a preparation: counts, reasons, duplicates, and how far it has come."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from cm3.data.shards import read_shard_column
from cm3.data.sources import RowReport
from cm3.tokenizers.document import ImageCodes, TextTokens, TokenizedDocument
from cm3.training.metrics import duration

_EXAMPLES = 3
"""Skipped rows that are named for each reason."""
_NAMED_DUPLICATES = 20
_LINE_SECONDS = 30.0
"""Time between two lines of progress where the output is no terminal."""


@dataclass
class RowCounts(RowReport):
    """Rows read, and why some were skipped."""

    reasons: dict[str, int] = field(default_factory=dict)
    """Rows skipped for each reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first rows skipped for each reason."""

    def add_bad(self, reason: str) -> None:
        super().add_bad(reason)
        self._add(reason_of(reason), 1, [reason])

    def merge(self, other: RowReport) -> None:
        super().merge(other)
        assert isinstance(other, RowCounts), "a report of rows without reasons"
        for reason, count in other.reasons.items():
            self._add(reason, count, other.examples[reason])

    def _add(self, reason: str, count: int, examples: list[str]) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.examples[reason] = (self.examples.get(reason, []) + examples)[:_EXAMPLES]


@dataclass
class PrepareReport:
    """What became of the rows."""

    rows: RowCounts = field(default_factory=RowCounts)
    """Rows read, and those that were skipped."""
    documents: int = 0
    """Rows kept."""
    text_tokens: int = 0
    image_tokens: int = 0
    longest_document: int = 0
    """Ids of the longest document, delimiters included."""
    duplicates: int = 0
    """Documents whose tokens, retrieved context left out, are those of an earlier one. They are kept."""
    duplicate_rows: list[str] = field(default_factory=list)
    """The first of them, and the rows that they repeat."""

    def add(self, document: TokenizedDocument) -> None:
        """Count a document."""
        texts = [len(part.tokens) for part in document.segments if isinstance(part, TextTokens)]
        images = [part.codes_HW.size for part in document.segments if isinstance(part, ImageCodes)]
        self.documents += 1
        self.text_tokens += sum(texts)
        self.image_tokens += sum(images)
        length = sum(texts) + sum(images) + len(document.segments) + 1
        self.longest_document = max(self.longest_document, length)

    def merge(self, other: PrepareReport) -> None:
        """Add what another report counted; duplicates are those of all together, see `count_duplicates`."""
        self.rows.merge(other.rows)
        self.documents += other.documents
        self.text_tokens += other.text_tokens
        self.image_tokens += other.image_tokens
        self.longest_document = max(self.longest_document, other.longest_document)

    def count_duplicates(self, shards: Sequence[Path]) -> None:
        """Find the documents of all shards that were there before, by the hashes of their tokens."""
        if not shards:
            return
        digests = [read_shard_column(path, "digest").to_numpy().astype(np.uint64) for path in shards]
        stops, digest_of = np.cumsum([len(part) for part in digests]), np.concatenate(digests)
        _, first, kind = np.unique(digest_of, return_index=True, return_inverse=True)
        original = first[kind]
        again = np.flatnonzero(original != np.arange(len(original)))

        def row(index: int) -> str:
            number = int(np.searchsorted(stops, index, side="right"))
            place = index - int(stops[number]) + len(digests[number])
            return str(read_shard_column(shards[number], "row")[place].as_py())

        self.duplicates = len(again)
        self.duplicate_rows = [f"{row(i)} is {row(int(original[i]))}" for i in again[:_NAMED_DUPLICATES].tolist()]

    def to_json(self) -> str:
        """All that was counted, as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PrepareReport:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(**{**values, "rows": RowCounts(**values["rows"])})

    def __str__(self) -> str:
        """The report in a few lines."""
        rows = self.rows
        lines = [f"{rows.read} rows read, {self.documents} kept, {rows.bad} skipped"]
        for reason, count in sorted(rows.reasons.items(), key=lambda item: -item[1]):
            lines.append(f"  skipped {count}: {reason}")
            lines += [f"    {example}" for example in rows.examples[reason]]
        lines.append(
            f"{self.text_tokens} text and {self.image_tokens} image tokens; the longest document has "
            f"{self.longest_document} ids"
        )
        lines.append(f"{self.duplicates} documents repeat an earlier one")
        lines += [f"    {pair}" for pair in self.duplicate_rows[:_EXAMPLES]]
        return "\n".join(lines)


def reason_of(message: str) -> str:
    """What is wrong with a row, without what differs from row to row: its name, files, values, details.

    Args:
        message: `row: what is wrong (details); what to do`.
    """
    _, _, fault = message.partition(": ")
    head = re.split(r"[(;:]", fault or message, maxsplit=1)[0]
    return " ".join("..." if re.search(r"[\d/\\.]", word) else word for word in head.split())


class Progress:
    """How many rows are done, how fast, and how long it will take: one line that changes, or one now and then.

    Args:
        total: rows to do.
    """

    def __init__(self, total: int) -> None:
        self._total, self._done, self._made = total, 0, 0
        self._start = self._shown = time.monotonic()

    def update(self, rows: int, *, made: bool) -> None:
        """Count rows; those that an earlier run made say nothing about the speed."""
        self._done += rows
        self._made += rows if made else 0
        is_terminal, now = sys.stderr.isatty(), time.monotonic()
        if is_terminal or now - self._shown >= _LINE_SECONDS or self._done == self._total:
            self._shown = now
            end = "\r" if is_terminal and self._done < self._total else "\n"
            print(self.line(now - self._start).ljust(60), end=end, file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """The line after so many seconds."""
        text = f"{self._done} of {self._total} rows ({self._done / self._total:.0%})"
        if not self._made or seconds <= 0:
            return text
        rate = self._made / seconds
        return f"{text} | {rate:.0f} rows/s | eta {duration((self._total - self._done) / rate)}"
