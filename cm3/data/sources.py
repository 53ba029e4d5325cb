"""Where documents come from: one config, one `Source`, whatever the raw layout; bad rows are counted and skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image as PILImage

from cm3.config import check_seed
from cm3.data import readers
from cm3.data.instruct import InstructFile
from cm3.data.scene_tasks import DEFAULT_MIX, SceneTasks
from cm3.data.streamed import StreamedTable, UnreachableError
from cm3.errors import CM3Error, ConfigError, DataError
from cm3.tokenizers.document import Document, Image, Text
from cm3.tokenizers.image import load_image
from cm3.tokenizers.instruct import Layout

SourceKind = Literal["scenes", "parquet", "hub", "jsonl", "folder", "webdataset", "instruct", "scene_tasks"]

_DRAWN = ("scenes", "scene_tasks")
_LAID_OUT = ("instruct", "scene_tasks")

_NAMED_ROWS = 20


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which raw rows to read, and which of their columns."""

    kind: SourceKind
    """scenes: drawn by `cm3.data.scenes`; parquet: a file, a glob or a folder holding `<split>*.parquet`;
    hub: a name on the Hugging Face Hub or a local folder in its layout; jsonl: one object a line, image paths
    relative to the file; folder: images with a .txt of the same name each, or metadata.jsonl / metadata.csv
    with a `file_name` column; webdataset: a tar file, a glob of them or a folder of them; instruct: a file of
    conversations and tasks, see `cm3.data.instruct`, whose rows know their own texts and images; scene_tasks: such
    tasks drawn by `cm3.data.scene_tasks`."""
    path: str = ""
    """Where the rows lie (see `kind`); not used by scenes and scene_tasks."""
    subset: str | None = None
    """Configuration name of a Hub data set; None where it has only one."""
    split: str = "train"
    """Which split of scenes, hub and of a parquet folder."""
    text_columns: tuple[str, ...] = ("text",)
    """Columns holding the caption; with several, each row uses one of its filled ones, drawn by `seed`.
    Empty: no text, images only. webdataset: `txt`'s content and the keys of `json` are columns, `text` means
    either."""
    image_column: str | None = "image"
    """Column holding the image (bytes, a path, or the {bytes, path} of `datasets`); None: text only."""
    metadata_columns: tuple[str, ...] = ()
    """Columns copied into `Document.metadata` under their own names."""
    stream: bool = False
    """parquet and hub: read the rows where the files lie, a row group at a time, instead of fetching all files first;
    the path of parquet may then be an address such as https://, hf:// or s3://. Every file must be reachable, since
    their ends are read at the start; a file of the Hub is that of one commit, one behind another address must not
    change under its name. What cannot be read after many tries ends the run; whole shards are kept."""
    where: dict[str, list[str]] = field(default_factory=dict)
    """parquet and hub: for some columns the values, as texts, of the rows to use; empty is all rows."""
    limit: int | None = None
    """Use the first rows only; None is all. Scenes are endless and need it."""
    layout: Layout = "text_first"
    """instruct and scene_tasks: order of a task's segments; text_first is the paper's, image_first puts the images
    given first."""
    tasks: dict[str, float] = field(default_factory=dict)
    """scene_tasks: weight of each task in the mix; empty is the default mix, of all but infill."""
    seed: int = 0
    """Draws the text column of each row, the scenes, and the wording of each row of instruct and scene_tasks."""
    max_bad_fraction: float = 0.01
    """Stop with an error once more than this share of all rows could not be used."""

    def __post_init__(self) -> None:
        if self.kind in _DRAWN and self.limit is None:
            raise ConfigError(f"kind={self.kind} has no end; set limit to the number of rows to use")
        if self.tasks and self.kind != "scene_tasks":
            raise ConfigError(f"tasks are for kind=scene_tasks, found kind={self.kind}; leave them out")
        if self.kind not in _DRAWN and not self.path:
            raise ConfigError(f"kind={self.kind} needs a path; set it in the config or with --data.path")
        if not self.text_columns and self.image_column is None:
            raise ConfigError("text_columns is empty and image_column is null; name at least one column to read")
        if self.where and self.kind not in ("parquet", "hub"):
            raise ConfigError(f"where chooses rows of parquet and hub, found kind={self.kind}; leave it out")
        if self.stream and self.kind not in ("parquet", "hub"):
            raise ConfigError(f"stream reads parquet and hub, found kind={self.kind}; leave it out")
        if self.stream and self.where:
            raise ConfigError("where looks at all rows first, which stream is to spare; leave one of them out")
        if self.kind in _LAID_OUT and self.metadata_columns:
            raise ConfigError(f"kind={self.kind} has no columns; leave metadata_columns out")
        if "row" in self.metadata_columns:
            raise ConfigError("metadata_columns may not name 'row', which holds the name of the row; rename it")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit} leaves no rows; give a positive number, or null for all rows")
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ConfigError(f"max_bad_fraction={self.max_bad_fraction} is not a share; give a number from 0 to 1")
        check_seed(self.seed)


class Reader(Protocol):
    """Random access to raw rows. A column's value may be a function without arguments, called when it is
    needed."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def row(self, index: int) -> Mapping[str, Any]: ...


@dataclass
class RowReport:
    """What became of the rows read so far."""

    read: int = 0
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    """`row: reason` of the first 20 bad rows."""

    @property
    def kept(self) -> int:
        return self.read - self.bad

    def add_bad(self, reason: str) -> None:
        self.bad += 1
        if len(self.bad_rows) < _NAMED_ROWS:
            self.bad_rows.append(reason)

    def merge(self, other: RowReport) -> None:
        self.read += other.read
        self.bad += other.bad
        self.bad_rows = (self.bad_rows + other.bad_rows)[:_NAMED_ROWS]

    def check(self, num_rows: int, max_bad_fraction: float) -> None:
        """Raise `DataError` if the bad rows are more than the allowed share of `num_rows`."""
        if self.bad > max_bad_fraction * num_rows:
            raise DataError(
                f"{self.bad} of {num_rows} rows are bad, more than max_bad_fraction={max_bad_fraction} "
                f"allows; repair them or raise max_bad_fraction. First: {'; '.join(self.bad_rows[:3])}"
            )


class Source:
    """The documents of a config: `len`, random access (a bad row raises `DataError`), iteration (skips bad
    rows)."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.report = RowReport()
        self._reader = _READERS[config.kind](config)
        if not len(self._reader):
            chosen = f", where={config.where}" if config.where else ""
            raise DataError(f"{config.path} has no rows for kind={config.kind}{chosen}; check path and split")

    @property
    def streamed_files(self) -> list[str]:
        """Addresses of the files that rows are streamed from, with their commits on the Hub."""
        return self._reader.files if isinstance(self._reader, StreamedTable) else []

    def __len__(self) -> int:
        limit = self.config.limit
        return len(self._reader) if limit is None else min(limit, len(self._reader))

    def __getitem__(self, index: int) -> Document:
        """The document of a row: its text, then its image (CM3Leon, figure 9); of instruct, the row laid out.

        Raises:
            DataError: naming the row, if its text or image is missing or broken.
            UnreachableError: a remote file cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} was asked for; the source has {len(self)}")
        name = self._reader.name(index)
        try:
            if isinstance(self._reader, InstructFile | SceneTasks):
                return self._reader.document(index, self.config.layout, self.config.seed)
            row = self._reader.row(index)
            segments: list[Text | Image] = []
            if self.config.text_columns:
                texts = self._texts(row)
                drawn = 0 if len(texts) == 1 else np.random.default_rng((self.config.seed, index)).integers(len(texts))
                segments.append(Text(texts[drawn]))
            if self.config.image_column is not None:
                segments.append(Image(_image(row, self.config.image_column)))
            metadata = {column: _value(row, column) for column in self.config.metadata_columns}
        except UnreachableError:
            raise
        except (CM3Error, OSError) as error:
            raise DataError(f"{name}: {error}") from error
        return Document(tuple(segments), {"row": name, **metadata})

    def __iter__(self) -> Iterator[Document]:
        return self.rows(0, len(self))

    def rows(self, start: int, stop: int) -> Iterator[Document]:
        """The good documents among rows start..stop-1; `report` goes on counting.

        Raises:
            DataError: once the bad rows pass `max_bad_fraction` of all rows.
        """
        for index in range(start, stop):
            self.report.read += 1
            try:
                document = self[index]
            except DataError as error:
                self.report.add_bad(str(error))
                self.report.check(len(self), self.config.max_bad_fraction)
                continue
            yield document

    def texts(self) -> Iterator[str]:
        """Every text of every row, all text columns of it, without touching images; to train a text
        tokenizer."""
        for index in range(len(self)):
            self.report.read += 1
            try:
                if isinstance(self._reader, InstructFile | SceneTasks):
                    yield from self._reader.texts(index, self.config.seed)
                else:
                    yield from self._texts(self._reader.row(index))
            except UnreachableError:
                raise
            except (CM3Error, OSError) as error:
                self.report.add_bad(f"{self._reader.name(index)}: {error}")
                self.report.check(len(self), self.config.max_bad_fraction)

    def _texts(self, row: Mapping[str, Any]) -> list[str]:
        columns = self.config.text_columns
        values = [_value(row, column) for column in columns]
        texts = [value for value in values if isinstance(value, str) and value.strip()]
        if not texts:
            raise DataError(f"no text in {' or '.join(columns)} (found {', '.join(repr(v)[:40] for v in values)})")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise DataError(f"the text is not valid Unicode ({error.reason})") from error
        return texts


def kind_of(path: str) -> SourceKind:
    """How the rows at a path are stored, by its name and, for a folder, by what is in it."""
    if path == "scenes":
        return "scenes"
    by_suffix: dict[str, SourceKind] = {".parquet": "parquet", ".jsonl": "jsonl", ".tar": "webdataset"}
    folder = Path(path)
    if folder.suffix in by_suffix:
        return by_suffix[folder.suffix]
    if not folder.is_dir():
        return "hub"
    if any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet")):
        return "parquet"
    return "webdataset" if any(folder.glob("*.tar")) else "folder"


def fingerprint(path: str) -> list[tuple[str, int, int]]:
    """Name, size and time of change of the raw files, so that changed rows are prepared anew; none for scenes."""
    if not path:
        return []
    found = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found if file.is_file()]


def open_source(config: SourceConfig) -> Source:
    """Open the rows of a config.

    Raises:
        DataError: if the path does not exist or holds no rows.
    """
    return Source(config)


def _value(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise DataError(f"no column {column!r}; the row has {', '.join(map(repr, row))}")
    value = row[column]
    return value() if callable(value) else value


def _image(row: Mapping[str, Any], column: str) -> PILImage.Image:
    value = _value(row, column)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        raise DataError(f"no image in {column!r}")
    return load_image(value)


_READERS: dict[str, Callable[[SourceConfig], Reader | InstructFile | SceneTasks]] = {
    "scenes": lambda c: readers.Scenes(c.seed, c.split, c.limit or 0),
    "parquet": lambda c: (
        StreamedTable.from_parquet(c.path, c.split, _columns(c), c.limit)
        if c.stream
        else readers.Table.from_parquet(c.path, c.split, _columns(c), c.where)
    ),
    "hub": lambda c: (
        StreamedTable.from_hub(c.path, c.subset, c.split, _columns(c), c.limit)
        if c.stream
        else readers.Table.from_hub(c.path, c.subset, c.split, _columns(c), c.where)
    ),
    "jsonl": lambda c: readers.JSONLines(c.path, c.image_column),
    "folder": lambda c: readers.Folder(c.path, c.image_column),
    "webdataset": lambda c: readers.WebDataset(c.path),
    "instruct": lambda c: InstructFile(c.path),
    "scene_tasks": lambda c: SceneTasks(c.split, c.limit or 0, c.seed, c.tasks or DEFAULT_MIX),
}


def _columns(config: SourceConfig) -> list[str]:
    image_columns = [config.image_column] if config.image_column is not None else []
    return [*config.text_columns, *image_columns, *config.metadata_columns]
