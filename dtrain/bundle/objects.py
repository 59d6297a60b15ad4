"""What a `tf.train.Checkpoint` is made of: its variables, by their keys."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import keras
import tensorflow as tf

# Not public. Nothing public tells what a save would write without saving, or
# reads many variables at once; tests compare the result with a stock save.
from tensorflow.python.checkpoint import graph_view, save_util
from tensorflow.python.eager import context, execute

from dtrain.bundle import fingerprint
from dtrain.bundle.graph import Graph
from dtrain.errors import UserError


class Read(NamedTuple):
    """Reads the variables of a device, all at once.

    To read one after the other takes twice the time, and to read them in a
    `tf.function` is to wait, now and then, for a thread of TensorFlow's.
    """

    handles: list[tf.Tensor]
    attributes: tuple[Any, ...]

    @classmethod
    def of(cls, variables: list[tf.Variable]) -> Read:
        """Prepares to read variables that are all on one device."""
        dtypes = [variable.dtype.as_datatype_enum for variable in variables]
        return cls(
            [variable.handle for variable in variables],
            ("N", len(variables), "dtypes", dtypes),
        )

    def run(self) -> list[tf.Tensor]:
        """Returns their values, as they are now."""
        return execute.quick_execute(
            "_ReadVariablesOp",
            len(self.handles),
            self.handles,
            self.attributes,
            context.context(),
        )


def walk(
    checkpoint: tf.train.Checkpoint,
) -> tuple[dict[str, Any], Graph, Collection[str]]:
    """Finds what a save would write.

    Args:
        checkpoint: its variables exist.

    Returns:
        The object of each key, TensorFlow's graph of all objects, and the
        names of those that have a saver of their own.
    """
    # TensorFlow makes it at the first save, or when it restores; it would be
    # missing here.
    assert checkpoint.save_counter is not None
    view = graph_view.ObjectGraphView(checkpoint)
    owners, _ = view.breadth_first_traversal()
    *_, registered, graph = save_util.serialize_graph_view(view)
    by_key = {
        attribute.checkpoint_key: owner
        for owner, node in zip(owners, graph.nodes, strict=True)
        for attribute in node.attributes
    }
    return by_key, graph, registered


def unwrapped(owner: Any) -> Any:
    """Returns TensorFlow's variable of one of Keras'; else what it is given."""
    return owner.value if isinstance(owner, keras.Variable) else owner


def variables_of(
    checkpoint: tf.train.Checkpoint,
) -> tuple[dict[str, tf.Variable], bytes]:
    """Finds the variables of a checkpoint, which all have to exist by now.

    Args:
        checkpoint: of Keras 3 models and optimizers, `tf.Variable`s, and other
            checkpoints, under any strategy.

    Returns:
        The variable of this worker's first replica by its key in the
        checkpoint, and TensorFlow's serialized TrackableObjectGraph.

    Raises:
        UserError: something in it cannot be read by one worker alone, or is no
            variable.
    """
    _refuse_on_read(checkpoint)
    owners, graph, registered = walk(checkpoint)
    if registered:
        raise UserError(
            f"{', '.join(registered)}: what has a saver of its own cannot "
            "be saved while training goes on; leave it out"
        )
    variables = {
        key: _on_this_worker(key, owner) for key, owner in owners.items()
    }
    return variables, graph.SerializeToString()


def _refuse_on_read(checkpoint: tf.train.Checkpoint) -> None:
    """Refuses a variable whose value is the sum of what all workers have.

    Raises:
        UserError: there is one; a save by the chief alone would wait for the
            others for ever.
    """
    on_read = tf.VariableSynchronization.ON_READ
    for owner in tf.train.TrackableView(checkpoint).descendants():
        variable = unwrapped(owner)
        if getattr(variable, "synchronization", None) == on_read:
            raise UserError(
                f"{variable.name}: a variable with ON_READ synchronization "
                "cannot be saved by one worker alone; make it with ON_WRITE, "
                "or leave it out of the checkpoint"
            )


def _on_this_worker(key: str, owner: Any) -> tf.Variable:
    variable = unwrapped(owner)
    if isinstance(variable, tf.distribute.DistributedValues):
        variable = variable.values[0]  # type: ignore[attr-defined]
    if not isinstance(variable, tf.Variable):
        name = key.removesuffix(fingerprint.VALUE)
        raise UserError(
            f"{name}: a {type(owner).__name__} is no variable and cannot be "
            "saved while training goes on; leave it out of the checkpoint"
        )
    return variable


def untracked_variables(parts: dict[str, Any]) -> dict[str, tf.Variable]:
    """Finds the Keras variables that a checkpoint of `parts` would leave out.

    TensorFlow's graph of objects does not reach those of SeedGenerators, and
    of layers that a subclassed model holds in a list or a dict.

    Args:
        parts: what `tf.train.Checkpoint` is to be made of, by name.

    Returns:
        tf.Variable by the name of its part and its position in the part.
    """
    root = tf.train.Checkpoint(**parts)
    reached = set()
    for trackable in tf.train.TrackableView(root).descendants():
        reached |= {id(trackable), id(unwrapped(trackable))}
    untracked: dict[str, Any] = {}
    for part, owner in parts.items():
        for position, variable in enumerate(getattr(owner, "variables", ())):
            if not {id(variable), id(variable.value)} & reached:
                reached.add(id(variable))
                untracked[f"{part}_{position}"] = variable.value
    return untracked
