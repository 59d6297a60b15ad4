"""Sources of real images: `open_source` opens what --dataset names."""

from __future__ import annotations

import os
from typing import NoReturn

from dtrain import flags
from dtrain.config import Config, DataSettings
from dtrain.data import digits
from dtrain.data.sources import (
    archive,
    arrays,
    checking,
    folder,
    idx,
    memory,
    npz,
    source,
)
from dtrain.data.sources.picture_files import PictureFiles
from dtrain.data.sources.source import Source
from dtrain.errors import UserError
from dtrain.storage import access, files

__all__ = ["Source", "open_source"]

_KINDS = {
    "folder": folder.open_folder,
    "idx": idx.open_idx,
    "npz": npz.open_npz,
    "zip": archive.open_zip,
}


def open_source(
    config: Config, report: memory.Report = memory.to_stderr
) -> Source:
    """Opens the data set of a run, in memory if it fits.

    Call it after the strategy is made, for TensorFlow cannot be configured for
    several workers once it has run anything; and outside of its scope, or the
    images are mirrored.

    Args:
        config: the fields of the group Data count, and `conditional`.
        report: called with a line of progress if reading takes long.

    Returns:
        The images, converted to `image_size` and `channels`.

    Raises:
        UserError: there is no such data set, or it is malformed.
    """
    if _is_embedded(config):
        return _open_embedded(config, report)
    origin = _open(config, report)
    if isinstance(origin, PictureFiles):
        if config.skip_damaged:
            origin = checking.sound(origin, report)
        elif origin.first_fault:
            raise origin.refusal(origin.first_fault)
    if config.conditional and not origin.num_classes:
        raise UserError(
            f"conditional needs labels, and {config.dataset} has none"
        )
    if origin.in_memory or not memory.fits(origin, config.cache_gib):
        return origin
    return memory.load(origin, report)


def open_files(config: Config) -> PictureFiles:
    """Opens the pictures of a folder or an archive, damaged ones among them.

    Args:
        config: the fields of the group Data count.

    Raises:
        UserError: there are none, or the data set is of another kind.
    """
    origin = None
    if config.dataset.startswith(("folder:", "zip:")):
        origin = _open(config, memory.to_stderr)
    if not isinstance(origin, PictureFiles):
        raise UserError(
            f"dataset ({config.dataset}) must be folder:/path or zip:/path; "
            "of other kinds all is checked at each start"
        )
    return origin


def _open(config: Config, report: memory.Report) -> Source:
    kind, colon, path = config.dataset.partition(":")
    opener = _KINDS.get(kind) if colon else None
    if opener is None and _is_path(config.dataset):
        _refuse_path(config.dataset)
    if opener is None:
        # Few runs need TFDS, which takes a while to import.
        from dtrain.data.sources import prepared

        return prepared.open_prepared(config, report)
    if not path:
        raise UserError(f"dataset ({config.dataset}) names no path")
    return opener(flags.expand_home(path), config)


def _is_path(dataset: str) -> bool:
    """Tells a path from a name of TFDS, which may have a / in it."""
    return files.is_remote(dataset) or dataset.startswith(
        (os.sep, "~", f".{os.sep}", f"..{os.sep}")
    )


def _refuse_path(dataset: str) -> NoReturn:
    path = os.path.expanduser(dataset)
    with access.to("dataset", path):
        likely = source.kind_of(path)
    remedy = f"try --dataset={likely}" if likely else "and nothing is there"
    raise UserError(
        f"dataset ({dataset}) is a path; it must be folder:/path, zip:/path, "
        f"idx:/path, npz:/path or the name of a TFDS data set: {remedy}"
    )


def _is_embedded(config: DataSettings) -> bool:
    """Tells whether the whole of the embedded set is wanted, in memory.

    For a part of it TFDS has to say which images are in it, and where a
    directory is named the set is prepared there.
    """
    return (
        config.dataset == "digits"
        and config.split == "train"
        and not config.data_dir
        and config.cache_gib > 0
    )


def _open_embedded(config: DataSettings, report: memory.Report) -> Source:
    images, labels = digits.read()
    origin = arrays.ArraySource(config, images, labels)
    if origin.image_shape != images.shape[1:]:
        return memory.load(origin, report)
    return memory.MemorySource(origin, memory.aligned(images), labels)
