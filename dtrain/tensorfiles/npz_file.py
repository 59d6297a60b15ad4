"""Archives of NumPy arrays, as `numpy.savez` and others write them.

Members that are no arrays are passed over. The metadata are one more array,
`__metadata__`: uint8, the bytes of a JSON object of texts.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import tokenize
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
# NumPy evaluates it as a literal of Python, which is slow for much text.
_MAX_HEADER_BYTES = 1024
_METHODS = (
    *(zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
    *(zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA),
)
# Of LZMA's window, which is taken before anything is unpacked.
_MAX_WINDOW_BYTES = 128 * 2**20
# What NumPy raises for a header: of itself, of Python's parser, and of dtypes.
_UNREADABLE = (
    *(ValueError, tokenize.TokenError, SyntaxError, TypeError, KeyError),
    *(OverflowError, RecursionError),
)
# The last character of Unicode.
_LAST = 0x10FFFF
# Each is an object in memory, however short.
_MAX_STRINGS = 1_000_000


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
    with opened_zip(path) as archive:
        members = _members(archive)

        def read(name: str) -> np.ndarray:
            with sound(name):
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
def opened_zip(path: str) -> Iterator[zipfile.ZipFile]:
    """Opens a local archive that claims no more than its file can hold.

    Raises:
        RefusedError: it is none, or it claims more.
    """
    with open(path, "rb") as file, contextlib.ExitStack() as stack:
        # Unlike NumPy, `zipfile` would open a program or a picture with an
        # archive behind it.
        if file.read(4) not in _MAGICS:
            raise RefusedError("it is not a zip file")
        with sound():
            archive = zipfile.ZipFile(_Bounded(file))
        stack.callback(archive.close)
        infos = archive.infolist()
        if len(infos) > entries_lib.MAX_ENTRIES:
            raise RefusedError(f"it has {len(infos)} members")
        size = file.seek(0, os.SEEK_END)
        if sum(info.compress_size for info in infos) > size:
            raise RefusedError("its members have more bytes than it has")
        yield archive


@contextlib.contextmanager
def sound(name: str = "") -> Iterator[None]:
    """Says in one line what `zipfile` says of an archive that is damaged.

    Args:
        name: of the member that is read.

    Raises:
        RefusedError: it is.
    """
    try:
        with warnings.catch_warnings():
            # Python 3.13 only warns of entries that overlap.
            warnings.simplefilter("error", UserWarning)
            yield
    except (*_MALFORMED, UserWarning) as error:
        where = f" in {name[:80]!r}" if name else ""
        # The text may have a name of any length in it.
        raise RefusedError(f"{str(error)[:200]}{where}") from error


def _members(archive: zipfile.ZipFile) -> dict[str, _Member]:
    members: dict[str, _Member] = {}
    for info in archive.infolist():
        name = info.orig_filename.removesuffix(_SUFFIX)
        if name == info.orig_filename:
            continue
        if name in members:
            raise RefusedError(f"{name[:80]!r} is there twice")
        check_packing(name, info, archive)
        with sound(name), archive.open(info) as stream:
            member = _parse(name, info, stream)
        if name != _METADATA:
            entries_lib.check(name, member.entry)
        members[name] = member
    return members


def check_packing(
    name: str, info: zipfile.ZipInfo, archive: zipfile.ZipFile
) -> None:
    """Checks that a member can be unpacked, and into how much.

    Args:
        name: of the member.
        info: what the archive says of it.
        archive: that it is in.

    Raises:
        RefusedError: it cannot, or the archive does not say it twice alike.
    """
    if info.compress_type not in _METHODS:
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
            "write it without compression, as numpy.savez does",
        )
    if info.compress_type == zipfile.ZIP_LZMA:
        with sound(name):
            _check_window(name, info, archive)


def _check_window(
    name: str, info: zipfile.ZipInfo, archive: zipfile.ZipFile
) -> None:
    """Refuses a member for whose unpacking LZMA would take all memory.

    Raises:
        RefusedError: it is one.
    """
    assert archive.fp is not None
    archive.fp.seek(info.header_offset)
    head = _exactly(archive.fp, 30)
    # Behind the name and another field: a version, a length, a byte.
    skipped = int.from_bytes(head[26:28], "little")
    skipped += int.from_bytes(head[28:30], "little")
    window = _exactly(archive.fp, skipped + 9)[-4:]
    if int.from_bytes(window, "little") > _MAX_WINDOW_BYTES:
        raise RefusedError(f"{name[:80]!r} is packed with too large a window")


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
    text = _exactly(stream, length)
    head = io.BytesIO(length.to_bytes(4, "little") + text)
    try:
        with warnings.catch_warnings():
            # That Python 2 has written it.
            warnings.simplefilter("ignore")
            shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(head)
    except _UNREADABLE as error:
        raise RefusedError(
            f"{name[:80]!r} has the header {text.decode('latin-1')[:120]!r}, "
            "which NumPy cannot read"
        ) from error
    sides = tuple(map(int, shape))
    kind = _kind(name, dtype)
    header = 8 + width + length
    if header + math.prod(sides) * dtype.itemsize != info.file_size:
        raise RefusedError(
            f"{name[:80]!r} has {info.file_size} bytes, and its header says "
            f"{kind} {list(sides)}",
        )
    if kind == entries_lib.STRING and math.prod(sides) > _MAX_STRINGS:
        raise RefusedError(f"{name[:80]!r} has more than {_MAX_STRINGS} texts")
    return _Member(info, Entry(kind, sides), dtype, is_fortran, header)


def _kind(name: str, dtype: np.dtype) -> str:
    """Names the dtype of a tensor whose array has this one.

    Raises:
        RefusedError: there is none.
    """
    if dtype.kind in "SU" and dtype.itemsize:
        return entries_lib.STRING
    if dtype.name in entries_lib.NUMPY_DTYPES:
        return dtype.name
    raise RefusedError(
        f"{name[:80]!r} is of type {str(dtype)[:80]}, where bools, whole "
        "numbers, floats, complex numbers and texts are read, never pickles",
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
    # Of what is no character, Python's own error is none to be handled.
    if array.dtype.kind == "U" and array.view(np.uint32).max(initial=0) > _LAST:
        raise zipfile.BadZipFile("it has texts that are not Unicode")
    order = "F" if member.is_fortran else "C"
    array = array.reshape(member.entry.shape, order=order)
    if member.entry.dtype == entries_lib.STRING:
        return _texts(array)
    return entries_lib.check_bools(name, array)


def _texts(array: np.ndarray) -> np.ndarray:
    """Returns texts as a tensor of strings has them: bytes, of UTF-8."""
    texts = np.empty(array.size, object)
    for index, text in enumerate(array.reshape(-1).tolist()):
        texts[index] = text.encode() if isinstance(text, str) else text
    return texts.reshape(array.shape)


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
