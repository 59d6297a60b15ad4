"""Runs dtrain.main and kills it, by a real SIGKILL, in a phase of a save.

    python -m tests.killed STEP PHASE <dtrain flags>

The first save at STEP or later is killed in PHASE: `metrics` (the step is
trained and nothing of it is saved), `written` (its data is written and has not
its name yet), `renamed` (its data has its name and its index has not),
`uncommitted` (all of it has, but the manifest) or `committed` (the older one is
not removed yet). Killing from outside can only aim at a time.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import Any
from unittest import mock

from dtrain import errors
from dtrain import main as dtrain_main
from dtrain.storage import startup

PHASES = ("metrics", "written", "renamed", "uncommitted", "committed")

# What is about to get its name, by phase.
_MOVED = {"written": "data-.*", "renamed": "index", "uncommitted": "json"}


def die() -> None:
    """Ends this process as the kernel ends one that has no say."""
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Arms the kill and runs dtrain."""
    kill_step, phase = int(sys.argv[1]), sys.argv[2]
    startup.import_tensorflow()
    from dtrain.checkpoint import tier
    from dtrain.record import metrics
    from dtrain.storage import files

    write = metrics.RunRecorder.write
    sweep = tier.Tier._sweep
    move = files.move

    def write_or_die(self: Any, first_step: int, *rest: Any) -> None:
        write(self, first_step, *rest)
        if phase == "metrics" and first_step >= kill_step:
            die()

    def sweep_or_die(self: Any, newest: Any) -> None:
        if phase == "committed" and newest.step >= kill_step:
            die()
        sweep(self, newest)

    def move_or_die(source: str, target: str) -> None:
        pattern = rf".*/ckpt-(\d+)\.{_MOVED.get(phase, 'never')}"
        match = re.fullmatch(pattern, target)
        if match and int(match[1]) >= kill_step and "/pending/" not in target:
            die()
        move(source, target)

    with (
        mock.patch.object(metrics.RunRecorder, "write", write_or_die),
        mock.patch.object(tier.Tier, "_sweep", sweep_or_die),
        mock.patch.object(files, "move", move_or_die),
    ):
        errors.exit_with(
            lambda: dtrain_main.run(["dtrain.main", *sys.argv[3:]])
        )


if __name__ == "__main__":
    main()
