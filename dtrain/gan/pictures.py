"""Draws the pictures of a program, by the moving averages of its networks.

A picture is a function of its latents, its label and its number: the same in
any batch, and on any replica.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from dtrain.data import pipeline
from dtrain.gan import draws, objectives
from dtrain.gan.example import Draw, Place, batch_size_of, draw_at
from dtrain.gan.program import Named
from dtrain.gan.state import GAN

# Examples of the data that pictures are made of, where they are; further ones
# see the same again.
NUM_EXAMPLES = 64
# Of the seeds of what `draw` draws at random itself, and of the uniforms, apart
# from other seeds.
_PICTURES, _UNIFORMS = 4, 5


class Pictures:
    """Draws a picture for each latent vector."""

    def __init__(
        self,
        gan: GAN,
        examples: Callable[[int], pipeline.Batch] | None = None,
        *,
        truncation: float = 0.0,
        seed: int | None = None,
        by_averages: bool = True,
        is_measured: bool = False,
    ) -> None:
        """Draws nothing yet.

        Args:
            gan: whose averages draw, and its networks that have none.
            examples: reads so many examples of the data, the first of the run;
                called once, and only if the program makes pictures of them.
                Without it, nothing but latents and labels is there.
            truncation: see `Example.truncation`.
            seed: of what the program draws at random; None is that of the run.
            by_averages: whether the averages draw; else the networks do.
            is_measured: whether they are for figures, and nothing is shown
                beside what was generated.
        """
        self._gan = gan
        self._read = examples
        self._truncation = truncation
        self._examples: pipeline.Batch | None = None
        self._seed = gan.config.seed if seed is None else seed
        averages = gan.averages if by_averages else {}
        self._networks = Named(**{**gan.program.networks, **averages})
        program = gan.program
        self._draw = (
            (program.generate if is_measured else None)
            or program.draw
            or objectives.draw_by_generator(gan.config)
        )

    def prepare(self) -> None:
        """Reads what pictures are made of, for calls in a graph."""
        if self._read and self._gan.draws_from_data and not self._examples:
            self._examples = self._read(NUM_EXAMPLES)

    def __call__(
        self,
        latents: tf.Tensor,
        labels: tf.Tensor | None,
        start: int | tf.Tensor = 0,
    ) -> tf.Tensor:
        """Draws pictures, without training.

        Args:
            latents: float32 [n, latent_size].
            labels: int32 [n]; None for those of the data, or zeros.
            start: number of the first picture among those that are drawn; an
                int64 scalar in a graph, after `prepare`.

        Returns:
            float [n, h, w, C] in [-1, 1], or a little beyond.
        """
        gan, size = self._gan, batch_size_of(latents)
        self.prepare()
        real_images, inputs, own_labels = self._of_data(size, start)
        first = tf.cast(start, tf.int64)
        seed = tf.constant([self._seed, _PICTURES], tf.int64)
        uniforms = tf.constant([self._seed, _UNIFORMS], tf.int64)
        given = draws.Given(
            draws.Arrays(
                real_images=real_images,
                labels=own_labels if labels is None else labels,
                latents=latents,
                uniforms=draw_at(
                    Place(uniforms, first), 0, Draw("uniform", ()), size
                ),
                inputs=inputs,
            ),
            Place(seed, first),
            tf.convert_to_tensor(gan.step),
            gan.state_values(),
        )
        example = objectives.prepared(gan.program, given)
        example = example.replace(truncation=self._truncation)
        return self._draw(self._networks, example)

    def _of_data(
        self, size: int | tf.Tensor, start: int | tf.Tensor
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor], tf.Tensor]:
        """Returns images, inputs and labels of what pictures are made of."""
        gan, examples = self._gan, self._examples
        if examples is None:
            inputs = {
                name: tf.zeros([size, *spec.shape], spec.dtype)
                for name, spec in gan.inputs.items()
            }
            images = tf.zeros([size, *gan.image_shape])
            return images, inputs, tf.zeros([size], tf.int32)
        numbers = tf.cast(start, tf.int32) + tf.range(size)
        chosen = numbers % examples.images.shape[0]
        inputs = {
            name: tf.gather(array, chosen)
            for name, array in examples.inputs.items()
        }
        return (
            tf.gather(examples.images, chosen),
            inputs,
            tf.gather(examples.labels, chosen),
        )
