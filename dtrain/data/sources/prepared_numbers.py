"""Features of TFDS data sets that are no pictures: numbers, and classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from dtrain.config import DataSettings
from dtrain.data.sources import python_calls, source, values
from dtrain.data.sources.source import Wanted
from dtrain.errors import UserError

_BATCH = 256


def are_meant(features: Any, wanted: Wanted) -> bool:
    """Tells whether what is wanted are numbers that are no pictures.

    Args:
        features: of the data set, by name.
        wanted: what of it is read.
    """
    name = wanted.array
    if not wanted.is_further or wanted.is_map or name not in features:
        return False
    return not isinstance(features[name], tfds.features.Image)


def read(
    config: DataSettings, builder: Any, records: Any, feature: str
) -> np.ndarray:
    """Reads a feature of all examples.

    Args:
        config: `dataset` and `split` count.
        builder: a prepared `tfds.core.DatasetBuilder`.
        records: the serialized examples by index, or None if the format has
            no random access.
        feature: a class, a number, a vector, or a group of such, as the
            attributes of celeb_a, which stand in the order of their names.

    Returns:
        int32 [n] or float32 [n, k]; see `values.of`.

    Raises:
        UserError: it is something else, or cannot be read.
    """
    name = f"{feature} of {config.dataset}"
    try:
        rows = [
            _row(example[feature])
            for example in _examples(
                config, builder, records, feature
            ).as_numpy_iterator()
        ]
    except tf.errors.OpError as error:
        raise UserError(
            f"{name} cannot be read: {source.reason(error)}; remove "
            f"{builder.data_dir} and prepare the data set again"
        ) from error
    if len({row.shape for row in rows}) > 1:
        raise UserError(
            f"{name} is of another length in each example; name a feature "
            "that is a class, a number or a vector"
        )
    return values.of(name, np.stack(rows))


def _row(value: Any) -> np.ndarray:
    if isinstance(value, dict):
        parts = map(np.atleast_1d, tf.nest.flatten(value))
        return np.concatenate(list(parts))
    return np.asarray(value)


def _examples(
    config: DataSettings, builder: Any, records: Any, feature: str
) -> tf.data.Dataset:
    """Returns all examples, of this feature alone."""
    if records is None:
        return builder.as_dataset(
            split=config.split,
            shuffle_files=False,
            decoders=tfds.decode.PartialDecoding({feature: True}),
            # One file after the other: the order of the indices.
            read_config=tfds.ReadConfig(
                interleave_cycle_length=1, try_autocache=False
            ),
        )
    of_it: Any = tfds.features.FeaturesDict(
        {feature: builder.info.features[feature]}
    )
    indices = tf.data.Dataset.range(len(records)).batch(_BATCH)

    @tf.autograph.experimental.do_not_convert
    def fetched(indices: tf.Tensor) -> tf.Tensor:
        return fetch(records, indices)

    return indices.map(fetched).unbatch().map(of_it.deserialize_example)


def fetch(records: Any, indices: tf.Tensor) -> tf.Tensor:
    """Reads serialized examples by index.

    Args:
        records: what reads them; a file that is damaged is an OpError.
        indices: int64 [b].

    Returns:
        string [b].
    """

    def read_records(indices: np.ndarray) -> np.ndarray:
        try:
            found = records.__getitems__(indices.tolist())
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise tf.errors.DataLossError(None, None, str(error)) from error
        return np.array(found, object)

    fetched = python_calls.numpy_function(read_records, [indices], tf.string)
    return tf.ensure_shape(fetched, (None,))
