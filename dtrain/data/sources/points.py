"""Points in the plane: Gaussians whose modes are counted, and one's own.

    points:grid               25 Gaussians at {-4, -2, 0, 2, 4}^2, of deviation
                              0.05
    points:ring               8 Gaussians on the unit circle, deviation 0.01
    points:/path.npz[#array]  [n, 2] numbers, by the names of `npz`

The two are those of Srivastava et al. 2017, "VEEGAN", and of Lin et al. 2018,
"PacGAN": 100,000 samples, as many of each mode, and the mode is the label.

Networks see a point as an image of 1x1 pixels and two channels, moved and
scaled such that the largest coordinate of a mode, or of one's own points, is
0.8: between that and the edge of [-1, 1] is seen what goes astray.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from dtrain import flags
from dtrain.config import DataSettings, further
from dtrain.data.sources import labels as labels_lib
from dtrain.data.sources import npz, source
from dtrain.data.sources.source import Images, Source, Wanted
from dtrain.errors import StorageError, UserError

Floats = npt.NDArray[np.float32]

KIND = "points:"
# Of an image that is a point.
SHAPE = (1, 1, 2)
NUM_SAMPLES = 100_000
_REACH = 0.8


class Mixture(NamedTuple):
    """Equally many points around each of some modes.

    Attributes:
        modes: float64 [k, 2].
        deviation: of each coordinate of a point from its mode.
    """

    modes: npt.NDArray[np.float64]
    deviation: float


class Plane(NamedTuple):
    """How points lie where networks see them.

    Attributes:
        middle: float64 [2], the point that becomes (0, 0).
        scale: by which a distance is multiplied.
    """

    middle: npt.NDArray[np.float64]
    scale: float

    def to_images(self, values: npt.NDArray[np.floating]) -> Floats:
        """Makes images, float32 [n, 1, 1, 2], of points [n, 2]."""
        seen = (values - self.middle) * self.scale
        return seen.astype(np.float32).reshape(-1, *SHAPE)

    def to_points(
        self, images: npt.NDArray[np.floating]
    ) -> npt.NDArray[np.float64]:
        """Makes points, [n, 2], of images [n, 1, 1, 2]."""
        seen = np.asarray(images, np.float64).reshape(-1, 2)
        return seen / self.scale + self.middle


class Points(NamedTuple):
    """A data set of points.

    Attributes:
        values: float [n, 2].
        labels: int32 [n], or None.
        plane: how networks see them.
    """

    values: npt.NDArray[np.floating]
    labels: npt.NDArray[np.int32] | None
    plane: Plane


def _grid() -> Mixture:
    sides = np.arange(-4.0, 5.0, 2.0)
    return Mixture(np.stack(np.meshgrid(sides, sides), -1).reshape(-1, 2), 0.05)


def _ring() -> Mixture:
    angles = np.arange(8) * (np.pi / 4)
    return Mixture(np.stack([np.cos(angles), np.sin(angles)], 1), 0.01)


MIXTURES = {"grid": _grid(), "ring": _ring()}


class PointsSource(Source):
    """Points that are gathered from memory as images of one pixel."""

    in_memory = True

    def __init__(self, name: str, points: Points) -> None:
        """Copies the points.

        Args:
            name: the data set as the user named it.
            points: all of them.
        """
        labels = points.labels
        num_classes = 0 if labels is None else int(labels.max()) + 1
        super().__init__(name, len(points.values), SHAPE, num_classes)
        with tf.device("CPU:0"):
            self._images = tf.constant(points.plane.to_images(points.values))
            self._labels = tf.zeros([self.num_images], tf.int32)
            if labels is not None:
                self._labels = tf.constant(labels)

    @property
    def stored(self) -> tf.DType:
        """Type of the points; see `Source`."""
        return tf.float32

    def fetch(self, indices: tf.Tensor) -> tf.Tensor:
        """Passes the indices on; see `Source.fetch`."""
        return indices

    def decode(self, fetched: tf.Tensor) -> Images:
        """Gathers by index; see `Source.decode`."""
        images = tf.gather(self._images, fetched)
        return images, tf.gather(self._labels, fetched)

    def seen(
        self, images: tf.Tensor, is_mirrored: tf.Tensor | None
    ) -> tf.Tensor:
        """Returns the points as they are; see `Source.seen`."""
        del is_mirrored
        return images

    def said(self) -> str:
        """Says how many there are; see `Source.said`."""
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        return f"{self.num_images:,} points{classes}"


def open_points(
    path: str, config: DataSettings, wanted: Wanted = source.USUAL
) -> Source:
    """Opens a data set of points.

    Args:
        path: what stands behind `points:`.
        config: `dataset` and `split` count.
        wanted: what of it is read.

    Raises:
        UserError: there are no such points, or they are none.
        StorageError: the store that they are on does not answer.
    """
    if wanted.is_map:
        raise UserError(
            f"dataset ({config.dataset}) is of points, and label maps are "
            "images; leave out map:"
        )
    points = _of_mixture(path) if path in MIXTURES else None
    if points is None:
        points = _read(path, config, wanted)
    if not wanted.has_labels:
        points = points._replace(labels=None)
    return PointsSource(config.dataset, points)


def of_run(config: DataSettings) -> Points | None:
    """Returns the points of a run, for its pictures, which go on without.

    Args:
        config: `dataset` and `split` count.

    Returns:
        None where the data set is of another kind, or is no longer there.
    """
    if not config.dataset.startswith(KIND):
        return None
    return _of_dataset(config.dataset, config.split)


@functools.lru_cache(maxsize=1)
def _of_dataset(dataset: str, split: str) -> Points | None:
    part = further.part_of(dataset)
    path = part.dataset.removeprefix(KIND)
    if path in MIXTURES:
        return _of_mixture(path)
    config = DataSettings(dataset=dataset, split=split)
    try:
        return _read(flags.expand_home(path), config, Wanted(array=part.array))
    except (UserError, StorageError):
        return None


@functools.cache
def _of_mixture(name: str) -> Points:
    """Draws the points of a mixture, the same each time."""
    modes, deviation = MIXTURES[name]
    labels = np.arange(NUM_SAMPLES, dtype=np.int32) % len(modes)
    noise = np.random.default_rng(0).standard_normal((NUM_SAMPLES, 2))
    values = (modes[labels] + deviation * noise).astype(np.float32)
    scale = _REACH / float(np.abs(modes).max())
    return Points(values, labels, Plane(np.zeros(2), scale))


def _read(path: str, config: DataSettings, wanted: Wanted) -> Points:
    """Reads one's own points.

    Raises:
        UserError: they are none.
    """
    if not path.endswith(".npz"):
        raise UserError(
            f"dataset ({config.dataset}) must be "
            f"{', '.join(KIND + name for name in MIXTURES)} or "
            f"{KIND}/path.npz, an array [n, 2]; write it with numpy.savez"
        )
    (name, values), (labels_name, labels) = npz.read(path, config, wanted)
    if values.ndim != 2 or values.shape[1] != 2 or not len(values):
        shape = source.shown(values.shape) or "one number"
        raise UserError(
            f"{name} is {shape}; points must be [n, 2], and at least one"
        )
    if values.dtype.kind not in "iuf":
        raise UserError(
            f"{name} is of type {values.dtype}; store it as whole numbers or "
            "as floats"
        )
    # What is near to others far from 0 is told apart by no float32.
    values = values.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = values.min(0), values.max(0)
        extent = float((high - low).max()) / 2
    if not np.isfinite(extent):
        raise UserError(
            f"{name} holds what is no finite number, or numbers too far apart; "
            "leave those out"
        )
    if labels is not None:
        labels = labels_lib.numbered(labels_name, labels, len(values))
    scale = _REACH / extent if extent else 1.0
    return Points(values, labels, Plane(low + (high - low) / 2, scale))
