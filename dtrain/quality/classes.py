"""Figures that go by the classes that an extractor sees in the images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Parts of the samples, over whose scores the Inception score is the mean.
NUM_SPLITS = 10


def split_of(index: int, total: int) -> int:
    """Tells in which part of the samples one is.

    Args:
        index: of the sample.
        total: number of samples.
    """
    return index * NUM_SPLITS // total


def inception_score(
    counts: Floats, probabilities: Floats, negentropies: Floats
) -> float:
    """Returns exp(mean KL(p(y|x) | p(y))), as the mean over parts.

    Salimans et al. 2016, "Improved techniques for training GANs".

    Args:
        counts: float64 [s], the samples of each part.
        probabilities: float64 [s, c], sums of p(y|x) over those.
        negentropies: float64 [s], sums of p(y|x) log p(y|x) likewise.
    """
    is_there = counts > 0
    counts, negentropies = counts[is_there], negentropies[is_there]
    mean = probabilities[is_there] / counts[:, None]
    # The mean of KL is that of p log p, less that of p log of their mean.
    marginal = (mean * np.log(np.maximum(mean, 1e-300))).sum(1)
    return float(np.exp(negentropies / counts - marginal).mean())


def reverse_kl(samples: Floats, real: Floats) -> float:
    """Returns KL(q | p) of the histogram q of samples and p of real images.

    A class that samples show and the data does not have counts as if half an
    image of the data had it.

    Args:
        samples: float64 [c], samples of each class.
        real: float64 [c], real images of each class.
    """
    shares = samples / samples.sum()
    expected = np.maximum(real, 0.5) / real.sum()
    shown = shares > 0
    ratio = np.log(shares[shown] / expected[shown])
    return max(float((shares[shown] * ratio).sum()), 0.0)
