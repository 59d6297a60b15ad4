"""Decodes all pictures of a data set, to say at once which are damaged."""

from __future__ import annotations

import collections
import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from dtrain.data.sources import memory, pictures, source
from dtrain.errors import UserError

if TYPE_CHECKING:
    from dtrain.data.sources.picture_files import PictureFiles

_REPORT_EVERY_SECS = 5.0
_NUM_NAMED = 20
_NUM_SIZES = 4


def refusal(files: PictureFiles, fault: UserError) -> UserError:
    """Says which pictures are damaged, where one is.

    Args:
        files: all of them, which are decoded.
        fault: of the one.
    """
    found = list(faults(files, shapes(files)).values())
    if len(found) < 2:
        return fault
    reasons = [each.text.partition(";")[0] for each in found]
    return UserError(
        f"{len(found):,} of {files.num_images:,} pictures of {files.name} are "
        f"damaged, the first: {reasons[0]}; list them all by python -m "
        f"dtrain.check_data --dataset={files.name}, which moves them away with "
        "--move_to=DIR, or begin a run on the rest with --skip_damaged",
        [f"  {reason}" for reason in reasons[:_NUM_NAMED]],
    )


def sound(
    files: PictureFiles, report: memory.Report = memory.to_stderr
) -> PictureFiles:
    """Returns a source without the pictures that are damaged.

    Args:
        files: all pictures, which are decoded.
        report: called with a line of progress every few seconds.
    """
    found = faults(files, shapes(files, report))
    return without(files, found) if found else files


def without(files: PictureFiles, indices: Collection[int]) -> PictureFiles:
    """Returns a source without some pictures.

    Args:
        files: all pictures.
        indices: of what is damaged.
    """
    names, left_out = files.listing.names, set(indices)
    kept = [index for index in range(len(names)) if index not in left_out]
    damaged = [names[index] for index in sorted(left_out)]
    return files.only(kept, damaged=damaged)


def faults(files: PictureFiles, found: np.ndarray) -> Mapping[int, UserError]:
    """Returns why some pictures cannot be decoded, by their index.

    Args:
        files: all pictures.
        found: what `shapes` returned.
    """
    damaged = {}
    for index in np.flatnonzero(found[:, 0] == 0).tolist():
        fault = files.damage(index)
        if fault:
            damaged[index] = fault
    return damaged


def shapes(
    files: PictureFiles, report: memory.Report = memory.to_stderr
) -> np.ndarray:
    """Decodes all pictures, in threads.

    Args:
        files: all pictures.
        report: called with a line of progress every few seconds.

    Returns:
        int64 [n, 3]: height, width and channels; 0 where that failed.
    """
    found = np.zeros((files.num_images, 3), np.int64)
    due = time.monotonic() + _REPORT_EVERY_SECS
    dataset = _make_shapes(files).ignore_errors()
    for index, shape in dataset.as_numpy_iterator():
        found[index] = shape
        if time.monotonic() >= due:
            due += _REPORT_EVERY_SECS
            report(
                f"checking {files.name}: {index + 1:,} of "
                f"{files.num_images:,} pictures"
            )
    return found


def _make_shapes(files: PictureFiles) -> tf.data.Dataset:
    """Returns a dataset of index and shape, with an error for each damage."""
    decoder = files.decoder.of_any_level()

    @tf.autograph.experimental.do_not_convert
    def fetch(index: tf.Tensor) -> Any:
        return index, files.fetch_files(index[tf.newaxis])[0]

    @tf.autograph.experimental.do_not_convert
    def decode(index: tf.Tensor, fetched: tf.Tensor) -> Any:
        content = files.store.opened(fetched)
        is_late = files.is_late(content)
        shape = tf.cond(
            is_late,
            lambda: tf.zeros([3], tf.int32),
            lambda: tf.shape(decoder.by_tensorflow(content)),
        )
        return index, shape, tf.where(is_late, content, "")

    @tf.autograph.experimental.do_not_convert
    def finish(index: tf.Tensor, shape: tf.Tensor, late: tf.Tensor) -> Any:
        return index, tf.cond(
            tf.equal(late, ""),
            lambda: shape,
            lambda: tf.shape(decoder.decode(late, decoder.by_tensorflow)),
        )

    threads = pictures.NUM_THREADS
    dataset = tf.data.Dataset.range(files.num_images).map(fetch, threads)
    return dataset.map(decode, threads).map(finish)


def sizes(found: np.ndarray) -> str:
    """Says which sizes there are, the most frequent first.

    Args:
        found: what `shapes` returned.
    """
    counts = collections.Counter(
        source.shown(size) for size in found[found[:, 0] > 0, :2].tolist()
    )
    parts = [
        f"{count:,} {size}" for size, count in counts.most_common(_NUM_SIZES)
    ]
    more = len(counts) - len(parts)
    return ", ".join([*parts, f"{more:,} sizes more"] if more else parts)
