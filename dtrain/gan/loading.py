"""Loads what `--model` names, and builds networks that fit the data.

A model is a function `make(config, image_shape, num_classes)`: one of the
package's own, or yours as `package.module:make`. It returns a generator and a
discriminator, with phases and optimizers of its own if it likes, or a whole
`program.Program`:

    def make(config, image_shape, num_classes):
        generator = keras.Sequential([...], name="generator")
        discriminator = keras.Sequential([...], name="discriminator")
        return generator, discriminator
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import tensorflow as tf

from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.gan import (
    describing,
    draws,
    freezing,
    full_form,
    model_flags,
    phases,
    program,
    simple_form,
    trial,
)
from dtrain.gan.program import Program

# Of the settings, the shape of an image, the number of classes, and whatever
# else it has by `--model_flag`.
Make = Callable[..., Any]

# `config.learning.MODELS` has their names, too. Each is imported when it is
# asked for: what is a program stands on top of this package.
_BUILT_IN: dict[str, str] = {
    "dcgan": "dtrain.models.dcgan",
    "sngan": "dtrain.models.sngan",
    "biggan_small": "dtrain.recipes.biggan_small",
    "stylegan2": "dtrain.recipes.stylegan2",
    "r3gan": "dtrain.models.r3gan",
    "mlp": "dtrain.models.mlp",
    "pix2pix": "dtrain.recipes.pix2pix",
    "cyclegan": "dtrain.recipes.cyclegan",
}
# Of these, what makes no points in the plane.
_OF_PICTURES = _BUILT_IN.keys() - {"mlp"}


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
        return importlib.import_module(_BUILT_IN[spec]).make
    return find("model", spec, "config, image_shape, num_classes", _BUILT_IN)


def find(
    flag: str, spec: str, arguments: str, built_in: Iterable[str] = ()
) -> Callable[..., Any]:
    """Finds a function of the user's.

    Args:
        flag: that names it.
        spec: "package.module:make", see `load`.
        arguments: that it takes, in the words of an error.
        built_in: what else the flag may be.

    Raises:
        UserError: there is none; see `load`.
    """
    subject = f"{flag} ({spec})"
    module_name, colon, attribute = spec.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        raise UserError(
            f"{subject} must name a module, not a file: write dots for "
            "slashes and leave out .py, as in package.module:make"
        )
    names = [*module_name.split("."), attribute]
    if not colon or not all(name.isidentifier() for name in names):
        choices = " or ".join((", ".join(built_in), "package.module:make"))
        raise UserError(f"{subject} must be {choices.removeprefix(' or ')}")
    make = getattr(_import(subject, module_name), attribute, None)
    if make is None:
        raise UserError(f"{subject}: module {module_name} has no {attribute!r}")
    if not callable(make):
        raise UserError(
            f"{subject}: {attribute} is of type {type(make).__name__}; it "
            f"must be a function ({arguments})"
        )
    return make


def _import(subject: str, module_name: str) -> ModuleType:
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
                f"{subject}: there is no module {missing} in "
                f"{directory} or on PYTHONPATH"
            ) from error
        raise UserError(
            f"{subject}: importing {module_name} raised "
            f"{describing.describe(error, None)}"
        ) from error


# Making the networks.


def build(
    make: Make,
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    inputs: Mapping[str, tf.TensorSpec] | None = None,
    *,
    is_tried: bool = False,
) -> Program:
    """Makes the networks and checks that they fit the data and each other.

    Those of the simple form are called once on two examples of zeros, not in
    training; of the full form, the phases are traced, which runs nothing. So
    their variables exist afterwards. Call this in the strategy's scope.

    Args:
        make: what `load` returned.
        config: the run's settings, handed on to `make`.
        image_shape: height, width and channels of the data set.
        num_classes: number of labels of the data set; 0 if it has none.
        inputs: what else the data has of one example, by name.
        is_tried: whether what `make` returns was traced before; only what is
            needed for the variables is then done again.

    Raises:
        UserError: `make` raised an error, or what it returned does not fit;
            or the model is to be conditional and the data has no labels.
    """
    _check_data(config, image_shape, num_classes)
    subject = f"model ({config.model})"
    more = model_flags.read(subject, make, config.model_flag)
    with describing.in_one_line(subject, make):
        returned = make(config, image_shape, num_classes, **more)
    if isinstance(returned, Program):
        facts = {"image_shape": image_shape, "num_classes": num_classes}
        made = full_form.check(subject, returned, config, facts)
        given = trial.specs(config, made, image_shape, inputs or {}, 2)
        _try(subject, made, config, given, is_tried=is_tried)
    else:
        networks = simple_form.unpack(subject, returned)
        simple_form.check_calls(config, networks, image_shape)
        steps = networks.phases or phases.adversarial_phases(config)
        state = phases.adversarial_state(config)
        made = program.of_networks(networks, steps, state)
    freezing.freeze(config.frozen_layers, made)
    return made


def _check_data(
    config: Config, image_shape: tuple[int, int, int], num_classes: int
) -> None:
    """Checks that the data is of the kind that the model wants.

    Raises:
        UserError: it has no labels, or is of points.
    """
    if config.conditional and num_classes == 0:
        raise UserError(
            f"conditional needs labels, and the data set {config.dataset} has "
            "none; leave out --conditional"
        )
    if image_shape[:2] == (1, 1) and config.model in _OF_PICTURES:
        raise UserError(
            f"model ({config.model}) draws pictures, and {config.dataset} is "
            "of points; give --preset=mlp, or --model=mlp"
        )


def _try(
    subject: str,
    made: Program,
    config: Config,
    given: draws.Given,
    *,
    is_tried: bool,
) -> None:
    """Traces a program, which builds its networks, and checks these.

    Raises:
        UserError: it cannot be trained.
    """
    are_built = all(each.built for each in made.networks.values())
    if not (is_tried and are_built):
        trial.trace(subject, made, given)
        trial.trace_draw(subject, made, config, given)
    for name, network in made.networks.items():
        full_form.check_network(f"{subject}: {name}", network)
        if name in made.trained and not network.trainable_variables:
            raise UserError(
                f"{subject}: a phase trains {name}, which has no variable to "
                "train; is it or a layer of it set to trainable=False?"
            )


def check_second(config: Config, one: Program, two: Program) -> None:
    """Checks that two calls of `make` give equal networks, and not the same.

    The averages are networks of the second one.

    Raises:
        UserError: they do not.
    """
    subject = f"model ({config.model})"
    for name in one.averaged or ():
        first, second = one.networks[name], two.networks.get(name)
        if first is second:
            raise UserError(
                f"{subject} returns the same {name} twice; make a new one at "
                "each call, for the moving average is another"
            )
        shapes = [
            [tuple(weight.shape) for weight in network.weights]
            for network in (first, second)
            if network is not None
        ]
        if len(shapes) < 2 or shapes[0] != shapes[1]:
            raise UserError(
                f"{subject} makes another {name} at its second call; it must "
                "depend on its arguments alone"
            )
