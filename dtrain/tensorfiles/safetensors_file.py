"""Files of the format of Hugging Face.

https://huggingface.co/docs/safetensors:

    8 bytes, the length of the header, little-endian
    the header, JSON: {"name": {"dtype", "shape", "data_offsets"}, ...}
    the bytes of all tensors, without a gap

The library maps a whole file into memory and does not make bfloat16 for
NumPy; this reads one tensor at a time. What it writes the library opens.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

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
# Of what is said of one tensor.
_MAX_VALUE_BYTES = 8192
_METADATA = "__metadata__"
_KEYS = ("dtype", "shape", "data_offsets")
_SPACES = re.compile(rb"[ \t\r\n]*")


class _Tensor(NamedTuple):
    """A tensor of the header; its bytes are from `start` to `end`."""

    entry: Entry
    start: int
    end: int


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
        size = os.fstat(file.fileno()).st_size
        header = _read_header(file, size)
        start = 8 + len(header)
        tensors, metadata = _parse(header)
        del header
        _check_offsets(tensors, size - start)

        def read(name: str) -> np.ndarray:
            tensor = tensors[name]
            file.seek(start + tensor.start)
            data = np.empty(tensor.end - tensor.start, np.uint8)
            if file.readinto(data.data) != data.size:
                raise RefusedError(f"it is cut off in {name!r}")
            dtype = entries_lib.numpy_dtype(tensor.entry.dtype)
            array = data.view(dtype).reshape(tensor.entry.shape)
            return entries_lib.check_bools(name, array)

        yield Container(
            {name: tensor.entry for name, tensor in tensors.items()},
            metadata,
            read,
        )


def _read_header(file: BinaryIO, size: int) -> bytes:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise RefusedError(
            "it is no safetensors file, or cut off: it must begin with the "
            f"length of its header, at most {_MAX_HEADER_BYTES} bytes and "
            "those of the file"
        )
    header = file.read(length)
    if len(header) != length:
        raise RefusedError("it is cut off in its header")
    return header


def _parse(
    header: bytes,
) -> tuple[dict[str, _Tensor], dict[str, str]]:
    """Reads the header value by value, as all at once has no bound in memory.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        RefusedError: it is no header.
    """
    tensors: dict[str, _Tensor] = {}
    metadata: dict[str, str] | None = None
    for name, value in _members(header):
        if name in tensors or (name == _METADATA and metadata is not None):
            raise RefusedError(f"{name[:80]!r} is there twice")
        if name == _METADATA:
            metadata = entries_lib.texts(value)
            continue
        tensors[name] = _tensor(name, value)
        if len(tensors) > entries_lib.MAX_ENTRIES:
            raise RefusedError(
                f"it names more than {entries_lib.MAX_ENTRIES} tensors"
            )
    return tensors, metadata or {}


def _members(header: bytes) -> Iterator[tuple[str, Any]]:
    """Yields the names and values of the JSON object that a header is.

    Raises:
        RefusedError: it is none.
    """
    if header[:1] != b"{":
        raise RefusedError("it must begin with {")
    position, token = _token(header, 1)
    while token != b"}":
        name, position = _value(header, position, _MAX_VALUE_BYTES)
        if not isinstance(name, str):
            raise RefusedError(f"{str(name)[:80]} is no name")
        position, token = _token(header, position)
        if token != b":":
            raise RefusedError(f"there is no : at byte {position}")
        position, _ = _token(header, position + 1)
        limit = _MAX_VALUE_BYTES
        if name == _METADATA:
            limit = entries_lib.MAX_METADATA_BYTES
        value, position = _value(header, position, limit)
        yield name, value
        position, token = _token(header, position)
        if token == b",":
            position, token = _token(header, position + 1)
            if token == b"}":
                raise RefusedError(f"a name must follow byte {position}")
        elif token != b"}":
            raise RefusedError(f"there is no , or }} at byte {position}")
    if _token(header, position + 1)[1]:
        raise RefusedError(f"something follows byte {position}")


def _token(header: bytes, position: int) -> tuple[int, bytes]:
    """Returns the next byte that is no space, and where it is."""
    match = _SPACES.match(header, position)
    assert match is not None
    return match.end(), header[match.end() : match.end() + 1]


def _value(header: bytes, position: int, limit: int) -> tuple[Any, int]:
    """Reads a JSON value of some bytes; returns it and where it ends.

    Raises:
        RefusedError: there is none.
    """
    window = header[position : position + limit]
    # A character may be cut in two where the window ends.
    text = window.decode(errors="ignore")
    try:
        value, end = entries_lib.JSON.raw_decode(text)
        used = text[:end].encode()
    # The last is of nesting too deep.
    except (ValueError, RecursionError):
        value, used = None, b""
    # What was left out of the text makes a difference.
    if not used or not window.startswith(used):
        raise RefusedError(
            f"at byte {position} is no JSON value of at most {limit} bytes"
        )
    return value, position + len(used)


def _tensor(name: str, value: Any) -> _Tensor:
    """Reads what the header says of a tensor.

    Raises:
        RefusedError: it contradicts itself.
    """
    if not _is_told(value):
        raise RefusedError(
            f"{name[:80]!r} must have a dtype, a shape and two data_offsets "
            "below 2^63, and nothing else"
        )
    code, shape, (start, end) = (value[key] for key in _KEYS)
    dtype = {**_DTYPES, **_ONLY_READ}.get(code)
    if dtype is None:
        raise RefusedError(
            f"{name[:80]!r} has the dtype {code[:40]!r}, which is not one of "
            f"{', '.join((*_DTYPES, *_ONLY_READ))}",
            "convert it to one of these",
        )
    entry = Entry(dtype, tuple(shape))
    entries_lib.check(name, entry)
    if start < 0 or end - start != entries_lib.num_bytes(entry):
        raise RefusedError(
            f"{name!r} is {dtype} {shape} of "
            f"{entries_lib.num_bytes(entry)} bytes, and its data_offsets say "
            f"{start} to {end}",
        )
    return _Tensor(entry, start, end)


def _is_told(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == set(_KEYS)
        and isinstance(value["dtype"], str)
        and entries_lib.is_shape(value["shape"])
        and entries_lib.is_shape(value["data_offsets"])
        and len(value["data_offsets"]) == 2
        and max(value["data_offsets"]) < 2**63
    )


def _check_offsets(tensors: Mapping[str, _Tensor], num_bytes: int) -> None:
    """Checks that each byte of the file is of one tensor.

    Raises:
        RefusedError: one is of none, or of several.
    """
    end = 0
    for name, tensor in sorted(
        tensors.items(), key=lambda item: (item[1].start, item[1].end)
    ):
        if tensor.start != end:
            raise RefusedError(
                f"{name!r} begins at {tensor.start} and what is before it ends "
                f"at {end}: tensors must follow each other without a gap",
            )
        end = tensor.end
    if end != num_bytes:
        raise RefusedError(
            f"its tensors have {end} bytes, and the file {num_bytes}"
        )
