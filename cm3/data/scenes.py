"""Procedural scenes with captions: one to four coloured shapes on 64x64 pixels, seeded, endless, with splits.

Every example is a pure function of (seed, split, index). The splits are disjoint by construction:

- "train", "validation" and "test" share no attribute combination. What counts is the unordered collection
  of (size, color, shape) of all objects of a scene; a hash of it gives 18 of 20 parts to train, one to
  validation and one to test. So about a tenth of the objects are never seen alone in training.
- "novel" scenes hold at least one of the (color, shape) pairs in `NOVEL_PAIRS`, which no other split shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from cm3.data.scene_captions import Statement, describe
from cm3.data.scene_world import (
    BACKGROUNDS,
    COLORS,
    LATTICE,
    MARGIN,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    SceneObject,
    render,
)
from cm3.errors import DataError

SPLITS = ("train", "validation", "test", "novel")
NOVEL_PAIRS = frozenset({("orange", "star"), ("purple", "triangle"), ("cyan", "cross"), ("pink", "square")})
COUNT_SHARES = (0.25, 0.35, 0.25, 0.15)  # probability of one, two, three and four objects

_HASH_PARTS = 20
_PART_OF_SPLIT = {"validation": 0, "test": 1}
_PLACEMENT_TRIALS = 16
_CORNERS = ((14, 14), (50, 14), (14, 50), (50, 50))  # four objects of any size fit here

_KNOWN_KINDS = [
    (size, color, shape) for size in SIZES for color in COLORS for shape in SHAPES if (color, shape) not in NOVEL_PAIRS
]
_NOVEL_KINDS = [(size, color, shape) for size in SIZES for color, shape in sorted(NOVEL_PAIRS)]

Kind = tuple[str, str, str]
"""(size, color, shape) of an object."""


@dataclass(frozen=True)
class SceneExample:
    """A scene, a caption of it, and exactly what the caption states."""

    scene: Scene
    caption: str
    statement: Statement

    @property
    def image(self) -> Image.Image:
        """The painted scene, 64x64 RGB."""
        return render(self.scene)


def example(seed: int, split: str, index: int) -> SceneExample:
    """The example number `index` of a split; equal arguments always give equal examples."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} of the scenes does not exist; choose one of {', '.join(SPLITS)}")
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    scene = sample_scene(rng, split)
    caption, statement = describe(scene, rng)
    return SceneExample(scene, caption, statement)


@dataclass(frozen=True)
class SceneDataset:
    """The first `size` examples of a split, as a sequence."""

    split: str
    seed: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> SceneExample:
        if not 0 <= index < self.size:
            raise IndexError(f"scene {index} was asked for; the dataset has {self.size}")
        return example(self.seed, self.split, index)

    def __iter__(self) -> Iterator[SceneExample]:
        return (self[index] for index in range(self.size))


def sample_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """Draw a scene of a split: pairwise different objects, apart from each other and from the border."""
    count = 1 + int(np.searchsorted(np.cumsum(COUNT_SHARES[:-1]), rng.random(), side="right"))
    kinds = _sample_kinds(rng, split, count)
    places = _sample_places(rng, [SIZES[size] for size, _, _ in kinds])
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    objects = [
        SceneObject(shape, color, size, x, y) for (size, color, shape), (x, y) in zip(kinds, places, strict=True)
    ]
    return Scene(background, tuple(objects))


def split_of(kinds: list[Kind]) -> str:
    """The only split in which scenes of these objects, given as (size, color, shape), may occur."""
    if any((color, shape) in NOVEL_PAIRS for _, color, shape in kinds):
        return "novel"
    signature = ", ".join(sorted(" ".join(kind) for kind in kinds))
    part = int.from_bytes(hashlib.sha256(signature.encode()).digest()[:8], "big") % _HASH_PARTS
    return next((split for split, held_out in _PART_OF_SPLIT.items() if part == held_out), "train")


def _sample_kinds(rng: np.random.Generator, split: str, count: int) -> list[Kind]:
    """Draw `count` different kinds of objects, again and again until they belong to the split."""
    pool = _KNOWN_KINDS + _NOVEL_KINDS if split == "novel" else _KNOWN_KINDS
    while True:
        drawn = rng.integers(len(pool), size=count).tolist()
        if split == "novel":
            drawn[rng.integers(count)] = len(_KNOWN_KINDS) + int(rng.integers(len(_NOVEL_KINDS)))
        kinds = [pool[i] for i in drawn]
        if len(set(drawn)) == count and split_of(kinds) == split:
            return kinds


@cache
def _centres(side: int) -> list[tuple[int, int]]:
    """Lattice points where a box of this side keeps its margin to the border."""
    near = side // 2 + MARGIN
    inside = [a for a in LATTICE if near <= a <= SIDE - near]
    return [(x, y) for x in inside for y in inside]


def _sample_places(rng: np.random.Generator, sides: list[int]) -> list[tuple[int, int]]:
    """Draw a lattice point for each box, keeping all margins; after too many dead ends, use the corners."""
    for _ in range(_PLACEMENT_TRIALS):
        places: list[tuple[int, int]] = []
        for side in sides:
            free = _centres(side)
            for (x, y), other in zip(places, sides, strict=False):
                apart = (side + other) // 2 + MARGIN
                free = [(a, b) for a, b in free if abs(a - x) >= apart or abs(b - y) >= apart]
            if not free:
                break
            places.append(free[rng.integers(len(free))])
        if len(places) == len(sides):
            return places
    return [_CORNERS[i] for i in rng.permutation(len(_CORNERS))[: len(sides)]]
