"""Traces the phases of a program once, before the first step.

That builds networks which make their variables at the first call, and finds
mistakes while nothing is written yet. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.gan import describing, draws, objectives
from dtrain.gan import traced as traced_lib
from dtrain.gan.example import Draw, Place
from dtrain.gan.objectives import Returned
from dtrain.gan.program import Named, Phase, Program


def specs(
    config: Config,
    program: Program,
    image_shape: tuple[int, int, int],
    inputs: Mapping[str, tf.TensorSpec],
    size: int,
) -> draws.Given:
    """Says what examples are like, without any.

    Args:
        config: `latent_size` counts.
        program: its state counts.
        image_shape: height, width and channels of an image of the data.
        inputs: of one example, by name.
        size: number of examples.

    Returns:
        A tf.TensorSpec in the place of each tensor.
    """
    spec = tf.TensorSpec
    arrays = draws.Arrays(
        real_images=spec([size, *image_shape], tf.float32),
        labels=spec([size], tf.int32),
        latents=spec([size, config.latent_size], tf.float32),
        uniforms=spec([size], tf.float32),
        inputs={
            name: spec([size, *each.shape], each.dtype)
            for name, each in inputs.items()
        },
    )
    place = Place(spec([2], tf.int64), spec([], tf.int64))
    state = {
        name: spec(np.shape(value), tf.float32)
        for name, value in program.state.items()
    }
    return draws.Given(arrays, place, spec([], tf.int64), state)


def trace(subject: str, program: Program, given: draws.Given) -> list[tf.Graph]:
    """Traces what each phase computes of its examples, in the strategy's scope.

    Args:
        subject: the model, in the words of an error.
        program: whose networks are called.
        given: of `specs`.

    Returns:
        The graphs, of different phases alone.

    Raises:
        UserError: an objective raises an error, or returns what it may not.
    """
    numbers = {phase: n for n, phase in enumerate(program.phases)}
    return [
        _trace_twice(subject, program, phase, number, given)
        for phase, number in numbers.items()
    ]


def _trace_twice(
    subject: str,
    program: Program,
    phase: Phase,
    number: int,
    given: draws.Given,
) -> tf.Graph:
    """Traces a phase, and refuses one that is another at each trace.

    Raises:
        UserError: it has another number in it: that of a clock, or of chance.
    """
    of_phase = subject, program, phase, number, given, []
    if not all(network.built for network in program.networks.values()):
        # The first call of a network makes its variables.
        _trace_phase(*of_phase)
    first, second = _trace_phase(*of_phase), _trace_phase(*of_phase)
    if _constants(first) != _constants(second):
        raise UserError(
            f"{subject}: {objectives.title(phase, number)}, holds other "
            "numbers each time it is traced, as of np.random, a clock or a "
            "counter of Python's, and so would after each start; draw from "
            "the example, and count by example.step"
        )
    return second


def _constants(graph: tf.Graph) -> list[bytes]:
    return [
        operation.node_def.attr["value"].SerializeToString()
        for operation in graph.get_operations()
        if operation.type == "Const"
    ]


def plan(
    subject: str, program: Program, number: int, given: draws.Given
) -> list[Draw]:
    """Finds out what the objective of a phase draws, in its order.

    Args:
        subject: the model, in the words of an error.
        program: whose networks are called.
        number: of the phase.
        given: of `specs`.
    """
    record: list[Draw] = []
    phase = program.phases[number]
    _trace_phase(subject, program, phase, number, given, record)
    return record


def _trace_phase(
    subject: str,
    program: Program,
    phase: Phase,
    number: int,
    given: draws.Given,
    record: list[Draw],
) -> tf.Graph:
    networks = Named(**program.networks)

    def call(given: draws.Given) -> Any:
        example = objectives.prepared(program, given, record)
        returned = objectives.call(phase, number, networks, example)
        if phase.update is not None:
            with describing.in_one_line(
                f"{subject}: the update of {objectives.title(phase, number)},",
                phase.update,
            ):
                _try_update(phase, number, given, returned)
        return returned._asdict()

    title = f"{subject}: {objectives.title(phase, number)},"
    with describing.in_one_line(title, phase.objective):
        function = tf.function(call, autograph=False)
        return function.get_concrete_function(given).graph


def _try_update(
    phase: Phase, number: int, given: draws.Given, returned: Returned
) -> None:
    values = {**returned.metrics, **returned.further}
    norms = (f"{name}_gradient_norm" for name in phase.names)
    means = {
        **{name: tf.reduce_mean(value, 0) for name, value in values.items()},
        **dict.fromkeys(norms, tf.constant(0.0)),
    }
    objectives.updated(phase, number, given.state, means)


def trace_draw(
    subject: str, program: Program, config: Config, given: draws.Given
) -> tf.Graph:
    """Traces how pictures are drawn, in the strategy's scope.

    Args:
        subject: the model, in the words of an error.
        program: whose networks draw.
        config: `conditional` counts.
        given: of `specs`.

    Raises:
        UserError: `draw` raises an error, or makes no pictures.
    """
    networks = Named(**program.networks)
    draw = program.draw or objectives.draw_by_generator(config)

    def call(given: draws.Given) -> Any:
        return draw(networks, objectives.prepared(program, given))

    with describing.in_one_line(f"{subject}: its draw", draw):
        function = tf.function(call, autograph=False)
        traced = function.get_concrete_function(given)
    made = traced.structured_outputs
    is_picture = tf.is_tensor(made) and made.shape.rank == 4
    if not is_picture or not (
        made.dtype.is_floating
        and made.shape[0] == given.size
        and made.shape[-1] in (1, 3, 4)
    ):
        what = (
            describing.render(made)
            if tf.is_tensor(made)
            else describing.type_name(made)
        )
        raise UserError(
            f"{subject}: its draw returned {what}; it must return pictures, "
            f"float32 [{given.size}, height, width, 1, 3 or 4 channels]"
        )
    traced_lib.refuse_random(traced.graph)
    return traced.graph


def uses_data(graph: Any, given: draws.Given) -> bool:
    """Tells whether pictures are made of the data's images or inputs.

    Args:
        graph: of `trace_draw`.
        given: that it was traced of.
    """
    num_inputs = len(given.arrays.inputs)
    first = len(draws.Arrays._fields) - 1
    places = [0, *range(first, first + num_inputs)]
    of_data = {graph.inputs[place].op.name for place in places}
    seen: set[str] = set()
    queue = [tensor.op for tensor in graph.outputs]
    while queue:
        operation = queue.pop()
        if operation.name not in seen:
            seen.add(operation.name)
            queue += [tensor.op for tensor in operation.inputs]
    return bool(of_data & seen)
