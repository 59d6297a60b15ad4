"""One call of Keras' `fit`: where it is, and all that it changes.

Keras tells a callback the numbers of epoch and batch, and nothing of the data.
That is taken from the frame of `fit`, where it is Keras' `EpochIterator`: to go
on, the epochs before are run on it once more, without the training, so that a
seeded order is in the same place as in a run that was never cut. All of Keras'
names that are not public are in this file.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

# Not public. The seeds of `keras.random` where no seed is given.
from keras.src.backend.common import global_state

from dtrain.bundle.objects import untracked_variables
from dtrain.checkpoint import going_on
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.snapshot import Plan, Snapshot
from dtrain.errors import UserError
from dtrain.storage import files


class _Position(NamedTuple):
    """Where a `fit` is.

    Attributes:
        epoch: the number that Keras gives to the epoch it is in.
        batch: batches of that epoch that are done.
        num_batches: of an epoch; -1 if that is not known yet.
    """

    epoch: int = 0
    batch: int = 0
    num_batches: int = -1


class Fit:
    """One call of `fit`: all that it changes, and where it is.

    Attributes:
        step: batches done in all.
    """

    def __init__(self, model: keras.Model, data: Any) -> None:
        """Looks at one call of `fit`.

        Args:
            model: what it trains.
            data: Keras' `EpochIterator`.
        """
        self.step = 0
        self._model = model
        self._data = data
        self._position = _Position()
        self._resumed = _Position()
        self._counters = {
            name: tf.Variable(0, dtype=tf.int64, trainable=False, name=name)
            for name in _Position._fields
        }
        self._step_variable = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._plan: Plan | None = None
        self._planned: list[int] = []
        # Of each variable of the metrics, which a checkpoint cannot hold.
        self._copies: list[tuple[tf.Variable, tf.Variable]] = []

    # Where it is.

    @property
    def is_epoch_done(self) -> bool:
        """Whether no batch of the epoch is left, as far as is known."""
        return self._position.batch == self._data.num_batches

    def begin_epoch(self, epoch: int) -> None:
        """Puts back what Keras reset, if the epoch is not a whole one."""
        resumed = self._resumed
        if resumed.batch and epoch == resumed.epoch:
            for copy, value in self._copies:
                value.assign(copy)
        self._resumed = _Position()

    def finish_batch(self, batch: int) -> None:
        """Notes that a batch is done; counted from 0 in its epoch."""
        # With `steps_per_execution`, the last number may be one too large.
        done = min(batch + 1, self._data.num_batches or math.inf)
        before = self._position.batch
        self._position = self._position._replace(batch=int(done))
        self.step += int(done) - before

    def finish_epoch(self, epoch: int) -> None:
        """Notes that an epoch is done."""
        self._position = self._position._replace(epoch=epoch + 1, batch=0)

    # What it changes.

    def take(self) -> Snapshot:
        """Takes a snapshot of all of it."""
        plan = self._current_plan()
        self._step_variable.assign(self.step)
        num_batches = self._data.num_batches or -1
        position = self._position._replace(num_batches=num_batches)
        for name, value in position._asdict().items():
            self._counters[name].assign(value)
        for copy, value in self._copies:
            copy.assign(value)
        return plan.take(self.step)

    def _current_plan(self) -> Plan:
        """Plans again if variables were made since, as at their first use."""
        parts = _parts(self._model)
        metrics = _metric_variables(self._model)
        planned = [
            id(variable)
            for owner in parts.values()
            for variable in getattr(owner, "variables", (owner,))
        ]
        planned += [id(variable) for variable in metrics]
        if self._plan is None or planned != self._planned:
            self._copies = [(_copy_of(value), value) for value in metrics]
            self._checkpoint = tf.train.Checkpoint(
                **parts,
                untracked=tf.train.Checkpoint(**untracked_variables(parts)),
                metrics=tf.train.Checkpoint(
                    **{
                        str(number): copy
                        for number, (copy, _) in enumerate(self._copies)
                    }
                ),
                fit=tf.train.Checkpoint(
                    step=self._step_variable, **self._counters
                ),
            )
            self._plan = Plan(self._checkpoint)
            self._planned = planned
        return self._plan

    # How it comes back.

    def restore(
        self,
        directories: Sequence[CheckpointDirectory],
        how: str,
        first_epoch: int,
    ) -> None:
        """Restores the newest state that verifies, if there is one.

        Args:
            directories: where it may be.
            how: full or sizes.
            first_epoch: the `initial_epoch` of `fit`.

        Raises:
            UserError: nothing verifies, or it is of another model or data.
            StorageError: a disk failed.
        """
        self._model._initial_epoch = None
        self._position = _Position(epoch=first_epoch)
        places = [going_on.Place(each, is_mine=True) for each in directories]
        with files.storage_errors(directories[0].path):
            for each in directories:
                each.clean()
            seen = going_on.search(places, how)
        for note in seen.notes:
            warnings.warn(note, stacklevel=2)
        if seen.found:
            self._restore(seen.found, first_epoch)
        elif seen.holds_something:
            raise UserError(
                f"{directories[0].path} holds checkpoints and none of them can "
                "be used; bring one back from a copy, or name another "
                "directory to start over"
            )

    def _restore(self, found: going_on.Found, first_epoch: int) -> None:
        try:
            self._restore_variables(found)
        except UserError:
            # What is made at its first use is not there yet.
            self._trace()
            self._restore_variables(found)
        self.step = found.manifest.step
        self._position = self._resumed = _Position(
            **{
                name: int(variable.numpy())
                for name, variable in self._counters.items()
            }
        )
        self._check_data(found.prefix)
        epoch, batch, _ = self._position
        self._model._initial_epoch = epoch
        self._forward(epoch - first_epoch)
        if batch:
            self._skip(batch)
        print(f"fit goes on from {found.prefix}: epoch {epoch}, batch {batch}")

    def _restore_variables(self, found: going_on.Found) -> None:
        self._current_plan()
        going_on.restore(
            found,
            self._checkpoint,
            what="this model",
            remedy="make the model as it was, or name another directory",
        )

    def _trace(self) -> None:
        """Traces one step, without running it, for the variables it makes."""
        strategy = self._model.distribute_strategy
        step = tf.function(
            lambda data: strategy.run(self._model.train_step, args=(data,)),
            autograph=False,
        )
        step.get_concrete_function(self._data._distributed_dataset.element_spec)

    def _check_data(self, prefix: str) -> None:
        """Refuses data in which the place that was saved is another one.

        Raises:
            UserError: it is.
        """
        _, batch, saved = self._position
        there = self._data.num_batches or -1
        if batch and -1 != saved != there != -1:
            raise UserError(
                f"{prefix} was saved at batch {batch} of {saved}, and an epoch "
                f"has now {there}; give fit the data and the batch size that "
                "it had"
            )
        size = self._data.steps_per_execution
        if batch % size:
            raise UserError(
                f"{prefix} was saved at batch {batch}, which must be a "
                f"multiple of steps_per_execution ({size}); compile as it was"
            )

    def _forward(self, num_epochs: int) -> None:
        """Runs epochs on the data alone."""
        data = self._data
        # One iterator goes on through the epochs, or its length is not known:
        # to be somewhere in it is to have read what is before.
        reads = bool(data.steps_per_epoch) or not data.data_adapter.num_batches
        for _ in range(num_epochs):
            # Keras warns that data of unknown length ends, each time it does.
            with warnings.catch_warnings(), data.catch_stop_iteration():
                warnings.simplefilter("ignore")
                for _, _, iterator in data:
                    if reads:
                        _read(iterator, data.steps_per_execution)

    def _skip(self, batch: int) -> None:
        """Begins the next epoch, and only that, after some of its batches."""
        data = self._data
        whole_epoch = data._enumerate_iterator

        def rest_of_epoch() -> Iterator[tuple[int, int, Any]]:
            del data._enumerate_iterator
            for begin, end, iterator in whole_epoch():
                if begin < batch:
                    _read(iterator, data.steps_per_execution)
                else:
                    yield begin, end, iterator

        data._enumerate_iterator = rest_of_epoch


def _read(iterator: Iterator[Any], num_batches: int) -> None:
    """Reads batches and forgets them.

    Raises:
        OutOfRangeError: there are none left; Keras ends the epoch then.
    """
    for _ in range(num_batches):
        try:
            next(iterator)
        except StopIteration as error:
            raise tf.errors.OutOfRangeError(None, None, "no data") from error


def locals_of_fit(model: keras.Model) -> dict[str, Any]:
    """Finds the local variables of the `fit` that calls this.

    Raises:
        UserError: there is none.
    """
    frame = inspect.currentframe()
    while frame is not None:
        local = frame.f_locals
        if local.get("self") is model and "epoch_iterator" in local:
            return dict(local)
        frame = frame.f_back
    raise UserError(
        f"dtrain's callbacks work in the fit of a Keras model on TensorFlow, "
        f"and this is Keras {keras.__version__} on {keras.backend.backend()}; "
        "use the versions of requirements.txt, or a loop with "
        "dtrain.CheckpointManager"
    )


def _parts(model: keras.Model) -> dict[str, Any]:
    """Finds the model, and what it holds where TensorFlow does not look.

    Those are optimizers and variables in lists and dicts. Keras' own generator
    of seeds is nobody's, and there if it was used.

    Returns:
        Each by the attributes that lead to it.
    """
    parts: dict[str, Any] = {"model": model}
    seen: set[int] = set()

    def visit(name: str, value: Any) -> None:
        if isinstance(value, keras.Optimizer | tf.Variable):
            if id(value) not in seen:
                seen.add(id(value))
                parts[name] = value
        elif isinstance(value, list | tuple):
            for number, each in enumerate(value):
                visit(f"{name}_{number}", each)
        elif isinstance(value, dict):
            for key, each in value.items():
                visit(f"{name}_{key}", each)

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
    """Lists the variables of the metrics, of each replica by itself.

    Under a strategy they are sums that are added up when they are read, which
    would lose how they are shared out.
    """
    metrics = {id(each): each for each in (*model.metrics, *model._metrics)}
    values = [
        variable.value
        for metric in metrics.values()
        for variable in metric.variables
    ]
    return [
        component
        for value in values
        for component in getattr(value, "values", (value,))
    ]


def _copy_of(variable: tf.Variable) -> tf.Variable:
    with tf.device(variable.device):
        return tf.Variable(variable.read_value(), trainable=False)
