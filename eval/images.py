"""Pixel measures between pictures."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB pictures of one size, in dB: 10 log10(255^2 / mean squared error).

    Equal pictures give infinity.
    """
    a, b = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (first, second))
    assert a.shape == b.shape, (a.shape, b.shape)
    error = float(((a - b) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
