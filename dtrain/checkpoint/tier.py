"""A tier of checkpoints: a directory, and what stays in it.

A run has two. The backups are the newest state alone, frequent, for crashes;
they are removed when it is finished. The history is what the policies keep.
Both are written on another thread, in TensorFlow's own format, so a run goes on
from whichever is newer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dtrain.checkpoint import pins, retention
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.checkpoint.snapshot import Snapshot
from dtrain.storage import files


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


class Tier:
    """Writes snapshots into a directory, and removes what is not kept.

    One process has it, and one thread of that calls what `writing` returns.

    Attributes:
        directory: of the checkpoints.
    """

    def __init__(
        self,
        directory: str,
        policies: Sequence[retention.Policy],
        *,
        verify: str = "full",
        run: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the directory, which is made at the first save.

        Args:
            directory: local, or any that `tf.io.gfile` writes.
            policies: what stays is what any of them keeps, and the newest.
            verify: full or sizes; how the newest is checked before an older
                one is removed.
            run: written into each manifest.
        """
        self.directory = CheckpointDirectory(directory)
        self._policies = tuple(policies)
        self._verify = verify
        self._run = run or {}
        # What is in the directory, by its step.
        self._saved: dict[int, retention.Saved] = {}

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

    def forget_after(self, step: int) -> None:
        """Forgets what is newer than a step, which was put aside.

        A store may list it for a while.

        Args:
            step: the newest that is still there.
        """
        self._saved = {
            saved: facts
            for saved, facts in self._saved.items()
            if saved <= step
        }

    def _before(self, facts: Facts) -> None:
        """Makes metrics durable before the state that follows them is."""
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


class Backup(Tier):
    """The newest state of a run that is not finished, in two generations.

    The older one is removed when the newer one is seen to be well, so a kill
    at any moment leaves one that can be read.
    """

    def __init__(
        self,
        directory: str,
        *,
        verify: str = "full",
        run: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the directory; see `Tier`."""
        policies = (retention.Last(2),)
        super().__init__(directory, policies, verify=verify, run=run)

    def _before(self, facts: Facts) -> None:
        # A store that is away must not keep a host from backing up.
        facts.sync()

    def remove(self) -> None:
        """Removes the backups: the run is finished.

        Raises:
            OSError: they cannot be removed.
        """
        # One by one: half of one that a kill leaves would look damaged.
        for step in self.directory.steps():
            self.directory.remove(step)
        files.remove_tree(self.directory.path)
