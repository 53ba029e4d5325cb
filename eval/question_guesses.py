"""What the words of questions give away: guesses of one who does not see the picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

PRIOR = "from the question alone"
"""What figures of such guesses are called."""


def guesses(asked: Sequence[tuple[str, str, str]], known: Sequence[tuple[str, str, str]] | None = None) -> list[str]:
    """What one would answer who hears the question and sees nothing: the most frequent answer to the same question,
    or to questions of the same kind where the question is new.

    Args:
        asked: Kind, question and true answer of each question to guess at.
        known: The same of the questions to learn from. None learns from the other half of `asked`. (Halves are
            fair; leaving out one question at a time is not, since it always makes the true answer rarer.)
    """
    if known is not None:
        return _learnt(known, asked)
    answers = [""] * len(asked)
    answers[1::2], answers[::2] = _learnt(asked[::2], asked[1::2]), _learnt(asked[1::2], asked[::2])
    return answers


def _learnt(known: Sequence[tuple[str, str, str]], asked: Sequence[tuple[str, str, str]]) -> list[str]:
    counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for kind, question, answer in known:
        counts[kind, question][answer] += 1
        counts[(kind,)][answer] += 1
    guessed = []
    for kind, question, _ in asked:
        seen = counts.get((kind, question)) or counts.get((kind,), Counter())
        guessed.append(max(seen, key=lambda answer: (seen[answer], answer), default=""))
    return guessed
