"""Runs dtrain.main and kills it, by a real SIGKILL, at an exact step.

    python -m tests.killed STEP PHASE <dtrain flags>

PHASE is `metrics` (the step is trained and nothing of it is saved), `written`
(its backup is written and has not its name yet), `renamed` (its data has its
name and its index has not) or `backup` (it has its name, and the older one is
not removed yet). Killing from outside can only aim at a time.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any
from unittest import mock

from dtrain import errors, startup
from dtrain import main as dtrain_main


def die() -> None:
    """Ends this process as the kernel ends one that has no say."""
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Arms the kill and runs dtrain."""
    kill_step, phase = int(sys.argv[1]), sys.argv[2]
    startup.import_tensorflow()
    import tensorflow as tf

    from dtrain import checkpoint, metrics

    write = metrics.Recorder.write
    sweep = checkpoint.CheckpointManager._sweep
    rename = tf.io.gfile.rename

    def write_or_die(self: Any, first_step: int, *rest: Any) -> None:
        write(self, first_step, *rest)
        if phase == "metrics" and first_step >= kill_step:
            die()

    def sweep_or_die(self: Any) -> None:
        if (
            phase == "backup"
            and int(self._checkpoint.step.numpy()) >= kill_step
        ):
            die()
        sweep(self)

    def rename_or_die(old: str, new: str, overwrite: bool = False) -> None:
        name = new.rpartition("/")[2]
        if phase == "written" and name.startswith(f"ckpt-{kill_step}.data"):
            die()
        if phase == "renamed" and name == f"ckpt-{kill_step}.index":
            die()
        rename(old, new, overwrite=overwrite)

    with (
        mock.patch.object(metrics.Recorder, "write", write_or_die),
        mock.patch.object(checkpoint.CheckpointManager, "_sweep", sweep_or_die),
        mock.patch.object(tf.io.gfile, "rename", rename_or_die),
    ):
        errors.exit_with(
            lambda: dtrain_main.run(["dtrain.main", *sys.argv[3:]])
        )


if __name__ == "__main__":
    main()
