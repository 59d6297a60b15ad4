"""Writes tensors as TensorFlow does, in parts, and says what they were.

While a part is written, two threads beside compute the checksums of its tensors
and put the part before it on the disk: all three take about as long, and one
after the other a save would take twice the time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from dtrain.bundle import fingerprint, index
from dtrain.bundle.fingerprint import Fingerprint
from dtrain.storage import files

# Of a part; a single tensor may have more. A state that is smaller has one data
# file, as a stock save has, and a large one about as many as `_MAX_PARTS`.
_PART_BYTES = 64 << 20
_MAX_PARTS = 8

Look: TypeAlias = Callable[[str, tf.Tensor], None]


def write(
    prefix: str,
    tensors: Iterable[tuple[str, tf.Tensor]],
    num_bytes: int,
    look: Look = lambda *_: None,
) -> dict[str, Fingerprint]:
    """Writes `<prefix>.index` and one data file or more to a local disk.

    The last of the files are not synced yet, nor are their names.

    Args:
        prefix: a local path.
        tensors: their keys and values, in the memory of the host; they are
            asked for one after the other, and three parts of them are in
            memory at once.
        num_bytes: of all of them, about.
        look: called with each key and tensor, on another thread.

    Returns:
        The fingerprints of the tensors, as they are in the memory.

    Raises:
        OSError: the disk is full, or gone.
    """
    parts = _parts(tensors, max(_PART_BYTES, num_bytes // _MAX_PARTS))
    first, second = next(parts, {}), next(parts, None)
    with (
        files.os_errors(),
        tf.device("CPU:0"),
        futures.ThreadPoolExecutor(2) as beside,
    ):
        if second is None:
            return _write_part(prefix, first, look, beside).result()
        prefixes, found, synced = [], [], []
        for number, part in enumerate(itertools.chain((first, second), parts)):
            prefixes.append(f"{prefix}-part-{number}")
            found.append(_write_part(prefixes[-1], part, look, beside))
            data = f"{prefixes[-1]}.data-00000-of-00001"
            synced.append(beside.submit(files.sync, data))
        written = dict[str, Fingerprint]()
        for seen, on_disk in zip(found, synced, strict=True):
            written |= seen.result()
            on_disk.result()
        tf.raw_ops.MergeV2Checkpoints(
            checkpoint_prefixes=prefixes,
            destination_prefix=prefix,
            delete_old_dirs=False,
        )
    return written


def num_bytes_of(tensor: tf.Tensor) -> int:
    """Returns the bytes of a tensor; of strings and variants nobody knows."""
    return (tensor.dtype.size or 0) * (tensor.shape.num_elements() or 0)


def _parts(
    tensors: Iterable[tuple[str, tf.Tensor]], most: int
) -> Iterator[dict[str, tf.Tensor]]:
    part, size = dict[str, tf.Tensor](), 0
    for key, tensor in tensors:
        num_bytes = num_bytes_of(tensor)
        if part and size + num_bytes > most:
            yield part
            part, size = {}, 0
        part[key] = tensor
        size += num_bytes
    if part:
        yield part


def _write_part(
    prefix: str,
    part: dict[str, tf.Tensor],
    look: Look,
    beside: futures.Executor,
) -> futures.Future[dict[str, Fingerprint]]:
    """Writes a part; what it was is known when the future is done."""

    def seen() -> dict[str, Fingerprint]:
        found = {}
        for key, tensor in part.items():
            look(key, tensor)
            value = _value(prefix, key, tensor)
            found[key] = fingerprint.of(value, tensor.dtype.name)
        return found

    def save() -> None:
        tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=list(part),
            shape_and_slices=[""] * len(part),
            tensors=list(part.values()),
        )

    if any(tensor.dtype == tf.variant for tensor in part.values()):
        # The bytes of an iterator are in the file alone.
        save()
        return beside.submit(seen)
    future = beside.submit(seen)
    save()
    return future


def _value(prefix: str, key: str, tensor: tf.Tensor) -> np.ndarray:
    """Returns a value; of what only an iterator reads the bytes in its file."""
    if tensor.dtype == tf.variant:
        return np.frombuffer(index.raw(prefix, key), np.uint8)
    return fingerprint.values_of(tensor)
