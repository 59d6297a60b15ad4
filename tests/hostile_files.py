"""Files that lie, and files that are damaged at random, in little memory.

    python -m tests.hostile_files npz 10000 0

reads all the lies, and then 10,000 mutations of a sound file, in a process
that may have 1 GiB. Each is read to the same tensors as other programs read,
or refused; nothing else, within seconds.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pathlib
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import numpy as np
import safetensors

from dtrain.tensorfiles import (
    entries,
    h5_file,
    h5_listing,
    keras_file,
    npz_file,
    safetensors_file,
)

MEMORY_BYTES = 2**30
CASE_SECS = 30

OPENED = {
    "safetensors": safetensors_file.opened,
    "npz": npz_file.opened,
    "h5": h5_file.opened,
    "keras": keras_file.opened_archive,
}

Make = Callable[[], bytes]


def read(kind: str, path: str) -> dict[str, np.ndarray]:
    """Reads all tensors of a file."""
    with OPENED[kind](path) as there:
        file = entries.with_decoded(there)
        return {name: file.read(name) for name in file.entries}


# Files of safetensors.


def sealed(header: object, data: bytes = b"", length: int = -1) -> bytes:
    """Makes a file of a header, as bytes or to be written as JSON."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    length = len(header) if length < 0 else length
    return length.to_bytes(8, "little") + header + data


def told(
    shape: object = (), start: object = 0, end: object = 1, dtype: str = "U8"
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def noted(note: object, *tensor: Any, data: bytes = b"\0" * 8) -> bytes:
    """Makes a file whose `a` is noted to be something else."""
    text = note if isinstance(note, str) else json.dumps(note)
    header = {"__metadata__": {"dtrain.encoded": text}}
    return sealed({**header, "a": told(*tensor)}, data)


ONE = b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}'
STRINGS = {"a": {"dtype": "string", "shape": [1]}}
# What the library lets pass ("^$") is read as the library does.
SAFETENSORS: dict[str, tuple[str, Make]] = {
    "nothing": ("must begin with", lambda: b""),
    "seven bytes": ("must begin with", lambda: b"\0" * 7),
    "no header": ("EOF while parsing", lambda: bytes(8)),
    "a length of 2^63": ("must begin", lambda: sealed(b"{}", length=2**63)),
    "a length of 2^64": ("must begin", lambda: sealed(b"{}", length=2**64 - 1)),
    "longer than itself": ("must begin", lambda: sealed(b"{}", length=3)),
    "no JSON": ("key must be a string", lambda: sealed(b"{hello}")),
    "a list": ("invalid type: sequence", lambda: sealed([])),
    "a space before": ("^$", lambda: sealed(b" {}")),
    "more after": ("trailing characters", lambda: sealed(b"{} {}")),
    "no end": ("EOF while parsing", lambda: sealed(ONE, b"0")),
    "a comma at the end": ("trailing comma", lambda: sealed(ONE + b",}", b"0")),
    "no colon": ("expected `:`", lambda: sealed(b'{"a" {}}')),
    "a number as a name": ("key must be a string", lambda: sealed(b"{1:2}")),
    "no UTF-8": ("invalid UTF-8", lambda: sealed(b'{"\xff":1}')),
    "a name twice": (
        "^$",
        lambda: sealed(ONE + b"," + ONE[1:] + b"}", b"0"),
    ),
    "a key twice": (
        "invalid JSON",
        lambda: sealed(b'{"a":{"dtype":1,"dtype":1}}'),
    ),
    "metadata twice": (
        "duplicate field",
        lambda: sealed(b'{"__metadata__":{},"__metadata__":{}}'),
    ),
    "metadata of numbers": (
        "expected a string",
        lambda: sealed({"__metadata__": {"a": 1}}),
    ),
    "no metadata": ("^$", lambda: sealed({"__metadata__": None})),
    "a key too many": (
        "^$",
        lambda: sealed({"a": {**told(), "b": 1}}, b"0"),
    ),
    "a key too few": ("missing field", lambda: sealed({"a": {}}, b"0")),
    "no tensor": ("invalid type: null", lambda: sealed({"a": None}, b"0")),
    "NaN": (
        "expected value",
        lambda: sealed({"a": told([float("nan")])}, b"0"),
    ),
    "Infinity": (
        "expected value",
        lambda: sealed({"a": told(end=float("inf"))}),
    ),
    "half a side": ("expected usize", lambda: sealed({"a": told([1.0])}, b"0")),
    "true as a side": (
        "expected usize",
        lambda: sealed({"a": told([True])}, b"0"),
    ),
    "a text as an offset": (
        "expected usize",
        lambda: sealed({"a": told(end="1")}),
    ),
    "a negative side": (
        "expected usize",
        lambda: sealed({"a": told([-1, -1])}),
    ),
    "more than NumPy counts": (
        "overflow",
        lambda: sealed({"a": told([2**32, 2**32], 0, 0)}),
    ),
    "zero times too many": (
        "elements",
        lambda: sealed({"a": told([0, 2**63], 0, 0)}),
    ),
    "a side of 4,000 digits": (
        "out of range",
        lambda: sealed({"a": told([10**3999], 0, 0)}),
    ),
    "33 sides": ("at most 32", lambda: sealed({"a": told([1] * 33)}, b"0")),
    "another size": ("invalid shape", lambda: sealed({"a": told([2])}, b"0")),
    "a negative offset": (
        "expected usize",
        lambda: sealed({"a": told([], -1, 0)}, b""),
    ),
    "the end first": ("invalid offset", lambda: sealed({"a": told([], 1, 0)})),
    "a tensor of 1 TB": (
        "not fully covered",
        lambda: sealed({"a": told([10**12], 0, 10**12)}),
    ),
    "two in one place": (
        "invalid offset",
        lambda: sealed({"a": told(), "b": told()}, b"0"),
    ),
    "an overlap": (
        "invalid offset",
        lambda: sealed({"a": told([2], 0, 2), "b": told([2], 1, 3)}, b"123"),
    ),
    "a gap": (
        "invalid offset",
        lambda: sealed({"a": told(), "b": told([], 2, 3)}, b"123"),
    ),
    "a gap before": (
        "invalid offset",
        lambda: sealed({"a": told([], 1, 2)}, b"12"),
    ),
    "bytes of nobody": (
        "not fully covered",
        lambda: sealed({"a": told()}, b"12"),
    ),
    "half a byte": ("^$", lambda: sealed({"a": told([2], dtype="F4")}, b"0")),
    "a long dtype": (
        "unknown variant",
        lambda: sealed({"a": told(dtype="U" * 999)}),
    ),
    "a bool of 2": (
        "bytes 0 or 1",
        lambda: sealed({"a": told(dtype="BOOL")}, b"\2"),
    ),
    "deep nesting": (
        "recursion limit",
        lambda: sealed(b'{"a":' + b"[" * 10**6),
    ),
    "deep metadata": (
        "expected a string",
        lambda: sealed(b'{"__metadata__":' + b'{"":' * 10**6),
    ),
    "a note that is none": (
        "dtypes and shapes",
        lambda: noted("[1]", data=b"0"),
    ),
    "a note that is no JSON": (
        "dtypes and shapes",
        lambda: noted("{", data=b"0"),
    ),
    "a deep note": ("dtypes and shapes", lambda: noted("[" * 10**5, data=b"0")),
    "a note of numbers": (
        "dtypes and shapes",
        lambda: noted({"a": 1}, data=b"0"),
    ),
    "a note of nobody": (
        "cannot be",
        lambda: noted({"b": STRINGS["a"]}, [8], 0, 8),
    ),
    "a note of another size": (
        "cannot be",
        lambda: noted({"a": {"dtype": "bfloat16", "shape": [4]}}, [8], 0, 8),
    ),
    "a note of many strings": (
        "cannot be",
        lambda: noted({"a": {"dtype": "string", "shape": [2**50]}}, [8], 0, 8),
    ),
    "a note of a million sides": (
        "at most 32",
        lambda: noted(
            {"a": {"dtype": "string", "shape": [9] * 10**6}}, [8], 0, 8
        ),
    ),
    "strings of less": (
        "add up",
        lambda: noted(STRINGS, [9], 0, 9, data=b"\0" * 9),
    ),
    "strings of more": (
        "add up",
        lambda: noted(STRINGS, [8], 0, 8, data=b"\1" * 8),
    ),
    "strings of -1": (
        "add up",
        lambda: noted(
            {"a": {"dtype": "string", "shape": [2]}},
            *([16], 0, 16),
            data=struct.pack("<qq", 1, -1),
        ),
    ),
    # What takes memory, or time.
    "100 MB of spaces": (
        "EOF while parsing",
        lambda: sealed(b"{" + b" " * 99_999_999),
    ),
    "100 MB of lists": (
        "too many sides",
        lambda: sealed(b'{"a":[' + b"[]," * 33_333_330),
    ),
    "100 MB of objects in metadata": (
        "too many sides",
        lambda: sealed(b'{"__metadata__":{"a":[' + b"{}," * 33_333_320),
    ),
    "16 MB of objects in metadata": (
        "expected a string",
        lambda: sealed(
            b'{"__metadata__":{"a":[' + b"{}," * 5_592_390 + b"{}]}}"
        ),
    ),
    "100 MB of a name": (
        "EOF while parsing",
        lambda: sealed(b'{"' + b"a" * 99_999_998),
    ),
    "100 MB of emoji": (
        "EOF while parsing",
        lambda: sealed(
            b'{"__metadata__":{"a":"' + b"\xf0\x9f\x98\x80" * 24_999_990
        ),
    ),
    "a million tensors": (
        "more than 500000",
        lambda: sealed(
            b"{"
            + b",".join(
                b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % number
                for number in range(10**6)
            )
            + b"}"
        ),
    ),
}
NAMES = {
    "no name": "",
    "a name above": "../a",
    "a name above others": "a/../../b",
    "a name that is here": "a/./b",
    "a name from the root": "/etc/passwd",
    "a name with a NUL": "a\0b",
    "a name with an escape": "a\x1b[2Jb",
    "a long name": "a" * 1025,
}
for case, name in NAMES.items():
    SAFETENSORS[case] = (
        "cannot name",
        lambda name=name: sealed({name: told()}, b"0"),
    )
SAFETENSORS["half a character"] = (
    "hex escape",
    lambda: sealed({"a\ud800": told()}, b"0"),
)


# Archives of NumPy.


def array(
    header: str | bytes = "", data: bytes = b"\0", version: int = 1
) -> bytes:
    """Makes the bytes of an .npy of a header."""
    header = header or described()
    if isinstance(header, str):
        header = header.encode("latin-1")
    width = 2 if version == 1 else 4
    length = len(header).to_bytes(width, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def described(descr: str = "'|u1'", shape: str = "()") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def packed(
    *members: tuple[str, bytes],
    method: int = 0,
    suffix: str = ".npy",
    **patch: Any,
) -> bytes:
    """Makes an archive whose list says something else of its last member."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(f"{name}{suffix}")
            info.compress_type = method
            with archive.open(info, "w") as member:
                member.write(data)
        for key, value in patch.items():
            setattr(archive.filelist[-1], key, value)
    return file.getvalue()


def renamed(name: bytes) -> bytes:
    """Makes an archive with a name that `zipfile` does not write."""
    here = b"x" * len(name)
    return packed((here.decode(), array())).replace(here, name)


def end_of(archive: bytes, at: int, kind: str, value: int) -> bytes:
    """Changes the record at the end of an archive."""
    made = bytearray(archive)
    struct.pack_into(kind, made, len(made) - 22 + at, value)
    return bytes(made)


SOUND = packed(("a", array()))
TERABYTES = 10 * 2**40
NPZ: dict[str, tuple[str, Make]] = {
    "nothing": ("not a zip", lambda: b""),
    "no archive": ("not a zip", lambda: b"PK" * 99),
    "something before": ("not a zip", lambda: b"#!/bin/sh\n" + SOUND),
    "half an archive": ("not a zip", lambda: SOUND[: len(SOUND) // 2]),
    "a name twice": (
        "twice",
        lambda: packed(("a", array()), ("b", array())).replace(b"b.", b"a."),
    ),
    "a name above": ("cannot name", lambda: packed(("../a", array()))),
    "a name from the root": ("cannot name", lambda: packed(("/a", array()))),
    "a name with a NUL": ("cannot name", lambda: renamed(b"a\0b")),
    "a name with an escape": ("cannot name", lambda: renamed(b"a\x1b[2Jb")),
    "no name": ("cannot name", lambda: packed(("", array()))),
    # What is no array is passed over.
    "no array": (
        "^$",
        lambda: packed(("ab", array())).replace(b"ab.npy", b"ab.txt"),
    ),
    "another magic": ("is no array", lambda: packed(("a", b"hello there"))),
    "an array cut off": ("cut off", lambda: packed(("a", array()[:20]))),
    "a version to come": (
        "is no array",
        lambda: packed(("a", array(version=4))),
    ),
    "a pickle": (
        "never pickles",
        lambda: packed(("a", array(described("'|O'"), b"cos\nsystem\n"))),
    ),
    "a pickle with a size": (
        "never pickles",
        lambda: packed(("a", array(described("'|O8'"), b"cos\nsystem\n"))),
    ),
    "no array but a pickle": (
        "is no array",
        lambda: packed(("a", b"\x80\x04cos\nsystem\n(S'id'\ntR.")),
    ),
    "half a text": (
        "its header says string",
        lambda: packed(("a", array(described("'<U1'")))),
    ),
    "texts of nothing": (
        "is of type",
        lambda: packed(("a", array(described("'<U0'", "(9999999,)"), b""))),
    ),
    "many texts": (
        "more than 1000000 texts",
        lambda: packed(
            ("a", array(described("'|S1'", "(1000001,)"), b"a" * 1_000_001)),
            method=zipfile.ZIP_DEFLATED,
        ),
    ),
    "no UTF-32": (
        "not Unicode",
        lambda: packed(("a", array(described("'<U1'"), b"\xff" * 4))),
    ),
    "a date": (
        "is of type",
        lambda: packed(("a", array(described("'<M8[s]'")))),
    ),
    "fields": (
        "is of type",
        lambda: packed(("a", array(described("[('a', '<f4')]")))),
    ),
    "a program": (
        "has the header",
        lambda: packed(("a", array(described("__import__('os')")))),
    ),
    "a deep header": (
        "has the header",
        lambda: packed(("a", array(described(shape="(" * 900)))),
    ),
    "a long header": (
        "a header of",
        lambda: packed(("a", array(" " * 4_000_000, version=2))),
    ),
    "33 sides": (
        "at most 32",
        lambda: packed(
            ("a", array(described(shape=f"({', '.join('1' * 33)})")))
        ),
    ),
    "a shape of 10 TB": (
        "its header says",
        lambda: packed(("a", array(described(shape=f"({TERABYTES},)")))),
    ),
    "a shape of nothing": (
        "elements",
        lambda: packed(
            ("a", array(described(shape="(0, 9999999999999999999)"), b""))
        ),
    ),
    "10 TB in little": (
        "at most 536870912",
        lambda: packed(
            ("a", array(described(shape=f"({TERABYTES},)"))),
            method=zipfile.ZIP_DEFLATED,
            file_size=TERABYTES + 80,
        ),
    ),
    "10 TB that are not there": (
        "more bytes than it has",
        lambda: packed(
            ("a", array(described(shape=f"({TERABYTES},)"))),
            file_size=TERABYTES + 80,
            compress_size=TERABYTES + 80,
        ),
    ),
    "two sizes": ("two sizes", lambda: packed(("a", array()), file_size=4)),
    "500 MB that do not come": (
        "cut off",
        lambda: packed(
            ("a", array(described(shape="(500000000,)"))),
            method=zipfile.ZIP_DEFLATED,
            file_size=500_000_000
            + len(array(described(shape="(500000000,)")))
            - 1,
        ),
    ),
    "another method": ("^$", lambda: packed(("a", array()), method=12)),
    "a window of 4 GB": (
        "too large a window",
        lambda: packed(("a", array()), method=14).replace(
            b"\x5d\0\0\x80\0", b"\x5d\xff\xff\xff\xff"
        ),
    ),
    "a method to come": (
        "by method 99",
        lambda: packed(("a", array()), compress_type=99),
    ),
    "a password": ("encrypted", lambda: packed(("a", array()), flag_bits=1)),
    "another checksum": ("CRC", lambda: packed(("a", array()), CRC=1)),
    "a place outside": (
        "Truncated",
        lambda: packed(("a", array()), header_offset=10**9),
    ),
    "a list of 40 MB": (
        "more than 33554432 bytes",
        lambda: end_of(
            end_of(
                (SOUND[:4] + bytes(40 << 20))[: 40 << 20] + SOUND[-22:],
                *(12, "<I", 40 << 20),
            ),
            *(16, "<I", 0),
        ),
    ),
    # Each release of Python has another word for these.
    "a list of 4 GB": (
        "zip|central",
        lambda: end_of(SOUND, 12, "<I", 2**32 - 2),
    ),
    "a list elsewhere": (
        "zip|central|before its beginning",
        lambda: end_of(SOUND, 16, "<I", 2**31),
    ),
    "a bool of 2": (
        "bytes 0 or 1",
        lambda: packed(("a", array(described("'|b1'"), b"\2"))),
    ),
    "metadata of floats": (
        "__metadata__ is",
        lambda: packed(
            ("__metadata__", array(described("'<f4'", "(1,)"), bytes(4)))
        ),
    ),
    "metadata that are no JSON": (
        "must be JSON",
        lambda: packed(("__metadata__", array(described(shape="(1,)")))),
    ),
    "metadata of numbers": (
        "object of texts",
        lambda: packed(("__metadata__", array(described(shape="(1,)"), b"1"))),
    ),
    "deep metadata": (
        "must be JSON",
        lambda: packed(
            (
                "__metadata__",
                array(described(shape="(1000000,)"), b"[" * 10**6),
            )
        ),
    ),
}


# Files of HDF5.


def grouped(fill: Callable[[h5py.File], object]) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as group:
        fill(group)
    return file.getvalue()


def _patched() -> bytes:
    """Makes two datasets, the second of which says it is where the first is."""
    places = {}

    def fill(group: h5py.File) -> None:
        for name in ("a", "b"):
            group[name] = np.arange(64.0)
        group.flush()
        for name in ("a", "b"):
            places[name] = group[name].id.get_offset()

    made = grouped(fill)
    first, second = (struct.pack("<Q", places[name]) for name in ("a", "b"))
    assert made.count(second) == 1
    return made.replace(second, first)


def _endless() -> bytes:
    """Makes a heap of texts whose first one is free and of no bytes."""
    made = bytearray(sound("h5"))
    at = made.index(b"GCOL") + 16
    made[at : at + 24] = bytes(24)
    return bytes(made)


def _odd(group: h5py.File) -> None:
    """Writes floats whose exponent counts from another number."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(100)
    space = h5py.h5s.create_simple((2,))
    dataset = h5py.h5d.create(group.id, b"a", kind, space)
    everywhere = h5py.h5s.ALL
    dataset.write(everywhere, everywhere, np.ones(2, np.float32))


H5: dict[str, tuple[str, Make]] = {
    "odd floats": ("not quite", lambda: grouped(_odd)),
    # libhdf5 1.14 goes round in it.
    "a loop": ("HDF5|heap", _endless),
    "nothing": ("HDF5|file signature", lambda: b""),
    "no HDF5": ("file signature", lambda: b"hello" * 999),
    "half a file": ("truncated", lambda: sound("h5")[:2000]),
    "in pieces": (
        "^$",
        lambda: grouped(lambda f: f.create_dataset("a", (9,), chunks=(3,))),
    ),
    "a petabyte of nothing": (
        "no bytes",
        lambda: grouped(lambda f: f.create_dataset("a", (2**50,), "u1")),
    ),
    "a petabyte in pieces": (
        "when it is unpacked",
        lambda: grouped(
            lambda f: f.create_dataset("a", (2**50,), "u1", chunks=(2**20,))
        ),
    ),
    "4 GB in a piece": (
        "cannot be unpacked",
        lambda: grouped(
            lambda f: f.create_dataset(
                "a", (2**31,), "u1", chunks=(2**31,), compression="gzip"
            )
        ),
    ),
    "elsewhere": (
        "in another file",
        lambda: grouped(
            lambda f: f.create_dataset(
                "a", (9,), external=[("/etc/passwd", 0, 72)]
            )
        ),
    ),
    "texts": (
        "holds texts",
        lambda: grouped(lambda f: f.create_dataset("a", data=["b"])),
    ),
    "a name that is no path": (
        "cannot name",
        lambda: grouped(lambda f: f.create_dataset("a/..", data=1.0)),
    ),
    "two in one place": ("overlap", _patched),
}


# Archives of Keras.

WEIGHTS = "model.weights.h5"


def archived(weights: bytes, name: str = WEIGHTS, **patch: Any) -> bytes:
    return packed((name, weights), suffix="", **patch)


KERAS: dict[str, tuple[str, Make]] = {
    "nothing": ("not a zip", lambda: b""),
    "no weights": ("has no model", lambda: archived(b"", "config.json")),
    "no HDF5": ("file signature", lambda: archived(b"hello" * 999)),
    "10 TB in little": (
        "at most 536870912",
        lambda: archived(b"0", method=8, file_size=TERABYTES),
    ),
    "weights elsewhere": (
        "has no model",
        lambda: archived(sound("h5"), f"../{WEIGHTS}"),
    ),
    "another checksum": ("CRC", lambda: archived(sound("h5"), CRC=1)),
}
LIES = {"safetensors": SAFETENSORS, "npz": NPZ, "h5": H5, "keras": KERAS}


# Damage.


def sound(kind: str) -> bytes:
    """Makes a sound file with one of everything."""
    tensors: dict[str, np.ndarray] = {
        "scalar": np.array(3.5, np.float32),
        "layer/kernel": np.arange(6, dtype=np.float64).reshape(2, 3),
        "layer/bias": np.array([1, -2]).astype(entries.numpy_dtype("bfloat16")),
        "mask": np.array([[True], [False]]),
        "none": np.zeros((0, 3), np.int8),
    }
    if kind == "h5":

        def fill(group: h5py.File) -> None:
            for name, value in tensors.items():
                group[f"layers/{name}/vars/0"] = value
                group[f"layers/{name}/vars"].attrs["name"] = name
                if value.dtype.name == "bfloat16":
                    # As Keras does.
                    dataset = group[f"layers/{name}/vars/0"]
                    dataset.attrs["dtype"] = "bfloat16"
            group.create_dataset(
                *("packed", (5, 3), "f4", np.arange(15.0).reshape(5, 3)),
                chunks=(2, 3),
                compression="gzip",
            )

        return grouped(fill)
    if kind == "keras":
        return packed(
            *(("config.json", b"{}"), (WEIGHTS, sound("h5"))), suffix=""
        )
    tensors["waves"] = np.array([1 + 2j, -3j], np.complex64)
    tensors["words"] = np.array([b"ab", b"", b"\x00\xff"], object)
    told = {
        name: entries.Entry(
            "string" if value.dtype == object else value.dtype.name, value.shape
        )
        for name, value in tensors.items()
    }
    file = io.BytesIO()
    module = npz_file if kind == "npz" else safetensors_file
    module.write(file, told, tensors.__getitem__, {"step": "7"})
    return file.getvalue()


NUMBERS = tuple(
    struct.pack(f"<{kind}", value % 2**bits)
    for kind, bits in (("H", 16), ("I", 32), ("Q", 64))
    for value in (0, 1, -1, 2**15, 2**31, 2**63, 2**62 + 1, 10**6)
)
WORDS = tuple(b'{}[]":,-09\\"NaN"null"U8""F64"1e9\xff\0()\'<|f8O')


def damaged(data: bytes, random_: random.Random) -> bytes:
    """Changes a file in one to four places."""
    made = bytearray(data)
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        at = random_.randrange(len(made) + 1)
        end = min(len(made), at + random_.choice((1, 4, 8, 40)))
        kind = random_.randrange(7)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << random_.randrange(8)
        elif kind == 1 and at < len(made):
            made[at] = random_.choice(WORDS)
        elif kind == 2:
            number = random_.choice(NUMBERS)
            made[at : at + len(number)] = number
        elif kind == 3:
            del made[at:end]
        elif kind == 4:
            made[at:at] = made[random_.randrange(len(made) + 1) :][: end - at]
        elif kind == 5:
            start = random_.randrange(len(made) + 1)
            made[at:end] = made[start : start + end - at]
        elif kind == 6 and not random_.randrange(4):
            del made[at:]
    return bytes(made)


def repacked(data: bytes, random_: random.Random) -> bytes:
    """Damages an array of an archive, whose checksums then are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [
            (each.filename.removesuffix(".npy"), archive.read(each))
            for each in archive.infolist()
        ]
    at = random_.randrange(len(members))
    name, content = members[at]
    head = content.index(b"\n") + 1
    # Mostly what says something.
    if random_.randrange(4):
        content = damaged(content[:head], random_) + content[head:]
    else:
        content = content[:head] + damaged(content[head:], random_)
    members[at] = (name, content)
    return packed(*members, method=random_.choice((0, 8, 12, 14)))


def mutations(kind: str, number: int, seed: int) -> Iterator[bytes]:
    random_ = random.Random(seed)
    data = sound(kind)
    for _ in range(number):
        if kind == "npz" and random_.randrange(2):
            yield repacked(data, random_)
        elif kind == "keras" and random_.randrange(2):
            # Whose checksum is right.
            yield archived(damaged(sound("h5"), random_))
        else:
            yield damaged(data, random_)


# What other programs make of what is read.


def check_like_library(data: bytes, tensors: dict[str, np.ndarray]) -> None:
    there = dict(safetensors.deserialize(data))
    assert there.keys() == tensors.keys()
    for name, each in there.items():
        is_wider = each["dtype"] in safetensors_file._NARROW
        if tensors[name].dtype != object and not is_wider:
            assert bytes(each["data"]) == tensors[name].tobytes(), name


def check_like_numpy(data: bytes, tensors: dict[str, np.ndarray]) -> None:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        members = {*file.zip.namelist()}
        arrays = {name for name in file.files if f"{name}.npy" in members}
        assert arrays - {"__metadata__"} == tensors.keys()
        for name, value in tensors.items():
            if value.dtype != object:
                # Which is of the other byte order, where the file is.
                there = file[name]
                there = there.astype(there.dtype.newbyteorder("="))
                assert there.tobytes() == value.tobytes(), name


def check_like_h5py(data: bytes, tensors: dict[str, np.ndarray]) -> None:
    def there(path: str) -> dict[str, str]:
        with h5py.File(path) as file:
            return {
                name: np.asarray(file[name]).tobytes().hex() for name in tensors
            }

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        # Or it fails itself, where the bytes are all there.
        with contextlib.suppress(entries.RefusedError):
            for name, expected in forked(there, file.name).items():
                assert expected == tensors[name].tobytes().hex(), name


def check_like_keras(data: bytes, tensors: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        check_like_h5py(archive.read(WEIGHTS), tensors)


CHECKS = {
    "safetensors": check_like_library,
    "npz": check_like_numpy,
    "h5": check_like_h5py,
    "keras": check_like_keras,
}


def forked(function: Callable[[str], Any], path: str) -> Any:
    """Calls a function in a fork, as `h5_file.look` does in a process.

    It takes milliseconds, so that there can be many.
    """
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        os.close(source)
        h5_listing.limit(path)
        with os.fdopen(sink, "w") as file:
            try:
                file.write(json.dumps({"made": function(path)}))
            # Whatever it is, the process ends here.
            except Exception as error:  # noqa: BLE001
                json.dump({"raised": str(error).split("\n")[0]}, file)
        os._exit(0)
    os.close(sink)
    with os.fdopen(source) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise entries.RefusedError("HDF5 does not come to an end, or crashes")
    answer = json.loads(text)
    if "raised" in answer:
        raise entries.RefusedError(answer["raised"])
    return answer["made"]


def attempt(kind: str, path: pathlib.Path, data: bytes) -> str:
    """Reads a file; returns what came of it, in a word or a line."""
    path.write_bytes(data)
    signal.alarm(CASE_SECS)
    try:
        tensors = read(kind, str(path))
    except entries.RefusedError as error:
        return str(error)
    finally:
        signal.alarm(0)
    CHECKS[kind](data, tensors)
    return ""


def peak_bytes() -> int:
    """Returns the most memory that this process had at once."""
    # Not `ru_maxrss`, which begins with that of the parent.
    status = pathlib.Path("/proc/self/status").read_text()
    [kib] = re.findall(r"VmHWM:\s*(\d+) kB", status)
    return 1024 * int(kib)


def main(kind: str, number: int, seed: int) -> None:
    """Reads all; prints what came of it, and what it took."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    h5_file.look = lambda path, unpacked: forked(
        lambda path: h5_listing.listing(path, unpacked), path
    )
    began = time.monotonic()
    outcomes = collections.Counter(read=0, refused=0, crashes=0)
    with tempfile.TemporaryDirectory() as place:
        path = pathlib.Path(place) / f"x.{kind}"
        said_of_lies = {
            case: attempt(kind, path, make())
            for case, (_, make) in LIES[kind].items()
        }
        for data in mutations(kind, number, seed):
            said = attempt(kind, path, data)
            assert "\n" not in said
            outcomes["refused" if said else "read"] += 1
            outcomes["crashes"] += said.startswith("HDF5")
    print(
        json.dumps(
            {
                "lies": said_of_lies,
                **outcomes,
                "secs": round(time.monotonic() - began),
                "peak_mib": peak_bytes() >> 20,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
