"""BLEU-1..4 and CIDEr of captions, equal to pycocoevalcap 1.2 on equal words (arXiv 1411.5726; Papineni et al. 2002).

All functions take words, see `cm3.eval.caption_words`. What is easily got wrong is done as there:

- CIDEr's document frequencies come from the references of the pictures that are scored, so scores of different
  subsets cannot be compared, and a single picture always scores 0 (log 1 is the weight of every n-gram).
- What everybody calls CIDEr is CIDEr-D: clipped counts, and a Gaussian penalty on the difference in length. The
  length is the number of bigrams, not of words.
- CIDEr is given in the unit of the code, where captions equal to their references score up to 10. Papers print a
  hundred times the figure.
- BLEU is a figure of the corpus. The reference length is the closest to the candidate's, the shorter of two equally
  close ones, and empty counts are kept from being zero by the constants of the original.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from cm3.errors import DataError

Words = Sequence[str]
CiderVariant = Literal["cider-d", "cider"]

MAX_N = 4
"""Longest n-grams of both metrics."""

_TINY, _SMALL = 1e-15, 1e-9


def ngrams(words: Words) -> Counter[tuple[str, ...]]:
    """All n-grams of one to four words with their counts."""
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def bleu_counts(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """What BLEU adds up over pictures: per picture 4 numbers of n-grams found in a reference (each at most as often
    as in the reference that has most of it), 4 numbers of n-grams, the length, and the reference length.

    Raises:
        DataError: lists of different length, or a picture without references.
    """
    _check(candidates, references)
    rows = []
    for words, alternatives in zip(candidates, references):
        most: Counter[tuple[str, ...]] = Counter()
        for alternative in alternatives:
            most |= ngrams(alternative)
        found = [0] * MAX_N
        for ngram, count in (ngrams(words) & most).items():
            found[len(ngram) - 1] += count
        length = len(words)
        _, closest = min((abs(len(alternative) - length), len(alternative)) for alternative in alternatives)
        rows.append([*found, *(max(0, length - n) for n in range(MAX_N)), length, closest])
    return np.array(rows, dtype=np.float64).reshape(-1, 2 * MAX_N + 2)


def bleu_of_counts(counts: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 of sums of `bleu_counts`, along the last axis: the geometric mean of the precisions up to n,
    times exp(1 - reference length / length) where the captions are too short."""
    precisions = (counts[..., :MAX_N] + _TINY) / (counts[..., MAX_N : 2 * MAX_N] + _SMALL)
    means = np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, MAX_N + 1))
    share = (counts[..., -2:-1] + _TINY) / (counts[..., -1:] + _SMALL)
    brevity: np.ndarray = means * np.exp(np.minimum(0, 1 - 1 / share))
    return brevity


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4.

    Args:
        candidates: The caption of each picture.
        references: The captions that people wrote for it, one or more.
    """
    return [float(score) for score in bleu_of_counts(bleu_counts(candidates, references).sum(0))]


def cider(
    candidates: Sequence[Words],
    references: Sequence[Sequence[Words]],
    variant: CiderVariant = "cider-d",
    sigma: float = 6.0,
) -> np.ndarray:
    """CIDEr of each picture; its mean is the figure of the set.

    Args:
        candidates: The caption of each picture.
        references: The captions that people wrote for it, one or more.
        variant: cider-d: pycocoevalcap's, with clipping and penalty; cider: the plain cosines.
        sigma: Standard deviation of the penalty, in bigrams.
    """
    _check(candidates, references)
    candidate_counts = [ngrams(words) for words in candidates]
    reference_counts = [[ngrams(words) for words in alternatives] for alternatives in references]
    frequency = Counter(ngram for counts in reference_counts for ngram in set().union(*counts))
    log_size = math.log(len(candidates)) if candidates else 0.0

    def weigh(counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {ngram: count * (log_size - math.log(max(1, frequency[ngram]))) for ngram, count in counts.items()}

    scores = []
    for counts, alternatives in zip(candidate_counts, reference_counts):
        weights = weigh(counts)
        total = 0.0
        for other_counts in alternatives:
            other = weigh(other_counts)
            products, norms = np.zeros(MAX_N), _norms(weights) * _norms(other)
            for ngram in weights.keys() & other.keys():
                own = min(weights[ngram], other[ngram]) if variant == "cider-d" else weights[ngram]
                products[len(ngram) - 1] += own * other[ngram]
            cosines = np.divide(products, norms, out=products, where=norms != 0)
            if variant == "cider-d":
                cosines *= math.exp(-((_bigrams(counts) - _bigrams(other_counts)) ** 2) / (2 * sigma**2))
            total += float(cosines.mean())
        scores.append(10 * total / len(alternatives))
    return np.array(scores)


def _norms(weights: dict[tuple[str, ...], float]) -> np.ndarray:
    squares = np.zeros(MAX_N)
    for ngram, weight in weights.items():
        squares[len(ngram) - 1] += weight**2
    return np.sqrt(squares)


def _bigrams(counts: Counter[tuple[str, ...]]) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _check(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    if len(candidates) != len(references):
        raise DataError(f"{len(candidates)} captions for {len(references)} pictures; give one caption for each")
    if empty := [index for index, alternatives in enumerate(references) if not alternatives]:
        raise DataError(f"picture {empty[0]} has no reference; leave out the {len(empty)} pictures without any")
