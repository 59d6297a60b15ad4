"""Files of the format of Hugging Face.

https://huggingface.co/docs/safetensors:

    8 bytes, the length of the header, little-endian
    the header, JSON: {"name": {"dtype", "shape", "data_offsets"}, ...}
    the bytes of all tensors, without a gap

The library reads the header, and refuses one that is not sound. The values are
read here, for it makes no float8 for NumPy, and written here, for it wants all
tensors in memory; here it is one at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

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
# Written by releases of the library since 2025, which others do not open.
_ONLY_READ = {
    "C64": "complex64",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
# The library's limit.
_MAX_HEADER_BYTES = 100_000_000
_METADATA = "__metadata__"
_KEYS = ("dtype", "shape", "data_offsets")


def write(
    file: BinaryIO,
    entries: Mapping[str, Entry],
    value: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes tensors; equal ones are equal bytes.

    Args:
        file: what is written to.
        entries: of each tensor, by its name.
        value: returns a tensor by its name; twice for strings, whose lengths
            the header tells.
        metadata: what else is to be said.

    Raises:
        RefusedError: there are too many tensors.
    """

    def encoded(name: str) -> np.ndarray:
        return entries_lib.encode(value(name), entries[name], _CODES)

    stored = {
        name: entries_lib.plain(entry, _CODES)
        or Entry("uint8", encoded(name).shape)
        for name, entry in entries.items()
    }
    noted = entries_lib.note(entries, metadata, _CODES)
    header = {_METADATA: noted} if noted else {}
    header |= _header(stored)
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
    for name in _order(stored):
        file.write(encoded(name).reshape(-1).view(np.uint8).data)


def _order(stored: Mapping[str, Entry]) -> list[str]:
    # As the library does, so that each begins at a multiple of its items.
    return sorted(stored, key=lambda name: (-_itemsize(stored[name]), name))


def _header(stored: Mapping[str, Entry]) -> dict[str, Any]:
    """Says of each tensor what it is and where, in the order of the file."""
    header: dict[str, Any] = {}
    end = 0
    for name in _order(stored):
        dtype, shape = stored[name]
        start, end = end, end + entries_lib.num_bytes(stored[name])
        values = (_CODES[dtype], shape, (start, end))
        header[name] = dict(zip(_KEYS, values, strict=True))
    return header


def _itemsize(entry: Entry) -> int:
    return entries_lib.numpy_dtype(entry.dtype).itemsize


@contextlib.contextmanager
def opened(path: str) -> Iterator[Container]:
    """Opens a file.

    Args:
        path: of a local file.

    Yields:
        What it holds.

    Raises:
        RefusedError: the file is not of this format, all of it.
    """
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        _check_header(file, end)
        entries, metadata = _read_header(path)
        starts: dict[str, int] = {}
        # The library has seen that they are without a gap.
        for name, entry in reversed(entries.items()):
            end -= entries_lib.num_bytes(entry)
            starts[name] = end

        def read(name: str) -> np.ndarray:
            entry = entries[name]
            file.seek(starts[name])
            data = np.empty(entries_lib.num_bytes(entry), np.uint8)
            if file.readinto(data.data) != data.size:
                raise RefusedError(f"it is cut off in {name!r}")
            dtype = entries_lib.numpy_dtype(entry.dtype)
            array = data.view(dtype).reshape(entry.shape)
            return entries_lib.check_bools(name, array)

        yield Container(entries, metadata, read)


def _check_header(file: BinaryIO, size: int) -> None:
    """Checks a header before the library reads it, in memory without bound.

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
    # A tensor has a colon for its name and each of three members, and seldom
    # more than eight sides; the library ends the process where memory ends.
    if header.count(b":") > 4 * limit or header.count(b",") > 12 * limit:
        raise RefusedError(
            f"it names more than {limit} tensors, or too many sides of them"
        )


def _read_header(path: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Returns the tensors in the order of their bytes, and the metadata.

    Raises:
        RefusedError: it is no header, or what it says cannot be.
    """
    try:
        # Maps nothing into memory.
        with safetensors.safe_open(path, "np", backend="pread") as opened_file:
            metadata = opened_file.metadata() or {}
            slices = {
                name: opened_file.get_slice(name)
                for name in opened_file.offset_keys()
            }
            entries = {
                name: _entry(name, told.get_dtype(), told.get_shape())
                for name, told in slices.items()
            }
    except safetensors.SafetensorError as error:
        said = str(error).removeprefix("Error while deserializing header: ")
        raise RefusedError(
            f"it is no safetensors file: {said[:200]}"
        ) from error
    return entries, metadata


def _entry(name: str, code: str, shape: list[int]) -> Entry:
    dtype = {**_DTYPES, **_ONLY_READ}.get(code)
    if dtype is None:
        raise RefusedError(
            f"{name[:80]!r} has the dtype {code!r}, which is not one of "
            f"{', '.join((*_DTYPES, *_ONLY_READ))}",
            "convert it to one of these",
        )
    entry = Entry(dtype, tuple(shape))
    entries_lib.check(name, entry)
    return entry
