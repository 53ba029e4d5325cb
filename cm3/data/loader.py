"""Batches of packed, masked rows.

Everything about a row is a function of (seed, epoch, place) and nothing of the past. So a run resumes exactly
from three integers, masks differ in every epoch, and the rows of a step are the same for any number of
processes. Each process plans all rows, which is cheap, and fills only its own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from cm3.data.packing import DocumentPlan, Mask, Purpose, Row, StreamPlan, epoch_order, generator
from cm3.errors import ConfigError, DataError
from cm3.tokenizers.vocabulary import Vocabulary


class Documents(Protocol):
    """What the loader asks of its data: `ShardedDocuments`, or a `Mixture` of several."""

    lengths: np.ndarray
    num_moved_answers: np.ndarray

    @property
    def vocabulary(self) -> Vocabulary: ...

    def __len__(self) -> int: ...

    def members(self, usable: np.ndarray, seed: int, epoch: int) -> np.ndarray: ...

    def ids(self, index: int) -> np.ndarray: ...

    def answer_spans(self, index: int) -> np.ndarray: ...

    def num_retrieved_ids(self, index: int) -> int: ...


class Objective(Protocol):
    """What the loader asks of the training objective: `cm3.model.objective.ObjectiveConfig`."""

    @property
    def ids_per_span(self) -> int: ...

    @property
    def retrieved_loss_weight(self) -> float: ...

    def draw_masks(
        self, vocabulary: Vocabulary, rng: np.random.Generator, num_answers_D: np.ndarray
    ) -> Sequence[Mask]: ...

    def mask_document(
        self,
        ids_T: np.ndarray,
        weights_T: np.ndarray,
        vocabulary: Vocabulary,
        rng: np.random.Generator,
        mask: Any,
        answers: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def mask_block(
        self, ids_T: np.ndarray, weights_T: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Place:
    """The next row: which epoch, which window of it, which row of the window."""

    epoch: int = 0
    window: int = 0
    row: int = 0


class PackedLoader:
    """Endless batches for training, or one pass over all documents for evaluation.

    A batch holds, for the rows of this process (tensors on the CPU, B `rows`, T `sequence_length`):
        ids_BT: int64; `<pad>` where nothing is.
        document_ids_BT: int64; equal for tokens that see each other, -1 for padding.
        weights_BT: float32; weight of each id as a target, 0 for padding and for the first id of a document.

    Iterating goes on from the place reached; in evaluation it starts anew each time.

    Attributes:
        batch_documents: the documents of each row of the batch that was given last, by their numbers: the rows of
            all processes, in order.

    Args:
        documents: prepared documents, or a mixture of several sources.
        vocabulary: of the model; must be the documents'.
        objective: masks the documents.
        sequence_length: T.
        rows: rows of a batch of one process, B; all processes together take consecutive rows.
        seed: of order and masks.
        packing: `documents` packs whole documents, each masked by itself; longer ones than a row are left out
            (`num_too_long`). `stream` joins documents and cuts every T ids, as metaseq does by default; a
            row is then one context, masked as a whole.
        rank: of this process.
        world_size: number of processes.
        evaluation: one pass in stored order, masks fixed by the seed, the last batch filled with empty rows.

    Raises:
        ConfigError: if the vocabulary is not the documents', or a number is out of range.
        DataError: if there is nothing to make a row of.
    """

    def __init__(
        self,
        documents: Documents,
        vocabulary: Vocabulary,
        objective: Objective,
        *,
        sequence_length: int,
        rows: int,
        seed: int = 0,
        packing: Literal["documents", "stream"] = "documents",
        rank: int = 0,
        world_size: int = 1,
        evaluation: bool = False,
    ) -> None:
        if vocabulary != documents.vocabulary:
            raise ConfigError(
                f"the model's vocabulary is {vocabulary.hash[:12]}, that of {documents} is "
                f"{documents.vocabulary.hash[:12]}; prepare the data with this model's tokenizers"
            )
        if sequence_length < 2 or rows < 1 or not 0 <= rank < world_size:
            raise ConfigError(
                f"sequence_length={sequence_length}, rows={rows}, rank={rank} of {world_size}; a row "
                "needs two ids, a batch one row, and the rank must be below world_size"
            )
        self._documents, self._vocabulary, self._objective = documents, vocabulary, objective
        self._sequence_length, self._rows, self._seed = sequence_length, rows, seed
        self._rank, self._world_size = rank, world_size
        self._is_stream, self._evaluation = packing == "stream", evaluation
        usable = np.arange(len(documents))
        if not self._is_stream:
            usable = usable[documents.lengths[: len(documents)] <= sequence_length]
        self.num_too_long = len(documents) - len(usable)
        self.usable = usable
        """The documents that are not too long, ascending."""
        self._order: tuple[int, np.ndarray] | None = None
        self._plan = self._make_plan()
        self._window: tuple[int, int, list[Row]] | None = None
        self._place = Place()
        self.batch_documents: list[list[int]] = []
        if not self._rows_of(0, 0):
            raise DataError(
                f"the {len(documents)} documents of {documents} fill no row of {sequence_length} ids "
                f"(the longest has {documents.lengths.max()}); change "
                "sequence_length or packing, or prepare more data"
            )

    def state(self) -> dict[str, int]:
        """Where the next batch starts; give it to `load_state` of a loader with the same settings."""
        return asdict(self._place)

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on where `state()` was taken; the number of processes may be another."""
        self._place = Place(**state)

    def __iter__(self) -> Generator[dict[str, Tensor], None, None]:
        if self._evaluation:
            self._place = Place()
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as thread:
            upcoming = thread.submit(self._batch, self._place)
            while True:
                batch, place, documents = upcoming.result()
                if batch is None:
                    return
                upcoming = thread.submit(self._batch, place)
                self._place, self.batch_documents = place, documents
                yield batch

    def _batch(self, place: Place) -> tuple[dict[str, Tensor] | None, Place, list[list[int]]]:
        """The batch that starts at a place (None at the end of an evaluation), the place after it, and the
        documents of the rows of all processes."""
        wanted = self._rows * self._world_size
        rows: list[tuple[int, Row]] = []
        epoch, window, row = place.epoch, place.window, place.row
        while len(rows) < wanted:
            planned = self._rows_of(epoch, window)
            if not planned:
                if self._evaluation:
                    break
                epoch, window, row = epoch + 1, 0, 0
            elif row >= len(planned):
                window, row = window + 1, 0
            else:
                taken = planned[row : row + wanted - len(rows)]
                rows += [(epoch, each) for each in taken]
                row += len(taken)
        if not rows:
            return None, place, []
        mine = rows[self._rank * self._rows : (self._rank + 1) * self._rows]
        documents = [[piece.document for piece in each.pieces] for _, each in rows]
        return self._fill(mine), Place(epoch, window, row), documents

    def _make_plan(self) -> DocumentPlan | StreamPlan:
        lengths, length = self._documents.lengths, self._sequence_length
        if self._is_stream:
            return StreamPlan(lengths, self._ordered, sequence_length=length, keep_rest=self._evaluation)
        return DocumentPlan(
            lengths,
            self._ordered,
            lambda rng, documents: self._objective.draw_masks(
                self._vocabulary, rng, self._documents.num_moved_answers[documents]
            ),
            ids_per_span=self._objective.ids_per_span,
            sequence_length=length,
            seed=self._seed,
        )

    def _ordered(self, epoch: int) -> np.ndarray:
        if self._evaluation:
            return self.usable
        if self._order is None or self._order[0] != epoch:
            members = self._documents.members(self.usable, self._seed, epoch)
            self._order = (epoch, epoch_order(members, self._seed, epoch))
        return self._order[1]

    def _rows_of(self, epoch: int, window: int) -> list[Row]:
        if self._window is None or self._window[:2] != (epoch, window):
            self._window = (epoch, window, self._plan.rows(epoch, window))
        return self._window[2]

    def _fill(self, rows: list[tuple[int, Row]]) -> dict[str, Tensor]:
        """The tensors of a batch; rows that are missing stay empty."""
        shape = (self._rows, self._sequence_length)
        ids_BT = np.full(shape, self._vocabulary.pad_id, dtype=np.int64)
        document_ids_BT = np.full(shape, -1, dtype=np.int64)
        weights_BT = np.zeros(shape, dtype=np.float32)
        for b, (epoch, row) in enumerate(rows):
            place = 0
            for number, (ids_T, weights_T) in enumerate(self._examples(epoch, row)):
                stop = place + len(ids_T)
                ids_BT[b, place:stop] = ids_T
                document_ids_BT[b, place:stop] = number
                weights_BT[b, place + 1 : stop] = weights_T[1:]
                place = stop
        arrays = {"ids_BT": ids_BT, "document_ids_BT": document_ids_BT, "weights_BT": weights_BT}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _examples(self, epoch: int, row: Row) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The masked ids and weights of each context in a row: of each document, or of the one block of a
        stream."""
        if self._is_stream:
            parts = [self._piece(piece.document, piece.start, piece.stop) for piece in row.pieces]
            ids_T, weights_T = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            rng = generator(self._seed, Purpose.SPANS, epoch, row.number)
            yield self._objective.mask_block(ids_T, weights_T, self._vocabulary, rng)
            return
        for piece in row.pieces:
            ids_T, weights_T = self._piece(piece.document, piece.start, piece.stop)
            rng = generator(self._seed, Purpose.SPANS, epoch, piece.document)
            answers = self._documents.answer_spans(piece.document)
            yield self._objective.mask_document(ids_T, weights_T, self._vocabulary, rng, piece.mask, answers)

    def _piece(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Some ids of a document and their loss weights."""
        ids_T = self._documents.ids(document)
        weights_T = np.ones(len(ids_T), dtype=np.float32)
        weights_T[: self._documents.num_retrieved_ids(document)] = self._objective.retrieved_loss_weight
        return ids_T[start:stop], weights_T[start:stop]
