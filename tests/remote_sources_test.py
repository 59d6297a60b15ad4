"""Images on an object store are those of the same files on a disk."""

from __future__ import annotations

import gzip
import hashlib
import pathlib
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest
import tensorflow as tf

from dtrain.config import Config
from dtrain.data import sources
from tests import object_store, runs

NUM_IMAGES = 12


def write_idx(path: pathlib.Path, values: np.ndarray, *, zipped: bool) -> None:
    head = bytes((0, 0, 8, values.ndim))
    head += b"".join(size.to_bytes(4, "big") for size in values.shape)
    data = head + values.tobytes()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(data) if zipped else data)


def write_all(directory: pathlib.Path) -> None:
    """Writes the same images in every layout."""
    chance = np.random.default_rng(3)
    images = chance.integers(0, 256, (NUM_IMAGES, 6, 5), np.uint8)
    labels = (np.arange(NUM_IMAGES) // 4).astype(np.uint8)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        png = tf.io.encode_png(image[..., np.newaxis]).numpy()
        for folder in (f"classes/{label}/more", "flat", ".hidden"):
            path = directory / folder / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
    (directory / "flat/notes.txt").write_text("no image")
    with zipfile.ZipFile(directory / "set.zip", "w") as archive:
        for path in sorted((directory / "classes").rglob("*.png")):
            archive.write(path, path.relative_to(directory / "classes"))
    np.savez(directory / "set.npz", x=images, y=labels)
    write_idx(directory / "idx/train-images-idx3-ubyte", images, zipped=False)
    write_idx(directory / "idx/train-labels-idx1-ubyte", labels, zipped=False)
    write_idx(directory / "idx/t10k-images.idx3-ubyte.gz", images, zipped=True)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[pathlib.Path, object_store.Client]]:
    directory = tmp_path_factory.mktemp("data")
    write_all(directory)
    with (
        object_store.ObjectStore(rate=0.05, seed=2) as store,
        object_store.Client(
            runs.environment(
                **store.environment(), GCS_RETRY_CONFIG_MAX_RETRIES="4"
            )
        ) as client,
    ):
        for path in directory.rglob("*"):
            if path.is_file():
                name = path.relative_to(directory).as_posix()
                store.write(f"data/{name}", path.read_bytes())
        store.write("data/empty/", b"")
        store.write("data/broken/00.png", b"no PNG")
        store.write("data/broken.npz", b"PK")
        store.write("data/short/train-images-idx3-ubyte", b"\0\0\x08\x03")
        # What is listed may be five changes old.
        for number in range(5):
            store.write(f"data/later/{number}", b"")
        yield directory, client


def digest(dataset: str, split: str) -> list:
    """Reads all images; returns what tells one set from another."""
    source = sources.open_source(
        Config(dataset=dataset, split=split, cache_gib=0)
    )
    images, labels = source.read(tf.range(source.num_images, dtype=tf.int64))
    content = images.numpy().tobytes() + labels.numpy().tobytes()
    return [
        source.num_images,
        source.num_classes,
        source.image_shape,
        hashlib.sha256(content).hexdigest(),
    ]


@pytest.mark.parametrize(
    ("dataset", "split"),
    [
        ("folder:{}/classes", "train"),
        ("folder:{}/flat", "train"),
        ("folder:{}/flat/", "train"),
        ("idx:{}/idx", "train"),
        ("idx:{}/idx", "test"),
        ("npz:{}/set.npz", "train"),
        ("zip:{}/set.zip", "train"),
    ],
)
def test_same_images(
    dataset: str,
    split: str,
    served: tuple[pathlib.Path, object_store.Client],
) -> None:
    directory, client = served
    local = client.call(digest, dataset.format(directory), split)
    assert local[0] == NUM_IMAGES
    assert client.call(digest, dataset.format("gs://bucket/data"), split) == (
        local
    )


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ("folder:gs://bucket/data/nothing", "must name a folder"),
        ("folder:gs://bucket/data/empty", "holds no images"),
        ("folder:gs://bucket/data/broken", "cannot be decoded"),
        ("folder:gs://other/data", "there is no gs://other"),
        ("idx:gs://bucket/data/nothing", "must name a directory of IDX files"),
        ("idx:gs://bucket/data/flat", "holds no train-images-idx3-ubyte"),
        ("idx:gs://bucket/data/short", "is truncated within its header"),
        ("npz:gs://bucket/data/nothing.npz", "must name an npz file"),
        ("npz:gs://bucket/data/broken.npz", "is not an npz file"),
        ("npz:s3://bucket/data/set.npz", "s3:// is not read here"),
    ],
)
def test_mistakes_are_one_line(
    dataset: str,
    said: str,
    served: tuple[pathlib.Path, object_store.Client],
) -> None:
    with pytest.raises(object_store.Raised) as caught:
        served[1].call(digest, dataset, "train")
    assert caught.value.kind == "UserError"
    assert said in caught.value.text
    assert "\n" not in caught.value.text


def lose_store(dataset: str) -> str:
    """Reads an image that the store does not give."""
    source = sources.open_source(Config(dataset=dataset, cache_gib=0))
    try:
        source.read(tf.constant([1], tf.int64))
    except tf.errors.OpError as error:
        try:
            return str(source.fault(1, error))
        except Exception as fault:  # noqa: BLE001 - told apart by the test
            return type(fault).__name__
    return "read"


def test_store_that_is_lost_is_no_broken_image(
    served: tuple[pathlib.Path, object_store.Client],
) -> None:
    directory, _ = served
    with object_store.ObjectStore() as store:
        for path in (directory / "classes").rglob("*.png"):
            name = path.relative_to(directory).as_posix()
            store.write(f"data/{name}", path.read_bytes())
        # The first image is read to know the shape of all.
        store.inject("503", r"GET /bucket/.*01\.png", count=1000)
        with object_store.Client(
            runs.environment(
                **store.environment(), GCS_RETRY_CONFIG_MAX_RETRIES="1"
            )
        ) as client:
            answer = client.call(lose_store, "folder:gs://bucket/data/classes")
    assert answer == "StorageError"
