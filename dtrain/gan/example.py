"""What an objective is given: examples, and random numbers for each of them.

A number depends on the seed, the step, the phase, the position of its example
in the global batch, and on how many draws the objective made before it: on
nothing else. So nothing random is ever saved, and any number of replicas and
micro-batches sees the same batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

# TensorFlow's number of the Philox generator, whose counter counts four numbers
# of 32 bits: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
_PHILOX = 1
_NUMBERS_PER_COUNT = 4


class Place(NamedTuple):
    """Where in a run examples are; the numbers that they draw follow from it.

    Attributes:
        seed: int64 [2], of the run, the step and the phase.
        start: int64 scalar, position of the first one in the global batch.
    """

    seed: tf.Tensor
    start: tf.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """The input of an objective: a replica's part of the batch, or less.

    Attributes:
        real_images: float32 [b, H, W, C] in [-1, 1].
        labels: int32 [b], those of the real images, and of the fakes of a
            conditional model; zeros where the data set has none.
        latents: float32 [b, latent_size], standard normal.
        uniforms: float32 [b] in [0, 1).
        step: int64 scalar, how many steps of the run are done; for what
            changes with time, which a weight that counts calls would count
            once for each micro-batch.
        inputs: what else the data has of each example, by name, [b, ...].
        state: of the program, by name, as it was before this step.
        place: of the examples; None for those that draw nothing.
    """

    real_images: tf.Tensor
    labels: tf.Tensor
    latents: tf.Tensor
    uniforms: tf.Tensor
    step: tf.Tensor
    inputs: Mapping[str, tf.Tensor] = dataclasses.field(default_factory=dict)
    state: Mapping[str, tf.Tensor] = dataclasses.field(default_factory=dict)
    place: Place | None = None
    # Handed on by `replace`, so that no two draws are alike.
    _numbers: Iterator[int] = dataclasses.field(
        default_factory=itertools.count, repr=False
    )

    def replace(self, **values: Any) -> Example:
        """Returns the examples with other values of some attributes."""
        return dataclasses.replace(self, **values)

    def normal(self, shape: tuple[int, ...] | list[int] = ()) -> tf.Tensor:
        """Draws standard normal numbers, others at each call.

        Args:
            shape: of the numbers of one example.

        Returns:
            float32 [b, *shape].
        """
        return self._draw(tf.raw_ops.StatelessRandomNormalV2, shape)

    def uniform(self, shape: tuple[int, ...] | list[int] = ()) -> tf.Tensor:
        """Draws numbers between 0 and 1, others at each call.

        Args:
            shape: of the numbers of one example.

        Returns:
            float32 [b, *shape] in [0, 1).
        """
        return self._draw(tf.raw_ops.StatelessRandomUniformV2, shape)

    def seeds(self) -> tf.Tensor:
        """Draws a seed for each example, for `tf.random.stateless_*`.

        Returns:
            int32 [b, 2].
        """
        return self._draw(
            tf.raw_ops.StatelessRandomUniformFullIntV2, (2,), tf.int32
        )

    @tf.autograph.experimental.do_not_convert
    def _draw(
        self,
        operation: Any,
        shape: tuple[int, ...] | list[int],
        dtype: tf.DType = tf.float32,
    ) -> tf.Tensor:
        """Draws what the whole batch would have at these positions."""
        assert self.place is not None, "these examples draw nothing"
        number = tf.constant(next(self._numbers), tf.int64)
        seed = tf.random.fold_in(self.place.seed, number)
        each = math.prod(shape)
        # Whole counts for each example, for any of them may come first.
        counts = -(-each // _NUMBERS_PER_COUNT)
        size = self.latents.shape[0]
        key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)
        skipped = tf.cast(self.place.start * counts, tf.uint64)
        drawn = operation(
            shape=[size, counts * _NUMBERS_PER_COUNT],
            key=key,
            counter=tf.stack([counter[0] + skipped, counter[1]]),
            alg=_PHILOX,
            dtype=dtype,
        )
        return tf.reshape(drawn[:, :each], [size, *shape])
