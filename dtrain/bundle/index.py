"""Looks at the index of a checkpoint before TensorFlow does.

TensorFlow verifies the checksums of a file and then believes it: a shape with
a dimension below zero ends the process by a failed CHECK, and a shape of a
terabyte takes that much memory. So what the index says is first compared with
the data files. It is a table of LevelDB
(https://github.com/google/leveldb/blob/main/doc/table_format.md) whose values
are BundleEntryProtos (tensorflow/core/protobuf/tensor_bundle.proto).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import tensorflow as tf
from tensorflow.core.protobuf import tensor_bundle_pb2

from dtrain.errors import UserError

_FOOTER_BYTES = 48
_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
# An index of a million tensors has 100 MB.
_MAX_BYTES = 256 << 20
_MAX_SHARDS = 100_000


def check(prefix: str) -> None:
    """Refuses an index that says of the data files what cannot be.

    Args:
        prefix: a local path, without `.index`.

    Raises:
        UserError: there is none, it is no index, or it promises more than the
            data files hold.
    """
    try:
        _check(prefix, f"{prefix}.index")
    except (IndexError, ValueError, OSError) as error:
        # A ValueError is a UserError of this file, or of a damaged proto.
        reason = str(error) if isinstance(error, UserError) else "it is cut"
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        raise UserError(
            f"{prefix} is no readable checkpoint: {reason}"
        ) from error


def _check(prefix: str, path: str) -> None:
    if os.path.getsize(path) > _MAX_BYTES:
        raise UserError(f"its index has more than {_MAX_BYTES >> 20} MB")
    with open(path, "rb") as file:
        rows = entries(file.read())
    key, value = next(rows, (b"", b""))
    if key:
        raise UserError("its index has no header")
    header = tensor_bundle_pb2.BundleHeaderProto.FromString(value)
    num_shards = header.num_shards
    if not 1 <= num_shards <= _MAX_SHARDS:
        raise UserError(f"its index tells of {num_shards} data files")
    sizes = [
        os.path.getsize(f"{prefix}.data-{shard:05}-of-{num_shards:05}")
        for shard in range(num_shards)
    ]
    for key, value in rows:
        entry = tensor_bundle_pb2.BundleEntryProto.FromString(value)
        reason = _fault(entry, sizes)
        if reason:
            name = key.decode(errors="replace")
            raise UserError(f"{name} {reason}")


def _fault(
    entry: tensor_bundle_pb2.BundleEntryProto, sizes: list[int]
) -> str | None:
    """Says what is impossible in an entry; None if nothing is."""
    shape = [side.size for side in entry.shape.dim]
    if entry.shape.unknown_rank or any(side < 0 for side in shape):
        return f"has the shape {shape}"
    if len(shape) > 254:
        return f"has {len(shape)} dimensions"
    try:
        dtype = tf.as_dtype(entry.dtype)
    except TypeError:
        return f"has a dtype of the number {entry.dtype}"
    if not 0 <= entry.shard_id < len(sizes):
        return f"is in the data file {entry.shard_id} of {len(sizes)}"
    end = entry.offset + entry.size
    if min(entry.offset, entry.size) < 0 or end > sizes[entry.shard_id]:
        return f"ends at byte {end} of {sizes[entry.shard_id]}"
    # A string, and what has no size, takes at least a byte.
    least = math.prod(shape) * max(dtype.size or 1, 1)
    if entry.slices:
        is_there = least <= sum(sizes)
        return None if is_there else f"of the shape {shape} is not there"
    is_plain = dtype not in (tf.string, tf.variant, tf.resource)
    if (is_plain and entry.size != least) or entry.size < math.prod(shape):
        return f"has {entry.size} bytes and the shape {shape}"
    return None


def entries(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a table, in their order.

    Args:
        data: the whole file.

    Raises:
        UserError: there is none.
    """
    if data[-8:] != _MAGIC:
        raise UserError("its index has no end")
    footer = data[-_FOOTER_BYTES:]
    _, position = _handle(footer, 0)
    index, _ = _handle(footer, position)
    for _, value in _block(data, index):
        block, _ = _handle(value, 0)
        yield from _block(data, block)


def _block(
    data: bytes, extent: tuple[int, int]
) -> Iterator[tuple[bytes, bytes]]:
    start, length = extent
    # The byte behind it says how it is compressed; TensorFlow's never are.
    if data[start + length]:
        raise UserError("its index is compressed")
    block = data[start : start + length]
    num_restarts = int.from_bytes(block[-4:], "little")
    end = length - 4 * (num_restarts + 1)
    if end < 0:
        raise UserError("its index has a block that cannot be")
    position, key = 0, b""
    while position < end:
        shared, position = _varint(block, position)
        added, position = _varint(block, position)
        size, position = _varint(block, position)
        if position + added + size > end or shared > len(key):
            raise UserError("its index has a block that cannot be")
        key = key[:shared] + block[position : position + added]
        position += added
        yield key, block[position : position + size]
        position += size


def _handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    """Reads where a block is; returns that, and the position after it."""
    start, position = _varint(data, position)
    length, position = _varint(data, position)
    return (start, length), position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    # LEB128: seven bits of a byte, the lowest first, up to 64 in all.
    value = 0
    for shift in range(0, 64, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise UserError("its index has a number of more than 64 bits")
