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
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from dtrain.checkpoint import arguments, going_on, retention, takeover
from dtrain.checkpoint.background import Writer
from dtrain.checkpoint.snapshot import LiveTaker
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
        directory: str | os.PathLike[str],
        policies: Sequence[retention.Policy] = (retention.Last(3),),
        *,
        verify: str = "full",
        run: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the directory, which is made at the first save.

        Args:
            checkpoint: the state that is saved, with or without a root; its
                variables exist. What is attached to it later is in the next
                save. What TensorFlow does not find in a model, such as seeds,
                vocabularies and layers in a list, is added to it as
                `untracked`.
            directory: local, or any that `tf.io.gfile` writes.
            policies: what stays is what any of them keeps, and the newest.
            verify: full or sizes; how a checkpoint is checked before it is
                restored, or an older one removed.
            run: written into each manifest.

        Raises:
            UserError: the state cannot be saved while training goes on, or
                a model or an optimizer in it is not built yet; or another
                argument has no such value.
        """
        path = arguments.path("directory", directory, "checkpoints")
        policies = arguments.policies(policies)
        verify = arguments.choice("verify", verify, ("full", "sizes"))
        if not isinstance(checkpoint, tf.train.Checkpoint):
            raise UserError(
                f"checkpoint (a {type(checkpoint).__name__}) must be a "
                "tf.train.Checkpoint; try tf.train.Checkpoint(model=model)"
            )
        self._checkpoint = checkpoint
        self._taker = LiveTaker(checkpoint)
        self._writer = Writer()
        self._tier = Tier(path, policies, verify=verify, run=run)
        self._verify = verify
        self.directory = self._tier.directory
        # Step of what was restored, if there were newer ones beside it.
        self._went_back_to: int | None = None
        # Of what was saved or restored last; None before either.
        self._newest_step: int | None = None
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
        of this run any more. What `tf.train.CheckpointManager` or
        `tf.train.Checkpoint.save` has saved there is taken over.

        Args:
            step: which, a whole number; None is the newest that verifies.

        Returns:
            The steps that were done.

        Raises:
            UserError: there is none, none verifies, or it does not fit.
            StorageError: the disk or the store failed.
        """
        _refuse_tracing("restore")
        wanted = None if step is None else arguments.step(step)
        self._taker.update()
        with files.storage_errors(self.directory.path):
            self._writer.drain()
            is_own = self._is_own()
            if is_own:
                self.directory.clean()
                for note in takeover.take_over(self.directory):
                    warnings.warn(note, stacklevel=2)
            steps = self.directory.steps()
            # What is asked for by its step stays where it is.
            place = going_on.Place(
                self.directory, is_mine=is_own and wanted is None
            )
            verified, notes = going_on.restore_chosen(
                [place],
                self.directory.path,
                self._verify,
                self._checkpoint,
                wanted,
            )
        for note in notes:
            warnings.warn(note, stacklevel=2)
        restored = verified.manifest.step
        is_newest = not any(newer > restored for newer in steps)
        self._went_back_to = None if is_newest else restored
        self._newest_step = restored
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
            UserError: something was saved, and none of it verifies or fits; or
                `initialize` is no function.
            StorageError: the disk or the store failed.
        """
        arguments.function("initialize", initialize)
        with files.storage_errors(self.directory.path):
            self._writer.drain()
            is_empty = not (
                self.directory.candidates()
                or self.directory.quarantined()
                or takeover.found(self.directory)
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
            step: the steps that are done: a whole number, also one of NumPy's
                or a scalar tensor or variable, not below the newest.
            facts: saved with it.
            wait: whether to return only when it is on the disk.

        Raises:
            UserError: another process saves there, the directory is not the
                one any more that this one saved to, it is no such step, what
                has been attached to the state cannot be saved, or this is
                within a `tf.function`.
            StorageError: this save (with `wait`) or an earlier one failed.
        """
        _refuse_tracing("save")
        if self._writer.is_closed:
            raise UserError("save: this manager is closed; make another one")
        step = arguments.step(step)
        own = self._own()
        self._refuse_earlier(step)
        snapshot = self._taker.take(step)
        facts = arguments.facts(facts)
        write_snapshot = self._tier.writing(step, snapshot, facts)
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
            self._newest_step = step
            if wait:
                self._writer.drain()

    def _refuse_earlier(self, step: int) -> None:
        """Refuses a step below the newest: policies would remove it at once.

        Raises:
            UserError: it is.
            StorageError: the directory cannot be listed.
        """
        if self._newest_step is None:
            with files.storage_errors(self.directory.path):
                self._newest_step = max(self.directory.steps(), default=0)
        if step < self._newest_step:
            raise UserError(
                f"step ({step}) must be at least {self._newest_step}, the "
                f"newest in {self.directory.path}; go on from there by "
                "restore_or_initialize(), go back by restore(step), or name "
                "another directory to start over"
            )

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


def _refuse_tracing(call: str) -> None:
    """Refuses what would be done once, and not in each call of a function.

    Raises:
        UserError: this is within a `tf.function`.
    """
    if not tf.executing_eagerly():
        raise UserError(
            f"{call}() within a tf.function is called when that is traced, and "
            "not when it runs; call it outside"
        )
