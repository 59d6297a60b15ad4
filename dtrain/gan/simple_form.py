"""The simple form of a program: one generator and one discriminator."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.gan import describing, full_form
from dtrain.gan.describing import render, type_name
from dtrain.gan.program import DISCRIMINATOR, GENERATOR, Networks

NETWORKS = (GENERATOR, DISCRIMINATOR)


def unpack(subject: str, returned: Any) -> Networks:
    """Makes `Networks` of what `make` returned.

    Args:
        subject: the model, in the words of an error.
        returned: a tuple of its first fields, or more.

    Raises:
        UserError: it is of a wrong type.
    """
    if not isinstance(returned, (tuple, list)):
        raise UserError(
            f"{subject} returned {type_name(returned)}; it must return a "
            "tuple (generator, discriminator), or a dtrain.Program"
        )
    if not 2 <= len(returned) <= len(Networks._fields):
        raise UserError(
            f"{subject} returned {len(returned)} values; it must return 2 to "
            f"{len(Networks._fields)}: {', '.join(Networks._fields)}"
        )
    networks = Networks(*returned)
    for name in NETWORKS:
        network = getattr(networks, name)
        if not isinstance(network, keras.Model):
            raise UserError(
                f"{subject}: the {name} is {type_name(network)}; it must be a "
                "keras.Model"
            )
        optimizer = getattr(networks, f"{name}_optimizer")
        if not isinstance(optimizer, keras.optimizers.Optimizer | None):
            raise UserError(
                f"{subject}: the {name}_optimizer is {type_name(optimizer)}; "
                "it must be a keras.optimizers.Optimizer or None"
            )
    if networks.generator is networks.discriminator:
        raise UserError(
            f"{subject}: the generator and the discriminator are one model; "
            "they must be two"
        )
    optimizer = networks.generator_optimizer
    if optimizer and optimizer is networks.discriminator_optimizer:
        raise UserError(
            f"{subject} gives both networks one optimizer, which would keep "
            "the moments of one alone; make two"
        )
    if networks.phases is None:
        return networks
    phases = full_form.check_phases(subject, networks.phases, NETWORKS)
    return networks._replace(phases=phases)


def check_calls(
    config: Config, networks: Networks, image_shape: tuple[int, int, int]
) -> None:
    """Calls both networks once, which builds them, and checks what they return.

    Args:
        config: `latent_size` and `conditional` count.
        networks: both.
        image_shape: height, width and channels of an image.

    Raises:
        UserError: they do not fit the data or each other.
    """
    labels = [tf.zeros([2], tf.int32)] if config.conditional else []
    for name, inputs, shapes in (
        (GENERATOR, tf.zeros([2, config.latent_size]), ((2, *image_shape),)),
        (DISCRIMINATOR, tf.zeros([2, *image_shape]), ((2,), (2, 1))),
    ):
        network = getattr(networks, name)
        _check_call(config, name, network, [inputs, *labels], shapes)


def _check_call(
    config: Config,
    name: str,
    network: keras.Model,
    inputs: list[tf.Tensor],
    shapes: tuple[tuple[int, ...], ...],
) -> None:
    """Calls a network once and checks its output and its variables.

    Raises:
        UserError: the call raised an error, its output has none of `shapes` or
            another type, or variables are missing afterwards.
    """
    subject = f"model ({config.model}): the {name}"
    given = ", ".join(render(tensor) for tensor in inputs)
    # Keras only warns where a functional model is given one input too many,
    # and would train a conditional model that never sees a label.
    declared = getattr(network, "inputs", None)
    if declared is not None and len(declared) != len(inputs):
        raise UserError(
            f"{subject} takes {len(declared)} inputs; "
            f"conditional={config.conditional} gives it {len(inputs)}: {given}"
        )
    for takes, has in zip(declared or (), inputs, strict=False):
        if not has.shape.is_compatible_with(takes.shape):
            raise UserError(
                f"{subject} takes {takes.dtype} {list(takes.shape)}, and it is "
                f"given {render(has)}; {_remedy(name, takes)}"
            )
    with describing.in_one_line(
        f"{subject}, called with {given},", type(network).call
    ):
        output = network(
            inputs if config.conditional else inputs[0], training=False
        )
    _check_output(f"{subject} turned {given} into", output, shapes)
    if not network.trainable_variables:
        raise UserError(f"{subject} has no variable to train")
    full_form.check_network(subject, network)


def _remedy(name: str, takes: Any) -> str:
    """Says how a network is given what it takes."""
    if name == GENERATOR and len(takes.shape) == 2:
        return f"give --latent_size={takes.shape[1]}, or make it of the config"
    return "make it of the image_shape that make is given"


def _check_output(
    subject: str, output: Any, shapes: tuple[tuple[int, ...], ...]
) -> None:
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    if not tf.is_tensor(output):
        raise UserError(
            f"{subject} a value {type_name(output)}; it must return a "
            f"tensor of shape {wanted}"
        )
    if tuple(output.shape) not in shapes:
        raise UserError(
            f"{subject} {render(output)}; its shape must be {wanted}"
        )
    if not output.dtype.is_floating:
        raise UserError(f"{subject} {render(output)}; it must return float32")
