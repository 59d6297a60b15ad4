"""What a step must not hold, looked for in the graph that was traced of it.

A run that is killed goes on to the same bits only if a step is a function of
the state that is saved and of (seed, step, position). What a user's code does
beside that shows in its graph: operations that draw from a state of their own,
and variables that are assigned and that no checkpoint has.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import Callable, Collection, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dtrain.bundle import objects
from dtrain.errors import UserError

# They keep what they have drawn in the kernel, or in Python.
_RANDOM = frozenset(
    (
        *("RandomUniform", "RandomUniformInt", "RandomStandardNormal"),
        *("TruncatedNormal", "ParameterizedTruncatedNormal", "RandomShuffle"),
        *("Multinomial", "RandomGamma", "RandomPoisson", "RandomPoissonV2"),
        *("StatefulRandomBinomial", "RngReadAndSkip", "RngSkip"),
        *("ShuffleDataset", "ShuffleDatasetV2", "ShuffleDatasetV3"),
        *("ShuffleAndRepeatDataset", "ShuffleAndRepeatDatasetV2"),
        *("RandomDataset", "RandomDatasetV2", "SamplingDataset"),
    )
)
_PYTHON = ("PyFunc", "PyFuncStateless", "EagerPyFunc")
# Operations that call functions, and how many inputs are before these' own.
_CALLS = {
    **dict.fromkeys(("PartitionedCall", "StatefulPartitionedCall"), 0),
    **dict.fromkeys(("While", "StatelessWhile"), 0),
    **dict.fromkeys(("If", "StatelessIf", "Case", "StatelessCase"), 1),
}
_ASSIGN = ("AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp")
_REMEDY = (
    "draw from what the example brings, or by tf.random.stateless_normal with "
    "seeds made of it"
)
# What is in none of these has called an operation on the user's behalf.
_OTHERS = tuple(
    os.path.dirname(file or "") + os.sep
    for file in (
        *(tf.__file__, keras.__file__, os.__file__),
        os.path.dirname(__file__),
    )
)


# Follows a tensor of a graph to what it is outside of all graphs.
_Outside = Callable[[Any], Any]


def check(graph: Any, checkpoint: tf.train.Checkpoint, own: list[Any]) -> None:
    """Refuses a step that would not be the same after a kill.

    Args:
        graph: the FuncGraph of a step, at the end of its tracing.
        checkpoint: of all state that is saved.
        own: variables that a step may assign beside those.

    Raises:
        UserError: it draws at random from a state that is not saved, or
            assigns a variable that is not.
    """
    saved = _handles(checkpoint, own)
    everything = _walk(graph, functools.partial(_captured, graph))
    for operation, outside in everything:
        _refuse(operation)
        if operation.type in _ASSIGN:
            handle = outside(operation.inputs[0])
            if handle is not None and id(handle) not in saved:
                raise UserError(
                    f"{_name(operation.graph, handle)}: a variable that is "
                    f"assigned {_where(operation)} and is in no checkpoint; "
                    "make it a weight of a network, by add_weight"
                )


def refuse_random(graph: Any) -> None:
    """Refuses a graph that draws from a state which is nowhere saved.

    Args:
        graph: a FuncGraph, at the end of its tracing.

    Raises:
        UserError: it does.
    """
    for operation, _ in _walk(graph, functools.partial(_captured, graph)):
        _refuse(operation)


def _refuse(operation: tf.Operation) -> None:
    """Refuses an operation with a state that no checkpoint has.

    Raises:
        UserError: it is of such a kind.
    """
    if operation.type in _RANDOM:
        raise UserError(
            f"{operation.type} {_where(operation)} draws what no resumed run "
            f"would draw again; {_REMEDY}"
        )
    if operation.type in _PYTHON:
        raise UserError(
            f"{operation.type} {_where(operation)} runs Python in a step, "
            "whose state no checkpoint has; compute it with TensorFlow"
        )


def _walk(
    graph: Any, outside: _Outside
) -> Iterator[tuple[tf.Operation, _Outside]]:
    """Yields the operations of a graph, and of functions that it calls.

    Those are what a user has decorated, the branches of a condition, loops,
    and what XLA compiles.
    """
    for operation in graph.get_operations():
        yield operation, outside
        for name in _called(operation):
            function = _function(graph, name)
            if function is not None:
                given = _arguments(operation)
                inside = function.graph
                arguments = {
                    id(tensor): argument
                    for tensor, argument in zip(
                        inside.inputs, given, strict=False
                    )
                }
                yield from _walk(
                    inside, functools.partial(_of_call, arguments, outside)
                )


def _called(operation: tf.Operation) -> Iterator[str]:
    """Yields the names of the functions that an operation calls."""
    # The attributes of all others hold none.
    if operation.type in _CALLS or operation.type.endswith("Dataset"):
        for value in operation.node_def.attr.values():
            for function in (value.func, *value.list.func):
                if function.name:
                    yield function.name


def _function(graph: Any, name: str) -> Any:
    while graph is not None:
        function = graph._get_function(name)
        if function is not None:
            return function
        graph = getattr(graph, "outer_graph", None)
    return None


def _arguments(operation: tf.Operation) -> list[Any]:
    """Returns what the functions of an operation are called with."""
    if operation.type not in _CALLS:
        # Of a data set, elements that are not there yet.
        return []
    return list(operation.inputs)[_CALLS[operation.type] :]


def _of_call(arguments: dict[int, Any], outside: _Outside, tensor: Any) -> Any:
    argument = arguments.get(id(tensor))
    return None if argument is None else outside(argument)


def _handles(
    checkpoint: tf.train.Checkpoint, own: Collection[Any]
) -> dict[int, Any]:
    """Returns the handles of all variables that are saved, by their id."""
    owners = tf.train.TrackableView(checkpoint).descendants()
    handles = {}
    for variable in (*map(objects.unwrapped, owners), *own):
        parts = (
            variable.values
            if isinstance(variable, tf.distribute.DistributedValues)
            else [variable]
        )
        for part in parts:
            handle = getattr(part, "handle", None)
            if handle is not None:
                handles[id(handle)] = handle
    return handles


def _captured(graph: Any, tensor: Any) -> Any:
    """Follows a tensor out of the graphs that captured it.

    Returns:
        The tensor outside of all graphs; None if it was made in one.
    """
    while hasattr(graph, "captures"):
        outside = [
            captured for captured, inside in graph.captures if inside is tensor
        ]
        if not outside:
            return None
        [tensor] = outside
        if isinstance(tensor, tf.__internal__.EagerTensor):
            return tensor
        graph = tensor.graph
    return None


def _name(graph: Any, handle: Any) -> str:
    while graph is not None:
        for variable in getattr(graph, "_watched_variables", ()):
            if getattr(variable, "handle", None) is handle:
                return variable.name
        graph = getattr(graph, "outer_graph", None)
    return "a variable"


def _where(operation: tf.Operation) -> str:
    """Says which line of the user's own has made an operation."""
    for frame in reversed(list(operation.traceback or ())):
        is_others = frame.filename.startswith((*_OTHERS, "<"))
        if not is_others and "__autograph_generated" not in frame.filename:
            return f"in line {frame.lineno} of {frame.filename}"
    return f"({operation.name})"


@contextlib.contextmanager
def nothing_random() -> Iterator[None]:
    """Refuses code that draws numbers in Python while it is traced.

    They would be constants of the graph, the same in each step and others at
    the next start.

    Raises:
        UserError: it draws by `random` or `np.random`.
    """
    before = random.getstate(), _numpy_state()
    yield
    for name, one, two in zip(
        ("random", "np.random"),
        before,
        (random.getstate(), _numpy_state()),
        strict=True,
    ):
        if one != two:
            raise UserError(
                f"an objective or a network draws by {name}, once, when it is "
                f"traced, and otherwise at each start; {_REMEDY}"
            )


def _numpy_state() -> tuple[bytes, int]:
    # Of the generator that all programs share.
    state: Any = np.random.get_state()
    _, keys, position, *_ = state
    return keys.tobytes(), int(position)
