"""Saving, in two tiers, while training goes on.

`BackupAndRestore` keeps the newest state of a run that is not finished, for
crashes; `CheckpointManager` keeps the history. Both take a snapshot between
two steps and write it on another thread, in TensorFlow's own format, so a run
goes on from whichever is newer. When they save is told in `checkpointer`, and
how a run comes back in `recovery`.

A loop of your own needs `CheckpointManager` alone:

    state = tf.train.Checkpoint(generator=generator, optimizer=optimizer, ...)
    with CheckpointManager(state, "checkpoints") as manager:
        for step in range(manager.restore_or_initialize(), num_steps):
            train(step)
            if (step + 1) % 1000 == 0:
                manager.save(step + 1)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from dtrain.bundle import objects, restore
from dtrain.checkpoint import going_on, pins, retention
from dtrain.checkpoint.background import Writer
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.checkpoint.snapshot import Plan, Snapshot
from dtrain.errors import UserError
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


class CheckpointManager:
    """The kept history: `directory/ckpt-<step>`.

    The work of `tf.train.CheckpointManager`, in its format, on another thread,
    and such that a kill leaves no half of anything. One worker calls it: the
    chief. As a context it closes itself.
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
            checkpoint: the state that is saved; its variables exist. What
                models hold and TensorFlow does not reach, seeds and layers in
                a list, is added to it as `untracked`.
            directory: local, or any that `tf.io.gfile` writes.
            policies: what stays is what any of them keeps, and the newest.
            verify: full or sizes; how the newest is checked before an older
                one is removed.
            run: written into each manifest.
            plan: of `checkpoint`, if there is one already.
            writer: where it is written, if there is one already.

        Raises:
            UserError: the state cannot be saved while training goes on, or
                a part of it is not there yet.
        """
        if plan is None:
            _refuse_unbuilt(checkpoint)
            _include_untracked(checkpoint)
        self._checkpoint = checkpoint
        self.directory = CheckpointDirectory(directory)
        self._plan = plan or Plan(checkpoint)
        self._writer = writer or Writer()
        self._policies = tuple(policies)
        self._verify = verify
        self._run = run or {}
        # What is in the directory, by its step.
        self._saved: dict[int, retention.Saved] = {}
        # What was restored, and had newer ones beside it.
        self._went_back_to: int | None = None

    def __enter__(self) -> CheckpointManager:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it, so that what was saved before an error is kept."""
        self.close()

    def steps(self) -> list[int]:
        """Lists the steps of which there is a checkpoint, oldest first."""
        with files.storage_errors(self.directory.path):
            self._writer.drain()
            return self.directory.steps()

    def restore(self, step: int | None = None) -> int:
        """Restores a state, or raises and changes no variable.

        Of the newest, what does not verify is moved to `quarantine/`, and the
        next older one is taken. After going back to an earlier one, the newer
        ones are moved there too, when the next state is saved: the run has
        another future then.

        Args:
            step: which; None is the newest that verifies.

        Returns:
            The steps that were done.

        Raises:
            UserError: there is none, none verifies, or it does not fit.
            StorageError: the disk or the store failed.
        """
        path = self.directory.path
        there = self.steps()
        with files.storage_errors(path):
            self.directory.clean()
            found = self._find(step)
            if found is None:
                listed = ", ".join(map(str, there)) or "none"
                of_step = "" if step is None else f" of step {step}"
                raise UserError(
                    f"{path} holds no checkpoint{of_step} that can be used; "
                    f"there: {listed}"
                )
            with self.directory.reading(found.step) as prefix:
                restore.restore(
                    self._checkpoint, prefix, self.directory.prefix(found.step)
                )
        is_newest = not any(each > found.step for each in there)
        self._went_back_to = None if is_newest else found.step
        return found.step

    def restore_or_initialize(
        self, initialize: Callable[[], object] = lambda: None
    ) -> int:
        """Goes on from the newest state, or starts.

        Args:
            initialize: called where nothing was saved yet; it may load other
                weights.

        Returns:
            The steps that were done, 0 for a start.

        Raises:
            UserError: something was saved, and none of it verifies or fits.
            StorageError: the disk or the store failed.
        """
        with files.storage_errors(self.directory.path):
            is_empty = not (
                self.directory.candidates() or self.directory.quarantined()
            )
        if is_empty:
            initialize()
            return 0
        return self.restore()

    def _find(self, step: int | None) -> Manifest | None:
        """Looks for what is to be restored.

        Raises:
            UserError: the one that is asked for is damaged.
        """
        if step is None:
            place = going_on.Place(self.directory, is_mine=True)
            seen = going_on.search([place], self._verify)
            for note in seen.notes:
                warnings.warn(note, stacklevel=3)
            return seen.found.manifest if seen.found else None
        if step not in self.directory.steps():
            return None
        try:
            return self.directory.verify(step, self._verify)
        except DamagedError as error:
            raise UserError(
                f"{self.directory.prefix(step)} is damaged: {error}; restore "
                "another one"
            ) from error

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

        went_back_to, self._went_back_to = self._went_back_to, None

        def write() -> None:
            if went_back_to is not None:
                self._put_aside(went_back_to)
            try:
                self._before(facts)
            finally:
                # Without its log a state is of use, and may be all there is.
                made = self.directory.commit(step, snapshot, fields)
                self._sweep(made)

        return write

    def _put_aside(self, step: int) -> None:
        """Puts aside what comes after a step that was gone back to."""
        for each in self.directory.steps():
            if each > step:
                self.directory.quarantine(each, f"went back to step {step}")
                self._saved.pop(each, None)

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
        """
        # One by one: half of one that a kill leaves would look damaged.
        for step in self.directory.steps():
            self.directory.remove(step)
        files.remove_tree(self.directory.path)


def _refuse_unbuilt(checkpoint: tf.train.Checkpoint) -> None:
    """Refuses a state of which a part is not there yet.

    Raises:
        UserError: names the part.
    """
    for name, each in _objects(checkpoint):
        if isinstance(each, keras.Optimizer) and not each.built:
            raise UserError(
                f"{name} is an optimizer that is not built: it has no state "
                f"yet; call {name}.build(model.trainable_variables) before"
            )
        if (
            isinstance(each, keras.Model)
            and not each.built
            and not each.variables
        ):
            raise UserError(
                f"{name} is a model that is not built: it has no variables "
                "yet; call it once, or give it an Input"
            )


def _include_untracked(checkpoint: tf.train.Checkpoint) -> None:
    """Adds, as `untracked`, what the state would go on without."""
    parts = dict(tf.train.TrackableView(checkpoint).children(checkpoint))
    # Made by TensorFlow, which makes another for another Checkpoint.
    parts.pop("save_counter", None)
    untracked = objects.untracked_variables(parts)
    if untracked:
        checkpoint.untracked = tf.train.Checkpoint(**untracked)


def _objects(checkpoint: tf.train.Checkpoint) -> Iterator[tuple[str, Any]]:
    """Yields all objects of a state, each with the way that leads to it."""
    view = tf.train.TrackableView(checkpoint)
    queue, seen = [("", checkpoint)], {id(checkpoint)}
    while queue:
        above, owner = queue.pop(0)
        for edge, each in view.children(owner).items():
            if id(each) not in seen:
                seen.add(id(each))
                name = f"{above}.{edge}" if above else edge
                yield name, each
                queue.append((name, each))
