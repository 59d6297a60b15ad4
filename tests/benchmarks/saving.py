"""Measures what saving costs a run.

    python -m tests.benchmarks.saving [--rounds=3] [--num_steps=3000]

The default run, in processes that take turns: one backs up every second, one
never. What a backup costs is the difference, divided by their number; the last
column is what that makes of a run that backs up every 30 s.
"""

from __future__ import annotations

import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from tests.benchmarks import command

_USUAL_SECS = 30.0


def turn(backup_every_secs: float, num_steps: int) -> float:
    """Runs dtrain; returns the seconds between its first step and its end."""
    with tempfile.TemporaryDirectory(dir=".") as directory:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "dtrain.main",
                f"--run_dir={directory}/run",
                f"--num_steps={num_steps}",
                "--sample_every_steps=0",
                "--checkpoint_every_steps=0",
                f"--backup_every_secs={backup_every_secs}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = pathlib.Path(directory) / "run/metrics.jsonl"
        while not metrics.exists() or not metrics.stat().st_size:
            if process.poll() is not None:
                raise SystemExit(f"dtrain.main exited with {process.poll()}")
            time.sleep(0.01)
        start = time.perf_counter()
        assert process.wait() == 0
        return time.perf_counter() - start


def main() -> None:
    """Measures and prints the table."""
    own = command.only_own_flags(sys.argv[1:], {"rounds": 3, "num_steps": 3000})
    num_steps = own["num_steps"]
    print("every second   never   (seconds)   a backup   every 30 s")
    shares = []
    for _ in range(own["rounds"]):
        often, never = turn(1.0, num_steps), turn(0.0, num_steps)
        # The clock is looked at between two loops.
        cost = (often - never) / often
        shares.append(cost / _USUAL_SECS)
        print(
            f"{often:>12.1f}  {never:>6.1f}  {1e3 * cost:>18.0f} ms"
            f"  {shares[-1]:>10.2%}",
            flush=True,
        )
    print(f"median {statistics.median(shares):.2%} of the time")


if __name__ == "__main__":
    main()
