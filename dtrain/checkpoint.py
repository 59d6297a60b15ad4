"""Saving, in two tiers, while training goes on.

`BackupAndRestore` keeps the newest state of a run that is not finished, for
crashes; `CheckpointManager` keeps the history. Both take a snapshot between
two steps and write it on another thread, in TensorFlow's own format, so a run
goes on from whichever is newer. When they save is told in `checkpointer`, and
how a run comes back in `recovery`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dtrain import files, pins, retention
from dtrain.checkpoint_directory import CheckpointDirectory
from dtrain.manifest import DamagedError, Manifest
from dtrain.snapshot import Plan, Snapshot
from dtrain.writer import Writer


class Facts(NamedTuple):
    """What is saved with a state, and is no part of it.

    Attributes:
        metrics: of the step, by name.
        log: `bytes` and `sha256` of metrics.jsonl up to the step.
        sync: puts that on the disk; called before a backup.
        publish: puts it where the run is; called before a checkpoint.
    """

    metrics: Mapping[str, float | None] = {}
    log: Mapping[str, Any] = {}
    sync: Callable[[], None] = lambda: None
    publish: Callable[[], None] = lambda: None


class CheckpointManager:
    """The kept history: `directory/ckpt-<step>`.

    The work of `tf.train.CheckpointManager`, in its format, on another thread,
    and such that a kill leaves no half of anything. One worker calls it: the
    chief.
    """

    def __init__(
        self,
        checkpoint: tf.train.Checkpoint,
        directory: str,
        policies: Sequence[retention.Policy] = (retention.Last(3),),
        *,
        verify: str = "full",
        run: Mapping[str, Any] | None = None,
        plan: Plan | None = None,
        writer: Writer | None = None,
    ) -> None:
        """Opens the directory, which is made at the first save.

        Args:
            checkpoint: the state that is saved; its variables exist.
            directory: local, or any that `tf.io.gfile` writes.
            policies: what stays is what any of them keeps, and the newest.
            verify: full or sizes; how the newest is checked before an older
                one is removed.
            run: written into each manifest.
            plan: of `checkpoint`, if there is one already.
            writer: where it is written, if there is one already.

        Raises:
            UserError: the state cannot be saved while training goes on.
        """
        self.directory = CheckpointDirectory(directory)
        self._plan = plan or Plan(checkpoint)
        self._writer = writer or Writer()
        self._policies = tuple(policies)
        self._verify = verify
        self._run = run or {}
        # What is in the directory, by its step.
        self._saved: dict[int, retention.Saved] = {}

    def save(
        self, step: int, facts: Facts | None = None, *, wait: bool = False
    ) -> None:
        """Saves the state as of now.

        Args:
            step: the steps that are done.
            facts: saved with it.
            wait: returns when it is on the disk; otherwise at once.

        Raises:
            StorageError: this save (with `wait`) or an earlier one failed.
        """
        snapshot = self._plan.take(step)
        write = self.writing(step, snapshot, facts or Facts())
        with files.storage_errors(self.directory.path):
            self._writer.raise_if_failed()
            self._writer.submit(write, keep=True)
            if wait:
                self._writer.drain()

    def close(self) -> None:
        """Waits until all is written.

        Raises:
            StorageError: something was not.
        """
        with files.storage_errors(self.directory.path):
            self._writer.close()

    def writing(
        self, step: int, snapshot: Snapshot, facts: Facts
    ) -> Callable[[], None]:
        """Returns what writes a snapshot and removes what is not kept.

        It is to be called on the thread that alone changes the directory.

        Args:
            step: the steps that are done.
            snapshot: the state.
            facts: saved with it.
        """
        fields = {
            "metrics": dict(facts.metrics),
            "log": dict(facts.log),
            "run": dict(self._run),
        }

        def write() -> None:
            try:
                self._before(facts)
            finally:
                # Without its log a state is of use, and may be all there is.
                made = self.directory.commit(step, snapshot, fields)
                self._sweep(made)

        return write

    def _before(self, facts: Facts) -> None:
        """Makes safe what belongs to a state that is about to be committed."""
        facts.publish()

    def _sweep(self, newest: Manifest) -> None:
        """Removes what is not kept, when the newest one is seen to be well.

        Raises:
            OSError: the disk is at fault, or what was just written is not
                what is there.
        """
        self._look()
        self._saved[newest.step] = retention.Saved(
            newest.step, newest.saved_at, newest.metrics
        )
        pinned = self._pinned()
        everything = [self._saved[step] for step in sorted(self._saved)]
        kept = retention.kept(
            everything, (*self._policies, retention.Pinned(pinned))
        )
        if len(kept) < len(everything):
            try:
                self.directory.verify(newest.step, self._verify)
            except DamagedError as error:
                if newest.step in self.directory.candidates():
                    self.directory.quarantine(newest.step, str(error))
                del self._saved[newest.step]
                raise OSError(
                    f"what was written reads back wrong: {error}"
                ) from error
        for step in set(self._saved) - kept:
            if self.directory.remove(step):
                del self._saved[step]
        self.directory.point(
            {step: saved.saved_at for step, saved in self._saved.items()}
        )

    def _look(self) -> None:
        """Finds what is in the directory; a person may remove some of it."""
        there = self.directory.steps()
        if files.is_remote(self.directory.path):
            # A store may list what was a while ago.
            there = sorted({*there, *self._saved})
        for step in set(self._saved) - set(there):
            del self._saved[step]
        for step in set(there) - set(self._saved):
            # Restoring puts a damaged one aside; what is unclear is not
            # removed.
            with contextlib.suppress(DamagedError):
                made = self.directory.manifest(step)
                self._saved[step] = retention.Saved(
                    step, made.saved_at, made.metrics
                )

    def _pinned(self) -> frozenset[int]:
        """Reads the pins; with a damaged list everything is pinned."""
        try:
            return frozenset(pins.read(self.directory.path).values())
        except DamagedError:
            return frozenset(self._saved)


class BackupAndRestore(CheckpointManager):
    """The newest state of a run that is not finished, in two generations.

    The older one is removed when the newer one is seen to be well, so a kill
    at any moment leaves one that can be read.
    """

    def __init__(
        self, checkpoint: tf.train.Checkpoint, directory: str, **options: Any
    ) -> None:
        """Opens the directory; see `CheckpointManager`."""
        super().__init__(checkpoint, directory, (retention.Last(2),), **options)

    def _before(self, facts: Facts) -> None:
        # A store that is away must not keep a host from backing up.
        facts.sync()

    def remove(self) -> None:
        """Removes the backups: the run is finished.

        Raises:
            OSError: they cannot be removed.
            OpError: likewise.
        """
        # One by one: half of one that a kill leaves would look damaged.
        for step in self.directory.steps():
            self.directory.remove(step)
        files.remove_tree(self.directory.path)
