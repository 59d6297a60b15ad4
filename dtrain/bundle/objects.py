"""What a `tf.train.Checkpoint` is made of: its values, by their keys."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

# Not public. Nothing public tells what a save would write without saving, or
# reads many variables at once; tests compare the result with a stock save.
from tensorflow.python.checkpoint import graph_view, save_util
from tensorflow.python.eager import context, execute
from tensorflow.python.training.saving import saveable_object

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


class Walk(NamedTuple):
    """What a save would write.

    Attributes:
        owners: the object of each key in the graph.
        graph: TensorFlow's, of all objects.
        registered: names of those that have a saver of their own.
        values: of each object, by its keys in a checkpoint; a value may be a
            tensor, or what reads one.
    """

    owners: dict[str, Any]
    graph: Graph
    registered: list[str]
    values: dict[str, Any]


class Shape(NamedTuple):
    """Which objects a checkpoint is made of, and what leads to which.

    Attributes:
        edges: name and identity of what each object holds.
        objects: all of them: while they are held, an identity is not another's.
    """

    edges: list[list[tuple[str, int]]]
    objects: list[Any]

    def is_of(self, other: Shape) -> bool:
        """Tells whether both are of the same objects."""
        return self.edges == other.edges


def view_of(checkpoint: tf.train.Checkpoint) -> graph_view.ObjectGraphView:
    """Returns the view that a save has: of a root, where there is one."""
    return checkpoint._saver._graph_view


def shape_of(checkpoint: tf.train.Checkpoint) -> Shape:
    """Looks which objects there are; costs a few microseconds for each.

    Raises:
        UserError: TensorFlow cannot save them.
    """
    view = view_of(checkpoint)
    shape = Shape([], [view.root])
    seen = {id(view.root)}
    with _refusing():
        for owner in shape.objects:
            children = view.list_children(owner)
            edges = [(child.name, id(child.ref)) for child in children]
            # What only Keras finds.
            if isinstance(owner, keras.Layer):
                edges += [("", id(each)) for each in owner.variables]
            shape.edges.append(edges)
            for child in children:
                if id(child.ref) not in seen:
                    seen.add(id(child.ref))
                    shape.objects.append(child.ref)
    return shape


def attach(checkpoint: tf.train.Checkpoint, name: str, part: Any) -> None:
    """Adds a part to a checkpoint, in place of an earlier one of that name.

    TensorFlow saves no attribute of a checkpoint that has a root.
    """
    setattr(checkpoint, name, part)
    attached = view_of(checkpoint).attached_dependencies
    if attached is not None:
        reference = tf.__internal__.tracking.TrackableReference(name, part)
        attached[:] = [each for each in attached if each.name != name]
        attached.append(reference)


def parts_of(checkpoint: tf.train.Checkpoint) -> dict[str, Any]:
    """Returns what a program has made a checkpoint of, by name."""
    parts = dict(tf.train.TrackableView(checkpoint).children(checkpoint))
    # Made by TensorFlow, which makes another for another Checkpoint.
    parts.pop("save_counter", None)
    root = view_of(checkpoint).root
    # Or it is a weak reference, which is no part.
    return parts if root is checkpoint else {"root": root, **parts}


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Says in one line why TensorFlow cannot save an object.

    Raises:
        UserError: it cannot.
    """
    try:
        yield
    except (ValueError, NotImplementedError, tf.errors.OpError) as error:
        reason = str(getattr(error, "message", error)).strip()
        first = reason.splitlines()[0] if reason else type(error).__name__
        raise UserError(
            f"TensorFlow cannot save this state: {first}; leave it out of the "
            "checkpoint"
        ) from error


def walk(checkpoint: tf.train.Checkpoint) -> Walk:
    """Finds what a save would write.

    Args:
        checkpoint: its variables exist.

    Raises:
        UserError: TensorFlow cannot save it.
    """
    # TensorFlow makes it at the first save, or when it restores; it would be
    # missing here.
    assert checkpoint.save_counter is not None
    view = view_of(checkpoint)
    with _refusing():
        owners, _ = view.breadth_first_traversal()
        serialized, _, registered, graph = save_util.serialize_graph_view(view)
    by_key = {
        attribute.checkpoint_key: owner
        for owner, node in zip(owners, graph.nodes, strict=True)
        for attribute in node.attributes
    }
    values = {
        key: value
        for part in serialized.values()
        for key, value in part.items()
    }
    return Walk(by_key, graph, sorted(registered), values)


def unwrapped(owner: Any) -> Any:
    """Returns TensorFlow's variable of one of Keras'; else what it is given."""
    return owner.value if isinstance(owner, keras.Variable) else owner


class State(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        variables: of this worker's first replica, by their keys.
        others: values of what is no variable, such as tables, iterators and
            state of Python's, as they are now, by their keys.
        graph: TensorFlow's serialized TrackableObjectGraph.
    """

    variables: dict[str, tf.Variable]
    others: dict[str, tf.Tensor]
    graph: bytes


def state_of(checkpoint: tf.train.Checkpoint) -> State:
    """Finds the state of a checkpoint; its variables exist by now.

    Args:
        checkpoint: of Keras 3 models and optimizers, `tf.Variable`s, and other
            checkpoints, under any strategy.

    Raises:
        UserError: something in it cannot be read by one worker alone.
    """
    _refuse_on_read(checkpoint)
    found = walk(checkpoint)
    if found.registered:
        raise UserError(
            f"{', '.join(found.registered)}: what has a saver of its own "
            "cannot be saved while training goes on; leave it out"
        )
    variables = {
        key: variable
        for key, owner in found.owners.items()
        if (variable := _on_this_worker(owner)) is not None
    }
    others = {
        key: tensor
        for key, value in found.values.items()
        if key not in variables
        and (tensor := _evaluated(key, value)) is not None
    }
    return State(variables, others, found.graph.SerializeToString())


def _refuse_on_read(checkpoint: tf.train.Checkpoint) -> None:
    """Refuses a variable whose value is the sum of what all workers have.

    Raises:
        UserError: there is one; a save by the chief alone would wait for the
            others for ever.
    """
    on_read = tf.VariableSynchronization.ON_READ
    for owner in view_of(checkpoint).breadth_first_traversal()[0]:
        variable = unwrapped(owner)
        if getattr(variable, "synchronization", None) == on_read:
            raise UserError(
                f"{variable.name}: a variable with ON_READ synchronization "
                "cannot be saved by one worker alone; make it with ON_WRITE, "
                "or leave it out of the checkpoint"
            )


def _on_this_worker(owner: Any) -> tf.Variable | None:
    variable = unwrapped(owner)
    if isinstance(variable, tf.distribute.DistributedValues):
        variable = variable.values[0]  # type: ignore[attr-defined]
    return variable if isinstance(variable, tf.Variable) else None


def _evaluated(key: str, value: Any) -> tf.Tensor | None:
    """Reads what TensorFlow would write; None if that is nothing.

    Raises:
        UserError: it is one of several slices.
    """
    if isinstance(value, dict):
        raise UserError(
            f"{key}: a variable that is saved in slices cannot be saved while "
            "training goes on; leave it out of the checkpoint"
        )
    if isinstance(value, saveable_object.SaveSpec):
        value = value.tensor
    if value is None:
        return None
    tensor = tf.convert_to_tensor(value)
    if tensor.dtype == tf.variant:
        return tensor
    # A dense table gives out its own memory, which the next step changes.
    with tf.device("CPU:0"):
        return tf.constant(tensor.numpy(), tensor.dtype)
