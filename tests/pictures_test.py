"""Pictures as they lie around: every format, and what is beside them."""

from __future__ import annotations

import io
import json
import os
import pathlib
import shutil
import struct
import zipfile
import zlib
from typing import Any, ClassVar

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from dtrain import check_data, errors
from dtrain import main as trainer
from dtrain.cluster import environment
from dtrain.cluster.workers import Workers
from dtrain.config import Config
from dtrain.data import sources
from dtrain.data.sources import (
    by_pillow,
    checking,
    conversion,
    labels,
    listing,
    pictures,
)
from dtrain.errors import UserError
from dtrain.record import reals
from dtrain.run import alike
from tests import runs

# Of few colours, so that a palette has them all.
COLOURS = np.zeros((4, 6, 3), np.uint8)
COLOURS[1:, 2:] = (250, 30, 120)
COLOURS[3, 4:] = (20, 200, 90)
GREY = COLOURS[..., 0]


def open_source(place: pathlib.Path, **fields: Any) -> sources.Source:
    return sources.open_source(Config(dataset=f"folder:{place}", **fields))


def error_line(place: pathlib.Path, **fields: Any) -> str:
    with pytest.raises(UserError) as raised:
        open_source(place, **fields)
    line = raised.value.text
    assert "\n" not in line
    return line


def read_all(source: sources.Source) -> tuple[np.ndarray, np.ndarray]:
    images, numbers = source.read(tf.range(source.num_images, dtype=tf.int64))
    return images.numpy(), numbers.numpy()


def encoded(image: Any, kind: str, **options: Any) -> bytes:
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write(place: pathlib.Path, *contents: bytes, ending: str = "png") -> None:
    place.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(contents):
        (place / f"{number}.{ending}").write_bytes(content)


# Formats.

FORMATS = {
    "png": {},
    "webp": {"lossless": True},
    "gif": {},
    "bmp": {},
    "tiff": {},
    "avif": {"quality": 100, "subsampling": "4:4:4"},
    "ppm": {},
    "jpeg": {"quality": 100, "subsampling": 0},
}
ANIMATED = ("gif", "webp")


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_every_format_whatever_its_name(
    cache_gib: float, tmp_path: pathlib.Path
) -> None:
    contents = [
        encoded(COLOURS, kind, **options) for kind, options in FORMATS.items()
    ]
    endings = [*FORMATS, "tif", "jfif", "JPG", "dib"]
    for number, ending in enumerate(endings):
        content = contents[number % len(contents)]
        (tmp_path / f"{number:02}.{ending}").write_bytes(content)
    source = open_source(tmp_path, cache_gib=cache_gib)
    images, _ = read_all(source)
    assert len(images) == len(endings)
    for number, image in enumerate(images):
        kind = list(FORMATS)[number % len(FORMATS)]
        most = {"jpeg": 20, "avif": 20}.get(kind, 0)
        off = np.abs(image.astype(int) - COLOURS).max()
        assert off <= most, kind


def test_first_frame_of_an_animation(tmp_path: pathlib.Path) -> None:
    others = [Image.fromarray(COLOURS[::-1])]
    more = {"save_all": True, "append_images": others}
    write(
        tmp_path,
        *[encoded(COLOURS, kind, **more, **FORMATS[kind]) for kind in ANIMATED],
    )
    images, _ = read_all(open_source(tmp_path))
    np.testing.assert_array_equal(images, [COLOURS, COLOURS])


DEEP = np.linspace(0, 4095, 24).round().astype(np.uint16).reshape(4, 6)


def deep_png(channels: int) -> bytes:
    values = np.repeat(DEEP[..., np.newaxis], channels, -1)
    return tf.io.encode_png(values).numpy()


def test_16_bits_have_their_own_range(tmp_path: pathlib.Path) -> None:
    """What holds 12 bits is not black."""
    contents = [encoded(DEEP, "tiff"), encoded(DEEP, "png")]
    write(tmp_path, deep_png(1), deep_png(3), *contents)
    wanted = np.rint(DEEP * (255 / 4095)).astype(np.uint8)[..., np.newaxis]
    images, _ = read_all(open_source(tmp_path, channels=3))
    np.testing.assert_array_equal(images, [wanted.repeat(3, -1)] * 4)
    (tmp_path / "1.png").unlink()
    images, _ = read_all(open_source(tmp_path, cache_gib=0.0))
    np.testing.assert_array_equal(images, [wanted] * 3)
    dark = open_source(tmp_path, white_level=65535, cache_gib=0.0)
    assert read_all(dark)[0].max() == 16
    low = open_source(tmp_path, white_level=4000, cache_gib=0.0)
    for index, name in enumerate(("0.png", "2.png", "3.png")):
        fault = low.find_fault([index])
        assert fault
        assert fault.text == (
            f"{tmp_path}/{name} has values above white_level (4000); give "
            "--white_level=65535"
        )


def test_16_bits_of_an_array(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "a.npz", x=DEEP[np.newaxis])
    dataset = f"npz:{tmp_path}/a.npz"
    source = sources.open_source(Config(dataset=dataset))
    images, _ = read_all(source)
    wanted = np.rint(DEEP * (255 / 4095)).astype(np.uint8)
    np.testing.assert_array_equal(images[0, ..., 0], wanted)
    with pytest.raises(UserError, match="holds 4095, above white_level"):
        sources.open_source(Config(dataset=dataset, white_level=4000))


def test_floats_are_no_picture(tmp_path: pathlib.Path) -> None:
    (tmp_path / "0.ppm").write_bytes(b"Pf\n1 1\n-1.0\n" + bytes(4))
    line = error_line(tmp_path)
    assert "0.ppm cannot be decoded: floats are not read; save it as" in line


# What is transparent.


def with_alpha() -> Image.Image:
    """Transparent at the left, where another colour is hidden."""
    alpha = np.where(np.arange(6) < 2, 0, 255)
    alpha = np.broadcast_to(alpha, (4, 6)).astype(np.uint8)
    hidden = np.where(alpha[..., np.newaxis] == 0, 77, COLOURS)
    return Image.fromarray(
        np.concatenate([hidden.astype(np.uint8), alpha[..., np.newaxis]], -1)
    )


def with_key() -> bytes:
    """A PNG whose one colour, black, is transparent."""
    chunk = b"tRNS" + bytes(6)
    chunk = struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk))
    content = encoded(COLOURS, "png")
    where = content.index(b"IDAT") - 4
    return content[:where] + chunk + content[where:]


def with_palette() -> bytes:
    image = with_alpha().convert("RGB").quantize(8)
    return encoded(image, "png", transparency=image.getpixel((0, 0)))


def with_16_bits() -> bytes:
    values = np.asarray(with_alpha()).astype(np.uint16) * 257
    return tf.io.encode_png(values).numpy()


TRANSPARENT = {
    "RGBA": lambda: encoded(with_alpha(), "png"),
    "grey and alpha": lambda: encoded(with_alpha().convert("LA"), "png"),
    "palette": with_palette,
    "a colour": with_key,
    "webp": lambda: encoded(with_alpha(), "webp", lossless=True, exact=True),
    "gif": lambda: encoded(with_alpha(), "gif"),
    "tiff": lambda: encoded(with_alpha(), "tiff"),
    "16 bits": with_16_bits,
}


def test_alpha_goes_onto_the_background(tmp_path: pathlib.Path) -> None:
    for case, make in TRANSPARENT.items():
        (tmp_path / f"{case}.png").write_bytes(make())
    green = conversion.Form(background=(0, 255, 0))
    for channels in (1, 3):
        images, _ = read_all(
            open_source(tmp_path, background="00ff00", channels=channels)
        )
        assert images.shape == (len(TRANSPARENT), 4, 6, channels)
        off = images[:, :, 0].astype(int) - green.colour(channels)
        assert np.abs(off).max() <= 1
    images, _ = read_all(open_source(tmp_path, channels=4))
    assert (images[:, :, 0, 3] == 0).all()
    # The colour that is transparent is that of the first row, too.
    assert (images[:, 1:, 5, 3] == 255).all()


def test_grey_with_alpha_stays_grey(tmp_path: pathlib.Path) -> None:
    write(tmp_path, TRANSPARENT["grey and alpha"](), encoded(GREY, "png"))
    images, _ = read_all(open_source(tmp_path, background="0000ff"))
    assert images.shape == (2, 4, 6, 1)
    assert images[0, 0, 0] == conversion.Form(background=(0, 0, 255)).colour(1)


def test_grey_and_colours_do_not_mix_without_a_word(
    tmp_path: pathlib.Path,
) -> None:
    image = with_alpha()
    write(tmp_path, encoded(COLOURS, "png"), encoded(image, "png"))
    (tmp_path / "2.webp").write_bytes(encoded(image.convert("LA"), "png"))
    assert "2.webp 1; give --channels=1 or" in error_line(tmp_path)


# What a camera notes.


def turned(number: int, kind: str, order: str = ">", offset: int = 8) -> bytes:
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F] = "Camera"
    exif[0x0112] = number
    made = exif.tobytes(offset)
    options = {**FORMATS[kind], "exif": made}
    return encoded(COLOURS, kind, **options)


@pytest.mark.parametrize("numbers", [range(1, 5), range(5, 9)])
def test_cameras_are_turned(numbers: range, tmp_path: pathlib.Path) -> None:
    for number in numbers:
        contents = {
            "a.jpg": turned(number, "jpeg"),
            "b.jpg": turned(number, "jpeg", "<"),
            # As only Pillow reads it.
            "c.jpg": turned(number, "jpeg", offset=16),
            "d.png": turned(number, "png"),
            "e.webp": turned(number, "webp"),
        }
        for name, content in contents.items():
            (tmp_path / f"{number}{name}").write_bytes(content)
    images, _ = read_all(open_source(tmp_path))
    for number, same in zip(
        numbers, images.reshape(4, 5, *images.shape[1:]), strict=True
    ):
        with Image.open(tmp_path / f"{number}d.png") as image:
            wanted = np.asarray(ImageOps.exif_transpose(image)).astype(int)
        assert np.abs(same - wanted).max() <= 20, number
        # Of JPEG, by TensorFlow's own decoder.
        np.testing.assert_array_equal(same[0], same[1])


def test_landscape_and_portrait_are_two_sizes(tmp_path: pathlib.Path) -> None:
    write(tmp_path, turned(1, "jpeg"), turned(6, "jpeg"), ending="jpg")
    assert "0.jpg is 4x6x3 but" in error_line(tmp_path)


# What is below a folder.


def test_all_below_a_folder_is_used_or_told(tmp_path: pathlib.Path) -> None:
    png = encoded(GREY, "png")
    for name in (
        *("cat/0.png", "cat/more/1.PNG", "dog/a/b/c/2.png"),
        *("__MACOSX/cat/0.png", "cat/._0.png", "cat/.DS_Store", "@eaDir/3.png"),
        *("lost+found/4.png", "dog/Thumbs.db", "notes.txt", "dog/a/x.HEIC"),
        *("dog/desktop.ini", "README", ".hidden/5.png"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png)
    (tmp_path / "dog/a/circle").symlink_to(tmp_path / "dog")
    # To read it would be to wait for ever.
    os.mkfifo(tmp_path / "dog/pipe.png")
    (tmp_path / "dog/lost.png").symlink_to(tmp_path / "gone.png")
    source = open_source(tmp_path)
    assert read_all(source)[1].tolist() == [0, 0, 1]
    assert source.num_classes == 2
    assert source.files == (
        "used 3: 3 .png",
        "passed over 14: 3 hidden, 1 .heic, 1 .txt, 1 @eaDir/, 1 Thumbs.db, "
        "1 __MACOSX/, 1 desktop.ini, 1 links in a circle, 4 kinds more",
    )
    (tmp_path / "dog/a/circle").unlink()
    (tmp_path / "README").unlink()
    (tmp_path / "notes.txt").unlink()
    told = open_source(tmp_path).files[1]
    assert "1 links to nothing, " in told
    shutil.rmtree(tmp_path / "lost+found")
    assert "1 pipes or devices" in open_source(tmp_path).files[1]


def test_deeper_than_the_classes(tmp_path: pathlib.Path) -> None:
    """As CelebA comes, and in an order that does not depend on the disk."""
    names = ["a/a/1.png", "a-b/1.png", "a/2.png", "a/10.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(GREY, "png"))
    found = listing.of_folder(str(tmp_path))
    assert found.names == ["a/10.png", "a/2.png", "a/a/1.png", "a-b/1.png"]
    assert found == listing.of_names(reversed(names))
    assert labels.of_folders(found.names).tolist() == [0, 0, 0, 1]
    odd = listing.of_names(["a/1.png", "a/../../2.png", ".b/3.png"])
    assert odd.passed_over == {"outside of it": 1, "hidden": 1}


# Labels.


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([0, 2, 1], [0, 2, 1]),
        ([1, 3, 2], [0, 2, 1]),
        ([[1], [3], [2]], [0, 2, 1]),
        ([2.0, 0.0, 1.0], [2, 0, 1]),
        (np.eye(4, dtype=np.float32)[[3, 0, 1]], [3, 0, 1]),
        (np.eye(4, dtype=bool)[[3, 0, 1]], [3, 0, 1]),
        (["dog", "ant", "dog"], [1, 0, 1]),
        ([b"dog", b"ant", b"dog"], [1, 0, 1]),
        (["10", "9", "11"], [10, 9, 11]),
        ([True, False, True], [1, 0, 1]),
    ],
)
def test_labels_of_every_form(given: Any, wanted: list[int]) -> None:
    made = labels.numbered("y", np.array(given), 3)
    assert made.dtype == np.int32
    assert made.tolist() == wanted


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, "is one number"),
        ([1, 2], "y is 2; there must be one label for each of the 3 images"),
        ([[1, 1], [0, 1], [1, 0]], "y is 3x2"),
        ([1.5, 0, 0], "y has 1.5; labels must be whole numbers"),
        ([np.nan, 0, 0], "y has nan; labels must be whole numbers"),
        ([np.inf, 0, 0], "lies in [0, 100000]"),
        ([-1, 0, 0], "lies in [-1, 0]"),
        ([1j, 0, 0], "is of type complex128"),
    ],
)
def test_labels_that_are_none(given: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        labels.numbered("y", np.array(given), 3)
    assert said in raised.value.text


PLACES = ["00000/a.png", "00000/b.png", "00001/c.png"]


def write_places(place: pathlib.Path, **beside: str) -> None:
    for number, name in enumerate(PLACES):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(encoded(GREY + np.uint8(number), "png"))
    for name, text in beside.items():
        (place / name.replace("_", ".")).write_text(text)


def labels_of(place: pathlib.Path, flag: str) -> list[int]:
    source = sources.open_files(Config(dataset=f"folder:{place}", labels=flag))
    _, numbers = source.fetch(tf.range(source.num_images, dtype=tf.int64))
    numbers = numbers.numpy().tolist()
    assert source.num_classes in (0, max(numbers) + 1)
    return numbers


STYLEGAN = {"labels": [[name, 5 - n] for n, name in enumerate(PLACES)]}


@pytest.mark.parametrize(
    ("flag", "name", "text", "wanted"),
    [
        ("auto", "dataset_json", json.dumps(STYLEGAN), [5, 4, 3]),
        ("auto", "dataset_json", '{"labels": null}', [0, 0, 1]),
        ("folders", "dataset_json", json.dumps(STYLEGAN), [0, 0, 1]),
        ("none", "dataset_json", json.dumps(STYLEGAN), None),
        ("t.json", "t_json", '{"a": "x", "b": "y", "c": "x"}', [0, 1, 0]),
        ("t.csv", "t_csv", "id,breed\na,pug\nb,collie\nc,pug\n", [1, 0, 1]),
        ("t.csv", "t_csv", "00000\\a.png;1\n./00000/b.png;2\nc;2", [0, 1, 1]),
        ("t.csv", "t_csv", "\ufeffa\t7\r\n\r\nb\t0\r\nc\t0\r\nd\t9", [7, 0, 0]),
        ("t.csv", "t_csv", "a,1.0\nb,0.0\nc,2.0", [1, 0, 2]),
        ("t.csv", "t_csv", "IN/00000/a.png,0\nIN/00000/b,1\nc,1", [0, 1, 1]),
    ],
)
def test_a_table_of_labels(
    flag: str,
    name: str,
    text: str,
    wanted: list[int] | None,
    tmp_path: pathlib.Path,
) -> None:
    write_places(tmp_path, **{name: text.replace("IN", str(tmp_path))})
    made = labels_of(tmp_path, flag)
    assert made == (wanted or [0, 0, 0])


def test_one_hot_in_a_table(tmp_path: pathlib.Path) -> None:
    rows = [[name, [0, n == 0, n > 0]] for n, name in enumerate(PLACES)]
    table = json.dumps({"labels": [[n, list(map(int, v))] for n, v in rows]})
    write_places(tmp_path / "in", dataset_json=table)
    assert labels_of(tmp_path / "in", "auto") == [1, 2, 2]
    # One that lies elsewhere is named by its path.
    (tmp_path / "t.json").write_text(json.dumps(STYLEGAN))
    assert labels_of(tmp_path / "in", str(tmp_path / "t.json")) == [5, 4, 3]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", "a,1\nb,2\n", "has no label for 1 of 3 pictures, such as"),
        ("t.csv", "a,1\nb,2\na,2\nc,1", "no table of labels: a has two labels"),
        ("t.csv", "a,1\nb,\nc,1", "no table of labels: b has an empty label"),
        ("t.csv", "a,1,2\n", "no table of labels: a row has 3 columns"),
        ("t.json", "{", "is no table of labels: "),
        ("t.json", "3", "must be a list of names and labels"),
        ("t.json", "[[1, 2]]", "a name and a label for each picture"),
        ("t.json", "[" * 10**5, "is no table of labels: "),
        ("t.json", '{"a": 1, "b": [], "c": "x"}', "labels must be whole"),
        ("t.json", '{"a": 1e400, "b": 0, "c": 1}', "labels must be whole"),
        ("t.csv", "a,0.0\nb,0.5\nc,1.0", "has 0.5; labels must be whole"),
        ("t.csv", "a,-1\nb,-1\nc,-1", "lies in [-1, -1]; labels must count"),
    ],
)
def test_a_table_that_is_wrong(
    name: str, text: str, said: str, tmp_path: pathlib.Path
) -> None:
    write_places(tmp_path)
    (tmp_path / name).write_text(text)
    line = error_line(tmp_path, labels=name)
    assert said in line
    assert f"{tmp_path}/{name}" in line


def test_a_table_of_more_or_of_the_same_names(tmp_path: pathlib.Path) -> None:
    """What of it is not used is told, and what it leaves open."""
    rows = "file,label\na,1\nb,0\nc,0\nd,1\n00009/e.png,5\n"
    write_places(tmp_path, t_csv=rows)
    source = open_source(tmp_path, labels="t.csv")
    assert source.files[-1] == "not there 2 that have labels"
    (tmp_path / "00001/a.png").write_bytes(encoded(GREY, "png"))
    line = error_line(tmp_path, labels="t.csv")
    assert "has no label for 2 of 4 pictures, such as 00000/a.png" in line
    assert "several have that name: write it with its folder" in line


def test_images_beside_folders_without_labels(tmp_path: pathlib.Path) -> None:
    write_places(tmp_path)
    write(tmp_path, encoded(GREY, "png"))
    assert "or give --labels=none" in error_line(tmp_path)
    source = open_source(tmp_path, labels="none")
    assert (source.num_images, source.num_classes) == (4, 0)


# Archives.


def zipped(place: pathlib.Path, path: pathlib.Path) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(place.rglob("*")):
            archive.write(file, file.relative_to(place))
    return f"zip:{path}"


def test_an_archive_is_its_folder(tmp_path: pathlib.Path) -> None:
    place = tmp_path / "in"
    write_places(place, dataset_json=json.dumps(STYLEGAN))
    (place / "__MACOSX").mkdir()
    write(place / "__MACOSX", b"x")
    dataset = zipped(place, tmp_path / "a.zip")
    folder = open_source(place, cache_gib=0.0)
    wanted = read_all(folder)
    for cache_gib in (0.0, 1.0):
        config = Config(dataset=dataset, cache_gib=cache_gib)
        source = sources.open_source(config)
        for got, want in zip(read_all(source), wanted, strict=True):
            np.testing.assert_array_equal(got, want)
        assert source.digest == folder.digest
    with pytest.raises(UserError, match=f"try --dataset={dataset}"):
        sources.open_source(Config(dataset=str(tmp_path / "a.zip")))


def test_damage_in_an_archive(tmp_path: pathlib.Path) -> None:
    write_places(tmp_path / "in")
    dataset = zipped(tmp_path / "in", tmp_path / "a.zip")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    where = content.index(b"00000/b.png") + 40
    content[where : where + 4] = b"\0" * 4
    (tmp_path / "a.zip").write_bytes(content)
    config = Config(dataset=dataset)
    source = sources.open_files(config)
    fault = source.damage(1)
    assert fault
    assert f"{tmp_path}/a.zip/00000/b.png cannot be" in fault.text
    assert checking.sound(source).num_images == 2
    (tmp_path / "a.zip").write_bytes(content[:-30])
    with pytest.raises(UserError, match="must name a zip archive"):
        sources.open_source(config)


def test_channels_first_by_a_hint(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "a.npz", x=COLOURS.transpose(2, 0, 1)[np.newaxis])
    config = Config(dataset=f"npz:{tmp_path}/a.npz", array_layout="chw")
    images, _ = read_all(sources.open_source(config))
    np.testing.assert_array_equal(images, COLOURS[np.newaxis])


# What is damaged.

KINDS = {
    "jpg": ("jpeg", {}),
    "jfif": ("jpeg", {}),
    "png": ("png", {}),
    "webp": ("webp", {"lossless": True}),
    "gif": ("gif", {}),
    "bmp": ("bmp", {}),
    "tif": ("tiff", {}),
    "avif": ("avif", {}),
}


@pytest.fixture
def thousand(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of 1,000 pictures of every kind, a tenth damaged."""
    place = tmp_path / "thousand"
    chance = np.random.default_rng(5)
    pixels = chance.integers(0, 256, (12, 12, 3), np.uint8)
    image = Image.fromarray(pixels)
    modes = [image, image.convert("RGBA"), image.convert("P")]
    contents = {
        ending: [
            encoded(each, kind, **options)
            for each in (
                modes if ending in ("png", "webp", "tif") else modes[:1]
            )
        ]
        for ending, (kind, options) in KINDS.items()
    }
    contents["png"].append(
        tf.io.encode_png(pixels.astype(np.uint16) * 16).numpy()
    )
    for number in range(1000):
        ending = list(KINDS)[number % len(KINDS)]
        folder = place / f"class_{number % 3}" / f"part_{number % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        several = contents[ending]
        content = several[number // 7 % len(several)]
        if number % 10 == 3:
            content = [b"", content[: len(content) // 2], b"<html>"][number % 3]
        (folder / f"{number:04}.{ending}").write_bytes(content)
    for name in ("__MACOSX/a.jpg", "._b.jpg", "Thumbs.db", "list.txt"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(b"x")
    return place


def test_a_thousand_pictures_of_every_kind(
    thousand: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flag = f"--dataset=folder:{thousand}"
    arguments = [
        *("main", flag, "--skip_damaged", "--image_size=8", "--num_steps=1"),
        *(*runs.SMALL, f"--run_dir={tmp_path}/run"),
    ]
    assert trainer.run(arguments) == errors.FINISHED
    output = capsys.readouterr().out
    assert f"data      folder:{thousand}: 900 images 8x8x3, 3 classes" in output
    assert "files     used 900: " in output
    assert "files     damaged 100: class_0/part_" in output

    damaged = {
        path
        for path in thousand.glob("class_*/*/*")
        if int(path.stem) % 10 == 3
    }
    aside = tmp_path / "aside"
    assert check_data.run(["check_data", flag, f"--move_to={aside}"]) == 0
    head, *rows, moved = capsys.readouterr().out.splitlines()
    assert head == f"folder:{thousand}"
    table = {row[2:15].strip(): row[15:] for row in rows[:4]}
    assert table["used"].startswith("900: ")
    assert table["passed over"] == (
        "4: 1 .txt, 1 Thumbs.db, 1 __MACOSX/, 1 hidden"
    )
    assert table["damaged"] == "100"
    assert table["sizes"] == "900 12x12"
    assert {pathlib.Path(row.split()[0]) for row in rows[4:]} == damaged
    assert moved == f"moved 100 to {aside}"
    assert {path.relative_to(aside) for path in aside.rglob("*.*")} == {
        path.relative_to(thousand) for path in damaged
    }
    # With the same list a run goes on, without the flag.
    run = json.loads((tmp_path / "run/config.json").read_text())
    source = sources.open_files(Config(dataset=f"folder:{thousand}"))
    assert source.digest == run["data"]["files"]


def test_check_data_names_what_it_cannot(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(*arguments: str) -> int:
        return check_data.run(["check_data", *arguments])

    with pytest.raises(UserError, match="must be folder:/path or zip:/path"):
        check("--dataset=digits")
    write(tmp_path / "in", encoded(GREY, "png"), encoded(COLOURS, "png"))
    flag = f"--dataset=folder:{tmp_path}/in"
    # Of other colours and sizes is not damaged.
    assert check(flag) == errors.FINISHED
    (tmp_path / "in/0.png").write_bytes(b"x")
    # A name may be no text, and move the cursor of a terminal.
    odd = os.fsencode(tmp_path) + b"/in/\xff\x1b[2J"
    for ending in (b".png", b".\x1b"):
        pathlib.Path(os.fsdecode(odd + ending)).write_bytes(b"x")
    capsys.readouterr()
    assert check(flag) == 1
    output = capsys.readouterr().out
    assert "1: 1 .\\x1b\n" in output
    assert f"{tmp_path}/in/\\udcff\\x1b[2J.png cannot be decoded" in output
    for path in (tmp_path / "in").glob("*2J.*"):
        path.unlink()
    dataset = zipped(tmp_path / "in", tmp_path / "a.zip")
    with pytest.raises(UserError, match="cannot be moved to"):
        check(f"--dataset={dataset}", f"--move_to={tmp_path}/aside")
    (tmp_path / "aside/0.png").touch()
    with pytest.raises(UserError, match=r"holds 0\.png already"):
        check(flag, f"--move_to={tmp_path}/aside")
    (tmp_path / "in/1.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no picture of .* can be decoded"):
        check(flag)
    capsys.readouterr()


def test_a_disk_that_fails_damages_no_picture(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *[encoded(GREY, "png")] * 3)
    source = sources.open_files(Config(dataset=f"folder:{tmp_path}"))

    def fail(name: str) -> bytes:
        raise tf.errors.UnknownError(None, None, f"{name}: Input/output error")

    monkeypatch.setattr(source.store, "content", fail)
    with pytest.raises(UserError) as raised:
        source.damage(1)
    assert "1.png cannot be read: 1.png: Input/output" in raised.value.text


def test_a_picture_too_large_for_pillow(tmp_path: pathlib.Path) -> None:
    write(tmp_path, encoded(np.zeros((64, 64, 3), np.uint8), "webp"))
    room = pictures.Room(2**10, 2**10)
    with pytest.raises(by_pillow.PictureError) as raised:
        by_pillow.decode((tmp_path / "0.png").read_bytes(), 255, room)
    assert "says it is 64 x 64 pixels in" in str(raised.value)


# A run.


def train(place: pathlib.Path, *flags: str) -> pathlib.Path:
    run_dir = place.parent / f"{place.name}-run{len(flags)}"
    arguments = ["main", f"--dataset=folder:{place}", f"--run_dir={run_dir}"]
    arguments += [*runs.SMALL, "--num_steps=1", "--image_size=8", *flags]
    assert trainer.run(arguments) == errors.FINISHED
    return run_dir


def test_a_run_shows_its_real_images(tmp_path: pathlib.Path) -> None:
    """Of four channels, too, as its samples are."""
    place = tmp_path / "in"
    write(place, *[encoded(with_alpha(), "png")] * 12)
    for flags, left in (((), 255), (("--channels=4", "--mirror"), 64)):
        run_dir = train(place, *flags)
        with Image.open(reals.path(str(run_dir))) as grid:
            pixels = np.asarray(grid.convert("RGB"))
        assert left in np.unique(pixels[..., 1])
        assert list(run_dir.glob("samples/*.png"))
    # The names of the files are a part of what a run is.
    os.rename(place / "3.png", place / "33.png")
    with pytest.raises(UserError, match=r"the pictures of .* have other names"):
        train(place)


def test_workers_that_see_other_images_are_refused(
    tmp_path: pathlib.Path,
) -> None:
    class Both(Workers):
        """Workers that come one after the other."""

        seen: ClassVar[list[int]] = []

        def gather(self, number: int) -> list[int]:
            self.seen.append(number)
            return self.seen

    workers = Both(tf.distribute.get_strategy(), environment.ALONE)
    for name in ("a", "a", "b"):
        path = tmp_path / name / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(GREY, "png"))
    for name in ("a", "a"):
        config = Config(dataset=f"folder:{tmp_path}/{name}")
        alike.check_images(sources.open_data(config), workers)
    config = Config(dataset=f"folder:{tmp_path}/b")
    with pytest.raises(UserError, match="the workers see different images"):
        alike.check_images(sources.open_data(config), workers)
