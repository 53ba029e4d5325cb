"""Which retrieved documents to keep: relevant, of both query modalities, and none a copy (CM3Leon, section 2.1).

Pure functions on ranked lists of candidates. CM3Leon keeps candidates of a score of at most 0.9. A score that mixes
text and image vectors is lower than that of a copy's text or picture alone, so both are held below the limit.

E embedding width
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cm3.errors import ConfigError

Modality = Literal["text", "image"]


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """The rules of selection; the defaults are CM3Leon's."""

    num_documents: int = 2
    """Documents of a context at most, K. Fewer where the memory holds too few that the rules let pass."""
    distribution: Literal["fixed", "uniform"] = "fixed"
    """fixed: always K; uniform: from 0 to K with equal probability, as RA-CM3, so that some have none."""
    per_modality: int = 2
    """Candidates kept for the query's text, and as many for its picture, before K of them are drawn."""
    max_similarity: float = 0.9
    """Largest score, and largest cosine of text with text or picture with picture, to the query and to what is
    chosen already; above it a document counts as a copy."""
    query_dropout: float = 0.2
    """Share of the words of a text query that are left out of the search; 0 is off."""

    def __post_init__(self) -> None:
        if self.num_documents < 0:
            raise ConfigError(f"num_documents={self.num_documents}; choose 0 or more")
        if self.per_modality < 1:
            raise ConfigError(f"per_modality={self.per_modality}; choose 1 or more")
        if self.num_documents > 2 * self.per_modality:
            raise ConfigError(
                f"num_documents={self.num_documents} is more than two modalities of per_modality={self.per_modality} "
                "give; raise per_modality"
            )
        if not 0 <= self.query_dropout < 1:
            raise ConfigError(f"query_dropout={self.query_dropout} is a share; choose from 0 to below 1")


@dataclass(frozen=True, eq=False)
class Item:
    """A document as the rules see it: unit vectors of its text and picture (None where it has none), and its name."""

    text_E: np.ndarray | None
    image_E: np.ndarray | None
    name: str | None = None
    """Name of its raw row; two documents of one name are the same."""


@dataclass(frozen=True, eq=False)
class Candidate(Item):
    """A document of the memory that a search has found."""

    row: int = -1
    """Its row in the memory."""
    score: float = 0.0
    """Inner product of the query that found it with its mixed vector."""


def similarity(first: Item, second: Item) -> float:
    """The larger of text with text and picture with picture; -1 where they share no modality."""
    pairs = ((first.text_E, second.text_E), (first.image_E, second.image_E))
    return max((float(a_E @ b_E) for a_E, b_E in pairs if a_E is not None and b_E is not None), default=-1.0)


def is_same(first: Item, second: Item) -> bool:
    """Whether both are one document of the raw data."""
    return first.name is not None and first.name == second.name


def admissible(query: Item, candidates: Iterable[Candidate], max_similarity: float) -> Iterator[Candidate]:
    """Without the query itself and its near-duplicates, in the order they came."""
    for candidate in candidates:
        if is_same(query, candidate) or candidate.score > max_similarity:
            continue
        if similarity(query, candidate) <= max_similarity:
            yield candidate


def diverse(
    candidates: Iterable[Candidate], chosen: Sequence[Candidate], count: int, max_similarity: float
) -> list[Candidate]:
    """The first `count` that are near-duplicates neither of `chosen` nor of one another."""
    kept: list[Candidate] = []
    for candidate in candidates:
        if len(kept) == count:
            break
        others = [*chosen, *kept]
        if any(other.row == candidate.row or is_same(other, candidate) for other in others):
            continue
        if all(similarity(other, candidate) <= max_similarity for other in others):
            kept.append(candidate)
    return kept


def pool(
    query: Item, ranked: Mapping[Modality, Iterable[Candidate]], config: SelectionConfig
) -> dict[Modality, list[Candidate]]:
    """At most `per_modality` candidates for each query modality, after all rules.

    Args:
        query: The whole query, both modalities where it has them, whichever of them searched.
        ranked: What each modality has found, best first.
        config: The rules.
    """
    kept: dict[Modality, list[Candidate]] = {}
    for modality, candidates in ranked.items():
        chosen = [candidate for others in kept.values() for candidate in others]
        passed = admissible(query, candidates, config.max_similarity)
        kept[modality] = diverse(passed, chosen, config.per_modality, config.max_similarity)
    return kept


def draw_count(config: SelectionConfig, rng: np.random.Generator) -> int:
    """How many documents a context gets."""
    if config.distribution == "fixed":
        return config.num_documents
    return int(rng.integers(config.num_documents + 1))


def draw(
    pooled: Mapping[Modality, Sequence[Candidate]], config: SelectionConfig, rng: np.random.Generator
) -> list[Candidate]:
    """Shuffle what the modalities have kept together, and keep K of them (for training)."""
    count = draw_count(config, rng)
    together = [candidate for candidates in pooled.values() for candidate in candidates]
    return [together[place] for place in rng.permutation(len(together))[:count]]


def best(pooled: Mapping[Modality, Sequence[Candidate]], config: SelectionConfig) -> list[Candidate]:
    """The K of the highest scores, best first (for generation)."""
    together = [candidate for candidates in pooled.values() for candidate in candidates]
    return sorted(together, key=lambda candidate: -candidate.score)[: config.num_documents]


def drop_words(text: str, rate: float, rng: np.random.Generator) -> str:
    """The text without a random share of its words, at least one of which stays (CM3Leon, section 2.1).

    The number left out is `rate` times the words, rounded up or down at random so that its mean is exact.
    """
    words = re.findall(r"\S+", text)
    exact = rate * len(words)
    count = min(int(exact) + int(rng.random() < exact % 1), max(0, len(words) - 1))
    dropped = set(rng.choice(len(words), size=count, replace=False).tolist()) if count else set()
    return " ".join(word for place, word in enumerate(words) if place not in dropped)
