"""Reads the boxes of the NLVR corpus (Suhr et al. 2017, ACL) back: from pixels, and from their captions.

The corpus draws at most eight objects into a grey box of 100x100; pictures of a box may be smaller. `read_box`
resizes a picture to 100x100 and paints in reverse, as `cm3.eval.scenes` does: find the one object (any shape, size,
colour and place) that explains most of the picture, cut it out, go on until nothing left resembles an object.
Objects may touch, also in one colour, as the blocks of a tower do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from cm3.errors import DataError

SIDE = 100
"""Side of a box in the corpus; places and sizes are in its pixels."""
GROUND = (211, 211, 211)
COLORS = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 10, "medium": 20, "large": 30}
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")

_TRIANGLE_LESS = 2  # a triangle is drawn two pixels narrower and lower than its nominal size
_LEAST_SHARE = 0.7  # of an object's own energy must be in the picture for it to count as seen
_COST_OF_MISSING = 1.5  # 1 is squared error; more, so that no large circle is seen in two stacked squares
_SOFTNESS = 1.0  # standard deviation in pixels of the blur that resizing, and an image tokenizer, give to edges
_MOST_OBJECTS = 16
_KINDS = [(shape, size) for shape in SHAPES for size in SIZES]

_TOWER = re.compile(r"a tower of (\w+) blocks, from bottom to top: (.+)")
_SINGLE = re.compile(rf"a single ({'|'.join(COLORS)}) block")
_PART = re.compile(rf"({'|'.join(NUMBERS)}) ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})s?")


class BoxKind(NamedTuple):
    """What a caption says of an object."""

    size: str
    color: str
    shape: str


class BoxObject(NamedTuple):
    """An object in a box; `x` and `y` are its left and its top in pixels of the 100x100 box."""

    kind: BoxKind
    x: int
    y: int


def kinds(objects: Iterable[BoxObject]) -> Counter[BoxKind]:
    """How many objects there are of each kind."""
    return Counter(item.kind for item in objects)


def parse_box_caption(caption: str) -> Counter[BoxKind] | None:
    """The objects that a caption names; None if it lies outside of the corpus's templates.

    The templates are "one large black square, two small yellow triangles and one small blue circle",
    "a tower of two blocks, from bottom to top: blue, black", and "a single blue block". Blocks are medium squares.
    """
    if single := _SINGLE.fullmatch(caption):
        return Counter([BoxKind("medium", single[1], "square")])
    if tower := _TOWER.fullmatch(caption):
        colors = tower[2].split(", ")
        if not set(colors) <= set(COLORS) or len(colors) > len(NUMBERS) or tower[1] != NUMBERS[len(colors) - 1]:
            return None
        return Counter(BoxKind("medium", color, "square") for color in colors)
    found: Counter[BoxKind] = Counter()
    for part in re.split(r", | and ", caption):
        match = _PART.fullmatch(part)
        if match is None:
            return None
        number, size, color, shape = match.groups()
        found[BoxKind(size, color, shape)] += NUMBERS.index(number) + 1
    return found


def read_box(image: Image.Image) -> tuple[BoxObject, ...]:
    """Read the objects of a square picture, the most striking first.

    Raises:
        DataError: if the picture is not square.
    """
    if image.width != image.height:
        raise DataError(f"a box is a square picture, this one is {image.width}x{image.height}; crop it")
    pixels = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    residual_HWC = np.asarray(pixels, dtype=np.float32) - np.array(GROUND, dtype=np.float32)
    objects: list[BoxObject] = []
    while len(objects) < _MOST_OBJECTS and (found := _strongest_object(residual_HWC)) is not None:
        objects.append(found)
        _cut_out(residual_HWC, found)
    return tuple(objects)


def _strongest_object(residual_HWC: np.ndarray) -> BoxObject | None:
    """The object that explains most of the residual; None if none is clearly there.

    An object of mask m and contrast u = colour - ground has the energy |u|^2 sum m^2. Of it, the residual r holds
    u . (m * r), where * is correlation, and misses the rest. The object with the most held less missed is chosen.
    """
    masks_fourier, energies_M, inside_MHW = _templates()
    contrast_UC = np.array(list(COLORS.values()), dtype=np.float32) - np.array(GROUND, dtype=np.float32)
    energy_UM11 = (np.sum(contrast_UC**2, axis=1)[:, None] * energies_M)[:, :, None, None]
    projected_fourier = np.fft.rfft2(np.moveaxis(residual_HWC @ contrast_UC.T, 2, 0))
    held_UMHW = np.fft.irfft2(projected_fourier[:, None] * masks_fourier, s=(SIDE, SIDE))
    enough_UMHW = (held_UMHW >= _LEAST_SHARE * energy_UM11) & inside_MHW
    score_UMHW = np.where(enough_UMHW, held_UMHW - _COST_OF_MISSING * (energy_UM11 - held_UMHW), 0)
    color, kind, top, left = np.unravel_index(int(np.argmax(score_UMHW)), score_UMHW.shape)
    if score_UMHW[color, kind, top, left] <= 0:
        return None
    shape, size = _KINDS[kind]
    return BoxObject(BoxKind(size, list(COLORS)[color], shape), int(left), int(top))


def _cut_out(residual_HWC: np.ndarray, item: BoxObject) -> None:
    """Clear the place of an object and one pixel around it, where resizing has carried it, in place."""
    mask_HW = shape_mask(item.kind.shape, item.kind.size) > 0
    height, width = mask_HW.shape
    covered_HW = np.zeros((SIDE + 2, SIDE + 2), dtype=bool)
    covered_HW[item.y + 1 : item.y + 1 + height, item.x + 1 : item.x + 1 + width] = mask_HW
    shifts = [(dy, dx) for dy in range(3) for dx in range(3)]
    residual_HWC[np.logical_or.reduce([covered_HW[dy : dy + SIDE, dx : dx + SIDE] for dy, dx in shifts])] = 0


@cache
def shape_mask(shape: str, size: str, oversampling: int = 8) -> np.ndarray:
    """Share of each pixel that an object covers, as an array of the object's own height and width."""
    side = SIZES[size] - (_TRIANGLE_LESS if shape == "triangle" else 0)
    steps = (np.arange(side * oversampling) + 0.5) / (side * oversampling)  # 0 to 1 over the object
    y, x = steps[:, None], np.abs(2 * steps - 1)[None, :]  # from the top; from the middle column
    if shape == "circle":
        inside = x**2 + (2 * y - 1) ** 2 <= 1
    elif shape == "triangle":
        inside = x <= y
    else:
        inside = np.ones((len(steps), len(steps)), dtype=bool)
    return inside.reshape(side, oversampling, side, oversampling).mean((1, 3), dtype=np.float32)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Conjugate Fourier transforms of the blurred masks, their energies, and whether they stay inside the picture."""
    padded_MHW = np.zeros((len(_KINDS), SIDE, SIDE), dtype=np.float32)
    inside_MHW = np.zeros((len(_KINDS), SIDE, SIDE), dtype=bool)
    for kind, (shape, size) in enumerate(_KINDS):
        mask_HW = shape_mask(shape, size)
        side = len(mask_HW)
        padded_MHW[kind, :side, :side] = mask_HW
        inside_MHW[kind, : SIDE - side + 1, : SIDE - side + 1] = True
    frequency_H, frequency_W = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None, :]
    blur_HW = np.exp(-2 * (np.pi * _SOFTNESS) ** 2 * (frequency_H**2 + frequency_W**2))
    masks_fourier = np.fft.rfft2(padded_MHW) * blur_HW
    energies_M = np.sum(np.fft.irfft2(masks_fourier, s=(SIDE, SIDE)) ** 2, axis=(1, 2))
    return masks_fourier.conj(), energies_M, inside_MHW
