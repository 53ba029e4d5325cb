"""Several prepared folders as one: each repeated until it has its share of an epoch, within limits (CM3Leon, E.1).

A source shows its documents pass after pass, each pass in an order of its own, and an epoch takes up where the
last one stopped. So however many epochs there are, every document of a source has been shown equally often to
within one, and what an epoch holds is a function of (seed, epoch) alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cm3.data.packing import Purpose, generator
from cm3.data.shards import ShardedDocuments
from cm3.errors import ConfigError, DataError
from cm3.tokenizers.document import TokenizedDocument


@dataclass(frozen=True, kw_only=True)
class SourceCount:
    """What an epoch holds of a source."""

    name: str
    """Of the source."""
    documents: int
    """Documents that can be used."""
    wanted: float
    """How often each of them comes in an epoch by the weights alone."""
    drawn: int
    """Documents of an epoch, repetitions included."""
    ids: int
    """Their ids, delimiters included; a mean over epochs."""

    @property
    def repetition(self) -> float:
        """How often a document comes in an epoch, on average."""
        return self.drawn / self.documents

    def __str__(self) -> str:
        clipped = "" if math.isclose(self.repetition, self.wanted, rel_tol=0.01) else f", {self.wanted:.2f} by weight"
        return (
            f"{self.name}: {self.drawn} of an epoch's documents and {self.ids} of its ids, "
            f"each of {self.documents} documents {self.repetition:.2f} times{clipped}"
        )


class Mixture:
    """Documents of several sources, for `PackedLoader` in the place of one.

    Its documents are those of the first source, then those of the second and so on. An epoch can show one several
    times; copy n of document d has the index n * len(mixture) + d, so that each copy is masked differently.

    Args:
        sources: Prepared folders by name.
        weights: Share of the documents of an epoch that each source should have, in any unit; None for equal shares.
            An epoch has about as many documents as all sources together.
        min_repetition: Fewest times that a document may come in an epoch, on average, whatever the weights say.
        max_repetition: Most times.

    Raises:
        ConfigError: if the sources were prepared with different tokenizers, or a number is out of range.
    """

    def __init__(
        self,
        sources: Mapping[str, ShardedDocuments],
        weights: Mapping[str, float] | None = None,
        *,
        min_repetition: float = 0.3,
        max_repetition: float = 3.0,
    ) -> None:
        self._names, self._sources = tuple(sources), tuple(sources.values())
        _check(self._names, self._sources, weights, min_repetition, max_repetition)
        shares = np.array([1.0 if weights is None else weights[name] for name in self._names])
        self._shares = shares / shares.sum()
        self._range = (min_repetition, max_repetition)
        self._stops = np.cumsum([len(source) for source in self._sources])
        self._starts = self._stops - [len(source) for source in self._sources]
        self.vocabulary, self.tokenizer_hash = self._sources[0].vocabulary, self._sources[0].tokenizer_hash
        self.folder: Path = self._sources[0].folder
        """Holds the tokenizers, which are the same in every source."""
        copies = math.ceil(max_repetition) + 1  # an epoch can begin and end in the middle of a pass
        self.lengths = np.tile(np.concatenate([source.lengths for source in self._sources]), copies)
        """Number of ids of each document, then of its copies."""
        self.num_moved_answers = np.tile(np.concatenate([source.num_moved_answers for source in self._sources]), copies)
        """See `ShardedDocuments.num_moved_answers`; of each document, then of its copies."""

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __str__(self) -> str:
        return "the mixture of " + ", ".join(self._names)

    def __getitem__(self, index: int) -> TokenizedDocument:
        """A document; `metadata["source"]` names where it is from."""
        number, place = self._locate(index)
        document = self._sources[number][place]
        return replace(document, metadata={**document.metadata, "source": self._names[number]})

    def ids(self, index: int) -> np.ndarray:
        """See `ShardedDocuments.ids`."""
        number, place = self._locate(index)
        return self._sources[number].ids(place)

    def answer_spans(self, index: int) -> np.ndarray:
        """See `ShardedDocuments.answer_spans`."""
        number, place = self._locate(index)
        return self._sources[number].answer_spans(place)

    def num_retrieved_ids(self, index: int) -> int:
        """See `ShardedDocuments.num_retrieved_ids`."""
        number, place = self._locate(index)
        return self._sources[number].num_retrieved_ids(place)

    def members(self, usable: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """The documents that an epoch shows, copies included, source after source.

        Args:
            usable: documents (no copies) to draw from, ascending.
            seed: of the order in which the documents of a source come.
            epoch: counted from 0.
        """
        shown = []
        for number, (part, drawn) in enumerate(self._drawn(usable)):
            begin, size = epoch * drawn, len(part)
            first = begin // size
            for turn in range(first, -(-(begin + drawn) // size)):
                order = generator(seed, Purpose.MIXTURE, turn, number).permutation(part)
                places = order[max(0, begin - turn * size) : begin + drawn - turn * size]
                shown.append(places + (turn - first) * len(self))
        return np.concatenate(shown)

    def counts(self, usable: np.ndarray | None = None) -> tuple[SourceCount, ...]:
        """What an epoch holds of each source.

        Args:
            usable: see `members`; None for all.
        """
        usable = np.arange(len(self)) if usable is None else usable
        return tuple(
            SourceCount(
                name=name,
                documents=len(part),
                wanted=float(share) * len(usable) / len(part),
                drawn=drawn,
                ids=round(drawn * float(self.lengths[part].mean())),
            )
            for name, share, (part, drawn) in zip(self._names, self._shares, self._drawn(usable), strict=True)
        )

    def _drawn(self, usable: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """For each source its usable documents, and how many documents an epoch has of it."""
        parts = np.split(usable, np.searchsorted(usable, self._stops[:-1]))
        for name, source, part in zip(self._names, self._sources, parts, strict=True):
            if not len(part):
                raise DataError(
                    f"none of the {len(source)} documents of {name} in {self} fits into a row (the shortest has "
                    f"{source.lengths.min()} ids); leave it out or raise sequence_length"
                )
        repetitions = [share * len(usable) / len(part) for share, part in zip(self._shares, parts, strict=True)]
        least, most = self._range
        clipped = np.clip(repetitions, least, most)
        return [(part, max(1, round(float(r) * len(part)))) for part, r in zip(parts, clipped, strict=True)]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"document {index} was asked for; {self} has {len(self)} and their copies")
        document = index % len(self)
        number = int(np.searchsorted(self._stops, document, side="right"))
        return number, document - int(self._starts[number])


def open_documents(
    folders: str | Path | Mapping[str, str],
    weights: Mapping[str, float] | None = None,
    *,
    min_repetition: float = 0.3,
    max_repetition: float = 3.0,
    check: bool = True,
) -> ShardedDocuments | Mixture:
    """Open one prepared folder to train on, or several by name as a `Mixture`. A collective where it checks.

    With `check` every shard is compared with its checksum first, see `cm3.data.shard_sums.check_shards`.

    Raises:
        ConfigError: see `Mixture`; or weights were given for one folder.
        DataError: a folder is not complete, is empty, or has damaged shards.
    """
    if isinstance(folders, Mapping):
        sources = {name: ShardedDocuments(folder, check=check) for name, folder in folders.items()}
        return Mixture(sources, weights or None, min_repetition=min_repetition, max_repetition=max_repetition)
    if weights:
        raise ConfigError(
            f"weights were given for {', '.join(weights)}, but the data are the one folder {folders}; name several "
            "folders or leave the weights out"
        )
    return ShardedDocuments(folders, check=check)


def _check(
    names: tuple[str, ...],
    sources: tuple[ShardedDocuments, ...],
    weights: Mapping[str, float] | None,
    min_repetition: float,
    max_repetition: float,
) -> None:
    if not names:
        raise ConfigError("a mixture of no sources; name at least one prepared folder")
    if weights is not None and set(weights) != set(names):
        raise ConfigError(
            f"the mixture has weights for {', '.join(sorted(weights))}, its sources are {', '.join(sorted(names))}; "
            "give each source a weight, or none at all for equal shares"
        )
    for name, weight in (weights or {}).items():
        if not 0 < weight < math.inf:
            raise ConfigError(f"the weight of {name} is {weight}; choose a number above 0, or leave the source out")
    if not 0 <= min_repetition <= max_repetition < math.inf or max_repetition == 0:
        raise ConfigError(
            f"min_repetition={min_repetition}, max_repetition={max_repetition}; choose 0 <= min <= max, max above 0"
        )
    for name, source in zip(names, sources, strict=True):
        if source.tokenizer_hash != sources[0].tokenizer_hash:
            raise ConfigError(
                f"{names[0]} was prepared with the tokenizers {sources[0].tokenizer_hash[:12]}, {name} with "
                f"{source.tokenizer_hash[:12]}; a mixture needs the same in all, prepare one of them again"
            )
