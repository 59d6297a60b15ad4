"""pix2pix: pairs of images, an adversarial loss and the distance.

Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial
Networks": equation (4) with lambda 100, section 3.3 for the order of updates,
appendix 6.2 for the jitter. The noise is Dropout alone, in drawing, too.

    --preset=pix2pix --dataset=folder:/photos --paired=given=folder:/edges
    --preset=pix2pix --dataset=folder:/facades --model_flag=target=left
"""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.gan import losses
from dtrain.gan.example import Example
from dtrain.gan.program import DISCRIMINATOR, GENERATOR, Phase, Program
from dtrain.models import translators

_TARGETS = ("left", "right")
# 286 pixels of which 256 are cut out.
_ENLARGED = 286 / 256
_GIVEN = "given"


def make(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    target: str = "",
    given_channels: int = 0,
    l1_weight: float = 100.0,
    jitter: bool = True,
) -> Program:
    """Makes the U-Net and the PatchGAN.

    Args:
        config: base_channels counts; 64 in the paper.
        image_shape: height, width and channels of the data.
        num_classes: not looked at.
        target: which half of an image is the target, left or right, where the
            other one is what is translated; empty is the whole image, and what
            is translated is the one data set of --paired.
        given_channels: of what is translated; 0 is as many as the target has.
            Of a label map, the number of its labels; those beyond are none.
        l1_weight: lambda of equation (4).
        jitter: whether pairs are enlarged, cut out and mirrored by chance.

    Raises:
        UserError: there are no such halves, or the sides are odd.
    """
    del num_classes
    height, width, channels = image_shape
    if target not in ("", *_TARGETS):
        raise UserError(
            f"model_flag (target={target}) must be {' or '.join(_TARGETS)}"
        )
    width = width // 2 if target else width
    _check_size(height, width)
    prepare = functools.partial(_paired, target, given_channels)
    given = given_channels or channels
    base = config.base_channels
    if jitter:
        prepare = functools.partial(_jittered, prepare)
    return Program(
        networks={
            GENERATOR: translators.make_unet(
                (height, width, given), channels, base
            ),
            DISCRIMINATOR: translators.make_patch_gan(
                (height, width, given + channels), base
            ),
        },
        phases=[
            Phase(DISCRIMINATOR, _judge),
            Phase(GENERATOR, functools.partial(_translate, l1_weight)),
        ],
        prepare=prepare,
        draw=_draw,
        generate=functools.partial(_translated, training=False),
    )


def _check_size(height: int, width: int) -> None:
    """Checks that both networks can be made.

    Raises:
        UserError: they cannot.
    """
    if min(height, width) < 8 or len(translators.unet_sizes(height, width)) < 2:
        raise UserError(
            f"pix2pix makes no images of {height}x{width} pixels: both sides "
            "must be at least 8, and halve twice; try --image_size=256"
        )


def _paired(target: str, channels: int, example: Example) -> Example:
    """Puts what is translated into the inputs, as images.

    Raises:
        UserError: it is not there, or of another size.
    """
    images = example.real_images
    if target:
        given, images = tf.split(images, 2, axis=2)
        if target == "left":
            given, images = images, given
    elif len(example.inputs) == 1:
        [given] = example.inputs.values()
    else:
        raise UserError(
            "pix2pix translates one image into another: name them by "
            "--paired=given=DATASET, or say which half of each image is the "
            "target by --model_flag=target=left"
        )
    if given.dtype.is_integer:
        if not channels:
            raise UserError(
                "pix2pix is given a label map; say how many labels there are "
                "by --model_flag=given_channels=N"
            )
        given = tf.one_hot(given, channels)
    channels = channels or images.shape[-1]
    if given.shape[1:] != (*images.shape[1:3], channels):
        raise UserError(
            f"pix2pix is given images {given.shape[1:].as_list()}, of "
            f"{images.shape[1:].as_list()}; both must have one size, and "
            f"--model_flag=given_channels={given.shape[-1]} says how many "
            "channels there are"
        )
    return example.replace(
        real_images=images, inputs={**example.inputs, _GIVEN: given}
    )


def _jittered(data: Any, example: Example) -> Example:
    """Enlarges a pair, cuts the same part out of both, and mirrors both."""
    example = data(example)
    given, images = example.inputs[_GIVEN], example.real_images
    both = tf.concat([given, images], axis=3)
    height, width = both.shape[1:3]
    sides = round(height * _ENLARGED), round(width * _ENLARGED)
    both = tf.image.resize(both, sides)
    room = tf.constant([sides[0] - height, sides[1] - width], tf.float32)
    starts = tf.cast(example.uniform((2,)) * (room + 1.0), tf.int32)
    rows = starts[:, :1] + tf.range(height)
    columns = starts[:, 1:] + tf.range(width)
    both = tf.gather(both, rows, axis=1, batch_dims=1)
    both = tf.gather(both, columns, axis=2, batch_dims=1)
    is_mirrored = example.uniform()[:, None, None, None] < 0.5
    both = tf.where(is_mirrored, both[:, :, ::-1], both)
    split = [given.shape[3], images.shape[3]]
    given, images = tf.split(both, split, axis=3)
    return example.replace(
        real_images=images, inputs={**example.inputs, _GIVEN: given}
    )


def _translated(
    networks: Any, example: Example, *, training: bool
) -> tf.Tensor:
    given = example.inputs[_GIVEN]
    # Behind the first input, whose Dropout they are.
    drawn = [
        example.uniform(each.shape[1:])
        for each in networks.generator.inputs[1:]
    ]
    inputs = [given, *drawn] if drawn else given
    return networks.generator(inputs, training=training)


def _logits(networks: Any, example: Example, images: tf.Tensor) -> tf.Tensor:
    seen = tf.concat([example.inputs[_GIVEN], images], axis=3)
    return networks.discriminator(seen, training=True)


def _judge(networks: Any, example: Example) -> Any:
    made = tf.stop_gradient(_translated(networks, example, training=True))
    real_logits = _logits(networks, example, example.real_images)
    loss = losses.cross_entropy(real_logits, 1.0)
    loss += losses.cross_entropy(_logits(networks, example, made), 0.0)
    # So that the discriminator learns more slowly than the generator.
    return 0.5 * loss, {"discriminator_loss": loss}


def _translate(l1_weight: float, networks: Any, example: Example) -> Any:
    made = _translated(networks, example, training=True)
    loss = losses.cross_entropy(_logits(networks, example, made), 1.0)
    distance = losses.absolute_error(made, example.real_images)
    metrics = {"generator_loss": loss, "l1_distance": distance}
    return loss + l1_weight * distance, metrics


def _draw(networks: Any, example: Example) -> tf.Tensor:
    """Shows what is translated, the translation and the target."""
    made = _translated(networks, example, training=False)
    given, images = example.inputs[_GIVEN], example.real_images
    if given.shape[3] != images.shape[3]:
        return tf.concat([made, images], axis=2)
    return tf.concat([given, made, images], axis=2)
