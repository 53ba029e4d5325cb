"""The oracle of the procedural scenes: reads a picture back by plain image processing and grades it.

`read_scene` paints in reverse. Take the background off the picture; find the one painted object (any shape,
size, colour and place) whose removal lowers the squared error most; cut it out; go on until nothing left
resembles an object. The search over all places is a correlation with the shape masks, done with Fourier
transforms. (Matching pursuit: Mallat and Zhang, 1993, IEEE Trans. Signal Processing 41(12).)

No learned part is involved, so a model that is graded here cannot please the grader except by right pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
from PIL import Image

from cm3.data.scene_captions import StatedObject, Statement, parse_caption
from cm3.data.scene_world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    SceneObject,
    relation_holds,
    shape_mask,
)
from cm3.errors import DataError

MIXED = "mixed"  # the colour of an object in which several run together; no caption states it
POSITION_SLACK = 4.0  # pixels by which a relation between drawn objects may miss what a caption needs to state it

_LEAST_FIT = 0.3  # share of an object's own energy that it must explain to count as seen; a perfect object has 1
_LEAST_PLAIN = 0.6  # share of an object's inner pixels that must have its colour; else it is of mixed colours
_MOST_OBJECTS = 12
_KINDS = [(shape, size) for shape in SHAPES for size in SIZES]


@dataclass(frozen=True)
class SceneScore:
    """How a picture agrees with a statement; None where the statement is silent."""

    count_right: bool
    shapes_right: bool
    colors_right: bool
    attributes_right: bool
    """The objects are exactly those stated, by shape and colour."""
    relations_right: bool | None
    """All stated relations hold between objects of the stated shape and colour."""
    background_right: bool | None
    exact: bool
    """Everything stated holds at once, sizes included, and nothing else is there."""


@dataclass(frozen=True)
class CaptionScore:
    """How a caption agrees with the scene it should describe."""

    parsed: bool
    """The caption lies in the grammar of the scenes; otherwise no object counts as right."""
    objects: int
    """Objects in the scene."""
    objects_right: int
    """Objects that the caption names with the right shape, colour and, if it states one, size."""
    spurious: int
    """Objects that the caption names and the scene does not hold."""
    relations_right: bool | None
    background_right: bool | None
    exact: bool


def read_scene(image: Image.Image | np.ndarray) -> Scene:
    """Read background and objects from a picture, the most striking first; centres are in whole pixels.

    An object of several colours is read with the colour `MIXED`.

    Args:
        image: 64x64 RGB, as a PIL picture or a uint8 array of shape [64, 64, 3].

    Raises:
        DataError: if the picture has another size.
    """
    pixels_HWC = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels_HWC.shape != (SIDE, SIDE, 3):
        raise DataError(f"the oracle reads RGB pictures of {SIDE}x{SIDE}, this one is {pixels_HWC.shape}; resize it")
    pixels_HWC = pixels_HWC.astype(np.float32)
    border = np.concatenate([pixels_HWC[0], pixels_HWC[-1], pixels_HWC[1:-1, 0], pixels_HWC[1:-1, -1]])
    ground = np.median(border, axis=0)
    background = min(BACKGROUNDS, key=lambda name: float(np.sum((ground - BACKGROUNDS[name]) ** 2)))
    residual_HWC = pixels_HWC - ground
    objects: list[SceneObject] = []
    while len(objects) < _MOST_OBJECTS and (found := _strongest_object(residual_HWC, ground)) is not None:
        plain = _plain_share(pixels_HWC, found) >= _LEAST_PLAIN
        objects.append(found if plain else replace(found, color=MIXED))
        _cut_out(residual_HWC, found)
    return Scene(background, tuple(objects))


def _strongest_object(residual_HWC: np.ndarray, ground: np.ndarray) -> SceneObject | None:
    """The object whose removal lowers the squared error of the residual most; None if none is clearly there.

    With mask m and contrast u = colour - ground, removing the object changes the error by
    -gain = sum (r - m u)^2 - sum r^2, so gain = 2 u . (m * r) - |u|^2 sum m^2, where * is correlation.
    """
    masks_fourier, energies_M, inside_MHW = _templates()
    contrast_UC = np.array(list(COLORS.values()), dtype=np.float32) - ground
    energy_UM = np.sum(contrast_UC**2, axis=1)[:, None] * energies_M
    if np.sum(residual_HWC**2) < _LEAST_FIT * energy_UM.min():
        return None  # no gain exceeds the energy that is left
    residual_fourier = np.fft.rfft2(residual_HWC.transpose(2, 0, 1))
    overlap_CMHW = np.fft.irfft2(residual_fourier[:, None] * masks_fourier, s=(SIDE, SIDE))
    gain_UMHW = np.tensordot(contrast_UC, overlap_CMHW, axes=1)
    gain_UMHW *= 2
    gain_UMHW -= energy_UM[:, :, None, None]
    gain_UMHW *= inside_MHW
    color, kind, top, left = np.unravel_index(int(np.argmax(gain_UMHW)), gain_UMHW.shape)
    if gain_UMHW[color, kind, top, left] < _LEAST_FIT * energy_UM[color, kind]:
        return None
    shape, size = _KINDS[kind]
    half = SIZES[size] // 2
    return SceneObject(shape, list(COLORS)[color], size, int(left) + half, int(top) + half)


def _plain_share(pixels_HWC: np.ndarray, item: SceneObject) -> float:
    """Share of the object's inner pixels that are nearer to its colour than to any other of the palette."""
    half = SIZES[item.size] // 2
    top, left = int(item.y) - half, int(item.x) - half
    inner = shape_mask(item.shape, 2 * half) > 0.99
    inner_NC = pixels_HWC[top : top + 2 * half, left : left + 2 * half][inner]
    palette_UC = np.array(list(COLORS.values()), dtype=np.float32)
    nearest_N = np.argmin(np.sum((inner_NC[:, None] - palette_UC) ** 2, axis=2), axis=1)
    return float(np.mean(nearest_N == list(COLORS).index(item.color)))


@cache
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Conjugate Fourier transforms of the masks, their energies, and 1 where they stay inside the picture."""
    padded_MHW = np.zeros((len(_KINDS), SIDE, SIDE), dtype=np.float32)
    inside_MHW = np.zeros((len(_KINDS), SIDE, SIDE), dtype=np.float32)
    for kind, (shape, size) in enumerate(_KINDS):
        side = SIZES[size]
        padded_MHW[kind, :side, :side] = shape_mask(shape, side)
        inside_MHW[kind, : SIDE - side + 1, : SIDE - side + 1] = 1
    return np.fft.rfft2(padded_MHW).conj(), np.sum(padded_MHW**2, axis=(1, 2)), inside_MHW


def _cut_out(residual_HWC: np.ndarray, item: SceneObject) -> None:
    """Clear the place of an object and one pixel around it, where blur may have carried it, in place."""
    half = SIZES[item.size] // 2
    covered_HW = np.zeros((SIDE + 2, SIDE + 2), dtype=bool)
    top, left = int(item.y) - half + 1, int(item.x) - half + 1
    covered_HW[top : top + 2 * half, left : left + 2 * half] = shape_mask(item.shape, 2 * half) > 0
    shifts = [(dy, dx) for dy in range(3) for dx in range(3)]
    grown_HW = np.logical_or.reduce([covered_HW[dy : dy + SIDE, dx : dx + SIDE] for dy, dx in shifts])
    residual_HWC[grown_HW] = 0


def agrees(stated: StatedObject, item: SceneObject) -> bool:
    """Whether an object has the stated shape and colour, and the stated size if any."""
    return (stated.shape, stated.color) == (item.shape, item.color) and stated.size in (None, item.size)


def matches(scene: Scene, statement: Statement) -> SceneScore:
    """Grade a scene that was read from a picture against what its caption states."""
    stated, drawn = statement.objects, scene.objects
    count_right = len(drawn) == len(stated)
    background_right = None if statement.background is None else scene.background == statement.background
    all_at_once = count_right and any(
        _relations_hold(statement, dict(enumerate(chosen)))
        for chosen in _choices([[item for item in drawn if agrees(wanted, item)] for wanted in stated])
    )
    return SceneScore(
        count_right=count_right,
        shapes_right=Counter(item.shape for item in drawn) == Counter(item.shape for item in stated),
        colors_right=Counter(item.color for item in drawn) == Counter(item.color for item in stated),
        attributes_right=Counter(map(_pair, drawn)) == Counter(map(_pair, stated)),
        relations_right=_relations_right(scene, statement) if statement.relations else None,
        background_right=background_right,
        exact=all_at_once and background_right is not False,
    )


def caption_score(scene: Scene, caption: str) -> CaptionScore:
    """Grade a caption against the scene it should describe."""
    statement = parse_caption(caption)
    if statement is None:
        return CaptionScore(False, len(scene.objects), 0, 0, None, None, False)
    left = list(scene.objects)
    for stated in sorted(statement.objects, key=lambda item: item.size is None):  # the definite ones choose first
        if found := next((item for item in left if agrees(stated, item)), None):
            left.remove(found)
    right = len(scene.objects) - len(left)
    score = matches(scene, statement)
    return CaptionScore(
        parsed=True,
        objects=len(scene.objects),
        objects_right=right,
        spurious=len(statement.objects) - right,
        relations_right=score.relations_right,
        background_right=score.background_right,
        exact=score.exact,
    )


def _pair(item: SceneObject | StatedObject) -> tuple[str, str]:
    return item.shape, item.color


def _relations_right(scene: Scene, statement: Statement) -> bool:
    """Whether all relations can hold at once; objects go by shape and colour, and by size where it helps."""
    involved = sorted({i for first, _, second in statement.relations for i in (first, second)})
    candidates = []
    for wanted in (statement.objects[i] for i in involved):
        alike = [item for item in scene.objects if _pair(item) == _pair(wanted)]
        candidates.append([item for item in alike if agrees(wanted, item)] or alike)
    return any(_relations_hold(statement, dict(zip(involved, chosen, strict=True))) for chosen in _choices(candidates))


def _choices(candidates: list[list[SceneObject]]) -> Iterator[tuple[SceneObject, ...]]:
    """All ways to take one candidate for each place, none twice."""
    return (chosen for chosen in product(*candidates) if len(set(chosen)) == len(chosen))


def _relations_hold(statement: Statement, drawn: dict[int, SceneObject]) -> bool:
    return all(
        relation_holds(drawn[first], relation, drawn[second], POSITION_SLACK)
        for first, relation, second in statement.relations
    )
