"""npz files: NumPy arrays of images and labels in one archive.

Images are the array `x_<split>`, or else `x` or `images`: [n, H, W] or
[n, H, W, C] with 1 to 4 channels, or [n, C, H, W] with --array_layout=chw;
uint8, uint16, or floats in [0, 1] or in [-1, 1] (where no value is negative,
[0, 1] is meant). Labels are `y_<split>`, or else `y`, `label` or `labels`, in
any form that `labels` knows; they may be missing. `npz:/path.npz#name` takes
another array for the images.

Beside the images of a run there may be label maps, [n, H, W] of whole numbers,
and numbers that are no images; see `values`.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from dtrain.config import DataSettings
from dtrain.data.sources import arrays, conversion, room, source, values
from dtrain.data.sources import labels as labels_lib
from dtrain.data.sources.source import Source, Wanted
from dtrain.errors import UserError
from dtrain.storage import access, files

# What NumPy and zipfile raise on files that are not sound.
_MALFORMED = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError),
    *(NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error),
)


def open_npz(
    path: str, config: DataSettings, wanted: Wanted = source.USUAL
) -> Source:
    """Opens an npz file: images, and labels if there are any.

    Args:
        path: of the file; gs:// is read into memory.
        config: `split`, `image_size` and `channels` count.
        wanted: what of it is read.

    Raises:
        UserError: there is no such file, it is malformed, or its arrays are
            not images and labels.
        StorageError: the store that it is on does not answer.
    """
    return _make_source(config, wanted, *read(path, config, wanted))


def read(
    path: str, config: DataSettings, wanted: Wanted
) -> tuple[tuple[str, np.ndarray], tuple[str, np.ndarray | None]]:
    """Reads the arrays of a file that are images, and their labels.

    Args:
        path: of the file; gs:// is read into memory.
        config: `split` counts.
        wanted: what of it is read.

    Returns:
        Each with its name for an error; None where there are no labels.

    Raises:
        UserError: there is no such file, it is malformed, or has no such
            arrays.
        StorageError: the store that it is on does not answer.
    """
    content = _fetch(path) if files.is_remote(path) else path
    if content is None or (content == path and not os.path.isfile(path)):
        raise UserError(
            f"dataset ({config.dataset}) must name an npz file; "
            f"{path} is not one" + source.hint(path, "npz")
        )
    if not zipfile.is_zipfile(content):
        raise UserError(
            f"{path} is not an npz file; write one with numpy.savez"
            + source.hint(path, "npz")
        )
    try:
        with np.load(content, allow_pickle=False) as file:
            images_name, labels_name = _choose(
                path, file.files, config.split, wanted
            )
            for name in filter(None, (images_name, labels_name)):
                _check_member(path, file.zip, name)
            images = file[images_name]
            labels = file[labels_name] if labels_name else None
    except UserError:
        raise
    except _MALFORMED as error:
        raise UserError(
            f"{path} cannot be read: {source.reason(error)}"
        ) from error
    # NumPy returns what is no array as bytes.
    if isinstance(images, bytes) or isinstance(labels, bytes):
        raise UserError(f"{path} cannot be read: it holds no NumPy arrays")
    return (
        (f"{images_name} in {path}", images),
        (f"{labels_name} in {path}", labels),
    )


def _make_source(
    config: DataSettings,
    wanted: Wanted,
    named_images: tuple[str, np.ndarray],
    named_labels: tuple[str, np.ndarray | None],
) -> Source:
    """Makes a source of arrays, with their names for an error."""
    name, images = named_images
    if wanted.is_further and not wanted.is_map and images.ndim < 3:
        return values.ValueSource(config.dataset, values.of(name, images))
    images = _as_images(name, images, config)
    if wanted.is_map:
        images = values.numbers_of_map(name, images)
    else:
        images = _as_bytes(name, images, config)
    name, labels = named_labels
    if labels is not None:
        labels = labels_lib.numbered(name, labels, len(images))
    return arrays.ArraySource(config, images, labels, is_map=wanted.is_map)


def _check_member(path: str, archive: zipfile.ZipFile, name: str) -> None:
    """Reads the header of an array, before any of its values.

    Raises:
        UserError: the memory does not hold the array, or the header asks for
            more or less than there is.
        ValueError: it is none.
    """
    # NumPy takes a name with or without its ending.
    member = name if name in archive.namelist() else f"{name}.npy"
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"{name} is of version {version}; 1.0 is written")
        head_bytes = stream.tell()
    shape, _, dtype = header
    if dtype.hasobject:
        # NumPy refuses it: only pickle, which runs code, reads objects.
        return
    num_bytes = math.prod(shape) * dtype.itemsize
    held_bytes = archive.getinfo(member).file_size - head_bytes
    if num_bytes != held_bytes:
        raise UserError(
            f"{name} in {path} has {held_bytes} bytes, but its header "
            f"({source.shown(shape)} of {dtype}) asks for {num_bytes}; write "
            "it again"
        )
    # And a copy as bytes, if these are none.
    copied = 0 if dtype.itemsize == 1 else math.prod(shape)
    room.check(f"{name} in {path}", num_bytes + copied)


def _fetch(path: str) -> io.BytesIO | None:
    with access.to("dataset", path):
        content = files.read(path)
    return None if content is None else io.BytesIO(content)


def _choose(
    path: str, names: Sequence[str], split: str, wanted: Wanted
) -> tuple[str, str | None]:
    """Returns the names of the images, and of their labels if there are any.

    Raises:
        UserError: there are no such images.
    """
    held = ", ".join(names) or "nothing"
    images = wanted.array
    if images and images not in names:
        raise UserError(f"{path} holds {held}, but no {images}; name another")
    if not images:
        usual = [f"x_{split}", *(("x", "images") if split == "train" else ())]
        images = next((name for name in usual if name in names), "")
    if not images:
        raise UserError(
            f"{path} holds {held}; --split={split} needs x_{split}"
            + (", x or images" if split == "train" else "")
        )
    labels: tuple[str, ...] = ("y", "label", "labels")
    if images.startswith("x_"):
        labels = (f"y_{images.removeprefix('x_')}",)
    elif wanted.is_further and wanted.array:
        # These may be the labels of another one.
        labels = ()
    if not wanted.has_labels:
        labels = ()
    return images, next((name for name in labels if name in names), None)


def _as_images(
    name: str, images: np.ndarray, config: DataSettings
) -> np.ndarray:
    shape = images.shape
    if images.ndim == 3:
        images = images[..., np.newaxis]
    elif images.ndim == 4 and config.array_layout == "chw":
        images = np.moveaxis(images, 1, -1)
    if images.ndim != 4 or images.shape[-1] not in (1, 2, 3, 4):
        hint = ""
        if len(shape) == 4 and shape[1] in (1, 2, 3, 4):
            hint = "; if the channels come first, give --array_layout=chw"
        raise UserError(
            f"{name} is {source.shown(shape) or 'one number'}; images must be "
            f"[n, height, width] or [n, height, width, 1 to 4 channels]{hint}"
        )
    if images.size == 0:
        raise UserError(f"{name} holds no images")
    return images


def _as_bytes(
    name: str, images: np.ndarray, config: DataSettings
) -> np.ndarray:
    """Scales values to 8 bits, an image at a time."""
    if images.dtype == np.uint8:
        return images
    low, high = float(images.min()), float(images.max())
    levels = conversion.levels(name, images.dtype, low, high, config)
    converted = np.empty(images.shape, np.uint8)
    for index, image in enumerate(images):
        scaled = image.astype(np.float64) * levels.scale
        converted[index] = np.rint(scaled - levels.black * levels.scale)
    return converted
