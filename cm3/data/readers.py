"""Raw rows of each layout behind one small interface: `len`, `name(index)`, `row(index)` -> column to value.

A value may be a function without arguments, so that pixels are drawn, or bytes read, only where they are
used.
"""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cm3.data.scenes import example
from cm3.errors import DataError

_ALL: Mapping[str, Sequence[str]] = {}

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


class Scenes:
    """Scenes drawn by `cm3.data.scenes`; columns `text` and `image`."""

    def __init__(self, seed: int, split: str, size: int) -> None:
        self._seed, self._split, self._size = seed, split, size

    def __len__(self) -> int:
        return self._size

    def name(self, index: int) -> str:
        return f"scenes/{self._split}:{index}"

    def row(self, index: int) -> Mapping[str, Any]:
        scene = example(self._seed, self._split, index)
        return {"text": scene.caption, "image": lambda: scene.image}


class Table:
    """Rows of a table opened by `datasets`, those where columns have certain values; images stay encoded until they are
    used."""

    def __init__(self, table: Any, name: str, columns: list[str], where: Mapping[str, Sequence[str]] = _ALL) -> None:
        from datasets import Image

        missing = [column for column in (*columns, *where) if column not in table.column_names]
        if missing:
            raise DataError(f"{name} has no column {missing[0]!r}; choose among {', '.join(table.column_names)}")
        self._numbers: Sequence[int] = range(len(table))
        if where:
            kept = [np.isin(np.array(table[column], dtype=str), values) for column, values in where.items()]
            self._numbers = np.flatnonzero(np.all(kept, axis=0)).tolist()
            table = table.select(self._numbers)
        table = table.select_columns(list(dict.fromkeys(columns)))
        for column, feature in table.features.items():
            if isinstance(feature, Image):
                table = table.cast_column(column, Image(decode=False))
        self._table, self._name = table, name

    @classmethod
    def from_parquet(
        cls, path: str, split: str, columns: list[str], where: Mapping[str, Sequence[str]] = _ALL
    ) -> Table:
        """A Parquet file, a glob, or a folder: its `<split>*.parquet` (also under data/).

        Of a folder without split names, "train" is all it has; another split is then an error.
        """
        name, files = parquet_files(path, split)
        return cls(
            _load(name, "parquet", data_files=[str(file) for file in files], split="train"), name, columns, where
        )

    @classmethod
    def from_hub(
        cls, path: str, subset: str | None, split: str, columns: list[str], where: Mapping[str, Sequence[str]] = _ALL
    ) -> Table:
        """A data set of the Hugging Face Hub, or a local folder in its layout."""
        name = "/".join(filter(None, (path, subset, split)))
        return cls(_load(name, path, subset, split=split), name, columns, where)

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        return f"{self._name}:{self._numbers[index]}"

    def row(self, index: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._table[index]
        return row


class JSONLines:
    """One JSON object a line; the image column holds a path relative to the file."""

    def __init__(self, path: str, image_column: str | None) -> None:
        if not Path(path).is_file():
            raise DataError(f"{path} is not a file; give a .jsonl file with one object a line")
        self._path, self._image_column = Path(path), image_column
        self._lines = [
            (number, line) for number, line in enumerate(self._path.read_bytes().splitlines(), start=1) if line.strip()
        ]

    def __len__(self) -> int:
        return len(self._lines)

    def name(self, index: int) -> str:
        return f"{self._path}:{self._lines[index][0]}"

    def row(self, index: int) -> Mapping[str, Any]:
        try:
            row = json.loads(self._lines[index][1])
        except ValueError as error:
            raise DataError(f"not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"a line must hold a JSON object, found {type(row).__name__}")
        if isinstance(row.get(self._image_column), str):
            row[self._image_column] = str(self._path.parent / row[self._image_column])
        return row


class Folder:
    """A folder of images, with sub-folders; captions in a .txt beside each image, metadata.jsonl or metadata.csv."""

    def __init__(self, path: str, image_column: str | None) -> None:
        self._root, self._image_column = Path(path), image_column or "image"
        if not self._root.is_dir():
            raise DataError(f"{path} is not a folder; give a folder of images")
        self._metadata = self._find_metadata()
        self._images = [] if self._metadata is not None else self._find_images()

    def _find_metadata(self) -> JSONLines | list[dict[str, Any]] | None:
        if (self._root / "metadata.jsonl").is_file():
            return JSONLines(str(self._root / "metadata.jsonl"), None)
        path = self._root / "metadata.csv"
        if not path.is_file():
            return None
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
                return list(csv.DictReader(file))
        except (ValueError, csv.Error) as error:
            raise DataError(f"{path} is not a CSV file in UTF-8 ({error}); save it as one") from error

    def _find_images(self) -> list[Path]:
        return sorted(file for file in self._root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)

    def __len__(self) -> int:
        return len(self._images) if self._metadata is None else len(self._metadata)

    def name(self, index: int) -> str:
        if isinstance(self._metadata, JSONLines):
            return self._metadata.name(index)
        return str(self._images[index]) if self._metadata is None else f"{self._root}/metadata.csv:{index}"

    def row(self, index: int) -> Mapping[str, Any]:
        if self._metadata is None:
            image = self._images[index]
            return {"text": lambda: _read_text(image.with_suffix(".txt")), self._image_column: str(image)}
        row = self._metadata.row(index) if isinstance(self._metadata, JSONLines) else self._metadata[index]
        if not isinstance(row.get("file_name"), str):
            raise DataError("no column 'file_name' with the image's path")
        return {**row, self._image_column: str(self._root / row["file_name"])}


class WebDataset:
    """Tar files whose members share a key up to the first dot: `0001.jpg`, `0001.txt`, `0001.json` are one row.

    Columns: `image` (bytes), `text` (.txt, else `text` or `caption` of .json) and every key of .json. The members'
    places in the tars are read once, so rows are random access; the tars must be plain, not compressed.
    """

    def __init__(self, path: str) -> None:
        files = sorted(Path(path).glob("*.tar")) if Path(path).is_dir() else _files(path)
        if not files:
            raise DataError(f"{path} holds no tar files; give a .tar file, a glob or a folder of them")
        self._rows: list[tuple[Path, str, dict[str, tuple[int, int]]]] = []
        for file in files:
            self._rows += [(file, key, members) for key, members in _tar_members(file).items()]

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        file, key, _ = self._rows[index]
        return f"{file}:{key}"

    def row(self, index: int) -> Mapping[str, Any]:
        file, _, members = self._rows[index]
        row: dict[str, Any] = {}
        if ".json" in members:
            try:
                row.update(json.loads(_read_member(file, members[".json"])))
            except (ValueError, TypeError) as error:
                raise DataError(f".json does not hold an object ({error})") from error
        if ".txt" in members:
            row["text"] = _decode(_read_member(file, members[".txt"]), ".txt")
        elif "text" not in row and "caption" in row:
            row["text"] = row["caption"]
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        if image is not None:
            row["image"] = lambda: _read_member(file, image)
        return row


def parquet_files(path: str, split: str) -> tuple[str, list[Path]]:
    """What to call the rows of `Table.from_parquet`, and the files that hold them."""
    if not Path(path).is_dir():
        files, name = _files(path), path
    else:
        folders = (Path(path), Path(path, "data"))
        files, name = [file for each in folders for file in sorted(each.glob(f"{split}*.parquet"))], f"{path}/{split}"
        if not files and split == "train":
            files = sorted(Path(path).glob("*.parquet"))
        if not files:
            raise DataError(f"{path} holds no {split}*.parquet; check path and split")
    if not files:
        raise DataError(f"{path} holds no Parquet files; give a .parquet file, a glob or a folder of them")
    return name, files


def _load(name: str, *args: Any, **options: Any) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(*args, **options)
    except (DatasetsError, ValueError, OSError) as error:
        cause = error.__cause__ or error  # `datasets` hides what was wrong with a file one level down
        raise DataError(f"{name} did not open: {cause}; check path, subset and split") from error


def _files(pattern: str) -> list[Path]:
    """An existing file, or what a glob pattern finds."""
    path = Path(pattern)
    if path.exists():
        return [path]
    anchor = Path(path.anchor)
    return sorted(anchor.glob(str(path.relative_to(anchor))))


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"no caption: {path.name} is missing")
    return _decode(path.read_bytes(), path.name)


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 ({error})") from error


def _tar_members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> suffix (lower case, with its dot) -> (offset, size) of the members of a tar."""
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if member.isfile() and stem and dot:
                    place = (member.offset_data, member.size)
                    rows.setdefault(f"{folder}/{stem}" if folder else stem, {})[f".{suffix.lower()}"] = place
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a readable, uncompressed tar ({error}); unpack or rewrite it") from error
    return rows


def _read_member(path: Path, place: tuple[int, int]) -> bytes:
    offset, size = place
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
