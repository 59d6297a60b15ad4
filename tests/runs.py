"""Starts real runs for the tests, small enough to take a second."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import TypeAlias

from dtrain import errors
from tests import fork_server

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A generator and a discriminator of a few hundred weights on the digits.
SMALL = (
    "--batch_size=8",
    "--base_channels=2",
    "--latent_size=4",
    "--sample_every_steps=0",
    "--steps_per_loop=1",
)

# A process as tests see it.
Process: TypeAlias = "subprocess.Popen[str] | fork_server.Process"

# Programs that import TensorFlow before anything that a test looks at. Not
# their whole names: these would be deps of every test in the BUILD files.
_FORKED = {
    *(f"dtrain.{name}" for name in ("main", "sample")),
    *(f"tests.{name}" for name in ("fit_gan", "foreign", "killed", "released")),
    "tests.hostile_pictures",
}


def environment(**more: str) -> dict[str, str]:
    """Returns the variables of a process that finds the package."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def start(module: str, *arguments: str, **more: str) -> Process:
    """Starts `python -m module`; the caller waits for it.

    A program that imports TensorFlow is started by `fork_server` where that is
    the same thing.
    """
    variables = environment(**more)
    if not is_forked(module, variables):
        return start_anew(module, *arguments, **more)
    return fork_server.start(
        fork_server.Order(module, arguments, str(ROOT), variables)
    )


def is_forked(module: str, variables: dict[str, str]) -> bool:
    return (
        module in _FORKED
        # Coverage begins when Python starts.
        and not any(name.startswith("COVERAGE_") for name in variables)
        and variables.get("DTRAIN_FORK_SERVER") != "off"
        and fork_server.suits(variables)
    )


def start_anew(
    module: str, *arguments: str, **more: str
) -> subprocess.Popen[str]:
    """Starts `python -m module`, where the start is a part of the test."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: Process, timeout: float | None = 300) -> tuple[int, str]:
    """Waits for a process; returns its exit code and what it printed."""
    output, _ = process.communicate(timeout=timeout)
    # It has ended.
    return process.wait(), output


def run(module: str, *arguments: str, **more: str) -> tuple[int, str]:
    """Runs `python -m module` to its end; see `finish`."""
    return finish(start(module, *arguments, **more))


# What the fixture `whole` is: `whole(module, *flags)` returns the directory of
# a run that nothing has happened to, and that nobody may change.
Whole: TypeAlias = Callable[..., pathlib.Path]


def train_once(place: pathlib.Path, module: str, *flags: str) -> pathlib.Path:
    """Trains to the end, or returns the run that an earlier call has trained.

    Args:
        place: of all such runs; tests in other processes have the same.
        module: the program.
        flags: of the program, all but --run_dir.

    Returns:
        The directory of the run.
    """
    name = hashlib.sha256(json.dumps([module, *flags]).encode()).hexdigest()
    run_dir = place / name[:16] / "run"
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with (run_dir.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        finished = run_dir.parent / "finished"
        if not finished.exists():
            # It would go on from what a failure has left.
            shutil.rmtree(run_dir, ignore_errors=True)
            code, output = run(module, *flags, f"--run_dir={run_dir}")
            assert code == errors.FINISHED, output
            finished.touch()
    return run_dir


def metrics(run_dir: pathlib.Path) -> list[dict[str, float]]:
    """Returns the lines of metrics.jsonl."""
    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
