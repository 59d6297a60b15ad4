"""dtrain's saving for a `fit` of your own: two Keras callbacks.

`BackupAndRestore` has the arguments of `keras.callbacks.BackupAndRestore`, and
`CheckpointManagerCallback` keeps a history. Both save, in TensorFlow's format
and on another thread, the model, every optimizer that it holds, its seeds and
metrics, and the position in the data; `fit` then goes on from that position,
in the middle of an epoch too. If both are given, it goes on from whichever is
newer.

What both do alike is in `saving`.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dtrain.checkpoint import retention
from dtrain.checkpoint.saving import SaveFreq, Saving
from dtrain.errors import StorageError, UserError
from dtrain.storage import files


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
