"""What a file of tensors says of each, and how any dtype is put into a file.

The format of a file, its container, has only some dtypes. A tensor of another
is written as one that every program can open, and the metadata say under
`ENCODED` what it stands for:

    string           uint8 [bytes]: the length of each element as a
                     little-endian int64, then all their bytes
    complex          float32 or float64 [..., 2]: real and imaginary part
    bfloat16, float8 and others of ml_dtypes: their bits as uint8 or uint16
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# A key of the metadata: JSON, the entry of each encoded tensor by its name.
ENCODED = "dtrain.encoded"

STRING = "string"
NUMPY_DTYPES = frozenset(
    (
        *("bool", "int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
)
_ML_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
        *("float8_e4m3b11fnuz", "float8_e5m2fnuz"),
        *("int4", "uint4", "int2", "uint2"),
    )
}
# The dtypes that every container has.
_EVERYWHERE = NUMPY_DTYPES - {"complex64", "complex128"}
_MAX_NAME_BYTES = 1024
# NumPy 1 makes no more.
_MAX_RANK = 32
# Even of an array without elements, whose other sides NumPy multiplies too.
_MAX_ELEMENTS = 2**58
# More than a network of 100,000 layers has; so many entries fit into memory.
MAX_ENTRIES = 500_000
MAX_METADATA_BYTES = 16 * 2**20


class RefusedError(Exception):
    """A file or a tensor is refused; `containers` tells the user which.

    Attributes:
        why: the value and the rule; the text has a remedy, too.
    """

    def __init__(
        self, why: str, remedy: str = "copy it again, or write it again"
    ) -> None:
        super().__init__(f"{why}; {remedy}")
        self.why = why


class Entry(NamedTuple):
    """What a file says of a tensor.

    Attributes:
        dtype: as NumPy, ml_dtypes or TensorFlow call it: `float32`,
            `bfloat16`, `string`.
        shape: empty for a scalar.
    """

    dtype: str
    shape: tuple[int, ...]


class Container(NamedTuple):
    """A file of tensors that is open.

    Attributes:
        entries: of each tensor, by its name.
        metadata: texts that it holds beside them.
        read: returns a tensor by its name; strings are bytes, of dtype object.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    read: Callable[[str], np.ndarray]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is there twice")
    return values


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


# Raises ValueError, or RecursionError where the nesting is too deep.
JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)


def is_dtype(name: str) -> bool:
    """Tells whether tensors have a dtype of that name, as in `Entry`."""
    return name == STRING or name in NUMPY_DTYPES or name in _ML_DTYPES


def numpy_dtype(name: str) -> np.dtype:
    """Returns the dtype of the array that holds a tensor.

    Args:
        name: as in `Entry`.

    Raises:
        RefusedError: there is no such dtype.
    """
    if name == STRING:
        return np.dtype(object)
    if name in NUMPY_DTYPES:
        return np.dtype(name)
    if name in _ML_DTYPES:
        return _ML_DTYPES[name]
    known = ", ".join(sorted((*NUMPY_DTYPES, *_ML_DTYPES, STRING)))
    raise RefusedError(
        f"the dtype {name[:40]!r} is not one of {known}",
        "convert it to one of these",
    )


def num_bytes(entry: Entry) -> int:
    """Returns the bytes of a tensor in a file; not for strings."""
    return math.prod(entry.shape) * numpy_dtype(entry.dtype).itemsize


def check(name: str, entry: Entry) -> None:
    """Checks what a file says of a tensor, before memory is taken for it.

    Args:
        name: of the tensor.
        entry: its dtype and shape.

    Raises:
        RefusedError: a program may be unable to open the name, or there are
            no tensors of this dtype or shape.
    """
    if not _is_name(name):
        raise RefusedError(
            f"{name[:80]!r} cannot name a tensor: a name has 1 to "
            f"{_MAX_NAME_BYTES} bytes of text, no control characters, and no "
            "empty part, . or .. between its slashes",
            "rename it in the program that made it",
        )
    numpy_dtype(entry.dtype)
    # First the rank: the product of a million sides takes hours.
    if (
        len(entry.shape) > _MAX_RANK
        or min(entry.shape, default=0) < 0
        or math.prod(max(side, 1) for side in entry.shape) > _MAX_ELEMENTS
    ):
        raise RefusedError(
            f"the shape {str(list(entry.shape))[:80]} of {name!r} must have "
            f"at most {_MAX_RANK} sides, none below 0, and 2^58 elements"
        )


def check_all(entries: Mapping[str, Entry]) -> None:
    """Checks what is to be written as strictly as what is read.

    Args:
        entries: dtype and shape of each tensor, by its name.

    Raises:
        RefusedError: they could not be read again.
    """
    if len(entries) > MAX_ENTRIES:
        raise RefusedError(
            f"{len(entries)} tensors are more than the {MAX_ENTRIES} that "
            "are read",
            "export fewer at a time",
        )
    for name, entry in entries.items():
        check(name, entry)


def _is_name(name: str) -> bool:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return False
    return (
        0 < length <= _MAX_NAME_BYTES
        and all(" " <= character != "\x7f" for character in name)
        and not {"", ".", ".."} & set(name.split("/"))
        and name != "__metadata__"
    )


def read_at(
    name: str, file: io.BufferedReader, offset: int, entry: Entry
) -> np.ndarray:
    """Reads a tensor whose bytes are in one piece of a file.

    Args:
        name: of the tensor.
        file: is read from.
        offset: of the first byte.
        entry: dtype and shape.

    Raises:
        RefusedError: the file ends before.
    """
    data = np.empty(num_bytes(entry), np.uint8)
    file.seek(offset)
    if file.readinto(data.data) != data.size:
        raise RefusedError(f"it is cut off in {name!r}")
    array = data.view(numpy_dtype(entry.dtype)).reshape(entry.shape)
    return check_bools(name, array)


def check_bools(name: str, array: np.ndarray) -> np.ndarray:
    """Returns an array of a file, if its bools are 0 or 1.

    Args:
        name: of the tensor.
        array: of any dtype.

    Raises:
        RefusedError: another byte is among them, with which NumPy miscounts.
    """
    if array.dtype == bool and array.view(np.uint8).max(initial=0) > 1:
        raise RefusedError(
            f"{name!r} is of bools, which must be bytes 0 or 1",
            "write it as uint8",
        )
    return array


def plain(entry: Entry, held: Collection[str]) -> Entry | None:
    """Returns the dtype and shape of a tensor in a container.

    None for strings, whose lengths decide.

    Args:
        entry: its dtype and shape.
        held: the dtypes that the container has.
    """
    if entry.dtype in held:
        return entry
    if entry.dtype == STRING:
        return None
    if entry.dtype.startswith("complex"):
        part = "float32" if entry.dtype == "complex64" else "float64"
        return Entry(part, (*entry.shape, 2))
    bits = 8 * numpy_dtype(entry.dtype).itemsize
    return Entry(f"uint{bits}", entry.shape)


def encode(
    value: np.ndarray, entry: Entry, held: Collection[str]
) -> np.ndarray:
    """Returns the array, in C's order, that a tensor is in a container.

    Args:
        value: the tensor.
        entry: its dtype and shape.
        held: the dtypes that the container has.
    """
    assert value.dtype == numpy_dtype(entry.dtype), (value.dtype, entry)
    assert value.shape == entry.shape, (value.shape, entry)
    value = np.asarray(value, order="C")
    stored = plain(entry, held)
    if stored is None:
        lengths = np.array([len(text) for text in value.flat], "<i8")
        joined = b"".join((lengths.tobytes(), *value.flat))
        return np.frombuffer(joined, np.uint8)
    # Of one dimension: a scalar cannot be viewed as two numbers.
    return value.reshape(-1).view(stored.dtype).reshape(stored.shape)


def decode(name: str, value: np.ndarray, entry: Entry) -> np.ndarray:
    """Returns the tensor of which `encode` made an array.

    Args:
        name: of the tensor.
        value: the array.
        entry: dtype and shape of the tensor.

    Raises:
        RefusedError: the lengths of strings are not those of their bytes.
    """
    if entry.dtype != STRING:
        flat = np.asarray(value, order="C").reshape(-1)
        return flat.view(numpy_dtype(entry.dtype)).reshape(entry.shape)
    count = math.prod(entry.shape)
    # As Python's integers, whose sum does not wrap around at 2^64.
    lengths = value[: 8 * count].view("<i8").tolist()
    if min(lengths, default=0) < 0 or sum(lengths) != value.size - 8 * count:
        raise RefusedError(
            f"the lengths of the strings of {name!r} must add up to its bytes"
        )
    strings = np.empty(count, object)
    end = 8 * count
    for index, length in enumerate(lengths):
        strings[index] = value[end : end + length].tobytes()
        end += length
    return strings.reshape(entry.shape)


def note(
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    held: Collection[str],
) -> dict[str, str]:
    """Returns the metadata of a file, with a note of what is encoded.

    Args:
        entries: dtype and shape of all tensors, by name.
        metadata: what else it holds.
        held: the dtypes that the container has.

    Raises:
        RefusedError: they are too large.
    """
    encoded = {
        name: entry._asdict()
        for name, entry in entries.items()
        if entry.dtype not in held
    }
    noted = dict(metadata)
    if encoded:
        noted[ENCODED] = dumps(encoded).decode()
    if noted and len(dumps(noted)) > MAX_METADATA_BYTES:
        raise RefusedError(
            f"metadata of {len(encoded)} tensors that are encoded must have at "
            f"most {MAX_METADATA_BYTES} bytes",
            "export fewer at a time",
        )
    # The library of safetensors has them in no order, and equal ones are to
    # be equal bytes.
    return dict(sorted(noted.items()))


def dumps(value: Any) -> bytes:
    """Returns a value as JSON.

    Args:
        value: of JSON's types.

    Raises:
        RefusedError: a text in it has no bytes in UTF-8.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(
            f"{error.object[max(0, error.start - 20) : error.end]!r} cannot be "
            "written as UTF-8",
            "rename it",
        ) from error


def with_decoded(container: Container) -> Container:
    """Returns a container whose encoded tensors are what they stand for.

    Args:
        container: as it is in the file.

    Raises:
        RefusedError: the note is not one of `note`, or not of these tensors.
    """
    metadata = dict(container.metadata)
    encoded = _parse_note(metadata.pop(ENCODED, "{}"))
    for name, entry in encoded.items():
        check(name, entry)
        if not _stands_for(container.entries.get(name), entry):
            raise RefusedError(
                f"{ENCODED} says that {name!r} is {entry.dtype} "
                f"{list(entry.shape)}, which the array of this name cannot be"
            )

    def read(name: str) -> np.ndarray:
        value = container.read(name)
        entry = encoded.get(name)
        return decode(name, value, entry) if entry else value

    return Container({**container.entries, **encoded}, metadata, read)


def _parse_note(text: str) -> dict[str, Entry]:
    try:
        noted = JSON.decode(text)
        encoded = {
            name: Entry(entry["dtype"], tuple(entry["shape"]))
            for name, entry in noted.items()
            if isinstance(entry["dtype"], str)
            and isinstance(entry["shape"], list)
            # A bool is an int for isinstance.
            and {type(side) for side in entry["shape"]} <= {int}
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        noted, encoded = None, {}
    if noted is None or len(noted) != len(encoded):
        raise RefusedError(
            f"{ENCODED} in its metadata must be a JSON object of dtypes and "
            "shapes"
        )
    return encoded


def _stands_for(stored: Entry | None, entry: Entry) -> bool:
    if stored is None or entry.dtype != STRING:
        return stored is not None and stored == plain(entry, _EVERYWHERE)
    return (
        stored.dtype == "uint8"
        and len(stored.shape) == 1
        and stored.shape[0] >= 8 * math.prod(entry.shape)
    )
