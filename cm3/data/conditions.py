"""Condition pictures that are computed from the picture to draw: its edges.

Others (segmentation, HED, pose, depth, normals, scribbles) need a trained network or a hand and are taken from the
data.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

_LEAST_CHANGE = 20.0  # levels for each pixel of distance from which on a change of colour is an edge


def edge_map(image: Image.Image) -> Image.Image:
    """White edges, one pixel wide, on black, of any RGB picture.

    The gradient is taken by central differences in each channel, the steepest channel counts; a pixel is kept
    where the gradient passes a threshold and is largest along its main axis (the thinning step of Canny, 1986,
    IEEE Trans. PAMI 8(6), with two directions and one threshold). Colour matters: yellow on white, or green on
    gray, is hardly an edge in shades of gray.
    """
    if min(image.size) < 2:  # there are no neighbours to differ from
        return Image.new("RGB", image.size)
    pixels_HWC = np.asarray(image.convert("RGB"), dtype=np.float32)
    down_HWC, right_HWC = np.gradient(pixels_HWC, axis=(0, 1))
    strength_HW = np.hypot(down_HWC, right_HWC).max(axis=2)
    padded = np.pad(strength_HW, 1)
    # On a plateau of two the second one stays.
    peak_across = (strength_HW > padded[1:-1, 2:]) & (strength_HW >= padded[1:-1, :-2])
    peak_down = (strength_HW > padded[2:, 1:-1]) & (strength_HW >= padded[:-2, 1:-1])
    steeper_across = np.abs(right_HWC).max(axis=2) >= np.abs(down_HWC).max(axis=2)
    edges_HW = (strength_HW > _LEAST_CHANGE) & np.where(steeper_across, peak_across, peak_down)
    return Image.fromarray((edges_HW * 255).astype(np.uint8)).convert("RGB")


CONDITIONS: dict[str, Callable[[Image.Image], Image.Image]] = {"edges": edge_map}
"""By task: what makes the condition picture where a row has none."""
