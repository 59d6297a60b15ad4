"""Data sets of TFDS, the embedded digits among them.

A set is prepared as ArrayRecord, which can be read at random. A set that
somebody has prepared as TFRecord, which cannot, is read into memory. Nothing
asks the network for anything without --download.

A set is named as TFDS does, name[/config][:version], or as name:config; and
behind that a split of its own and one of its features, as in pets@test#mask.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from dtrain.config import DataSettings, further
from dtrain.data.sources import (
    conversion,
    memory,
    pictures,
    preparation,
    prepared_numbers,
    source,
    values,
)
from dtrain.data.sources.source import EncodedSource, Images, Source, Wanted
from dtrain.errors import UserError
from dtrain.storage import host_memory

_BATCH = 256
# Images that are looked at for their levels, where they have not 8 bits.
_NUM_LEVELS = 64


class PreparedSource(EncodedSource):
    """Images of a TFDS data set that is prepared on disk."""

    def __init__(
        self,
        config: DataSettings,
        builder: Any,
        records: Any,
        wanted: Wanted = source.USUAL,
    ) -> None:
        """Learns the features and the shape, or raises UserError.

        Args:
            config: `dataset`, `split`, `image_size` and `channels` count.
            builder: a prepared `tfds.core.DatasetBuilder`.
            records: the serialized examples by index, or None if the format
                has no random access.
            wanted: what of it is read.
        """
        self._builder, self._records = builder, records
        self._split, self.is_map = config.split, wanted.is_map
        self._form = conversion.Form.of(config, is_map=wanted.is_map)
        self.room = pictures.Room.of_host()
        image, label = _choose(config, builder.info.features, wanted)
        self._image, self._label = image, label
        # Of an example, only these are parsed.
        features = {
            name: builder.info.features[name] for name in (image, label) if name
        }
        self._features: Any = tfds.features.FeaturesDict(features)
        # The picture as it is in its file: its size is looked at first.
        self._decoders = {image: tfds.decode.SkipDecoding()}
        self.name = config.dataset
        self._first_shape = self._features[image].shape
        if None in self._first_shape:
            self._first_shape = self._shape(0)
        self._levels = self._find_levels(config)
        super().__init__(
            config.dataset,
            builder.info.splits[config.split].num_examples
            if records is None
            else len(records),
            self._form.shape_of(self._first_shape),
            self._features[label].num_classes if label else 0,
        )

    def fetch(self, indices: tf.Tensor) -> tf.Tensor:
        """Reads serialized examples; see `Source.fetch`."""
        assert self._records is not None
        return prepared_numbers.fetch(self._records, indices)

    def encoded_one(self, fetched: tf.Tensor) -> Images:
        """Parses one example; see `EncodedSource.encoded_one`."""
        return self._encoded(
            self._features.deserialize_example(fetched, decoders=self._decoders)
        )

    def decode_content(self, content: tf.Tensor) -> tf.Tensor:
        """Decodes one image; see `EncodedSource.decode_content`."""
        image = self._features[self._image].decode_example(content)
        image = tf.ensure_shape(image, (None, None, self._first_shape[-1]))
        if self.is_map:
            return conversion.convert(tf.cast(image, self.stored), self._form)
        return conversion.convert(self._levels.to_8_bits(image), self._form)

    def find_fault(self, indices: Any) -> UserError | None:
        """Looks for the first image that cannot be read; see `Source`."""
        if self._records is not None:
            return super().find_fault(indices)
        # Without random access, all that comes before is read again.
        indices = sorted(indices)
        index = indices[0]
        try:
            for example in self._examples().skip(index).take(len(indices)):
                content, _ = self._encoded(example)
                fault = self._fault_of(index, content)
                if fault:
                    return fault
                index += 1
        except tf.errors.OpError as error:
            return self._unreadable(index, error)
        return None

    def fault(self, index: int, error: tf.errors.OpError) -> UserError:
        """Says what is wrong with an image; see `Source.fault`."""
        try:
            content = self._content(index)
        except UserError as fault:
            return fault
        return self._fault_of(index, content) or self._unreadable(index, error)

    def _fault_of(self, index: int, content: tf.Tensor) -> UserError | None:
        try:
            image = self._decoded(index, content)
        except UserError as fault:
            return fault
        shape = tuple(image.shape)
        if shape != self._first_shape and not self._form.height:
            return UserError(
                f"{self.name} holds images of different sizes, such as "
                f"{source.shown(self._first_shape)} and "
                f"{source.shown(shape)}; give "
                + source.size_flag(self._first_shape, shape)
            )
        return self._levels.fault(f"image {index} of {self.name}", image)

    def _find_levels(self, config: DataSettings) -> conversion.Levels:
        """Looks at some images that have not 8 bits.

        Raises:
            UserError: their values are in no range that is known.
        """
        dtype = np.dtype(self._features[self._image].np_dtype)
        low, high = 0.0, 0.0
        if self.is_map:
            # They are numbers, and no brightness.
            return conversion.Levels(0.0, float(np.iinfo(np.uint16).max))
        if dtype != np.uint8:
            for index, content in self._some(_NUM_LEVELS):
                image = self._decoded(index, content)
                low = min(low, float(tf.reduce_min(image)))
                high = max(high, float(tf.reduce_max(image)))
        name = f"the images of {self.name}"
        return conversion.levels(name, dtype, low, high, config)

    def in_order(self) -> tf.data.Dataset:
        """Returns all images in batches, of any format; see `Source.decode`."""
        examples = self._examples()

        @tf.autograph.experimental.do_not_convert
        def decode(example: dict[str, tf.Tensor]) -> Any:
            return self.decode_one(*self._encoded(example))

        @tf.autograph.experimental.do_not_convert
        def finish(*decoded: tf.Tensor) -> Images:
            return self.finish(decoded)

        return (
            examples.map(decode, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(_BATCH)
            .map(finish)
        )

    def _some(self, number: int) -> Iterator[tuple[int, tf.Tensor]]:
        if self._records is None:
            for index, example in enumerate(self._examples().take(number)):
                yield index, self._encoded(example)[0]
            return
        step = max(1, len(self._records) // number)
        for index in range(0, len(self._records), step):
            yield index, self._content(index)

    def _examples(self) -> tf.data.Dataset:
        return self._builder.as_dataset(
            split=self._split,
            shuffle_files=False,
            decoders=self._decoders,
            # One file after the other: the order of the indices.
            read_config=tfds.ReadConfig(
                interleave_cycle_length=1, try_autocache=False
            ),
        )

    def _encoded(self, example: dict[str, tf.Tensor]) -> Images:
        content = example[self._image]
        if not self._label:
            return content, tf.constant(0, tf.int32)
        return content, tf.cast(example[self._label], tf.int32)

    def _shape(self, index: int) -> tuple[int, int, int]:
        image = self._decoded(index, self._content(index))
        height, width, channels = image.shape
        return height, width, channels

    def _content(self, index: int) -> tf.Tensor:
        try:
            if self._records is None:
                example: Any = next(iter(self._examples().skip(index)))
                content, _ = self._encoded(example)
            else:
                record = self.fetch(tf.constant([index], tf.int64))[0]
                content, _ = self.encoded_one(record)
        except tf.errors.OpError as error:
            raise self._unreadable(index, error) from error
        return content

    def _decoded(self, index: int, content: tf.Tensor) -> tf.Tensor:
        try:
            name = f"image {index} of {self._builder.data_dir}"
            pictures.check(name, content.numpy(), self.room)
            return self._features[self._image].decode_example(content)
        except tf.errors.OpError as error:
            raise self._unreadable(index, error) from error

    def _unreadable(self, index: int, error: Exception) -> UserError:
        return UserError(
            f"image {index} of {self.name} cannot be read: "
            f"{source.reason(error)}; remove {self._builder.data_dir} and "
            "prepare the data set again"
        )


class _Listed(list):
    """Records that TFDS makes up, which it does one by one alone."""

    def __getitems__(self, indices: Iterable[int]) -> list[bytes]:
        return [self[index] for index in indices]


def open_prepared(
    config: DataSettings,
    report: memory.Report,
    wanted: Wanted = source.USUAL,
) -> Source:
    """Opens a data set of TFDS, in memory where its format asks for it.

    Args:
        config: the fields of the group Data count.
        report: called with a line of progress every few seconds.
        wanted: what of it is read.

    Raises:
        UserError: TFDS knows no such set, or it is not prepared, has no
            images, or does not fit the memory it would need.
    """
    name = _tfds_name(further.part_of(config.dataset).dataset)
    builder = preparation.prepared_builder(config, name)
    is_mocked = preparation.is_mocked(builder)
    if not is_mocked:
        _check_split(config, builder)
    random_access = tfds.core.FileFormat.with_random_access()
    if is_mocked or builder.info.available_file_formats() & set(random_access):
        records = builder.as_data_source(
            config.split,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        )
        if is_mocked:
            records = _Listed(records[index] for index in range(len(records)))
    else:
        records = None
    if prepared_numbers.are_meant(builder.info.features, wanted):
        numbers = prepared_numbers.read(config, builder, records, wanted.array)
        return values.ValueSource(config.dataset, numbers)
    if records is not None:
        return PreparedSource(config, builder, records, wanted)
    origin = PreparedSource(config, builder, None, wanted)
    if not memory.fits(origin, config.cache_gib):
        raise UserError(
            f"{builder.data_dir} is prepared as "
            f"{builder.info.file_format.value}, which has no random access, "
            f"and its images take {host_memory.gib(origin.num_bytes)}: raise "
            f"cache_gib ({config.cache_gib:g}), or prepare it as array_record "
            "with another --data_dir"
        )
    return memory.collect(origin, origin.in_order(), report)


def _tfds_name(dataset: str) -> str:
    # To TFDS name:config is name/config; it knows name:version.
    name, colon, rest = dataset.partition(":")
    if not colon or re.fullmatch(r"\d+\.[\d*]+\.[\d*]+", rest):
        return dataset
    if os.sep in rest or not rest:
        raise UserError(
            f"dataset ({dataset}) must be folder:/path, zip:/path, "
            f"idx:/path, npz:/path or the name of a TFDS data set; {name}: "
            "is none of these"
        )
    return f"{name}/{rest}"


def _check_split(config: DataSettings, builder: Any) -> None:
    try:
        num_images = builder.info.splits[config.split].num_examples
    except (KeyError, ValueError, AssertionError) as error:
        names = ", ".join(builder.info.splits)
        raise UserError(
            f"split ({config.split}) of {config.dataset} must be {names}, or "
            f"a part of one such as {next(iter(builder.info.splits))}[:80%]"
        ) from error
    if not num_images:
        raise UserError(
            f"split ({config.split}) of {config.dataset} holds no images"
        )


def _choose(
    config: DataSettings, features: Any, wanted: Wanted
) -> tuple[str, str | None]:
    """Returns the features that are the image, and its label if there is one.

    Raises:
        UserError: there is no such image, or it cannot be told which.
    """
    # By exact type: some that are no pictures inherit from Image.
    images = [
        name for name in features if type(features[name]) is tfds.features.Image
    ]
    if "image" in images:
        images = ["image"]
    if wanted.array:
        images = [name for name in features if name == wanted.array]
        if not images or not isinstance(
            features[images[0]], tfds.features.Image
        ):
            raise UserError(
                f"{config.dataset} has no images {wanted.array}; its features "
                f"are {', '.join(features)}"
            )
    if len(images) != 1:
        raise UserError(
            f"dataset ({config.dataset}) must have one image in an example; "
            f"it has {', '.join(images) or 'none'} among "
            f"{', '.join(features)}; name one behind a #"
        )
    shape = features[images[0]].shape
    if wanted.is_map and shape[-1] != 1:
        raise UserError(
            f"{images[0]} of {config.dataset} is {source.shown(shape)}; label "
            "maps must have one channel"
        )
    labels = [
        name
        for name in features
        if isinstance(features[name], tfds.features.ClassLabel)
        and features[name].num_classes
        and wanted.has_labels
    ]
    if "label" in labels:
        labels = ["label"]
    return images[0], labels[0] if len(labels) == 1 else None
