"""Decides when each tier of a run saves.

The chief's clock decides for all workers, so that the backups of all hosts are
of the same steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from dtrain.checkpoint.background import Writer
from dtrain.checkpoint.manifest import Manifest
from dtrain.checkpoint.snapshot import SnapshotTaker
from dtrain.checkpoint.tier import Facts
from dtrain.cluster.environment import Cluster
from dtrain.cluster.workers import Workers
from dtrain.config import Config
from dtrain.errors import StorageError, UserError
from dtrain.run import places, resuming
from dtrain.run.tiers import open_tiers
from dtrain.storage import files
from dtrain.storage.claim import Claim

Clock = Callable[[], float]

# In the place of the step of a save that lacks metrics of its step.
_INCOMPLETE = -2
# After a checkpoint has failed; a backup waits for its interval.
_RETRY_SECS = 30.0


class Checkpointer:
    """Decides when each tier saves, and restores as `resuming` does.

    Each worker writes its own backups, and the chief the checkpoints, on one
    thread beside the training.

    Attributes:
        saved_step: of the newest save that is written or restored, or -1.
    """

    def __init__(
        self,
        checkpoint: tf.train.Checkpoint,
        config: Config,
        cluster: Cluster,
        *,
        run: Mapping[str, Any] | None = None,
        claims: Sequence[Claim] = (),
        clock: Clock = time.monotonic,
    ) -> None:
        """Opens both tiers of the run.

        Args:
            checkpoint: the state of the GAN.
            config: the run's settings.
            cluster: the workers, and which of them this is.
            run: what config.json holds; written into each manifest.
            claims: what must be this worker's own when it writes.
            clock: returns seconds; the default never goes back.

        Raises:
            UserError: the state cannot be saved while training goes on.
        """
        self._checkpoint = checkpoint
        self._tiers = open_tiers(config, cluster, run)
        self._taker = SnapshotTaker(checkpoint)
        self._writer = Writer()
        self._claims = claims
        self._tiers.guard(self.check_claims)
        self._clock = clock
        self._checkpoint_secs = self._backup_secs = clock()
        # Of the newest save that the writer was given: none is given twice.
        self._submitted_step = self.saved_step = -1
        # Whether the newest checkpoint failed, and when it is tried again.
        self._owes_checkpoint = False
        self._retry_secs: float | None = None

    def restore(self, workers: Workers) -> resuming.Restored:
        """Restores the newest state; see `resuming.restore`."""
        restored = resuming.restore(self._checkpoint, self._tiers, workers)
        if restored.manifest:
            self._submitted_step = self.saved_step = restored.manifest.step
        return restored

    def describe(self, run: Mapping[str, Any]) -> None:
        """Says what the run is; see `Tiers.describe`. Nothing is saved yet."""
        self._tiers.describe(run)

    def roll_back(
        self, workers: Workers, step: int, limits: Sequence[int]
    ) -> Manifest:
        """Restores the last good state; see `resuming.roll_back`."""
        restored = resuming.roll_back(
            self._checkpoint, self._tiers, workers, step, limits
        )
        self._submitted_step = self.saved_step = restored.step
        return restored

    def check_claims(self) -> None:
        """Checks that what this worker writes to is its own; any thread.

        Raises:
            UserError: see `claim.Claim.raise_if_lost`.
            StorageError: likewise.
        """
        for claim in self._claims:
            claim.raise_if_lost()

    def due(self, step: int) -> bool:
        """Tells whether the run is to save at `step`; only the chief knows."""
        if not self._tiers.cluster.is_chief or step == self._submitted_step:
            return False
        return self._checkpoint_due(step) or self._backup_due(step)

    def _checkpoint_due(self, step: int) -> bool:
        config, now = self._tiers.config, self._clock()
        if self._retry_secs is not None and now >= self._retry_secs:
            return True
        every_steps = config.checkpoint_every_steps
        if every_steps and step % every_steps == 0:
            return True
        waited = now - self._checkpoint_secs
        return 0 < config.checkpoint_every_secs <= waited

    def _backup_due(self, step: int) -> bool:
        every_secs = self._tiers.config.backup_every_secs
        # The start, too, for a run that diverges to go back to.
        waited = self._clock() - self._backup_secs if step else every_secs
        return 0 < every_secs <= waited

    def save(self, step: int, facts: Facts | None = None) -> None:
        """Begins to save what is due; every worker calls it where `due` is."""
        is_chief = self._tiers.cluster.is_chief
        is_checkpoint = is_chief and self._checkpoint_due(step)
        if self._submit(step, facts or Facts(), is_checkpoint):
            self._mark(step, is_checkpoint)

    def begin_last(self, step: int, facts: Facts | None = None) -> None:
        """Begins to save a checkpoint, unless there is one of `step`.

        Every worker calls this, and `drain` when `wait` says so. If an earlier
        save has failed, this one takes its place.

        Raises:
            StorageError: the directory cannot be read.
        """
        directory = self._tiers.history.directory
        is_chief = self._tiers.cluster.is_chief
        self.rearm_failed_save()
        with files.storage_errors(directory.path):
            is_saved = self._submitted_step == step
            if is_chief and self._submitted_step != _INCOMPLETE:
                is_saved = step in directory.steps()
            if not is_saved:
                self._submit(step, facts or Facts(), is_checkpoint=is_chief)
        self._mark(step, is_chief)

    def drain(self) -> None:
        """Waits until all is written.

        Raises:
            StorageError: a save failed.
        """
        with files.storage_errors(self._tiers.history.directory.path):
            self._writer.drain()

    def _mark(self, step: int, is_checkpoint: bool) -> None:
        self._submitted_step = step
        # A checkpoint serves as a backup too.
        self._backup_secs = self._clock()
        if is_checkpoint:
            self._checkpoint_secs = self._backup_secs
            self._retry_secs = None

    def _submit(self, step: int, facts: Facts, is_checkpoint: bool) -> bool:
        """Gives the writer what this worker saves; tells whether it took it."""
        # With a place of its own, a host can do without the durable one.
        back_up = self._tiers.backup
        if is_checkpoint and not self._tiers.config.backup_dir:
            back_up = None
        if not is_checkpoint and not back_up:
            return True
        snapshot = self._taker.take(step)

        def write_checkpoint() -> None:
            try:
                self._tiers.history.writing(step, snapshot, facts)()
            except OSError:
                self._owes_checkpoint = True
                raise
            self._owes_checkpoint = False

        def write() -> None:
            self.check_claims()
            # The backup first: a notice may leave no time for more.
            try:
                if back_up:
                    back_up.writing(step, snapshot, facts)()
            finally:
                if is_checkpoint:
                    write_checkpoint()
            self.saved_step = step
            if self._tiers.cluster.is_chief:
                places.record(self._tiers.config, self._tiers.cluster)

        return self._writer.submit(write, keep=is_checkpoint)

    def save_again(self) -> None:
        """Has what was restored saved again where due."""
        self._submitted_step = _INCOMPLETE

    def wait(self, secs: float | None = None) -> bool:
        """Waits for some seconds, or without end; tells if all is written."""
        return self._writer.wait(secs)

    def wait_for_room(self, secs: float) -> bool:
        """Waits for some seconds; tells if `save` would begin at once."""
        return self._writer.wait_for_room(secs)

    def rearm_failed_save(self) -> str:
        """Asks whether a save has failed, and has it made again.

        Returns:
            Why it failed; empty if none has since the last call.
        """
        try:
            with files.storage_errors("the save failed"):
                self._writer.raise_if_failed()
        except StorageError as error:
            # What was submitted may have to be saved again.
            self._submitted_step = -1
            if self._owes_checkpoint:
                self._retry_secs = self._clock() + _RETRY_SECS
            return str(error)
        return ""

    def complete(self) -> str:
        """Removes the backups of a run whose last checkpoint is written.

        Returns:
            Why they could not be removed; empty if they were.
        """
        if not self._tiers.backup:
            return ""
        try:
            with files.storage_errors(self._tiers.backup.directory.path):
                self._tiers.backup.remove()
                if self._tiers.config.backup_dir:
                    files.remove_tree(places.backup_root(self._tiers.config))
        except StorageError as error:
            return f"the backups are not needed any more and stay: {error}"
        return ""

    def __enter__(self) -> Checkpointer:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> None:
        """Closes it; a save that fails now hides no error of before.

        Raises:
            UserError: what is written to is not this worker's own any more.
            StorageError: a save failed.
        """
        try:
            self.close()
        except (StorageError, UserError):
            if error is None:
                raise

    def close(self) -> None:
        """Waits until all is written.

        Raises:
            StorageError: a save failed.
        """
        with files.storage_errors(self._tiers.config.run_dir):
            self._writer.close()
