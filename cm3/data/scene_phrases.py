"""How instructions speak of the scenes: phrases that name exactly one object, and the nine regions of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import TypeVar

import numpy as np

from cm3.data.scene_world import SIDE, SIZES, Scene, SceneObject
from cm3.data.scenes import Kind
from cm3.errors import DataError

REGIONS = (
    *("top left", "top center", "top right"),
    *("center left", "center", "center right"),
    *("bottom left", "bottom center", "bottom right"),
)
COUNT_WORDS = ("zero", "one", "two", "three", "four")

_ANCHORS = (14, 30, 50)  # lattice coordinates, one in each third of the picture, where either size fits
_SENTENCE_SHARE = 0.15  # share of texts with a capital letter and a full stop, as among the captions

T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """Words for an object by some of its attributes; None is an attribute that the words leave out."""

    size: str | None
    color: str | None
    shape: str | None

    @property
    def words(self) -> str:
        """The definite phrase, such as "the large red circle" or "the green object"."""
        return " ".join(["the", *filter(None, (self.size, self.color)), self.shape or "object"])

    def meant(self, scene: Scene) -> SceneObject | None:
        """The one object of a scene that the words fit; None where they fit none or several."""
        fitting = [item for item in scene.objects if self.fits(item)]
        return fitting[0] if len(fitting) == 1 else None

    def fits(self, item: SceneObject) -> bool:
        """Whether an object has all the attributes."""
        return all(getattr(self, field.name) in (None, getattr(item, field.name)) for field in fields(self))


def references(scene: Scene, item: SceneObject, hidden: str = "") -> list[Reference]:
    """All references that mean this object and no other, without the attribute `hidden`."""
    open_or_said = [(None,) if name == hidden else (None, getattr(item, name)) for name in ("size", "color", "shape")]
    return [reference for said in product(*open_or_said) if (reference := Reference(*said)).meant(scene) == item]


def kinds_of(scene: Scene) -> list[Kind]:
    """(size, color, shape) of every object."""
    return [(item.size, item.color, item.shape) for item in scene.objects]


def indefinite(words: str) -> str:
    """The words with their article: "a red circle", "an orange star"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def enumeration(parts: Sequence[str]) -> str:
    """The parts with commas between, and "and" before the last."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def counted(count: int) -> str:
    """The number of objects in words: "one object", "three objects"."""
    return f"{COUNT_WORDS[count]} object{'' if count == 1 else 's'}"


def box_of(item: SceneObject) -> tuple[int, int, int, int]:
    """Left, top, right and bottom edge of the bounding box in pixels; the object covers pixels left to right - 1."""
    half = SIZES[item.size] // 2
    x, y = round(item.x), round(item.y)
    return x - half, y - half, x + half, y + half


def region_of(item: SceneObject) -> str:
    """Which ninth of the picture holds the middle of an object."""
    column, row = (min(int(3 * along / SIDE), 2) for along in (item.x, item.y))
    return REGIONS[3 * row + column]


def anchor_of(region: str) -> tuple[int, int]:
    """The place (x, y) that an object gets when an instruction puts it into a region."""
    row, column = divmod(REGIONS.index(region), 3)
    return _ANCHORS[column], _ANCHORS[row]


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def pick_kind(rng: np.random.Generator, kinds: Sequence[str], kind: str | None) -> str:
    """The kind asked for, or any if None; raises DataError for a kind that does not exist."""
    if kind is None:
        return pick(rng, kinds)
    if kind not in kinds:
        raise DataError(f"kind {kind!r} does not exist; choose one of {', '.join(kinds)}")
    return kind


def sentence(text: str, rng: np.random.Generator) -> str:
    """The text as it is or, now and then, with a capital letter and a full stop (not after a question mark)."""
    if rng.random() >= _SENTENCE_SHARE:
        return text
    return f"{text[0].upper()}{text[1:]}{'' if text.endswith('?') else '.'}"
