"""What dtrain's callbacks for a `fit` do alike: restore, and save.

How they know the position of a `fit`, and bring its data there, is in
`keras_fit`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import re
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import keras

from dtrain.checkpoint import (
    arguments,
    keras_backup,
    keras_fit,
    retention,
    takeover,
)
from dtrain.checkpoint.background import Writer
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.tier import Facts, Tier
from dtrain.errors import StorageError, UserError
from dtrain.storage import claim, files

SaveFreq = int | Literal["epoch"]

# Names in a directory of ours; one with any other is somebody else's.
_OURS = (
    r"ckpt-\d+\..*|checkpoint(\.tmp)?|pending|quarantine|pins\.json(\.tmp)?"
    rf"|lease\.json(\.tmp)?|\.lock|{keras_backup.NAMES}"
)
# What is to be closed, by directory. A `fit` that ends by an exception tells
# its callbacks nothing: the next one in this process closes what it left open.
_OPEN: dict[str, contextlib.ExitStack] = {}
# The models whose `fit` has come to its end in this process, by directory.
_FINISHED: dict[str, weakref.ref[keras.Model]] = {}


class Saving(keras.callbacks.Callback):
    """Saves while `fit` trains; the first of these in a `fit` restores."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_freq: SaveFreq,
        policies: Sequence[retention.Policy],
        *,
        verify: str,
        on_save_error: str,
        name: str,
        keep: bool,
    ) -> None:
        """Checks the arguments; nothing is touched before `fit`.

        The subclasses describe them. `name` is what they call the directory,
        for messages; `keep` says that every save must be written, even if the
        disk is slower than `fit`.

        Raises:
            UserError: an argument has no such value.
        """
        super().__init__()
        path = arguments.path(name, directory, "backup")
        self.directory = CheckpointDirectory(path)
        _check_save_freq(save_freq)
        self.save_freq: SaveFreq = save_freq
        self.verify = arguments.choice("verify", verify, ("full", "sizes"))
        self._policies = arguments.policies(policies)
        self._on_save_error = arguments.choice(
            "on_save_error", on_save_error, ("continue", "stop")
        )
        self._name = name
        self._keep = keep
        self._fit: keras_fit.Fit | None = None
        self._seen_step = self._saved_step = 0

    def __enter__(self) -> Saving:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it, however the `fit` in the block has ended."""
        self.close()

    def close(self) -> None:
        """Writes what waits, and lets other processes have the directory.

        A `fit` that ends does so by itself; one that is interrupted cannot.
        May be called twice.

        Raises:
            StorageError: something was not written.
        """
        with files.storage_errors(self.directory.path):
            self._close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Saving:
        """Copies the settings; what a `fit` works with is not shared."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._fit = twin._model = None
        for name in ("_writer", "_claim", "_tier"):
            twin.__dict__.pop(name, None)
        return twin

    # What Keras calls, in this order.

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Restores the newest state there is, and brings the data there."""
        del logs
        local = keras_fit.locals_of_fit(self.model)
        callbacks = [
            callback
            for callback in local["callbacks"].callbacks
            if isinstance(callback, Saving)
        ]
        if self is not callbacks[0]:
            return
        directories = [callback.directory for callback in callbacks]
        _check_distinct(directories)
        fit = keras_fit.Fit(self.model, local["epoch_iterator"])
        full = any(callback.verify == "full" for callback in callbacks)
        with contextlib.ExitStack() as stack:
            for callback in callbacks:
                callback._open()
                stack.callback(callback._close)
            how = "full" if full else "sizes"
            fit.restore(directories, how, local["initial_epoch"])
            _check_reuse(self.model, callbacks, fit, local["epochs"])
            stack.pop_all()
        for callback in callbacks:
            # What is saved there from now on is of this one.
            _FINISHED.pop(callback._key, None)
            callback._fit = fit
            callback._seen_step = callback._saved_step = fit.step

    def on_epoch_begin(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Restores the metrics, which Keras has just reset."""
        del logs
        assert self._fit
        self._fit.begin_epoch(epoch)

    def on_train_batch_end(
        self, batch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Saves after as many batches as `save_freq` says."""
        assert self._fit
        with self._reporting():
            self._writer.raise_if_failed()
        self._fit.finish_batch(batch)
        # The last batch of an epoch is saved after Keras has evaluated: a
        # `fit` cannot go on from between the two.
        if self.save_freq != "epoch" and not self._fit.is_epoch_done:
            self._maybe_save(logs)

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Saves if the epoch, or its last batch, is to be saved."""
        assert self._fit
        with self._reporting():
            self._writer.raise_if_failed()
        if logs is not None and not logs:
            # The data is of unknown length, and `fit` went on at its end.
            logs.update(_scalars(self.model.get_metrics_result()))
        self._fit.finish_epoch(epoch)
        self._maybe_save(logs)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Waits until all is written.

        Raises:
            StorageError: something was not.
        """
        del logs
        self._fit = None
        _FINISHED[self._key] = weakref.ref(self.model)
        # Keras would begin the next `fit` of this model at that epoch.
        self.model._initial_epoch = None
        with files.storage_errors(self.directory.path):
            self._close()

    @property
    def is_epoch_done(self) -> bool:
        """Whether the batch that has just ended is the last of its epoch."""
        return bool(self._fit and self._fit.is_epoch_done)

    def save_last(self, logs: Mapping[str, Any] | None) -> int:
        """Saves what is not saved yet, and closes; `fit` goes on no more.

        Args:
            logs: of the batch or the epoch.

        Returns:
            The batches that are done.

        Raises:
            StorageError: it could not be saved.
        """
        assert self._fit
        step = self._fit.step
        with files.storage_errors(self.directory.path):
            # If an earlier save has failed, this one takes its place.
            self._writer.wait()
            with contextlib.suppress(OSError):
                self._writer.raise_if_failed()
            self._save(logs)
            self._close()
        return step

    # How it saves.

    def _open(self) -> None:
        with contextlib.suppress(OSError):
            self._close()
        path = self.directory.path
        _refuse_foreign(self._name, self.directory)
        self._writer = Writer()
        with contextlib.ExitStack() as stack:
            self._claim = stack.enter_context(
                claim.claim(path, name=self._name)
            )
            stack.callback(self._writer.close)
            _OPEN[self._key] = stack.pop_all()
        self._tier = Tier(path, self._policies, verify=self.verify)

    @property
    def _key(self) -> str:
        path = self.directory.path
        return path if files.is_remote(path) else os.path.realpath(path)

    def _close(self) -> None:
        if self._key in _OPEN:
            _OPEN.pop(self._key).close()

    def _maybe_save(self, logs: Mapping[str, Any] | None) -> None:
        assert self._fit
        step, before = self._fit.step, self._seen_step
        self._seen_step = step
        if self.save_freq == "epoch" or (
            step // self.save_freq > before // self.save_freq
        ):
            self._save(logs)

    def _save(self, logs: Mapping[str, Any] | None) -> None:
        assert self._fit
        self._claim.raise_if_lost()
        self._saved_step = self._fit.step
        facts = Facts(metrics=_scalars(logs or {}))
        write = self._tier.writing(self._fit.step, self._fit.take(), facts)
        is_done = False
        while not is_done:
            # While it waits for an earlier save, that one may fail.
            with self._reporting():
                self._writer.submit(write, keep=self._keep)
                is_done = True

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns a failed save into a warning, unless it is to stop `fit`.

        Raises:
            StorageError: it is.
        """
        try:
            with files.storage_errors(self.directory.path):
                yield
        except StorageError as error:
            if self._on_save_error == "stop":
                raise
            warnings.warn(
                f"{error}; training goes on from what was saved before",
                stacklevel=3,
            )


def _scalars(logs: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns those of the logs that are numbers; None if not finite."""
    scalars: dict[str, float | None] = {}
    for name, value in logs.items():
        with contextlib.suppress(TypeError, ValueError):
            number = float(value)
            scalars[name] = number if math.isfinite(number) else None
    return scalars


def _check_save_freq(save_freq: SaveFreq) -> None:
    is_whole = isinstance(save_freq, int) and not isinstance(save_freq, bool)
    if save_freq != "epoch" and (not is_whole or save_freq < 1):
        raise UserError(
            f"save_freq ({save_freq!r}) must be 'epoch' or a number of batches "
            "of at least 1; try 'epoch'"
        )


def _check_distinct(directories: Sequence[CheckpointDirectory]) -> None:
    paths = [os.path.abspath(directory.path) for directory in directories]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(
                f"{path} is the directory of {paths.count(path)} callbacks; "
                "give each its own"
            )


def _refuse_foreign(name: str, directory: CheckpointDirectory) -> None:
    """Refuses a directory that somebody else saves to.

    Args:
        name: what the callback calls it.
        directory: that it saves to.

    Raises:
        UserError: it holds what is not dtrain's.
    """
    where = f"{name} ({directory.path})"
    for found in files.names(directory.path):
        if not re.fullmatch(_OURS, found):
            raise UserError(
                f"{where} holds {found}, which is no checkpoint of dtrain; "
                "name a directory of its own"
            )
    stock = takeover.found(directory)
    if stock:
        raise UserError(
            f"{where} holds {stock[-1]}, which TensorFlow has saved and which "
            "knows no position in the data; restore it by tf.train.Checkpoint "
            "before fit, and name another directory"
        )


def _check_reuse(
    model: keras.Model,
    callbacks: Sequence[Saving],
    fit: keras_fit.Fit,
    num_epochs: int,
) -> None:
    """Says what comes of a directory in which another `fit` has ended.

    Raises:
        UserError: this process has trained another model there, as the fold
            before, and this one would not be trained.
    """
    ended = [
        _FINISHED[callback._key]
        for callback in callbacks
        if callback._key in _FINISHED
    ]
    is_others = any(finished() is not model for finished in ended)
    is_at_end = fit.epoch >= num_epochs
    if not fit.origin or not (is_others or is_at_end):
        return
    text = (
        f"{fit.origin} is the end of a fit of {fit.epoch} epochs: {{}}; name "
        "another directory for another fit"
    )
    if is_at_end and is_others:
        raise UserError(text.format("this model would not be trained"))
    what = "nothing is trained" if is_at_end else "this one goes on from it"
    warnings.warn(text.format(what), stacklevel=4)
