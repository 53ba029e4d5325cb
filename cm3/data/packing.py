"""Which documents, or pieces of a stream of documents, share a row. Plans hold places; the loader fills in
the ids.

A plan is made window by window, and each window is a function of (seed, epoch, window) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np

WINDOW_DOCUMENTS = 4096
"""Documents packed together: more of them fill the rows better, fewer make a window faster."""

WINDOW_ROWS = 256
"""Rows of a stream planned together."""


class Mask(Protocol):
    """What the objective masks in a document: `cm3.model.objective.Mask`."""

    @property
    def num_spans(self) -> int: ...

    def within(self, room: int) -> Mask: ...


class Purpose(IntEnum):
    """What random numbers are for; each purpose has its own."""

    ORDER = 0
    COUNTS = 1
    SPANS = 2
    MIXTURE = 3


def generator(seed: int, purpose: Purpose, epoch: int, place: int) -> np.random.Generator:
    """The random numbers of a purpose at a place of an epoch."""
    return np.random.Generator(np.random.PCG64((seed, int(purpose), epoch, place)))


def epoch_order(members: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The documents of an epoch in their random order."""
    return generator(seed, Purpose.ORDER, epoch, 0).permutation(members)


@dataclass(frozen=True)
class Piece:
    """The ids start..stop-1 of a document, and what to mask in it where documents are masked one by one."""

    document: int
    start: int
    stop: int
    mask: Mask | None = None


@dataclass(frozen=True)
class Row:
    """What stands in a row, and its number in the epoch (of a stream) or the window (of documents)."""

    number: int
    pieces: list[Piece]


class DocumentPlan:
    """Whole documents, best-fit into rows within windows of the epoch's order.

    Args:
        lengths: ids of every document.
        order: epoch to the documents of it, none longer than a row.
        draw_masks: (generator, documents) to what to mask in each.
        ids_per_span: room that each span takes; where it is not there, fewer spans are masked.
        sequence_length: ids of a row.
        seed: of the masks.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        order: Callable[[int], np.ndarray],
        draw_masks: Callable[[np.random.Generator, np.ndarray], Sequence[Mask]],
        *,
        ids_per_span: int,
        sequence_length: int,
        seed: int,
    ) -> None:
        self._lengths, self._order, self._draw_masks = lengths, order, draw_masks
        self._ids_per_span, self._sequence_length, self._seed = ids_per_span, sequence_length, seed

    def rows(self, epoch: int, window: int) -> list[Row]:
        """The rows of a window; none after the last one of the epoch."""
        documents = self._order(epoch)[window * WINDOW_DOCUMENTS : (window + 1) * WINDOW_DOCUMENTS]
        lengths = self._lengths[documents].astype(np.int64)
        rng = generator(self._seed, Purpose.COUNTS, epoch, window)
        rooms = (self._sequence_length - lengths) // self._ids_per_span
        masks = [mask.within(room) for mask, room in zip(self._draw_masks(rng, documents), rooms.tolist(), strict=True)]
        num_spans = np.array([mask.num_spans for mask in masks], dtype=np.int64)
        bins = best_fit(lengths + self._ids_per_span * num_spans, self._sequence_length)
        rng.shuffle(bins)  # they come sorted by the lengths of their documents
        return [
            Row(number, [Piece(int(documents[i]), 0, int(lengths[i]), masks[i]) for i in items])
            for number, items in enumerate(bins)
        ]


class StreamPlan:
    """Documents joined in the epoch's order and cut every `sequence_length` ids, wherever that is (metaseq's default).

    Args:
        lengths: ids of every document.
        order: epoch to the documents of it.
        sequence_length: ids of a row.
        keep_rest: whether the last row of an epoch may be shorter; else what does not fill it is left out.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        order: Callable[[int], np.ndarray],
        *,
        sequence_length: int,
        keep_rest: bool,
    ) -> None:
        self._lengths, self._order = lengths, order
        self._sequence_length, self._keep_rest = sequence_length, keep_rest
        self._stream: tuple[int, np.ndarray, np.ndarray] | None = None

    def rows(self, epoch: int, window: int) -> list[Row]:
        """The rows of a window; none after the last one of the epoch."""
        order, starts = self._joined(epoch)
        length, total = self._sequence_length, int(starts[-1])
        num_rows = -(-total // length) if self._keep_rest else total // length
        numbers = range(window * WINDOW_ROWS, min((window + 1) * WINDOW_ROWS, num_rows))
        return [Row(n, stream_pieces(order, starts, n * length, min((n + 1) * length, total))) for n in numbers]

    def _joined(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order, and where in the stream each of its documents starts (and the last one
        stops)."""
        if self._stream is None or self._stream[0] != epoch:
            order = self._order(epoch)
            starts = np.concatenate([[0], np.cumsum(self._lengths[order], dtype=np.int64)])
            self._stream = (epoch, order, starts)
        return self._stream[1:]


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items into bins, one bin after the other: the longest item left, and those others that fill the bin best.

    Where items are of similar length and a handful fills a bin, as captioned pictures are, best-fit decreasing (each
    item by itself into the bin where it leaves the least room) wastes several times as much.

    Args:
        lengths: of the items, from 1 to `capacity`; equal ones keep their order.
        capacity: of every bin.

    Returns:
        The items of each bin.
    """
    assert not len(lengths) or 1 <= lengths.min() <= lengths.max() <= capacity, "an item is empty or longer than a bin"
    left: dict[int, list[int]] = {}  # length -> its items, the longest first
    for item in np.lexsort((-np.arange(len(lengths)), -lengths)).tolist():
        left.setdefault(int(lengths[item]), []).append(item)
    bins = []
    while left:
        longest = next(iter(left))
        items = [left[longest].pop()]
        items += [left[length].pop() for length in _fullest(left, capacity - longest)]
        left = {length: rest for length, rest in left.items() if rest}
        bins.append(items)
    return bins


def _fullest(left: dict[int, list[int]], room: int) -> list[int]:
    """The lengths, of those that are left, with the largest sum up to `room`; long ones rather than short ones.

    A subset sum with bounded counts: bit n of `reachable` says that some items fill exactly n.
    """
    reachable, within = 1, (2 << room) - 1
    trail = []
    for length, items in left.items():
        if length > room:
            continue
        trail.append((length, reachable))
        copies, step = min(len(items), room // length), 1
        while copies:  # 1, 2, 4, ... and the rest: their sums are all numbers of copies
            step = min(step, copies)
            reachable |= (reachable << step * length) & within
            copies, step = copies - step, 2 * step
        if reachable >> room:
            break
    filled = reachable.bit_length() - 1
    chosen = []
    for length, before in reversed(trail):
        while not before >> filled & 1:
            chosen.append(length)
            filled -= length
    return chosen[::-1]


def stream_pieces(order: np.ndarray, starts: np.ndarray, begin: int, end: int) -> list[Piece]:
    """The pieces of documents that the ids begin..end-1 of their stream are made of.

    Args:
        order: documents in the order of the stream.
        starts: where in the stream each of them starts, and where the last one stops.
        begin: first id.
        end: one past the last id.
    """
    pieces = []
    place = int(np.searchsorted(starts, begin, side="right")) - 1
    while begin < end:
        start, stop = int(starts[place]), min(end, int(starts[place + 1]))
        pieces.append(Piece(int(order[place]), begin - start, stop - start))
        begin, place = stop, place + 1
    return pieces
