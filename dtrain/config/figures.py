"""The figures that say what a generator is worth: names, directions, needs.

What computes them is `quality.figures`; here is what flags and policies have to
know of them before TensorFlow is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from dtrain.errors import UserError

# What a figure needs beside features of the images: an extractor that tells
# classes, one whose classes are the labels of the data, a conditional model.
CLASSES, LABELS, CONDITIONAL = "classes", "labels", "conditional"

Best = Literal["min", "max"]


class Figure(NamedTuple):
    """What is known of a figure.

    Attributes:
        best: min if a smaller one is better, max if a larger one is.
        title: what it says, in a few words.
        of_pairs: whether it compares single images, so that the features of
            all of them are kept in memory.
        needs: of `CLASSES`, `LABELS` and `CONDITIONAL`.
    """

    best: Best
    title: str
    of_pairs: bool = False
    needs: tuple[str, ...] = ()


FIGURES: dict[str, Figure] = {
    "frechet_distance": Figure("min", "distance of mean and covariance"),
    "kernel_distance": Figure("min", "distance by a cubic kernel", True),
    "precision": Figure("max", "share of samples among real images", True),
    "recall": Figure("max", "share of real images among samples", True),
    "density": Figure("max", "samples around a real image", True),
    "coverage": Figure("max", "share of real images with a sample", True),
    "copy_score": Figure("min", "share of samples that are copies", True),
    "inception_score": Figure(
        "max", "classes that are clear and many", needs=(CLASSES,)
    ),
    "modes_covered": Figure(
        "max", "classes that samples show", needs=(LABELS,)
    ),
    "reverse_kl": Figure(
        "min", "histogram of the classes against the data's", needs=(LABELS,)
    ),
    "conditional_accuracy": Figure(
        "max",
        "share of samples of the class that was asked for",
        needs=(LABELS, CONDITIONAL),
    ),
    "intra_class_distance": Figure(
        "min",
        "distance of mean and covariance, by class",
        True,
        (LABELS, CONDITIONAL),
    ),
}

# Other metrics of a run that are better when they are larger; of any that has
# no name here, as a loss, the smallest is the best.
_LARGER = ("sample_spread",)


def best_of(metric: str) -> Best:
    """Tells which value of a metric is the best.

    Args:
        metric: a figure, or any other in metrics.jsonl.
    """
    if metric in FIGURES:
        return FIGURES[metric].best
    return "max" if metric in _LARGER else "min"


def chosen(flag: str, text: str) -> tuple[str, ...]:
    """Reads a list of figures.

    Args:
        flag: that holds it, to be named in an error.
        text: names with commas between them; empty chooses none.

    Raises:
        UserError: there is no such figure, or one is named twice.
    """
    names = tuple(filter(None, text.split(",")))
    for name in names:
        if name not in FIGURES:
            raise UserError(f"{flag} ({name}) must be of {', '.join(FIGURES)}")
    if len(set(names)) < len(names):
        raise UserError(f"{flag} ({text}) names a figure twice")
    return names


def lacking(name: str, has: Sequence[str]) -> tuple[str, ...]:
    """Names what a figure needs and is not there.

    Args:
        name: of the figure.
        has: of `CLASSES`, `LABELS` and `CONDITIONAL`, what there is.
    """
    return tuple(need for need in FIGURES[name].needs if need not in has)
