"""Figures that go by which images are near which: who is a neighbour of whom.

An image's ball reaches to its k-th nearest neighbour in its own set.

    precision  share of samples in the ball of a real image, k = 3
    recall     share of real images in the ball of a sample, k = 3
    density    in how many balls of real images a sample is, over k = 5
    coverage   share of real images whose ball has a sample in it, k = 5
    copies     share of samples that are nearer to a real image than any other
               real image is to that one

Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing
generative models"; Naeem et al. 2020, "Reliable fidelity and diversity metrics
for generative models"; the last is what is not authentic by Alaa et al. 2022,
"How faithful is your synthetic data?". New real images have about a half of it,
copies all.

The distances are made in blocks of rows, so memory does not grow by the square
of the images; they are float64, squared, and never all there.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Features = npt.NDArray[np.floating]
_Result = TypeVar("_Result")

_MANIFOLD, _AROUND = 3, 5
# An image with fewer others has no ball.
LEAST = _AROUND + 1
# By how much a ball reaches farther than its neighbour, for whom float32 would
# decide otherwise: by a part of the squared distance, and of the features.
_SLACK, _SLACK_OF_SQUARES = 1e-5, 1e-10
# Of all blocks that are worked on together.
_BLOCK_BYTES = 256 * 2**20
_MAX_THREADS = 8


class Balls(NamedTuple):
    """How far the balls of a set of images reach.

    Attributes:
        nearest: float64 [n], squared distance to the nearest other image.
        manifold: likewise, to the third.
        around: likewise, to the fifth.
    """

    nearest: Floats
    manifold: Floats
    around: Floats


class Neighbourhood(NamedTuple):
    """Figures of samples among real images; see above.

    Attributes:
        precision: in [0, 1].
        recall: in [0, 1].
        density: at least 0; 1 for samples as dense as the real images.
        coverage: in [0, 1].
        copy_score: in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float
    copy_score: float


class _Block(NamedTuple):
    """What the distances of some samples to all real images say."""

    is_precise: npt.NDArray[np.bool_]
    num_around: npt.NDArray[np.int64]
    is_covered: npt.NDArray[np.bool_]
    is_recalled: npt.NDArray[np.bool_]
    nearest: npt.NDArray[np.int64]
    squared: Floats


def balls(features: Features) -> Balls:
    """Measures the balls of images.

    Args:
        features: [n, d], n at least `LEAST`.
    """

    def of_rows(rows: slice, squared: Floats) -> Floats:
        own = np.arange(rows.start, rows.stop)
        squared[np.arange(len(own)), own] = np.inf
        # Then sorted: to partition by several takes ten times as long.
        squared.partition(_AROUND - 1, axis=1)
        near = np.sort(squared[:, :_AROUND], axis=1)
        return near[:, (0, _MANIFOLD - 1, _AROUND - 1)]

    reach = np.concatenate(list(_blocks(features, features, of_rows)))
    squares = np.einsum("ij,ij->", features, features, dtype=np.float64)
    reach = reach * (1 + _SLACK) + squares / len(features) * _SLACK_OF_SQUARES
    return Balls(*reach.T.copy())


def among(samples: Features, real: Features, reach: Balls) -> Neighbourhood:
    """Compares samples with real images.

    Args:
        samples: [m, d], m at least `LEAST`.
        real: [n, d].
        reach: the balls of the real images.
    """
    own = balls(samples)

    def of_rows(rows: slice, squared: Floats) -> _Block:
        is_around = np.less_equal(squared, reach.around)
        is_near = np.less_equal(squared, reach.manifold)
        is_recalled = np.less_equal(squared, own.manifold[rows, None])
        nearest = squared.argmin(1)
        return _Block(
            np.any(is_near, axis=1),
            is_around.sum(1),
            np.any(is_around, axis=0),
            np.any(is_recalled, axis=0),
            nearest,
            squared[np.arange(len(nearest)), nearest],
        )

    is_covered = np.zeros(len(real), bool)
    is_recalled = np.zeros(len(real), bool)
    parts = []
    for block in _blocks(samples, real, of_rows):
        is_covered |= block.is_covered
        is_recalled |= block.is_recalled
        # Not the two above: there is one of each for all real images.
        parts.append(
            (block.is_precise, block.num_around, block.nearest, block.squared)
        )
    precise, around, nearest, squared = map(
        np.concatenate, zip(*parts, strict=True)
    )
    return Neighbourhood(
        precision=float(precise.mean()),
        recall=float(is_recalled.mean()),
        density=float(around.mean()) / _AROUND,
        coverage=float(is_covered.mean()),
        copy_score=float((squared <= reach.nearest[nearest]).mean()),
    )


def nearest(
    samples: Features, real: Features, number: int
) -> npt.NDArray[np.int64]:
    """Finds the real images that are nearest to samples, the nearest first.

    Args:
        samples: [m, d].
        real: [n, d].
        number: of images for each sample, at most n.

    Returns:
        int64 [m, number].
    """

    def of_rows(rows: slice, squared: Floats) -> npt.NDArray[np.int64]:
        del rows
        # By the index where two are as near.
        return squared.argsort(1, kind="stable")[:, :number]

    return np.concatenate(list(_blocks(samples, real, of_rows)))


def _blocks(
    rows: Features,
    columns: Features,
    use: Callable[[slice, Floats], _Result],
) -> Iterator[_Result]:
    """Yields what is made of the squared distances, block by block, in order.

    `use` is called on several threads, with the rows and [b, n] distances.
    """
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    size = max(1, _BLOCK_BYTES // threads // (8 * len(columns)))
    # |x - y|^2 as one product: of (-2x, |x|^2, 1) and (y, 1, |y|^2).
    right = _with_squares(columns, -1)

    def of_block(start: int) -> _Result:
        left = _with_squares(rows[start : start + size], -2)
        left[:, :-2] *= -2
        squared = left @ right.T
        return use(slice(start, start + len(left)), squared)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        starts: Iterable[int] = range(0, len(rows), size)
        yield from pool.map(of_block, starts)


def _with_squares(features: Features, column: int) -> Floats:
    """Puts two columns behind features: the squares of the rows, and ones.

    `column` is that of the squares, -1 or -2.
    """
    size, width = features.shape
    rows = np.ones((size, width + 2))
    rows[:, :width] = features
    rows[:, column] = np.einsum("ij,ij->i", rows[:, :width], rows[:, :width])
    return rows
