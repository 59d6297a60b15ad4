"""Loads what `--model` names, and builds two networks that fit the data.

A model is a function `make(config, image_shape, num_classes)`: the package's
own `dcgan`, or yours as `package.module:make`. It returns a generator and a
discriminator, and may return phases and optimizers of its own; see
`phases.Networks`:

    def make(config, image_shape, num_classes):
        generator = keras.Sequential([...], name="generator")
        discriminator = keras.Sequential([...], name="discriminator")
        return generator, discriminator
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import keras
import tensorflow as tf

from dtrain.bundle import objects
from dtrain.cluster import workers
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.gan.phases import (
    DISCRIMINATOR,
    GENERATOR,
    NETWORKS,
    Networks,
    Phase,
)
from dtrain.models import dcgan

_MAX_ERROR_LENGTH = 300
_ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


Make = Callable[[Config, tuple[int, int, int], int], Any]

# `config.learning.MODELS` has their names.
_BUILT_IN: dict[str, Make] = {"dcgan": dcgan.make}


# Finding a model.


def load(spec: str) -> Make:
    """Finds the function that makes the networks; `build` calls it.

    Args:
        spec: a built-in one, or "package.module:make", a function in a module
            that Python can import, also from the current directory.

    Raises:
        UserError: there is no such module, importing it fails, or it has no
            such function.
    """
    if spec in _BUILT_IN:
        return _BUILT_IN[spec]
    module_name, colon, attribute = spec.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        raise UserError(
            f"model ({spec}) must name a module, not a file: write dots for "
            "slashes and leave out .py, as in package.module:make"
        )
    names = [*module_name.split("."), attribute]
    if not colon or not all(name.isidentifier() for name in names):
        raise UserError(
            f"model ({spec}) must be {', '.join(_BUILT_IN)} or "
            "package.module:make"
        )
    make = getattr(_import(spec, module_name), attribute, None)
    if make is None:
        raise UserError(
            f"model ({spec}): module {module_name} has no {attribute!r}"
        )
    if not callable(make):
        raise UserError(
            f"model ({spec}): {attribute} is of type {type(make).__name__}; it "
            "must be a function (config, image_shape, num_classes)"
        )
    return make


def _import(spec: str, module_name: str) -> ModuleType:
    directory = os.getcwd()
    # What `python -m` does, and neither a console script nor pytest.
    if directory not in sys.path and "" not in sys.path:
        sys.path.insert(0, directory)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        missing = getattr(error, "name", None)
        is_missing = isinstance(error, ModuleNotFoundError) and missing
        # Otherwise it is an import within the module that fails.
        if is_missing and f"{module_name}.".startswith(f"{missing}."):
            raise UserError(
                f"model ({spec}): there is no module {missing} in "
                f"{directory} or on PYTHONPATH"
            ) from error
        raise UserError(
            f"model ({spec}): importing {module_name} raised "
            f"{_describe(error, None)}"
        ) from error


def _describe(error: Exception, own: Callable[..., Any] | None) -> str:
    """Renders an error of a user's code as one line that says where.

    That is the innermost frame in the file of `own`, the user's function, or
    the innermost of all.
    """
    text, _, _ = _ANSI_COLOUR.sub("", str(error)).partition(
        # What Keras adds to an error in a call; the inputs are told anyway.
        "Arguments received by"
    )
    message = " ".join(text.split())
    if len(message) > _MAX_ERROR_LENGTH:
        message = message[:_MAX_ERROR_LENGTH] + "..."
    line = _line_of(error, own)
    return f"{type(error).__name__}: {message}" + (f" ({line})" if line else "")


def _line_of(error: Exception, own: Callable[..., Any] | None) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and frame.filename != __file__
    ]
    code = getattr(own, "__code__", None)
    own_frames = [
        frame
        for frame in frames
        if code is not None and frame.filename == code.co_filename
    ]
    if not frames:
        return ""
    frame = (own_frames or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


# Making the networks.


def build(
    make: Make,
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> Networks:
    """Makes the networks and checks that they fit the data and each other.

    Both are called once on two examples of zeros, not in training, so their
    variables exist afterwards. Call this in the strategy's scope.

    Args:
        make: what `load` returned.
        config: the run's settings, handed on to `make`.
        image_shape: height, width and channels of the data set.
        num_classes: number of labels of the data set; 0 if it has none.

    Raises:
        UserError: `make` raised an error, or what it returned does not fit;
            or the model is to be conditional and the data has no labels.
    """
    if config.conditional and num_classes == 0:
        raise UserError(
            f"conditional needs labels, and the data set {config.dataset} has "
            "none; leave out --conditional"
        )
    subject = f"model ({config.model})"
    try:
        returned = make(config, image_shape, num_classes)
    except UserError:
        raise
    except Exception as error:
        if workers.is_lost_worker(error):
            raise
        _refuse_size(subject, error)
        raise UserError(f"{subject} raised {_describe(error, make)}") from error
    networks = _unpack(subject, returned)
    _refuse_shared_optimizer(subject, networks)
    labels = [tf.zeros([2], tf.int32)] if config.conditional else []
    for name, inputs, shapes in (
        (GENERATOR, tf.zeros([2, config.latent_size]), ((2, *image_shape),)),
        (DISCRIMINATOR, tf.zeros([2, *image_shape]), ((2,), (2, 1))),
    ):
        network = getattr(networks, name)
        _check_call(config, name, network, [inputs, *labels], shapes)
    return networks


def check_second(config: Config, one: Networks, two: Networks) -> None:
    """Checks that two calls of `make` give equal networks, and not the same.

    The average of the generator is the second one's.

    Raises:
        UserError: they do not.
    """
    subject = f"model ({config.model})"
    if one.generator is two.generator:
        raise UserError(
            f"{subject} returns the same generator twice; make a new one at "
            "each call, for the moving average is another"
        )
    shapes = [
        [tuple(weight.shape) for weight in networks.generator.weights]
        for networks in (one, two)
    ]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{subject} makes another generator at its second call; it must "
            "depend on its arguments alone"
        )


def _refuse_shared_optimizer(subject: str, networks: Networks) -> None:
    """Refuses one optimizer for both networks, which is built for one alone.

    Raises:
        UserError: there is one.
    """
    optimizer = networks.generator_optimizer
    if optimizer and optimizer is networks.discriminator_optimizer:
        raise UserError(
            f"{subject} gives both networks one optimizer, which would keep "
            "the moments of one alone; make two"
        )


def _refuse_size(subject: str, error: Exception) -> None:
    """Says what can be done about networks that no memory holds.

    Raises:
        UserError: the error is that of a device without enough memory.
    """
    if isinstance(error, tf.errors.ResourceExhaustedError):
        raise UserError(
            f"{subject} needs more memory than the device has; lower "
            "--base_channels, --latent_size or --image_size"
        ) from error


def _unpack(subject: str, returned: Any) -> Networks:
    """Makes `Networks` of what `make` returned.

    Raises:
        UserError: it is of a wrong type.
    """
    if not isinstance(returned, (tuple, list)):
        raise UserError(
            f"{subject} returned {_type_name(returned)}; it must return a "
            "tuple (generator, discriminator)"
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
                f"{subject}: the {name} is {_type_name(network)}; it must be a "
                "keras.Model"
            )
        optimizer = getattr(networks, f"{name}_optimizer")
        if not isinstance(optimizer, keras.optimizers.Optimizer | None):
            raise UserError(
                f"{subject}: the {name}_optimizer is {_type_name(optimizer)}; "
                "it must be a keras.optimizers.Optimizer or None"
            )
    if networks.generator is networks.discriminator:
        raise UserError(
            f"{subject}: the generator and the discriminator are one model; "
            "they must be two"
        )
    if networks.phases is None:
        return networks
    return networks._replace(phases=_check_phases(subject, networks.phases))


def _check_phases(subject: str, phases: Any) -> tuple[Phase, ...]:
    if not isinstance(phases, Sequence) or not phases:
        raise UserError(
            f"{subject}: phases is {_type_name(phases)}; it must be a tuple of "
            "at least one dtrain.Phase, or None"
        )
    for phase in phases:
        if not isinstance(phase, Phase) or not callable(phase.objective):
            raise UserError(
                f"{subject}: a phase is {_type_name(phase)}; it must be a "
                "dtrain.Phase with a callable objective"
            )
        if phase.network not in NETWORKS:
            raise UserError(
                f"{subject}: a phase trains {phase.network!r}; it must train "
                f"{GENERATOR!r} or {DISCRIMINATOR!r}"
            )
    return tuple(phases)


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
    given = ", ".join(_render(tensor) for tensor in inputs)
    # Keras only warns where a functional model is given one input too many,
    # and would train a conditional model that never sees a label.
    declared = getattr(network, "inputs", None)
    if declared is not None and len(declared) != len(inputs):
        raise UserError(
            f"{subject} takes {len(declared)} inputs; "
            f"conditional={config.conditional} gives it {len(inputs)}: {given}"
        )
    try:
        output = network(
            inputs if config.conditional else inputs[0], training=False
        )
    except Exception as error:
        if workers.is_lost_worker(error):
            raise
        _refuse_size(subject, error)
        raise UserError(
            f"{subject}, called with {given}, raised "
            f"{_describe(error, type(network).call)}"
        ) from error
    _check_output(f"{subject} turned {given} into", output, shapes)
    if not network.trainable_variables:
        raise UserError(f"{subject} has no variable to train")
    _refuse_raw_variables(subject, network)
    for layer in network._flatten_layers():
        if not layer.built:
            raise UserError(
                f"{subject} has a layer {layer.name!r} that a call does not "
                "build; build it in build(), or remove it"
            )


def _refuse_raw_variables(subject: str, network: keras.Model) -> None:
    """Refuses a variable that Keras does not know of.

    It would be saved, but neither trained, nor averaged, nor compared between
    the replicas.

    Raises:
        UserError: there is one.
    """
    known = {id(variable.value) for variable in network.variables}
    for owner in tf.train.TrackableView(network).descendants():
        variable = objects.unwrapped(owner)
        if isinstance(variable, tf.Variable) and id(variable) not in known:
            raise UserError(
                f"{subject} has a tf.Variable of its own, {variable.name}, "
                "which would be neither trained nor averaged; make it by "
                "add_weight, or a constant"
            )


def _check_output(
    subject: str, output: Any, shapes: tuple[tuple[int, ...], ...]
) -> None:
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    if not tf.is_tensor(output):
        raise UserError(
            f"{subject} a value {_type_name(output)}; it must return a "
            f"tensor of shape {wanted}"
        )
    if tuple(output.shape) not in shapes:
        raise UserError(
            f"{subject} {_render(output)}; its shape must be {wanted}"
        )
    if not output.dtype.is_floating:
        raise UserError(f"{subject} {_render(output)}; it must return float32")


def _render(tensor: tf.Tensor) -> str:
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def _type_name(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
