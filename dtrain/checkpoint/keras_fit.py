"""One call of Keras' `fit`: its position in the data, and all that it changes.

Keras tells a callback the numbers of epoch and batch, and nothing of the data.
The data, Keras' `EpochIterator`, is taken from the stack frame of `fit`. To go
on, the epochs before are read from it once more, without training, so that a
shuffled order is where it would be in a run that was never cut. All of Keras'
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
from dtrain.checkpoint.snapshot import Snapshot, SnapshotTaker
from dtrain.errors import StorageError, UserError
from dtrain.storage import files


class _Position(NamedTuple):
    """Where a `fit` is.

    Attributes:
        epoch: the number of the epoch it is in, as Keras counts.
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
        """Takes the model of a `fit`, and its data, Keras' `EpochIterator`."""
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
        self._taker: SnapshotTaker | None = None
        self._seen_variables: list[int] = []
        # A copy and the variable, for those of the metrics: a checkpoint cannot
        # hold these themselves.
        self._copies: list[tuple[tf.Variable, tf.Variable]] = []

    # Where it is.

    @property
    def is_epoch_done(self) -> bool:
        """Whether no batch of the epoch is left, as far as is known."""
        return self._position.batch == self._data.num_batches

    def begin_epoch(self, epoch: int) -> None:
        """Restores the metrics, which Keras has reset, within an epoch."""
        if self._resumed.batch and epoch == self._resumed.epoch:
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
        """Takes a snapshot of all that `fit` changes, and of where it is."""
        taker = self._current_taker()
        self._step_variable.assign(self.step)
        num_batches = self._data.num_batches or -1
        position = self._position._replace(num_batches=num_batches)
        for name, value in position._asdict().items():
            self._counters[name].assign(value)
        for copy, value in self._copies:
            copy.assign(value)
        return taker.take(self.step)

    def _current_taker(self) -> SnapshotTaker:
        """Returns a taker of all variables, a new one if there are new ones.

        Some variables are made when they are first used.
        """
        parts = _parts(self._model)
        metrics = _metric_variables(self._model)
        variables = [
            id(variable)
            for owner in parts.values()
            for variable in getattr(owner, "variables", (owner,))
        ]
        variables += [id(variable) for variable in metrics]
        if self._taker is None or variables != self._seen_variables:
            self._copies = [(_copy_of(value), value) for value in metrics]
            copies = {
                str(number): copy
                for number, (copy, _) in enumerate(self._copies)
            }
            self._checkpoint = tf.train.Checkpoint(
                **parts,
                untracked=tf.train.Checkpoint(**untracked_variables(parts)),
                metrics=tf.train.Checkpoint(**copies),
                fit=tf.train.Checkpoint(
                    step=self._step_variable, **self._counters
                ),
            )
            self._taker = SnapshotTaker(self._checkpoint)
            self._seen_variables = variables
        return self._taker

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
            UserError: none verifies, or it is of another model or data.
            StorageError: a disk failed.
        """
        self._model._initial_epoch = None
        self._position = _Position(epoch=first_epoch)
        with files.storage_errors(directories[0].path):
            for directory in directories:
                directory.clean()
            seen = going_on.search(
                [going_on.Place(directory, True) for directory in directories],
                how,
            )
        for note in seen.notes:
            warnings.warn(note, stacklevel=2)
        if seen.newest:
            try:
                self._restore(seen.newest, first_epoch)
            except StorageError:
                if how == "full":
                    raise
                # Its sizes did not show that it is damaged, if it is.
                self.restore(directories, "full", first_epoch)
        elif seen.holds_something:
            raise UserError(
                f"{directories[0].path} holds checkpoints and none of them can "
                "be used; bring one back from a copy, or name another "
                "directory to start over"
            )

    def _restore(self, verified: going_on.Verified, first_epoch: int) -> None:
        try:
            self._restore_variables(verified)
        except UserError:
            # A variable that is made at its first use is not there yet.
            self._trace()
            self._restore_variables(verified)
        self.step = verified.manifest.step
        self._position = self._resumed = _Position(
            **{
                name: int(variable.numpy())
                for name, variable in self._counters.items()
            }
        )
        self._check_data(verified.prefix)
        epoch, batch, _ = self._position
        self._model._initial_epoch = epoch
        self._read_epochs(epoch - first_epoch)
        if batch:
            self._skip(batch)
        print(
            f"fit goes on from {verified.prefix}: epoch {epoch}, batch {batch}"
        )

    def _restore_variables(self, verified: going_on.Verified) -> None:
        self._current_taker()
        going_on.restore(
            verified,
            self._checkpoint,
            what="this model",
            remedy="make the model as it was, or name another directory",
        )

    def _trace(self) -> None:
        """Traces one step, without running it, which makes its variables."""
        strategy = self._model.distribute_strategy
        step = tf.function(
            lambda data: strategy.run(self._model.train_step, args=(data,)),
            autograph=False,
        )
        step.get_concrete_function(self._data._distributed_dataset.element_spec)

    def _check_data(self, prefix: str) -> None:
        """Refuses data in which `fit` cannot go on at the saved position.

        Raises:
            UserError: an epoch has another length, or executions another size.
        """
        _, batch, saved = self._position
        num_batches = self._data.num_batches or -1
        if batch and -1 != saved != num_batches != -1:
            raise UserError(
                f"{prefix} was saved at batch {batch} of {saved}, and an epoch "
                f"has now {num_batches}; give fit the data and the batch size "
                "that it had"
            )
        size = self._data.steps_per_execution
        if batch % size:
            raise UserError(
                f"{prefix} was saved at batch {batch}, which must be a "
                f"multiple of steps_per_execution ({size}); compile as it was"
            )

    def _read_epochs(self, num_epochs: int) -> None:
        """Reads epochs from the data without training."""
        data = self._data
        # Where one iterator goes on through the epochs, or their length is not
        # known, each batch has to be read to come to the next.
        reads = bool(data.steps_per_epoch) or not data.data_adapter.num_batches
        for _ in range(num_epochs):
            # Keras warns that data of unknown length ends, each time it does.
            with warnings.catch_warnings(), data.catch_stop_iteration():
                warnings.simplefilter("ignore")
                for _, _, iterator in data:
                    if reads:
                        _read(iterator, data.steps_per_execution)

    def _skip(self, batch: int) -> None:
        """Makes the next epoch, and only that, begin after some batches."""
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
        OutOfRangeError: there are none left; Keras then ends the epoch.
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
