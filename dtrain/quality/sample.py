"""What is added up of images: float64, and in the order of their index.

Rows are added in chunks of a fixed size, however they come. So the sums are the
same, to the bit, for any batch and for any number of replicas and workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dtrain.quality import classes
from dtrain.quality.frechet import Moments

Floats = npt.NDArray[np.float64]

_CHUNK = 512


class Rows(NamedTuple):
    """What an extractor says of images, in the order of their index.

    Attributes:
        features: float32 [n, d].
        probabilities: float32 [n, c], of its classes; c is 0 if it has none.
        labels: int32 [n], of the images, or what was asked of the generator.
    """

    features: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]

    def cut(self, start: int, stop: int | None = None) -> Rows:
        """Returns some of them."""
        return Rows(
            self.features[start:stop],
            self.probabilities[start:stop],
            self.labels[start:stop],
        )


def join(*several: Rows) -> Rows:
    """Puts rows behind each other."""
    return Rows(*map(np.concatenate, zip(*several, strict=True)))


class Sample:
    """Sums over images, and the rows themselves where pairs are compared.

    Attributes:
        total: how many images there will be.
        keeps_rows: whether all rows stay in memory.
    """

    def __init__(
        self,
        total: int,
        num_features: int,
        num_classes: int,
        *,
        keeps_rows: bool,
    ) -> None:
        """Begins with no image.

        Args:
            total: see the attributes.
            num_features: numbers that an extractor makes of an image.
            num_classes: that it knows; 0 if it knows none.
            keeps_rows: see the attributes.
        """
        self.total, self.keeps_rows = total, keeps_rows
        self._sums = _sums(num_features, num_classes)
        self._num_added = 0
        self._rows: list[Rows] = []
        self._waiting = Rows(
            np.zeros([0, num_features], np.float32),
            np.zeros([0, num_classes], np.float32),
            np.zeros([0], np.int32),
        )

    @property
    def num_seen(self) -> int:
        """How many images were given so far."""
        return self._num_added + len(self._waiting.labels)

    def add(self, rows: Rows) -> None:
        """Adds the images that come next.

        Args:
            rows: of them; more than `total` are left out.
        """
        rows = rows.cut(0, self.total - self.num_seen)
        waiting = join(self._waiting, rows)
        while len(waiting.labels) >= _CHUNK:
            self._add_chunk(waiting.cut(0, _CHUNK))
            waiting = waiting.cut(_CHUNK)
        self._waiting = waiting
        if self.num_seen == self.total and len(waiting.labels):
            self._waiting = waiting.cut(0, 0)
            self._add_chunk(waiting)

    def _add_chunk(self, rows: Rows) -> None:
        sums, features = self._sums, rows.features.astype(np.float64)
        sums["sum"] += features.sum(0)
        sums["products"] += features.T @ features
        if rows.probabilities.shape[1]:
            self._add_classes(rows)
        if self.keeps_rows:
            self._rows.append(rows)
        self._num_added += len(rows.labels)

    def _add_classes(self, rows: Rows) -> None:
        sums = self._sums
        probabilities = rows.probabilities.astype(np.float64)
        logarithms = np.log(np.maximum(probabilities, 1e-300))
        negentropies = (probabilities * logarithms).sum(1)
        predicted = probabilities.argmax(1)
        indices = np.arange(len(predicted)) + self._num_added
        splits = [classes.split_of(int(i), self.total) for i in indices]
        np.add.at(sums["split_counts"], splits, 1)
        np.add.at(sums["split_probabilities"], splits, probabilities)
        np.add.at(sums["split_negentropies"], splits, negentropies)
        np.add.at(sums["predicted"], predicted, 1)
        sums["num_right"] += (predicted == rows.labels).sum()

    @property
    def moments(self) -> Moments:
        """Mean and covariance, when all images were added."""
        mean = self._sums["sum"] / self.total
        products = self._sums["products"] - self.total * np.outer(mean, mean)
        return Moments(mean, products / (self.total - 1))

    @property
    def rows(self) -> Rows:
        """Of all images, where they are kept and were added."""
        self._rows = [join(*self._rows)]
        return self._rows[0]

    def sums_of(self, name: str) -> Floats:
        """Returns a sum that classes are measured by; see `_sums`."""
        return self._sums[name]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns all that was added so far, by name; see `take`."""
        arrays = {f"sums_{name}": each for name, each in self._sums.items()}
        kept = join(self._waiting.cut(0, 0), *self._rows)
        for begin, rows in (("kept", kept), ("waiting", self._waiting)):
            for name, array in rows._asdict().items():
                arrays[f"{begin}_{name}"] = array
        arrays["num_added"] = np.array(self._num_added)
        return arrays

    def take(self, arrays: Mapping[str, Any]) -> None:
        """Takes what `to_arrays` returned of a sample like this one.

        Args:
            arrays: by name, with what else there is.

        Raises:
            ValueError: they are not of such a sample.
            KeyError: one is missing.
        """
        mine = self.to_arrays()
        for name, array in mine.items():
            given = np.asarray(arrays[name])
            # There may be more rows, and no more sums.
            first = 0 if name.startswith("sums_") else 1
            is_like = given.shape[first:] == array.shape[first:]
            if (
                given.dtype != array.dtype
                or not is_like
                or (given.ndim != array.ndim)
            ):
                raise ValueError(f"{name} is of another sample")
        self._sums = {
            name: np.array(arrays[f"sums_{name}"]) for name in self._sums
        }
        kept, self._waiting = (
            Rows(
                *(np.array(arrays[f"{begin}_{name}"]) for name in Rows._fields)
            )
            for begin in ("kept", "waiting")
        )
        self._rows = [kept] if len(kept.labels) else []
        self._num_added = int(arrays["num_added"])


def _sums(num_features: int, num_classes: int) -> dict[str, Floats]:
    """Makes the sums of no image, float64, by name."""
    splits = classes.NUM_SPLITS
    return {
        # Of the features, and of the products of any two.
        "sum": np.zeros(num_features),
        "products": np.zeros((num_features, num_features)),
        # Of the parts that the Inception score is the mean over.
        "split_counts": np.zeros(splits),
        "split_probabilities": np.zeros((splits, num_classes)),
        "split_negentropies": np.zeros(splits),
        # Images by the class that is seen in them, and those of their label.
        "predicted": np.zeros(num_classes),
        "num_right": np.zeros(()),
    }
