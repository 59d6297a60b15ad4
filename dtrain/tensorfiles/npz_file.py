"""Archives of NumPy arrays, as `numpy.savez` writes them.

The metadata are one more array, `__metadata__`: uint8, the bytes of a JSON
object of texts.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, BinaryIO, NamedTuple

import numpy as np

from dtrain.tensorfiles import entries as entries_lib
from dtrain.tensorfiles.entries import Container, Entry, RefusedError

_METADATA = "__metadata__"
_SUFFIX = ".npy"
# Of an archive, and of one without members.
_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")
# What `zipfile` raises where an archive is not sound.
_MALFORMED = (
    *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError),
    *(OverflowError, RuntimeError, ValueError),
)
# The list of 200,000 members, which `zipfile` reads at once.
_MAX_READ_BYTES = 32 * 2**20
_CHUNK_BYTES = 2**20
# A megabyte may inflate to a gigabyte of zeros.
_MAX_INFLATED_BYTES = 512 * 2**20
_MAX_HEADER_BYTES = 1024
# As NumPy and all others write it: a stranger's text reaches no parser.
_HEADER = re.compile(
    r"\{'descr': '([<>|=][a-zA-Z]\d{1,2})', 'fortran_order': (True|False), "
    r"'shape': (\(\)|\((?:\d{1,19}, ?)*\d{1,19},?\)),? *\} *\n?"
)


class _Member(NamedTuple):
    """An array of the archive.

    Attributes:
        info: where it is in the archive.
        entry: its dtype and shape.
        dtype: as in the file, of either byte order.
        is_fortran: whether the first index runs fastest.
        header_bytes: before its values.
    """

    info: zipfile.ZipInfo
    entry: Entry
    dtype: np.dtype
    is_fortran: bool
    header_bytes: int


def write(
    file: BinaryIO,
    entries: Mapping[str, Entry],
    value: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes tensors, not compressed; see `containers.write`."""
    held = entries_lib.NUMPY_DTYPES
    noted = entries_lib.note(entries, metadata, held)
    with zipfile.ZipFile(file, "w") as archive:
        if noted:
            data = entries_lib.dumps(noted)
            _add(archive, _METADATA, np.frombuffer(data, np.uint8))
        for name, entry in entries.items():
            # A variable would hold it until the next one is read.
            _add(archive, name, entries_lib.encode(value(name), entry, held))


def _add(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    # With the time of day equal tensors would not be equal bytes.
    info = zipfile.ZipInfo(f"{name}{_SUFFIX}", (1980, 1, 1, 0, 0, 0))
    is_large = array.nbytes >= zipfile.ZIP64_LIMIT // 2
    with archive.open(info, "w", force_zip64=is_large) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


class _Bounded:
    """A file of which `zipfile` cannot read much at once.

    It would believe the archive, which says where its list is and how long.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell = file.tell
        self.seekable = file.seekable

    def seek(self, offset: int, whence: int = 0) -> int:
        """Seeks.

        Raises:
            BadZipFile: the offset is before the file.
        """
        if whence == os.SEEK_SET and offset < 0:
            raise zipfile.BadZipFile("a member is before its beginning")
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        """Reads some bytes, or all.

        Raises:
            BadZipFile: they are too many at once.
        """
        if size > _MAX_READ_BYTES:
            raise zipfile.BadZipFile(
                f"its list of members has more than {_MAX_READ_BYTES} bytes"
            )
        return self._file.read(_MAX_READ_BYTES if size < 0 else size)


@contextlib.contextmanager
def opened(path: str) -> Iterator[Container]:
    """Opens a local file; see `containers.open_file`.

    Raises:
        RefusedError: something in it is not of this format.
    """
    with open(path, "rb") as file, contextlib.ExitStack() as stack:
        # Unlike NumPy, `zipfile` would open a program or a picture with an
        # archive behind it.
        if file.read(4) not in _MAGICS:
            raise RefusedError("it is not a zip file")
        with _sound():
            archive = zipfile.ZipFile(_Bounded(file))
        stack.callback(archive.close)
        members = _members(archive, file.seek(0, os.SEEK_END))

        def read(name: str) -> np.ndarray:
            with _sound(name):
                return _read(name, archive, members[name])

        yield Container(
            {
                name: member.entry
                for name, member in members.items()
                if name != _METADATA
            },
            _metadata(read, members.get(_METADATA)),
            read,
        )


@contextlib.contextmanager
def _sound(name: str = "") -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # Python 3.13 only warns of entries that overlap.
            warnings.simplefilter("error", UserWarning)
            yield
    except (*_MALFORMED, UserWarning) as error:
        where = f" in {name[:80]!r}" if name else ""
        # The text may have a name of any length in it.
        raise RefusedError(f"{str(error)[:200]}{where}") from error


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, _Member]:
    infos = archive.infolist()
    if len(infos) > entries_lib.MAX_ENTRIES:
        raise RefusedError(f"it has {len(infos)} members")
    if sum(info.compress_size for info in infos) > size:
        raise RefusedError("its members have more bytes than it has")
    members: dict[str, _Member] = {}
    for info in infos:
        name = info.orig_filename.removesuffix(_SUFFIX)
        if name == info.orig_filename:
            raise RefusedError(f"{name[:80]!r} is no array of NumPy")
        if name in members:
            raise RefusedError(f"{name[:80]!r} is there twice")
        _check_packing(name, info)
        with _sound(name), archive.open(info) as stream:
            member = _parse(name, info, stream)
        if name != _METADATA:
            entries_lib.check(name, member.entry)
        members[name] = member
    return members


def _check_packing(name: str, info: zipfile.ZipInfo) -> None:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise RefusedError(
            f"{name[:80]!r} is compressed by method {info.compress_type}"
        )
    if info.compress_type == zipfile.ZIP_STORED:
        if info.file_size != info.compress_size:
            raise RefusedError(f"{name[:80]!r} has two sizes")
    elif info.file_size > _MAX_INFLATED_BYTES:
        raise RefusedError(
            f"{name[:80]!r} is compressed and says that it has "
            f"{info.file_size} bytes, where at most {_MAX_INFLATED_BYTES} are "
            "read",
            "write it with numpy.savez, which does not compress",
        )


def _parse(name: str, info: zipfile.ZipInfo, stream: IO[bytes]) -> _Member:
    # As numpy.lib.format describes it.
    magic = _exactly(stream, 8)
    version = magic[6]
    if magic[:6] != b"\x93NUMPY" or magic[7] or version not in (1, 2, 3):
        raise RefusedError(f"{name[:80]!r} is no array of NumPy")
    width = 2 if version == 1 else 4
    length = int.from_bytes(_exactly(stream, width), "little")
    if length > _MAX_HEADER_BYTES:
        raise RefusedError(f"{name[:80]!r} has a header of {length} bytes")
    text = _exactly(stream, length).decode("latin-1")
    match = _HEADER.fullmatch(text)
    if match is None:
        raise RefusedError(
            f"{name[:80]!r} has the header {text[:120]!r}, where bools, whole "
            "numbers, floats and complex ones are read",
        )
    descr, order, shape = match.groups()
    dtype = _dtype(name, descr)
    sides = tuple(int(side) for side in re.findall(r"\d+", shape))
    header = 8 + width + length
    if header + math.prod(sides) * dtype.itemsize != info.file_size:
        raise RefusedError(
            f"{name[:80]!r} has {info.file_size} bytes, and its header says "
            f"{dtype.name} {list(sides)}",
        )
    return _Member(
        info, Entry(dtype.name, sides), dtype, order == "True", header
    )


def _dtype(name: str, descr: str) -> np.dtype:
    with contextlib.suppress(TypeError):
        dtype = np.dtype(descr)
        if dtype.name in entries_lib.NUMPY_DTYPES:
            return dtype
    raise RefusedError(
        f"{name[:80]!r} is of type {descr}, where bools, whole numbers, "
        "floats and complex ones are read, and never pickles",
        "convert it to one of these",
    )


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise zipfile.BadZipFile("it is cut off")
    return data


def _read(name: str, archive: zipfile.ZipFile, member: _Member) -> np.ndarray:
    # In pieces, so that nothing else in memory is as large as the array.
    data = np.empty(member.info.file_size - member.header_bytes, np.uint8)
    with archive.open(member.info) as stream:
        _exactly(stream, member.header_bytes)
        for start in range(0, data.size, _CHUNK_BYTES):
            piece = data[start : start + _CHUNK_BYTES]
            piece[:] = np.frombuffer(_exactly(stream, piece.size), np.uint8)
        # This makes `zipfile` compare the checksum.
        if stream.read(1):
            raise zipfile.BadZipFile("it is longer than it says")
    array = data.view(member.dtype)
    native = member.dtype.newbyteorder("=")
    if native != member.dtype:
        array = array.byteswap(inplace=True).view(native)
    order = "F" if member.is_fortran else "C"
    array = array.reshape(member.entry.shape, order=order)
    return entries_lib.check_bools(name, array)


def _metadata(
    read: Callable[[str], np.ndarray], member: _Member | None
) -> dict[str, str]:
    if member is None:
        return {}
    dtype, shape = member.entry
    if (
        dtype != "uint8"
        or len(shape) != 1
        or shape[0] > entries_lib.MAX_METADATA_BYTES
    ):
        raise RefusedError(f"{_METADATA} is {dtype} {list(shape)}")
    try:
        value = entries_lib.JSON.decode(read(_METADATA).tobytes().decode())
    except (ValueError, RecursionError):
        raise RefusedError("its metadata must be JSON") from None
    if not isinstance(value, dict) or not all(
        isinstance(text, str) for text in value.values()
    ):
        raise RefusedError("its metadata must be a JSON object of texts")
    return value
