"""When each tier of a run saves, and where the run goes on.

The chief's clock decides, for all workers, so that every backup of a run is of
the same steps on every host.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dtrain.bundle import restore
from dtrain.checkpoint import going_on, pins, retention
from dtrain.checkpoint.background import Writer
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manager import (
    BackupAndRestore,
    CheckpointManager,
    Facts,
)
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.checkpoint.snapshot import Plan
from dtrain.cluster import workers
from dtrain.cluster.environment import ALONE, Cluster
from dtrain.config import Config
from dtrain.errors import StorageError, UserError
from dtrain.run import places
from dtrain.storage import files

Clock = Callable[[], float]

# After a save that failed, a checkpoint is tried again this much later.
_RETRY_SECS = 30.0


def _places(config: Config, cluster: Cluster) -> list[going_on.Place]:
    return [
        going_on.Place(CheckpointDirectory(place.path), place.is_mine)
        for place in places.find(config, cluster)
    ]


def policies(config: Config) -> list[retention.Policy]:
    """Returns what the flags say about which checkpoints stay."""
    chosen: list[retention.Policy] = [retention.Last(config.max_to_keep)]
    every_steps = config.checkpoint_every_steps
    if every_steps and config.max_rollbacks:
        # Where a run that diverges goes back to, however often it was told to
        # end and saved in between; two, for a collapse is as long as one lasts.
        chosen.append(retention.Last(2, of_steps=every_steps))
    if config.keep_every_n_steps:
        chosen.append(retention.EverySteps(config.keep_every_n_steps))
    if config.keep_every_hours:
        chosen.append(retention.EveryHours(config.keep_every_hours))
    if config.keep_best:
        chosen.append(
            retention.Best(
                config.keep_best,
                config.best_metric,
                "max" if config.best_mode == "max" else "min",
            )
        )
    return chosen


def restore_step(
    checkpoint: tf.train.Checkpoint,
    config: Config,
    step: int = -1,
) -> str:
    """Restores one state of a run that is only looked at.

    Args:
        checkpoint: what is restored into.
        config: the run's settings.
        step: which; -1 is the newest that verifies.

    Returns:
        The prefix that was restored.

    Raises:
        UserError: there is none, it is damaged, or it does not fit the
            networks.
        StorageError: the disk or the store cannot be read.
    """
    with files.storage_errors(config.run_dir):
        all_places = [
            place._replace(is_mine=False) for place in _places(config, ALONE)
        ]
        there = {
            each for place in all_places for each in place.directory.steps()
        }
        seen = going_on.search(
            [
                place
                for place in all_places
                if step < 0 or step in place.directory.steps()
            ],
            config.verify,
            None if step < 0 else step + 1,
        )
    found = seen.found
    if found and step in (-1, found.manifest.step):
        _restore(checkpoint, found, config)
        return found.prefix
    if step in there or (seen.notes and step < 0):
        raise UserError(f"{seen.notes[0]}; choose another --step")
    listed = ", ".join(map(str, sorted(there))) or "none"
    wanted = "" if step < 0 else f" of step {step}"
    raise UserError(
        f"{config.run_dir} holds no checkpoint{wanted}; there: {listed}"
    )


def _restore(
    checkpoint: tf.train.Checkpoint, found: going_on.Found, config: Config
) -> None:
    """Restores what verifies.

    Raises:
        UserError: it is of other networks.
        StorageError: the disk or the store cannot be read.
    """
    with (
        files.storage_errors(found.prefix),
        found.directory.reading(found.manifest.step) as prefix,
    ):
        restore.restore(
            checkpoint,
            prefix,
            found.prefix,
            what=f"the networks of --model={config.model}",
            remedy="make the model as it was, or name another run_dir",
        )


class Restored(NamedTuple):
    """What a run goes on from.

    Attributes:
        prefix: of the checkpoint; empty for a run that starts.
        manifest: of the checkpoint; None for a run that starts.
        notes: a line for each state that does not verify.
    """

    prefix: str
    manifest: Manifest | None
    notes: list[str]


class Checkpointer:
    """Decides when each tier saves, and where a run goes on.

    The chief decides, for all; each worker writes what is its own. All of it
    is written on one other thread.

    Attributes:
        saved_step: step of the newest save that is written, or was restored;
            -1 if there is none.
    """

    def __init__(
        self,
        checkpoint: tf.train.Checkpoint,
        config: Config,
        cluster: Cluster,
        *,
        run: Mapping[str, Any] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Opens both tiers of the run.

        Args:
            checkpoint: the state of the GAN.
            config: the run's settings.
            cluster: the workers, and which of them this is.
            run: what config.json holds; written into each manifest.
            clock: returns seconds; the default never goes back.

        Raises:
            UserError: the state cannot be saved while training goes on.
        """
        self._checkpoint = checkpoint
        self._config = config
        self._cluster = cluster
        self._clock = clock
        self._checkpoint_secs = self._backup_secs = clock()
        self._saved_step = -1
        # Of the newest save that is written, on whichever thread.
        self.saved_step = -1
        # Whether a checkpoint was to be written and is not, and when it is
        # tried again.
        self._owes_checkpoint = False
        self._retry_secs: float | None = None
        plan = Plan(checkpoint)
        self._writer = Writer()
        options = {
            "verify": config.verify,
            "run": run,
            "plan": plan,
            "writer": self._writer,
        }
        self._plan = plan
        self._manager = CheckpointManager(
            checkpoint,
            places.checkpoint_dir(config),
            policies(config),
            **options,
        )
        own = places.backup(config, cluster)
        self._backup = (
            BackupAndRestore(checkpoint, own, **options) if own else None
        )

    def restore(self, strategy: tf.distribute.Strategy) -> Restored:
        """Restores the newest state of the run. Every worker calls this.

        Args:
            strategy: the run's strategy.

        Returns:
            What was restored.

        Raises:
            UserError: there is one and `resume` is never, there is none and
                it is must, none can be used, or it does not fit the networks.
            StorageError: a disk or the store failed.
        """
        config, cluster = self._config, self._cluster

        mine = workers.together(strategy, cluster, self._search)
        own = self._backup.directory if self._backup else None
        with contextlib.ExitStack() as stack:
            found = going_on.agree(strategy, cluster, mine, own, stack)
            self._check_resume(found)
            if found is None:
                return Restored("", None, mine.notes)
            workers.together(
                strategy,
                cluster,
                lambda: _restore(self._checkpoint, found, config),
            )
        self._saved_step = self.saved_step = found.manifest.step
        return Restored(found.prefix, found.manifest, mine.notes)

    def roll_back(
        self, strategy: tf.distribute.Strategy, step: int, limits: Sequence[int]
    ) -> Manifest:
        """Restores the last good state of a run that has diverged.

        Every worker calls this, when nothing is being written. A checkpoint
        that was due by its step is preferred to what was saved by the clock,
        so that a run goes back to the same one however it was killed before.

        Args:
            strategy: the run's strategy.
            step: at which it diverged.
            limits: a state is good below one of these steps, the first for
                which there is one.

        Returns:
            What was restored.

        Raises:
            UserError: nothing was saved before, or it cannot be used.
            StorageError: a disk or the store failed.
        """
        config = self._config
        own = self._backup.directory if self._backup else None

        def search() -> going_on.Search:
            with files.storage_errors(config.run_dir):
                there = _places(config, self._cluster)
                every = config.checkpoint_every_steps
                seen = going_on.Search(None, [], holds_something=False)
                for below, of in itertools.product(limits, (every, 1)):
                    seen = going_on.search(there, config.verify, below, of)
                    if seen.found:
                        break
            return seen

        mine = workers.together(strategy, self._cluster, search)
        with contextlib.ExitStack() as stack:
            found = going_on.agree(strategy, self._cluster, mine, own, stack)
            if found is None:
                raise UserError(
                    f"the run diverged at step {step}, before anything was "
                    "saved; lower the learning rates, or look at the data"
                )
            workers.together(
                strategy,
                self._cluster,
                lambda: _restore(self._checkpoint, found, config),
            )
            self._put_aside(found.manifest.step, step)
        self._saved_step = self.saved_step = found.manifest.step
        return found.manifest

    def _put_aside(self, restored: int, step: int) -> None:
        """Puts aside what was saved on the way to where the run diverged.

        A run that is killed now would go on from there, and come back here.
        """
        for place in _places(self._config, self._cluster):
            if place.is_mine:
                for each in place.directory.steps():
                    if each > restored:
                        place.directory.quarantine(
                            each, f"the run diverged at step {step}"
                        )

    def _search(self) -> going_on.Search:
        """Finds what this worker can offer; see `going_on.search`."""
        config = self._config
        with files.storage_errors(config.run_dir):
            there = _places(config, self._cluster)
            if config.resume == "never":
                # It is refused, so nothing in it may be touched.
                there = [each._replace(is_mine=False) for each in there]
            else:
                self._clean()
            seen = going_on.search(there, config.verify)
            recorded = places.recorded(config.run_dir)
        notes = [*seen.notes, *self._pin_notes()]
        if recorded is None or seen.holds_something:
            return seen._replace(notes=notes)
        where = ", ".join(recorded) or "a directory that cannot be told"
        notes.append(
            f"{config.run_dir} was saved to {where}, and nothing of it is there"
        )
        return going_on.Search(None, notes, holds_something=True)

    def _clean(self) -> None:
        """Removes what killed saves left behind."""
        if self._cluster.is_chief:
            self._manager.directory.clean()
        if self._backup:
            self._backup.directory.clean()

    def _pin_notes(self) -> list[str]:
        path = self._manager.directory.path
        try:
            pins.read(path)
        except DamagedError as error:
            return [f"{path}/pins.json is damaged ({error}); all are kept"]
        return []

    def _check_resume(self, found: going_on.Found | None) -> None:
        resume, run_dir = self._config.resume, self._config.run_dir
        if found is None and resume == "must":
            raise UserError(
                f"resume (must): {run_dir} holds no checkpoint to go on from; "
                "use --resume=auto"
            )
        if found and resume == "never":
            raise UserError(
                f"resume (never): {run_dir} holds checkpoints up to step "
                f"{found.manifest.step}; name another run_dir, or use "
                "--resume=auto"
            )

    # When to save.

    def due(self, step: int) -> bool:
        """Tells whether the run is to save at `step`; the chief knows."""
        if not self._cluster.is_chief or step == self._saved_step:
            return False
        return self._checkpoint_due(step) or self._backup_due(step)

    def _checkpoint_due(self, step: int) -> bool:
        config, now = self._config, self._clock()
        if self._retry_secs is not None and now >= self._retry_secs:
            return True
        if (
            config.checkpoint_every_steps
            and not step % config.checkpoint_every_steps
        ):
            return True
        waited = now - self._checkpoint_secs
        return 0 < config.checkpoint_every_secs <= waited

    def _backup_due(self, step: int) -> bool:
        every_secs = self._config.backup_every_secs
        # The start, too, for a run that diverges to go back to.
        waited = self._clock() - self._backup_secs if step else every_secs
        return 0 < every_secs <= waited

    def save(self, step: int, facts: Facts | None = None) -> None:
        """Saves what is due, or a backup if nothing is. Does not wait.

        Every worker calls this at the steps at which the chief finds a save
        to be due.

        Args:
            step: the steps that are done.
            facts: saved with the state.
        """
        is_checkpoint = self._cluster.is_chief and self._checkpoint_due(step)
        if self._submit(step, facts or Facts(), is_checkpoint):
            self._mark(step, is_checkpoint)

    def begin_last(self, step: int, facts: Facts | None = None) -> None:
        """Begins to save a checkpoint, unless there is one of `step`.

        Every worker calls this, and `drain` when `wait` says that it is done.

        Args:
            step: the steps that are done.
            facts: saved with the state.

        Raises:
            StorageError: the directory cannot be read.
        """
        directory, is_chief = self._manager.directory, self._cluster.is_chief
        # What failed before is made good by this one.
        self.failure()
        with files.storage_errors(directory.path):
            if is_chief and step not in directory.steps():
                self._submit(step, facts or Facts(), is_checkpoint=True)
            elif not is_chief and self._saved_step != step:
                self._submit(step, facts or Facts(), is_checkpoint=False)
        self._mark(step, is_chief)

    def drain(self) -> None:
        """Waits until all is written.

        Raises:
            StorageError: the last save was not.
        """
        with files.storage_errors(self._manager.directory.path):
            self._writer.drain()

    def _mark(self, step: int, is_checkpoint: bool) -> None:
        self._saved_step = step
        # A checkpoint serves as a backup too.
        self._backup_secs = self._clock()
        if is_checkpoint:
            self._checkpoint_secs = self._backup_secs
            self._retry_secs = None

    def _submit(self, step: int, facts: Facts, is_checkpoint: bool) -> bool:
        # With a place of its own, a host can do without the durable one.
        back_up = self._backup
        if is_checkpoint and not self._config.backup_dir:
            back_up = None
        if not is_checkpoint and not back_up:
            return True
        snapshot = self._plan.take(step)

        def write_checkpoint() -> None:
            try:
                self._manager.writing(step, snapshot, facts)()
            except OSError:
                self._owes_checkpoint = True
                raise
            self._owes_checkpoint = False

        def write() -> None:
            # The fast one first, for a notice may leave time for no more.
            try:
                if back_up:
                    back_up.writing(step, snapshot, facts)()
            finally:
                if is_checkpoint:
                    write_checkpoint()
            self.saved_step = step
            if self._cluster.is_chief:
                places.record(self._config, self._cluster)

        return self._writer.submit(write, keep=is_checkpoint)

    def wait(self, secs: float | None = None) -> bool:
        """Waits until nothing is being written, or for some seconds.

        Returns:
            Whether nothing is.
        """
        return self._writer.wait(secs)

    def wait_for_room(self, secs: float) -> bool:
        """Waits until `save` would not wait, or for some seconds.

        Returns:
            Whether it would not.
        """
        return self._writer.wait_for_room(secs)

    def failure(self) -> str:
        """Tells, once, why something could not be saved; empty if all was."""
        try:
            with files.storage_errors("the save failed"):
                self._writer.raise_if_failed()
        except StorageError as error:
            # What was thought to be saved may have to be saved again.
            self._saved_step = -1
            if self._owes_checkpoint:
                self._retry_secs = self._clock() + _RETRY_SECS
            return str(error)
        return ""

    def complete(self) -> str:
        """Removes the backups of a run whose last checkpoint is written.

        Returns:
            A line if that cannot be done; the run is finished all the same.
        """
        if not self._backup:
            return ""
        try:
            with files.storage_errors(self._backup.directory.path):
                self._backup.remove()
                if self._config.backup_dir:
                    files.remove_tree(places.backup_root(self._config))
        except StorageError as error:
            return f"the backups are not needed any more and stay: {error}"
        return ""

    def close(self) -> None:
        """Waits until all is written.

        Raises:
            StorageError: something was not.
        """
        with files.storage_errors(self._config.run_dir):
            self._writer.close()
