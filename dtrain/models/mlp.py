"""Dense networks for points in the plane, and for any small image.

    generator        latents - Dense - Dense - image
    discriminator    image - Dense - Dense - logit

Leaky ReLU behind each hidden layer. There is neither normalization nor a tanh:
what is drawn may lie anywhere, as points do.
"""

from __future__ import annotations

import math

import keras

from dtrain.config import Config, ModelSettings
from dtrain.errors import UserError

# Numbers of an image: a dense layer has as many weights for each channel.
_MOST_NUMBERS = 4096
_SLOPE = 0.2


def make(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    depth: int = 2,
) -> tuple[keras.Model, keras.Model]:
    """Makes the generator and the discriminator.

    Args:
        config: latent_size, base_channels (the width of hidden layers) and
            conditional count.
        image_shape: height, width and channels; 1, 1 and 2 of a point.
        num_classes: number of labels; only looked at if conditional.
        depth: hidden layers of each network, at least 1.

    Returns:
        The generator of images float32 [b, H, W, C] from latents float32
        [b, latent_size], and the discriminator of images to logits float32
        [b, 1]. If conditional, each takes a list whose second element is the
        labels, int32 [b], which stand one-hot beside the first.

    Raises:
        UserError: the images are large, or depth is no number of layers.
    """
    size = math.prod(image_shape)
    if size > _MOST_NUMBERS:
        raise UserError(
            f"mlp is for points and small images, of {_MOST_NUMBERS} numbers "
            f"at most, and these have {size}; give another --model, or "
            "--image_size=32"
        )
    if depth < 1:
        raise UserError(f"model_flag depth ({depth}) must be at least 1")
    classes = num_classes if config.conditional else 0
    latents, images = (config.latent_size,), image_shape
    return (
        _make("generator", config, classes, depth, latents, images),
        _make("discriminator", config, classes, depth, images, (1,)),
    )


def _make(
    name: str,
    config: ModelSettings,
    num_classes: int,
    depth: int,
    given: tuple[int, ...],
    made: tuple[int, ...],
) -> keras.Model:
    """Makes a network; `num_classes` is 0 if it is not conditional."""
    layers = keras.layers
    width = config.base_channels
    what = "latents" if name == "generator" else "images"
    inputs = values = keras.Input(given, name=what)
    if len(given) > 1:
        values = layers.Flatten(name="flatten")(values)
    for number in range(depth):
        hidden = f"hidden_{number}"
        values = layers.Dense(width, name=hidden)(values)
        if num_classes and not number:
            labels = keras.Input((), dtype="int32", name="labels")
            inputs = [inputs, labels]
            # What a dense layer makes of labels that are one-hot beside.
            embedding = layers.Embedding(
                num_classes, width, name="label_embedding"
            )
            values = layers.Add(name="labelled")([values, embedding(labels)])
        values = layers.LeakyReLU(
            negative_slope=_SLOPE, name=f"{hidden}_activation"
        )(values)
    # float32 in mixed precision too: what points are has no 8 bits.
    values = layers.Dense(math.prod(made), dtype="float32", name="made")(values)
    if len(made) > 1:
        values = layers.Reshape(made, dtype="float32", name="image")(values)
    return keras.Model(inputs, values, name=name)
