"""Saving and resuming, in two tiers.

`BackupAndRestore` keeps the newest state of a run that is not finished, for
crashes; `CheckpointManager` keeps the history. Both are TensorFlow's own
format, are written by the chief alone, and hold the same state, so a run goes
on from whichever is newer.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import tensorflow as tf

from dtrain import checkpoint_reader, retention
from dtrain.config import Config
from dtrain.errors import UserError

Clock = Callable[[], float]


class CheckpointManager:
    """The kept history: `directory/ckpt-<step>`.

    A `tf.train.CheckpointManager` writes each one in a directory beside it,
    from which it is renamed when it is whole; what stays is decided by
    `retention`, from the steps that are there.
    """

    def __init__(
        self,
        checkpoint: tf.train.Checkpoint,
        directory: str,
        *,
        max_to_keep: int,
        keep_every_n_steps: int = 0,
    ) -> None:
        """Opens the directory, which is made at the first save.

        Args:
            checkpoint: the state that is saved.
            directory: local, or any that `tf.io.gfile` writes.
            max_to_keep: newest checkpoints that stay.
            keep_every_n_steps: those at a multiple of it stay too; 0 is none.
        """
        self._checkpoint = checkpoint
        self._directory = directory
        self._max_to_keep = max_to_keep
        self._keep_every_n_steps = keep_every_n_steps

    def save(self, step: int) -> str:
        """Writes the state as of `step` and removes what is not kept.

        Args:
            step: the steps that are done.

        Returns:
            The prefix of the checkpoint.
        """
        # Apart, since TensorFlow opens the index under its last name and
        # fills it afterwards: a kill in between would leave an empty one.
        writing = f"{self._directory}/writing"
        self._remove(writing)
        # `save` adds one. A count of saves would differ between a run that
        # was killed and one that was not; the step does not.
        self._checkpoint.save_counter.assign(step - 1)
        tf.train.CheckpointManager(
            self._checkpoint, writing, max_to_keep=1
        ).save(checkpoint_number=step)
        # The data before the index, which makes it a checkpoint.
        for name in self._files(writing, step):
            tf.io.gfile.rename(
                f"{writing}/{name}", f"{self._directory}/{name}", overwrite=True
            )
        self._remove(writing)
        self._sweep()
        return f"{self._directory}/ckpt-{step}"

    @staticmethod
    def _files(directory: str, step: int) -> list[str]:
        names = tf.io.gfile.listdir(directory)
        return sorted(
            name for name in names if name.startswith(f"ckpt-{step}.")
        )

    @staticmethod
    def _remove(directory: str) -> None:
        if tf.io.gfile.exists(directory):
            tf.io.gfile.rmtree(directory)

    def _sweep(self) -> None:
        present = checkpoint_reader.steps(self._directory)
        stay = retention.kept(
            present, self._max_to_keep, self._keep_every_n_steps
        )
        for step in set(present) - stay:
            # The index first: without it the rest is no checkpoint.
            for name in reversed(self._files(self._directory, step)):
                tf.io.gfile.remove(f"{self._directory}/{name}")
        self._record([f"ckpt-{step}" for step in sorted(stay)])

    def _record(self, names: list[str]) -> None:
        """Writes the pointer file that stock TensorFlow looks for.

        The names in it are relative, so that a run may be moved.
        """
        state = tf.compat.v1.train.generate_checkpoint_state_proto(
            # Names would be taken as relative to the working directory, were
            # this one relative, too.
            "/",
            names[-1],
            all_model_checkpoint_paths=names,
            # Without them a stock manager would keep all of these for ever.
            all_model_checkpoint_timestamps=[
                tf.io.gfile.stat(f"{self._directory}/{name}.index").mtime_nsec
                / 1e9
                for name in names
            ],
        )
        temporary = f"{self._directory}/checkpoint.tmp"
        with tf.io.gfile.GFile(temporary, "w") as file:
            file.write(str(state))
        tf.io.gfile.rename(
            temporary, f"{self._directory}/checkpoint", overwrite=True
        )


class BackupAndRestore:
    """The newest state of a run that is not finished, in two generations.

    The older one is removed when the newer one is whole, so a kill at any
    moment leaves one that can be read.
    """

    def __init__(self, checkpoint: tf.train.Checkpoint, directory: str) -> None:
        """Opens the directory, which is made at the first save.

        Args:
            checkpoint: the state that is saved.
            directory: local, or any that `tf.io.gfile` writes.
        """
        self._directory = directory
        self._manager = CheckpointManager(checkpoint, directory, max_to_keep=2)

    def save(self, step: int) -> str:
        """Writes the state as of `step`; returns the prefix."""
        return self._manager.save(step)

    def remove(self) -> None:
        """Removes the backups: the run is finished, or went on elsewhere."""
        if tf.io.gfile.exists(self._directory):
            tf.io.gfile.rmtree(self._directory)


def _found(config: Config) -> dict[int, str]:
    """Lists what both tiers of a run hold: prefix by step."""
    return {
        **checkpoint_reader.steps(f"{config.run_dir}/backup"),
        **checkpoint_reader.steps(f"{config.run_dir}/checkpoints"),
    }


def restore_step(
    checkpoint: tf.train.Checkpoint, config: Config, step: int = -1
) -> str:
    """Restores one state of a run.

    Args:
        checkpoint: what is restored into.
        config: the run's settings.
        step: which; -1 is the newest.

    Returns:
        The prefix that was restored.

    Raises:
        UserError: there is none, or it does not fit the networks.
    """
    found = _found(config)
    if not found or (step >= 0 and step not in found):
        there = ", ".join(map(str, sorted(found))) or "none"
        wanted = "" if step < 0 else f" of step {step}"
        raise UserError(
            f"{config.run_dir} holds no checkpoint{wanted}; there: {there}"
        )
    prefix = found[step if step >= 0 else max(found)]
    try:
        checkpoint.restore(prefix).assert_consumed()
    except (AssertionError, *checkpoint_reader.DAMAGED) as error:
        mistake = _explain(error, prefix, config)
        raise mistake from error
    return prefix


def _explain(error: Exception, prefix: str, config: Config) -> UserError:
    """Tells a damaged checkpoint from one of other networks."""
    # Or TensorFlow adds, at exit, a line for each value that has no place.
    tf.get_logger().setLevel("ERROR")
    try:
        checkpoint_reader.digest(prefix)
    except UserError as damage:
        return UserError(
            f"{damage}; remove {prefix}.* to go on from an older one"
        )
    first = str(error).strip().splitlines()[0]
    # Without the graph of objects that TensorFlow begins to show.
    first = first.removesuffix(": attributes {").rstrip(".:")
    return UserError(
        f"{prefix} does not fit the networks of --model={config.model}: "
        f"{first}; make the model as it was, or name another run_dir"
    )


class Checkpointer:
    """Decides when each tier saves, and where a run goes on.

    The chief decides and writes; for the other workers every method does
    nothing but `restore`.
    """

    def __init__(
        self,
        checkpoint: tf.train.Checkpoint,
        config: Config,
        *,
        is_chief: bool,
        clock: Clock = time.monotonic,
    ) -> None:
        """Opens both tiers of the run.

        Args:
            checkpoint: the state of the GAN.
            config: the run's settings.
            is_chief: whether this worker writes.
            clock: returns seconds; the default never goes back.
        """
        self._checkpoint = checkpoint
        self._config = config
        self._is_chief = is_chief
        self._clock = clock
        self._checkpoint_secs = self._backup_secs = clock()
        self._saved_step = 0
        self._directory = f"{config.run_dir}/checkpoints"
        self._manager = CheckpointManager(
            checkpoint,
            self._directory,
            max_to_keep=config.max_to_keep,
            keep_every_n_steps=config.keep_every_n_steps,
        )
        self._backup = BackupAndRestore(checkpoint, f"{config.run_dir}/backup")

    def restore(self) -> str | None:
        """Restores the newest state of the run. Every worker calls this.

        Returns:
            The prefix that was restored; None for a run that starts.

        Raises:
            UserError: there is one and `resume` is never, there is none and
                it is must, or it does not fit the networks.
        """
        found = _found(self._config)
        resume, run_dir = self._config.resume, self._config.run_dir
        if not found and resume == "must":
            raise UserError(
                f"resume (must): {run_dir} holds no checkpoint to go on from; "
                "use --resume=auto"
            )
        if not found:
            return None
        if resume == "never":
            raise UserError(
                f"resume (never): {run_dir} holds checkpoints up to step "
                f"{max(found)}; name another run_dir, or use --resume=auto"
            )
        self._saved_step = max(found)
        return restore_step(self._checkpoint, self._config)

    def due(self, step: int) -> bool:
        """Tells whether this worker wants to save at `step`."""
        return self._checkpoint_due(step) or self._backup_due(step)

    def _checkpoint_due(self, step: int) -> bool:
        config = self._config
        if not self._is_chief or step == self._saved_step:
            return False
        if (
            config.checkpoint_every_steps
            and not step % config.checkpoint_every_steps
        ):
            return True
        waited = self._clock() - self._checkpoint_secs
        return 0 < config.checkpoint_every_secs <= waited

    def _backup_due(self, step: int) -> bool:
        if not self._is_chief or step == self._saved_step:
            return False
        waited = self._clock() - self._backup_secs
        return 0 < self._config.backup_every_secs <= waited

    def maybe_save(self, step: int) -> str | None:
        """Saves the tier that is due at `step`; returns its prefix."""
        if self._checkpoint_due(step):
            return self.save(step)
        if self._backup_due(step):
            prefix = self._backup.save(step)
            self._saved_step = step
            self._backup_secs = self._clock()
            return prefix
        return None

    def save(self, step: int) -> str | None:
        """Writes a checkpoint, unless there is one of `step` already."""
        prefix = f"{self._directory}/ckpt-{step}"
        if not self._is_chief:
            return None
        if not tf.io.gfile.exists(f"{prefix}.index"):
            self._manager.save(step)
        self._saved_step = step
        # A checkpoint serves as a backup too.
        self._checkpoint_secs = self._backup_secs = self._clock()
        return prefix

    def complete(self) -> None:
        """Removes the backups of a run whose last checkpoint is written."""
        if self._is_chief:
            self._backup.remove()
