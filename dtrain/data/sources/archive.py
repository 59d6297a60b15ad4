"""Zip archives of pictures, laid out as folders of them are."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from dtrain.config import DataSettings
from dtrain.data.sources import folder, python_calls, room, source
from dtrain.data.sources import listing as listing_lib
from dtrain.data.sources.picture_files import PictureFiles, Store
from dtrain.data.sources.source import Wanted
from dtrain.errors import UserError
from dtrain.storage import access, files

# What zipfile raises on archives that are not sound.
MALFORMED = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError),
    *(NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error),
)


class Archive(Store):
    """Pictures in an archive that stays open; many threads may read it."""

    def __init__(
        self,
        path: str,
        archive: zipfile.ZipFile,
        members: Mapping[str, zipfile.ZipInfo],
    ) -> None:
        """Reads nothing yet.

        Args:
            path: of the archive, and of the folder in it that this is.
            archive: the open file.
            members: its files by their names below that folder.
        """
        self.path = path
        self._archive, self._members = archive, members

    def place(self, name: str) -> str:
        """Returns the path of the archive, and in it."""
        return os.path.join(self.path, name)

    def below(self, folder: str) -> Archive:
        """Returns a folder in it."""
        begin = f"{folder}/"
        members = {
            name.removeprefix(begin): member
            for name, member in self._members.items()
            if name.startswith(begin)
        }
        return Archive(self.place(folder), self._archive, members)

    def read(self, name: str) -> bytes | None:
        """Returns a file; None if there is none.

        Raises:
            UserError: it is damaged.
        """
        if name not in self._members:
            return None
        try:
            return self.content(name)
        except tf.errors.OpError as error:
            raise UserError(
                f"{self.place(name)} cannot be read: {source.reason(error)}"
            ) from error

    def content(self, name: str) -> bytes:
        """Unpacks a file; see `Store.content`."""
        member = self._members[name]
        try:
            room.check(name, member.file_size)
            return self._archive.read(member)
        except MALFORMED as error:
            why = source.reason(error)
            damage = tf.errors.DataLossError(None, None, why)
            raise damage from error

    def fetcher(self, names: Sequence[str]) -> Callable[[tf.Tensor], tf.Tensor]:
        """Unpacks files; see `Store.fetcher`."""

        def contents(indices: np.ndarray) -> np.ndarray:
            read = [self.content(names[int(index)]) for index in indices]
            return np.array(read, object)

        def fetch(indices: tf.Tensor) -> tf.Tensor:
            found = python_calls.numpy_function(contents, [indices], tf.string)
            return tf.ensure_shape(found, (None,))

        return fetch

    def opened(self, fetched: tf.Tensor) -> tf.Tensor:
        """Returns what is fetched already; see `Store.opened`."""
        return fetched


def open_zip(
    path: str, config: DataSettings, wanted: Wanted = source.USUAL
) -> PictureFiles:
    """Opens an archive of images; each folder in it is a class.

    Args:
        path: of the file; gs:// is read into memory.
        config: the fields of the group Data count.
        wanted: what of it is read.

    Raises:
        UserError: there is no such archive, or it is damaged; and as for
            `folder.open_folder`.
        StorageError: the store that it is on does not answer.
    """
    content = _fetch(path)
    if content is None or not zipfile.is_zipfile(content):
        raise UserError(
            f"dataset ({config.dataset}) must name a zip archive; {path} is "
            "not one" + source.hint(path, "zip")
        )
    try:
        archive = zipfile.ZipFile(content)
    except MALFORMED as error:
        raise UserError(
            f"{path} cannot be read: {source.reason(error)}"
        ) from error
    members = {
        member.filename: member
        for member in archive.infolist()
        if not member.filename.endswith("/")
    }
    store = Archive(path, archive, members)
    return folder.open_store(
        store, "zip", listing_lib.of_names(members), config, wanted
    )


def _fetch(path: str) -> str | io.BytesIO | None:
    if not files.is_remote(path):
        return path if os.path.isfile(path) else None
    with access.to("dataset", path):
        room.check(path, files.size(path) or 0)
        content = files.read(path)
    return None if content is None else io.BytesIO(content)
