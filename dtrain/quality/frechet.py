"""The Fréchet distance between two sets of features, as Gaussians.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a
local Nash equilibrium". All is float64: in float32 the root alone breaks it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Moments(NamedTuple):
    """Mean and covariance of features.

    Attributes:
        mean: float64 [d].
        covariance: float64 [d, d], by n - 1.
    """

    mean: Floats
    covariance: Floats


def of(features: npt.NDArray[np.floating]) -> Moments:
    """Returns the moments of features, [n, d] with n at least 2."""
    rows = features.astype(np.float64)
    mean = rows.mean(0)
    centred = rows - mean
    return Moments(mean, centred.T @ centred / (len(rows) - 1))


def merged(
    one: Moments, num_one: int, other: Moments, num_other: int
) -> Moments:
    """Returns the moments of two sets together.

    Args:
        one: of the first set.
        num_one: how many images it has.
        other: of the second.
        num_other: likewise.
    """
    total = num_one + num_other
    shift = other.mean - one.mean
    products = (num_one - 1) * one.covariance
    products = products + (num_other - 1) * other.covariance
    products += num_one * num_other / total * np.outer(shift, shift)
    mean = one.mean + shift * (num_other / total)
    return Moments(mean, products / (total - 1))


def distance(one: Moments, other: Moments) -> float:
    """Returns the distance; 0 between equal moments.

    The eigenvalues of C1 C2 are those of the symmetric S C2 S with S the root
    of C1, whose roots need no matrix that is not symmetric. So it holds where
    there are fewer images than features, too.

    Args:
        one: of the real images.
        other: of as many features, of the samples.
    """
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ other.covariance @ root)
    shift = one.mean - other.mean
    total = (
        shift @ shift
        + np.trace(one.covariance)
        + np.trace(other.covariance)
        - 2 * np.sqrt(product.clip(0)).sum()
    )
    # What is left of a difference that is none.
    return max(float(total), 0.0)
