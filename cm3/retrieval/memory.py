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
from tqdm import tqdm

from cm3.checkpoint import read_json, write_json
from cm3.data.shards import INDEX_FILE, SHARDS_FOLDER, ShardedDocuments, write_index
from cm3.data.sources import RowReport, Source
from cm3.errors import ConfigError, DataError, ModelFilesError
from cm3.pretrained import DEMO
from cm3.retrieval.encoder import Encoder, open_encoder
from cm3.retrieval.index import IndexKind, VectorIndex
from cm3.retrieval.parts import PartRecipe, PartVectors, part_content, vectors_path, write_parts
from cm3.retrieval.select import Candidate
from cm3.retrieval.vectors import mixed_vectors
from cm3.tokenizers.document import DocumentTokenizer, TokenizedDocument

MEMORY_FILE = "memory.json"
INDEX_FOLDER = "index"

_FORMAT_VERSION = 1


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
            DataError: the folder holds a memory already, or the source has too many bad rows.
        """
        folder = Path(folder)
        if (folder / MEMORY_FILE).exists():
            raise DataError(f"{folder} holds a finished memory; append to it, or choose another folder")
        recipe = PartRecipe(
            source=source.config,
            tokenizer=tokenizer,
            encoder=encoder,
            folder=folder,
            first_number=0,
            rows_per_part=rows_per_part,
            batch_size=batch_size,
        )
        num_parts = _write_checked(recipe, len(source), num_processes)
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
    ) -> range:
        """Add the documents of a source behind the others, and make the index anew.

        Parts that an interrupted append of the same source left behind are used.

        Returns:
            The rows of the new documents.

        Raises:
            ModelFilesError, DataError: another encoder or other tokenizers, or too many bad rows.
        """
        self.check_encoder(encoder)
        self.check_tokenizer(tokenizer.hash)
        before, first_number = self._total, len(self._parts)
        recipe = PartRecipe(
            source=source.config,
            tokenizer=tokenizer,
            encoder=encoder,
            folder=self.folder,
            first_number=first_number,
            rows_per_part=self._settings["rows_per_part"],
            batch_size=batch_size,
        )
        num_parts = first_number + _write_checked(recipe, len(source), num_processes)
        write_index(self.folder, num_parts, self.tokenizer_hash)
        self._open_parts()
        self.index = self._open_index()
        return range(before, self._total)

    def delete(self, rows: Iterable[int]) -> None:
        """Let no search find these documents any more, and make the index anew; the files keep them.

        Raises:
            DataError: a row that the memory does not have.
        """
        asked = {int(row) for row in rows}
        if unknown := sorted(row for row in asked if not 0 <= row < self._total):
            raise DataError(f"row {unknown[0]} is not in {self.folder}, which has rows 0 to {self._total - 1}")
        self._settings = self._settings | {"deleted": sorted(asked.union(self._settings["deleted"]))}
        write_json(self.folder / MEMORY_FILE, self._settings)
        self._open_parts()
        self.index = self._open_index()

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


def _write_checked(recipe: PartRecipe, num_rows: int, num_processes: int) -> int:
    """Write the parts of a recipe; return how many. Too many bad rows are an error."""
    for name, value in (("rows_per_part", recipe.rows_per_part), ("num_processes", num_processes)):
        if value < 1:
            raise ConfigError(f"{name}={value}; choose 1 or more")
    report, num_parts = RowReport(), 0
    with tqdm(total=num_rows, desc="memory", unit=" rows", disable=None) as progress:
        for part in write_parts(recipe, num_processes):
            report.merge(part)
            report.check(num_rows, recipe.source.max_bad_fraction)
            progress.update(part.read)
            num_parts += 1
    if report.bad:
        print(f"skipped {report.bad} rows: {'; '.join(report.bad_rows)}", flush=True)
    return num_parts
