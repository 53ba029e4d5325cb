"""The parts of a memory: each a shard of tokenised documents, and beside it their vectors and metadata.

Parts are written once, several at a time where there are processes, and never changed; a part that is there already
with the same content is left as it is.

N documents of a part   E embedding width
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from cm3.checkpoint import atomic_path
from cm3.data.shards import read_shard_metadata, shard_path, write_shard
from cm3.data.sources import RowReport, SourceConfig, fingerprint, open_source
from cm3.errors import ConfigError, DataError
from cm3.retrieval.encoder import Encoder, encode_documents
from cm3.tokenizers.document import DocumentTokenizer, ImageCodes, TokenizedDocument

VECTORS_FOLDER = "vectors"

_CONTENT_KEY, _ROWS_KEY, _REPORT_KEY = "content", "rows", "report"


@dataclass(frozen=True, kw_only=True)
class PartRecipe:
    """All that parts are made of."""

    source: SourceConfig
    """The raw rows."""
    tokenizer: DocumentTokenizer
    """Makes the segments."""
    encoder: Encoder
    """Makes the vectors."""
    folder: Path
    """The memory."""
    first_number: int
    """Number of the first part that is written."""
    rows_per_part: int
    """Raw rows of a part."""
    batch_size: int
    """Documents tokenised and encoded at a time."""
    known: frozenset[int] = frozenset()
    """Documents (`document_hash`) that the memory has already and that are left out."""
    known_parts: Mapping[str, RowReport] = field(default_factory=dict)
    """Parts (`part_rows`) of which all documents are known, so that their rows need not be read."""


class PartWriter:
    """The opened source of a recipe; makes any one of its parts."""

    def __init__(self, recipe: PartRecipe) -> None:
        self.recipe = recipe
        self.source = open_source(recipe.source)
        self._hashes = [recipe.tokenizer.hash, recipe.encoder.hash]
        self._known = hashlib.sha256(repr(sorted(recipe.known)).encode()).hexdigest()

    @property
    def num_parts(self) -> int:
        """Number of parts of all rows."""
        return -(-len(self.source) // self.recipe.rows_per_part)

    def make(self, index: int) -> RowReport:
        """Write a part of the source, unless it is there already, and report on its rows, those known included."""
        recipe = self.recipe
        rows = range(len(self.source))[index * recipe.rows_per_part :][: recipe.rows_per_part]
        number, part = recipe.first_number + index, self._rows_hash(rows)
        content = hashlib.sha256(f"{part}{self._known}".encode()).hexdigest() if recipe.known else part
        path = shard_path(recipe.folder, number)
        found = read_shard_metadata(path)
        if found is not None and found.get(_CONTENT_KEY) == content and vectors_path(recipe.folder, number).is_file():
            return RowReport(**json.loads(found[_REPORT_KEY]))
        self.source.report = RowReport()
        documents: list[TokenizedDocument] = []
        vectors = [np.empty((2, 0, recipe.encoder.width), dtype=np.float32)]
        raw = self.source.rows(rows.start, rows.stop) if part not in recipe.known_parts else iter(())
        while batch := list(islice(raw, recipe.batch_size)):
            pairs = zip(batch, recipe.tokenizer.tokenize(batch), strict=True)
            if new := [pair for pair in pairs if document_hash(pair[1]) not in recipe.known]:
                documents += [document for _, document in new]
                vectors.append(np.stack(encode_documents(recipe.encoder, [document for document, _ in new])))
        text_NE, image_NE = np.concatenate(vectors, axis=1)
        metadata = [document.metadata for document in documents]
        write_vectors(vectors_path(recipe.folder, number), text_NE, image_NE, metadata)
        report = recipe.known_parts.get(part, self.source.report)
        keys = {_CONTENT_KEY: content, _ROWS_KEY: part, _REPORT_KEY: json.dumps(asdict(report))}
        write_shard(path, documents, keys)  # comes last: where it is, the part is whole
        return report

    def _rows_hash(self, rows: range) -> str:
        """See `part_rows`."""
        data = asdict(replace(self.recipe.source, limit=len(self.source), max_bad_fraction=0))
        for name in ("limit", "stream"):
            data.pop(name)
        files = fingerprint(self.recipe.source.path) or self.source.streamed_files
        content = [data, self._hashes, [rows.start, rows.stop], files]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_parts(recipe: PartRecipe, num_rows: int, num_processes: int) -> tuple[int, int]:
    """Make every part, with a bar of progress.

    Args:
        recipe: Of the parts.
        num_rows: Raw rows of its source.
        num_processes: That work at a time.

    Returns:
        The number of parts, and of the documents of all rows, those known included.

    Raises:
        ConfigError, DataError: a number below 1, or too many bad rows.
    """
    for name, value in (("rows_per_part", recipe.rows_per_part), ("num_processes", num_processes)):
        if value < 1:
            raise ConfigError(f"{name}={value}; choose 1 or more")
    report, num_parts = RowReport(), 0
    with tqdm(total=num_rows, desc="memory", unit=" rows", disable=None) as progress:
        for part in _reports(recipe, num_processes):
            report.merge(part)
            report.check(num_rows, recipe.source.max_bad_fraction)
            progress.update(part.read)
            num_parts += 1
    if report.bad:
        print(f"skipped {report.bad} rows: {'; '.join(report.bad_rows)}", flush=True)
    return num_parts, report.kept


def _reports(recipe: PartRecipe, num_processes: int) -> Iterator[RowReport]:
    """Make every part, here or in several processes of one thread each, and yield their reports."""
    if num_processes == 1:
        writer = PartWriter(recipe)
        yield from map(writer.make, range(writer.num_parts))
        return
    num_parts = -(-len(open_source(recipe.source)) // recipe.rows_per_part)
    context = multiprocessing.get_context("spawn")  # a fork of a process that holds threads can hang
    with ProcessPoolExecutor(num_processes, context, _start_worker, (recipe,)) as pool:
        yield from pool.map(_make_in_worker, range(num_parts))


_worker: PartWriter | None = None


def _start_worker(recipe: PartRecipe) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = PartWriter(recipe)


def _make_in_worker(index: int) -> RowReport:
    assert _worker is not None, "the pool did not start this worker"
    return _worker.make(index)


def part_content(folder: str | Path, number: int) -> str | None:
    """The hash of all that decides the content of a written part: rows, tokenizers, encoder, known documents."""
    return (read_shard_metadata(shard_path(folder, number)) or {}).get(_CONTENT_KEY)


def part_rows(folder: str | Path, number: int) -> tuple[str, RowReport] | None:
    """The hash of all that decides the documents of a part but which of them are known, and the report on its rows."""
    metadata = read_shard_metadata(shard_path(folder, number))
    if metadata is None:
        return None
    rows = metadata.get(_ROWS_KEY, metadata[_CONTENT_KEY])  # equal where nothing was known; older parts have only this
    return rows, RowReport(**json.loads(metadata[_REPORT_KEY]))


def document_hash(document: TokenizedDocument) -> int:
    """Equal for documents of equal texts and pictures, whatever else is known about them; 64 bits."""
    content = hashlib.blake2b(digest_size=8)
    for part in document.segments:
        values = part.codes_HW if isinstance(part, ImageCodes) else part.tokens
        content.update(repr(values.shape).encode())  # tells a text from a picture
        content.update(values.astype(np.int32).tobytes())
    return int.from_bytes(content.digest(), "little")


def vectors_path(folder: str | Path, number: int) -> Path:
    """The file with the vectors and metadata of a part."""
    return Path(folder) / VECTORS_FOLDER / f"{number:05d}.arrow"


def write_vectors(path: Path, text_NE: np.ndarray, image_NE: np.ndarray, metadata: Sequence[dict[str, Any]]) -> None:
    """Write vectors (in half precision) and metadata, whole or not at all."""
    width = text_NE.shape[1]
    columns = [_vector_column(vectors_NE, width) for vectors_NE in (text_NE, image_NE)]
    lines = [json.dumps(values, ensure_ascii=False, default=str) for values in metadata]
    table = pa.table([*columns, pa.array(lines, pa.string())], names=["text", "image", "metadata"])
    with atomic_path(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)


def _vector_column(vectors_NE: np.ndarray, width: int) -> pa.Array:
    values = pa.array(vectors_NE.astype(np.float16).ravel(), pa.float16())
    return pa.FixedSizeListArray.from_arrays(values, width)


class PartVectors:
    """Memory-mapped vectors (float16, unit length, zeros where there are none) and metadata of a part."""

    def __init__(self, path: Path, width: int) -> None:
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all().combine_chunks()
            self.text_NE, self.image_NE = (_numpy(table.column(name), width) for name in ("text", "image"))
            self._metadata = table.column("metadata")
        except (OSError, KeyError, ValueError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} is missing or damaged ({error}); build the memory again") from error

    def __len__(self) -> int:
        return len(self.text_NE)

    def metadata(self, row: int) -> dict[str, Any]:
        """What is known about a document."""
        values: dict[str, Any] = json.loads(self._metadata[row].as_py())
        return values


def _numpy(column: pa.ChunkedArray, width: int) -> np.ndarray:
    if not len(column):
        return np.empty((0, width), dtype=np.float16)
    array: np.ndarray = column.combine_chunks().flatten().to_numpy()
    return array.reshape(-1, width)
