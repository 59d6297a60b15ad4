"""Files of pictures, in a folder or in an archive: looked at, checked, read."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dtrain.config import DataSettings
from dtrain.data.sources import (
    by_pillow,
    checking,
    conversion,
    decoding,
    pictures,
    source,
)
from dtrain.data.sources import labels as labels_lib
from dtrain.data.sources.listing import Listing
from dtrain.data.sources.source import EncodedSource, Images
from dtrain.errors import UserError
from dtrain.storage import access, files

# Whose sizes are looked at before any is read, and whose white level.
_NUM_LOOKED_AT, _NUM_LEVELS = 16, 64
# The fault of a file, not of the store that it is on.
_UNREADABLE = (
    *(tf.errors.InvalidArgumentError, tf.errors.NotFoundError),
    *(tf.errors.DataLossError, tf.errors.FailedPreconditionError),
)


class DamagedError(UserError):
    """A picture cannot be decoded."""


class Store(abc.ABC):
    """Where files of pictures lie.

    Attributes:
        path: that the user named.
    """

    path: str

    @abc.abstractmethod
    def place(self, name: str) -> str:
        """Returns what a file is called in an error."""

    @abc.abstractmethod
    def below(self, folder: str) -> Store:
        """Returns one of its folders."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes | None:
        """Returns a file that is no picture; None if there is none."""

    @abc.abstractmethod
    def content(self, name: str) -> bytes:
        """Returns the content of a picture; or raises a `tf.errors.OpError`."""

    @abc.abstractmethod
    def fetcher(self, names: Sequence[str]) -> Callable[[tf.Tensor], tf.Tensor]:
        """Makes what fetches pictures by index, for `opened`.

        Args:
            names: of all pictures.

        Returns:
            Of int64 [b] makes string [b]; the part that may run Python.
        """

    @abc.abstractmethod
    def opened(self, fetched: tf.Tensor) -> tf.Tensor:
        """Returns the content of a picture, in C++ alone.

        Args:
            fetched: string []; of what the `fetcher` returned.
        """


class PictureFiles(EncodedSource):
    """Pictures that are decoded when they are read.

    Attributes:
        store: where they are.
        listing: what is there.
        decoder: decodes them.
        fetch_files: fetches them by index, for `store.opened`.
        first_fault: why the first picture cannot be decoded; None if it can.
    """

    def __init__(
        self,
        store: Store,
        listing: Listing,
        labels: np.ndarray | None,
        config: DataSettings,
        *,
        is_map: bool = False,
    ) -> None:
        """Decodes the first sound picture, to learn its shape.

        Args:
            store: where they are.
            listing: of at least one picture.
            labels: int32 [n], or None.
            config: `dataset` and the form of the images count.
            is_map: whether they are label maps.
        """
        self.store, self.listing, self._config = store, listing, config
        self.first_fault: DamagedError | None = None
        self._labels, self.is_map = labels, is_map
        self.room = pictures.Room.of_host()
        form = conversion.Form.of(config, is_map=is_map)
        kind = decoding.MapDecoder if is_map else decoding.Decoder
        self.decoder = kind(form, 0, decoding.ALL_BITS, self.room)
        self._first, self._first_shape = self._find_first()
        super().__init__(
            config.dataset,
            len(listing.names),
            form.shape_of(self._first_shape),
            labels_lib.num_classes(labels),
        )
        level = self._look_at_some()
        self.decoder = self.decoder._replace(
            colours=0 if form.channels else self._first_shape[-1],
            white_level=config.white_level or level,
        )
        self._make_tensors()
        self.files = listing.said()
        level = self.decoder.white_level
        self.digest = _digest(level, labels, listing.names)

    def _make_tensors(self) -> None:
        with tf.device("CPU:0"):
            self.fetch_files = self.store.fetcher(self.listing.names)
            labels = self._labels
            if labels is None:
                labels = np.zeros(self.num_images, np.int32)
            self._label_numbers = tf.constant(labels)
        # Traced once, though an input decodes in two places.
        dtype, channels = (tf.uint16, 1) if self.is_map else (tf.uint8, None)
        image = tf.TensorSpec((None, None, channels), dtype)
        content = tf.TensorSpec((), tf.string)
        self._decode = _traced(self.decoder.by_tensorflow, content)
        self._convert = _traced(self.decoder.converted, image)

    # One picture.

    def fetch(self, indices: tf.Tensor) -> Images:
        """Looks up files and labels; see `Source.fetch`."""
        fetched = self.fetch_files(indices)
        return fetched, tf.gather(self._label_numbers, indices)

    def encoded_one(self, fetched: Images) -> Images:
        """Reads one file; see `EncodedSource.encoded_one`."""
        file, label = fetched
        return self.store.opened(file), label

    def is_for_python(self, content: tf.Tensor) -> tf.Tensor:
        """Tells what is for Pillow; see `EncodedSource`."""
        return self.decoder.is_for_pillow(content)

    def decode_content(self, content: tf.Tensor) -> tf.Tensor:
        """Decodes one file; see `EncodedSource.decode_content`."""
        return self._convert(self._decode(content))

    def decode_late(self, content: tf.Tensor) -> tf.Tensor:
        """Decodes one file of any format; see `EncodedSource`."""
        return self._convert(self.decoder.decode(content, self._decode))

    def shape(self, index: int) -> tuple[int, int, int]:
        """Decodes one picture; returns its height, width and colours.

        Args:
            index: of the picture.

        Raises:
            DamagedError: it cannot be decoded.
            UserError: the store that it is on refuses it.
            StorageError: the store does not answer.
        """
        place = self.store.place(self.listing.names[index])
        try:
            content = self.store.content(self.listing.names[index])
            decoder = self.decoder.of_any_level()
            if decoder.is_for_pillow(tf.constant(content)):
                image = decoder.pixels(content)
            else:
                pictures.check(place, content, self.room)
                with tf.device("CPU:0"):
                    image = decoder.by_tensorflow(tf.constant(content))
        except UserError as error:
            raise DamagedError(error.text) from error
        except (by_pillow.PictureError, tf.errors.OpError) as error:
            failure = self._failure(place, error)
            raise failure from error
        height, width, channels = image.shape
        return height, width, decoding.colours_of(channels)

    def damage(self, index: int) -> DamagedError | None:
        """Returns why a picture cannot be decoded; None if it can.

        Args:
            index: of the picture.
        """
        try:
            self.shape(index)
        except DamagedError as fault:
            return fault
        return None

    def _failure(self, place: str, error: Exception) -> Exception:
        reason = source.reason(error)
        if not isinstance(error, (*_UNREADABLE, by_pillow.PictureError)):
            if files.is_remote(place):
                error = files.store_error(error)
                return access.explain("dataset", place, error)
            # It may pass, so it is never a picture to be left out.
            return UserError(f"{place} cannot be read: {reason}; repair it")
        return DamagedError(
            f"{place} cannot be decoded: {reason}; repair or remove it (python "
            "-m dtrain.check_data names all such), or begin a run on the rest "
            "with --skip_damaged"
        )

    def fault(self, index: int, error: tf.errors.OpError) -> UserError:
        """Names the file; see `Source.fault`."""
        first = self.store.place(self.listing.names[self._first])
        path = self.store.place(self.listing.names[index])
        try:
            shape = self.shape(index)
        except UserError as fault:
            return fault
        if shape[-1] != self._first_shape[-1] and self.decoder.colours:
            return UserError(
                f"{first} has {self._first_shape[-1]} channels but {path} "
                f"{shape[-1]}; give --channels=1 or --channels=3"
            )
        if shape != self._first_shape and not self.decoder.form.height:
            return UserError(
                f"{first} is {source.shown(self._first_shape)} but {path} "
                f"{source.shown(shape)}; give "
                + source.size_flag(self._first_shape, shape)
            )
        content = self.store.content(self.listing.names[index])
        if decoding.highest(content, self.room) > self.decoder.white_level:
            return UserError(
                f"{path} has values above white_level "
                f"({self.decoder.white_level}); give --white_level=65535"
            )
        return super().fault(index, error)

    # At the start.

    def _find_first(self) -> tuple[int, tuple[int, int, int]]:
        for index in range(len(self.listing.names)):
            try:
                return index, self.shape(index)
            except DamagedError as fault:
                self.first_fault = self.first_fault or fault
        raise UserError(
            f"no picture of {self._config.dataset} can be decoded; the first: "
            f"{self.first_fault}"
        )

    def _look_at_some(self) -> int:
        """Looks at some pictures; returns the white level of those of 16 bits.

        What is told of the others when they are read may come hours later.

        Raises:
            UserError: one is of another size than the first.
        """
        is_deep = False
        for index, content in self._some(_NUM_LOOKED_AT):
            is_deep = is_deep or decoding.highest(content, self.room) >= 0
            if not self.decoder.form.height:
                self._check_size(index, content)
        levels = [
            decoding.highest(content, self.room)
            for _, content in (self._some(_NUM_LEVELS) if is_deep else ())
        ]
        return conversion.white_level(max(0, *levels, 0))

    def _some(self, number: int) -> Iterator[tuple[int, bytes]]:
        names = self.listing.names
        for index in range(0, len(names), max(1, len(names) // number)):
            # The fault of another is told when it is read.
            with contextlib.suppress(tf.errors.OpError, UserError):
                yield index, self.store.content(names[index])

    def _check_size(self, index: int, content: bytes) -> None:
        try:
            size = tuple(pictures.need(tf.constant(content)).size.numpy())
        except tf.errors.OpError:
            return
        if not any(size) or size == self._first_shape[:2]:
            return
        try:
            # It may be turned.
            is_other = self.shape(index)[:2] != self._first_shape[:2]
        except DamagedError:
            return
        if is_other:
            other = tf.errors.InvalidArgumentError(None, None, "its size")
            raise self.fault(index, other)

    # All of them.

    def refusal(self, fault: UserError) -> UserError:
        """Names all that are damaged, where one is; see `Source.refusal`."""
        if not isinstance(fault, DamagedError):
            return fault
        return checking.refusal(self, fault)

    def only(self, indices: Sequence[int], **said: Any) -> PictureFiles:
        """Returns the source of some pictures, in another order.

        Args:
            indices: of them.
            said: what is otherwise in its `listing`.
        """
        names = [self.listing.names[index] for index in indices]
        listing = self.listing._replace(names=names, **said)
        labels = None if self._labels is None else self._labels[list(indices)]
        return PictureFiles(
            self.store, listing, labels, self._config, is_map=self.is_map
        )


def _traced(function: Callable[[Any], Any], argument: tf.TensorSpec) -> Any:
    return tf.function(function, [argument], autograph=False)


def _digest(
    white_level: int, labels: np.ndarray | None, names: Sequence[str]
) -> str:
    """Tells another list of files, their labels or their levels apart."""
    total = hashlib.sha256(f"{white_level}".encode())
    total.update((np.zeros(0) if labels is None else labels).tobytes())
    for name in names:
        total.update(os.fsencode(name) + b"\0")
    return total.hexdigest()[:16]
