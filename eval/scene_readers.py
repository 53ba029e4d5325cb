"""Readers beside the oracle of the scenes: segmentation maps, pixel by pixel, and words, by template matching."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
from PIL import Image

from cm3.data.scene_grounding import SEGMENT_COLORS
from cm3.data.scene_letters import CELL_SIDE, GLYPHS, Writing, letter_corners, word_mask
from cm3.data.scene_world import BACKGROUNDS, COLORS, SIDE
from cm3.errors import DataError

UNLABELLED = -1  # a pixel whose colour is no class's

_REACH = 64.0  # levels; half the least distance between two colours of the palette
_SHIFTS = range(-3, 4)  # pixels by which a word may stand beside its place
_LEAST_INK = 64.0  # levels from the background on which a pixel is ink
_LEAST_PIXELS = 40  # fewer pixels of ink than a third of the thinnest letter are no word
_LEAST_FIT = 0.5  # intersection over union of ink and word


def read_map(image: Image.Image) -> np.ndarray:
    """The class of each pixel of a segmentation map, an index into `SEGMENT_COLORS` or `UNLABELLED`: int [64, 64].

    Raises:
        DataError: the picture is not 64x64.
    """
    pixels_HWC = _pixels(image)
    palette_UC = np.array(list(SEGMENT_COLORS.values()), dtype=np.float32)
    distance_HWU = np.sqrt(np.sum((pixels_HWC[:, :, None] - palette_UC) ** 2, axis=3))
    return np.where(distance_HWU.min(axis=2) < _REACH, distance_HWU.argmin(axis=2), UNLABELLED)


def read_word(image: Image.Image) -> Writing | None:
    """The word in a picture with its colour and background; None if the ink resembles no word.

    For each number of letters and each small shift, every place takes the letter whose template agrees best with
    the ink; the word with the greatest intersection over union is read.

    Raises:
        DataError: the picture is not 64x64.
    """
    pixels_HWC = _pixels(image)
    border = np.concatenate([pixels_HWC[0], pixels_HWC[-1], pixels_HWC[1:-1, 0], pixels_HWC[1:-1, -1]])
    ground = np.median(border, axis=0)
    away_HW = np.sqrt(np.sum((pixels_HWC - ground) ** 2, axis=2))
    ink_HW = away_HW > max(_LEAST_INK, float(np.percentile(away_HW, 98)) / 2)
    if ink_HW.sum() < _LEAST_PIXELS:
        return None
    shifted = [np.roll(ink_HW, shift, axis=(0, 1)) for shift in product(_SHIFTS, _SHIFTS)]
    fit, word = max(_best_word(moved_HW, length) for moved_HW in shifted for length in CELL_SIDE)
    if fit < _LEAST_FIT:
        return None
    color = np.median(pixels_HWC[ink_HW], axis=0)
    return Writing(word, _nearest(COLORS, color), _nearest(BACKGROUNDS, ground))


def _best_word(ink_HW: np.ndarray, length: int) -> tuple[float, str]:
    """The word of this length that agrees best with the ink at its place, and its intersection over union."""
    templates_LHW = _templates(length)
    height, width = templates_LHW.shape[1:]
    word = ""
    for left, top in letter_corners(length):
        window_HW = ink_HW[top : top + height, left : left + width]
        agreement_L = np.sum(templates_LHW == window_HW, axis=(1, 2))
        word += list(GLYPHS)[int(agreement_L.argmax())]
    mask_HW = word_mask(word)
    return float((ink_HW & mask_HW).sum() / (ink_HW | mask_HW).sum()), word


@cache
def _templates(length: int) -> np.ndarray:
    """Every letter in the size that it has in words of this length: bool [letters, height, width]."""
    cells_LHW = np.array([[[cell == "1" for cell in row] for row in rows] for rows in GLYPHS.values()])
    return cells_LHW.repeat(CELL_SIDE[length], axis=1).repeat(CELL_SIDE[length], axis=2)


def _nearest(palette: dict[str, tuple[int, int, int]], color: np.ndarray) -> str:
    return min(palette, key=lambda name: float(np.sum((color - palette[name]) ** 2)))


def _pixels(image: Image.Image) -> np.ndarray:
    pixels_HWC = np.asarray(image.convert("RGB"), dtype=np.float32)
    if pixels_HWC.shape != (SIDE, SIDE, 3):
        raise DataError(f"pictures of {SIDE}x{SIDE} are read here, this one is {image.width}x{image.height}; resize it")
    return pixels_HWC
