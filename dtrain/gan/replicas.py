"""Checks that every variable has the same bits on all replicas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from dtrain.errors import UserError
from dtrain.models import batch_norm, spectral_norm


class Comparison:
    """Compares variables over all replicas of a strategy."""

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        variables: Sequence[keras.Variable],
    ) -> None:
        self._strategy = strategy
        self._variables = variables
        self._checksums = tf.function(self._of_replicas, autograph=False)

    def differing(self) -> list[str]:
        """Names the variables that are not equal, bit for bit, on all replicas.

        Every worker calls this.
        """
        if self._strategy.num_replicas_in_sync == 1:
            return []
        checksums = self._checksums().numpy()
        return [
            variable.path
            for variable, column in zip(
                self._variables, checksums.T, strict=True
            )
            if len(set(column.tolist())) > 1
        ]

    def _of_replicas(self) -> tf.Tensor:
        """Computes checksums, int64 [replicas, variables]."""

        def of_replica() -> tf.Tensor:
            sums = [_checksum(variable.value) for variable in self._variables]
            return tf.stack(sums)[tf.newaxis]

        return self._strategy.gather(self._strategy.run(of_replica), axis=0)


def _checksum(value: tf.Tensor) -> tf.Tensor:
    """Sums a tensor's words, each weighted by its position; int64 scalar."""
    tensor = tf.convert_to_tensor(value)
    if tensor.dtype == tf.bool:
        tensor = tf.cast(tensor, tf.uint8)
    word = tf.uint8 if tensor.dtype.size < 4 else tf.int32
    words = tf.reshape(tf.bitcast(tensor, word), [-1])
    weights = 2 * tf.range(tf.size(words, tf.int64), dtype=tf.int64) + 1
    return tf.reduce_sum(tf.cast(words, tf.int64) * weights)


def _layers(networks: Iterable[keras.Model]) -> list[Any]:
    return [
        layer for network in networks for layer in network._flatten_layers()
    ]


def refuse_unsynchronized(
    networks: Iterable[keras.Model], strategy: tf.distribute.Strategy
) -> None:
    """Refuses BatchNorm whose averages would differ between replicas.

    Raises:
        UserError: a network has one.
    """
    if strategy.num_replicas_in_sync == 1:
        return
    for layer in _layers(networks):
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        if is_norm and not layer.synchronized:
            raise UserError(
                f"{layer.name} is a BatchNormalization of its own on each of "
                f"the {strategy.num_replicas_in_sync} replicas; give it "
                "synchronized=True"
            )


def with_own_state(networks: Iterable[keras.Model]) -> list[Any]:
    """Returns the layers of networks whose forward passes assign state."""
    return [
        layer
        for layer in _layers(networks)
        # That of a spectral norm is moved by the update of its network.
        if not isinstance(layer, spectral_norm.SpectralNorm)
        and (layer._non_trainable_variables or layer._seed_generators)
    ]


def refuse_own_state(networks: Iterable[keras.Model]) -> None:
    """Refuses layers whose state depends on the number of replicas.

    Raises:
        UserError: a network has one.
    """
    for layer in with_own_state(networks):
        if isinstance(layer, batch_norm.BatchNorm):
            continue
        remedy = "a layer without"
        if isinstance(layer, keras.layers.BatchNormalization):
            remedy = "dtrain.models.batch_norm.BatchNorm"
        elif isinstance(layer, keras.layers.SpectralNormalization):
            remedy = "those of dtrain.models.spectral_norm"
        raise UserError(
            f"reduction (ordered): {layer.name} is a "
            f"{type(layer).__name__}, whose state would depend on the "
            f"number of replicas; use {remedy}, or --reduction=fast"
        )
