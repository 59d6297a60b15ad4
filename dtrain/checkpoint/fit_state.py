"""All that a `fit` changes, as one checkpoint: a model and its position."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import tensorflow as tf

# Not public. The seeds of `keras.random` where no seed is given.
from keras.src.backend.common import global_state

from dtrain.bundle import keras_state, objects
from dtrain.checkpoint import going_on
from dtrain.checkpoint.snapshot import Snapshot, SnapshotTaker


class Position(NamedTuple):
    """Where a `fit` is.

    Attributes:
        epoch: the number of the epoch it is in, as Keras counts.
        batch: batches of that epoch that are done.
        num_batches: of an epoch; -1 if that is not known yet.
    """

    epoch: int = 0
    batch: int = 0
    num_batches: int = -1


class FitState:
    """What a `fit` of a model changes, whenever that is made."""

    def __init__(self, model: keras.Model) -> None:
        """Takes the model as it is before training.

        Raises:
            UserError: it holds what cannot be saved.
        """
        self._model = model
        self._counters = {
            name: tf.Variable(0, dtype=tf.int64, trainable=False, name=name)
            for name in Position._fields
        }
        self._step = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._taker: SnapshotTaker | None = None
        self._seen_metrics: list[int] = []
        # A copy and the variable, for those of the metrics: a checkpoint cannot
        # hold these themselves.
        self._copies: list[tuple[tf.Variable, tf.Variable]] = []
        # Of optimizers, and what they were when the state was saved.
        self._rates: list[tuple[keras.Variable, float]] = []
        # A NaN that comes later is no state to save.
        self.update()

    def take(self, step: int, position: Position) -> Snapshot:
        """Takes a snapshot of all that `fit` changes, and of where it is.

        Args:
            step: batches done in all.
            position: of the `fit`.

        Raises:
            UserError: it holds what cannot be saved.
        """
        taker = self.update()
        self._step.assign(step)
        for name, value in position._asdict().items():
            self._counters[name].assign(value)
        for copy, value in self._copies:
            copy.assign(value)
        return taker.take(step)

    def update(self) -> SnapshotTaker:
        """Returns a taker of all objects, a new one if there are others.

        Some are made, and built, when they are first used.

        Raises:
            UserError: one of them cannot be saved.
        """
        parts = _parts(self._model)
        metrics = _metric_variables(self._model)
        shape = objects.shape_of(tf.train.Checkpoint(**parts))
        seen = [id(variable) for variable in metrics]
        if (
            self._taker is None
            or not shape.is_of(self._shape)
            or seen != self._seen_metrics
        ):
            self._copies = [(_copy_of(value), value) for value in metrics]
            copies = {
                str(number): copy
                for number, (copy, _) in enumerate(self._copies)
            }
            self._checkpoint = tf.train.Checkpoint(
                **parts,
                untracked=tf.train.Checkpoint(**keras_state.untracked(parts)),
                metrics=tf.train.Checkpoint(**copies),
                fit=tf.train.Checkpoint(step=self._step, **self._counters),
            )
            self._taker = SnapshotTaker(self._checkpoint, self._taker)
            self._shape = shape
            self._seen_metrics = seen
        return self._taker

    def restore(self, verified: going_on.Verified) -> Position:
        """Restores all of it; returns the position.

        Raises:
            UserError: it does not fit.
            StorageError: the disk or the store failed.
        """
        self.update()
        going_on.restore(
            verified,
            self._checkpoint,
            what="this model",
            remedy="make the model as it was, or name another directory",
        )
        rates = [
            part.learning_rate
            for part in _parts(self._model).values()
            if isinstance(part, keras.Optimizer)
        ]
        # A schedule has no variable.
        self._rates = [
            (rate, float(rate.numpy()))
            for rate in rates
            if isinstance(rate, keras.Variable)
        ]
        return Position(
            **{
                name: int(variable.numpy())
                for name, variable in self._counters.items()
            }
        )

    def restore_epoch(self) -> None:
        """Restores what changes where an epoch begins.

        Keras resets the metrics there, and callbacks set learning rates; for an
        epoch that goes on they have done so before it was saved.
        """
        for copy, value in self._copies:
            value.assign(copy)
        for rate, value in self._rates:
            rate.assign(value)


def _parts(model: keras.Model) -> dict[str, Any]:
    """Returns the model, and the parts of it that TensorFlow does not find.

    These are optimizers and variables in lists and dicts, by the attributes
    that lead to them, and Keras' global generator of seeds, if it was used.
    """
    parts: dict[str, Any] = {"model": model}
    seen: set[int] = set()

    def visit(name: str, value: Any) -> None:
        if isinstance(value, keras.Optimizer | tf.Variable):
            if id(value) not in seen:
                seen.add(id(value))
                parts[name] = value
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                visit(f"{name}_{number}", item)
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(f"{name}_{key}", item)

    for number, layer in enumerate(model._flatten_layers()):
        for name, value in vars(layer).items():
            # Those of TensorFlow's own, which name the same things again.
            if not name.startswith("_self_"):
                visit(f"layer_{number}_{name}" if number else name, value)
    seeds = global_state.get_global_attribute("global_seed_generator")
    if seeds is not None:
        parts["global_seed_generator"] = seeds.state.value
    return parts


def _metric_variables(model: keras.Model) -> list[tf.Variable]:
    """Lists the variables of the metrics, those of each replica apart.

    Under a strategy each replica has a part of a sum, and to read the variable
    adds them up: what is restored would not be the parts.
    """
    metrics = dict.fromkeys((*model.metrics, *model._metrics))
    return [
        component
        for metric in metrics
        for variable in metric.variables
        for component in getattr(variable.value, "values", (variable.value,))
    ]


def _copy_of(variable: tf.Variable) -> tf.Variable:
    with tf.device(variable.device):
        return tf.Variable(variable.read_value(), trainable=False)
