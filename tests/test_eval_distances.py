"""Fréchet and kernel distances against closed forms, scipy and torch-fidelity.

How the fixtures were made: `fid_statistics_to_metric` and `kernel_mmd` of torch-fidelity (commit 5e211a9) and
clean-fid's `frechet_distance` (scipy 1.17 `sqrtm`) on `features` below. The two agree to 1e-13 and share an error of
1e-9, since both take roots of a nearly singular product; ours is held to 1e-12 against the features themselves.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3.errors import DataError
from cm3.eval.distances import (
    Gaussian,
    frechet_distance,
    frechet_estimate,
    kernel_distance,
    kernel_estimate,
    polynomial_mmd,
)


def features(count: int, width: int, pitch: float) -> np.ndarray:
    place = np.arange(count * width, dtype=np.float64).reshape(count, width)
    return np.sin(place * pitch) + 0.3 * np.cos(place**1.1 * 0.7 * pitch) + 0.1 * pitch


FIRST, SECOND = features(60, 8, 1.3), features(50, 8, 0.9)
normal = np.random.default_rng(0).standard_normal


def distance(first: np.ndarray, second: np.ndarray) -> float:
    return frechet_distance(Gaussian.of(first), Gaussian.of(second))


def test_frechet_distance_agrees_with_torch_fidelity_and_scipy():
    assert distance(FIRST, SECOND) == pytest.approx(3.028933787399313, rel=1e-8)


def test_frechet_distance_agrees_where_there_are_fewer_pictures_than_features():
    assert distance(features(12, 20, 1.3), features(15, 20, 0.9)) == pytest.approx(19.452718811275485, rel=1e-8)


@pytest.mark.parametrize(("n", "m", "width"), [(60, 50, 8), (12, 15, 20)])
def test_frechet_distance_is_that_of_the_centred_features(n, m, width):
    a, b = features(n, width, 1.3), features(m, width, 0.9)
    a_centred, b_centred = (a - a.mean(0)) / math.sqrt(n - 1), (b - b.mean(0)) / math.sqrt(m - 1)
    root = np.linalg.svd(a_centred @ b_centred.T, compute_uv=False).sum()  # tr (C1 C2)^(1/2), no covariance needed
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (a_centred**2).sum() + (b_centred**2).sum() - 2 * root
    assert distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_gaussians_that_commute_is_known():
    first = Gaussian(np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    second = Gaussian(np.array([1.0, -1.0]), np.diag([1.0, 25.0]))
    assert frechet_distance(first, second) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 5) ** 2)


def test_frechet_distance_of_one_feature():
    a, b = np.array([[0.0], [2.0]]), np.array([[1.0], [7.0]])  # standard deviations sqrt(2) and sqrt(18)
    assert distance(a, b) == pytest.approx((1 - 4) ** 2 + (math.sqrt(2) - math.sqrt(18)) ** 2)


@pytest.mark.parametrize("samples", [FIRST, features(5, 30, 1.1)], ids=["more samples", "more features"])
def test_equal_sets_have_no_distance(samples):
    assert distance(samples, samples[::-1]) == pytest.approx(0, abs=1e-9)


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 6), st.integers(0, 99))
def test_frechet_distance_is_symmetric_and_not_negative(n, m, width, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, width)), rng.standard_normal((m, width)) + 1
    assert distance(a, b) == pytest.approx(distance(b, a), abs=1e-9) and distance(a, b) >= 0
    turn, _ = np.linalg.qr(rng.standard_normal((width, width)))
    assert distance(a @ turn + 3, b @ turn + 3) == pytest.approx(distance(a, b), abs=1e-8)


def test_small_samples_look_farther_than_they_are():
    rng = np.random.default_rng(0)
    reference = Gaussian.of(rng.standard_normal((4000, 16)))
    few, many = (frechet_distance(Gaussian.of(rng.standard_normal((n, 16))), reference) for n in (50, 1000))
    assert few > 5 * many


def test_kernel_distance_agrees_with_torch_fidelity_draw_by_draw():
    mean, deviation = kernel_distance(FIRST, SECOND, subsets=20, subset_size=40)
    assert mean == pytest.approx(0.4197160992822594, rel=1e-12)
    assert deviation == pytest.approx(0.03255373054544204, rel=1e-10)
    assert polynomial_mmd(FIRST[:50], SECOND) == pytest.approx(0.40973342988695816, rel=1e-12)
    assert kernel_distance(FIRST, SECOND, subsets=20, subset_size=40, seed=1)[0] != mean


def test_polynomial_mmd_of_two_pairs_by_hand():
    first, second = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 1.0], [-1.0, 1.0]])
    # kernels: within first (0/2+1)^3 = 1, within second (0/2+1)^3 = 1, across 1.5^3, 0.5^3, 1.5^3, 1.5^3
    assert polynomial_mmd(first, second) == pytest.approx(1 + 1 - 2 * (3 * 1.5**3 + 0.5**3) / 4)


def test_polynomial_mmd_is_unbiased():
    rng = np.random.default_rng(3)
    values = [polynomial_mmd(*rng.standard_normal((2, 6, 4))) for _ in range(4000)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(4000)
    assert min(values) < 0


def test_frechet_estimate_is_the_distance_with_an_interval_that_narrows():
    reference = Gaussian.of(SECOND)
    estimate = frechet_estimate(FIRST, reference)
    assert estimate.value == distance(FIRST, SECOND) and estimate.count == 60
    assert 0 <= estimate.low < estimate.value < estimate.high
    rng = np.random.default_rng(5)
    widths = []
    for count in (50, 1000):
        found = frechet_estimate(rng.standard_normal((count, 3)) + 1, Gaussian(np.zeros(3), np.eye(3)))
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2
    assert not frechet_estimate(FIRST[:2], reference).has_interval


def test_frechet_interval_covers_what_repetition_shows():
    rng = np.random.default_rng(7)
    reference = Gaussian(np.zeros(2), np.eye(2))
    found = [frechet_estimate(rng.standard_normal((200, 2)) + 0.5, reference) for _ in range(60)]
    spread = np.std([estimate.value for estimate in found])
    stated = np.mean([estimate.high - estimate.value for estimate in found]) / 1.96
    assert stated == pytest.approx(spread, rel=0.3)


def test_kernel_estimate_covers_no_difference_and_finds_one():
    rng = np.random.default_rng(9)
    a, b = rng.standard_normal((400, 4)), rng.standard_normal((400, 4))
    same, other = kernel_estimate(a, b, subsets=20), kernel_estimate(a + 1, b, subsets=20)
    assert same.low < 0 < same.high and other.low > 0
    assert same.value == kernel_distance(a, b, subsets=20, subset_size=400)[0]
    assert not kernel_estimate(a[:3], b).has_interval


def test_sets_that_are_too_small_or_broken_are_refused():
    with pytest.raises(DataError, match="needs 2 or more pictures in each set, one has 1"):
        Gaussian.of(FIRST[:1])
    with pytest.raises(DataError, match="not finite; look for a damaged picture"):
        Gaussian.of(np.array([[1.0], [math.nan]]))
    with pytest.raises(DataError, match="subset_size=55 is more than the 50 pictures of a set; choose 50 or less"):
        kernel_distance(FIRST, SECOND, subset_size=55)
    with pytest.raises(DataError, match="kernel distance needs 2 or more pictures in each set, these have 1 and 50"):
        polynomial_mmd(FIRST[:1], SECOND)
