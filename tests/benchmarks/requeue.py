"""Measures how long a run stands still when Slurm takes its node away.

    python -m tests.benchmarks.requeue [--rounds=3] [--write]

On a real Slurm of two nodes on this machine (`tests/slurm_cluster.py`, which
needs root and Slurm; without them nothing is measured): a run is submitted by
`launch.main`, the time until its first step is a cold start; then a job of a
higher partition takes its node, and the time until the first step that was not
done before is taken apart: until the run has saved and left, until Slurm starts
it again, and until that step. `--write` puts the table into docs/speed.md.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests import runs, slurm_cluster
from tests.benchmarks import command
from tests.benchmarks.pages import replace_table
from tests.benchmarks.restart import num_steps, wait_for_more
from tests.slurm_cluster import SlurmCluster

_FLAGS = (
    *(*runs.SMALL, "--num_steps=10000000", "--checkpoint_every_steps=0"),
    "--backup_every_secs=0.5",
)
_HEAD = (
    "| workers | rounds | cold start, s | saved and left, s | in Slurm's "
    "queue, s | until a new step, s | all, s |",
    "|---|---|---|---|---|---|---|",
)
_LIMIT_SECS = 300.0


class Times(NamedTuple):
    """What one run took, in seconds."""

    cold: float
    left: float
    queued: float
    started: float


def until(is_done: Callable[[], bool]) -> float:
    """Waits for something; returns the seconds that it took."""
    start = time.monotonic()
    while not is_done():
        assert time.monotonic() < start + _LIMIT_SECS
        time.sleep(0.05)
    return time.monotonic() - start


def measure(
    slurm: SlurmCluster, run_dir: pathlib.Path, num_workers: int
) -> Times:
    """Measures a cold start and a requeue."""

    def state() -> str:
        return slurm.job(job)["JobState"]

    start = time.monotonic()
    submitted = slurm.run(
        [
            *(sys.executable, "-m", "launch.main", "--backend=slurm"),
            *(f"--num_nodes={num_workers}", "--sbatch_arg=--exclusive", "--"),
            *(*_FLAGS, f"--run_dir={run_dir}"),
        ],
        environment=runs.environment(),
        cwd=runs.ROOT,
    ).stdout
    job = submitted.partition("as job ")[2].partition(";")[0]
    wait_for_more(run_dir, 0)
    cold = time.monotonic() - start
    time.sleep(2.0)
    high = slurm.submit(
        "true", f"-N{num_workers + 1}", "--exclusive", "--partition=high"
    )
    left = until(lambda: state() not in ("RUNNING", "COMPLETING"))
    slurm.wait(high, ["COMPLETED", "COMPLETING"])
    done = num_steps(run_dir)
    queued = until(lambda: state() == "RUNNING")
    start = time.monotonic()
    wait_for_more(run_dir, done)
    started = time.monotonic() - start
    slurm.run(["scancel", "--signal=KILL", job])
    until(lambda: not slurm.run(["squeue", "-h"]).stdout)
    return Times(cold, left, queued, started)


def row(num_workers: int, times: list[Times]) -> str:
    """Makes a row of the table, of medians."""
    columns = [[*each, sum(each[1:])] for each in times]
    cells = [
        f"{statistics.median(column):.1f}"
        for column in zip(*columns, strict=True)
    ]
    return f"| {num_workers} | {len(times)} | {' | '.join(cells)} |"


def main() -> None:
    """Measures one and two workers and prints the table."""
    is_written = "--write" in sys.argv
    rounds = command.only_own_flags(sys.argv[1:], {"rounds": 3})["rounds"]
    try:
        slurm_cluster.check()
    except (pytest.skip.Exception, pytest.fail.Exception) as absent:
        print(f"not measured: {absent}")
        return
    lines = list(_HEAD)
    for num_workers in (1, 2):
        with (
            tempfile.TemporaryDirectory(prefix="requeue-") as place,
            SlurmCluster(
                pathlib.Path(place) / "slurm", num_nodes=num_workers + 1
            ) as slurm,
        ):
            times = [
                measure(slurm, pathlib.Path(place) / f"{number}", num_workers)
                for number in range(rounds)
            ]
        lines.append(row(num_workers, times))
    print("\n".join(lines), flush=True)
    if is_written:
        replace_table(runs.ROOT / "docs/speed.md", "requeue", lines)


if __name__ == "__main__":
    main()
