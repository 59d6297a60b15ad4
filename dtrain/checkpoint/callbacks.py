"""dtrain's saving for a `fit` of your own: two Keras callbacks.

`BackupAndRestore` has the arguments of `keras.callbacks.BackupAndRestore`, and
`CheckpointManagerCallback` keeps a history. Both save, in TensorFlow's format
and on another thread, the model, every optimizer that it holds, its seeds and
metrics, and the position in the data; `fit` then goes on from that position,
in the middle of an epoch too. If both are given, it goes on from whichever is
newer.

How they know the position of a `fit`, and bring its data there, is in
`keras_fit`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import keras

from dtrain.checkpoint import keras_fit, retention
from dtrain.checkpoint.background import Writer
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.tier import Facts, Tier
from dtrain.errors import StorageError, UserError
from dtrain.storage import claim, files

SaveFreq = int | Literal["epoch"]

# Names in a directory of ours; one with any other is somebody else's.
_OURS = (
    r"ckpt-\d+\..*|checkpoint(\.tmp)?|pending|quarantine|pins\.json(\.tmp)?"
    r"|lease\.json(\.tmp)?|\.lock"
)
# What is to be closed, by directory. A `fit` that ends by an exception tells
# its callbacks nothing: the next one in this process closes what it left open.
_OPEN: dict[str, contextlib.ExitStack] = {}


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
        self.directory = CheckpointDirectory(os.fspath(directory))
        if not self.directory.path:
            raise UserError(f"{name} ('') must be a path; try 'backup'")
        _check_save_freq(save_freq)
        _check_choice("verify", verify, ("full", "sizes"))
        _check_choice("on_save_error", on_save_error, ("continue", "stop"))
        self.save_freq: SaveFreq = save_freq
        self.verify = verify
        self._policies = tuple(policies)
        self._on_save_error = on_save_error
        self._name = name
        self._keep = keep
        self._fit: keras_fit.Fit | None = None
        self._seen_step = self._saved_step = 0

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
            stack.pop_all()
        for callback in callbacks:
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
        foreign = [
            name for name in files.names(path) if not re.fullmatch(_OURS, name)
        ]
        if foreign:
            raise UserError(
                f"{self._name} ({path}) holds {foreign[0]}, which is no "
                "checkpoint of dtrain; name a directory of its own"
            )
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


class BackupAndRestore(Saving):
    """The newest state of a `fit` that is not finished, in two generations.

    A drop-in for `keras.callbacks.BackupAndRestore`. It should be the last of
    the callbacks but for `StopOnNotice`: what later ones change at the end of
    an epoch is not in the backup of that epoch.

    Args:
        backup_dir: a directory of its own, local or any that `tf.io.gfile`
            writes; made at the start.
        save_freq: epoch, or a number of batches.
        double_checkpoint: has no effect: there are always two generations.
        delete_checkpoint: whether the backups are removed when `fit` is
            finished.
        verify: full, which reads and sums a state before it is used, or
            sizes.
        on_save_error: continue, which warns and trains on, or stop, which
            raises `StorageError`.
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: SaveFreq = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
        *,
        verify: Literal["full", "sizes"] = "full",
        on_save_error: Literal["continue", "stop"] = "continue",
    ) -> None:
        super().__init__(
            backup_dir,
            save_freq,
            (retention.Last(2),),
            verify=verify,
            on_save_error=on_save_error,
            name="backup_dir",
            keep=False,
        )
        self.backup_dir = self.directory.path
        self.double_checkpoint = double_checkpoint
        self.delete_checkpoint = delete_checkpoint

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Waits until all is written, and removes it."""
        if not self.delete_checkpoint:
            super().on_train_end(logs)
            return
        # What could not be written is not needed any more.
        with contextlib.suppress(StorageError):
            super().on_train_end(logs)
        try:
            with files.storage_errors(self.backup_dir):
                files.remove_tree(self.backup_dir)
        except StorageError as error:
            warnings.warn(
                f"{error}; remove it, or the next fit goes on from its end",
                stacklevel=2,
            )


class CheckpointManagerCallback(Saving):
    """The kept history of a `fit`: `directory/ckpt-<batches done>`.

    It does what `keras.callbacks.ModelCheckpoint` does, with the whole state,
    so that `fit` can go on from it. The end of the last epoch is always saved.

    Args:
        directory: a directory of its own, local or any that `tf.io.gfile`
            writes; made at the start.
        save_freq: epoch, or a number of batches.
        policies: what any of them keeps stays; see
            `dtrain.checkpoint.retention`. The metrics of a `Best` are the
            logs of the epoch or batch that is saved.
        verify: full, which reads and sums a state before it is used, or
            sizes.
        on_save_error: continue, which warns and trains on, or stop, which
            raises `StorageError`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_freq: SaveFreq = "epoch",
        policies: Sequence[retention.Policy] = (retention.Last(3),),
        *,
        verify: Literal["full", "sizes"] = "full",
        on_save_error: Literal["continue", "stop"] = "continue",
    ) -> None:
        super().__init__(
            directory,
            save_freq,
            policies,
            verify=verify,
            on_save_error=on_save_error,
            name="directory",
            keep=True,
        )

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Saves after an epoch, if that is due or it is the last."""
        self._check_metrics(logs or {})
        super().on_epoch_end(epoch, logs)
        assert self._fit
        is_last = epoch + 1 == (self.params or {}).get("epochs")
        is_last = is_last or self.model.stop_training
        if is_last and self._saved_step != self._fit.step:
            self._save(logs)

    def _check_metrics(self, logs: Mapping[str, Any]) -> None:
        """Refuses a `Best` of a metric that is not among the logs.

        Raises:
            UserError: there is one.
        """
        for policy in self._policies:
            if isinstance(policy, retention.Best) and policy.metric not in logs:
                raise UserError(
                    f"Best.metric ({policy.metric!r}) must be among the logs "
                    f"of an epoch; there: {', '.join(sorted(logs)) or 'none'}"
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


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(
            f"{name} ({value!r}) must be {' or '.join(choices)}; try "
            f"{choices[0]!r}"
        )


def _check_distinct(directories: Sequence[CheckpointDirectory]) -> None:
    paths = [os.path.abspath(directory.path) for directory in directories]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(
                f"{path} is the directory of {paths.count(path)} callbacks; "
                "give each its own"
            )
