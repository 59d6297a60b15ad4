"""What an extractor says of the real images: once, then from a cache.

The images are a random part of the data, by the seed of the protocol, as the
run sees them but not mirrored. Two halves are added up by themselves, for the
floor: what one half of the data is worth beside the other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from dtrain.cluster.workers import Workers
from dtrain.config import Config
from dtrain.data import pipeline
from dtrain.data.sources import Source
from dtrain.quality import background, figures, kept
from dtrain.quality.extraction import Extraction
from dtrain.quality.extractors import Extractor
from dtrain.quality.figure_log import Protocol
from dtrain.quality.frechet import Moments
from dtrain.quality.neighbours import Balls
from dtrain.quality.sample import Rows, Sample
from dtrain.quality.saying import Slowly
from dtrain.storage import files

# Images whose bytes are part of the fingerprint of the data.
_NUM_HASHED = 64


def fingerprint(source: Source, config: Config) -> str:
    """Returns a digest of the data, hexadecimal, and of how it is read.

    It is of 64 of the images, for all of them may be many; of their number,
    their labels and the names of their files.

    Args:
        source: the real images.
        config: of the run that reads them.
    """
    count = min(_NUM_HASHED, source.num_images)
    indices = np.linspace(0, source.num_images - 1, count).astype(np.int64)
    with tf.device("CPU:0"):
        images, labels = pipeline.read(source, tf.constant(indices))
    digest = hashlib.sha256()
    facts = (
        *(source.num_images, source.image_shape, source.num_classes),
        *(source.digest, config.split),
    )
    digest.update(repr(facts).encode())
    digest.update(images.numpy().tobytes())
    digest.update(labels.numpy().astype(np.int64).tobytes())
    return digest.hexdigest()


class Real(NamedTuple):
    """What is known of the real images.

    Attributes:
        reference: what samples are compared with.
        floor: figures of one half of them against the other.
    """

    reference: figures.Reference
    floor: dict[str, float]


def indices_of(start: Any, size: int, seed: int, num_images: int) -> tf.Tensor:
    """Returns which images are the next of the chosen ones, int64 [size].

    Args:
        start: how many come before; beyond the last they begin again.
        size: how many.
        seed: of the protocol.
        num_images: of the data.
    """
    positions = tf.range(start, start + size, dtype=tf.int64)
    return pipeline.sample_indices(positions % num_images, seed, num_images)


class RealImages:
    """Measures the real images, or reads what was measured before."""

    def __init__(
        self,
        source: Source,
        extractor: Extractor,
        workers: Workers,
        cache_dir: str,
        say: Slowly,
    ) -> None:
        """Measures nothing yet.

        Args:
            source: the data.
            extractor: makes the features.
            workers: whose replicas do it.
            cache_dir: where it is kept; empty keeps nothing.
            say: shows lines of progress.
        """
        self._source, self._extractor = source, extractor
        self._workers, self._cache_dir, self._say = workers, cache_dir, say

    def measure(
        self,
        protocol: Protocol,
        names: Sequence[str],
        is_stopped: Callable[[], bool],
        *,
        keeps_rows: bool,
    ) -> Real | None:
        """Measures them. Every worker calls this; the chief gets the result.

        Args:
            protocol: `num_real` and `seed` count, beside what is constant.
            names: of the figures of the floor.
            is_stopped: asked now and then; one worker's word ends it.
            keeps_rows: whether figures compare pairs.

        Returns:
            What is known; None if it was stopped, and for other workers.

        Raises:
            UserError: an image cannot be read, or the cache is of other data.
        """
        names, workers = sorted(names), self._workers
        key = _key(protocol, names, keeps_rows=keeps_rows)
        found = workers.together(lambda: self._read(key))
        [is_known] = workers.agree(found is not None)
        if is_known:
            return found
        half = protocol.num_real // 2
        parts = [
            self._sample(size, keeps_rows=keeps_rows)
            for size in (half, protocol.num_real - half)
        ]
        if not self._add(parts, key, is_stopped):
            return None

        def finish() -> Real:
            first, second = parts
            floor = figures.floor(names, first, second, protocol.seed)
            return Real(figures.reference(*parts), floor)

        real = background.compute(workers, finish, is_stopped)
        if real:
            self._write("real", key, _to_arrays(real))
        elif workers.is_chief:
            self._write("half", key, _of_parts(parts))
        return real

    def indices(self, protocol: Protocol) -> npt.NDArray[np.int64]:
        """Returns which images of the data are taken, in their order.

        Args:
            protocol: `num_real` and `seed` count.
        """
        total = self._source.num_images
        return indices_of(0, protocol.num_real, protocol.seed, total).numpy()

    def _sample(self, size: int, *, keeps_rows: bool) -> Sample:
        extractor = self._extractor
        return Sample(
            size,
            extractor.num_features,
            extractor.num_classes,
            keeps_rows=keeps_rows,
        )

    def _add(
        self,
        parts: Sequence[Sample],
        key: Mapping[str, Any],
        is_stopped: Callable[[], bool],
    ) -> bool:
        """Adds the images to the parts; False if it was stopped."""
        source, workers, total = self._source, self._workers, key["num_real"]

        def read(positions: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            with tf.device("CPU:0"):
                indices = indices_of(
                    positions[0],
                    positions.shape[0],
                    key["seed"],
                    source.num_images,
                )
                stored, labels = pipeline.read(source, indices)
                return source.seen(stored, None), labels

        extraction = Extraction(self._extractor, workers, read=read)
        seen = workers.share(lambda: self._take_half(parts, key))
        for rows in extraction.rows(seen, total, is_stopped):
            seen = min(seen + len(rows.labels), total)
            if workers.is_chief:
                add(parts, rows)
            self._say(f"looking at real images: {seen:,} of {total:,}")
        if seen < total and workers.is_chief:
            self._write("half", key, _of_parts(parts))
        return seen == total

    def _take_half(
        self, parts: Sequence[Sample], key: Mapping[str, Any]
    ) -> int:
        """Goes on where it was stopped; returns how many were seen."""
        arrays = self._read_arrays("half", key)
        try:
            for number, part in enumerate(parts if arrays else ()):
                begin = f"{number}_"
                part.take(
                    {
                        name.removeprefix(begin): array
                        for name, array in (arrays or {}).items()
                        if name.startswith(begin)
                    }
                )
        except (KeyError, ValueError):
            return 0
        return sum(part.num_seen for part in parts)

    def _read_arrays(
        self, kind: str, key: Mapping[str, Any]
    ) -> dict[str, np.ndarray] | None:
        if not (self._cache_dir and self._workers.is_chief):
            return None
        try:
            return kept.read(kept.path_of(self._cache_dir, kind, key), key)
        except OSError:
            # It is a cache: without it all takes longer, and no more.
            return None

    def _read(self, key: Mapping[str, Any]) -> Real | None:
        arrays = self._read_arrays("real", key)
        return _of_arrays(arrays, key) if arrays else None

    def _write(
        self, kind: str, key: Mapping[str, Any], arrays: kept.Arrays
    ) -> None:
        if not self._cache_dir:
            return
        try:
            kept.write(kept.path_of(self._cache_dir, kind, key), key, arrays)
            if kind == "real":
                files.remove(kept.path_of(self._cache_dir, "half", key))
        except OSError as error:
            reason = files.reason(error)
            self._say.now(
                f"the cache {self._cache_dir} is not written: {reason}"
            )


def _key(
    protocol: Protocol, names: Sequence[str], *, keeps_rows: bool
) -> dict[str, Any]:
    """Returns all that what is said of the real images follows from."""
    key = {
        **protocol._asdict(),
        "figures": names,
        "rows": keeps_rows,
        "version": 1,
    }
    for name in ("num_generated", "weights"):
        del key[name]
    return key


def add(parts: Sequence[Sample], rows: Rows) -> None:
    """Adds rows to the parts of a whole, one part after the other.

    Args:
        parts: in their order.
        rows: that come next.
    """
    for part in parts:
        taken = min(part.total - part.num_seen, len(rows.labels))
        part.add(rows.cut(0, taken))
        rows = rows.cut(taken)


def _of_parts(parts: Sequence[Sample]) -> dict[str, np.ndarray]:
    return {
        f"{number}_{name}": array
        for number, part in enumerate(parts)
        for name, array in part.to_arrays().items()
    }


def _to_arrays(real: Real) -> dict[str, np.ndarray]:
    reference = real.reference
    arrays = {
        "mean": reference.moments.mean,
        "covariance": reference.moments.covariance,
        "predicted": reference.predicted,
        "floor": np.array(list(real.floor.values()), np.float64),
    }
    if reference.rows and reference.balls:
        arrays |= reference.rows._asdict()
        arrays |= reference.balls._asdict()
    return {name: np.ascontiguousarray(each) for name, each in arrays.items()}


def _of_arrays(
    arrays: Mapping[str, np.ndarray], key: Mapping[str, Any]
) -> Real | None:
    """Makes what `_to_arrays` was given; None of what does not fit."""
    try:
        has_rows = key["rows"]
        reference = figures.Reference(
            Moments(arrays["mean"], arrays["covariance"]),
            arrays["predicted"],
            Rows(*(arrays[name] for name in Rows._fields))
            if has_rows
            else None,
            Balls(*(arrays[name] for name in Balls._fields))
            if has_rows
            else None,
        )
        names = figures.with_errors(key["figures"])
        floor = dict(zip(names, arrays["floor"].tolist(), strict=True))
    except (KeyError, ValueError):
        return None
    return Real(reference, floor)


def default_cache_dir() -> str:
    """Returns where things are kept if nobody names a place."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "dtrain")
