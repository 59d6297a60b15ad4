"""Pictures, archives of them and tables of labels, damaged at random.

    python -m tests.hostile_pictures 10000 0

decodes 10,000 mutations of sound pictures of all formats, and then of archives
and of tables. Each is read, or refused in a line; nothing else, within seconds,
in 1 GiB with all of TensorFlow.
"""

from __future__ import annotations

import io
import json
import pathlib
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf
from PIL import Image

from dtrain.config import Config
from dtrain.data.sources import archive, checking, labels, pictures
from dtrain.data.sources.listing import Listing
from dtrain.data.sources.picture_files import PictureFiles, Store
from tests.hostile_checkpoints import attempt, mutations
from tests.hostile_files import peak_bytes

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
TABLES = {
    "x.json": b'{"labels": [["a/0.png", 1], ["a/1.png", 0]]}',
    "x.csv": b"name,label\na/0.png,3\na/1.png,dog\n",
}
# Pictures that are decoded in one go, by threads.
_CHUNK = 500


class Held(Store):
    """Pictures in memory."""

    def __init__(self, contents: Sequence[bytes]) -> None:
        self.path, self._contents = "held", contents

    def place(self, name: str) -> str:
        return f"held/{name}"

    def below(self, folder: str) -> Held:
        raise NotImplementedError(folder)

    def read(self, name: str) -> bytes | None:
        raise NotImplementedError(name)

    def content(self, name: str) -> bytes:
        return self._contents[int(name)]

    def fetcher(self, names: Sequence[str]) -> Callable[[tf.Tensor], tf.Tensor]:
        contents = tf.constant([self.content(name) for name in names])
        return lambda indices: tf.gather(contents, indices)

    def opened(self, fetched: tf.Tensor) -> tf.Tensor:
        return fetched


def sound_pictures() -> list[bytes]:
    image = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        *(("jpeg", image, {}), ("jpeg", image, {"exif": exif})),
        *(("png", image, {}), ("png", image.convert("P"), {"exif": exif})),
        *(("gif", image, {}), ("webp", image, {}), ("bmp", image, {})),
        *(("webp", image, {"lossless": True}), ("avif", image, {})),
        *(("tiff", image, {}), ("tiff", image, {"compression": "lzma"})),
        *(("tiff", image, {"compression": "jpeg"}), ("ppm", image, {})),
        ("tiff", image, {"compression": "tiff_lzw"}),
    ]
    made = []
    for kind, picture, options in kinds:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        made.append(file.getvalue())
    made.append(tf.io.encode_png(PIXELS.astype(np.uint16) * 16).numpy())
    return made


def sound_maps() -> list[bytes]:
    numbers = PIXELS[..., 0]
    grey, palette = Image.fromarray(numbers), Image.fromarray(numbers)
    palette.putpalette(range(255, -1, -1))
    deep = Image.fromarray(numbers.astype(np.uint16) * 200)
    kinds = [
        *(("png", grey, {}), ("png", palette, {}), ("png", deep, {})),
        *(("bmp", palette, {}), ("gif", palette, {}), ("tiff", deep, {})),
        *(("tiff", palette, {"compression": "lzma"}), ("ppm", grey, {})),
    ]
    made = []
    for kind, picture, options in kinds:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        made.append(file.getvalue())
    return made


def damaged_pictures(
    sounds: list[bytes], number: int, seed: int
) -> Iterator[bytes]:
    makers = [
        mutations(sound, number, seed + place)
        for place, sound in enumerate(sounds)
    ]
    for place in range(number):
        yield next(makers[place % len(makers)])


def count_pictures(
    number: int, seed: int, *, is_map: bool = False
) -> dict[str, int]:
    outcomes = {"read": 0, "refused": 0}
    sounds = sound_maps() if is_map else sound_pictures()
    left = list(damaged_pictures(sounds, number, seed))
    for start in range(0, number, _CHUNK):
        # The first is sound, and says what the others are converted to.
        contents = [sounds[0], *left[start : start + _CHUNK]]
        names = [str(place) for place in range(len(contents))]
        config = Config(dataset="held", image_size=4, channels=3)
        files = PictureFiles(
            Held(contents), Listing(names, {}), None, config, is_map=is_map
        )
        faults = checking.faults(files, checking.shapes(files, _silent))
        for fault in faults.values():
            assert "\n" not in fault.text, fault.text
        outcomes["refused"] += len(faults)
        outcomes["read"] += len(contents) - 1 - len(faults)
        rest = checking.without(files, faults)
        size = rest.num_images
        said = attempt(lambda rest=rest, size=size: read(rest, size))
        assert "values out of" in said or not said, said
    return outcomes


def read(files: PictureFiles, size: int) -> None:
    try:
        files.read(tf.range(size, dtype=tf.int64))
    except tf.errors.OpError as error:
        fault = files.find_fault(range(size))
        assert fault is not None
        raise fault from error


def _silent(line: str) -> None:
    del line


def sound_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for number, content in enumerate(sound_pictures()[:2]):
            made.writestr(f"a/{number}.png", content)
        made.writestr("dataset.json", TABLES["x.json"])
    return file.getvalue()


def read_zip(path: pathlib.Path) -> None:
    config = Config(dataset=f"zip:{path}", image_size=4, channels=3)
    files = archive.open_zip(str(path), config)
    for index in range(files.num_images):
        fault = files.damage(index)
        if fault:
            raise fault


def read_table(name: str, data: bytes) -> None:
    names = ["a/0.png", "a/1.png"]
    found = labels.of_pictures(name, data, names)
    assert found.labels is None or found.labels.shape == (2,)


def count_zips(number: int, seed: int) -> dict[str, int]:
    outcomes = {"read": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "x.zip")
        for data in mutations(sound_zip(), number, seed):
            path.write_bytes(data)
            said = attempt(lambda: read_zip(path))
            outcomes["refused" if said else "read"] += 1
    return outcomes


def count_tables(number: int, seed: int) -> dict[str, int]:
    outcomes = {"read": 0, "refused": 0}
    for name, table in TABLES.items():
        for data in mutations(table, number // 2, seed):
            said = attempt(lambda name=name, x=data: read_table(name, x))
            outcomes["refused" if said else "read"] += 1
    return outcomes


def main(number: int, seed: int) -> None:
    began = time.monotonic()
    # Of a small machine; or what says that it is large is decoded.
    room = pictures.Room(2**27, 2**22)
    pictures.Room.of_host = lambda: room
    outcomes = {
        "pictures": count_pictures(number, seed),
        "label maps": count_pictures(number, seed, is_map=True),
        "zip": count_zips(number, seed),
        "labels": count_tables(number, seed),
    }
    peak, secs = peak_bytes() >> 20, round(time.monotonic() - began)
    print(json.dumps({"of": outcomes, "secs": secs, "peak_mib": peak}))


if __name__ == "__main__":
    tf.get_logger().setLevel("ERROR")
    main(int(sys.argv[1]), int(sys.argv[2]))
