"""Measures how long a run stands still when one of its workers is killed.

    python -m tests.benchmarks.restart [--num_kills=5] [--seed=0]

Each time a run is started in a new directory, and the time until its first step
is a cold start; then a random worker of it gets a SIGKILL, and the time until
the first step that was not done before is a recovery. One after the other, so
that both are measured on a machine in the same state. A step counts when its
metrics are in the file.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from tests import runs

_LIMIT_SECS = 300.0


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, in their order."""
    listed = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def num_steps(run_dir: pathlib.Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def wait_for_more(run_dir: pathlib.Path, steps: int) -> None:
    end = time.monotonic() + _LIMIT_SECS
    while num_steps(run_dir) <= steps:
        assert time.monotonic() < end, f"{run_dir}: no step after {steps}"
        time.sleep(0.01)


@contextlib.contextmanager
def launched(
    run_dir: pathlib.Path, num_workers: int
) -> Iterator[subprocess.Popen[str]]:
    with open(run_dir.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "launch.main"),
                *(f"--num_workers={num_workers}", "--", *runs.SMALL),
                f"--run_dir={run_dir}",
                "--num_steps=10000000",
                "--checkpoint_every_steps=0",
                "--backup_every_secs=0.5",
            ],
            cwd=runs.ROOT,
            env=runs.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(_LIMIT_SECS)


def measure(
    run_dir: pathlib.Path, num_workers: int, chance: random.Random
) -> tuple[float, float]:
    """Returns the seconds of a cold start and of a recovery."""
    start = time.monotonic()
    with launched(run_dir, num_workers) as process:
        wait_for_more(run_dir, 0)
        cold = time.monotonic() - start
        # After a save, and before the next one is due.
        time.sleep(chance.uniform(2.0, 3.0))
        workers = children_of(process.pid)
        start = time.monotonic()
        os.kill(chance.choice(workers), signal.SIGKILL)
        # The others may come a step further.
        while set(workers) & set(children_of(process.pid)):
            time.sleep(0.01)
        wait_for_more(run_dir, num_steps(run_dir))
        return cold, time.monotonic() - start


def main() -> None:
    """Measures one and two workers and prints the table."""
    options = {"num_kills": 5, "seed": 0}
    for argument in sys.argv[1:]:
        name, _, value = argument.removeprefix("--").partition("=")
        options[name] = int(value)
    chance = random.Random(options["seed"])
    print(
        "workers   kills   cold start   recovery   ratio   of the medians, s",
        flush=True,
    )
    for num_workers in (1, 2):
        pairs = []
        with tempfile.TemporaryDirectory(prefix="restart-") as root:
            for number in range(options["num_kills"]):
                run_dir = pathlib.Path(root) / str(number)
                pairs.append(measure(run_dir, num_workers, chance))
                print("    {:.1f} {:.1f}".format(*pairs[-1]), flush=True)
        cold, recovery = (
            statistics.median(column) for column in zip(*pairs, strict=True)
        )
        print(
            f"{num_workers:>7}{len(pairs):>8}{cold:>13.1f}{recovery:>11.1f}"
            f"{recovery / cold:>8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
