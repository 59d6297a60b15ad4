"""Sources of real images: `open_source` opens what --dataset names."""

from __future__ import annotations

import os

from dtrain.config import Config
from dtrain.data.sources import folder, idx, memory, npz, prepared
from dtrain.data.sources.source import Source
from dtrain.errors import UserError

__all__ = ["Source", "open_source"]

_KINDS = {
    "folder": folder.open_folder,
    "idx": idx.open_idx,
    "npz": npz.open_npz,
}


def open_source(
    config: Config, report: memory.Report = memory.to_stderr
) -> Source:
    """Opens the data set of a run, in memory if it fits.

    Call it when the strategy exists, for TensorFlow cannot be configured for
    several workers once it has run anything; and outside of its scope, for
    the images are not to be mirrored.

    Args:
        config: the fields of the group Data count, and `conditional`.
        report: called with a line of progress while reading takes long.

    Returns:
        The images, converted to `image_size` and `channels`.

    Raises:
        UserError: there is no such data set, or it is malformed.
    """
    kind, colon, path = config.dataset.partition(":")
    opener = _KINDS.get(kind) if colon else None
    if opener is None:
        origin = prepared.open_prepared(config, report)
    elif not path:
        raise UserError(f"dataset ({config.dataset}) names no path")
    else:
        origin = opener(os.path.expanduser(path), config)
    if config.conditional and not origin.num_classes:
        raise UserError(
            f"conditional needs labels, and {config.dataset} has none"
        )
    if origin.in_memory or not memory.fits(origin, config.cache_gib):
        return origin
    return memory.load(origin, report)
