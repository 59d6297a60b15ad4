"""One call of Keras' `fit`: its position in the data, and all that it changes.

Keras tells a callback the numbers of epoch and batch, and nothing of the data.
The data, Keras' `EpochIterator`, is taken from the stack frame of `fit`. To go
on, the epochs before are read from it once more, without training, so that a
shuffled order is where it would be in a run that was never cut. All of Keras'
names that are not public are in this file, and in `fit_state`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from dtrain.checkpoint import going_on, keras_backup
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.fit_state import FitState, Position
from dtrain.checkpoint.snapshot import Snapshot
from dtrain.errors import StorageError, UserError
from dtrain.storage import files


class Fit:
    """One call of `fit`: all that it changes, and where it is.

    Attributes:
        step: batches done in all.
        origin: what it goes on from, a checkpoint; empty if it starts.
    """

    def __init__(self, model: keras.Model, data: Any) -> None:
        """Takes the model of a `fit`, and its data, Keras' `EpochIterator`."""
        self.step = 0
        self.origin = ""
        self._model = model
        self._data = data
        self._position = self._resumed = Position()
        self._state = FitState(model)

    # Where it is.

    @property
    def epoch(self) -> int:
        """The epochs that are done."""
        return self._position.epoch

    @property
    def is_epoch_done(self) -> bool:
        """Whether no batch of the epoch is left, as far as is known."""
        return self._position.batch == self._data.num_batches

    def begin_epoch(self, epoch: int) -> None:
        """Restores what the beginning of an epoch changes, within one."""
        if self._resumed.batch and epoch == self._resumed.epoch:
            self._state.restore_epoch()
        self._resumed = Position()

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

    def take(self) -> Snapshot:
        """Takes a snapshot of all that `fit` changes, and of where it is.

        Raises:
            UserError: it holds what cannot be saved.
        """
        num_batches = self._data.num_batches or -1
        position = self._position._replace(num_batches=num_batches)
        return self._state.take(self.step, position)

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
        self._position = Position(epoch=first_epoch)
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
        else:
            self._take_over([each.path for each in directories], first_epoch)

    def _take_over(self, paths: Sequence[str], first_epoch: int) -> None:
        """Goes on from what Keras' own callback has left, if it has.

        Raises:
            UserError: it has, and that cannot be used.
            StorageError: a disk failed.
        """
        for path in paths:
            if not self._model.built and keras_backup.is_there(path):
                self._trace()
            with files.storage_errors(path):
                num_epochs = keras_backup.load(self._model, path)
            if num_epochs is not None:
                self.origin = path
                self._position = Position(epoch=num_epochs)
                self._model._initial_epoch = num_epochs
                self._read_epochs(num_epochs - first_epoch)
                self.step = num_epochs * (self._data.num_batches or 1)
                print(
                    f"fit goes on from {path}, which Keras has saved: epoch "
                    f"{num_epochs}, and of seeds and metrics nothing"
                )
                return

    def _restore(self, verified: going_on.Verified, first_epoch: int) -> None:
        try:
            position = self._state.restore(verified)
        except UserError:
            # A variable that is made at its first use is not there yet.
            self._trace()
            position = self._state.restore(verified)
        self.step = verified.manifest.step
        self.origin = verified.prefix
        self._position = self._resumed = position
        self._check_data(verified.prefix)
        epoch, batch, _ = self._position
        self._model._initial_epoch = epoch
        self._read_epochs(epoch - first_epoch)
        if batch:
            self._skip(batch)
        print(
            f"fit goes on from {verified.prefix}: epoch {epoch}, batch {batch}"
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
        # known, each batch has to be read to come to the next. A PyDataset
        # draws the order when it is read, and what its workers have read ahead
        # would be of the epoch before.
        adapter = data.data_adapter
        reads = (
            bool(data.steps_per_epoch)
            or not adapter.num_batches
            or hasattr(adapter, "py_dataset")
        )
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
