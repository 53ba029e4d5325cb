"""Other people's formats to instruction data (`cm3.data.instruct`), pictures included.

A row that cannot be converted is skipped and counted; every line that is written has passed the checks of
`cm3.data.instruct_rows`. Pictures that lie in files are reached through one link to their folder, or copied;
pictures inside Parquet are written beside the lines, under a hash of their content.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import PIL.Image
from tqdm import tqdm

from cm3.checkpoint import atomic_path
from cm3.data.conditions import CONDITIONS
from cm3.data.instruct_rows import ImageFile, InstructRow, parse_row, path_fault
from cm3.errors import ConfigError, DataError
from cm3.tokenizers.document import Text
from cm3.tokenizers.instruct_tasks import TASKS

ROWS_FILE = "instruct.jsonl"
IMAGES_FOLDER = "images"
"""Pictures that were written or copied."""
LINK = "source"
"""Link to the folder that pictures lie in."""

_NAMED_ROWS = 20

Value = Text | ImageFile | list[Text]
"""What stands in a field of a task; several texts where the field takes them."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What a format does not say by itself."""

    task: str | None = None
    """Task of the rows; None is the format's own."""
    images: str | None = None
    """Folder of the pictures; None is the folder of the input."""
    annotations: str | None = None
    """vqav2: the file of answers; the input is that of the questions."""
    image_name: str | None = None
    """vqav2: file of a picture, such as `COCO_val2014_{image_id:012d}.jpg`; None goes by the file's `data_subtype`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """parquet, instructpix2pix: field of the task to column, where the names differ."""
    split: str = "train"
    """parquet, instructpix2pix: which split of a folder."""
    together: bool = False
    """parquet, instructpix2pix: exchanges of one row instead of a row for each element of lists of texts."""
    limit: int | None = None
    """Convert the first rows only; None is all."""
    copy: bool = False
    """Copy pictures into the folder; off: link to where they lie."""


@dataclass
class ConversionReport:
    """What became of the rows."""

    path: Path
    """The file written."""
    written: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)
    """Why the first 20 were skipped."""

    def skip(self, reason: str) -> None:
        """Count a row that is left out."""
        self.skipped += 1
        if len(self.reasons) < _NAMED_ROWS:
            self.reasons.append(reason)


class Converter(Protocol):
    """One foreign format: named raw rows, and what each one says."""

    def raw_rows(self) -> Iterator[tuple[str, Any]]: ...

    def convert(self, name: str, raw: Any) -> list[InstructRow]: ...


class ImageStore:
    """Brings pictures into a folder of instruction data.

    Args:
        out: That folder.
        source: Where the pictures lie that are named by their paths.
        copy: Whether they are copied; otherwise `out/source` becomes a link to `source`.
    """

    def __init__(self, out: Path, source: Path, copy: bool) -> None:
        self._out, self._source, self._copy = out, source, copy
        self._is_linked = False

    def file(self, path: str) -> ImageFile:
        """A picture by its path below `source`.

        Raises:
            DataError: it is not there, or outside.
        """
        if fault := path_fault(path):
            raise DataError(f"the picture {path!r} {fault}")
        if not (self._source / path).is_file():
            raise DataError(f"the picture {self._source / path} is missing; give its folder with --images")
        if self._copy:
            target = self._out / IMAGES_FOLDER / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._source / path, target)
            return ImageFile(f"{IMAGES_FOLDER}/{path}")
        self._link()
        return ImageFile(f"{LINK}/{path}")

    def data(self, data: bytes) -> ImageFile:
        """A picture from the bytes of its file; equal pictures become one.

        Raises:
            DataError: the bytes are no picture.
        """
        try:
            with PIL.Image.open(io.BytesIO(data)) as image:
                suffix = (image.format or "").lower()
        except (PIL.UnidentifiedImageError, PIL.Image.DecompressionBombError, OSError, ValueError) as error:
            raise DataError(f"a picture of {len(data)} bytes cannot be read ({error})") from error
        name = hashlib.sha256(data).hexdigest()[:32]
        target = self._out / IMAGES_FOLDER / name[:2] / f"{name}.{suffix}"
        if not target.is_file() or target.stat().st_size != len(data):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return ImageFile(target.relative_to(self._out).as_posix())

    def _link(self) -> None:
        if self._is_linked:
            return
        link, source = self._out / LINK, self._source.resolve()
        if link.is_symlink() and link.resolve() == source:
            pass
        elif link.is_symlink() or link.exists():
            raise ConfigError(f"{link} is there already and is no link to {source}; remove it or choose another --out")
        else:
            self._out.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source, target_is_directory=True)
        self._is_linked = True


def task_fields(task: str) -> tuple[str, ...]:
    """The fields of a task by name.

    Raises:
        ConfigError: there is no such task.
    """
    if task not in TASKS:
        raise ConfigError(f"there is no task {task!r}; choose among {', '.join(TASKS)}")
    return tuple(name.rstrip("*") for name in (*TASKS[task].user, *TASKS[task].assistant))


def needed_fields(task: str, given: tuple[str, ...], format: str) -> tuple[str, ...]:
    """The fields of a task that a row must have; a condition picture that can be computed need not be given.

    Raises:
        ConfigError: there is no such task, or it needs what the format does not give.
    """
    computed = "condition_image" if task in CONDITIONS else None
    needed = tuple(name for name in task_fields(task) if name in given or name != computed)
    if missing := [name for name in needed if name not in given]:
        raise ConfigError(
            f"task {task!r} needs {', '.join(missing)}, {format} has {', '.join(given)}; choose another --task"
        )
    return needed


def task_row(task: str, values: Mapping[str, Value], id: str | None) -> InstructRow:
    """A row of a task from the values of its fields; those that are not given are left out."""
    turns = []
    for names in (TASKS[task].user, TASKS[task].assistant):
        turn: list[Text | ImageFile] = []
        for value in (values[name.rstrip("*")] for name in names if name.rstrip("*") in values):
            turn += value if isinstance(value, list) else [value]
        turns.append(tuple(turn))
    return InstructRow(turns=tuple(turns), task=task, id=id)


def joined_rows(rows: Sequence[InstructRow], id: str) -> InstructRow:
    """Rows about the same pictures as the exchanges of one; the pictures stand in the first."""
    later = ((_without_pictures(row.turns[0]), *row.turns[1:]) for row in rows[1:])
    return InstructRow(turns=(*rows[0].turns, *(turn for turns in later for turn in turns)), task=rows[0].task, id=id)


def _without_pictures(turn: tuple[Text | ImageFile, ...]) -> tuple[Text | ImageFile, ...]:
    return tuple(part for part in turn if isinstance(part, Text))


def write_rows(converter: Converter, out: Path, limit: int | None) -> ConversionReport:
    """Write `instruct.jsonl` into a folder, whole or not at all.

    Raises:
        DataError: not one row could be converted.
    """
    report = ConversionReport(out / ROWS_FILE)
    with atomic_path(report.path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        raw_rows = islice(converter.raw_rows(), limit)
        for name, raw in tqdm(raw_rows, desc="rows", unit=" rows", disable=None):
            try:
                rows = converter.convert(name, raw)
            except DataError as error:
                report.skip(f"{name}: {error}")
                continue
            for row in rows:
                line = row.to_json()
                try:
                    parse_row(line.encode())
                except (DataError, UnicodeEncodeError) as error:
                    report.skip(f"{name}: {error}")
                    continue
                file.write(f"{line}\n")
                report.written += 1
        if not report.written:
            first = "; ".join(report.reasons[:3]) or "there are no rows"
            raise DataError(f"no row could be converted: {first}")
    return report
