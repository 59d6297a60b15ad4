"""Measures how long a run stands still when one of its workers is killed.

    python -m tests.benchmarks.restart [--num_kills=3] [--workers=1,2,4]
        [--seed=1] [--write] [-- flags of dtrain.main]

Each time a run is started in a new directory, and the time until its first step
is a cold start; then a random worker of it gets a SIGKILL, and the time until
the first step that was not done before is a recovery: with a warm spare and
without, in turns, so that all is measured on a machine in the same state. A
step counts when its metrics are in the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from tests.benchmarks import command, pages

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
    run_dir: pathlib.Path, num_workers: int, ours: str, theirs: list[str]
) -> Iterator[subprocess.Popen[str]]:
    with open(run_dir.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "launch.main", ours),
                *(f"--num_workers={num_workers}", "--", *runs.SMALL),
                f"--run_dir={run_dir}",
                "--num_steps=10000000",
                "--checkpoint_every_steps=0",
                "--backup_every_secs=0.5",
                *theirs,
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


def wait_for_spares(
    log: pathlib.Path, supervisor: int, num_workers: int
) -> list[int]:
    """Waits until all spares are warm; returns them."""
    end = time.monotonic() + _LIMIT_SECS
    while time.monotonic() < end:
        time.sleep(0.1)
        spares = children_of(supervisor)[num_workers:]
        if len(spares) == num_workers and "has a warm spare" in log.read_text():
            # One that is not warm yet imports, and is to disturb nobody.
            policies = {os.sched_getscheduler(spare) for spare in spares}
            if policies == {os.SCHED_OTHER}:
                return spares
    raise TimeoutError(f"{log}: no spares")


def memory_mib(pid: int) -> tuple[float, float]:
    """Returns what a process has in memory, and what of it is its alone."""
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = {
        name: int(rest.split()[0])
        for name, colon, rest in (
            line.partition(":") for line in text.splitlines()[1:]
        )
        if colon
    }
    return kib["Rss"] / 1024, kib["Anonymous"] / 1024


@dataclasses.dataclass(frozen=True)
class Times:
    """What one run took, in seconds, and a spare of it in MiB."""

    cold: float
    recovery: float
    memory: tuple[float, float] = (0.0, 0.0)


def measure(
    run_dir: pathlib.Path,
    num_workers: int,
    chance: random.Random,
    theirs: list[str],
    *,
    is_warm: bool,
) -> Times:
    """Measures a cold start and a recovery."""
    ours = "--warm_spare" if is_warm else "--nowarm_spare"
    memory = (0.0, 0.0)
    start = time.monotonic()
    with launched(run_dir, num_workers, ours, theirs) as process:
        wait_for_more(run_dir, 0)
        cold = time.monotonic() - start
        if is_warm:
            log = run_dir.with_suffix(".log")
            spares = wait_for_spares(log, process.pid, num_workers)
            memory = memory_mib(spares[0])
        # After a save, and before the next one is due.
        time.sleep(chance.uniform(2.0, 3.0))
        workers = children_of(process.pid)[:num_workers]
        start = time.monotonic()
        os.kill(chance.choice(workers), signal.SIGKILL)
        # The others may come a step further.
        while set(workers) & set(children_of(process.pid)):
            time.sleep(0.01)
        wait_for_more(run_dir, num_steps(run_dir))
        return Times(cold, time.monotonic() - start, memory)


def spread(secs: list[float]) -> str:
    return f"{statistics.median(secs):.2f} ({min(secs):.2f}-{max(secs):.2f})"


def row(num_workers: int, without: list[Times], warm: list[Times]) -> str:
    """Makes a line of the table."""
    cold = [times.cold for times in (*without, *warm)]
    base = statistics.median(cold)
    cells = [str(num_workers), str(len(without)), spread(cold)]
    for kind in (without, warm):
        secs = [times.recovery for times in kind]
        cells += [spread(secs), f"{statistics.median(secs) / base:.2f}"]
    total, own = warm[-1].memory
    cells.append(f"{total:.0f}, {own:.0f} of it its own")
    return f"| {' | '.join(cells)} |"


HEAD = """\
| workers | kills of each | cold start, s | recovery without a spare, s | of a \
cold start | recovery with a warm spare, s | of a cold start | memory of a \
spare, MiB |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Measures each number of workers and prints the table."""
    ours, theirs = sys.argv[1:], []
    if "--" in ours:
        end = ours.index("--")
        ours, theirs = ours[:end], ours[end + 1 :]
    is_written = "--write" in ours
    options = command.only_own_flags(
        ours, {"num_kills": 3, "seed": 1, "workers": (1, 2, 4)}
    )
    chance = random.Random(options["seed"])
    lines = [HEAD]
    for num_workers in options["workers"]:
        measured: dict[bool, list[Times]] = {False: [], True: []}
        with tempfile.TemporaryDirectory(prefix="restart-") as root:
            for number in range(options["num_kills"]):
                for is_warm, kind in measured.items():
                    run_dir = pathlib.Path(root) / f"{number}-{is_warm}"
                    kind.append(
                        measure(
                            run_dir,
                            num_workers,
                            chance,
                            theirs,
                            is_warm=is_warm,
                        )
                    )
                    print(f"    {is_warm=} {kind[-1]}", flush=True)
        lines.append(row(num_workers, measured[False], measured[True]))
    print("\n".join(lines))
    if is_written:
        pages.replace_table(runs.ROOT / "docs/speed.md", "restart", lines)


if __name__ == "__main__":
    main()
