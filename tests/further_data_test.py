"""What stands beside the images, paired with them or in its own order."""

from __future__ import annotations

import io
import pathlib
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from dtrain import check_data, store
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.errors import UserError
from dtrain.run import alike, identity

NUMBERS = np.arange(5, dtype=np.uint8)
GREY = np.broadcast_to(NUMBERS[:, None, None], (5, 4, 4))


def open_data(**fields: Any) -> sources.Data:
    # But for the digits nothing is loaded, which takes a second each time.
    return sources.open_data(Config(**{"cache_gib": 1e-9, **fields}))


def error_line(**fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_data(**fields)
    assert "\n" not in caught.value.text
    return caught.value.text


def read(source: sources.Source) -> np.ndarray:
    """Returns all examples as a model sees them."""
    indices = tf.range(source.num_images, dtype=tf.int64)
    stored, _ = source.read(indices)
    seen = source.seen(stored, None)
    assert source.spec.is_compatible_with(seen[0])
    return seen.numpy()


def picture(
    values: np.ndarray, kind: str = "png", palette: bool = False
) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(values))
    if palette:
        image.putpalette(range(255, -1, -1))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def fill(folder: pathlib.Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return f"folder:{folder}"


# With another ending `a/2` comes before `a/2.c`.
STEMS = ("a/0", "b/1", "a/2.c", "b/3", "a/2")


def of_classes(palette: bool = False) -> dict[str, bytes]:
    """Of two classes, each picture of its number."""
    return {
        f"{stem}.png": picture(grey, palette=palette)
        for stem, grey in zip(STEMS, GREY, strict=True)
    }


@pytest.fixture
def images(tmp_path: pathlib.Path) -> str:
    return fill(tmp_path / "images", of_classes())


# Folders and archives.


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pictures_are_paired_by_their_names(
    kind: str, images: str, tmp_path: pathlib.Path
) -> None:
    files = of_classes(palette=True)
    del files["a/2.png"]
    files["a/2.bmp"] = picture(GREY[4], "bmp", palette=True)
    # Without a partner.
    files["a/1.png"] = picture(GREY[0])
    place = fill(tmp_path / "masks", files)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "masks.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        place = f"zip:{tmp_path}/masks.zip"
    data = open_data(
        dataset=images,
        paired=(f"mask=map:{place}", f"twin={images}"),
    )
    shown = read(data.source)[:, 0, 0, 0]
    assert data.source.num_classes == 2
    np.testing.assert_array_equal(read(data.paired["twin"])[:, 0, 0, 0], shown)
    numbers = np.rint((shown + 1) * 127.5)
    mask = read(data.paired["mask"])
    assert mask.dtype == np.int32
    np.testing.assert_array_equal(mask[:, 0, 0], numbers)
    lines = data.said()
    assert f"paired    mask={place}: 5 label maps 4x4x1" in lines
    assert any("1 without a partner" in line for line in lines)


def test_every_picture_without_a_partner_is_told(
    images: str, tmp_path: pathlib.Path
) -> None:
    masks = fill(tmp_path / "masks", {"a/0.png": picture(GREY[0])})
    with pytest.raises(UserError) as caught:
        open_data(dataset=images, paired=(f"mask={masks}",))
    assert caught.value.text == (
        f"paired (mask={masks}) has no picture for 4 of the 5 of {images}: "
        "a/2.c.png, a/2.png, b/1.png, ...; it must hold one of the same name, "
        "endings aside, for each"
    )
    named = [line.strip() for line in caught.value.details]
    assert named == ["a/2.c.png", "a/2.png", "b/1.png", "b/3.png"]


def test_two_partners_of_one_name(images: str, tmp_path: pathlib.Path) -> None:
    files = of_classes()
    files["a/2.bmp"] = files["a/2.png"]
    masks = fill(tmp_path / "masks", files)
    line = error_line(dataset=images, paired=(f"mask={masks}",))
    assert f"{tmp_path}/masks/a/2.bmp and {tmp_path}/masks/a/2.png" in line


def test_a_damaged_half_leaves_out_the_pair(
    images: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = of_classes()
    files["a/2.png"] = files["a/2.png"][:40]
    masks = fill(tmp_path / "masks", files)
    (tmp_path / "images/b/1.png").write_bytes(b"\x89PNG")
    flags = {"dataset": images, "paired": (f"mask=map:{masks}",)}
    data = open_data(**flags, skip_damaged=True)
    numbers = np.rint((read(data.source)[:, 0, 0, 0] + 1) * 127.5)
    assert sorted(numbers) == [0, 2, 3]
    np.testing.assert_array_equal(read(data.paired["mask"])[:, 0, 0], numbers)
    # Both are named, and moved, by themselves.
    capsys.readouterr()
    words = ["check_data", f"--dataset={images}", f"--paired=mask=map:{masks}"]
    words.append("--paired=twin=digits")
    assert check_data.run(words) == 1
    said = capsys.readouterr().out
    for bad in ("images/b/1.png", "masks/a/2.png"):
        assert f"{tmp_path}/{bad} cannot be decoded" in said
    assert "twin=digits\n  1,797, all checked" in said
    assert check_data.run([*words, f"--move_to={tmp_path}/bad"]) == 0
    moved = {
        str(path.relative_to(tmp_path / "bad"))
        for path in (tmp_path / "bad").rglob("*.png")
    }
    assert moved == {"b/1.png", "mask/a/2.png"}


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_label_maps_keep_their_numbers(
    fit: str, tmp_path: pathlib.Path
) -> None:
    rng = np.random.default_rng(0)
    values = {
        "deep": 1000 * rng.integers(1, 60, (20, 30)).astype(np.uint16),
        "grey": 200 * rng.integers(0, 2, (20, 30)).astype(np.uint8),
        "palette": rng.integers(1, 9, (20, 30)).astype(np.uint8),
    }
    files = {
        f"{name}.png": picture(values[name], palette=name == "palette")
        for name in values
    }
    files["two.png"] = picture(values["grey"] > 0)
    masks = fill(tmp_path / "masks", files)
    unpaired = (f"mask=map:{masks}",)
    found = read(open_data(unpaired=unpaired).unpaired["mask"])
    for shown, name in zip(found, sorted(values), strict=False):
        np.testing.assert_array_equal(shown, values[name])
    np.testing.assert_array_equal(found[3], values["grey"] > 0)
    found = read(
        open_data(
            unpaired=unpaired, image_size=12, image_width=7, image_fit=fit
        ).unpaired["mask"]
    )
    assert found.shape == (4, 12, 7)
    for shown, name in zip(found, sorted(values), strict=False):
        assert set(shown.ravel()) <= {0, *values[name].ravel()}
    if fit == "pad":
        assert not found[:, 0].any()


def png_of_bits(bits: int, rows: bytes) -> bytes:
    """Makes a grey PNG of one byte a row."""
    head = struct.pack(">IIBBBBB", 8 // bits, len(rows), bits, 0, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + bytes([row]) for row in rows))
    chunks = ((b"IHDR", head), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


@pytest.mark.parametrize(
    ("content", "numbers"),
    [
        (png_of_bits(1, b"\x31"), [[0, 0, 1, 1, 0, 0, 0, 1]]),
        (png_of_bits(2, b"\x1b"), [[0, 1, 2, 3]]),
        (png_of_bits(4, b"\x7f\x01"), [[7, 15], [0, 1]]),
        (b"P5 2 1 255 \x07\x01", [[7, 1]]),
        (b"P5 2 1 65535 \x01\x07\x00\x01", [[263, 1]]),
    ],
)
def test_numbers_of_few_bits_are_not_spread(
    content: bytes, numbers: list[list[int]], tmp_path: pathlib.Path
) -> None:
    place = fill(tmp_path, {"a.png": content})
    data = open_data(unpaired=(f"mask=map:{place}",))
    assert read(data.unpaired["mask"]).tolist() == [numbers]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"P5 2 1 7 \x07\x01", "must be binary, with the white 255"),
        (b"P2 2 1 7 7 1", "must be binary, with the white 255"),
        (picture(np.zeros((4, 4, 3), np.uint8)), "is a PNG of mode RGB"),
        (picture(GREY[0], "jpeg"), "is a JPEG of mode L; save it as a grey"),
        (b"\x89PNG", "no picture"),
    ],
)
def test_label_maps_that_are_none(
    content: bytes, words: str, tmp_path: pathlib.Path
) -> None:
    masks = fill(tmp_path, {"a.png": content})
    line = error_line(unpaired=(f"mask=map:{masks}",))
    assert f"{tmp_path}/a.png cannot be decoded" in line
    assert words in line


# Arrays.


@pytest.fixture
def rooms(tmp_path: pathlib.Path) -> str:
    np.savez(
        tmp_path / "rooms.npz",
        x=GREY,
        y=NUMBERS,
        depth=np.stack([GREY] * 3, -1),
        ids=1000 * GREY.astype(np.int64),
        kind=NUMBERS.astype(np.int64) - 2,
        size=NUMBERS[:, None] / np.float64([1, 2]),
        flags=np.stack([NUMBERS > 2, NUMBERS > 3], 1),
        x_more=GREY[:3],
        y_more=NUMBERS[:3],
        nothing=np.full(5, np.nan),
        words=np.array(list("abcde")),
        huge=np.full(5, 2**40),
        below=GREY.astype(np.int8) - 3,
        cube=np.zeros((5, 1, 1, 1, 1)),
    )
    return f"npz:{tmp_path}/rooms.npz"


def test_arrays_of_a_file(rooms: str) -> None:
    data = open_data(
        dataset=rooms,
        paired=(
            *(f"depth={rooms}#depth", f"ids=map:{rooms}#ids"),
            *(f"kind={rooms}#kind", f"size={rooms}#size"),
            f"flags={rooms}#flags",
        ),
        unpaired=(f"more={rooms}#x_more", f"others={rooms}#depth"),
    )
    found = {name: read(each) for name, each in data.further.items()}
    shown = {name: (x.dtype.name, x.shape) for name, x in found.items()}
    assert shown == {
        "depth": ("float32", (5, 4, 4, 3)),
        "ids": ("int32", (5, 4, 4)),
        "kind": ("int32", (5,)),
        "size": ("float32", (5, 2)),
        "flags": ("float32", (5, 2)),
        "more": ("float32", (3, 4, 4, 1)),
        "others": ("float32", (5, 4, 4, 3)),
    }
    assert found["ids"][:, 0, 0].tolist() == [0, 1000, 2000, 3000, 4000]
    assert found["kind"].tolist() == [-2, -1, 0, 1, 2]
    assert found["size"][3].tolist() == [3.0, 1.5]
    assert found["flags"][3].tolist() == [1.0, 0.0]
    # The labels of an array, and not those of another one.
    assert set(data.specs) == {*found, "more_labels"}
    assert "paired    size=" + f"{rooms}#size: 5 times 2 float32" in data.said()
    # As the main one, too.
    assert open_data(dataset=f"{rooms}#depth").source.image_shape == (4, 4, 3)
    assert open_data(dataset=f"{rooms}#x_more").source.num_classes == 3


@pytest.mark.parametrize(
    ("paired", "words"),
    [
        ("#none", "but no none; name another"),
        ("#x_more", "holds 3 examples, and"),
        ("#nothing", "holds what is no finite number"),
        ("#words", "is of type <U1; store it as whole numbers"),
        ("#huge", "must fit into 32 bits"),
        ("#cube", "images must be [n, height, width]"),
        ("map:#size", "is 5x2; images must be"),
        ("map:#depth", "of uint8; label maps must be [n, height, width]"),
        ("map:#below", "lies in [-3, 1]; the numbers of label maps"),
    ],
)
def test_arrays_that_are_wrong(paired: str, words: str, rooms: str) -> None:
    mark, sharp, name = paired.rpartition("#")
    line = error_line(dataset=rooms, paired=(f"it={mark}{rooms}{sharp}{name}",))
    assert words in line
    assert rooms.removeprefix("npz:") in line


@pytest.mark.parametrize("flag", ["paired", "unpaired"])
@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("folder:/nowhere", "/nowhere"),
        ("map:folder:/nowhere", "/nowhere"),
        ("npz:/nowhere/x.npz", "/nowhere/x.npz"),
        ("npz:", "names no path"),
    ],
)
def test_a_mistake_names_the_flag_that_it_is_in(
    flag: str, dataset: str, words: str
) -> None:
    line = error_line(**{flag: (f"mask={dataset}",)})
    assert line.startswith(f"{flag} (mask): dataset (")
    assert words in line


def test_a_remedy_names_the_flag_that_it_is_for(images: str) -> None:
    path = images.partition(":")[2]
    line = error_line(paired=(f"mask={path}",))
    assert f"try --paired=mask={images}" in line


def test_numbers_are_no_images_of_a_run(rooms: str) -> None:
    assert "images must be" in error_line(dataset=f"{rooms}#size")


def test_pictures_beside_an_array_are_as_many(images: str, rooms: str) -> None:
    data = open_data(dataset=rooms, paired=(f"twin={images}",))
    assert read(data.paired["twin"]).shape == (5, 4, 4, 1)
    data = open_data(dataset=images, paired=(f"size={rooms}#size",))
    assert read(data.paired["size"]).shape == (5, 2)


def test_what_does_not_fit_in_memory_stays_on_disk(
    images: str, rooms: str
) -> None:
    data = open_data(
        dataset=rooms,
        paired=(f"mask=map:{images}", f"twin={images}"),
        unpaired=("other=digits",),
        # 80 bytes of images, and 160 of label maps.
        cache_gib=300 / 2**30,
    )
    mask, twin, other = data.further.values()
    assert data.source.in_memory
    assert (mask.in_memory, twin.in_memory) == (True, False)
    assert other.in_memory
    # In the order of their names.
    assert read(mask)[:, 0, 0].tolist() == [0, 2, 4, 1, 3]


def test_first_batch_has_all(rooms: str) -> None:
    config = Config(
        paired=("twin=digits",),
        unpaired=("other=digits", f"ids=map:{rooms}#ids"),
        mirror=True,
    )
    data = sources.open_data(config)
    described = {
        name: identity.describe_input(each)
        for name, each in data.further.items()
    }
    description = identity.Description(
        config, (8, 8, 1), 10, 1797, inputs=described
    )
    assert description.specs == data.specs
    batch = pipeline.first_batch(data, config, 3)
    shapes = {name: tuple(x.shape) for name, x in batch.inputs.items()}
    assert shapes == {
        "twin": (3, 8, 8, 1),
        "ids": (3, 4, 4),
        "other": (3, 8, 8, 1),
        "other_labels": (3,),
    }
    [draw] = pipeline.make_dataset_of_part(
        data, config, pipeline.Part(3, 1, 1, 0), 0
    ).take(1)
    tf.nest.map_structure(np.testing.assert_array_equal, batch, draw)


def test_workers_must_see_the_same_beside_the_images(rooms: str) -> None:
    here = open_data(dataset=rooms, paired=(f"a={rooms}#size",))
    there = open_data(dataset=rooms, paired=(f"a={rooms}#depth",))
    numbers: list[list[int]] = [[], []]

    class One:
        def __init__(self, place: int) -> None:
            self.place = place

        def gather(self, number: int) -> list[int]:
            numbers[self.place].append(number)
            return [number]

    alike.check_images(here, One(0))  # type: ignore[arg-type]
    alike.check_images(there, One(1))  # type: ignore[arg-type]
    assert numbers[0][0] == numbers[1][0]
    assert numbers[0][1] != numbers[1][1]


def test_store_leaves_nothing_out_without_a_word(
    tmp_path: pathlib.Path,
) -> None:
    with pytest.raises(UserError, match="are not stored with a data set"):
        store.run(["store", "a", "--paired=a=digits", f"--data_dir={tmp_path}"])


# TFDS.


class Rooms(tfds.core.GeneratorBasedBuilder):
    """Has several arrays of each example, and two splits."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        return tfds.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "photo": features.Image(shape=(4, 4, 3)),
                    "mask": features.LabeledImage(labels=9, shape=(4, 4, 1)),
                    "ids": features.Image(shape=(4, 4, 1), dtype=np.uint16),
                    "kind": features.ClassLabel(num_classes=5),
                    "size": features.Tensor(shape=(2,), dtype=np.float32),
                    "has": {"a": np.bool_, "b": np.bool_},
                    "name": features.Text(),
                    "parts": features.Sequence(np.int64),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {"train": self._examples(5), "testB": self._examples(3)}

    def _examples(self, number: int) -> Any:
        for each in range(number):
            grey = np.full((4, 4, 1), each, np.uint8)
            yield (
                each,
                {
                    "photo": np.repeat(grey, 3, -1),
                    "mask": grey,
                    "ids": 1000 * grey.astype(np.uint16),
                    "kind": each,
                    "size": [each, each / 2],
                    "has": {"a": each > 2, "b": each > 3},
                    "name": "x",
                    "parts": list(range(each)),
                },
            )

    def _generate_examples(self) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_features_of_tfds(file_format: str, tmp_path: pathlib.Path) -> None:
    tfds.builder("rooms", data_dir=tmp_path).download_and_prepare(
        file_format=file_format
    )
    flags: dict[str, Any] = {
        "data_dir": str(tmp_path),
        "dataset": "rooms#photo",
        "cache_gib": 1.0 if file_format == "tfrecord" else 0.0,
    }
    names = ("kind", "size", "has")
    data = open_data(
        **flags,
        paired=(
            *(f"{name}=rooms#{name}" for name in names),
            *("mask=map:rooms#mask", "ids=map:rooms#ids"),
        ),
        unpaired=("other=rooms@testB#photo",),
    )
    numbers = np.rint((read(data.source)[:, 0, 0, 0] + 1) * 127.5)
    assert sorted(numbers) == [0, 1, 2, 3, 4]
    assert data.source.num_classes == 5
    found = {name: read(each) for name, each in data.further.items()}
    np.testing.assert_array_equal(found["kind"], numbers)
    np.testing.assert_array_equal(found["mask"][:, 0, 0], numbers)
    np.testing.assert_array_equal(found["ids"][:, 3, 3], 1000 * numbers)
    np.testing.assert_array_equal(found["size"][:, 1], numbers / 2)
    np.testing.assert_array_equal(found["has"][:, 1], numbers > 3)
    assert found["other"].shape == (3, 4, 4, 3)
    assert data.specs["other_labels"].dtype == tf.int32
    flags["dataset"] = "rooms"
    assert "one image in an example" in error_line(**flags)
    flags["dataset"] = "rooms#photo"
    for feature, words in (
        ("none", "has no images none; its features are"),
        ("name", "store it as whole numbers"),
        ("parts", "is of another length in each example"),
    ):
        line = error_line(**flags, paired=(f"it=rooms#{feature}",))
        assert words in line
    line = error_line(**flags, paired=("it=map:rooms#photo",))
    assert "label maps must have one channel" in line
    line = error_line(**flags, unpaired=("it=rooms@none#photo",))
    assert "split (none) of rooms@none#photo must be" in line
