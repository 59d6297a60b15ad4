"""Calls what a program has written: objectives, `prepare`, and updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from dtrain.config import ModelSettings
from dtrain.errors import UserError
from dtrain.gan.describing import type_name
from dtrain.gan.draws import Given
from dtrain.gan.example import Draw, Example
from dtrain.gan.program import Phase, Program

# Converts what a user wrote, as `tf.function` would, and nothing of dtrain's.
_autograph = tf.__internal__.autograph


class Returned(NamedTuple):
    """What an objective has returned.

    Attributes:
        losses: [b] each, by the names of the networks.
        metrics: [b] each, by name.
        further: [b, ...] each, by name, for the state.
    """

    losses: dict[str, tf.Tensor]
    metrics: dict[str, tf.Tensor]
    further: dict[str, tf.Tensor]


def convert(function: Any) -> Any:
    """Lets a user's function have Python's conditions and loops of tensors."""
    # What calls this is not converted, and would switch it off for all below.
    here = _autograph.control_status_ctx()
    enabled = type(here)(type(here.status).ENABLED, here.options)
    converted = _autograph.tf_convert(function, enabled)

    def call(*arguments: Any) -> Any:
        try:
            return converted(*arguments)
        except Exception as error:
            # AutoGraph wraps what it does not know, with all of its frames.
            if isinstance(error.__context__, UserError):
                raise error.__context__ from None
            raise

    return call


def prepared(
    program: Program, given: Given, record: list[Draw] | None = None
) -> Example:
    """Makes the examples what the objectives and `draw` of a program see.

    Args:
        program: its `prepare` counts.
        given: the examples.
        record: takes down what is drawn of them.

    Raises:
        UserError: `prepare` returns something else.
    """
    example = given.example(record)
    if program.prepare is None:
        return example
    made = convert(program.prepare)(example)
    if not isinstance(made, Example):
        raise UserError(
            f"prepare returned {type_name(made)}; it must return the example, "
            "as example.replace(real_images=...) does"
        )
    for name, array in {
        **dict.fromkeys(("real_images", "labels", "latents", "uniforms")),
        **made.inputs,
    }.items():
        shape = getattr(made, name).shape if array is None else array.shape
        if shape[0] != given.size:
            raise UserError(
                f"prepare made {name} {shape.as_list()} of {given.size} "
                "examples; it must keep all of them, in their order"
            )
    return made


def title(phase: Phase, number: int) -> str:
    """Says which phase is meant, in the words of an error.

    Args:
        phase: that one.
        number: its place in the step.
    """
    return f"phase {number + 1}, of the {' and the '.join(phase.names)}"


def call(
    phase: Phase, number: int, networks: Any, example: Example
) -> Returned:
    """Calls the objective of a phase, and checks what it returns.

    Args:
        phase: whose objective it is.
        number: its place in the step.
        networks: what it is given.
        example: likewise.

    Raises:
        UserError: it returns no loss for each example, or something else that
            it may not.
    """
    of = title(phase, number)
    returned = convert(phase.objective)(networks, example)
    is_fine = isinstance(returned, tuple) and len(returned) in (2, 3)
    if not is_fine or not all(isinstance(each, dict) for each in returned[1:]):
        raise UserError(
            f"{of}: its objective returned a {type(returned).__name__}; it "
            "must return the losses and a dict of metrics, which may be empty"
        )
    losses, metrics, *more = returned
    further = more[0] if more else {}
    if not isinstance(losses, Mapping):
        losses = dict.fromkeys(phase.names, losses)
    if set(losses) != set(phase.names):
        raise UserError(
            f"{of}: its objective returned losses of {', '.join(losses)}; it "
            "must return one for each network that it trains"
        )
    _check_names(of, phase, metrics)
    _check_values(of, example, Returned(dict(losses), metrics, further))
    if phase.update is None and further:
        raise UserError(
            f"{of}: its objective returned {', '.join(further)} beside losses "
            "and metrics, and the phase has no update that would take it"
        )
    # Of 16 bits, a sum over the batch would be, too. One loss stays one.
    same = {id(loss): tf.cast(loss, tf.float32) for loss in losses.values()}
    losses = {name: same[id(loss)] for name, loss in losses.items()}
    return Returned(losses, dict(metrics), dict(further))


def _check_values(of: str, example: Example, returned: Returned) -> None:
    """Checks that there is a loss, and each metric, for each example.

    Raises:
        UserError: there is another number of them, or a loss is no float.
    """
    size = example.latents.shape[0]
    for name, loss in returned.losses.items():
        dtype = tf.convert_to_tensor(loss).dtype
        if not dtype.is_floating:
            raise UserError(
                f"{of}: its loss of {name} is {dtype.name}; it must be float32"
            )
        _check_shape(f"{of}: its loss", loss, [size])
    for name, value in returned.metrics.items():
        _check_shape(f"{of}: its metric {name}", value, [size])
    for name, value in returned.further.items():
        shape = tf.convert_to_tensor(value).shape.as_list()
        _check_shape(f"{of}: its value {name}", value, [size, *shape[1:]])
        if name in returned.metrics:
            raise UserError(
                f"{of}: {name} is a metric, whose mean its update is given "
                "anyway; give the other value another name"
            )


def _check_names(of: str, phase: Phase, metrics: Mapping[str, Any]) -> None:
    """Refuses metrics whose names stand for something else.

    Raises:
        UserError: there is one.
    """
    for name in metrics:
        if name in ("step", *(f"{each}_gradient_norm" for each in phase.names)):
            raise UserError(
                f"{of}: no metric can be called {name}, which dtrain writes "
                "itself; give it another name"
            )


def _check_shape(what: str, value: Any, wanted: list[int]) -> None:
    """Checks that there is a number, or an array, for each example.

    A mean would be divided once more by the batch; and what is of more
    dimensions, as [b, b] from [b] and [b, 1], counts that many times.

    Raises:
        UserError: the shape is another one.
    """
    shape = tf.convert_to_tensor(value).shape.as_list()
    if shape != wanted:
        raise UserError(
            f"{what} has the shape {shape} and must have {wanted}, a number "
            "for each example; take means over the other dimensions alone, "
            "and none over the examples"
        )


def check_gradients(
    phase: Phase, number: int, gradients: Mapping[str, list[Any]]
) -> None:
    """Checks that each network learns something.

    Args:
        phase: that trains them.
        number: its place in the step.
        gradients: by network; None for a variable that its loss is not of.

    Raises:
        UserError: a loss depends on none of the variables of a network.
    """
    for name, values in gradients.items():
        if all(value is None for value in values):
            raise UserError(
                f"{title(phase, number)}: its loss depends on no variable of "
                f"the {name}; leave out tf.stop_gradient, or name the other "
                "network"
            )


def draw_by_generator(config: ModelSettings) -> Any:
    """Makes the `draw` of a program that has none of its own.

    It calls the network that is called generator with the latents, and the
    labels if the model is conditional.
    """

    def draw(networks: Any, example: Example) -> tf.Tensor:
        inputs = example.latents
        if config.conditional:
            inputs = [example.latents, example.labels]
        return networks.generator(inputs, training=False)

    return draw


def updated(
    phase: Phase,
    number: int,
    state: Mapping[str, tf.Tensor],
    means: Mapping[str, tf.Tensor],
) -> dict[str, tf.Tensor]:
    """Computes the new state after a phase; what it leaves alone is not in it.

    Args:
        phase: one with an update.
        number: its place in the step.
        state: as it is.
        means: over the global batch.

    Raises:
        UserError: the update returns something else.
    """
    of = f"the update of {title(phase, number)}"
    assert phase.update is not None
    values = convert(phase.update)(dict(state), dict(means))
    names = ", ".join(state) or "the state, and there is none"
    if not isinstance(values, Mapping):
        raise UserError(
            f"{of} returned {type_name(values)}; it must return a dict of new "
            f"values of {names}"
        )
    unknown = [name for name in values if name not in state]
    if unknown:
        raise UserError(
            f"{of} returned a value of {unknown[0]}; it must return a dict of "
            f"new values of {names}"
        )
    new = {}
    for name, value in values.items():
        tensor = tf.cast(tf.convert_to_tensor(value), tf.float32)
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{of} gives {name} the shape {tensor.shape.as_list()}, and "
                f"it has {state[name].shape.as_list()}"
            )
        new[name] = tensor
    return new
