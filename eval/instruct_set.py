"""Rows of instruction data as requests with their true answers, for evaluations on one's own data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from tqdm import tqdm

from cm3.config import to_dict
from cm3.data.conditions import CONDITIONS
from cm3.data.instruct import InstructFile
from cm3.data.instruct_rows import ImageFile, InstructRow, lacks_condition
from cm3.data.readers import Table
from cm3.errors import ConfigError, DataError
from cm3.eval.document_tasks import ALL
from cm3.eval.instruct_requests import Part, answers_in_text
from cm3.eval.task import fingerprint
from cm3.tokenizers.document import Text
from cm3.tokenizers.image import load_image
from cm3.tokenizers.instruct_tasks import TASKS


@dataclass(frozen=True)
class Request:
    """A row: what the user gives, and the true answer."""

    name: str
    """File and line."""
    task: str
    texts: tuple[str, ...]
    images: tuple[PILImage.Image, ...]
    answer: Part
    group: str | None = None
    """What the row is reported under, beside all rows; None is nothing."""

    @property
    def contents(self) -> tuple[Part, ...]:
        return (*self.texts, *self.images)


@dataclass(frozen=True, kw_only=True)
class InstructionSet:
    """A file of instruction data (`cm3.data.instruct`), reported as a whole and by group."""

    path: str
    """The .jsonl file; pictures lie beside it. `cm3 convert` makes one of other formats."""
    limit: int | None = None
    """Use the first rows only; null is all."""
    group_by: str | None = None
    """`task`; `id` for what stands before the first / of a row's id; or a column of `table`. Null reports all rows
    together only."""
    table: str | None = None
    """Parquet file or folder that `cm3 convert` made the rows of, whose columns `group_by` may name. The number that
    begins a row's id is the row there."""
    table_split: str = "test"
    """Which split of a folder `table` is."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit} leaves no rows; give a positive number, or null for all rows")
        if self.group_by not in (None, "task", "id") and self.table is None:
            raise ConfigError(
                f"group_by={self.group_by!r} is a column of a table; name it with `table`, or choose task or id"
            )

    def texts(self) -> list[Request]:
        """The rows whose task is answered in text by one segment.

        Raises:
            DataError: a row is faulty, or there is none of this sort.
        """
        return self._open("text", lambda row: len(row.turns[1]) == 1 and isinstance(row.turns[1][0], Text))

    def edits(self) -> list[Request]:
        """The rows that give one picture and are answered by one.

        Raises:
            DataError: as `texts`.
        """
        return self._open("a picture of a picture", _is_edit)

    def groups(self, requests: Sequence[Request]) -> Iterator[tuple[str, list[int]]]:
        """Names of the groups and the numbers of their requests."""
        members: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            members[ALL].append(number)
            if request.group is not None:
                members[f"{self.group_by}={request.group}"].append(number)
        yield from sorted(members.items())

    def record(self, requests: Sequence[Request]) -> dict[str, Any]:
        """The part of a protocol record that says which rows were used."""
        told = [request.answer if isinstance(request.answer, str) else request.name for request in requests]
        return {"rows": to_dict(self), "number": len(requests), "answers": fingerprint(told)}

    def _open(self, sort: str, wanted: Callable[[InstructRow], bool]) -> list[Request]:
        file = InstructFile(self.path)
        labels = self._labels()
        requests = []
        count = len(file) if self.limit is None else min(self.limit, len(file))
        for index in tqdm(range(count), desc="rows", unit=" rows", disable=None):
            try:
                row = file.row(index)
                if row.task is None or not wanted(row):
                    continue
                group = self._group(row, labels)
                requests += [_request(file, index, each, group) for each in _exchanges(row)]
            except DataError as error:
                raise DataError(f"{file.name(index)}: {error}; `cm3 validate {self.path}` names all faults") from error
        if not requests:
            raise DataError(f"{self.path} has no row of a task that is answered with {sort}; choose another file")
        return requests

    def _labels(self) -> Table | None:
        if self.table is None or self.group_by in (None, "task", "id"):
            return None
        return Table.from_parquet(self.table, self.table_split, [str(self.group_by)])

    def _group(self, row: InstructRow, labels: Table | None) -> str | None:
        if self.group_by is None:
            return None
        if self.group_by == "task":
            return row.task
        id = row.id or ""
        if labels is None:
            if "/" not in id:
                raise DataError(f"group_by is id, and the id {id!r} has no / after a group; give ids such as colour/17")
            return id.partition("/")[0]
        number = id.partition(".")[0]
        if not number.isdecimal() or int(number) >= len(labels):
            raise DataError(f"the id {id!r} names no row of {self.table}, which has {len(labels)}; check table")
        return str(labels.row(int(number))[str(self.group_by)])


def _exchanges(row: InstructRow) -> list[InstructRow]:
    """A row of several questions about the same pictures as so many rows, each asked by itself."""
    pictures = tuple(part for part in row.turns[0] if isinstance(part, ImageFile))
    exchanges = [row.turns[:2]]
    for place in range(2, len(row.turns), 2):
        exchanges.append(((*pictures, *row.turns[place]), row.turns[place + 1]))
    return [replace(row, turns=turns) for turns in exchanges]


def _is_edit(row: InstructRow) -> bool:
    assert row.task is not None
    if answers_in_text(row.task) or len(row.turns[1]) != 1:
        return False
    given = sum(isinstance(part, ImageFile) for part in row.turns[0])
    return given == 1 or lacks_condition(row.task, row.turns)


def _request(file: InstructFile, index: int, row: InstructRow, group: str | None) -> Request:
    assert row.task is not None and row.task in TASKS
    opened = [[_opened(part, file.path.parent) for part in turn] for turn in row.turns]
    texts = tuple(part for part in opened[0] if isinstance(part, str))
    images = tuple(part for part in opened[0] if not isinstance(part, str))
    answer = opened[1][0]
    if lacks_condition(row.task, row.turns):
        assert not isinstance(answer, str)
        images = (CONDITIONS[row.task](answer),)
    return Request(file.name(index), row.task, texts, images, answer, group)


def _opened(part: Text | ImageFile, folder: Path) -> Part:
    return part.text if isinstance(part, Text) else load_image(folder / part.path)
