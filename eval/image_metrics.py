"""Pixel measures between a picture and what became of it: PSNR and SSIM (Wang et al., 2004, IEEE TIP 13(4)).

H W height, width   C channels
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from PIL import Image

from cm3.errors import DataError

SsimWindow = Literal["gaussian", "uniform"]

_PEAK = 255.0
_C1, _C2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
_SIGMA, _GAUSSIAN_REACH = 1.5, 5
_UNIFORM_SIDE = 7


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size as RGB, in dB: 10 log10(255^2 / mean squared error).

    Equal pictures give infinity.
    """
    a_HWC, b_HWC = _pixels(first, second)
    error = float(((a_HWC - b_HWC) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(_PEAK**2 / error)


def ssim(first: Image.Image, second: Image.Image, window: SsimWindow = "gaussian") -> float:
    """Structural similarity of two pictures of one size as RGB, in [-1, 1]: the mean over channels and over all
    places where the window lies inside the picture.

    Args:
        first: One picture.
        second: The other.
        window: gaussian: 11x11 with a standard deviation of 1.5, as in the paper; scikit-image's
            `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`. uniform: 7x7
            with sample covariance, scikit-image's default, which gives other figures.

    Raises:
        DataError: the pictures are smaller than the window.
    """
    a_HWC, b_HWC = _pixels(first, second)
    taps, unbias = _window(window)
    if min(a_HWC.shape[:2]) < len(taps):
        raise DataError(
            f"SSIM looks at windows of {len(taps)}x{len(taps)} pixels, the picture has "
            f"{first.width}x{first.height}; choose larger pictures"
        )
    mean_a, mean_b = _smooth(a_HWC, taps), _smooth(b_HWC, taps)
    variance_a = unbias * (_smooth(a_HWC * a_HWC, taps) - mean_a * mean_a)
    variance_b = unbias * (_smooth(b_HWC * b_HWC, taps) - mean_b * mean_b)
    covariance = unbias * (_smooth(a_HWC * b_HWC, taps) - mean_a * mean_b)
    above = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    below = (mean_a**2 + mean_b**2 + _C1) * (variance_a + variance_b + _C2)
    return float((above / below).mean())


def _window(window: SsimWindow) -> tuple[np.ndarray, float]:
    """Weights along one side, which sum to 1, and the factor on variances."""
    if window == "gaussian":
        offsets = np.arange(-_GAUSSIAN_REACH, _GAUSSIAN_REACH + 1)
        taps = np.exp(-(offsets**2) / (2 * _SIGMA**2))
        return taps / taps.sum(), 1.0
    pixels = _UNIFORM_SIDE**2
    return np.full(_UNIFORM_SIDE, 1 / _UNIFORM_SIDE), pixels / (pixels - 1)


def _smooth(values_HWC: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Weighted means over all windows that lie inside, one axis after the other."""
    for axis in (0, 1):
        places = values_HWC.shape[axis] - len(taps) + 1
        shifted = (np.take(values_HWC, range(i, i + places), axis=axis) for i in range(len(taps)))
        values_HWC = sum((tap * part for tap, part in zip(taps, shifted)), np.zeros(()))
    return values_HWC


def _pixels(first: Image.Image, second: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    a_HWC, b_HWC = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (first, second))
    assert a_HWC.shape == b_HWC.shape, (a_HWC.shape, b_HWC.shape)
    return a_HWC, b_HWC
