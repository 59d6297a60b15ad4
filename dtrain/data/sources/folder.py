"""Folders of PNG and JPEG files, optionally one folder for each class.

Files that lie in the folder itself have no labels. Otherwise each folder in
it is a class; the classes are numbered by their sorted names, and the images
of a class are in the order of theirs. Hidden files and folders are left out.
Images are not turned as a camera's notes in them ask for.
"""

from __future__ import annotations

import os

import tensorflow as tf

from dtrain.config import DataSettings
from dtrain.data.sources import conversion, pictures, source
from dtrain.data.sources.source import EncodedSource, Images
from dtrain.errors import UserError
from dtrain.storage import access, files

_ENDINGS = (".png", ".jpg", ".jpeg")
# Whose sizes are looked at before any is read.
_NUM_LOOKED_AT = 16
# The fault of a file, not of the store that it is on.
_UNREADABLE = (tf.errors.InvalidArgumentError, tf.errors.NotFoundError)
_SPLITS = frozenset(
    ("train", "training", "test", "testing", "val", "valid", "validation")
)


class FolderSource(EncodedSource):
    """Image files, decoded when they are read."""

    def __init__(
        self, paths: list[str], labels: list[int] | None, config: DataSettings
    ) -> None:
        """Decodes the first image, to learn its shape or raise UserError.

        Args:
            paths: of the files; at least one.
            labels: a class for each file, or None.
            config: `dataset`, `image_size` and `channels` count.
        """
        self._files = paths
        self._image_size, self._channels = config.image_size, config.channels
        self.room = pictures.Room.of_host()
        self._first_shape = self._shape(paths[0])
        super().__init__(
            config.dataset,
            len(paths),
            conversion.converted_shape(
                self._first_shape, config.image_size, config.channels
            ),
            0 if labels is None else labels[-1] + 1,
        )
        if not self._image_size:
            self._check_sizes()
        if labels is None:
            labels = [0] * len(paths)
        with tf.device("CPU:0"):
            self._paths = tf.constant([os.fsencode(path) for path in paths])
            self._labels = tf.constant(labels, tf.int32)

    def fetch(self, indices: tf.Tensor) -> Images:
        """Looks up paths and labels; see `Source.fetch`."""
        paths = tf.gather(self._paths, indices)
        return paths, tf.gather(self._labels, indices)

    def encoded_one(self, fetched: Images) -> Images:
        """Reads one file; see `EncodedSource.encoded_one`."""
        path, label = fetched
        return tf.io.read_file(path), label

    def decode_content(self, content: tf.Tensor) -> tf.Tensor:
        """Decodes one file; see `EncodedSource.decode_content`."""
        image = tf.ensure_shape(
            self._decode(content), (None, None, self._first_shape[-1])
        )
        return conversion.convert(image, self._image_size, 0)

    def fault(self, index: int, error: tf.errors.OpError) -> UserError:
        """Names the file; see `Source.fault`."""
        path, first = self._files[index], self._files[0]
        try:
            shape = self._shape(path)
        except UserError as fault:
            return fault
        if shape[-1] != self._first_shape[-1]:
            return UserError(
                f"{first} has {self._first_shape[-1]} channels but {path} "
                f"{shape[-1]}; give --channels=1 or --channels=3"
            )
        if shape != self._first_shape and not self._image_size:
            return UserError(
                f"{first} is {source.shown(self._first_shape)} but {path} "
                f"{source.shown(shape)}; give "
                + source.size_flag(self._first_shape, shape)
            )
        return super().fault(index, error)

    def _check_sizes(self) -> None:
        """Looks at some images whether they are of the size of the first.

        Others are found when they are read, which may be hours later.

        Raises:
            UserError: one is of another size.
        """
        step = max(1, len(self._files) // _NUM_LOOKED_AT)
        for index in range(step, len(self._files), step):
            try:
                content = tf.io.read_file(os.fsencode(self._files[index]))
                size = tuple(pictures.need(content).size.numpy())
            except tf.errors.OpError:
                # Its fault is told when it is read.
                continue
            if any(size) and size != self._first_shape[:2]:
                other = tf.errors.InvalidArgumentError(None, None, "its size")
                raise self.fault(index, other)

    def _decode(self, content: tf.Tensor) -> tf.Tensor:
        # decode_image knows the format by the content, not by the name.
        return tf.io.decode_image(
            content, self._channels, expand_animations=False
        )

    def _shape(self, path: str) -> tuple[int, int, int]:
        try:
            content = tf.io.read_file(os.fsencode(path))
            pictures.check(path, content.numpy(), self.room)
            image = self._decode(content)
        except tf.errors.OpError as error:
            if files.is_remote(path) and not isinstance(error, _UNREADABLE):
                mistake = access.explain(
                    "dataset", path, files.store_error(error)
                )
                raise mistake from error
            raise UserError(
                f"{path} cannot be decoded: {source.reason(error)}; repair or "
                "remove it"
            ) from error
        height, width, channels = image.shape
        return height, width, channels


def open_folder(path: str, config: DataSettings) -> FolderSource:
    """Opens a folder of images; each folder in it is a class.

    Args:
        path: of the folder, which may be gs://.
        config: `dataset`, `split`, `image_size` and `channels` count.

    Raises:
        UserError: there is no such folder, it holds no images or is not laid
            out as it must be, or the first image cannot be read.
        StorageError: the store that it is on does not answer.
    """
    with access.to("dataset", path):
        return _open(path.rstrip("/") or path, config)


def _open(path: str, config: DataSettings) -> FolderSource:
    if not files.is_directory(path):
        raise UserError(
            f"dataset ({config.dataset}) must name a folder; {path} is not one"
            + source.hint(path, "folder")
        )
    if config.split != "train":
        raise UserError(
            f"split ({config.split}) does not apply to a folder; name the "
            "folder of the split itself"
        )
    images, folders = _list(path)
    inside = {folder: _list(folder)[0] for folder in folders}
    classes = {folder: names for folder, names in inside.items() if names}
    if images and classes:
        raise UserError(
            f"{path} holds both images ({images[0]}) and folders of images "
            f"({next(iter(classes))}); move one of them elsewhere"
        )
    if images:
        return FolderSource(images, None, config)
    if not classes:
        raise UserError(
            f"{path} holds no images ({', '.join(_ENDINGS)}), nor folders of "
            "them" + source.hint(path, "folder")
        )
    _check_classes(path, inside)
    paths = [name for names in classes.values() for name in names]
    labels = [
        label for label, names in enumerate(classes.values()) for _ in names
    ]
    return FolderSource(paths, labels, config)


def _check_classes(path: str, inside: dict[str, list[str]]) -> None:
    names = {os.path.basename(folder).lower() for folder in inside}
    if names <= _SPLITS:
        raise UserError(
            f"{path} holds splits ({', '.join(sorted(names))}), not classes; "
            f"try --dataset=folder:{next(iter(inside))}"
        )
    for folder, images in inside.items():
        if not images:
            raise UserError(
                f"{folder} holds no images, so it is no class; remove it, or "
                "hide it by a dot before its name"
            )


def _list(path: str) -> tuple[list[str], list[str]]:
    # Sorted, for each disk lists a directory in an order of its own.
    images, folders = [], []
    try:
        for name, is_folder in files.entries(path):
            if name.startswith("."):
                continue
            if is_folder:
                folders.append(os.path.join(path, name))
            elif name.lower().endswith(_ENDINGS):
                images.append(os.path.join(path, name))
    except files.StoreError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be listed: {error.strerror}") from error
    return sorted(images), sorted(folders)
