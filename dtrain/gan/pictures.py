"""Draws the pictures of a program, by the moving averages of its networks."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from dtrain.data import pipeline
from dtrain.gan import draws, objectives
from dtrain.gan.example import Place
from dtrain.gan.program import Named
from dtrain.gan.state import GAN

# Examples of the data that pictures are made of, where they are; further ones
# see the same again.
NUM_EXAMPLES = 64
# Of the seed of what `draw` draws at random itself, apart from other seeds.
_PICTURES = 4


class Pictures:
    """Draws a picture for each latent vector."""

    def __init__(
        self,
        gan: GAN,
        examples: Callable[[int], pipeline.Batch] | None = None,
        truncation: float = 0.0,
    ) -> None:
        """Draws nothing yet.

        Args:
            gan: whose averages draw, and its networks that have none.
            examples: reads so many examples of the data, the first of the run;
                called once, and only if the program makes pictures of them.
                Without it, nothing but latents and labels is there.
            truncation: see `Example.truncation`.
        """
        self._gan = gan
        self._read = examples
        self._truncation = truncation
        self._examples: pipeline.Batch | None = None
        self._networks = Named(**{**gan.program.networks, **gan.averages})
        self._draw = gan.program.draw or objectives.draw_by_generator(
            gan.config
        )

    def __call__(
        self, latents: tf.Tensor, labels: tf.Tensor | None, start: int = 0
    ) -> tf.Tensor:
        """Draws pictures, without training.

        Args:
            latents: float32 [n, latent_size].
            labels: int32 [n]; None for those of the data, or zeros.
            start: number of the first picture among those that are drawn.

        Returns:
            float [n, h, w, C] in [-1, 1], or a little beyond.
        """
        gan, size = self._gan, latents.shape[0]
        real_images, inputs, own_labels = self._of_data(size, start)
        seed = tf.constant([gan.config.seed, _PICTURES], tf.int64)
        given = draws.Given(
            draws.Arrays(
                real_images=real_images,
                labels=own_labels if labels is None else labels,
                latents=latents,
                uniforms=tf.random.stateless_uniform([size], seed),
                inputs=inputs,
            ),
            Place(seed, tf.constant(start, tf.int64)),
            tf.convert_to_tensor(gan.step),
            gan.state_values(),
        )
        example = objectives.prepared(gan.program, given)
        example = example.replace(truncation=self._truncation)
        return self._draw(self._networks, example)

    def _of_data(
        self, size: int, start: int
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor], tf.Tensor]:
        """Returns images, inputs and labels of what pictures are made of."""
        gan = self._gan
        if self._read is None or not gan.draws_from_data:
            inputs = {
                name: tf.zeros([size, *spec.shape], spec.dtype)
                for name, spec in gan.inputs.items()
            }
            images = tf.zeros([size, *gan.image_shape])
            return images, inputs, tf.zeros([size], tf.int32)
        if self._examples is None:
            self._examples = self._read(NUM_EXAMPLES)
        examples = self._examples
        chosen = (start + tf.range(size)) % examples.images.shape[0]
        inputs = {
            name: tf.gather(array, chosen)
            for name, array in examples.inputs.items()
        }
        return (
            tf.gather(examples.images, chosen),
            inputs,
            tf.gather(examples.labels, chosen),
        )
