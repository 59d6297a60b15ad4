"""What every source of images can do, wherever it reads them."""

from __future__ import annotations

import abc
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dtrain.data.sources import pictures
from dtrain.errors import UserError
from dtrain.storage import files

Images = tuple[tf.Tensor, tf.Tensor]

# Of MNIST's files.
_IDX = re.compile(r"-(images|labels)[-.]idx[13]-ubyte(\.gz)?$")


class Wanted(NamedTuple):
    """What of a data set is read, and as what.

    Attributes:
        array: name of an array of an npz file, or of a feature of a TFDS set;
            empty is the usual one.
        is_map: whether it is label maps, a whole number for each pixel.
        has_labels: whether its labels are read, where it has some.
        is_further: whether it stands beside the images of a run: then it may
            be of numbers that are no images.
    """

    array: str = ""
    is_map: bool = False
    has_labels: bool = True
    is_further: bool = False


# The images of a run, and their labels.
USUAL = Wanted()


class Source(abc.ABC):
    """Images of one shape, each reached by its index at the same cost.

    Attributes:
        name: the data set as the user named it.
        num_images: how many there are; at least 1.
        image_shape: height, width and channels of each; 1, 1 and their number
            of numbers that are no images.
        num_classes: labels lie in [0, num_classes); 0 means no labels.
        in_memory: whether reading one touches no file.
        is_map: whether they are label maps, of one channel.
        files: what is said of its files at a start, in lines.
        digest: of the names and labels of its files, where it has such; a run
            goes on with the same alone.
    """

    in_memory = False
    is_map = False
    files: tuple[str, ...] = ()
    digest = ""

    def __init__(
        self,
        name: str,
        num_images: int,
        image_shape: tuple[int, int, int],
        num_classes: int,
    ) -> None:
        self.name = name
        self.num_images = num_images
        self.image_shape = image_shape
        self.num_classes = num_classes

    @property
    def stored(self) -> tf.DType:
        """Type of the images as they are read."""
        return tf.uint16 if self.is_map else tf.uint8

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one image as it is read."""
        return self.image_shape

    @property
    def spec(self) -> tf.TensorSpec:
        """One image as a model sees it; see `seen`."""
        if self.is_map:
            return tf.TensorSpec(self.image_shape[:2], tf.int32)
        return tf.TensorSpec(self.image_shape, tf.float32)

    @property
    def num_bytes(self) -> int:
        """Bytes that all the images take in memory, as they are read."""
        return self.num_images * self._stored_bytes

    @property
    def bytes_of_one(self) -> int:
        """Bytes that reading one image takes, at about."""
        return self._stored_bytes

    @property
    def _stored_bytes(self) -> int:
        height, width, channels = self.image_shape
        return height * width * channels * self.stored.size

    def said(self) -> str:
        """Says how many there are, and of which form."""
        kind = "label maps" if self.is_map else "images"
        classes = ""
        if self.num_classes:
            plural = "es" if self.num_classes > 1 else ""
            classes = f", {self.num_classes} class{plural}"
        return f"{self.num_images:,} {kind} {shown(self.image_shape)}{classes}"

    @abc.abstractmethod
    def fetch(self, indices: tf.Tensor) -> Any:
        """Fetches the tensors for `decode`; the part that may run Python.

        Args:
            indices: int64 [b] in [0, num_images).
        """

    @abc.abstractmethod
    def decode(self, fetched: Any) -> Any:
        """Makes images of what `fetch` returned, in C++ alone.

        Args:
            fetched: what `fetch` returned.

        Returns:
            What `finish` takes.
        """

    def finish(self, decoded: Any) -> Images:
        """Decodes what is too large to be decoded beside others.

        One thread at a time calls it, and many call `decode`.

        Args:
            decoded: what `decode` returned.

        Returns:
            Images `stored` [b, H, W, C], and labels int32 [b] in
            [0, num_classes), zeros without labels.
        """
        return decoded

    def seen(
        self, images: tf.Tensor, is_mirrored: tf.Tensor | None
    ) -> tf.Tensor:
        """Makes what a model sees of what was read.

        Args:
            images: `stored` [b, H, W, C].
            is_mirrored: bool [b], of each; None mirrors none.

        Returns:
            float32 [b, H, W, C] in [-1, 1]; of label maps int32 [b, H, W].
        """
        if is_mirrored is not None:
            # By whole images; `tf.where` would ask for each of their numbers.
            images = tf.raw_ops.Select(
                condition=is_mirrored, x=tf.reverse(images, [2]), y=images
            )
        if self.is_map:
            return tf.cast(images[..., 0], tf.int32)
        return tf.cast(images, tf.float32) / 127.5 - 1

    def read(self, indices: tf.Tensor) -> Images:
        """Fetches and decodes images, in a tf.data map or eagerly.

        Args:
            indices: int64 [b] in [0, num_images).
        """
        return self.finish(self.decode(self.fetch(indices)))

    def find_fault(self, indices: Iterable[int]) -> UserError | None:
        """Names the first image that cannot be read; None if all can be.

        Args:
            indices: of the images to try, each in [0, num_images).
        """
        if self.in_memory:
            return None
        for index in indices:
            try:
                self.read(tf.constant([index], tf.int64))
            except tf.errors.OpError as error:
                return self.fault(index, error)
        return None

    def refusal(self, fault: UserError) -> UserError:
        """Says what is wrong with all images, where one cannot be read.

        Args:
            fault: of the one.
        """
        return fault

    def fault(self, index: int, error: tf.errors.OpError) -> UserError:
        """Says in one line why an image cannot be read.

        Args:
            index: of the image.
            error: what reading it raised.
        """
        return UserError(
            f"image {index} of {self.name} cannot be read: {reason(error)}"
        )


class EncodedSource(Source):
    """Images that are decoded one by one, for their files may differ.

    Each is looked at first, for a small file may say that it is a large
    picture. Those that many threads could not hold at once are left to
    `finish`, and so is what only Python decodes.
    """

    room: pictures.Room

    @abc.abstractmethod
    def encoded_one(self, fetched: Any) -> Images:
        """Returns one image as it is in its file.

        Args:
            fetched: one element of what `fetch` returned.

        Returns:
            The content of the file, string [], and the label, int32 [].
        """

    @abc.abstractmethod
    def decode_content(self, content: tf.Tensor) -> tf.Tensor:
        """Decodes one image; returns `stored` [H, W, C] of `image_shape`.

        Args:
            content: string []; a whole file, and not one for Python.
        """

    def is_for_python(self, content: tf.Tensor) -> Any:
        """Tells, bool [], whether C++ does not decode an image.

        Args:
            content: string []; a whole file.
        """
        del content
        return False

    def decode_late(self, content: tf.Tensor) -> tf.Tensor:
        """Decodes an image of any kind; see `decode_content`."""
        return self.decode_content(content)

    def decode(self, fetched: Any) -> Any:
        """Decodes a batch; see `Source.decode`."""
        return tf.map_fn(
            lambda one: self.decode_one(*self.encoded_one(one)),
            fetched,
            fn_output_signature=(
                tf.TensorSpec(self.image_shape, self.stored),
                tf.TensorSpec((), tf.int32),
                tf.TensorSpec((), tf.string),
            ),
        )

    def decode_one(self, content: tf.Tensor, label: tf.Tensor) -> Any:
        """Decodes one image, unless it is large.

        Args:
            content: string []; a whole file.
            label: int32 [].

        Returns:
            The image, or zeros; the label; and what is still to be decoded, a
            string [], which is empty if nothing is.
        """
        is_late = self.is_late(content)
        image = tf.cond(
            is_late,
            lambda: tf.zeros(self.image_shape, self.stored),
            lambda: self._of_shape(self.decode_content(content)),
        )
        return image, label, tf.where(is_late, content, "")

    def is_late(self, content: tf.Tensor) -> tf.Tensor:
        """Tells, bool [], whether an image is left to `finish`.

        What no memory holds fails here.

        Args:
            content: string []; a whole file.
        """
        needed = pictures.need(content)
        is_for_python = self.is_for_python(content)
        is_large = needed.num_bytes > self.room.together_bytes
        fits = tf.debugging.Assert(
            pictures.fits(needed, self.room) | is_for_python,
            ["the picture is too large"],
        )
        with tf.control_dependencies([] if fits is None else [fits]):
            # One that is empty fails at once: there is nothing to hand on.
            return (is_large | is_for_python) & tf.not_equal(content, "")

    def finish(self, decoded: Any) -> Images:
        """Decodes the large ones of a batch; see `Source.finish`."""
        images, labels, late = decoded

        def one(image_and_content: Any) -> tf.Tensor:
            image, content = image_and_content
            return tf.cond(
                tf.equal(content, ""),
                lambda: image,
                lambda: self._of_shape(self.decode_late(content)),
            )

        images = tf.cond(
            tf.reduce_all(tf.equal(late, "")),
            lambda: images,
            lambda: tf.map_fn(
                one,
                (images, late),
                parallel_iterations=1,
                fn_output_signature=tf.TensorSpec(
                    self.image_shape, self.stored
                ),
            ),
        )
        return images, labels

    def _of_shape(self, image: tf.Tensor) -> tf.Tensor:
        # Or an image of another shape fails only where the batch is built.
        return tf.ensure_shape(image, self.image_shape)


def reason(error: Exception) -> str:
    """Returns the part of an error's text that a user can act on.

    Args:
        error: any exception; TensorFlow's carry a stack after the first line.
    """
    text = getattr(error, "message", None) or str(error)
    lines = text.strip().splitlines() or [type(error).__name__]
    text = re.sub(r"^\{\{function_node .*?\}\} ", "", lines[0])
    return re.sub(r"\s*\[Op:.*$", "", text).rstrip(". ")


def size_flag(*shapes: Sequence[int]) -> str:
    """Proposes a size for images of different ones, as `--image_size=64`.

    Args:
        shapes: height, width and perhaps channels of some.
    """
    side = int(min(min(height, width) for height, width, *_ in shapes))
    # What halves well, and no more than the built-in model makes.
    flag = f"--image_size={2 ** (max(8, min(side, 128)).bit_length() - 1)}"
    if all(height == width for height, width, *_ in shapes):
        return flag
    return f"{flag}, with --image_fit=pad to lose no edge"


def kind_of(path: str) -> str:
    """Tells by what is there which kind of data set a path is.

    Returns:
        As in `folder:/path`; empty if there is nothing.
    """
    name = os.path.basename(path)
    if not files.is_directory(path):
        if not files.exists(path):
            return ""
        if _IDX.search(name):
            return f"idx:{os.path.dirname(path) or '.'}"
        kind = os.path.splitext(name)[1]
        return f"{kind[1:]}:{path}" if kind in (".npz", ".zip") else ""
    names = files.names(path)
    if any(map(_IDX.search, names)):
        return f"idx:{path}"
    archives = [name for name in names if name.endswith(".npz")]
    if len(archives) == 1:
        return f"npz:{os.path.join(path, archives[0])}"
    if len(names) == 1 and names[0].endswith(".zip"):
        return f"zip:{os.path.join(path, names[0])}"
    return f"folder:{path}"


def hint(path: str, kind: str) -> str:
    """Returns what to put behind an error where a path is of another kind.

    Args:
        path: that the user named.
        kind: as which the user named it.
    """
    likely = "" if files.is_remote(path) else kind_of(path)
    if not likely or likely.startswith(f"{kind}:"):
        return ""
    return f"; try --dataset={likely}"


def shown(shape: Iterable[int]) -> str:
    """Writes a shape as people do: `28x28x1`.

    Args:
        shape: such as (28, 28, 1).
    """
    return "x".join(map(str, shape))
