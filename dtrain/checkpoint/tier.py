"""A tier of checkpoints: a directory, and which of them stay in it.

A run has two tiers. The backups are the newest state alone, saved often, for
crashes; they are removed when the run is finished. The history is what the
policies keep. Both are in TensorFlow's own format, and a run goes on from
whichever is newer.
"""

from __future__ import annotations

import contextlib
import math
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
        metrics: of the step, by name; what is not finite is saved as None.
        log: `bytes` and `sha256` of metrics.jsonl up to the step.
        sync_log: puts these bytes of metrics.jsonl on a disk of this host;
            called before a backup is written.
        publish_log: puts them in the run's directory, which may be on an
            object store; called before a checkpoint is written.
    """

    metrics: Mapping[str, float | None] = {}
    log: Mapping[str, Any] = {}
    sync_log: Callable[[], None] = lambda: None
    publish_log: Callable[[], None] = lambda: None


class Tier:
    """Writes snapshots into a directory, and removes what no policy keeps.

    One process alone may have it.

    Attributes:
        directory: of the checkpoints.
        run: what config.json holds; written into each manifest.
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
            run: see the attribute.
        """
        self.directory = CheckpointDirectory(directory)
        self._policies = tuple(policies)
        self._verify = verify
        self.run = run or {}
        # What is in the directory, by step.
        self._saved: dict[int, retention.Saved] = {}

    def writing(
        self, step: int, snapshot: Snapshot, facts: Facts
    ) -> Callable[[], None]:
        """Returns a function that writes a snapshot, and removes what may go.

        The function is to be called on the one thread that changes the
        directory. It raises OSError where it cannot write.

        Args:
            step: the steps that are done.
            snapshot: the state.
            facts: saved with it.
        """
        fields = {
            "metrics": {
                name: None
                if value is None or not math.isfinite(value)
                else float(value)
                for name, value in facts.metrics.items()
            },
            "log": dict(facts.log),
            "run": dict(self.run),
        }

        def write() -> None:
            try:
                self._save_log(facts)
            finally:
                # Without its log a state is of use, and may be all there is.
                self._sweep(self.directory.commit(step, snapshot, fields))

        return write

    def forget_after(self, step: int) -> None:
        """Forgets checkpoints newer than a step, which were put aside.

        The listing of an object store may show them for a while.
        """
        self._saved = {
            saved: facts
            for saved, facts in self._saved.items()
            if saved <= step
        }

    def _save_log(self, facts: Facts) -> None:
        """Makes metrics.jsonl durable, before the state that continues it."""
        facts.publish_log()

    def _sweep(self, newest: Manifest) -> None:
        """Removes what no policy keeps, after the newest one was verified.

        Raises:
            OSError: what was just written is not what is there.
        """
        self._look()
        self._saved[newest.step] = _saved(newest)
        everything = [self._saved[step] for step in sorted(self._saved)]
        kept = retention.kept(everything, (*self._policies, self._pinned()))
        if len(kept) < len(everything):
            try:
                # One, which leaves the other cores to the training.
                self.directory.verify(newest.step, self._verify, num_threads=1)
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
        """Lists the directory anew: a person may have removed some of it."""
        steps = set(self.directory.steps())
        if files.is_remote(self.directory.path):
            # A store may list what was there a while ago.
            steps |= set(self._saved)
        for step in set(self._saved) - steps:
            del self._saved[step]
        for step in steps - set(self._saved):
            # Restoring puts a damaged one aside; what is unclear is not
            # removed, and takes no place of one of this run.
            with contextlib.suppress(DamagedError):
                manifest = self.directory.manifest(step)
                if manifest.is_of(self.run.get("id", "")):
                    self._saved[step] = _saved(manifest)

    def _pinned(self) -> retention.Pinned:
        """Reads the pins; if their list is damaged, everything is pinned."""
        try:
            steps = pins.read(self.directory.path).values()
        except DamagedError:
            steps = self._saved
        return retention.Pinned(frozenset(steps))


def _saved(manifest: Manifest) -> retention.Saved:
    return retention.Saved(manifest.step, manifest.saved_at, manifest.metrics)


class Backup(Tier):
    """The newest state of a run that is not finished, in two generations.

    The older one is removed when the newer one was verified, so a kill at any
    moment leaves one that can be read.
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

    def _save_log(self, facts: Facts) -> None:
        # A store that is away must not keep a host from backing up.
        facts.sync_log()

    def remove(self) -> None:
        """Removes the backups: the run is finished.

        Raises:
            OSError: they cannot be removed.
        """
        # One by one: half of one that a kill leaves would look damaged.
        for step in self.directory.steps():
            self.directory.remove(step)
        files.remove_tree(self.directory.path)
