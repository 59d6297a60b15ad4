"""What a step must not hold, looked for in the graph that was traced of it.

A run that is killed goes on to the same bits only if a step is a function of
the state that is saved and of (seed, step, position). What a user's code does
beside that shows in its graph: operations that draw from a state of their own,
and variables that are assigned and that no checkpoint has.
"""

from __future__ import annotations

import contextlib
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
    )
)
_PYTHON = ("PyFunc", "PyFuncStateless", "EagerPyFunc")
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
    operations = graph.get_operations()
    for operation in operations:
        _refuse(operation.type, lambda: _where(operation))  # noqa: B023
    for name, kind in _inside_functions(graph, operations):
        _refuse(kind, lambda: f"({name})")  # noqa: B023
    saved = _handles(checkpoint, own)
    for operation in operations:
        if operation.type in _ASSIGN:
            handle = _captured(graph, operation.inputs[0])
            if handle is not None and id(handle) not in saved:
                raise UserError(
                    f"{_name(graph, operation.inputs[0])}: a variable that is "
                    f"assigned {_where(operation)} and is in no checkpoint; "
                    "make it a weight of a network, by add_weight"
                )


def _refuse(kind: str, where: Callable[[], str]) -> None:
    """Refuses an operation with a state that no checkpoint has.

    Raises:
        UserError: it is of such a kind.
    """
    if kind in _RANDOM:
        raise UserError(
            f"{kind} {where()} draws what no resumed run would draw again; "
            f"{_REMEDY}"
        )
    if kind in _PYTHON:
        raise UserError(
            f"{kind} {where()} runs Python in a step, whose state no "
            "checkpoint has; compute it with TensorFlow"
        )


def _inside_functions(
    graph: Any, operations: Collection[tf.Operation]
) -> Iterator[tuple[str, str]]:
    """Yields the operations of functions that the graph calls, by their name.

    Those are what a user has decorated, the branches of a condition, and what
    XLA compiles.
    """
    if not any("Call" in each.type or "If" in each.type for each in operations):
        return
    for function in graph.as_graph_def().library.function:
        for node in function.node_def:
            yield node.name, node.op


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


def _name(graph: Any, tensor: Any) -> str:
    handle = _captured(graph, tensor)
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
