"""Scenes in other forms: boxes in text, segmentation maps, edges, and long captions with positions.

Everything is exact: boxes are the pixel boxes of the painter, maps and edges are computed from the scene or its
picture, and captions leave no colour, size or background open.
"""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from cm3.data.scene_phrases import (
    COUNT_WORDS,
    REGIONS,
    box_of,
    counted,
    enumeration,
    indefinite,
    region_of,
)
from cm3.data.scene_world import BACKGROUNDS, COLORS, SHAPES, SIDE, SIZES, Scene, SceneObject, shape_mask
from cm3.data.scenes import Kind, sample_scene
from cm3.tokenizers.instruct_tasks import located

SEGMENT_COLORS = {
    "background": (0, 0, 0),
    "circle": (128, 0, 0),
    "square": (0, 128, 0),
    "triangle": (128, 128, 0),
    "star": (0, 0, 128),
    "cross": (128, 0, 128),
}
"""Colour of each class in a segmentation map: the first entries of the PASCAL VOC palette, one class a shape."""

_SIZE_SHARE = 0.5  # share of grounded texts whose objects state their size besides their box


def grounded_texts(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    """A short caption, and for each object its name and box in the words of the task `grounded`, in any order."""
    with_sizes = rng.random() < _SIZE_SHARE
    objects = []
    for i in rng.permutation(len(scene.objects)):
        item = scene.objects[i]
        name = f"{item.size} {item.color} {item.shape}" if with_sizes else f"{item.color} {item.shape}"
        objects.append(located(name, box_of(item), (SIDE, SIDE)))
    return f"{counted(len(objects))} on {indefinite(scene.background)} background", *objects


def full_caption(scene: Scene) -> str:
    """All objects with all attributes, and the background; what a condition image does not show."""
    objects = [indefinite(f"{item.size} {item.color} {item.shape}") for item in scene.objects]
    return f"{enumeration(objects)} on {indefinite(scene.background)} background"


def sample_conditioned_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """A scene whose condition image and caption leave one picture: no two objects share shape and size."""
    while True:
        scene = sample_scene(rng, split)
        if len({(item.shape, item.size) for item in scene.objects}) == len(scene.objects):
            return scene


def segmentation_map(scene: Scene) -> Image.Image:
    """The class of every pixel in `SEGMENT_COLORS`, hard-edged, as a 64x64 RGB picture."""
    map_HWC = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    map_HWC[:] = SEGMENT_COLORS["background"]
    for item in scene.objects:
        map_HWC[object_mask(item)] = SEGMENT_COLORS[item.shape]
    return Image.fromarray(map_HWC)


def object_mask(item: SceneObject) -> np.ndarray:
    """The pixels of a picture that an object covers by more than half, as bool [64, 64]."""
    left, top, right, bottom = box_of(item)
    mask_HW = np.zeros((SIDE, SIDE), dtype=bool)
    mask_HW[top:bottom, left:right] = shape_mask(item.shape, right - left) > 0.5
    return mask_HW


def long_caption(scene: Scene) -> str:
    """Name background, number, and every object with all attributes and its region, in reading order."""
    background = indefinite(scene.background)
    verb = "is" if len(scene.objects) == 1 else "are"
    lines = [f"There {verb} {counted(len(scene.objects))} on {background} background."]
    for item in sorted(scene.objects, key=lambda item: (REGIONS.index(region_of(item)), item.y, item.x)):
        lines.append(f"A {item.size} {item.color} {item.shape} is in the {region_of(item)}.")
    return " ".join(lines)


_OPENING = re.compile(
    rf"there (?:is|are) ({'|'.join(COUNT_WORDS)}) objects? on an? ({'|'.join(BACKGROUNDS)}) background"
)
_LINE = re.compile(
    rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) "
    rf"is in the ({'|'.join(sorted(REGIONS, key=len, reverse=True))})"
)


def parse_long_caption(text: str) -> tuple[str, list[tuple[Kind, str]]] | None:
    """Read a long caption back: the background, and (kind, region) of each object in order of mention.

    None if the words are outside the grammar of `long_caption` or miscount the objects that they name. Case and
    repeated blanks do not matter.
    """
    first, *rest = [line.strip() for line in " ".join(text.lower().split()).removesuffix(".").split(".")]
    opening = _OPENING.fullmatch(first)
    lines = [_LINE.fullmatch(line) for line in rest]
    if opening is None or len(lines) != COUNT_WORDS.index(opening[1]):
        return None
    named = [((found[1], found[2], found[3]), found[4]) for found in lines if found is not None]
    return (opening[2], named) if len(named) == len(lines) else None
