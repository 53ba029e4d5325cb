"""Prepared documents on disk: memory-mapped Arrow files, text as int32 pieces, images as uint16 codes.

A prepared folder holds `shards/00000.arrow ...` and, once all are written, `shards/index.json`; beside them
lie the tokenizer files. `datasets.Dataset.from_file` opens a shard as well. Joint ids are made when documents
are read, so shards do not depend on the order of the vocabulary's ranges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cm3.checkpoint import atomic_path, read_json, write_json
from cm3.data.shard_sums import check_shards, sum_line
from cm3.errors import DataError
from cm3.tokenizers.document import VOCABULARY_FILE, ImageCodes, TextTokens, TokenizedDocument
from cm3.tokenizers.document_ids import document_to_ids, segment_places
from cm3.tokenizers.instruct import ANSWERS, answer_spans
from cm3.tokenizers.layout import CM3_LAYOUT, Layout
from cm3.tokenizers.vocabulary import Vocabulary

SHARDS_FOLDER = "shards"
INDEX_FILE = "index.json"

_FORMAT_VERSION = 1
_SCHEMA = pa.schema(
    [
        ("text", pa.list_(pa.int32())),  # the pieces of all text segments
        ("codes", pa.list_(pa.uint16())),  # the codes of all images
        (
            "segments",
            pa.list_(pa.int32()),
        ),  # for each segment (0, pieces) of a text, (height, width) of an image
        ("retrieved", pa.int32()),  # how many leading segments are retrieved context
        ("length", pa.int32()),  # ids of the document, delimiters included
        ("row", pa.string()),  # the raw row it was made from
        ("answers", pa.list_(pa.int32())),  # for each answer (segment after the retrieved ones, first, stop token)
        ("digest", pa.uint64()),  # hash of the segments that are not retrieved, to find duplicates
    ]
)

SHARD_COLUMNS: tuple[str, ...] = tuple(_SCHEMA.names)
"""Columns of a shard that is written now; older ones may lack some."""


def shard_path(folder: str | Path, number: int) -> Path:
    """The file of a shard in a prepared folder."""
    return Path(folder) / SHARDS_FOLDER / f"{number:05d}.arrow"


def write_shard(
    path: str | Path,
    documents: Sequence[TokenizedDocument],
    metadata: dict[str, str],
    layout: Layout = CM3_LAYOUT,
) -> None:
    """Write one shard, whole or not at all, with a checksum at its end.

    Args:
        path: see `shard_path`.
        documents: `metadata["retrieved"]` of a document counts its leading segments that are retrieved
            context; `metadata["row"]` names its raw row; `metadata["answers"]` says where the answers of an
            instruction stand, see `cm3.tokenizers.instruct`.
        metadata: Kept in the file, see `read_shard_metadata`.
        layout: How the documents are to be written as ids, which decides their lengths.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for document in documents:
        texts = [part.tokens for part in document.segments if isinstance(part, TextTokens)]
        codes = [part.codes_HW.ravel() for part in document.segments if isinstance(part, ImageCodes)]
        shapes = [
            part.codes_HW.shape if isinstance(part, ImageCodes) else (0, len(part.tokens)) for part in document.segments
        ]
        columns["text"].append(np.concatenate(texts) if texts else np.empty(0, dtype=np.int32))
        columns["codes"].append(np.concatenate(codes) if codes else np.empty(0, dtype=np.uint16))
        columns["segments"].append(np.array(shapes, dtype=np.int32).ravel())
        columns["retrieved"].append(document.metadata.get("retrieved", 0))
        columns["length"].append(segment_places(document, layout)[-1])
        columns["row"].append(document.metadata.get("row"))
        columns["answers"].append(np.array(document.metadata.get(ANSWERS, ()), dtype=np.int32).ravel())
        columns["digest"].append(_digest(document))
    schema = _SCHEMA.with_metadata(metadata)
    content = pa.BufferOutputStream()
    with pa.ipc.new_stream(content, schema) as writer:
        writer.write_table(pa.Table.from_pydict(columns, schema=schema))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(content.getvalue())
        file.write(sum_line(content.getvalue()))


def read_shard_metadata(path: str | Path) -> dict[str, str] | None:
    """The metadata of a shard; None if there is no such file, or it is no shard or not a whole one."""
    try:
        with pa.memory_map(str(path)) as file:
            metadata = pa.ipc.open_stream(file).read_all().schema.metadata or {}
        return {key.decode(): value.decode() for key, value in metadata.items()}
    except (OSError, UnicodeDecodeError, pa.ArrowException):
        return None


def read_shard_column(path: str | Path, name: str) -> pa.ChunkedArray:
    """A column of a shard, memory-mapped."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all().column(name)


def write_index(folder: str | Path, num_shards: int, tokenizer_hash: str) -> None:
    """Declare the shards of a prepared folder complete."""
    index = {"format_version": _FORMAT_VERSION, "tokenizer_hash": tokenizer_hash, "num_shards": num_shards}
    write_json(Path(folder) / SHARDS_FOLDER / INDEX_FILE, index)


class ShardedDocuments:
    """The documents of a prepared folder, in order, memory-mapped: `len`, `[index]`, `ids(index)`.

    Args:
        folder: What `cm3 prepare` wrote.
        tokenizer_hash: Hash of the tokenizers they must be made with; None takes any.
        check: Compare the shards with their checksums first, see `check_shards`. A collective that reads them all.

    Raises:
        DataError: if the folder is not complete, empty, damaged, or made with other tokenizers.
    """

    def __init__(self, folder: str | Path, tokenizer_hash: str | None = None, *, check: bool = False) -> None:
        self.folder = Path(folder)
        index_path = self.folder / SHARDS_FOLDER / INDEX_FILE
        if not index_path.is_file():
            raise DataError(
                f"{folder} holds no complete shards ({index_path} is missing); make them with `cm3 prepare`"
            )
        index = read_json(index_path)
        if index["format_version"] != _FORMAT_VERSION:
            raise DataError(
                f"{folder} has shards of format {index['format_version']}, this version reads "
                f"{_FORMAT_VERSION}; prepare the data again"
            )
        self.tokenizer_hash: str = index["tokenizer_hash"]
        if tokenizer_hash is not None and tokenizer_hash != self.tokenizer_hash:
            raise DataError(
                f"{folder} was prepared with tokenizers {self.tokenizer_hash[:12]}, asked for "
                f"{tokenizer_hash[:12]}; prepare the data with this model's tokenizers, or "
                "use the model that fits the data"
            )
        self.vocabulary = Vocabulary.load(self.folder / VOCABULARY_FILE)
        paths = [shard_path(folder, number) for number in range(index["num_shards"])]
        if check:  # before Arrow reads them, which trusts what it finds
            check_shards(self.folder, paths)
        self._shards = [_Shard(path) for path in paths]
        self._stops = np.cumsum([len(shard.lengths) for shard in self._shards])
        if not len(self):
            raise DataError(f"{folder} holds no documents; see its report.json")
        self.lengths = np.concatenate([shard.lengths for shard in self._shards])
        """Number of ids of each document, delimiters included, int32."""
        self.num_moved_answers = np.concatenate([shard.num_moved_answers() for shard in self._shards])
        """Number of answers in each document, int64; 0 where the last one ends the document, for then none has to be
        moved to be asked for; -1 where there are none."""

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def __getitem__(self, index: int) -> TokenizedDocument:
        shard, row = self._locate(index)
        return shard.document(row)

    def __str__(self) -> str:
        return str(self.folder)

    def members(self, usable: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """The documents that an epoch of training shows: each usable one once. See `Mixture.members`."""
        return usable

    def ids(self, index: int) -> np.ndarray:
        """The joint ids of a document, int64."""
        return document_to_ids(self[index], self.vocabulary)

    def answer_spans(self, index: int) -> np.ndarray:
        """Start and stop of every answer among `ids(index)`, int64 of shape (N, 2); none of a document that is no
        instruction."""
        return answer_spans(self[index], self.vocabulary.layout)

    def num_retrieved_ids(self, index: int) -> int:
        """How many ids at the start of a document, marks included, belong to retrieved
        context."""
        shard, row = self._locate(index)
        retrieved = shard.retrieved[row]
        return segment_places(shard.document(row), self.vocabulary.layout)[retrieved] if retrieved else 0

    def _locate(self, index: int) -> tuple[_Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} was asked for; {self.folder} has {len(self)}")
        number = int(np.searchsorted(self._stops, index, side="right"))
        return self._shards[number], index - (int(self._stops[number - 1]) if number else 0)


class _Shard:
    """One Arrow file: views into its columns without copies."""

    def __init__(self, path: Path) -> None:
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all().combine_chunks()
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} is missing or damaged ({error}); run `cm3 prepare` again") from error
        self.lengths = _numpy(table.column("length"))
        self.retrieved = _numpy(table.column("retrieved"))
        self._row = table.column("row")
        # shards of before there were instructions have no such column
        self._answers = _Lists(table.column("answers")) if "answers" in table.column_names else None
        self._text, self._codes, self._segments = (_Lists(table.column(name)) for name in ("text", "codes", "segments"))

    def document(self, row: int) -> TokenizedDocument:
        text, codes = self._text[row], self._codes[row]
        segments: list[TextTokens | ImageCodes] = []
        text_place = codes_place = 0
        for height, width in self._segments[row].reshape(-1, 2).tolist():
            if height == 0:
                segments.append(TextTokens(text[text_place : text_place + width]))
                text_place += width
            else:
                area = height * width
                segments.append(ImageCodes(codes[codes_place : codes_place + area].reshape(height, width)))
                codes_place += area
        metadata: dict[str, Any] = {"row": self._row[row].as_py(), "retrieved": int(self.retrieved[row])}
        if self._answers is not None and len(answers := self._answers[row]):
            metadata[ANSWERS] = answers.reshape(-1, 3).tolist()
        return TokenizedDocument(tuple(segments), metadata)

    def num_moved_answers(self) -> np.ndarray:
        """See `ShardedDocuments`."""
        counts = np.full(len(self.lengths), -1)
        if self._answers is None:
            return counts
        rows = np.flatnonzero(self._answers.lengths)
        counts[rows] = self._answers.lengths[rows] // 3
        segment, first, stop = self._answers.last(rows, 3).T
        height, width = self._segments.last(rows, 2).T
        in_last = segment == self._segments.lengths[rows] // 2 - self.retrieved[rows] - 1
        at_end = stop == np.maximum(height, 1) * width
        whole = (height == 0) | (first == 0)  # a part of an image, even its last, stands amid the rest of it
        counts[rows[in_last & at_end & whole]] = 0
        return counts

    def segment_lengths(self, row: int) -> np.ndarray:
        heights, widths = self._segments[row].reshape(-1, 2).T
        return np.maximum(heights, 1) * widths


def _digest(document: TokenizedDocument) -> int:
    """A hash of the segments after the retrieved ones; shapes tell texts from images."""
    content = hashlib.blake2b(digest_size=8)
    for part in document.segments[document.metadata.get("retrieved", 0) :]:
        values = part.codes_HW if isinstance(part, ImageCodes) else part.tokens
        content.update(repr(values.shape).encode())
        content.update(values.astype(np.int32).tobytes())
    return int.from_bytes(content.digest(), "little")


class _Lists:
    """A column of lists as one array of values and the places where the lists start."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        self._starts = array.offsets.to_numpy()
        self._values = array.values.to_numpy()

    @property
    def lengths(self) -> np.ndarray:
        lengths: np.ndarray = np.diff(self._starts)
        return lengths

    def __getitem__(self, row: int) -> np.ndarray:
        values: np.ndarray = self._values[self._starts[row] : self._starts[row + 1]]
        return values

    def last(self, rows: np.ndarray, size: int) -> np.ndarray:
        """[rows, size]: the last values of some lists that are not empty."""
        values: np.ndarray = self._values[self._starts[rows + 1][:, None] - size + np.arange(size)]
        return values


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    values: np.ndarray = column.to_numpy()
    return values
