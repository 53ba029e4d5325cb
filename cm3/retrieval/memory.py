"""A memory: documents to retrieve, as tokenised segments, with vectors, metadata and an index, all on disk.

    memory.json        encoder and its hash, settings, and which rows are deleted
    shards/            tokenised documents (cm3.data.shards)
    vectors/           text and image vectors apart, and metadata (cm3.retrieval.parts)
    index/             of the mixed vectors of the documents that are not deleted (cm3.retrieval.index)
    tokenizer files    those of the shards

A row is the number of a document in the order of writing; it stays the same for the life of a memory.

N queries or documents   E embedding width   K results of a query
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cm3.checkpoint import read_json, write_json
from cm3.data.shards import INDEX_FILE, SHARDS_FOLDER, ShardedDocuments, write_index
from cm3.data.sources import Source
from cm3.errors import DataError, ModelFilesError
from cm3.pretrained import DEMO
from cm3.retrieval.encoder import Encoder, open_encoder
from cm3.retrieval.index import IndexKind, VectorIndex
from cm3.retrieval.parts import (
    VECTORS_FOLDER,
    PartRecipe,
    PartVectors,
    document_hash,
    part_content,
    part_rows,
    vectors_path,
    write_parts,
)
from cm3.retrieval.select import Candidate
from cm3.retrieval.vectors import mixed_vectors
from cm3.tokenizers.document import (
    JSON_TEXT_TOKENIZER_FILE,
    TEXT_TOKENIZER_FILE,
    VOCABULARY_FILE,
    DocumentTokenizer,
    TokenizedDocument,
)
from cm3.tokenizers.image import IMAGE_TOKENIZER_CONFIG, IMAGE_TOKENIZER_WEIGHTS

MEMORY_FILE = "memory.json"
INDEX_FOLDER = "index"

_FORMAT_VERSION = 1
_TOKENIZER_FILES = (JSON_TEXT_TOKENIZER_FILE, TEXT_TOKENIZER_FILE, IMAGE_TOKENIZER_CONFIG, IMAGE_TOKENIZER_WEIGHTS)
_UNFINISHED = {SHARDS_FOLDER, VECTORS_FOLDER, INDEX_FOLDER, VOCABULARY_FILE, *_TOKENIZER_FILES}
"""What an interrupted build leaves behind, the vectors first."""


class Memory:
    """An opened memory; see `build` and `open`."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.encoder_name: str = settings["encoder"]
        """What `open_encoder` was given, or empty where it is not known."""
        self.encoder_hash: str = settings["encoder_hash"]
        self.width: int = settings["width"]
        """Length of the vectors."""
        self.renormalize: bool = settings["renormalize"]
        """Whether mixed vectors have unit length."""
        self._settings = settings
        self._open_parts()
        self.index = self._open_index()

    def __len__(self) -> int:
        """Number of documents that are not deleted."""
        return len(self._live_rows)

    @property
    def rows(self) -> Int[np.ndarray, " N"]:
        """The rows that are not deleted, rising."""
        return self._live_rows

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizers of the segments."""
        return self._documents.tokenizer_hash

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of all that decides what a search finds: the documents, which are deleted, their vectors."""
        parts = [part_content(self.folder, number) for number in range(len(self._parts))]
        content = [parts, self._settings["deleted"], self.renormalize]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @classmethod
    def build(
        cls,
        source: Source,
        tokenizer: DocumentTokenizer,
        encoder: Encoder,
        folder: str | Path,
        *,
        encoder_name: str = "",
        renormalize: bool = True,
        index_kind: IndexKind = "auto",
        rows_per_part: int = 8192,
        batch_size: int = 64,
        num_processes: int = 1,
    ) -> Memory:
        """Make a memory of a source, or go on where an interrupted build stopped.

        Args:
            source: The raw rows; bad ones are skipped and counted.
            tokenizer: Makes the segments.
            encoder: Makes the vectors.
            folder: Written.
            encoder_name: Name that opens the encoder again, kept for whoever searches.
            renormalize: Give mixed vectors unit length.
            index_kind: How vectors are searched.
            rows_per_part: Raw rows of a file; what is written whole is not made again.
            batch_size: Documents tokenised and encoded at a time.
            num_processes: Processes, on CPU with one thread each where there are several.

        Raises:
            DataError: the folder holds a memory or other things already, or the source has too many bad rows.
        """
        folder = Path(folder)
        check_new_memory(folder)
        recipe = PartRecipe(
            source=source.config,
            tokenizer=tokenizer,
            encoder=encoder,
            folder=folder,
            first_number=0,
            rows_per_part=rows_per_part,
            batch_size=batch_size,
        )
        num_parts, _ = write_parts(recipe, len(source), num_processes)
        tokenizer.save(folder)
        write_index(folder, num_parts, tokenizer.hash)
        settings = {
            "format_version": _FORMAT_VERSION,
            "encoder": encoder_name,
            "encoder_hash": encoder.hash,
            "width": encoder.width,
            "renormalize": renormalize,
            "index_kind": index_kind,
            "rows_per_part": rows_per_part,
            "deleted": [],
        }
        memory = cls(folder, settings)
        write_json(folder / MEMORY_FILE, settings)
        return memory

    @classmethod
    def open(cls, folder: str | Path, *, encoder: Encoder | None = None, tokenizer_hash: str | None = None) -> Memory:
        """Open a memory; an index that an interrupted change left behind is made anew.

        Args:
            folder: What `build` wrote.
            encoder: Must be the one that the memory was built with; None checks nothing.
            tokenizer_hash: Hash of the tokenizers that the segments must be made with; None takes any.

        Raises:
            ModelFilesError: there is no memory, or it is of another encoder.
            DataError: its segments are of other tokenizers, or a file is damaged.
        """
        folder = Path(folder)
        if not (folder / MEMORY_FILE).is_file():
            raise ModelFilesError(f"{folder} holds no finished memory ({MEMORY_FILE} is missing); build one")
        settings = read_json(folder / MEMORY_FILE)
        if settings["format_version"] != _FORMAT_VERSION:
            raise ModelFilesError(
                f"{folder} has format {settings['format_version']}, this version reads {_FORMAT_VERSION}; "
                "build it again"
            )
        memory = cls(folder, settings)
        if encoder is not None:
            memory.check_encoder(encoder)
        if tokenizer_hash is not None:
            memory.check_tokenizer(tokenizer_hash)
        return memory

    def open_encoder(self, name: str | Path | None = None, device: str | None = None) -> Encoder:
        """Open the encoder that the memory was built with.

        Args:
            name: See `cm3.retrieval.encoder.open_encoder`; None takes the name that is kept here.
            device: Torch device; None is a GPU if there is one.

        Raises:
            ModelFilesError: it is another encoder.
            RequestError: the name leads nowhere; encoders that were moved are opened by their new name.
        """
        encoder = open_encoder(name or self.encoder_name or DEMO, device)
        self.check_encoder(encoder)
        return encoder

    def check_encoder(self, encoder: Encoder) -> None:
        """Raise ModelFilesError if the memory was built with another encoder: their vectors do not compare."""
        if encoder.hash != self.encoder_hash:
            name = f" ({self.encoder_name})" if self.encoder_name else ""
            raise ModelFilesError(
                f"{self.folder} was built with encoder {self.encoder_hash[:12]}{name}, asked for {encoder.hash[:12]}; "
                "use that encoder, or build the memory again"
            )

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """Raise DataError if the segments were made with other tokenizers."""
        if tokenizer_hash != self.tokenizer_hash:
            raise DataError(
                f"{self.folder} was built with tokenizers {self.tokenizer_hash[:12]}, asked for "
                f"{tokenizer_hash[:12]}; build the memory with this model's tokenizers"
            )

    def append(
        self,
        source: Source,
        tokenizer: DocumentTokenizer,
        encoder: Encoder,
        *,
        batch_size: int = 64,
        num_processes: int = 1,
    ) -> tuple[range, int]:
        """Add those documents of a source that are not there yet behind the others, and make the index anew.

        A document is there if one of equal text and picture is that was not deleted. Parts that an interrupted append
        of the same source left behind are used.

        Returns:
            The rows of the new documents, and how many were there already.

        Raises:
            ModelFilesError, DataError: another encoder or other tokenizers, too many bad rows, or no new document.
        """
        self.check_encoder(encoder)
        self.check_tokenizer(tokenizer.hash)
        before, first_number = self._total, len(self._parts)
        numbers = range(0 if self._settings["deleted"] else first_number)  # what was deleted may come again
        recipe = PartRecipe(
            source=source.config,
            tokenizer=tokenizer,
            encoder=encoder,
            folder=self.folder,
            first_number=first_number,
            rows_per_part=self._settings["rows_per_part"],
            batch_size=batch_size,
            known=frozenset(document_hash(self._documents[row]) for row in self._live_rows.tolist()),
            known_parts=dict(filter(None, (part_rows(self.folder, number) for number in numbers))),
        )
        num_parts, num_read = write_parts(recipe, len(source), num_processes)
        paths = [vectors_path(self.folder, first_number + number) for number in range(num_parts)]
        num_new = sum(len(PartVectors(path, self.width)) for path in paths)
        if not num_new:
            name = source.config.path or source.config.kind
            raise DataError(f"{self.folder} holds all {num_read} documents of {name} already; there is none to add")
        write_index(self.folder, first_number + num_parts, self.tokenizer_hash)
        self._open_parts()
        self.index = self._open_index()
        return range(before, self._total), num_read - num_new

    def delete(self, rows: Iterable[int]) -> int:
        """Let no search find these documents any more, and make the index anew; the files keep them.

        Returns:
            How many were deleted; those that had been before do not count.

        Raises:
            DataError: a row that the memory does not have, or only such as were deleted before.
        """
        asked = {int(row) for row in rows}
        if unknown := sorted(row for row in asked if not 0 <= row < self._total):
            raise DataError(f"row {unknown[0]} is not in {self.folder}, which has rows 0 to {self._total - 1}")
        before = set(self._settings["deleted"])
        if asked <= before:
            named = f"row {min(asked)} was" if len(asked) == 1 else f"all {len(asked)} rows were"
            raise DataError(f"{named} deleted from {self.folder} before; `cm3 index search` prints those that are left")
        self._settings = self._settings | {"deleted": sorted(asked | before)}
        write_json(self.folder / MEMORY_FILE, self._settings)
        self._open_parts()
        self.index = self._open_index()
        return len(asked - before)

    def find(self, names: Iterable[str]) -> list[int]:
        """The rows of documents by the names of their raw rows (`metadata["row"]`), deleted ones left out."""
        wanted = set(names)
        return [row for row in self._live_rows.tolist() if self.metadata(row).get("row") in wanted]

    def document(self, row: int) -> TokenizedDocument:
        """The tokenised segments of a document, with its whole metadata."""
        metadata = self.metadata(row)
        return TokenizedDocument(self._documents[row].segments, metadata)

    def metadata(self, row: int) -> dict[str, Any]:
        """What is known about a document; `row` is the name of its raw row."""
        part, place = self._locate(row)
        return part.metadata(place)

    def search(
        self, queries_NE: Float[np.ndarray, "N E"], k: int
    ) -> tuple[Float[np.ndarray, "N K"], Int[np.ndarray, "N K"]]:
        """Scores and rows of the documents nearest to query vectors, see `VectorIndex.search`."""
        scores_NK, places_NK = self.index.search(queries_NE, k)
        if not len(self):
            return scores_NK, places_NK
        return scores_NK, np.where(places_NK >= 0, self._live_rows[np.maximum(places_NK, 0)], -1)

    def candidates(self, queries_NE: Float[np.ndarray, "N E"], k: int) -> list[Iterator[Candidate]]:
        """What `search` finds for each query as candidates for selection, best first, read as they are asked for."""
        scores_NK, rows_NK = self.search(queries_NE, k)
        return [self._candidates(scores_K, rows_K) for scores_K, rows_K in zip(scores_NK.tolist(), rows_NK.tolist())]

    def _candidates(self, scores_K: list[float], rows_K: list[int]) -> Iterator[Candidate]:
        for score, row in zip(scores_K, rows_K):
            if row < 0:
                return
            part, place = self._locate(row)
            text_E, image_E = part.text_NE[place].astype(np.float32), part.image_NE[place].astype(np.float32)
            yield Candidate(
                text_E=text_E if text_E.any() else None,
                image_E=image_E if image_E.any() else None,
                name=part.metadata(place).get("row"),
                row=row,
                score=score,
            )

    def _open_parts(self) -> None:
        self._documents = ShardedDocuments(self.folder)
        num_parts = read_json(self.folder / SHARDS_FOLDER / INDEX_FILE)["num_shards"]
        self._parts = [PartVectors(vectors_path(self.folder, number), self.width) for number in range(num_parts)]
        self._stops = np.cumsum([len(part) for part in self._parts])
        self._total = len(self._documents)
        if self._total != int(self._stops[-1]):
            raise DataError(
                f"{self.folder} has {self._total} documents and {self._stops[-1]} vectors; build the memory again"
            )
        deleted = np.array(self._settings["deleted"], dtype=np.int64)
        self._live_rows = np.setdiff1d(np.arange(self._total), deleted, assume_unique=True)

    def _locate(self, row: int) -> tuple[PartVectors, int]:
        if not 0 <= row < self._total:
            raise IndexError(f"row {row} was asked for; {self.folder} has {self._total}")
        number = int(np.searchsorted(self._stops, row, side="right"))
        return self._parts[number], row - (int(self._stops[number - 1]) if number else 0)

    def _open_index(self) -> VectorIndex:
        """The index of exactly the documents that are there, built where it is missing or of others."""
        folder, fingerprint = self.folder / INDEX_FOLDER, self.hash
        if folder.is_dir():
            index = VectorIndex.open(folder)
            if index.fingerprint == fingerprint:
                return index
        return VectorIndex.build(folder, self._mixed(), self.width, self._settings["index_kind"], fingerprint)

    def _mixed(self) -> Iterator[np.ndarray]:
        """The mixed vectors of the documents that are not deleted, part by part."""
        start = 0
        for part in self._parts:
            stop = start + len(part)
            live = self._live_rows[slice(*np.searchsorted(self._live_rows, [start, stop]))] - start
            yield mixed_vectors(part.text_NE[live], part.image_NE[live], self.renormalize)
            start = stop


def check_new_memory(folder: str | Path) -> None:
    """Raise DataError if a memory cannot be built in a folder, which need not exist: it holds one, or other things.

    What an interrupted build left there, and hidden files, do not count.
    """
    folder = Path(folder)
    if (folder / MEMORY_FILE).exists():
        raise DataError(f"{folder} holds a finished memory; append to it, or choose another folder")
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file, not a folder; choose another for the memory")
    found = {path.name for path in folder.glob("[!.]*")}
    if others := sorted(found - _UNFINISHED if VECTORS_FOLDER in found else found):
        raise DataError(f"{folder} holds other things, such as {others[0]}; choose a new or empty folder")
