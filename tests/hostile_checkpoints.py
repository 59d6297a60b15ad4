"""Checkpoints that lie, and checkpoints that are damaged at random.

    python -m tests.hostile_checkpoints index 10000 0

reads the lies, and then 10,000 mutations of one file of a sound checkpoint.
Each is read to what it was, or refused in a line; nothing else, within seconds,
in 1 GiB with all of TensorFlow.
"""

from __future__ import annotations

import json
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import tensor_bundle_pb2
from tensorflow.core.util.saved_tensor_slice_pb2 import SavedTensorSlices

from dtrain.bundle import index
from dtrain.bundle.tree import Tensor, of_names
from dtrain.checkpoint import listing, opening, writing
from dtrain.errors import UserError
from dtrain.toolbox import interchange, parsing
from tests import foreign_formats
from tests.hostile_files import peak_bytes

CASE_SECS = 30
DATA = "data-00000-of-00001"

Entry = tensor_bundle_pb2.BundleEntryProto
Header = tensor_bundle_pb2.BundleHeaderProto


# An index, as TensorFlow writes it, with checksums that are right: random
# damage never gets behind them.


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    return ((rotated + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def varint(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    made.append(value)
    return bytes(made)


def block(entries: Mapping[bytes, bytes]) -> bytes:
    content = b"".join(
        b"\0" + varint(len(key)) + varint(len(value)) + key + value
        for key, value in sorted(entries.items())
    )
    return content + (0).to_bytes(4, "little") + (1).to_bytes(4, "little")


def table(entries: Mapping[bytes, bytes], kind: bytes = b"\0") -> bytes:
    file, handles = b"", []
    index = b""
    for content in (block(entries), block({})):
        handles.append(varint(len(file)) + varint(len(content)))
        file += content + kind + masked_crc(content + kind)
    index = block({b"\xff": handles[0]})
    handles.append(varint(len(file)) + varint(len(index)))
    file += index + b"\0" + masked_crc(index + b"\0")
    footer = (handles[1] + handles[2]).ljust(40, b"\0")
    return file + footer + (0xDB4775248B80FB57).to_bytes(8, "little")


def parse(data: bytes) -> dict[bytes, bytes]:
    return dict(index.entries(data))


def edited(
    sound: bytes, change: Callable[[Entry], None], key: str = "a"
) -> bytes:
    entries = parse(sound)
    name = f"{key}/.ATTRIBUTES/VARIABLE_VALUE".encode()
    entry = Entry.FromString(entries[name])
    change(entry)
    entries[name] = entry.SerializeToString()
    return table(entries)


def _dim(*sizes: int) -> Callable[[Entry], None]:
    def change(entry: Entry) -> None:
        del entry.shape.dim[:]
        for size in sizes:
            entry.shape.dim.add(size=size)

    return change


def _set(**fields: int) -> Callable[[Entry], None]:
    def change(entry: Entry) -> None:
        for name, value in fields.items():
            setattr(entry, name, value)

    return change


def _slice(entry: Entry) -> None:
    _dim(1 << 40)(entry)
    entry.slices.add().extent.add(start=0, length=2)


def _with_header(sound: bytes, header: Header | None) -> bytes:
    entries = parse(sound)
    entries.pop(b"")
    if header:
        entries[b""] = header.SerializeToString()
    return table(entries)


LIES: dict[str, Callable[[bytes], bytes]] = {
    "a dimension below zero": lambda x: edited(x, _dim(-1, 3)),
    "a product below zero": lambda x: edited(x, _dim(-2, -3)),
    "a terabyte": lambda x: edited(x, _dim(1 << 38)),
    "more than can be counted": lambda x: edited(x, _dim(1 << 62, 1 << 62)),
    "nothing of a lot": lambda x: edited(x, _dim(0, 1 << 62, 1 << 62)),
    "300 dimensions": lambda x: edited(x, _dim(*[1] * 300)),
    "no dtype": lambda x: edited(x, _set(dtype=0)),
    "a dtype of the future": lambda x: edited(x, _set(dtype=250)),
    "another dtype": lambda x: edited(x, _set(dtype=2)),
    "an iterator": lambda x: edited(x, _set(dtype=21)),
    "another file": lambda x: edited(x, _set(shard_id=7)),
    "a file below zero": lambda x: edited(x, _set(shard_id=-1)),
    "beyond the end": lambda x: edited(x, _set(offset=1 << 40)),
    "before the start": lambda x: edited(x, _set(offset=-8)),
    "a size below zero": lambda x: edited(x, _set(size=-8)),
    "a terabyte of strings": lambda x: edited(x, _dim(1 << 38), "texts"),
    "a terabyte in slices": lambda x: edited(x, _slice),
    "no header": lambda x: _with_header(x, None),
    "two billion files": lambda x: _with_header(
        x, Header(num_shards=2**31 - 1)
    ),
    "no files": lambda x: _with_header(x, Header(num_shards=0)),
    "compressed": lambda x: table(parse(x), b"\1"),
    "no end": lambda x: x[:-8],
    "nothing": lambda x: x[:0],
    "a block beyond the end": lambda x: (
        x[:-48] + (varint(2**40) * 4).ljust(40, b"\0") + x[-8:]
    ),
}


# What a file of V1 says of its tensors, likewise.


def described(change: Callable[[SavedTensorSlices], None]) -> Callable:
    def lie(sound: bytes) -> bytes:
        entries = parse(sound)
        slices = SavedTensorSlices.FromString(entries[b""])
        change(slices)
        entries[b""] = slices.SerializeToString()
        return table(entries)

    return lie


def _side(slices: SavedTensorSlices, size: int) -> None:
    slices.meta.tensor[0].shape.dim[0].size = size


V1_LIES: dict[str, Callable[[bytes], bytes]] = {
    "a side below 0": described(lambda slices: _side(slices, -1)),
    "a terabyte": described(lambda slices: _side(slices, 2**40)),
    "less than its parts": described(lambda slices: _side(slices, 1)),
    "a part outside": described(
        lambda slices: setattr(
            slices.meta.tensor[0].slice[0].extent[0], "start", 99
        )
    ),
    "a part twice": described(
        lambda slices: (
            slices.meta.tensor[0]
            .slice.add()
            .CopyFrom(slices.meta.tensor[0].slice[0])
        )
    ),
    "a part that is not there": described(
        lambda slices: slices.meta.tensor.add(name="zz").slice.add()
    ),
    "no header": lambda _: table({b"a": b"b"}),
    "a header of something else": lambda _: table({b"": b"\xff" * 9}),
    "compressed": lambda x: table(parse(x), b"\1"),
}


def write_sound(directory: str) -> str:
    """Writes a checkpoint of some small tensors, with a manifest."""
    values = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b/c": np.arange(40, dtype=np.int64),
        "texts": np.array([b"one", b"", b"three"], object),
    }
    dtypes = {"a": "float32", "b/c": "int64", "texts": "string"}
    tree = of_names(
        {
            name: Tensor(dtypes[name], value.shape, lambda value=value: value)
            for name, value in values.items()
        }
    )
    writing.commit(tree, f"{directory}/ckpt-1")
    return f"{directory}/ckpt-1"


YAML = (
    b"- rename: {gen: generator, 'a b': c}\n"
    b"- drop: [discriminator, 'd*']\n- cast: {generator: bfloat16}\n"
    b"- set: &x {step: 5, v: [1.5, 2.0e-3]}\n- fill: *x\n- set_step: 0\n"
)
YAML_LIES = {
    "a billion laughs": b"- &a [x, x]\n"
    + b"".join(
        b"- &%c [*%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c]\n"
        % (98 + n, *[97 + n] * 9)
        for n in range(20)
    ),
    "deeper than can be": b"[" * 100_000,
    "deep flow maps": b"{a: " * 50_000,
    "a program": b"!!python/object/apply:os.system ['touch /tmp/x']\n",
    "long": b"- drop: " + b"x" * (5 << 20),
    "a list in itself": b"&a [*a]\n",
    "a map in itself": b"- &a {rename: *a}\n",
    "no text": b"\xff\xfe\x00",
    "a number of many figures": b"- set_step: 1" + b"0" * 100_000,
}


def mutations(sound: bytes, number: int, seed: int) -> Iterator[bytes]:
    """Yields files with bytes that are flipped, cut, moved or made anew."""
    chance = random.Random(seed)
    for _ in range(number):
        data = bytearray(sound)
        for _ in range(chance.choice((1, 1, 1, 2, 8))):
            where = chance.randrange(len(data) + 1)
            length = chance.choice((1, 1, 2, 8, 64))
            what = chance.randrange(5)
            if what == 0 and where < len(data):
                data[where] ^= 1 << chance.randrange(8)
            elif what == 1:
                del data[where : where + length]
            elif what == 2:
                data[where:where] = chance.randbytes(length)
            elif what == 3:
                data[where : where + length] = chance.choice(
                    (b"\xff", b"\0", b"\x80")
                ) * min(length, len(data) - where)
            else:
                start = chance.randrange(len(data) + 1)
                data[where:where] = data[start : start + length]
            data = data or bytearray(b"\0")
        yield bytes(data)


def read_checkpoint(prefix: str) -> None:
    """Does with a checkpoint what the tool does with it."""
    listing.find(str(pathlib.Path(prefix).parent))
    with opening.opened(prefix) as found:
        for name in found.tree:
            found.tree[name].read()


def read_yaml(data: bytes) -> None:
    interchange.read_map(data, "x.yaml")


def read_edits(data: bytes) -> None:
    wishes = parsing.load(data, "x.yaml")
    parsing.make(
        [wish for wish in wishes if wish.verb != "copy"], lambda _: of_names({})
    )


def attempt(read: Callable[[], None]) -> str:
    """Reads; returns what is said to the user, or nothing if it was read."""
    signal.alarm(CASE_SECS)
    try:
        read()
    except UserError as error:
        said = str(error)
        assert said
        assert "\n" not in said, said
        return said
    finally:
        signal.alarm(0)
    return ""


def _to_be_changed(kind: str, prefix: str) -> tuple[pathlib.Path, str]:
    """Returns the file that is damaged, and the prefix of its checkpoint."""
    if kind == "v1":
        directory = f"{pathlib.Path(prefix).parent}/v1"
        prefix, _ = foreign_formats.tensorflow_0(directory)
        return pathlib.Path(prefix), prefix
    suffix = {"index": "index", "data": DATA, "manifest": "json"}[kind]
    path = pathlib.Path(f"{prefix}.{suffix}")
    if kind == "index":
        # Of a program that keeps no manifest.
        pathlib.Path(f"{prefix}.json").unlink()
        path.write_bytes(table(parse(path.read_bytes())))
    return path, prefix


def main(kind: str, number: int, seed: int) -> None:
    began = time.monotonic()
    outcomes = {"read": 0, "refused": 0}
    lies: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        prefix = write_sound(directory)
        assert not attempt(lambda: read_checkpoint(prefix))
        if kind == "yaml":
            assert not attempt(lambda: read_edits(YAML))
            for case, data in YAML_LIES.items():
                lies[case] = attempt(lambda data=data: read_edits(data))
                attempt(lambda data=data: read_yaml(data))
            for data in mutations(YAML, number, seed):
                said = attempt(lambda data=data: read_edits(data))
                attempt(lambda data=data: read_yaml(data))
                outcomes["refused" if said else "read"] += 1
        else:
            path, found = _to_be_changed(kind, prefix)
            sound = path.read_bytes()
            assert not attempt(lambda: read_checkpoint(found))
            of_kind = {"index": LIES, "v1": V1_LIES}.get(kind, {})
            for case, lie in of_kind.items():
                path.write_bytes(lie(sound))
                lies[case] = attempt(lambda: read_checkpoint(found))
            for data in mutations(sound, number, seed):
                path.write_bytes(data)
                said = attempt(lambda: read_checkpoint(found))
                outcomes["refused" if said else "read"] += 1
    peak = peak_bytes() >> 20
    secs = round(time.monotonic() - began)
    print(
        json.dumps({"lies": lies, **outcomes, "secs": secs, "peak_mib": peak})
    )


if __name__ == "__main__":
    tf.get_logger().setLevel("ERROR")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
