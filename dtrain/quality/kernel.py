"""The kernel distance between two sets of features, with its error.

The unbiased estimate of the squared maximum mean discrepancy with the kernel
(x y / d + 1)^3, as the mean over random subsets. Binkowski et al. 2018,
"Demystifying MMD GANs". It may be a little below 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_NUM_SUBSETS = 100
_SUBSET_SIZE = 1000


class Estimate(NamedTuple):
    """A mean over subsets, and its standard error."""

    value: float
    error: float


def distance(
    one: npt.NDArray[np.floating],
    other: npt.NDArray[np.floating],
    seed: int,
    num_subsets: int = _NUM_SUBSETS,
    subset_size: int = _SUBSET_SIZE,
) -> Estimate:
    """Estimates the distance.

    Args:
        one: [n, d], features of real images, n at least 4.
        other: [m, d], features of samples, m at least 4.
        seed: of the subsets.
        num_subsets: how many, each without an image twice.
        subset_size: images of each; at most half of what there is, or the
            subsets would be the same and their error would be none.
    """
    chance = np.random.default_rng(seed)
    size = min(subset_size, len(one) // 2, len(other) // 2)
    estimates = [
        squared_discrepancy(
            one[chance.choice(len(one), size, replace=False)],
            other[chance.choice(len(other), size, replace=False)],
        )
        for _ in range(num_subsets)
    ]
    error = np.std(estimates, ddof=1) / np.sqrt(num_subsets)
    return Estimate(float(np.mean(estimates)), float(error))


def squared_discrepancy(
    one: npt.NDArray[np.floating], other: npt.NDArray[np.floating]
) -> float:
    """Returns the unbiased estimate from two sets of the same size.

    Args:
        one: [m, d], m at least 2.
        other: likewise.
    """
    size, num_features = one.shape
    both = np.concatenate([one, other]).astype(np.float64)
    products = both @ both.T / num_features + 1
    # Not by `**`, which takes ten times as long.
    kernel = products * products * products
    within = kernel[:size, :size].sum() - np.trace(kernel[:size, :size])
    within += kernel[size:, size:].sum() - np.trace(kernel[size:, size:])
    between = kernel[:size, size:].mean()
    return float(within / (size * (size - 1)) - 2 * between)
