"""Saving in a training loop of one's own.

The manager saves on another thread, and waits for it when it is closed:

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
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from dtrain.bundle import objects
from dtrain.checkpoint import going_on, retention
from dtrain.checkpoint.background import Writer
from dtrain.checkpoint.snapshot import SnapshotTaker
from dtrain.checkpoint.tier import Facts, Tier
from dtrain.errors import UserError
from dtrain.storage import claim, files


class CheckpointManager:
    """The kept history: `directory/ckpt-<step>`.

    It does what `tf.train.CheckpointManager` does, in the same format, on
    another thread; a kill leaves no checkpoint half written. The chief alone
    calls it. From its first save until it is closed, no other process can save
    there; any may restore. As a context manager it closes itself.
    """

    def __init__(
        self,
        checkpoint: tf.train.Checkpoint,
        directory: str,
        policies: Sequence[retention.Policy] = (retention.Last(3),),
        *,
        verify: str = "full",
        run: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the directory, which is made at the first save.

        Args:
            checkpoint: the state that is saved; its variables exist. What
                TensorFlow does not find in a model, such as seeds and layers
                in a list, is added to it as `untracked`.
            directory: local, or any that `tf.io.gfile` writes.
            policies: what stays is what any of them keeps, and the newest.
            verify: full or sizes; how a checkpoint is checked before it is
                restored, or an older one removed.
            run: written into each manifest.

        Raises:
            UserError: the state cannot be saved while training goes on, or
                a model or an optimizer in it is not built yet.
        """
        _refuse_unbuilt(checkpoint)
        _include_untracked(checkpoint)
        self._checkpoint = checkpoint
        self._taker = SnapshotTaker(checkpoint)
        self._writer = Writer()
        self._tier = Tier(directory, policies, verify=verify, run=run)
        self._verify = verify
        self.directory = self._tier.directory
        # Step of what was restored, if there were newer ones beside it.
        self._went_back_to: int | None = None
        self._claim: claim.Claim | None = None
        # A manager that nobody refers to any more holds nothing.
        self._stack = contextlib.ExitStack()
        self._release = weakref.finalize(self, self._stack.close)

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

        Without a step, newer ones that do not verify are moved to
        `quarantine/`, unless another process saves there. With one, the newer
        ones are moved there when the next state is saved, for they are no part
        of this run any more.

        Args:
            step: which; None is the newest that verifies.

        Returns:
            The steps that were done.

        Raises:
            UserError: there is none, none verifies, or it does not fit.
            StorageError: the disk or the store failed.
        """
        steps = self.steps()
        with files.storage_errors(self.directory.path):
            is_own = self._is_own()
            if is_own:
                self.directory.clean()
            # What is asked for by its step stays where it is.
            place = going_on.Place(
                self.directory, is_mine=is_own and step is None
            )
            verified, notes = going_on.restore_chosen(
                [place],
                self.directory.path,
                self._verify,
                self._checkpoint,
                step,
            )
        for note in notes:
            warnings.warn(note, stacklevel=2)
        restored = verified.manifest.step
        is_newest = not any(newer > restored for newer in steps)
        self._went_back_to = None if is_newest else restored
        return restored

    def restore_or_initialize(
        self, initialize: Callable[[], object] = lambda: None
    ) -> int:
        """Restores the newest state, or initializes a new one.

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

    def save(
        self, step: int, facts: Facts | None = None, *, wait: bool = False
    ) -> None:
        """Saves the state as of now.

        Args:
            step: the steps that are done.
            facts: saved with it.
            wait: whether to return only when it is on the disk.

        Raises:
            UserError: another process saves there, or the directory is not the
                one any more that this one saved to.
            StorageError: this save (with `wait`) or an earlier one failed.
        """
        own = self._own()
        snapshot = self._taker.take(step)
        write_snapshot = self._tier.writing(step, snapshot, facts or Facts())
        went_back_to, self._went_back_to = self._went_back_to, None

        def write() -> None:
            own.raise_if_lost()
            if went_back_to is not None:
                reason = f"went back to step {went_back_to}"
                going_on.put_aside_after(self.directory, went_back_to, reason)
                self._tier.forget_after(went_back_to)
            write_snapshot()

        with files.storage_errors(self.directory.path):
            self._writer.raise_if_failed()
            self._writer.submit(write, keep=True)
            if wait:
                self._writer.drain()

    def _own(self) -> claim.Claim:
        """Keeps other processes from saving there, from the first call on.

        Raises:
            UserError: another process saves there.
            StorageError: the store does not answer.
        """
        if self._claim is None:
            self._claim = self._stack.enter_context(
                claim.claim(self.directory.path, name="directory")
            )
        return self._claim

    def _is_own(self) -> bool:
        """Tells whether this process alone may change the directory."""
        if not files.exists(self.directory.path):
            return True
        try:
            self._own()
        except UserError:
            return False
        return True

    def close(self) -> None:
        """Waits until all is written, and lets others save there.

        Raises:
            StorageError: something was not written.
        """
        with files.storage_errors(self.directory.path):
            try:
                self._writer.close()
            finally:
                self._claim = None
                self._stack.close()


def _refuse_unbuilt(checkpoint: tf.train.Checkpoint) -> None:
    """Refuses a state with a part that has no variables yet.

    Raises:
        UserError: names the part.
    """
    for name, part in _objects(checkpoint):
        if isinstance(part, keras.Optimizer) and not part.built:
            raise UserError(
                f"{name} is an optimizer that is not built: it has no state "
                f"yet; call {name}.build(model.trainable_variables) before"
            )
        is_model = isinstance(part, keras.Model)
        if is_model and not part.built and not part.variables:
            raise UserError(
                f"{name} is a model that is not built: it has no variables "
                "yet; call it once, or give it an Input"
            )


def _include_untracked(checkpoint: tf.train.Checkpoint) -> None:
    """Adds, as `untracked`, the variables that TensorFlow would not save."""
    parts = dict(tf.train.TrackableView(checkpoint).children(checkpoint))
    # Made by TensorFlow, which makes another for another Checkpoint.
    parts.pop("save_counter", None)
    untracked = objects.untracked_variables(parts)
    if untracked:
        checkpoint.untracked = tf.train.Checkpoint(**untracked)


def _objects(checkpoint: tf.train.Checkpoint) -> Iterator[tuple[str, Any]]:
    """Yields all objects of a state, each with its path of attributes."""
    view = tf.train.TrackableView(checkpoint)
    queue, seen = [("", checkpoint)], {id(checkpoint)}
    while queue:
        above, owner = queue.pop(0)
        for edge, child in view.children(owner).items():
            if id(child) not in seen:
                seen.add(id(child))
                name = f"{above}.{edge}" if above else edge
                yield name, child
                queue.append((name, child))
