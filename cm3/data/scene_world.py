"""The world of the procedural scenes: what a scene is, and how it is painted (64x64 RGB).

What both sides have to know, the painter and the oracle in `cm3.eval.scenes`, stands here once: palette,
sizes, shape masks, and when a relation between two objects holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
MARGIN = 2  # least number of pixels between two bounding boxes, and between a box and the border
LATTICE = tuple(range(2, SIDE, 4))  # coordinates that the centre of an object may have

SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": 14, "large": 24}  # side of the bounding box in pixels
COLORS = {
    "red": (215, 20, 40),
    "green": (30, 160, 60),
    "blue": (35, 75, 230),
    "yellow": (255, 230, 40),
    "orange": (250, 125, 0),
    "purple": (135, 40, 190),
    "cyan": (50, 215, 235),
    "pink": (255, 130, 200),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128), "navy": (15, 25, 85)}

RELATIONS = ("left of", "right of", "above", "below")
CLEAR = 12  # pixels between two centres from which on a relation is stated

_SUPERSAMPLING = 8


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape; `x`, `y` are the middle of its bounding box in pixels from the top left."""

    shape: str
    color: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """A background and the objects on it, which do not overlap."""

    background: str
    objects: tuple[SceneObject, ...]


def relation_holds(first: SceneObject, relation: str, second: SceneObject, slack: float = 0.0) -> bool:
    """Whether `first` is clearly `relation` (e.g. "left of") `second`.

    The centres must differ by at least `CLEAR` pixels in that direction, and by no less than across it;
    `slack` (pixels) relaxes both for positions that were measured in a picture.
    """
    right, down = second.x - first.x, second.y - first.y
    along = {"left of": right, "right of": -right, "above": down, "below": -down}[relation]
    across = abs(down) if relation in ("left of", "right of") else abs(right)
    return along >= CLEAR - slack and along >= across - slack


@cache
def shape_mask(shape: str, side: int) -> np.ndarray:
    """Anti-aliased coverage of `shape` in its bounding box: float32 in [0, 1] of shape [side, side]."""
    span = side * _SUPERSAMPLING
    canvas = Image.new("L", (span, span), 0)
    draw = ImageDraw.Draw(canvas)
    if shape == "circle":
        draw.ellipse((0, 0, span - 1, span - 1), fill=255)
    else:
        draw.polygon([(x * (span - 1), y * (span - 1)) for x, y in _outline(shape)], fill=255)
    small = canvas.resize((side, side), Image.Resampling.BOX)
    mask = np.asarray(small, dtype=np.float32) / 255
    mask.setflags(write=False)
    return mask


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a polygonal shape in the unit square, y pointing down."""
    if shape == "square":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if shape == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if shape == "cross":
        a, b = 1 / 3, 2 / 3
        return [
            (a, 0),
            (b, 0),
            (b, a),
            (1, a),
            (1, b),
            (b, b),
            (b, 1),
            (a, 1),
            (a, b),
            (0, b),
            (0, a),
            (a, a),
        ]
    if shape == "star":
        # Five points, the corners at alternating radii, stretched so that the tips touch the box.
        corners = [
            (math.sin(k * math.pi / 5) * radius, -math.cos(k * math.pi / 5) * radius)
            for k, radius in enumerate([1.0, 0.45] * 5)
        ]
        xs, ys = zip(*corners, strict=True)
        return [((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in corners]
    raise ValueError(f"shape {shape!r} is unknown; choose one of {', '.join(SHAPES)}")


def render_array(scene: Scene) -> np.ndarray:
    """Paint a scene: uint8 RGB of shape [64, 64, 3]. Centres are rounded to whole pixels."""
    picture_HWC = np.empty((SIDE, SIDE, 3), dtype=np.float32)
    picture_HWC[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        side = SIZES[item.size]
        left, top = round(item.x) - side // 2, round(item.y) - side // 2
        mask = shape_mask(item.shape, side)[..., None]
        window = picture_HWC[top : top + side, left : left + side]
        window += mask * (np.array(COLORS[item.color], dtype=np.float32) - window)
    return (picture_HWC + 0.5).astype(np.uint8)


def render(scene: Scene) -> Image.Image:
    """Paint a scene as a 64x64 RGB picture."""
    return Image.fromarray(render_array(scene))
