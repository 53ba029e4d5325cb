"""Distances between two sets of feature vectors: Fréchet (arXiv 1706.08500) and kernel distance (arXiv 1801.01401).

On pool3 features of the FID Inception network they are FID and KID, see `cm3.eval.inception`; on any other features
they are not, and must not be called so. The Fréchet distance of finite samples is too high, the more so the fewer
they are, and figures of different numbers of pictures cannot be compared. The kernel distance is unbiased, and may
be negative.

N M samples   D feature width
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from cm3.errors import DataError
from cm3.eval.report import Estimate


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features, in float64; the covariance is divided by N - 1."""

    mean_D: Float[np.ndarray, " D"]
    covariance_DD: Float[np.ndarray, "D D"]

    @cached_property
    def root_DD(self) -> Float[np.ndarray, "D D"]:
        """A matrix A with A A^T = C, by eigenvalues. Those within rounding of zero count as zero: their roots would
        be as large as the root of the rounding."""
        values_D, vectors_DD = np.linalg.eigh(self.covariance_DD)
        rounding = max(values_D[-1], 0) * len(values_D) * np.finfo(np.float64).eps
        scaled_DD: np.ndarray = vectors_DD * np.sqrt(np.where(values_D > rounding, values_D, 0))
        return scaled_DD

    @classmethod
    def of(cls, features_ND: Float[np.ndarray, "N D"]) -> Gaussian:
        """Fit to features.

        Raises:
            DataError: fewer than two samples, or values that are not finite.
        """
        features_ND = np.asarray(features_ND, dtype=np.float64)
        if len(features_ND) < 2:
            raise DataError(f"a Fréchet distance needs 2 or more pictures in each set, one has {len(features_ND)}")
        if not np.isfinite(features_ND).all():
            raise DataError("the features hold values that are not finite; look for a damaged picture or encoder")
        return cls(features_ND.mean(0), np.atleast_2d(np.cov(features_ND, rowvar=False)))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), never below 0.

    The trace of the root is the sum of the singular values of A1^T A2 with C = A A^T, so that nothing is lost to
    complex roots of a product that is singular when there are fewer samples than features. The usual code takes
    `scipy.linalg.sqrtm(C1 C2)`, and adds 1e-6 to the diagonals where that fails.
    """
    difference_D = first.mean_D - second.mean_D
    root_sum = np.linalg.svd(first.root_DD.T @ second.root_DD, compute_uv=False).sum()
    traces = np.trace(first.covariance_DD) + np.trace(second.covariance_DD)
    return max(0.0, float(difference_D @ difference_D + traces - 2 * root_sum))


def frechet_estimate(
    generated_ND: Float[np.ndarray, "N D"], reference: Gaussian, *, groups: int = 10, z: float = 1.96
) -> Estimate:
    """The Fréchet distance to a fixed reference with a 95% interval from the jackknife over groups of pictures.

    A bootstrap would repeat pictures, which alone makes the distance larger. The interval does not cover the bias
    of a small sample.
    """
    value = frechet_distance(Gaussian.of(generated_ND), reference)
    error = _jackknife_error(
        lambda rows: frechet_distance(Gaussian.of(generated_ND[rows]), reference), generated_ND, groups
    )
    return Estimate(value, max(0.0, value - z * error), value + z * error, len(generated_ND))


def _jackknife_error(statistic: Callable[[np.ndarray], float], samples: np.ndarray, groups: int) -> float:
    """Standard error by leaving out one of several interleaved groups at a time; NaN where too few are left."""
    groups = min(groups, len(samples))
    if len(samples) - math.ceil(len(samples) / groups) < 2:
        return math.nan
    member = np.arange(len(samples)) % groups
    values = np.array([statistic(np.flatnonzero(member != group)) for group in range(groups)])
    return float(np.sqrt((groups - 1) / groups * ((values - values.mean()) ** 2).sum()))


def polynomial_mmd(first_ND: Float[np.ndarray, "N D"], second_MD: Float[np.ndarray, "M D"]) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3 (arXiv 1801.01401, section 4).

    Raises:
        DataError: fewer than two samples in a set.
    """
    if min(len(first_ND), len(second_MD)) < 2:
        raise DataError(
            f"a kernel distance needs 2 or more pictures in each set, these have {len(first_ND)} and {len(second_MD)}"
        )
    first_ND, second_MD = np.asarray(first_ND, np.float64), np.asarray(second_MD, np.float64)
    return _mean_off_diagonal(first_ND) + _mean_off_diagonal(second_MD) - 2 * _mean_across(first_ND, second_MD)


def _kernel(first_ND: np.ndarray, second_MD: np.ndarray) -> np.ndarray:
    kernel_NM: np.ndarray = (first_ND @ second_MD.T / first_ND.shape[1] + 1) ** 3
    return kernel_NM


def _mean_off_diagonal(features_ND: np.ndarray) -> float:
    kernel_NN, count = _kernel(features_ND, features_ND), len(features_ND)
    return float((kernel_NN.sum() - np.trace(kernel_NN)) / (count * (count - 1)))


def _mean_across(first_ND: np.ndarray, second_MD: np.ndarray, block: int = 2000) -> float:
    """The mean of the kernel between two sets, in blocks that fit into memory."""
    blocks = range(0, len(second_MD), block)
    total = sum(float(_kernel(first_ND, second_MD[start : start + block]).sum()) for start in blocks)
    return total / (len(first_ND) * len(second_MD))


def kernel_distance(
    first_ND: Float[np.ndarray, "N D"],
    second_MD: Float[np.ndarray, "M D"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Mean and standard deviation of `polynomial_mmd` over random subsets, drawn as torch-fidelity draws them.

    Args:
        first_ND: Features of the generated pictures.
        second_MD: Features of the reference.
        subsets: How many.
        subset_size: Pictures in each; at most as many as the smaller set has.
        seed: Of the draws.

    Raises:
        DataError: a set is smaller than a subset.
    """
    if (smaller := min(len(first_ND), len(second_MD))) < subset_size:
        raise DataError(
            f"subset_size={subset_size} is more than the {smaller} pictures of a set; choose {smaller} or less"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        first_SD = first_ND[rng.choice(len(first_ND), subset_size, replace=False)]
        second_SD = second_MD[rng.choice(len(second_MD), subset_size, replace=False)]
        values.append(polynomial_mmd(first_SD, second_SD))
    return float(np.mean(values)), float(np.std(values))


def kernel_estimate(
    generated_ND: Float[np.ndarray, "N D"],
    reference_MD: Float[np.ndarray, "M D"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    groups: int = 10,
    z: float = 1.96,
) -> Estimate:
    """`kernel_distance` with a 95% interval from disjoint groups of the generated pictures.

    The subsets overlap, so their spread says nothing about the error of their mean. Disjoint groups are independent
    and each is unbiased; theirs does, a little too widely.
    """
    subset_size = min(subset_size, len(generated_ND), len(reference_MD))
    value, _ = kernel_distance(generated_ND, reference_MD, subsets=subsets, subset_size=subset_size, seed=seed)
    groups = min(groups, len(generated_ND) // 2)
    if groups < 2:
        return Estimate(value, math.nan, math.nan, len(generated_ND))
    generated_ND, reference_MD = np.asarray(generated_ND, np.float64), np.asarray(reference_MD, np.float64)
    parts = []
    for group in range(groups):  # the reference's own term is the same for all and adds nothing to their spread
        part_ND = generated_ND[group::groups]
        parts.append(_mean_off_diagonal(part_ND) - 2 * _mean_across(part_ND, reference_MD))
    half = z * float(np.std(parts, ddof=1)) / math.sqrt(groups)
    return Estimate(value, value - half, value + half, len(generated_ND))
