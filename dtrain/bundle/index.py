"""Looks at the index of a checkpoint before TensorFlow does.

TensorFlow verifies the checksums of a file and then believes it: a shape with
a dimension below zero ends the process by a failed CHECK, and a shape of a
terabyte takes that much memory. So what the index says is first compared with
the data files. It is a table of LevelDB
(https://github.com/google/leveldb/blob/main/doc/table_format.md) whose values
are BundleEntryProtos (tensorflow/core/protobuf/tensor_bundle.proto).

What TensorFlow wrote before, V1, is one such table with the values in it; its
first entry describes them (tensorflow/core/util/saved_tensor_slice.proto).
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.core.protobuf import tensor_bundle_pb2
from tensorflow.core.util.saved_tensor_slice_pb2 import SavedTensorSlices

from dtrain.bundle.fingerprint import VARIANT, Fingerprint
from dtrain.errors import UserError
from dtrain.storage import files

_FOOTER_BYTES = 48
_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
# An index of a million tensors has 100 MB.
_MAX_BYTES = 256 << 20
_MAX_SHARDS = 100_000
_MAX_RANK = 254
# Of a data file, which are read at once: they stay in the cache of a core.
_PART_BYTES = 256 << 10


def check(prefix: str) -> None:
    """Refuses an index that says of the data files what cannot be.

    Args:
        prefix: a local path, without `.index`.

    Raises:
        UserError: there is none, it is no index, or it promises more than the
            data files hold.
    """
    try:
        if is_v1(prefix):
            _check_v1(prefix)
        else:
            _check(prefix, f"{prefix}.index")
    except (IndexError, ValueError, OSError) as error:
        # A ValueError is a UserError of this file, or of a damaged proto.
        reason = str(error) if isinstance(error, UserError) else "it is cut"
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        raise UserError(
            f"{prefix} is no readable checkpoint: {reason}"
        ) from error


def is_v1(prefix: str) -> bool:
    """Tells whether a checkpoint is one file, as before TensorFlow 0.12.

    Raises:
        OSError: the disk or the store failed.
    """
    if files.size(f"{prefix}.index") is not None or files.is_directory(prefix):
        return False
    num_bytes = files.size(prefix) or 0
    if num_bytes < _FOOTER_BYTES:
        return False
    return files.read_part(prefix, num_bytes - 8, 8) == _MAGIC


class Parts(NamedTuple):
    """How a tensor is kept in a checkpoint of V1.

    Attributes:
        shape: of the tensor.
        parts: where each part is in it, a slice for each of its dimensions.
    """

    shape: tuple[int, ...]
    parts: list[tuple[slice, ...]]


def parts(path: str) -> dict[str, Parts]:
    """Returns how each tensor of a checkpoint of V1 is kept, by its name.

    Args:
        path: of the file.

    Raises:
        UserError: it is no such file, or a part is none of its tensor.
        OSError: it cannot be read.
    """
    found: dict[str, Parts] = {}
    for tensor in _described(path):
        shape = tuple(side.size for side in tensor.shape.dim)
        found[tensor.name] = Parts(shape, [])
        for part in tensor.slice:
            extents = []
            for extent, side in zip(part.extent, shape, strict=True):
                # Without a length it is all of them.
                stop = side
                if extent.HasField("length"):
                    stop = extent.start + extent.length
                if not 0 <= extent.start <= stop <= side:
                    raise UserError(f"{tensor.name} has a part outside it")
                extents.append(slice(extent.start, stop))
            found[tensor.name].parts.append(tuple(extents))
        sizes = [
            math.prod(side.stop - side.start for side in part)
            for part in found[tensor.name].parts
        ]
        if sum(sizes) != math.prod(shape):
            raise UserError(f"{tensor.name} is not there whole")
    return found


def _check_v1(path: str) -> None:
    num_bytes = os.path.getsize(path)
    for tensor in _described(path):
        shape = [side.size for side in tensor.shape.dim]
        if tensor.shape.unknown_rank or min(shape, default=0) < 0:
            raise UserError(f"{tensor.name} has the shape {shape}")
        if not _is_dtype(tensor.type):
            raise UserError(
                f"{tensor.name} has a dtype of the number {tensor.type}"
            )
        # An element takes a byte at least.
        if len(shape) > _MAX_RANK or math.prod(shape) > num_bytes:
            raise UserError(f"{tensor.name} of {shape} is not there")
    parts(path)


def _described(path: str) -> list[Any]:
    """Reads what a file of V1 says of its tensors, in front of them.

    Raises:
        UserError: it does not say it.
    """
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as table,
    ):
        key, value = next(entries(table), (b"", b""))
    if key:
        raise UserError("it has no header")
    slices = SavedTensorSlices.FromString(value)
    return list(slices.meta.tensor)


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
    if len(shape) > _MAX_RANK:
        return f"has {len(shape)} dimensions"
    if not _is_dtype(entry.dtype):
        return f"has a dtype of the number {entry.dtype}"
    dtype = tf.as_dtype(entry.dtype)
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


def _is_dtype(number: int) -> bool:
    try:
        tf.as_dtype(number)
    except TypeError:
        return False
    return True


class Extent(NamedTuple):
    """Where a tensor is in the data files.

    Attributes:
        path: of its file.
        offset: of its first byte there.
        num_bytes: that it takes.
        dtype: TensorFlow's name of it.
        shape: its dimensions.
        is_whole: whether it is there in one piece.
    """

    path: str
    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]
    is_whole: bool

    def fingerprint(self) -> Fingerprint:
        """Reads it, a part at a time; what is not there has no checksum.

        It is of numbers, or a variant, and there in one piece.

        Raises:
            OSError: it cannot be read.
        """
        total = hashlib.sha256()
        part = memoryview(bytearray(min(self.num_bytes, _PART_BYTES)))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            left = self.num_bytes
            while left and (size := file.readinto(part[:left])):
                total.update(part[:size])
                left -= size
        is_plain = self.dtype != VARIANT
        shape = self.shape if is_plain else (self.num_bytes,)
        return Fingerprint(self.dtype, shape, total.hexdigest())


def extents(prefix: str) -> dict[str, Extent]:
    """Returns where each tensor is, by its key.

    Args:
        prefix: of a checkpoint that `check` has passed, or whose index has its
            checksum.

    Raises:
        OSError: the index cannot be read.
    """
    with open(f"{prefix}.index", "rb") as file:
        rows = entries(file.read())
    _, value = next(rows)
    header = tensor_bundle_pb2.BundleHeaderProto.FromString(value)
    found: dict[str, Extent] = {}
    for key, value in rows:
        entry = tensor_bundle_pb2.BundleEntryProto.FromString(value)
        shard = f"{entry.shard_id:05}-of-{header.num_shards:05}"
        # Those of slices are no text.
        found[key.decode(errors="replace")] = Extent(
            f"{prefix}.data-{shard}",
            entry.offset,
            entry.size,
            tf.as_dtype(entry.dtype).name,
            tuple(side.size for side in entry.shape.dim),
            not entry.slices,
        )
    return found


def raw(prefix: str, key: str) -> bytes:
    """Returns the bytes of a tensor as they are in its data file.

    Args:
        prefix: see `extents`.
        key: of a tensor that is there, and in one piece.

    Raises:
        OSError: it cannot be read.
    """
    extent = extents(prefix)[key]
    return files.read_part(extent.path, extent.offset, extent.num_bytes)


def entries(data: bytes | mmap.mmap) -> Iterator[tuple[bytes, bytes]]:
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
    data: bytes | mmap.mmap, extent: tuple[int, int]
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
