"""PSNR and SSIM against hand-computed values and recorded outputs of scikit-image.

How the fixtures were made: scikit-image 0.26, `structural_similarity(a, b, channel_axis=2, data_range=255)` as it is,
and with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`; `peak_signal_noise_ratio`.
"""

import math

import numpy as np
import pytest
from PIL import Image

from cm3.errors import DataError
from cm3.eval.image_metrics import psnr, ssim

Y, X = np.mgrid[:24, :20]
BEFORE = np.stack([(X * 11 + Y * 7) % 256, (X * Y * 3) % 256, (255 - X * 9 - Y) % 256], -1).astype(np.uint8)
AFTER = np.stack([(X * 11 + Y * 7 + (X * Y) % 17) % 256, (X * Y * 3 + 20) % 256, (255 - X * 9) % 256], -1)
FIRST, SECOND = Image.fromarray(BEFORE), Image.fromarray(AFTER.astype(np.uint8))


def plain(level: int, side: int = 12) -> Image.Image:
    return Image.new("RGB", (side, side), (level, level, level))


def test_agreement_with_scikit_image():
    assert ssim(FIRST, SECOND) == pytest.approx(0.7549455617292177, abs=1e-12)
    assert ssim(FIRST, SECOND, "uniform") == pytest.approx(0.7850647184709351, abs=1e-12)
    assert psnr(FIRST, SECOND) == pytest.approx(15.38888022240293, abs=1e-12)


@pytest.mark.parametrize("window", ["gaussian", "uniform"])
def test_ssim_of_plain_pictures_compares_their_levels(window):
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(plain(100), plain(150), window) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("window", "side"), [("gaussian", 11), ("uniform", 7)])
def test_ssim_of_one_window_is_the_formula(window, side):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (side, side)).astype(np.uint8) for _ in range(2))
    taps = np.exp(-((np.arange(side) - side // 2) ** 2) / 4.5) if window == "gaussian" else np.ones(side)
    weight = np.outer(taps, taps) / taps.sum() ** 2
    factor = 1 if window == "gaussian" else side**2 / (side**2 - 1)
    mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
    variance_a, variance_b = factor * (weight * (a - mean_a) ** 2).sum(), factor * (weight * (b - mean_b) ** 2).sum()
    covariance = factor * (weight * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    expected /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    assert ssim(Image.fromarray(a), Image.fromarray(b), window) == pytest.approx(expected, rel=1e-9)


def test_ssim_is_symmetric_and_one_for_equal_pictures():
    assert ssim(FIRST, SECOND) == pytest.approx(ssim(SECOND, FIRST), abs=1e-12)
    assert ssim(FIRST, FIRST) == pytest.approx(1, abs=1e-12)
    assert ssim(FIRST, Image.fromarray(255 - BEFORE)) < 0


def test_psnr_by_hand():
    assert psnr(plain(100), plain(110)) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(plain(7), plain(7)) == math.inf
    one = np.zeros((10, 10, 3), np.uint8)
    one[0, 0, 0] = 255  # one of 300 values
    assert psnr(Image.fromarray(one), plain(0, 10)) == pytest.approx(10 * math.log10(300))


def test_pictures_below_the_window_are_refused():
    with pytest.raises(DataError, match="windows of 11x11 pixels, the picture has 8x8"):
        ssim(plain(1, 8), plain(1, 8))
    assert ssim(plain(1, 8), plain(1, 8), "uniform") == pytest.approx(1)
