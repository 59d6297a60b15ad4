"""Every kind of data set, and every way in which one can be wrong."""

from __future__ import annotations

import contextlib
import gzip
import io
import pathlib
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dtrain import store
from dtrain.config import Config
from dtrain.data import digits, sources
from dtrain.data.digits import builder, make
from dtrain.data.sources import (
    conversion,
    idx,
    memory,
    npz,
    pictures,
    preparation,
)
from dtrain.errors import UserError
from dtrain.storage import host_memory
from tests import requirement, runs

FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")
GREY = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4, 1)
LABELS = np.array([1, 0, 2, 1, 0], np.int32)


def open_source(**fields: Any) -> sources.Source:
    return sources.open_source(Config(**fields))


def error_line(**fields: Any) -> str:
    """Returns the line of the UserError that opening must end in."""
    with pytest.raises(UserError) as raised:
        open_source(**fields)
    line = str(raised.value)
    assert "\n" not in line
    return line


def read_all(source: sources.Source) -> tuple[np.ndarray, np.ndarray]:
    indices = tf.range(source.num_images, dtype=tf.int64)
    images, labels = source.read(indices)
    assert images.dtype == tf.uint8
    assert labels.dtype == tf.int32
    return images.numpy(), labels.numpy()


def png(image: np.ndarray) -> bytes:
    return tf.io.encode_png(image).numpy()


def idx_bytes(array: np.ndarray) -> bytes:
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return head + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_dir(tmp_path: pathlib.Path) -> pathlib.Path:
    images = tmp_path / "train-images-idx3-ubyte"
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    images.write_bytes(idx_bytes(GREY[..., 0]))
    labels.write_bytes(gzip.compress(idx_bytes(LABELS)))
    return tmp_path


@pytest.fixture
def classes(tmp_path: pathlib.Path) -> pathlib.Path:
    for number, (image, label) in enumerate(zip(GREY, LABELS, strict=True)):
        folder = tmp_path / f"class_{label}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(image))
    return tmp_path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory in which the digits are prepared."""
    path = str(tmp_path_factory.mktemp("data"))
    open_source(data_dir=path)
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("there is no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(f"socket.socket.{name}", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


# Conversion.


@pytest.mark.parametrize(
    "shape", [(6, 4, 1), (2, 6, 4, 3), (4, 6, 4), (4, 4, 2)]
)
@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("image_size", [0, 2, 8])
def test_convert_gives_the_shape_it_promises(
    shape: tuple[int, ...], channels: int, image_size: int
) -> None:
    images = tf.zeros(shape, tf.uint8)
    for is_padded in (False, True):
        for width in (image_size, image_size // 2):
            form = conversion.Form(image_size, width, channels, is_padded)
            converted = conversion.convert(images, form)
            assert converted.dtype == tf.uint8
            wanted = form.shape_of(shape[-3:])
            assert tuple(converted.shape) == (*shape[:-3], *wanted)


def converted(image: Any, *form: Any) -> list[Any]:
    image = tf.constant(np.asarray(image, np.uint8))
    return conversion.convert(image, conversion.Form(*form)).numpy().tolist()


def test_convert_crops_the_middle_and_averages() -> None:
    image = np.zeros((2, 6, 1), np.uint8)
    image[:, 2:4, 0] = [[10, 20], [30, 40]]
    image[:, :2] = image[:, 4:] = 255
    assert converted(image, 1, 1) == [[[25]]]
    # Half as wide as high, of the middle.
    assert converted(image, 2, 1) == [[[10]], [[30]]]


@settings(deadline=None, max_examples=20)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    is_padded=st.booleans(),
)
def test_what_has_its_size_is_left_as_resizing_would_leave_it(
    size: tuple[int, int], *, is_padded: bool
) -> None:
    """Runs that were begun when it was resized go on with the same bits."""
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    resized = tf.round(tf.image.resize(images, size, antialias=True))
    form = conversion.Form(*size, is_padded=is_padded)
    for given_images in (images, images[0]):
        kept = conversion.convert(tf.constant(given_images), form)
        np.testing.assert_array_equal(kept, given_images)
    np.testing.assert_array_equal(resized, images)


def test_convert_pads_in_the_colour_of_the_background() -> None:
    image = np.full((2, 4, 3), 9, np.uint8)
    inside, border = [9, 9, 9], [1, 2, 3]
    pad = (0, True, (1, 2, 3))
    assert converted(image, 4, 4, *pad) == [
        [border] * 4,
        [inside] * 4,
        [inside] * 4,
        [border] * 4,
    ]
    assert converted(image, 2, 6, *pad) == [
        [border, *[inside] * 4, border],
        [border, *[inside] * 4, border],
    ]
    # One of the same proportions has none; and they are what is transparent.
    assert converted(image, 1, 2, *pad) == [[inside] * 2]
    wide = converted(image, 1, 4, 4, True, (1, 2, 3))
    assert [pixel[3] for pixel in wide[0]] == [0, 255, 255, 0]


def test_convert_puts_what_is_transparent_on_the_background() -> None:
    image = [[[255, 0, 0, 0], [255, 0, 0, 255], [255, 1, 0, 51]]]
    green = (0, 255, 0)
    assert converted(image, 0, 0, 3, False, green) == [
        [[0, 255, 0], [255, 0, 0], [51, 204, 0]]
    ]
    grey = [[[200, 0], [200, 255]]]
    assert converted(grey, 0, 0, 1, False, (10, 10, 10)) == [[[10], [200]]]
    assert converted(grey, 0, 0, 3, False, (10, 10, 10)) == [
        [[10] * 3, [200] * 3]
    ]
    assert converted(grey, 0, 0, 4) == [[[200, 200, 200, 0], [200] * 3 + [255]]]
    assert converted([[[7, 8, 9]]], 0, 0, 4) == [[[7, 8, 9, 255]]]


def test_convert_weighs_colours() -> None:
    [[[value]]] = converted([[[255, 0, 0]]], 0, 0, 1)
    assert value == pytest.approx(0.2989 * 255, abs=1)
    assert converted([[[value]]], 0, 0, 3) == [[[value] * 3]]
    assert conversion.Form(background=(255, 0, 0)).colour(1) == [value]


# The embedded digits.


def test_digits_are_the_test_part_of_the_set(data_dir: str) -> None:
    source = open_source(data_dir=data_dir)
    assert source.name == "digits"
    assert source.num_images == 1797
    assert source.image_shape == (8, 8, 1)
    assert source.num_classes == 10
    assert source.in_memory
    images, labels = read_all(source)
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(labels).tolist() == counts
    assert images.min() == 0
    assert images.max() == 255


@pytest.mark.parametrize("settings", [{}, {"image_size": 16, "channels": 3}])
def test_the_embedded_set_is_that_of_tfds(
    data_dir: str, settings: dict[str, int]
) -> None:
    """A run reads it without TFDS, in the same order."""
    embedded = open_source(**settings)
    prepared = open_source(data_dir=data_dir, **settings)
    for got, want in zip(read_all(embedded), read_all(prepared), strict=True):
        np.testing.assert_array_equal(got, want)
    for name in ("name", "num_images", "image_shape", "num_classes"):
        assert getattr(embedded, name) == getattr(prepared, name)


def test_digits_are_read_at_random_as_in_memory(data_dir: str) -> None:
    source = open_source(data_dir=data_dir, cache_gib=0.0)
    assert not source.in_memory
    indices = tf.constant([0, 1796, 7, 7], tf.int64)
    wanted = open_source(data_dir=data_dir).read(indices)
    for got, want in zip(source.read(indices), wanted, strict=True):
        np.testing.assert_array_equal(got, want)
    assert source.find_fault(range(20)) is None


def test_digits_file_is_small_and_of_the_documented_form() -> None:
    assert digits.FILE.stat().st_size < 100_000
    with np.load(digits.FILE, allow_pickle=False) as arrays:
        assert arrays["images"].shape == (1797, 8, 8)
        assert arrays["images"].dtype == np.uint8
        assert arrays["labels"].shape == (1797,)


def test_make_scales_ink_to_255() -> None:
    class Loaded:
        images = np.array([[[0.0, 8.0, 16.0]]])
        target = np.array([7])

    made = make.to_arrays(Loaded())
    assert made["images"].tolist() == [[[0, 128, 255]]]
    assert made["labels"].tolist() == [7]


def test_digits_need_no_place_that_lasts(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    # A directory below a file can be made by nobody, not even by root.
    monkeypatch.setattr(
        preparation, "_root", lambda builder: _root(builder, file)
    )
    source = open_source(split="train[:100%]")
    assert source.num_images == 1797


def _root(builder: Any, file: pathlib.Path) -> str:
    root = str(builder.data_dir_root)
    return root if "dtrain-digits-" in root else str(file / "data")


def test_digits_in_a_data_dir_that_cannot_be(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.touch()
    line = error_line(data_dir=str(file / "data"))
    assert line.startswith(f"data_dir ({file}/data) cannot be written to")


OPEN_DIGITS = (
    "import sys; from dtrain import config; from dtrain.data import sources; "
    "source = sources.open_source(config.Config(data_dir=sys.argv[1])); "
    "print(source.num_images)"
)


def test_workers_prepare_at_the_same_time(tmp_path: pathlib.Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_DIGITS, str(tmp_path)],
            env=runs.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(3)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=120)
        assert output.split() == ["1797"]
        assert worker.returncode == 0


KILLED_WHILE_PREPARING = """
import os, signal, sys
import numpy as np
from dtrain import config
from dtrain.data import sources
from dtrain.data.digits import builder as digits

def examples(self):
    yield 0, {"image": np.zeros((8, 8, 1), np.uint8), "label": 0}
    os.kill(os.getpid(), signal.SIGKILL)

digits.Digits._generate_examples = examples
sources.open_source(config.Config(data_dir=sys.argv[1]))
"""


def test_a_killed_preparation_is_made_again(tmp_path: pathlib.Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_PREPARING, str(tmp_path)],
        env=runs.environment(),
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "digits").iterdir())
    assert open_source(data_dir=str(tmp_path)).num_images == 1797


READ_AHEAD_AND_END = """
import sys
import tensorflow as tf
from dtrain import config
from dtrain.data import pipeline, sources
settings = config.Config(data_dir=sys.argv[1], cache_gib=0.0)
source = sources.open_source(settings)
strategy = tf.distribute.get_strategy()
iterator = pipeline.make_iterator(
    sources.Data(source), settings, strategy, 0, draws_per_step=1
)
for _ in range(20):
    next(iterator)
print("end", flush=True)
"""


def test_a_program_that_reads_ahead_ends(data_dir: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", READ_AHEAD_AND_END, data_dir],
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    assert ended.stdout.split() == [b"end"]
    assert ended.returncode == 0


# TFDS.


class Shapes(tfds.core.GeneratorBasedBuilder):
    """A builder of ours that stands for one of TFDS's own."""

    VERSION = tfds.core.Version("1.0.0")
    image: Any = tfds.features.Image(shape=(None, None, 1))
    sizes = ((4, 4), (4, 4), (6, 4), (4, 4))

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": type(self).image,
            "label": tfds.features.ClassLabel(num_classes=3),
            "note": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Any:
        for key, size in enumerate(self.sizes):
            image = np.full((*size, 1), key, np.uint8)
            yield key, {"image": image, "label": key % 3, "note": "x"}


VALUES = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4, 1)


class Deep(Shapes):
    """Has 16 bits, of which 12 are used."""

    image = tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16)
    values = np.rint(VALUES * 4095).astype(np.uint16)

    def _generate_examples(self) -> Any:
        for key in range(3):
            yield key, {"image": self.values, "label": key, "note": ""}


class Floats(Deep):
    """Has floats in [0, 1]."""

    image = tfds.features.Image(shape=(4, 4, 1), dtype=np.float32)
    values = VALUES


class Negative(Floats):
    """Has floats in [-1, 1]."""

    values = VALUES * 2 - 1


class Infrared(Floats):
    """Has floats in no range that is known."""

    values = VALUES * 300


class TwoPictures(tfds.core.GeneratorBasedBuilder):
    """Has no feature that is the image."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Image(shape=(1, 1, 1)) for name in "ab"}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Any:
        image = np.zeros((1, 1, 1), np.uint8)
        yield 0, {"a": image, "b": image}


class Broken(TwoPictures):
    """Cannot be prepared."""

    def _generate_examples(self) -> Any:
        yield 0, {"a": 1 / 0, "b": 0}


class ByHand(TwoPictures):
    """Must be fetched by the user."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "Ask the\nauthors."


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_tfds_of_either_format(
    file_format: str, tmp_path: pathlib.Path
) -> None:
    tfds.builder("shapes", data_dir=tmp_path).download_and_prepare(
        file_format=file_format
    )
    source = open_source(dataset="shapes", data_dir=str(tmp_path), image_size=4)
    assert source.in_memory
    assert source.image_shape == (4, 4, 1)
    assert source.num_classes == 3
    images, labels = read_all(source)
    values = images[:, 0, 0, 0]
    assert sorted(values) == [0, 1, 2, 3]
    assert labels.tolist() == [value % 3 for value in values]
    line = error_line(dataset="shapes", data_dir=str(tmp_path))
    assert "holds images of different sizes, such as 4x4x1 and 6x4x1" in line
    assert "give --image_size=8" in line
    if file_format == "array_record":
        return
    line = error_line(
        dataset="shapes", data_dir=str(tmp_path), image_size=4, cache_gib=0.0
    )
    assert "tfrecord, which has no random access" in line


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_tfds_of_pictures_that_are_too_large(
    file_format: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tfds.builder("shapes", data_dir=tmp_path)
    made.download_and_prepare(file_format=file_format)
    room = pictures.Room(100, 100)
    monkeypatch.setattr(pictures.Room, "of_host", lambda: room)
    line = error_line(dataset="shapes", data_dir=str(tmp_path), image_size=4)
    assert f"of {made.data_dir} says it is " in line
    assert "make it smaller" in line


@pytest.mark.parametrize("name", ["deep", "floats", "negative", "infrared"])
def test_tfds_of_more_than_8_bits(name: str, tmp_path: pathlib.Path) -> None:
    tfds.builder(name, data_dir=tmp_path).download_and_prepare(
        file_format="array_record"
    )
    if name == "infrared":
        line = error_line(dataset=name, data_dir=str(tmp_path))
        assert "lies in [0, 300]; floats must lie in [0, 1]" in line
        return
    source = open_source(dataset=name, data_dir=str(tmp_path))
    images, _ = read_all(source)
    wanted = np.rint(VALUES * 255)
    np.testing.assert_array_equal(images, [wanted] * 3)


@pytest.mark.usefixtures("no_network")
def test_tfds_of_images_that_are_made_up() -> None:
    with tfds.testing.mock_data(num_examples=5):
        source = open_source(dataset="mnist")
    assert (source.num_images, source.image_shape) == (5, (28, 28, 1))
    assert read_all(source)[0].max() > 200


def test_tfds_of_another_configuration(
    data_dir: str, tmp_path: pathlib.Path
) -> None:
    """A set without code, as somebody else has prepared it."""
    for config in ("large", "small"):
        copy = tmp_path / "copied" / config / "1.0.0"
        shutil.copytree(f"{data_dir}/digits/1.0.0", copy)
    line = error_line(dataset="copied/huge", data_dir=str(tmp_path))
    assert line == (
        "dataset (copied/huge) is not among the configurations and versions "
        f"that are in {tmp_path}: large, small"
    )


@pytest.mark.parametrize("kind", ["code", "damage"])
def test_tfds_that_names_code_or_nothing_sound(
    kind: str, data_dir: str, tmp_path: pathlib.Path
) -> None:
    """A set without code of its own is what its directory says it is."""
    copy = tmp_path / "copied" / "1.0.0"
    shutil.copytree(f"{data_dir}/digits/1.0.0", copy)
    path = copy / "features.json"
    text = path.read_text()
    own = "tensorflow_datasets.core.features.features_dict"
    assert own in text
    changed = {"code": text.replace(own, "evil"), "damage": '{"a": 1}'}
    path.write_text(changed[kind])
    line = error_line(dataset="copied", data_dir=str(tmp_path))
    said = {
        "code": f"{path} names evil.FeaturesDict, which would be imported",
        "damage": "dataset (copied): ",
    }
    assert line.startswith(said[kind])


@pytest.mark.usefixtures("no_network")
def test_download_prepares(tmp_path: pathlib.Path) -> None:
    fields = {"dataset": "shapes", "data_dir": str(tmp_path), "image_size": 4}
    assert "--download" in error_line(**fields)
    assert not any(tmp_path.iterdir())
    assert open_source(**fields, download=True).num_images == 4
    part = open_source(**fields, split="train[:50%]", cache_gib=0.0)
    assert part.num_images == 2


@pytest.mark.usefixtures("no_network")
def test_unknown_without_a_data_dir() -> None:
    assert "not prepared in" in error_line(dataset="mnits")


@pytest.mark.usefixtures("no_network")
def test_not_prepared(tmp_path: pathlib.Path) -> None:
    line = error_line(dataset="mnist", data_dir=str(tmp_path))
    assert line == (
        f"mnist is not prepared in {tmp_path}: name its place by --data_dir, "
        "or fetch it with --download; without a network there are "
        "--dataset=digits, folder:/path, zip:/path, idx:/path and npz:/path"
    )


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("mnits", ["not known to TFDS (did you mean mnist?)", "digits"]),
        ("mnist:nothing", ["BuilderConfig nothing not found"]),
        ("mnist:9.9.9", ["cannot be loaded at version 9.9.9, only: 3.0.1"]),
        ("cats_vs_dogs/big", ["dataset (cats_vs_dogs/big)"]),
        ("cifar10_corrupted/x", ["its configurations are brightness_1"]),
        ("not a name", ["dataset (not a name)"]),
        (
            "floder:/path",
            ["must be folder:/path, zip:/path, idx:/path, npz:/path"],
        ),
        ("folder:", ["names no path"]),
        ("mnist:", ["must be folder:/path"]),
    ],
)
def test_names_that_are_none(
    dataset: str, words: list[str], tmp_path: pathlib.Path
) -> None:
    line = error_line(dataset=dataset, data_dir=str(tmp_path))
    for word in words:
        assert word in line


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dataset": "mnist"}, ["no network, as storage.googleapis.com"]),
        ({"dataset": "broken"}, ["ZeroDivisionError: division by zero"]),
        ({"dataset": "by_hand"}, ["--manual_dir", "Ask the authors."]),
        ({"dataset": "two_pictures"}, ["must have one image", "a, b"]),
    ],
)
def test_downloads_that_fail(
    fields: dict[str, str],
    words: list[str],
    tmp_path: pathlib.Path,
) -> None:
    line = error_line(**fields, data_dir=str(tmp_path), download=True)
    for word in words:
        assert word in line


@pytest.mark.parametrize("split", ["test", "train[", "train[9999:]"])
def test_splits_that_are_none(split: str, data_dir: str) -> None:
    line = error_line(data_dir=data_dir, split=split)
    assert line.startswith(f"split ({split}) of digits")


def test_a_damaged_array_record(tmp_path: pathlib.Path) -> None:
    open_source(data_dir=str(tmp_path))
    [path] = tmp_path.rglob("*.array_record*")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40_000] = bytes(40_000)
    path.write_bytes(content)
    line = error_line(data_dir=str(tmp_path))
    assert "cannot be read" in line
    assert str(path.parent) in line


def test_conditional_needs_labels(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.png").write_bytes(png(GREY[0]))
    line = error_line(dataset=f"folder:{tmp_path}", conditional=True)
    assert line == f"conditional needs labels, and folder:{tmp_path} has none"


# Folders.


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_folder_of_classes(classes: pathlib.Path, cache_gib: float) -> None:
    (classes / ".hidden").mkdir()
    (classes / "notes.txt").touch()
    source = open_source(dataset=f"folder:{classes}", cache_gib=cache_gib)
    assert source.in_memory == bool(cache_gib)
    assert source.num_classes == 3
    images, labels = read_all(source)
    order = [1, 4, 0, 3, 2]
    assert labels.tolist() == [0, 0, 1, 1, 2]
    np.testing.assert_array_equal(images, GREY[order])


def test_folder_without_classes(tmp_path: pathlib.Path) -> None:
    colours = np.full((6, 4, 3), 100, np.uint8)
    jpeg = tf.io.encode_jpeg(colours, quality=100).numpy()
    (tmp_path / "a.JPG").write_bytes(jpeg)
    (tmp_path / "b.jpeg").write_bytes(jpeg)
    (tmp_path / "c.png").write_bytes(png(colours[:, :, :1]))
    source = open_source(dataset=f"folder:{tmp_path}", image_size=2, channels=3)
    assert source.num_classes == 0
    images, labels = read_all(source)
    assert images.shape == (3, 2, 2, 3)
    assert labels.tolist() == [0, 0, 0]
    np.testing.assert_allclose(images, 100, atol=2)


def _truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def _remove_images(path: pathlib.Path) -> None:
    for file in path.rglob("*.png"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            _remove_images,
            ["holds no images (.png, .jpg, ", "other kinds: none"],
        ),
        (
            lambda path: (path / "class_3").mkdir(),
            ["class_3 holds no images, so it is no class"],
        ),
        (
            lambda path: (path / "x.png").write_bytes(png(GREY[0])),
            ["holds both images", "x.png", "class_0"],
        ),
        (
            lambda path: (path / "class_1/0.png").write_bytes(b""),
            ["class_1/0.png cannot be decoded"],
        ),
        (
            lambda path: _truncate(path / "class_0/1.png"),
            ["class_0/1.png cannot be decoded"],
        ),
        (
            lambda path: _truncate(path / "class_2/2.png"),
            ["class_2/2.png cannot be decoded"],
        ),
        (
            lambda path: (path / "class_2/2.png").write_text("no image"),
            ["class_2/2.png cannot be decoded: it is no picture of a known"],
        ),
        (
            lambda path: (path / "class_2/2.png").write_bytes(
                png(np.zeros((5, 4, 1), np.uint8))
            ),
            ["class_0/1.png is 4x4x1 but", "2.png 5x4x1; give --image_size=8"],
        ),
        (
            lambda path: (path / "class_2/2.png").write_bytes(
                png(np.zeros((4, 4, 3), np.uint8))
            ),
            ["class_0/1.png has 1 channels but", "give --channels"],
        ),
    ],
)
def test_folders_that_are_wrong(
    change: Callable[[pathlib.Path], Any],
    words: list[str],
    classes: pathlib.Path,
) -> None:
    change(classes)
    line = error_line(dataset=f"folder:{classes}")
    for word in words:
        assert word in line


def test_folder_of_splits(classes: pathlib.Path) -> None:
    root = classes / "root"
    for number, split in enumerate(("train", "test")):
        for label in ("cats", "dogs"):
            (root / split / label).mkdir(parents=True)
            path = root / split / label / "1.png"
            path.write_bytes(png(GREY[number]))
    for number, split in enumerate(("train", "test")):
        source = open_source(dataset=f"folder:{root}", split=split)
        images, labels = read_all(source)
        np.testing.assert_array_equal(images, GREY[[number, number]])
        assert labels.tolist() == [0, 1]
        other = "passed over 2: 2 in other splits"
        assert source.files == ("used 2: 2 .png", other)
        config = Config(dataset=f"folder:{root}", split=split, labels="none")
        assert sources.open_files(config).digest != source.digest
        assert sources.open_files(config).num_images == 2
    line = error_line(dataset=f"folder:{root}", split="val")
    assert "must be test, train: it holds folders of splits" in line
    line = error_line(dataset=f"folder:{root}/train", split="test")
    assert f"split (test) does not apply to folder:{root}/train" in line


def test_paths_that_are_none(tmp_path: pathlib.Path) -> None:
    missing = tmp_path / "missing"
    for kind in ("folder", "zip", "idx", "npz"):
        line = error_line(dataset=f"{kind}:{missing}")
        assert line.startswith(f"dataset ({kind}:{missing}) must name a")


def test_a_path_without_its_kind(
    classes: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """And one of another kind: what is there is looked at."""
    place = tmp_path / "sets"
    (place / "idx").mkdir(parents=True)
    (place / "idx/train-images-idx3-ubyte").write_bytes(GOOD_IDX)
    (place / "arrays").mkdir()
    np.savez(place / "arrays/a.npz", x=GREY)
    shutil.move(classes / "class_0", place / "folder/class_0")
    proposals = {
        f"{place}/folder": f"folder:{place}/folder",
        f"folder:{place}/idx": f"idx:{place}/idx",
        f"{place}/idx": f"idx:{place}/idx",
        f"{place}/idx/train-images-idx3-ubyte": f"idx:{place}/idx",
        f"{place}/arrays": f"npz:{place}/arrays/a.npz",
        f"{place}/arrays/a.npz": f"npz:{place}/arrays/a.npz",
        f"folder:{place}/arrays/a.npz": f"npz:{place}/arrays/a.npz",
        f"npz:{place}/idx": f"idx:{place}/idx",
        f"npz:{place}/folder": f"folder:{place}/folder",
        f"idx:{place}/folder": f"folder:{place}/folder",
    }
    for dataset, proposal in proposals.items():
        line = error_line(dataset=dataset)
        assert line.endswith(f"try --dataset={proposal}")
    line = error_line(dataset=f"{place}/none")
    assert line == (
        f"dataset ({place}/none) is a path; it must be folder:/path, "
        "zip:/path, idx:/path, npz:/path or the name of a TFDS data set: and "
        "nothing is there"
    )


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_a_size_is_proposed_before_anything_is_read(
    cache_gib: float, tmp_path: pathlib.Path
) -> None:
    for name in range(20):
        side = 50 if name == 17 else 70
        shape = (side, 90, 3)
        (tmp_path / f"{name:02}.png").write_bytes(
            png(np.zeros(shape, np.uint8))
        )
    line = error_line(dataset=f"folder:{tmp_path}", cache_gib=cache_gib)
    assert line == (
        f"{tmp_path}/00.png is 70x90x3 but {tmp_path}/17.png 50x90x3; give "
        "--image_size=32, with --image_fit=pad to lose no edge"
    )


# IDX.


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_idx(idx_dir: pathlib.Path, cache_gib: float) -> None:
    source = open_source(dataset=f"idx:{idx_dir}", cache_gib=cache_gib)
    assert source.num_classes == 3
    images, labels = read_all(source)
    np.testing.assert_array_equal(images, GREY)
    np.testing.assert_array_equal(labels, LABELS)


def test_idx_converts(idx_dir: pathlib.Path) -> None:
    fields = {"dataset": f"idx:{idx_dir}", "image_size": 2, "channels": 3}
    in_memory = open_source(**fields)
    assert in_memory.image_shape == (2, 2, 3)
    np.testing.assert_array_equal(
        read_all(in_memory)[0],
        read_all(open_source(**fields, cache_gib=0.0))[0],
    )


def test_idx_without_labels(idx_dir: pathlib.Path) -> None:
    (idx_dir / "train-labels-idx1-ubyte.gz").unlink()
    assert open_source(dataset=f"idx:{idx_dir}").num_classes == 0


GOOD_IDX = idx_bytes(GREY[..., 0])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "starts with nothing"),
        (b"\x00\x00\x08", "starts with 00 00 08;"),
        (b"\x00\x00\x0d" + GOOD_IDX[3:], "starts with 00 00 0d 03"),
        (GOOD_IDX[:10], "is truncated within its header"),
        (GOOD_IDX[:-1], "is truncated: 95 bytes, but its header (5x4x4)"),
        (GOOD_IDX + b"x", "is too long: 97 bytes"),
        (idx_bytes(LABELS), "an IDX file of 3-dimensional bytes starts with"),
        (idx_bytes(np.empty((0, 4, 4))), "holds no images"),
        (idx_bytes(GREY[:4, ..., 0]), "holds 4 images but"),
        (GOOD_IDX[:4] + b"\xff" * 12, "is truncated"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_that_is_wrong(
    content: bytes, words: str, zipped: bool, idx_dir: pathlib.Path
) -> None:
    path = idx_dir / "train-images-idx3-ubyte"
    path.unlink()
    if zipped:
        path = path.with_name(path.name + ".gz")
        content = gzip.compress(content)
    path.write_bytes(content)
    line = error_line(dataset=f"idx:{idx_dir}")
    assert words in line
    assert str(path) in line


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(GOOD_IDX)[:-9], gzip.compress(GOOD_IDX)[:-1]],
)
def test_gzip_that_is_wrong(content: bytes, idx_dir: pathlib.Path) -> None:
    path = idx_dir / "train-images-idx3-ubyte"
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(content)
    line = error_line(dataset=f"idx:{idx_dir}")
    assert f"{path}.gz cannot be read" in line


BOMB = 2**29


@contextlib.contextmanager
def memory_of(num_bytes: int) -> Iterator[None]:
    """Lets this process take so much more memory, and no more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def zeros(num_bytes: int) -> Iterator[bytes]:
    for start in range(0, num_bytes, 2**20):
        yield bytes(min(2**20, num_bytes - start))


def write_gzip(path: pathlib.Path, head: bytes, num_zeros: int) -> None:
    with gzip.open(path, "wb", 1) as file:
        file.write(head)
        for piece in zeros(num_zeros):
            file.write(piece)


def write_npz_of_zeros(path: pathlib.Path, shape: str, num_zeros: int) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    header = header.ljust(117) + "\n"
    with (
        zipfile.ZipFile(
            path, "w", zipfile.ZIP_DEFLATED, compresslevel=1
        ) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        file.write(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)))
        file.write(header.encode())
        for piece in zeros(num_zeros):
            file.write(piece)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, 8, 8), ["is too long: 81 bytes, but its header (1x8x8) asks for"]),
        ((512, 1024, 1024), ["says it takes 0.5 GiB of memory, and", "free"]),
    ],
)
def test_gzip_that_unpacks_to_gigabytes_is_not_unpacked(
    sizes: tuple[int, ...], words: list[str], idx_dir: pathlib.Path
) -> None:
    path = idx_dir / "train-images-idx3-ubyte"
    path.unlink()
    head = struct.pack(">4B3I", 0, 0, 8, 3, *sizes)
    write_gzip(idx_dir / f"{path.name}.gz", head, BOMB)
    with memory_of(BOMB // 2):
        line = error_line(dataset=f"idx:{idx_dir}")
    assert line.startswith(f"{path}.gz ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("(1, 8, 8)", "bytes, but its header (1x8x8 of uint8) asks for 64;"),
        ("(512, 1024, 1024)", "says it takes 0.5 GiB of memory, and"),
    ],
)
def test_npz_that_unpacks_to_gigabytes_is_not_unpacked(
    shape: str, words: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "a.npz"
    write_npz_of_zeros(path, shape, BOMB)
    with memory_of(BOMB // 2):
        line = error_line(dataset=f"npz:{path}")
    assert line.startswith(f"x in {path} ")
    assert words in line


def png_of(height: int, width: int) -> bytes:
    """Returns a black picture, of which only a row is in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return (
            struct.pack(">I", len(data))
            + kind
            + data
            + struct.pack(">I", check)
        )

    packer = zlib.compressobj()
    row = bytes(1 + width * 3)
    data = b"".join(packer.compress(row) for _ in range(height))
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", size),
            chunk(b"IDAT", data + packer.flush()),
            chunk(b"IEND", b""),
        )
    )


def claiming(content: bytes, kind: str) -> bytes:
    """Returns a picture that says it is 60000 x 60000."""
    big = 60_000
    made = bytearray(content)
    if kind == "png":
        made[16:24] = struct.pack(">II", big, big)
    elif kind == "jpeg":
        start = content.index(b"\xff\xc0") + 5
        made[start : start + 4] = struct.pack(">HH", big, big)
    else:
        made[6:10] = struct.pack("<HH", big, big)
    return bytes(made)


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_picture_that_says_it_is_huge_is_not_decoded(
    kind: str, place: int, tmp_path: pathlib.Path
) -> None:
    """Be it the first, which tells the shape, or another one."""
    names = ["a.png", "b.png"]
    (tmp_path / names[1 - place]).write_bytes(encoded("png"))
    content = claiming(encoded(kind), kind)
    (tmp_path / names[place]).write_bytes(content)
    with memory_of(2 * BOMB):
        line = error_line(dataset=f"folder:{tmp_path}", image_size=2)
    said = {
        "gif": " cannot be decoded: it has more than 178,956,970 pixels;",
    }.get(
        kind,
        f" says it is 60000 x 60000 pixels in {len(content)} bytes; at most "
        "178,956,970 pixels are decoded: make it smaller, or remove it",
    )
    assert line.startswith(f"{tmp_path}/{names[place]}{said}")


def test_a_picture_that_the_memory_does_not_hold(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "a.png").write_bytes(png_of(6000, 6000))
    with memory_of(BOMB // 2):
        line = error_line(dataset=f"folder:{tmp_path}", image_size=2)
    assert f"{tmp_path}/a.png says it is 6000 x 6000 pixels" in line
    assert "it may take 0.536 GiB, and 0.2" in line


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_large_photographs_are_decoded_one_by_one(
    cache_gib: float, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bits as beside others."""
    chance = np.random.default_rng(0)
    for name in "abcd":
        colours = chance.integers(0, 256, (40, 30, 3), np.uint8)
        (tmp_path / f"{name}.png").write_bytes(png(colours))
    fields = {"dataset": f"folder:{tmp_path}", "image_size": 8}
    wanted, _ = read_all(open_source(**fields))
    # All but the smallest are large.
    (tmp_path / "b.png").write_bytes(png(colours[:8, :8]))
    wanted[1] = colours[:8, :8]
    room = pictures.Room(2**30, 64 * 16)
    monkeypatch.setattr(pictures.Room, "of_host", lambda: room)
    source = open_source(**fields, cache_gib=cache_gib)
    np.testing.assert_array_equal(read_all(source)[0], wanted)


def test_idx_splits(idx_dir: pathlib.Path) -> None:
    line = error_line(dataset=f"idx:{idx_dir}", split="test")
    assert "holds no t10k-images-idx3-ubyte" in line
    line = error_line(dataset=f"idx:{idx_dir}", split="all")
    assert "must be train or test" in line


@given(content=st.binary(max_size=64), rank=st.sampled_from((1, 3)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_idx_or_a_user_error(
    content: bytes, rank: int, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x00\x00\x08" + content)
    with contextlib.suppress(UserError):
        assert idx.read_idx(path, rank).ndim == rank


def test_fashion_mnist() -> None:
    if not FASHION_MNIST.is_dir():
        requirement.missing("apt-get install dataset-fashion-mnist")
    for split, num_images in (("train", 60_000), ("test", 10_000)):
        source = open_source(dataset=f"idx:{FASHION_MNIST}", split=split)
        assert source.num_images == num_images
        assert source.image_shape == (28, 28, 1)
        images, labels = read_all(source)
        assert np.bincount(labels).tolist() == [num_images // 10] * 10
        assert 60 < images.mean() < 80


# npz.


def write_npz(path: pathlib.Path, **arrays: np.ndarray) -> str:
    np.savez_compressed(path / "a.npz", **arrays)
    return f"npz:{path}/a.npz"


@pytest.mark.parametrize(
    ("arrays", "split", "num_classes"),
    [
        ({"x": GREY}, "train", 0),
        ({"images": GREY[..., 0], "labels": LABELS}, "train", 3),
        ({"x": GREY, "y": LABELS.astype(np.uint8)}, "train", 3),
        ({"x_test": GREY, "y_test": LABELS, "x": GREY[:1]}, "test", 3),
        ({"x": GREY / np.float32(255)}, "train", 0),
        ({"x": GREY / np.float64(127.5) - 1}, "train", 0),
    ],
)
def test_npz(
    arrays: dict[str, np.ndarray],
    split: str,
    num_classes: int,
    tmp_path: pathlib.Path,
) -> None:
    # The first image holds 0, so that [-1, 1] is told from [0, 1].
    source = open_source(dataset=write_npz(tmp_path, **arrays), split=split)
    assert source.num_classes == num_classes
    images, labels = read_all(source)
    np.testing.assert_array_equal(images, GREY)
    if num_classes:
        np.testing.assert_array_equal(labels, LABELS)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"z": GREY}, "holds z; --split=train needs x_train, x or images"),
        ({}, "holds nothing"),
        ({"x": GREY[0, 0]}, "x in"),
        ({"x": np.zeros((5, 4, 4, 5), np.uint8)}, "--array_layout=chw"),
        ({"x": np.zeros((5, 7, 4, 5), np.uint8)}, "1 to 4 channels]"),
        ({"x": np.uint8(3)}, "is one number"),
        ({"x": GREY[:0]}, "holds no images"),
        ({"x": GREY.astype(np.int64)}, "is of type int64"),
        ({"x": GREY.astype(np.float32)}, "lies in [0, 79]"),
        ({"x": np.full((1, 2, 2), np.nan)}, "lies in [nan, nan]"),
        ({"x": GREY.astype(object)}, "cannot be read: Object arrays"),
        ({"x": GREY, "y": LABELS[:4]}, "one label for each of the 5 images"),
        ({"x": GREY, "y": LABELS[:, None] + [[0, 1]]}, "is 5x2"),
        ({"x": GREY, "y": LABELS / 2}, "labels must be whole numbers"),
        ({"x": GREY, "y": LABELS - 1}, "lies in [-1, 1]"),
        ({"x": GREY, "y": LABELS * 10**6}, "count the classes from 0"),
    ],
)
def test_npz_that_is_wrong(
    arrays: dict[str, np.ndarray], words: str, tmp_path: pathlib.Path
) -> None:
    line = error_line(dataset=write_npz(tmp_path, **arrays))
    assert words in line
    assert str(tmp_path) in line


def test_npz_without_the_split(tmp_path: pathlib.Path) -> None:
    dataset = write_npz(tmp_path, x=GREY)
    line = error_line(dataset=dataset, split="test")
    assert line.endswith("--split=test needs x_test")


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_npz(content: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    assert "is not an npz file" in error_line(dataset=f"npz:{path}")


def test_npz_of_something_else(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", "text")
    assert "cannot be read" in error_line(dataset=f"npz:{path}")


def _npz_bytes() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=GREY, y=LABELS)
    return file.getvalue()


NPZ = _npz_bytes()


@given(place=st.integers(0, len(NPZ) - 1), value=st.integers(0, 255))
@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_damaged_npz_is_a_user_error_or_harmless(
    place: int, value: int, tmp_path: pathlib.Path
) -> None:
    content = bytearray(NPZ)
    content[place] = value
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        npz.open_npz(str(path), Config(dataset=f"npz:{path}"))


# Memory and storage.


def test_loading_reports_what_it_does(
    idx_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_REPORT_EVERY_SECS", 0.0)
    lines: list[str] = []
    config = Config(dataset=f"idx:{idx_dir}")
    sources.open_source(config, lines.append)
    assert lines == [f"reading idx:{idx_dir} into memory: 5 of 5 images"]


def test_in_memory_exactly_when_it_fits(idx_dir: pathlib.Path) -> None:
    size = GREY.nbytes / 2**30
    dataset = f"idx:{idx_dir}"
    assert open_source(dataset=dataset, cache_gib=size).in_memory
    assert not open_source(dataset=dataset, cache_gib=size * 0.99).in_memory


def test_a_stored_copy_is_the_original(
    idx_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = str(idx_dir / "data")
    arguments = [f"--dataset=idx:{idx_dir}", f"--data_dir={data_dir}"]
    assert store.run(["store", "copy", *arguments]) == 0
    assert f"stored as {data_dir}/copy/1.0.0" in capsys.readouterr().out
    copy = open_source(dataset="copy", data_dir=data_dir, cache_gib=0.0)
    images, labels = read_all(copy)
    np.testing.assert_array_equal(images, GREY)
    np.testing.assert_array_equal(labels, LABELS)
    with pytest.raises(UserError, match="holds a data set copy already"):
        store.run(["store", "copy", *arguments])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no name; usage"),
        (["--dataset=digits"], "no name; usage"),
        (["copy"], "data_dir is empty"),
        (["copy", "--data_dir=x", "--split=train[:9]"], "one whole split"),
        (["copy", "--data_dir=x", "--no_such_flag"], "no_such_flag"),
    ],
)
def test_store_refuses(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as raised:
        store.run(["store", *argv])
    assert words in str(raised.value)


def test_store_refuses_a_name(idx_dir: pathlib.Path) -> None:
    source = open_source(dataset=f"idx:{idx_dir}")
    with pytest.raises(UserError, match="must be of small letters"):
        store.store(source, "Copy", "train", str(idx_dir))


def test_digits_builder_is_registered() -> None:
    assert tfds.builder_cls("digits") is builder.Digits


@pytest.mark.parametrize(
    ("num_gib", "said"),
    [(0.53125, "0.531"), (999.4, "999"), (999.6, "1,000"), (1e5, "100,000")],
)
def test_memory_is_said_without_powers_of_ten(
    num_gib: float, said: str
) -> None:
    assert host_memory.gib(num_gib * 2**30) == f"{said} GiB"
