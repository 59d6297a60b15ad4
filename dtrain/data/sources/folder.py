"""Folders of pictures, optionally one folder for each class.

Files that lie in the folder itself have no labels. Otherwise each folder in
it is a class, with all that is below it; the classes are numbered by their
sorted names, and the images of a class are in the order of theirs. A table of
labels, `dataset.json` or what --labels names, comes before the folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from dtrain import flags
from dtrain.config import DataSettings
from dtrain.data.sources import labels as labels_lib
from dtrain.data.sources import listing as listing_lib
from dtrain.data.sources import source
from dtrain.data.sources.listing import Listing
from dtrain.data.sources.picture_files import PictureFiles, Store
from dtrain.data.sources.source import Wanted
from dtrain.errors import UserError
from dtrain.storage import access, files

_SPLITS = frozenset(
    ("train", "training", "test", "testing", "val", "valid", "validation")
)
# Of a folder without a flag; StyleGAN's tools write it.
_TABLE = "dataset.json"


class Folder(Store):
    """Pictures below a folder, read by TensorFlow's C++."""

    def __init__(self, path: str) -> None:
        """Reads nothing yet.

        Args:
            path: of the folder, which may be gs://.
        """
        self.path = path

    def place(self, name: str) -> str:
        """Returns the path of a file."""
        return os.path.join(self.path, name)

    def below(self, folder: str) -> Folder:
        """Returns a folder in it."""
        return Folder(self.place(folder))

    def read(self, name: str) -> bytes | None:
        """Returns a file that is no picture; None if there is none."""
        return files.read(self.place(name))

    def content(self, name: str) -> bytes:
        """Returns the content of a picture."""
        return tf.io.read_file(os.fsencode(self.place(name))).numpy()

    def fetcher(self, names: Sequence[str]) -> Callable[[tf.Tensor], tf.Tensor]:
        """Looks the paths up; see `Store.fetcher`."""
        paths = tf.constant([os.fsencode(self.place(name)) for name in names])
        return lambda indices: tf.gather(paths, indices)

    def opened(self, fetched: tf.Tensor) -> tf.Tensor:
        """Reads a file; see `Store.opened`."""
        return tf.io.read_file(fetched)


def open_folder(
    path: str, config: DataSettings, wanted: Wanted = source.USUAL
) -> PictureFiles:
    """Opens a folder of images; each folder in it is a class.

    Args:
        path: of the folder, which may be gs://.
        config: the fields of the group Data count.
        wanted: what of it is read.

    Raises:
        UserError: there is no such folder, it holds no images or is not laid
            out as it must be, or no image can be read.
        StorageError: the store that it is on does not answer.
    """
    with access.to("dataset", path):
        path = path.rstrip("/") or path
        if not files.is_directory(path):
            raise UserError(
                f"dataset ({config.dataset}) must name a folder; {path} is "
                "not one" + source.hint(path, "folder")
            )
        listing = listing_lib.of_folder(path)
        return open_store(Folder(path), "folder", listing, config, wanted)


def open_store(
    store: Store,
    kind: str,
    listing: Listing,
    config: DataSettings,
    wanted: Wanted,
) -> PictureFiles:
    """Opens pictures wherever they are, with the labels that they have.

    Args:
        store: where they are.
        kind: as in `folder:/path`.
        listing: of what is there.
        config: the fields of the group Data count.
        wanted: what of it is read.

    Raises:
        UserError: see `open_folder`.
    """
    store, listing = _of_split(store, listing, config, wanted)
    if not listing.names:
        endings = ", ".join(listing_lib.ENDINGS[:6])
        others = listing.others() if listing.passed_over else "none"
        raise UserError(
            f"{store.path} holds no images ({endings}, ...), nor folders of "
            f"them; files of other kinds: {others}"
            + source.hint(store.path, kind)
        )
    found = labels_lib.Labelled(None)
    if wanted.has_labels:
        found = _labels(store, listing, config)
        listing = listing._replace(num_labels_left=found.num_others)
    return PictureFiles(
        store, listing, found.labels, config, is_map=wanted.is_map
    )


def _of_split(
    store: Store, listing: Listing, config: DataSettings, wanted: Wanted
) -> tuple[Store, Listing]:
    """Chooses the folder of a split, where there is one for each.

    Raises:
        UserError: there is none for that which is asked for.
    """
    tops, split = listing.folders(), config.split
    has_splits = {top.lower() for top in tops} <= _SPLITS and all(
        "/" in name for name in listing.names
    )
    if not (has_splits and tops):
        # Of a further set the user may have named the split's own folder.
        if split != "train" and not wanted.is_further:
            raise UserError(
                f"split ({split}) does not apply to {config.dataset}, which "
                "holds no folders of splits; name the folder of the split "
                "itself"
            )
        return store, listing
    if split not in tops:
        raise UserError(
            f"split ({split}) of {config.dataset} must be {', '.join(tops)}: "
            "it holds folders of splits, not of classes"
        )
    return store.below(split), listing.below(split)


def _labels(
    store: Store, listing: Listing, config: DataSettings
) -> labels_lib.Labelled:
    """Finds the labels of the pictures.

    Raises:
        UserError: there is no such table, or it is malformed; or it cannot be
            told what is a class.
    """
    if config.labels == "none":
        return labels_lib.Labelled(None)
    if config.labels == "auto":
        content = store.read(_TABLE)
        path = store.place(_TABLE)
        if content is not None:
            found = labels_lib.of_pictures(path, content, listing.names)
            if found.labels is not None:
                return found
    if config.labels in ("auto", "folders"):
        return labels_lib.Labelled(_of_folders(store, listing))
    path, content = store.place(config.labels), store.read(config.labels)
    if content is None:
        path = flags.expand_home(config.labels)
        content = files.read(path)
    if content is None:
        raise UserError(
            f"labels ({config.labels}) must be auto, folders, none, or a CSV "
            f"or JSON file, in {store.path} or as a path of its own"
        )
    return labels_lib.of_pictures(path, content, listing.names, store.path)


def _of_folders(store: Store, listing: Listing) -> np.ndarray | None:
    beside = next((name for name in listing.names if "/" not in name), None)
    tops = listing.folders()
    if beside and tops:
        raise UserError(
            f"{store.path} holds both images ({store.place(beside)}) and "
            f"folders of images ({store.place(tops[0])}); move one of them "
            "elsewhere, or give --labels=none"
        )
    if tops and listing.empty:
        raise UserError(
            f"{store.place(listing.empty[0])} holds no images, so it is no "
            "class; remove it, or hide it by a dot before its name"
        )
    return labels_lib.of_folders(listing.names)
