"""Saving, in two tiers, while training goes on.

`BackupAndRestore` keeps the newest state of a run that is not finished, for
crashes; `CheckpointManager` keeps the history. Both take a snapshot between
two steps and write it on another thread, in TensorFlow's own format, so a run
goes on from whichever is newer. How it comes back is told in `recovery`.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dtrain import files, recovery, retention, sealed, strategies
from dtrain.checkpoint_directory import CheckpointDirectory
from dtrain.cluster import ALONE, Cluster
from dtrain.config import Config
from dtrain.errors import StorageError, UserError
from dtrain.manifest import DamagedError, Manifest
from dtrain.snapshot import Plan, Snapshot
from dtrain.writer import Writer

Clock = Callable[[], float]

# What TensorFlow raises where names or shapes are not those of the variables.
_MISFITS = (AssertionError, ValueError, tf.errors.InvalidArgumentError)
# After a save that failed, a checkpoint is tried again this much later.
_RETRY_SECS = 30.0


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
        # What is in the directory; read from it before the first removal.
        self._saved: dict[int, retention.Saved] | None = None

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
            self._before(facts)
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
        if self._saved is None:
            self._saved = self._read_saved()
        elif not files.is_remote(self.directory.path):
            # A person may remove some; a store may list what was a while ago.
            there = self.directory.steps()
            self._saved = {
                step: each
                for step, each in self._saved.items()
                if step in there
            }
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

    def _read_saved(self) -> dict[int, retention.Saved]:
        saved = {}
        for step in self.directory.steps():
            try:
                made = self.directory.manifest(step)
            except DamagedError:
                # Restoring puts it aside; what is unclear is not removed.
                continue
            saved[step] = retention.Saved(step, made.saved_at, made.metrics)
        return saved

    def _pinned(self) -> frozenset[int]:
        """Reads the pins; with a damaged list everything is pinned."""
        try:
            return frozenset(read_pins(self.directory.path).values())
        except DamagedError:
            return frozenset(self._saved or ())


def read_pins(directory: str) -> dict[str, int]:
    """Reads which checkpoints must stay for ever: step by name.

    Args:
        directory: of checkpoints.

    Raises:
        DamagedError: the list is not what was written.
    """
    data = files.read(f"{directory}/pins.json")
    return sealed.loads(data)["pins"] if data is not None else {}


def pin(directory: str, step: int, name: str) -> None:
    """Keeps a checkpoint for ever, under a name.

    Args:
        directory: of checkpoints.
        step: which.
        name: what it is called; one of the same name is not pinned any more.

    Raises:
        UserError: there is no such checkpoint.
        DamagedError: the list is not what was written.
    """
    there = CheckpointDirectory(directory).steps()
    if step not in there:
        raise UserError(
            f"{directory} holds no checkpoint of step {step}; there: "
            f"{', '.join(map(str, there)) or 'none'}"
        )
    pins = {**read_pins(directory), name: step}
    files.write(f"{directory}/pins.json", sealed.dumps({"pins": pins}))


def unpin(directory: str, name: str) -> None:
    """Lets a pinned checkpoint go when no policy keeps it.

    Args:
        directory: of checkpoints.
        name: what it was pinned as.

    Raises:
        UserError: nothing is pinned as that.
        DamagedError: the list is not what was written.
    """
    pins = read_pins(directory)
    if name not in pins:
        raise UserError(
            f"nothing in {directory} is pinned as {name}; pinned: "
            f"{', '.join(sorted(pins)) or 'nothing'}"
        )
    del pins[name]
    files.write(f"{directory}/pins.json", sealed.dumps({"pins": pins}))


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
        self._saved = None


def checkpoint_dir(config: Config) -> str:
    """Returns where the history of a run is kept."""
    return config.checkpoint_dir or f"{config.run_dir}/checkpoints"


def _backup_root(config: Config) -> str:
    """Returns where a host keeps the backups of a run, of all its workers."""
    run_dir = config.run_dir
    if not files.is_remote(run_dir):
        run_dir = os.path.abspath(run_dir)
    key = hashlib.sha256(run_dir.encode()).hexdigest()[:8]
    name = os.path.basename(run_dir.rstrip("/"))
    return os.path.join(config.backup_dir, f"{name}-{key}")


def _backup_of(config: Config, cluster: Cluster) -> str | None:
    """Returns where a worker backs up; None if it does not."""
    if config.backup_dir:
        return f"{_backup_root(config)}/worker-{cluster.index}"
    return f"{config.run_dir}/backup" if cluster.is_chief else None


def _backups(config: Config) -> list[str]:
    """Lists the directories of backups that this worker can read.

    On a host that was another worker before, they bear that one's number.
    """
    if not config.backup_dir:
        return [f"{config.run_dir}/backup"]
    root = _backup_root(config)
    if files.is_remote(root):
        return [f"{root}/{name}" for name in files.names(root)]
    return sorted(glob.glob(f"{glob.escape(root)}/worker-*"))


def _places(config: Config, cluster: Cluster) -> list[recovery.Place]:
    own = _backup_of(config, cluster)
    return [
        recovery.Place(
            CheckpointDirectory(checkpoint_dir(config)), cluster.is_chief
        ),
        *(
            recovery.Place(CheckpointDirectory(path), path == own)
            for path in _backups(config)
        ),
    ]


def policies(config: Config) -> list[retention.Policy]:
    """Returns what the flags say about which checkpoints stay."""
    chosen: list[retention.Policy] = [retention.Last(config.max_to_keep)]
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
    places = [
        recovery.Place(place.directory, is_mine=False)
        for place in _places(config, ALONE)
    ]
    with files.storage_errors(config.run_dir):
        there = {each for place in places for each in place.directory.steps()}
        if step >= 0:
            places = [each for each in places if step in each.directory.steps()]
        below = None if step < 0 else step + 1
        seen = recovery.search(places, config.verify, below)
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
    checkpoint: tf.train.Checkpoint, found: recovery.Found, config: Config
) -> None:
    """Restores what verifies.

    Raises:
        UserError: it is of other networks.
        StorageError: the disk or the store cannot be read.
    """
    with files.storage_errors(found.prefix):
        try:
            with found.directory.reading(found.manifest.step):
                checkpoint.restore(found.prefix).assert_consumed()
        except _MISFITS as error:
            # Or TensorFlow adds, at exit, a line for each value that has no
            # place.
            tf.get_logger().setLevel("ERROR")
            first = str(error).strip().splitlines()[0]
            # Without the graph of objects that TensorFlow begins to show.
            first = first.removesuffix(": attributes {").rstrip(".:")
            raise UserError(
                f"{found.prefix} does not fit the networks of "
                f"--model={config.model}: {first}; make the model as it was, "
                "or name another run_dir"
            ) from error


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
        self._saved_step = 0
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
            checkpoint, checkpoint_dir(config), policies(config), **options
        )
        own = _backup_of(config, cluster)
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

        def search() -> recovery.Search:
            with files.storage_errors(config.run_dir):
                places = _places(config, cluster)
                if config.resume == "never":
                    # It is refused, so nothing in it may be touched.
                    places = [each._replace(is_mine=False) for each in places]
                else:
                    self._clean()
                seen = recovery.search(places, config.verify)
                return seen._replace(notes=[*seen.notes, *self._pin_notes()])

        mine = strategies.together(strategy, cluster, search)
        with tempfile.TemporaryDirectory(prefix="dtrain-received-") as received:
            own = self._backup.directory if self._backup else None
            found = recovery.agree(
                strategy, cluster, mine, own or CheckpointDirectory(received)
            )
            self._check_resume(found)
            if found is None:
                return Restored("", None, mine.notes)
            strategies.together(
                strategy,
                cluster,
                lambda: _restore(self._checkpoint, found, config),
            )
        self._saved_step = found.manifest.step
        return Restored(found.prefix, found.manifest, mine.notes)

    def _clean(self) -> None:
        """Removes what killed saves left behind."""
        if self._cluster.is_chief:
            self._manager.directory.clean()
        if self._backup:
            self._backup.directory.clean()

    def _pin_notes(self) -> list[str]:
        path = self._manager.directory.path
        try:
            read_pins(path)
        except DamagedError as error:
            return [f"{path}/pins.json is damaged ({error}); all are kept"]
        return []

    def _check_resume(self, found: recovery.Found | None) -> None:
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
        return self._checkpoint_due(step) or self._backup_due()

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

    def _backup_due(self) -> bool:
        waited = self._clock() - self._backup_secs
        return 0 < self._config.backup_every_secs <= waited

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

    def save_last(self, step: int, facts: Facts | None = None) -> str:
        """Saves a checkpoint, unless there is one of `step`, and waits for it.

        Every worker calls this.

        Args:
            step: the steps that are done.
            facts: saved with the state.

        Returns:
            The prefix of the checkpoint.

        Raises:
            StorageError: it could not be saved.
        """
        directory, is_chief = self._manager.directory, self._cluster.is_chief
        # What failed before is made good by this one.
        self._writer.wait()
        self.failure()
        with files.storage_errors(directory.path):
            if is_chief and step not in directory.steps():
                self._submit(step, facts or Facts(), is_checkpoint=True)
            elif not is_chief and self._saved_step != step:
                self._submit(step, facts or Facts(), is_checkpoint=False)
            self._mark(step, is_chief)
            self._writer.drain()
        return directory.prefix(step)

    def _mark(self, step: int, is_checkpoint: bool) -> None:
        self._saved_step = step
        # A checkpoint serves as a backup too.
        self._backup_secs = self._clock()
        if is_checkpoint:
            self._checkpoint_secs = self._backup_secs
            self._retry_secs = None

    def _submit(self, step: int, facts: Facts, is_checkpoint: bool) -> bool:
        tiers: list[CheckpointManager] = []
        if is_checkpoint:
            tiers.append(self._manager)
        # With a place of its own, a host can do without the durable one.
        if self._backup and (not is_checkpoint or self._config.backup_dir):
            tiers.append(self._backup)
        if not tiers:
            return True
        snapshot = self._plan.take(step)

        if is_checkpoint:
            self._owes_checkpoint = True

        def write_checkpoint() -> None:
            self._manager.writing(step, snapshot, facts)()
            self._owes_checkpoint = False

        def write() -> None:
            with contextlib.ExitStack() as stack:
                # Each of them, even if one fails.
                for tier in tiers:
                    stack.callback(
                        write_checkpoint
                        if tier is self._manager
                        else tier.writing(step, snapshot, facts)
                    )

        return self._writer.submit(write, keep=is_checkpoint)

    def wait(self) -> None:
        """Waits until nothing is being written, and says nothing of it."""
        self._writer.wait()

    def failure(self) -> str:
        """Tells, once, why something could not be saved; empty if all was."""
        try:
            with files.storage_errors("the save failed"):
                self._writer.raise_if_failed()
        except StorageError as error:
            if self._owes_checkpoint:
                self._retry_secs = self._clock() + _RETRY_SECS
            return str(error)
        return ""

    def complete(self) -> None:
        """Removes the backups of a run whose last checkpoint is written.

        Raises:
            StorageError: they cannot be removed.
        """
        if self._backup:
            with files.storage_errors(self._backup.directory.path):
                self._backup.remove()
                if self._config.backup_dir:
                    files.remove_tree(_backup_root(self._config))

    def close(self) -> None:
        """Waits until all is written.

        Raises:
            StorageError: something was not.
        """
        with files.storage_errors(self._config.run_dir):
            self._writer.close()
