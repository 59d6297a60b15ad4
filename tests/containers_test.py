"""Tensors go into files and come back, here and in other programs."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import hypothesis
import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dtrain import errors
from dtrain.tensorfiles import containers, entries
from dtrain.tensorfiles.containers import Entry
from tests import hostile_files, object_store, runs

SUFFIXES = (".safetensors", ".npz")
ML_DTYPES = (
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
    *("float8_e4m3b11fnuz", "float8_e5m2fnuz"),
    *("int4", "uint4", "int2", "uint2"),
)
# What the library calls what is in a file of it as it is.
CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}

Tensors = dict[str, np.ndarray]


def entry(value: np.ndarray) -> Entry:
    is_string = value.dtype == object
    return Entry("string" if is_string else value.dtype.name, value.shape)


def write(path: pathlib.Path | str, tensors: Tensors, **metadata: str) -> None:
    containers.write(
        str(path),
        {name: entry(value) for name, value in tensors.items()},
        tensors.__getitem__,
        metadata,
    )


def check_same(actual: np.ndarray, expected: np.ndarray) -> None:
    """Checks that two tensors have the same bits."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if expected.dtype == object:
        assert actual.tolist() == expected.tolist()
    else:
        assert actual.tobytes() == expected.tobytes()


@pytest.fixture
def place(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    yield tmp_path
    # Whatever happened, nothing half-written stays.
    assert not [path for path in tmp_path.iterdir() if "part" in path.name]


# What comes back.


@st.composite
def numbers(draw: st.DrawFn) -> np.ndarray:
    """Draws bits, so that there are all NaNs, of any dtype but strings."""
    name = draw(st.sampled_from([*sorted(entries.NUMPY_DTYPES), *ML_DTYPES]))
    dtype = entries.numpy_dtype(name)
    shape = draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0))
    count = int(np.prod(shape))
    if name == "bool" or name.startswith(("int2", "int4", "uint2", "uint4")):
        bits = draw(npst.arrays(np.uint8, count, elements=st.integers(0, 1)))
        return bits.astype(dtype).reshape(shape)
    size = count * dtype.itemsize
    bits = draw(st.binary(min_size=size, max_size=size))
    return np.frombuffer(bits, dtype).reshape(shape)


@st.composite
def strings(draw: st.DrawFn) -> np.ndarray:
    shape = draw(npst.array_shapes(min_dims=0, max_dims=2, min_side=0))
    made = np.empty(shape, object)
    for index in np.ndindex(*shape):
        made[index] = draw(st.binary(max_size=20))
    return made


TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20)
NAME = (
    st.lists(TEXT.filter(lambda part: part not in ("", ".", "..")))
    .map("/".join)
    .filter(entries._is_name)
)


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    st.dictionaries(NAME, numbers() | strings(), max_size=6),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), TEXT),
    st.sampled_from(SUFFIXES),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: Tensors,
    metadata: dict[str, str],
    suffix: str,
) -> None:
    place = tmp_path_factory.mktemp("round")
    path, again = place / f"a{suffix}", place / f"b{suffix}"
    write(path, tensors, **metadata)
    with containers.open_file(str(path)) as file:
        assert set(file.entries) == set(tensors)
        assert file.metadata == metadata
        for name, value in tensors.items():
            assert file.entries[name] == entry(value)
            check_same(file.read(name), value)
        containers.write(
            str(again),
            {name: file.entries[name] for name in tensors},
            file.read,
            file.metadata,
        )
    assert path.read_bytes() == again.read_bytes()


def test_the_order_of_elements_is_that_of_indices(place: pathlib.Path) -> None:
    value = np.arange(24).reshape(2, 3, 4)
    tensors = {
        "c": value,
        "fortran": np.asfortranarray(value),
        "transposed": value.T,
        "strided": value[:, ::2, ::-1],
    }
    for suffix in SUFFIXES:
        write(place / f"x{suffix}", tensors)
        with containers.open_file(f"{place}/x{suffix}") as file:
            for name, each in tensors.items():
                np.testing.assert_array_equal(file.read(name), each)


def test_arrays_of_other_machines_and_orders(place: pathlib.Path) -> None:
    value = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    arrays = {
        "big": value.astype(">i4"),
        "fortran": np.asfortranarray(value),
        "both": np.asfortranarray(value.astype(">c16")),
    }
    for name, save in (("a", np.savez), ("b", np.savez_compressed)):
        save(place / f"{name}.npz", **arrays)
        with containers.open_file(f"{place}/{name}.npz") as file:
            assert file.entries == {
                "big": Entry("int32", (2, 3, 4)),
                "fortran": Entry("int32", (2, 3, 4)),
                "both": Entry("complex128", (2, 3, 4)),
            }
            for each, array in arrays.items():
                read = file.read(each)
                assert read.dtype.isnative
                np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    "header",
    [
        "{'shape': (2, 3), 'fortran_order': False, 'descr': '<i4'}",
        '{"descr": "<i4", "fortran_order": False, "shape": (2, 3), }',
        "{'descr': '<i4', 'fortran_order': False, 'shape': (2L, 3L), }",
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_headers_as_others_write_them(
    header: str, version: int, place: pathlib.Path
) -> None:
    """In another order, other quotes, and as Python 2 wrote numbers."""
    value = np.arange(6, dtype=np.int32).reshape(2, 3)
    member = hostile_files.array(header, value.tobytes(), version)
    (place / "x.npz").write_bytes(hostile_files.packed(("a", member)))
    with containers.open_file(f"{place}/x.npz") as file:
        check_same(file.read("a"), value)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives_with_more_than_arrays_of_numbers(
    method: int, place: pathlib.Path
) -> None:
    words = np.array([["ab", "ü"], ["", "d"]])
    plain = np.array([b"a\x00b", b"\xff"])
    arrays = {"n": np.arange(9.0), "words": words, "plain": plain}
    with zipfile.ZipFile(place / "x.npz", "w", method) as archive:
        archive.writestr("README.txt", "how it was made")
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, array)
        archive.writestr("more/", "")
    with containers.open_file(f"{place}/x.npz") as file:
        assert set(file.entries) == set(arrays)
        check_same(file.read("n"), arrays["n"])
        assert file.entries["words"] == Entry("string", (2, 2))
        texts = [[b"ab", "ü".encode()], [b"", b"d"]]
        assert file.read("words").tolist() == texts
        assert file.read("plain").tolist() == [b"a\x00b", b"\xff"]


# What other programs make of it.

EVERYTHING: Tensors = {
    "scalar": np.array(3.5, np.float32),
    "layer/kernel": np.arange(6, dtype=np.float64).reshape(2, 3),
    "layer/bias": np.array([1, -2], ml_dtypes.bfloat16),
    "small": np.array([0.5, -2], ml_dtypes.float8_e4m3fn),
    "rare": np.array([0.5, -2], ml_dtypes.float8_e5m2fnuz),
    "mask": np.array([[True], [False]]),
    "none": np.zeros((0, 3), np.int8),
    "waves": np.array([1 + 2j, -3j], np.complex64),
    "words": np.array([b"ab", b"", b"\x00\xff"], object),
}


def test_numpy_opens_the_npz(place: pathlib.Path) -> None:
    write(place / "x.npz", EVERYTHING, step="7")
    with np.load(place / "x.npz", allow_pickle=False) as file:
        read = dict(file)
    metadata = json.loads(read.pop("__metadata__").tobytes())
    assert metadata["step"] == "7"
    encoded = json.loads(metadata["dtrain.encoded"])
    assert encoded == {
        "layer/bias": {"dtype": "bfloat16", "shape": [2]},
        "small": {"dtype": "float8_e4m3fn", "shape": [2]},
        "rare": {"dtype": "float8_e5m2fnuz", "shape": [2]},
        "words": {"dtype": "string", "shape": [3]},
    }
    words = read.pop("words")
    assert words.dtype == np.uint8
    assert words[:24].view("<i8").tolist() == [2, 0, 2]
    assert words[24:].tobytes() == b"ab\x00\xff"
    assert set(read) == set(EVERYTHING) - {"words"}
    for name, value in read.items():
        check_same(value.view(EVERYTHING[name].dtype), EVERYTHING[name])


def test_a_plain_npz_is_nothing_else(place: pathlib.Path) -> None:
    write(place / "x.npz", {"a": EVERYTHING["scalar"]})
    with np.load(place / "x.npz") as file:
        assert file.files == ["a"]


def test_the_library_opens_the_safetensors(place: pathlib.Path) -> None:
    path = place / "x.safetensors"
    write(path, EVERYTHING, step="7")
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
        check_same(file.get_tensor("layer/kernel"), EVERYTHING["layer/kernel"])
    assert metadata["step"] == "7"
    encoded = json.loads(metadata["dtrain.encoded"])
    assert encoded == {
        "rare": {"dtype": "float8_e5m2fnuz", "shape": [2]},
        "waves": {"dtype": "complex64", "shape": [2]},
        "words": {"dtype": "string", "shape": [3]},
    }
    for name, told in safetensors.deserialize(path.read_bytes()):
        value = EVERYTHING[name]
        if name in encoded:
            continue
        assert told["dtype"] == CODES[value.dtype.name]
        assert told["shape"] == list(value.shape)
        assert bytes(told["data"]) == value.tobytes()


def test_the_library_writes_and_it_is_read(place: pathlib.Path) -> None:
    path = place / "x.safetensors"
    tensors = {
        f"of/{name}": np.frombuffer(bytes(range(48)), np.uint8)
        .view(entries.numpy_dtype(name))
        .reshape(2, -1)
        for name in CODES
        if name != "bool"
    }
    tensors["of/bool"] = EVERYTHING["mask"]
    tensors["of/complex64"] = EVERYTHING["waves"]
    tensors["of/float8_e5m2fnuz"] = EVERYTHING["rare"]
    safetensors.numpy.save_file(tensors, path, {"by": "the library"})
    with containers.open_file(str(path)) as file:
        assert file.metadata == {"by": "the library"}
        assert set(file.entries) == set(tensors)
        for name, value in tensors.items():
            check_same(file.read(name), value)


@pytest.mark.parametrize(
    ("code", "data", "values"),
    [
        # The first number is in the lowest bits.
        ("F4", "20 d7", [0.0, 1.0, 6.0, -3.0]),
        ("F6_E2M3", "08 02 7e", [1.0, 1.0, -0.0, 7.5]),
        ("F6_E3M2", "0c f3 ef", [1.0, 1.0, -28.0, -14.0]),
        ("F8_E8M0", "7f 80 7d 00", [1.0, 2.0, 0.25, 2.0**-127]),
    ],
)
def test_numbers_narrower_than_a_byte(
    code: str, data: str, values: list[float], place: pathlib.Path
) -> None:
    packed = bytes.fromhex(data)
    end = len(packed)
    said = {"dtype": code, "shape": [2, 2], "data_offsets": [0, end]}
    other = {"dtype": "U8", "shape": [1], "data_offsets": [end, end + 1]}
    header = json.dumps({"a": said, "b": other}).encode()
    path = place / "x.safetensors"
    length = len(header).to_bytes(8, "little")
    path.write_bytes(length + header + packed + b"\7")
    with containers.open_file(str(path)) as file:
        expected = np.array(values, np.float32).reshape(2, 2)
        np.testing.assert_array_equal(file.read("a"), expected)
        assert file.read("b").tolist() == [7]


def test_the_weights_of_keras(place: pathlib.Path) -> None:
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, name="first"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2, dtype=keras.DTypePolicy("bfloat16")),
        ]
    )
    model.save_weights(place / "x.weights.h5")
    with containers.open_file(f"{place}/x.weights.h5") as file:
        assert file.metadata["layers/dense/vars"] == "first"
        layers = ("dense", "batch_normalization", "dense_1")
        expected = {
            f"layers/{layer}/vars/{number}": np.asarray(variable)
            for layer, of in zip(layers, model.layers, strict=True)
            for number, variable in enumerate(of.variables)
        }
        assert set(file.entries) == set(expected)
        for name, value in expected.items():
            check_same(file.read(name), value)
    # The same, in an archive and in several files.
    model.save(place / "x.keras")
    model.save_weights(place / "y.weights.json", max_shard_size=1e-7)
    assert len(list(place.glob("y*.h5"))) > 1
    for name in ("x.keras", "y.weights.json"):
        with containers.open_file(f"{place}/{name}") as file:
            assert set(expected) <= set(file.entries)
            assert file.metadata["layers/dense/vars"] == "first"
            for each, value in expected.items():
                check_same(file.read(each), value)
    next(place.glob("y*.h5")).unlink()
    with (
        pytest.raises(errors.UserError, match=r"its file y.*h5 is not beside"),
        containers.open_file(f"{place}/y.weights.json"),
    ):
        pass


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("", "no list of Keras"),
        ("[" * 10_000, "no list of Keras"),
        ('{"weight_map": {"a": [["b"]]}}', "no list of Keras"),
        ('{"weight_map": {"a": "../x.h5"}}', "'../x.h5', no file beside it"),
        ('{"weight_map": {"a": [""]}}', "'', no file beside it"),
    ],
)
def test_lists_of_files_that_keras_does_not_write(
    data: str, why: str, place: pathlib.Path
) -> None:
    (place / "x.weights.json").write_text(data)
    with (
        pytest.raises(errors.UserError, match=why),
        containers.open_file(f"{place}/x.weights.json"),
    ):
        pass


def test_hdf5_of_other_programs(place: pathlib.Path) -> None:
    value = np.arange(24).reshape(2, 3, 4)
    with h5py.File(place / "x.h5", "w") as file:
        file["big"] = value.astype(">f4")
        file["flags"] = value > 3
        file["scalar"] = np.float16(2)
        file["none"] = np.zeros((0, 3), np.complex64)
        # In chunks, the last of which are half outside.
        pieces = {"data": value, "chunks": (2, 2, 3)}
        file.create_dataset("chunks", **pieces)
        file.create_dataset("gzip", compression="gzip", shuffle=True, **pieces)
        file.create_dataset("lzf", compression="lzf", **pieces)
        file.create_dataset("unset", (3, 2), "f4", chunks=(1, 2), fillvalue=7)
        file.create_dataset("grows", (0, 2), "f4", maxshape=(None, 2))
    shutil.copy(place / "x.h5", place / "x.hdf5")
    with containers.open_file(f"{place}/x.hdf5") as read:
        for name in ("chunks", "gzip", "lzf"):
            check_same(read.read(name), value)
        check_same(read.read("unset"), np.full((3, 2), 7, np.float32))
        check_same(read.read("grows"), np.zeros((0, 2), np.float32))
    with containers.open_file(f"{place}/x.h5") as read:
        check_same(read.read("big"), value.astype(np.float32))
        check_same(read.read("flags"), value > 3)
        check_same(read.read("scalar"), np.array(2, np.float16))
        check_same(read.read("none"), np.zeros((0, 3), np.complex64))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"shape": (2**40,), "chunks": (2**20,)}, "when it is unpacked"),
        ({"data": ["a", "b"]}, "'a' holds texts, and not numbers"),
        ({"data": np.zeros(2, "f4,i4")}, "'void64' is not one of"),
        ({"shape": (2,)}, "has no bytes"),
        (
            {"shape": (4,), "external": [("elsewhere", 0, h5py.h5f.UNLIMITED)]},
            "in another file",
        ),
    ],
)
def test_hdf5_that_keras_does_not_write(
    place: pathlib.Path, options: Mapping[str, Any], why: str
) -> None:
    with h5py.File(place / "x.h5", "w") as file:
        file.create_dataset("a", **options)
    with (
        pytest.raises(errors.UserError, match=why),
        containers.open_file(f"{place}/x.h5"),
    ):
        pass


# How it is written.


def test_a_file_is_new_and_whole(place: pathlib.Path) -> None:
    def fail(name: str) -> np.ndarray:
        raise errors.StorageError(f"{name} cannot be read")

    for suffix in SUFFIXES:
        path = place / f"new/x{suffix}"
        with pytest.raises(errors.StorageError, match="a cannot"):
            containers.write(str(path), {"a": Entry("int8", ())}, fail)
        assert list(path.parent.iterdir()) == []
        write(path, {"a": EVERYTHING["scalar"]})
        before = path.read_bytes()
        with pytest.raises(errors.UserError, match="nothing is overwritten"):
            write(path, {"a": EVERYTHING["mask"]})
        assert path.read_bytes() == before
        path.unlink()


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        ("", Entry("int8", ()), "cannot name a tensor"),
        ("../a", Entry("int8", ()), "cannot name a tensor"),
        ("/a", Entry("int8", ()), "cannot name a tensor"),
        ("a\0b", Entry("int8", ()), "cannot name a tensor"),
        ("a\ud800", Entry("int8", ()), "cannot name a tensor"),
        ("__metadata__", Entry("int8", ()), "cannot name a tensor"),
        ("a", Entry("float128", ()), "is not one of"),
        ("a", Entry("int8", (2**61,)), "elements"),
    ],
)
def test_what_nobody_could_read_is_not_written(
    place: pathlib.Path, name: str, tensor: Entry, why: str
) -> None:
    for suffix in SUFFIXES:
        with pytest.raises(errors.UserError, match=why) as caught:
            containers.write(f"{place}/x{suffix}", {name: tensor}, np.zeros)
        assert "\n" not in str(caught.value)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "why"), [("\udc80", "UTF-8"), ("a" * 2**25, "at most 16777216")]
)
def test_metadata_that_nobody_could_read(
    place: pathlib.Path, text: str, why: str
) -> None:
    for suffix in SUFFIXES:
        with pytest.raises(errors.UserError, match=why):
            write(place / f"x{suffix}", EVERYTHING, about=text)
    assert list(place.iterdir()) == []


def test_other_suffixes(place: pathlib.Path) -> None:
    for name in ("x.pt", "x", "x.h5"):
        with pytest.raises(errors.UserError, match="must end in one of"):
            containers.write(f"{place}/{name}", {}, np.zeros)


STREAM = """
import sys

import numpy as np

from dtrain.tensorfiles import containers
from dtrain.tensorfiles.entries import Entry
from tests import hostile_files

NUM_TENSORS, NUM_BYTES = 8, 64 * 2**20


def value(name):
    return np.full(NUM_BYTES, int(name), np.uint8)


entry = Entry("uint8", (NUM_BYTES,))
entries = {str(number): entry for number in range(NUM_TENSORS)}
before = hostile_files.peak_bytes()
containers.write(sys.argv[1], entries, value)
with containers.open_file(sys.argv[1]) as file:
    for name in entries:
        array = file.read(name)
        assert array.min() == array.max() == int(name)
        del array
print((hostile_files.peak_bytes() - before) / NUM_BYTES)
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_tensor_at_a_time(place: pathlib.Path, suffix: str) -> None:
    code, output = runs.finish(
        subprocess.Popen(
            [sys.executable, "-c", STREAM, f"{place}/x{suffix}"],
            cwd=runs.ROOT,
            env=runs.environment(TF_CPP_MIN_LOG_LEVEL="3"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )
    assert code == 0, output
    # The buffer of numpy has 16 MiB, and is copied: the half of a tensor.
    assert float(output.splitlines()[-1]) < 1.9, output


# Elsewhere.


def round_trip(path: str) -> dict[str, Any]:
    """Writes and reads on a store; returns what came back."""
    tensors = {name: EVERYTHING[name] for name in ("scalar", "words")}
    write(path, tensors, step="7")
    with containers.open_file(path) as file:
        return {
            "step": file.metadata["step"],
            "scalar": float(file.read("scalar")),
            "words": [each.hex() for each in file.read("words")],
        }


def test_a_store() -> None:
    with (
        object_store.ObjectStore() as store,
        object_store.Client(runs.environment(**store.environment())) as client,
    ):
        for suffix in SUFFIXES:
            path = f"gs://bucket/x{suffix}"
            came_back = {"step": "7", "scalar": 3.5}
            came_back["words"] = ["6162", "", "00ff"]
            assert client.call(round_trip, path) == came_back
            with pytest.raises(object_store.Raised, match="overwritten"):
                client.call(round_trip, path)
