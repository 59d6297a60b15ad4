"""Computes figures from what was added up of real images and of samples.

What an extractor says of the images is all that goes in; `config.figures` has
the names of the figures, what they need and which way is best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dtrain.quality import classes, frechet, kernel, neighbours
from dtrain.quality.sample import Rows, Sample, join

# Fewer images tell nothing, or cannot be computed with.
LEAST = 2 * neighbours.LEAST
_OF_NEIGHBOURS = ("precision", "recall", "density", "coverage", "copy_score")
_ERROR = "kernel_distance_error"


class Reference(NamedTuple):
    """What samples are compared with.

    Attributes:
        moments: of the features of the real images.
        predicted: float64 [c], real images by the class seen in them.
        rows: of all real images; None where no figure compares pairs.
        balls: of the same; None likewise.
    """

    moments: frechet.Moments
    predicted: np.ndarray
    rows: Rows | None = None
    balls: neighbours.Balls | None = None


def reference(*parts: Sample) -> Reference:
    """Makes a reference of real images, all of which were added.

    Args:
        parts: of the images, in their order; pairs are compared if they keep
            their rows.
    """
    moments, total = parts[0].moments, parts[0].total
    for part in parts[1:]:
        moments = frechet.merged(moments, total, part.moments, part.total)
        total += part.total
    keeps_rows = all(part.keeps_rows for part in parts)
    rows = join(*(part.rows for part in parts)) if keeps_rows else None
    return Reference(
        moments,
        np.sum([part.sums_of("predicted") for part in parts], axis=0),
        rows,
        neighbours.balls(rows.features) if rows else None,
    )


def with_errors(names: Sequence[str]) -> list[str]:
    """Lists figures with the errors that stand beside them, in that order.

    Args:
        names: of figures.
    """
    return [
        each
        for name in names
        for each in (name, *([_ERROR] if name == "kernel_distance" else []))
    ]


def measure(
    names: Sequence[str], real: Reference, sample: Sample, seed: int
) -> dict[str, float]:
    """Computes figures.

    Args:
        names: of `config.figures.FIGURES`, what the images can tell.
        real: the real images.
        sample: the samples, all of which were added.
        seed: of the subsets of the kernel distance.

    Returns:
        The figures by name; with the kernel distance comes its error.
    """
    found: dict[str, float] = {}
    neighbourhood = None
    if real.rows and real.balls and set(names) & set(_OF_NEIGHBOURS):
        neighbourhood = neighbours.among(
            sample.rows.features, real.rows.features, real.balls
        )
    for name in names:
        if name in _OF_NEIGHBOURS:
            assert neighbourhood, f"{name} compares pairs"
            found[name] = getattr(neighbourhood, name)
        else:
            found |= _measure(name, real, sample, seed)
    return found


def _measure(
    name: str, real: Reference, sample: Sample, seed: int
) -> Mapping[str, float]:
    """Computes one figure, and what stands beside it."""
    if name == "frechet_distance":
        return {name: frechet.distance(real.moments, sample.moments)}
    if name == "kernel_distance":
        assert real.rows
        estimate = kernel.distance(
            real.rows.features, sample.rows.features, seed
        )
        return {name: estimate.value, _ERROR: estimate.error}
    if name == "inception_score":
        sums = ("split_counts", "split_probabilities", "split_negentropies")
        return {name: classes.inception_score(*map(sample.sums_of, sums))}
    predicted = sample.sums_of("predicted")
    if name == "modes_covered":
        return {name: float((predicted > 0).sum())}
    if name == "reverse_kl":
        return {name: classes.reverse_kl(predicted, real.predicted)}
    if name == "conditional_accuracy":
        return {name: float(sample.sums_of("num_right")) / sample.total}
    assert name == "intra_class_distance", name
    assert real.rows
    return {name: intra_class_distance(real.rows, sample.rows)}


def intra_class_distance(real: Rows, samples: Rows) -> float:
    """Returns the mean, over the classes, of the distance within each.

    Miyato and Koyama 2018, "cGANs with projection discriminator". A class of
    which either has fewer than two images counts for nothing.

    Args:
        real: by their labels.
        samples: by what was asked for.
    """
    distances = []
    for label in np.union1d(real.labels, samples.labels):
        mine = real.features[real.labels == label]
        made = samples.features[samples.labels == label]
        if min(len(mine), len(made)) >= 2:
            distances.append(
                frechet.distance(frechet.of(mine), frechet.of(made))
            )
    return float(np.mean(distances)) if distances else float("nan")


def floor(
    names: Sequence[str], first: Sample, second: Sample, seed: int
) -> dict[str, float]:
    """Measures one half of the real images against the other.

    No generator is to be much better; where one is, it may have copied.

    Args:
        names: of figures, see `measure`.
        first: a half of the real images.
        second: the other half.
        seed: see `measure`.
    """
    return measure(names, reference(first), second, seed)
