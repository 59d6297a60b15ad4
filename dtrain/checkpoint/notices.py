"""What tells a process to end, in a `fit` of one's own: it saves, and ends."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

import keras

from dtrain import errors
from dtrain.checkpoint import keras_fit
from dtrain.checkpoint.saving import Saving
from dtrain.errors import UserError
from dtrain.resilience.watcher import Watcher

# The one that listens, at most. A `fit` that ends by an exception tells its
# callbacks nothing: the next one closes what it has left.
_LISTENING: list[Watcher] = []


class StopOnNotice(keras.callbacks.Callback):
    """Saves and ends the process when it is told to end, as the trainer does.

    The notices are those of `dtrain.main`: SIGTERM, SIGINT, SIGHUP, SIGUSR1,
    SIGUSR2, a cloud that takes the machine away, the end of a Slurm allocation.
    After the batch that `fit` is at, every callback of dtrain in it saves, and
    the process exits with 75 (`SystemExit`), which means "run me again". A
    second signal ends it at once. It stands last in the list of callbacks.

    Args:
        stop_after_secs: seconds to a notice of its own; 0 is none.
        grace_secs: seconds from a notice to the kill that follows it, when the
            process ends itself; 0 lets it take as long as it takes.
    """

    def __init__(
        self, *, stop_after_secs: float = 0.0, grace_secs: float = 0.0
    ) -> None:
        super().__init__()
        self._stop_after_secs = stop_after_secs
        self._grace_secs = grace_secs
        self._saving: list[Saving] = []

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Listens from now on.

        Raises:
            UserError: nothing before it saves, or this is not the main thread.
        """
        del logs
        everything = keras_fit.locals_of_fit(self.model)["callbacks"].callbacks
        self._saving = [
            callback
            for callback in everything[: everything.index(self)]
            if isinstance(callback, Saving)
        ]
        if not self._saving:
            raise UserError(
                "StopOnNotice must come after a callback that saves; put it "
                "last, behind dtrain.BackupAndRestore"
            )
        if threading.current_thread() is not threading.main_thread():
            raise UserError(
                "StopOnNotice must be in a fit of the main thread, which alone "
                "hears signals; call fit there"
            )
        self._let_go()
        watcher = Watcher(
            stop_after_secs=self._stop_after_secs, grace_secs=self._grace_secs
        )
        watcher.start()
        watcher.begin()
        _LISTENING.append(watcher)

    def on_train_batch_end(
        self, batch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Ends the process after a batch, but for the last of an epoch."""
        del batch
        # A `fit` cannot go on from between that one and its evaluation.
        if not self._saving[0].is_epoch_done:
            self._stop_if_told(logs)

    def on_epoch_end(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Ends the process after an epoch."""
        del epoch
        self._stop_if_told(logs)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Listens no more."""
        del logs
        self._let_go()

    def _stop_if_told(self, logs: Mapping[str, Any] | None) -> None:
        [watcher] = _LISTENING
        if not watcher.requested:
            return
        steps = [callback.save_last(logs) for callback in self._saving]
        print(
            f"fit was stopped by {watcher.notice} and saved after batch "
            f"{steps[0]:,}; the same program goes on from there"
        )
        self._let_go()
        sys.exit(errors.RUN_AGAIN)

    def _let_go(self) -> None:
        while _LISTENING:
            _LISTENING.pop().close()
