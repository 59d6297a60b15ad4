"""The state of a `tf.train.Checkpoint` at one moment, for another thread.

TensorFlow's variables are copied when they are written to, not when they are
read: a list of what was read stays what it was while training goes on, and
costs microseconds. TensorFlow's own asynchronous option copies everything
first, and raises on the second save of a Keras 3 model (it makes a variable
inside a `tf.function`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

# Not public. What a save is made of, key by key, is told nowhere else without
# saving, and many variables are read at once by no public operation; tests
# compare the result with a stock save.
from tensorflow.python.checkpoint import graph_view, save_util
from tensorflow.python.eager import context, execute

from dtrain import manifest
from dtrain.errors import UserError

_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_SAVE_COUNTER = f"save_counter{_VALUE}"


class Snapshot(NamedTuple):
    """The state at one moment.

    Attributes:
        keys: names of the tensors in a checkpoint.
        tensors: their values, on the devices of their variables.
        graph: TensorFlow's serialized TrackableObjectGraph.
        step: the steps that were done.
        not_finite: keys of what was not finite to begin with, such as the
            mask of a layer; anything else has to be.
    """

    keys: tuple[str, ...]
    tensors: list[tf.Tensor]
    graph: bytes
    step: int
    not_finite: frozenset[str] = frozenset()

    def write(self, prefix: str) -> dict[str, manifest.Tensor]:
        """Writes `<prefix>.index` and its data, as TensorFlow itself does.

        Any thread may call this. Nothing is put on the disk for certain.

        Args:
            prefix: a local path.

        Returns:
            What each tensor was before it was written, by its key.

        Raises:
            OSError: the state has diverged, and is not worth a checkpoint.
            OpError: the disk is full, or gone.
        """
        with tf.device("CPU:0"):
            # Here, and not where the training waits, they leave a GPU.
            tensors = [
                tf.identity(tensor)
                if key != _SAVE_COUNTER
                else tf.constant(self.step, tensor.dtype)
                for key, tensor in zip(self.keys, self.tensors, strict=True)
            ]
            bad = _not_finite(self.keys, tensors) - self.not_finite
            if bad:
                raise OSError(
                    f"{min(bad).removesuffix(_VALUE)} holds numbers that are "
                    f"not finite at step {self.step}"
                )
            tensors.append(tf.constant(self.graph))
            keys = [*self.keys, _GRAPH_KEY]
            described = {
                key: manifest.describe(manifest.values_of(tensor))
                for key, tensor in zip(keys, tensors, strict=True)
            }
            tf.raw_ops.SaveV2(
                prefix=prefix,
                tensor_names=keys,
                shape_and_slices=[""] * len(keys),
                tensors=tensors,
            )
        return described


class _Read(NamedTuple):
    """Reads the variables of a device, all at once.

    A read for each takes twice the time, and a `tf.function` waits, now and
    then, for a thread of TensorFlow's.
    """

    handles: list[tf.Tensor]
    attributes: tuple[Any, ...]

    @classmethod
    def of(cls, variables: list[tf.Variable]) -> _Read:
        dtypes = [variable.dtype.as_datatype_enum for variable in variables]
        return cls(
            [variable.handle for variable in variables],
            ("N", len(variables), "dtypes", dtypes),
        )

    def run(self) -> list[tf.Tensor]:
        return execute.quick_execute(
            "_ReadVariablesOp",
            len(self.handles),
            self.handles,
            self.attributes,
            context.context(),
        )


class Plan:
    """How to take snapshots of a checkpoint."""

    def __init__(self, checkpoint: tf.train.Checkpoint) -> None:
        """Finds the variables, which all have to exist by now.

        Args:
            checkpoint: of Keras 3 models and optimizers, `tf.Variable`s, and
                other checkpoints, under any strategy.

        Raises:
            UserError: something in it cannot be read by one worker alone, or
                is no variable.
        """
        _refuse_on_read(checkpoint)
        # TensorFlow makes it at the first save; before, it would be missing.
        assert checkpoint.save_counter is not None
        view = graph_view.ObjectGraphView(checkpoint)
        owners, _ = view.breadth_first_traversal()
        *_, registered, graph = save_util.serialize_graph_view(view)
        if registered:
            raise UserError(
                f"{', '.join(registered)}: what has a saver of its own cannot "
                "be saved while training goes on; leave it out"
            )
        variables = {
            attribute.checkpoint_key: _on_this_worker(
                attribute.checkpoint_key, owner
            )
            for owner, node in zip(owners, graph.nodes, strict=True)
            for attribute in node.attributes
        }
        # By device, each of which is read by one operation.
        by_device = sorted(variables.items(), key=lambda item: item[1].device)
        self._keys = tuple(key for key, _ in by_device)
        self._reads = [
            _Read.of([variable for _, variable in group])
            for _, group in itertools.groupby(
                by_device, lambda item: item[1].device
            )
        ]
        self._graph = graph.SerializeToString()
        self._not_finite: frozenset[str] = frozenset()
        self._not_finite = _not_finite(self._keys, self.take(0).tensors)

    def take(self, step: int) -> Snapshot:
        """Takes a snapshot, between two steps, on the training thread.

        Args:
            step: the steps that are done; TensorFlow's `save_counter` of the
                snapshot, which would otherwise count saves, and differ
                between a run that was killed and one that was not.
        """
        tensors = [tensor for read in self._reads for tensor in read.run()]
        return Snapshot(
            self._keys, tensors, self._graph, step, self._not_finite
        )


def _not_finite(
    keys: Iterable[str], tensors: Iterable[tf.Tensor]
) -> frozenset[str]:
    """Returns the keys of the tensors that hold an infinity, or no number."""
    return frozenset(
        key
        for key, tensor in zip(keys, tensors, strict=True)
        # One pass and no copy; a sum that is finite has finite parts.
        if tensor.dtype.is_floating
        and not np.isfinite(
            np.sum(manifest.values_of(tensor), dtype=np.float64)
        )
    )


def _refuse_on_read(checkpoint: tf.train.Checkpoint) -> None:
    """Refuses a variable whose value is the sum of what all workers have.

    Raises:
        UserError: there is one; a save by the chief alone would wait for the
            others for ever.
    """
    on_read = tf.VariableSynchronization.ON_READ
    for each in tf.train.TrackableView(checkpoint).descendants():
        variable = each.value if isinstance(each, keras.Variable) else each
        if getattr(variable, "synchronization", None) == on_read:
            raise UserError(
                f"{variable.name}: a variable with ON_READ synchronization "
                "cannot be saved by one worker alone; make it with ON_WRITE, "
                "or leave it out of the checkpoint"
            )


def _on_this_worker(key: str, owner: Any) -> tf.Variable:
    """Finds the variable of this worker's first replica.

    Raises:
        UserError: it is no variable.
    """
    variable = owner.value if isinstance(owner, keras.Variable) else owner
    if isinstance(variable, tf.distribute.DistributedValues):
        variable = variable.values[0]  # type: ignore[attr-defined]
    if not isinstance(variable, tf.Variable):
        name = key.removesuffix(_VALUE)
        raise UserError(
            f"{name}: a {type(owner).__name__} is no variable and cannot be "
            "saved while training goes on; leave it out of the checkpoint"
        )
    return variable


def untracked_variables(parts: dict[str, Any]) -> dict[str, tf.Variable]:
    """Finds the Keras variables that a checkpoint of `parts` would leave out.

    They are those of SeedGenerators, and of layers that a subclassed model
    holds in a list or a dict: TensorFlow's object graph reaches neither.

    Args:
        parts: what `tf.train.Checkpoint` is to be made of, by name.

    Returns:
        tf.Variable by a name made of the part's and its place in the part.
    """
    root = tf.train.Checkpoint(**parts)
    reached = set()
    for trackable in tf.train.TrackableView(root).descendants():
        reached.add(id(trackable))
        if isinstance(trackable, keras.Variable):
            reached.add(id(trackable.value))
    untracked: dict[str, Any] = {}
    for part, owner in parts.items():
        variables = getattr(owner, "variables", ())
        for place, variable in enumerate(variables):
            if not {id(variable), id(variable.value)} & reached:
                reached.add(id(variable))
                untracked[f"{part}_{place}"] = variable.value
    return untracked
