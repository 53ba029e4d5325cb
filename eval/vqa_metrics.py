"""VQA accuracy as the official code has it (arXiv 1505.00468; github.com/GT-Vision-Lab/VQA, `vqaEval.py`).

Each of the ten people's answers is left out in turn; the answer scores min(matches among the other nine / 3, 1), and
the ten scores are averaged: 0.3, 0.6, 0.9, 1 for 1, 2, 3, 4 or more matches. The common shortcut min(matches / 3, 1)
is higher. Normalisation happens only where people disagree: unanimous answers are compared as they are, case
included. Two slips of the original are kept, because every published figure has them:

- The pattern that removes full stops means to spare decimals on both sides, but a typing error in its look-behind
  makes that part match always; so "3." loses its full stop and ".5" keeps it.
- `re.UNICODE` stands where the number of replacements belongs, so that the first 32 full stops go and no more.

The original compares whole records, identity of the answerer included. Two people who gave the same answer count
apart here as they do there, as long as the data still have those identities.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cm3.errors import DataError

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MAX_FULL_STOPS = int(re.UNICODE)

_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
"""What the official table restores where exactly one apostrophe is missing. It lacks some words on purpose ("shed",
"well", "were") and some not ("lets")."""


def _misspelled(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {wrong: word for word in _CONTRACTED for wrong in _misspelled(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the original


def normalize_answer(answer: str) -> str:
    """Punctuation, case, articles, number words and contractions, in the official order."""
    return _words(_without_punctuation(_one_line(answer)))


def vqa_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """The share of agreement of an answer with what people answered, in [0, 1].

    Args:
        answer: What the model says.
        human_answers: What people said, ten in the official data sets.

    Raises:
        DataError: fewer than two people; agreement needs a second one to be left in.
    """
    if len(human_answers) < 2:
        raise DataError(
            f"VQA accuracy leaves one of several people's answers out, and there are {len(human_answers)}; "
            "compare single answers for equality"
        )
    answer, humans = _one_line(answer), [_one_line(human) for human in human_answers]
    if len(set(humans)) > 1:
        answer, humans = normalize_answer(answer), [normalize_answer(human) for human in humans]
    matches = sum(human == answer for human in humans)
    scores = [min(1.0, (matches - (human == answer)) / 3) for human in humans]
    return sum(scores) / len(scores)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """A mark goes where it touches a blank anywhere in the text, or where the text has a number such as 1,000; it
    becomes a blank otherwise."""
    number = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        drop = number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if drop else " ")
    return _FULL_STOP.sub("", cleaned, count=_MAX_FULL_STOPS)


def _words(text: str) -> str:
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
