"""Rows of Parquet files that stay where they are (the Hub, a web server, a bucket) and are read a row group at a time.

A Parquet file ends in a list of its row groups, so that any row is found without reading what stands before it: a
process that goes on, or one of many, fetches its own rows and no others, and of these only the columns it uses. The
files are found and opened by `datasets`, with its login and its patience where a connection breaks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, islice
from typing import Any

from cm3.data.readers import parquet_files
from cm3.errors import CM3Error, DataError

_AT_A_TIME = 16
"""Files whose ends are read at once."""


class UnreachableError(CM3Error):
    """A file could not be read. The rows in it are not bad, so they are not skipped: the run ends and can go on."""


class StreamedTable:
    """Rows of remote Parquet files, images as they are stored.

    Args:
        files: Addresses or paths.
        name: What the rows are called, with their number.
        columns: Those that may be asked for.
        limit: The files after as many rows are not looked at; None is all.

    Raises:
        DataError: a file lacks a column.
        UnreachableError: a file cannot be read.
    """

    def __init__(self, files: list[str], name: str, columns: list[str], limit: int | None = None) -> None:
        self.files = files
        self._name, self._columns = name, list(dict.fromkeys(columns))
        self._groups: list[tuple[str, int]] = []
        counts: list[int] = []
        for file, sizes in self._ends(limit):
            self._groups += [(file, number) for number in range(len(sizes))]
            counts += sizes
        self._stops = list(accumulate(counts))
        self._open: tuple[str, Any] | None = None
        self._cached: tuple[int, dict[str, Any]] = (-1, {})

    @classmethod
    def from_hub(
        cls, path: str, subset: str | None, split: str, columns: list[str], limit: int | None
    ) -> StreamedTable:
        """A data set of the Hugging Face Hub that is stored as Parquet, or a local folder in its layout.

        The addresses of its files name the commit, so that a data set which changes meanwhile is another one.
        """
        name = "/".join(filter(None, (path, subset, split)))
        found = _find(name, path, subset)
        if split not in found:
            raise DataError(f"{name} has no such split; choose among {', '.join(found)}")
        if others := [file for file in found[split] if not file.endswith(".parquet")]:
            raise DataError(
                f"{name} is not stored as Parquet but as {others[0]}; leave stream out, or read the "
                f"Hub's conversion: kind=parquet, path=hf://datasets/{path}@refs/convert/parquet/..."
            )
        return cls(found[split], name, columns, limit)

    @classmethod
    def from_parquet(cls, path: str, split: str, columns: list[str], limit: int | None) -> StreamedTable:
        """Parquet files by their address (https://, hf://, s3://, ...), a glob where the place can list its files; or
        files here, as `Table` finds them."""
        if "://" in path:
            return cls(_find(path, "parquet", data_files=path)["train"], path, columns, limit)
        name, files = parquet_files(path, split)
        return cls([str(file) for file in files], name, columns, limit)

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def name(self, index: int) -> str:
        return f"{self._name}:{index}"

    def row(self, index: int) -> Mapping[str, Callable[[], Any]]:
        """The columns of a row as functions: a column that is not used is not fetched."""
        return {column: partial(self._value, index, column) for column in self._columns}

    def _value(self, index: int, column: str) -> Any:
        group = bisect_right(self._stops, index)
        if self._cached[0] != group:
            self._cached = (group, {})
        values = self._cached[1]
        if column not in values:
            file, number = self._groups[group]
            read = partial(self._parquet(file).read_row_group, number, columns=[column])
            values[column] = _reached(file, read).column(0)
        return values[column][index - (self._stops[group - 1] if group else 0)].as_py()

    def _parquet(self, file: str) -> Any:
        """The open file; the one before is closed."""
        if self._open is None or self._open[0] != file:
            self._open = (file, _reached(file, partial(_open, file)))
        return self._open[1]

    def _ends(self, limit: int | None) -> Iterator[tuple[str, list[int]]]:
        """Yield (file, rows of each row group) up to the limit."""
        files, num_rows = iter(self.files), 0
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            while (limit is None or num_rows < limit) and (some := list(islice(files, _AT_A_TIME))):
                for file, sizes in zip(some, pool.map(self._end, some), strict=True):
                    num_rows += sum(sizes)
                    yield file, sizes

    def _end(self, file: str) -> list[int]:
        parquet = _reached(file, partial(_open, file))
        names = parquet.schema_arrow.names
        if missing := [column for column in self._columns if column not in names]:
            raise DataError(f"{file} has no column {missing[0]!r}; choose among {', '.join(names)}")
        return [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]


def _find(name: str, *args: Any, **options: Any) -> dict[str, list[str]]:
    """Split to files of a data set that `datasets` finds."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        found = load_dataset_builder(*args, **options).config.data_files
    except (DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{name} did not open: {error}; check path, subset and split") from error
    return {str(split): [str(file) for file in files] for split, files in (found or {}).items()}


def _open(file: str) -> Any:
    from datasets.utils.file_utils import xopen
    from pyarrow.parquet import ParquetFile

    return ParquetFile(xopen(file, "rb"))


def _reached(file: str, read: Callable[[], Any]) -> Any:
    """What `read` returns."""
    try:
        return read()
    except Exception as error:  # every file system and protocol has errors of its own
        raise UnreachableError(
            f"{file} cannot be read ({type(error).__name__}: {error}); check the connection and run the same command "
            "again: what is prepared is kept"
        ) from error
