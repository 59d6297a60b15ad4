"""Starts real runs for the tests, small enough to take a second."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A generator and a discriminator of a few hundred weights on the digits.
SMALL = (
    "--batch_size=8",
    "--base_channels=2",
    "--latent_size=4",
    "--sample_every_steps=0",
    "--steps_per_loop=1",
)


def environment(**more: str) -> dict[str, str]:
    """Returns the variables of a process that finds the package."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def start(module: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """Starts `python -m module`; the caller waits for it."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(
    process: subprocess.Popen[str], timeout: float | None = 300
) -> tuple[int, str]:
    """Waits for a process; returns its exit code and what it printed."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def run(module: str, *arguments: str, **more: str) -> tuple[int, str]:
    """Runs `python -m module` to its end; see `finish`."""
    return finish(start(module, *arguments, **more))


def metrics(run_dir: pathlib.Path) -> list[dict[str, float]]:
    """Returns the lines of metrics.jsonl."""
    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
