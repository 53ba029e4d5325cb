"""Words of one to three large letters on a plain background: what to write, and how it looks (64x64 RGB).

The splits share no word: a hash of it gives 17 of 20 parts to train, one each to validation, test and novel.
Single letters all belong to train, so that every letter is known.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cm3.data.scene_phrases import indefinite, pick, sentence
from cm3.data.scene_world import BACKGROUNDS, COLORS, SIDE
from cm3.errors import DataError

GLYPHS = {
    "A": ("01110", "10001", "10001", "11111", "10001", "10001", "10001"),
    "C": ("01111", "10000", "10000", "10000", "10000", "10000", "01111"),
    "E": ("11111", "10000", "10000", "11110", "10000", "10000", "11111"),
    "H": ("10001", "10001", "10001", "11111", "10001", "10001", "10001"),
    "I": ("01110", "00100", "00100", "00100", "00100", "00100", "01110"),
    "L": ("10000", "10000", "10000", "10000", "10000", "10000", "11111"),
    "N": ("10001", "11001", "11001", "10101", "10011", "10011", "10001"),
    "O": ("01110", "10001", "10001", "10001", "10001", "10001", "01110"),
    "S": ("01111", "10000", "10000", "01110", "00001", "00001", "11110"),
    "T": ("11111", "00100", "00100", "00100", "00100", "00100", "00100"),
    "U": ("10001", "10001", "10001", "10001", "10001", "10001", "01110"),
    "X": ("10001", "10001", "01010", "00100", "01010", "10001", "10001"),
}
"""Each letter as rows of cells, 1 for ink."""

CELL_SIDE = {1: 7, 2: 5, 3: 3}
"""Pixels along a cell, by the number of letters: as large as fits."""

LENGTH_SHARES = (0.1, 0.3, 0.6)  # probability of one, two and three letters, before words of other splits drop out

_COLUMNS, _ROWS = 5, 7
_HASH_PARTS = 20
_PART_OF_SPLIT = {"validation": 0, "test": 1, "novel": 2}
_WORDINGS = (
    'draw "{word}" in {color} on {a_background} background',
    'write "{word}" in {color} letters on {a_background} background',
    '{a_background} sign that says "{word}" in {color}',
    'the word "{word}" in {color} on {a_background} background',
)


@dataclass(frozen=True)
class Writing:
    """A word in one colour on a background."""

    word: str
    color: str
    background: str


def sample_writing(rng: np.random.Generator, split: str = "train") -> Writing:
    """Draw a word of a split, its colour and its background.

    Raises:
        DataError: the split does not exist.
    """
    if split not in ("train", *_PART_OF_SPLIT):
        raise DataError(
            f"split {split!r} of the words does not exist; choose one of {', '.join(('train', *_PART_OF_SPLIT))}"
        )
    while True:
        length = 1 + int(np.searchsorted(np.cumsum(LENGTH_SHARES[:-1]), rng.random(), side="right"))
        word = "".join(pick(rng, list(GLYPHS)) for _ in range(length))
        if split_of_word(word) == split:
            return Writing(word, pick(rng, list(COLORS)), pick(rng, list(BACKGROUNDS)))


def split_of_word(word: str) -> str:
    """The only split in which a word may occur."""
    if len(word) == 1:
        return "train"
    part = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") % _HASH_PARTS
    return next((split for split, held_out in _PART_OF_SPLIT.items() if part == held_out), "train")


def writing_request(writing: Writing, rng: np.random.Generator) -> str:
    """Ask for a word: quoted, with its colour and background."""
    words = {"word": writing.word, "color": writing.color, "a_background": indefinite(writing.background)}
    return sentence(pick(rng, _WORDINGS).format(**words), rng)


def word_mask(word: str) -> np.ndarray:
    """Where the ink of a word lies, in the middle of the picture: bool [64, 64]."""
    side = CELL_SIDE[len(word)]
    mask_HW = np.zeros((SIDE, SIDE), dtype=bool)
    for letter, (left, top) in zip(word, letter_corners(len(word))):
        cells = np.array([[cell == "1" for cell in row] for row in GLYPHS[letter]])
        mask_HW[top : top + _ROWS * side, left : left + _COLUMNS * side] = cells.repeat(side, 0).repeat(side, 1)
    return mask_HW


def letter_corners(length: int) -> list[tuple[int, int]]:
    """Left and top pixel of each letter of a word of this length; a free column of cells parts two letters."""
    side = CELL_SIDE[length]
    pitch = (_COLUMNS + 1) * side
    left = (SIDE - (length * pitch - side)) // 2
    return [(left + i * pitch, (SIDE - _ROWS * side) // 2) for i in range(length)]


def draw_writing(writing: Writing) -> Image.Image:
    """The word as a 64x64 RGB picture."""
    pixels_HWC = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    pixels_HWC[:] = BACKGROUNDS[writing.background]
    pixels_HWC[word_mask(writing.word)] = COLORS[writing.color]
    return Image.fromarray(pixels_HWC)
