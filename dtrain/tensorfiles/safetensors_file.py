"""Files of the format of Hugging Face.

https://huggingface.co/docs/safetensors:

    8 bytes, the length of the header, little-endian
    the header, JSON: {"name": {"dtype", "shape", "data_offsets"}, ...}
    the bytes of all tensors, without a gap

The library reads the header, and refuses one that is not sound. It neither
reads nor writes the values: it has no float8 for NumPy, and to write it wants
all tensors in memory, of which here is one at a time.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from dtrain.tensorfiles import entries as entries_lib
from dtrain.tensorfiles.entries import Container, Entry, RefusedError

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}
_CODES = {name: code for code, name in _DTYPES.items()}
# Written by releases of the library since 2025; older ones do not open them.
_ONLY_READ = {
    "C64": "complex64",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
# As wide as that many bits, one behind the other, and read as float32, for
# TensorFlow has no such tensors. The dtype of `ml_dtypes`, and the bits.
_NARROW = {
    "F4": (ml_dtypes.float4_e2m1fn, 4),
    "F6_E2M3": (ml_dtypes.float6_e2m3fn, 6),
    "F6_E3M2": (ml_dtypes.float6_e3m2fn, 6),
    "F8_E8M0": (ml_dtypes.float8_e8m0fnu, 8),
}
# The library's limit.
_MAX_HEADER_BYTES = 100_000_000
_METADATA = "__metadata__"


def write(
    file: BinaryIO,
    entries: Mapping[str, Entry],
    value: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes tensors; see `containers.write`.

    Raises:
        RefusedError: there are too many tensors.
    """

    def encoded(name: str) -> np.ndarray:
        return entries_lib.encode(value(name), entries[name], _CODES)

    # Strings are read twice: the header has the bytes that they take.
    stored = {
        name: entries_lib.plain(entry, _CODES)
        or Entry("uint8", encoded(name).shape)
        for name, entry in entries.items()
    }
    # As the library does, so that each begins at a multiple of its items.
    names = sorted(stored, key=lambda name: (-_itemsize(stored[name]), name))
    noted = entries_lib.note(entries, metadata, _CODES)
    header: dict[str, Any] = {_METADATA: noted} if noted else {}
    end = 0
    for name in names:
        dtype, shape = stored[name]
        start, end = end, end + entries_lib.num_bytes(stored[name])
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": shape,
            "data_offsets": (start, end),
        }
    data = entries_lib.dumps(header)
    data += b" " * (-len(data) % 8)
    if len(data) > _MAX_HEADER_BYTES:
        raise RefusedError(
            f"what is told of {len(entries)} tensors must have at most "
            f"{_MAX_HEADER_BYTES} bytes",
            "export fewer at a time",
        )
    file.write(len(data).to_bytes(8, "little"))
    file.write(data)
    for name in names:
        file.write(encoded(name).reshape(-1).view(np.uint8).data)


def _itemsize(entry: Entry) -> int:
    return entries_lib.numpy_dtype(entry.dtype).itemsize


@contextlib.contextmanager
def opened(path: str) -> Iterator[Container]:
    """Opens a local file; see `containers.open_file`."""
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        _check_header(file, end)
        entries, codes, metadata = _read_header(path)
        starts: dict[str, int] = {}
        # The library has seen to it that there is no gap between them.
        for name, entry in reversed(entries.items()):
            end -= entries_lib.num_bytes(_stored(entry, codes[name]))
            starts[name] = end

        def read(name: str) -> np.ndarray:
            stored = _stored(entries[name], codes[name])
            value = entries_lib.read_at(name, file, starts[name], stored)
            if codes[name] in _NARROW:
                return _widened(value, codes[name], entries[name])
            return value

        yield Container(entries, metadata, read)


def _check_header(file: BinaryIO, size: int) -> None:
    """Checks a header before the library, which sets no bound, reads it.

    Raises:
        RefusedError: there is none, or it names too many tensors.
    """
    limit = entries_lib.MAX_ENTRIES
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise RefusedError(
            "it is no safetensors file, or cut off: it must begin with the "
            f"length of its header, at most {_MAX_HEADER_BYTES} bytes and "
            "those of the file"
        )
    header = file.read(length)
    # A tensor has four colons, for its name and three members, and seldom more
    # than eight sides. Without memory the library would end the process.
    if header.count(b":") > 4 * limit or header.count(b",") > 12 * limit:
        raise RefusedError(
            f"it names more than {limit} tensors, or too many sides of them"
        )


def _stored(entry: Entry, code: str) -> Entry:
    """Returns what is in the file of a tensor: of a narrow one its bytes."""
    if code not in _NARROW:
        return entry
    num_bits = math.prod(entry.shape) * _NARROW[code][1]
    return Entry("uint8", (num_bits // 8,))


def _widened(packed: np.ndarray, code: str, entry: Entry) -> np.ndarray:
    """Returns the tensor of numbers that are narrower than a byte."""
    dtype, num_bits = _NARROW[code]
    bits = np.unpackbits(packed, bitorder="little").reshape(-1, num_bits)
    whole = np.packbits(bits, axis=1, bitorder="little")
    return whole.view(dtype).astype(np.float32).reshape(entry.shape)


def _read_header(
    path: str,
) -> tuple[dict[str, Entry], dict[str, str], dict[str, str]]:
    """Reads the entries, the library's names of the dtypes, the metadata.

    Raises:
        RefusedError: the library refuses it, or a tensor is refused.
    """
    try:
        # Maps nothing into memory.
        with safetensors.safe_open(path, "np", backend="pread") as opened_file:
            metadata = opened_file.metadata() or {}
            entries, codes = {}, {}
            for name in opened_file.offset_keys():
                piece = opened_file.get_slice(name)
                codes[name] = piece.get_dtype()
                entries[name] = _entry(name, codes[name], piece.get_shape())
    except safetensors.SafetensorError as error:
        text = str(error).removeprefix("Error while deserializing header: ")
        raise RefusedError(
            f"it is no safetensors file: {text[:200]}"
        ) from error
    return entries, codes, metadata


def _entry(name: str, code: str, shape: list[int]) -> Entry:
    known = {**_DTYPES, **_ONLY_READ, **dict.fromkeys(_NARROW, "float32")}
    dtype = known.get(code)
    if dtype is None:
        raise RefusedError(
            f"{name[:80]!r} has the dtype {code!r}, which is not one of "
            f"{', '.join(known)}",
            "convert it to one of these",
        )
    entry = Entry(dtype, tuple(shape))
    entries_lib.check(name, entry)
    return entry
