"""Draws the random numbers of a step.

Each depends on the seed, the step, the phase and the position of its image in
the global batch, and on nothing else. So nothing random is ever saved, and any
number of replicas sees the same global batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from dtrain.config import Config
from dtrain.data import pipeline
from dtrain.gan.example import Draw, Example, Inputs, Place, draw_at

# What a random draw is for, folded into its seed.
_LATENTS = 0
_UNIFORMS = 1
# 2 is that of pictures, see `record.drawing`.
_OWN = 3


class Arrays(NamedTuple):
    """What examples have for themselves; each array is [b, ...].

    Attributes:
        real_images: see `Example`, as all of them.
        labels: likewise.
        latents: likewise.
        uniforms: likewise.
        inputs: likewise.
        drawn: likewise.
    """

    real_images: tf.Tensor
    labels: tf.Tensor
    latents: tf.Tensor
    uniforms: tf.Tensor
    inputs: dict[str, tf.Tensor]
    drawn: tuple[tf.Tensor, ...] = ()


class Given(NamedTuple):
    """Examples as tensors, which can be cut, and handed to a function of XLA.

    Attributes:
        arrays: of the examples.
        place: of the first one.
        step: see `Example`.
        state: see `Example`.
    """

    arrays: Arrays
    place: Place
    step: tf.Tensor
    state: Mapping[str, tf.Tensor]

    @property
    def size(self) -> int:
        """Number of examples."""
        return self.arrays.latents.shape[0]

    def part(self, start: int, size: int) -> Given:
        """Takes some of the examples."""
        arrays = tf.nest.map_structure(
            lambda array: array[start : start + size], self.arrays
        )
        place = self.place._replace(start=self.place.start + start)
        return self._replace(arrays=arrays, place=place)

    def with_draws(self, plan: Sequence[Draw]) -> Given:
        """Draws what an objective will ask for, where nothing is compiled."""
        drawn = tuple(
            draw_at(self.place, number, draw, self.size)
            for number, draw in enumerate(plan)
        )
        return self._replace(arrays=self.arrays._replace(drawn=drawn))

    def example(self, record: list[Draw] | None = None) -> Example:
        """Makes them what an objective is given.

        Args:
            record: takes down what is drawn.
        """
        arrays = self.arrays._replace(inputs=Inputs(self.arrays.inputs))
        return Example(
            **arrays._asdict(),
            step=self.step,
            state=dict(self.state),
            place=self.place,
            record=record,
        )


def latents_at(
    config: Config, step: tf.Tensor, phase: int, num_latents: int
) -> tf.Tensor:
    """Draws the latents of one phase's global batch.

    Args:
        config: the run's settings.
        step: int64 scalar, `GAN.data_step`.
        phase: place of the phase in the step.
        num_latents: how many; the first are the same for any number.

    Returns:
        float32 [num_latents, latent_size], standard normal.
    """
    return tf.random.stateless_normal(
        [num_latents, config.latent_size], _seed(config, _LATENTS, step, phase)
    )


def given_at(
    config: Config,
    step: tf.Tensor,
    phase: int,
    batch: pipeline.Batch,
    num_replicas: int,
    num_done: tf.Tensor,
    state: Mapping[str, tf.Tensor],
) -> Given:
    """Puts a replica's images and their random numbers together.

    Args:
        config: the run's settings.
        step: see `latents_at`.
        phase: place of the phase in the step.
        batch: the replica's part of one draw of real images.
        num_replicas: how many share the batch.
        num_done: int64 scalar, the steps that are done.
        state: of the program, by name.
    """
    size = config.batch_size // num_replicas
    position = tf.constant(0, tf.int64)
    if num_replicas > 1:
        position = batch.positions[0] % config.batch_size
    start = tf.cast(position, tf.int32)
    latents = latents_at(config, step, phase, config.batch_size)
    uniforms = tf.random.stateless_uniform(
        [config.batch_size], _seed(config, _UNIFORMS, step, phase)
    )
    arrays = Arrays(
        real_images=batch.images,
        labels=batch.labels,
        latents=tf.slice(latents, [start, 0], [size, config.latent_size]),
        uniforms=tf.slice(uniforms, [start], [size]),
        inputs=dict(batch.inputs),
    )
    place = Place(_seed(config, _OWN, step, phase), position)
    return Given(arrays, place, num_done, state)


def _seed(
    config: Config, purpose: int, step: tf.Tensor, phase: int
) -> tf.Tensor:
    seed = tf.stack([config.seed, purpose])
    seed = tf.random.fold_in(seed, tf.cast(step, tf.int64))
    # As int64, or the whole seed is folded into 32 bits.
    return tf.random.fold_in(seed, tf.constant(phase, tf.int64))
