"""CycleGAN: two sets of images without pairs, translated there and back.

Zhu et al. 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent
Adversarial Networks": equations (1) to (3) with lambda 10, the squared errors
of section 4, the identity loss of section 5.2 with half of lambda. The paper's
pool of the last 50 translations is left out: it would be in each checkpoint.

    --preset=cyclegan --dataset=folder:/horses --unpaired=other=folder:/zebras
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import tensorflow as tf

from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.gan import losses
from dtrain.gan.example import Example
from dtrain.gan.program import Phase, Program
from dtrain.models import translators

_GENERATORS = ("x_to_y", "y_to_x")
# Their Adam is that of the discriminators' flags, by how their names begin.
_JUDGES = ("discriminator_x", "discriminator_y")


class _Weights(NamedTuple):
    cycle: float
    identity: float


def make(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    cycle_weight: float = 10.0,
    identity_weight: float = 5.0,
) -> Program:
    """Makes two translators and two judges, of which each has its own Adam.

    Args:
        config: base_channels counts; 64 in the paper.
        image_shape: height, width and channels of both data sets.
        num_classes: not looked at.
        cycle_weight: lambda of equation (3).
        identity_weight: of the distance between an image and its translation
            into what it is already.

    Raises:
        UserError: the sides are no multiples of 4.
    """
    del num_classes
    height, width, _ = image_shape
    if height % 4 or width % 4 or min(height, width) < 8:
        raise UserError(
            f"cyclegan makes no images of {height}x{width} pixels: both sides "
            "must be multiples of 4, and at least 8; try --image_size=256"
        )
    base = config.base_channels
    weights = _Weights(cycle_weight, identity_weight)
    networks = {
        name: translators.make_resnet(image_shape, base) for name in _GENERATORS
    } | {
        name: translators.make_patch_gan(image_shape, base, is_whitened=True)
        for name in _JUDGES
    }
    return Program(
        networks=networks,
        phases=[Phase(tuple(networks), functools.partial(_objective, weights))],
        averaged=_GENERATORS,
        draw=_draw,
        generate=_generate,
    )


def _both(example: Example) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the images of both sets.

    Raises:
        UserError: there is no second one, or there are several.
    """
    images = example.real_images
    others = [
        each
        for each in example.inputs.values()
        if each.shape[1:] == images.shape[1:] and each.dtype.is_floating
    ]
    if len(others) != 1:
        raise UserError(
            "cyclegan translates between two sets of images of one size; name "
            "the second by --unpaired=other=DATASET, and --image_size for both"
        )
    return images, others[0]


def _objective(weights: _Weights, networks: Any, example: Example) -> Any:
    """Computes the losses of all four networks from one forward pass."""
    x, y = _both(example)
    fake_y = networks.x_to_y(x, training=True)
    fake_x = networks.y_to_x(y, training=True)
    cycle = losses.absolute_error(networks.y_to_x(fake_y, training=True), x)
    cycle += losses.absolute_error(networks.x_to_y(fake_x, training=True), y)
    metrics = {"cycle_loss": cycle}
    by_network = {}
    for name, judge, real, fake in (
        ("x_to_y", "discriminator_y", y, fake_y),
        ("y_to_x", "discriminator_x", x, fake_x),
    ):
        generator, discriminator = (
            getattr(networks, each) for each in (name, judge)
        )
        fake_logits = discriminator(fake, training=True)
        real_logits = discriminator(real, training=True)
        adversarial = losses.squared_error(fake_logits, 1.0)
        loss = adversarial + weights.cycle * cycle
        if weights.identity:
            same = losses.absolute_error(generator(real, training=True), real)
            loss += weights.identity * same
        by_network[name] = loss
        # Each network follows its own loss alone.
        judged = losses.squared_error(real_logits, 1.0)
        judged += losses.squared_error(fake_logits, 0.0)
        by_network[judge] = 0.5 * judged
        metrics |= {f"{name}_loss": adversarial, f"{judge}_loss": judged}
    return by_network, metrics


def _draw(networks: Any, example: Example) -> tf.Tensor:
    """Puts both translations beside what they are made of."""
    x, y = _both(example)
    return tf.concat([x, networks.x_to_y(x), y, networks.y_to_x(y)], axis=2)


def _generate(networks: Any, example: Example) -> tf.Tensor:
    """Makes images of the first set, of those of the second."""
    _, y = _both(example)
    return networks.y_to_x(y)
