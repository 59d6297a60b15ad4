"""Shows that nothing grows with the length of a run, but its logs.

    python -m tests.benchmarks.growth [--write] [--steps=100000]
        [--checkpoints=10000] [--ledgers=100]

A run of networks with next to no mathematics is looked at once a second: its
memory, threads, open files, and the files of its directory. Then a directory
that keeps all its checkpoints is saved to, restored from and listed with 10,
100 and so on in it; and `dtrain.report` reads the ledgers of runs of 1, 10 and
100 workers, any of which can be the reason of a new start. `--write` puts the
tables into docs/speed.md, and draws docs/growth.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dtrain.checkpoint import retention
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manager import CheckpointManager
from dtrain.checkpoint.tier import Facts
from dtrain.record.ledger import Ledger
from tests import runs
from tests.benchmarks import command, pages
from tests.benchmarks.stall import timed

PAGE = runs.ROOT / "docs/speed.md"
CURVES = runs.ROOT / "docs/growth.png"
# Where the rows of the table end, as parts of a run. Of the first it is not
# said that nothing grows: buffers are filled, and the allocator finds its size.
PARTS = (0.1, 0.25, 0.5, 1.0)
# What a run appends to, or adds to, as long as it goes.
_LOGS = ("metrics.jsonl", "events", "samples")
_MIB = 2**20
_NUM_SAVES = 5
# Of each worker.
_STARTS = 10
# More than a ledger keeps points of.
_LOOPS = 1500
_LOOP_NS = 40_000_000
_NS = 1_000_000_000
# What a process of its own has had in memory at most; what the system says of a
# child counts what its parent had, too.
_REPORT = """\
import sys
from dtrain import report
report.run(sys.argv)
print(open("/proc/self/status").read())
"""


class Sample(NamedTuple):
    """What a run was like at a moment.

    Attributes:
        step: the newest in its metrics.
        anonymous: bytes of memory that are of no file.
        resident: bytes of memory.
        threads: number of them.
        open_files: number of them.
        files: of the run directory, without `logs`.
        num_bytes: of these.
        logs: bytes of each of `_LOGS`.
    """

    step: int
    anonymous: int
    resident: int
    threads: int
    open_files: int
    files: int
    num_bytes: int
    logs: dict[str, int]


def sizes(run_dir: pathlib.Path) -> dict[str, int]:
    """Returns the bytes of each file of a run, by its path in there."""
    found = {}
    for path in run_dir.rglob("*"):
        # A save moves and removes files meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                name = path.relative_to(run_dir).as_posix()
                found[name] = path.stat().st_size
    return found


def newest_step(metrics: pathlib.Path) -> int:
    """Returns the step of the last whole line; 0 if there is none."""
    with contextlib.suppress(FileNotFoundError), metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
        if lines:
            return int(json.loads(lines[-1])["step"])
    return 0


def look(pid: int, run_dir: pathlib.Path) -> Sample:
    """Looks at a run.

    Raises:
        OSError: the process has ended.
        KeyError: likewise.
    """
    process = pathlib.Path(f"/proc/{pid}")
    said = dict(
        line.split(":", 1)
        for line in (process / "status").read_text().splitlines()
    )
    anonymous, resident = (
        1024 * int(said[name].split()[0]) for name in ("RssAnon", "VmRSS")
    )
    logs, rest = dict.fromkeys(_LOGS, 0), {}
    for name, num_bytes in sizes(run_dir).items():
        top = name.partition("/")[0]
        if top in logs:
            logs[top] += num_bytes
        else:
            rest[name] = num_bytes
    return Sample(
        newest_step(run_dir / "metrics.jsonl"),
        anonymous,
        resident,
        int(said["Threads"]),
        len(os.listdir(process / "fd")),
        len(rest),
        sum(rest.values()),
        logs,
    )


def watch(run_dir: pathlib.Path, num_steps: int) -> list[Sample]:
    """Runs a run, and looks at it once a second."""
    with run_dir.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dtrain.main"),
                *("--model=tests.benchmarks.overhead:make", "--r1_gamma=0"),
                # A ledger, which has 1,000 loops, is full after a tenth.
                *("--batch_size=8", "--latent_size=4", "--steps_per_loop=10"),
                *("--backup_every_secs=5", f"--num_steps={num_steps}"),
                f"--run_dir={run_dir}",
            ],
            cwd=runs.ROOT,
            env=runs.environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        samples = []
        with process:
            while process.poll() is None:
                with contextlib.suppress(OSError, KeyError):
                    samples.append(look(process.pid, run_dir))
                time.sleep(1)
    if process.returncode:
        sys.exit(run_dir.with_suffix(".log").read_text())
    return [sample for sample in samples if sample.step]


def slope(samples: Sequence[Sample], begin: float) -> float:
    """Returns the bytes of memory that a step adds, from a step on."""
    later = [each for each in samples if each.step >= begin]
    steps = [each.step for each in later]
    fitted = np.polyfit(steps, [each.anonymous for each in later], 1)
    return float(fitted[0])


def run_table(samples: Sequence[Sample], num_steps: int) -> list[str]:
    """Makes the table of a run: the most of each in parts of it."""
    head = ["steps", "memory of its own, MiB", "in memory, MiB", "threads"]
    head += ["open files", "files, but logs", "of kB"]
    rows, before = [], 0.0
    for part in PARTS:
        end = part * num_steps
        some = [each for each in samples if before < each.step <= end]
        if not some:
            continue
        cells = [f"to {end:,.0f}"]
        for name, unit, digits in (
            ("anonymous", _MIB, 1),
            ("resident", _MIB, 1),
            ("threads", 1, 0),
            ("open_files", 1, 0),
            ("files", 1, 0),
            ("num_bytes", 1000, 0),
        ):
            most = max(getattr(each, name) for each in some)
            cells.append(f"{most / unit:,.{digits}f}")
        rows.append(cells)
        before = end
    last = samples[-1]
    logs = ", ".join(
        f"{num_bytes / last.step:.0f} of {name}"
        for name, num_bytes in last.logs.items()
    )
    begin = PARTS[0] * num_steps
    told = (
        f"From step {begin:,.0f} on, a line through {len(samples):,} looks "
        f"rises by {slope(samples, begin):.1f} bytes of memory a step; in the "
        f"second half by {slope(samples, num_steps / 2):.1f}. The logs have "
        f"bytes a step: {logs}. {load()}"
    )
    return [*table(head, rows), "", told]


def load() -> str:
    return f"Load of the machine: {os.getloadavg()[0]:.1f}."


def table(
    head: Sequence[object], rows: Sequence[Sequence[object]]
) -> list[str]:
    """Writes a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(str, cells))} |" for cells in lines]


def draw(samples: Sequence[Sample]) -> bytes:
    """Draws memory and files over steps; returns a PNG file."""
    figure = Figure(figsize=(8, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True)
    steps = [each.step for each in samples]
    for name, label in (
        ("resident", "in memory"),
        ("anonymous", "of it, of no file"),
    ):
        mib = [getattr(each, name) / _MIB for each in samples]
        above.plot(steps, mib, label=label)
    above.set(ylabel="MiB", title="Memory of a run")
    for log in _LOGS:
        mb = [each.logs[log] / 1e6 for each in samples]
        below.plot(steps, mb, label=log)
    mb = [each.num_bytes / 1e6 for each in samples]
    below.plot(steps, mb, label="all else")
    below.set(xlabel="steps", ylabel="MB", title="Files of its directory")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


# Every one of them keeps some, and the first all.
POLICIES = (
    retention.EverySteps(1),
    retention.Last(3),
    retention.NearSteps(1000),
    retention.Doubling(1000),
    retention.EveryHours(1),
    retention.Within(24),
    retention.Best(5, "generator_loss"),
)


def fill(directory: CheckpointDirectory, real: int, steps: range) -> None:
    """Makes checkpoints of one that was saved, by hard links.

    Args:
        directory: of them all.
        real: the step of the one.
        steps: of the others; each has a manifest of its own.
    """
    one = directory.manifest(real)
    for step in steps:
        prefix = directory.prefix(step)
        for suffix in one.sizes:
            os.link(f"{directory.prefix(real)}.{suffix}", f"{prefix}.{suffix}")
        described = dataclasses.replace(
            one, step=step, saved_at=one.saved_at + step
        )
        pathlib.Path(f"{prefix}.json").write_bytes(described.encode())


def median_ms(work: Callable[[], object], times: int = _NUM_SAVES) -> str:
    secs = statistics.median(timed(work) for _ in range(times))
    return f"{1000 * secs:.1f}"


def checkpoints_row(place: str, first: int, count: int) -> list[str]:
    """Measures a directory that keeps all.

    Args:
        place: of the directory; it holds the steps before `first`.
        first: step of the next.
        count: of all that it holds then.
    """
    facts = Facts(metrics={"generator_loss": 1.0})
    state = tf.train.Checkpoint(number=tf.Variable(0.0))
    with CheckpointManager(state, place, POLICIES) as manager:
        directory, step = manager.directory, first
        if first == 1:
            manager.save(step, facts, wait=True)
            step += 1
        fill(directory, 1, range(step, count - _NUM_SAVES))
        step = count - _NUM_SAVES
        restored = timed(manager.restore)
        opened = timed(lambda: manager.save(step, facts, wait=True))
        cells = [f"{count:,}", f"{1000 * opened:.1f}"]

        def save() -> None:
            nonlocal step
            step += 1
            manager.save(step, facts, wait=True)

        cells.append(median_ms(save))
        assert len(directory.steps()) == count
        cells.append(median_ms(directory.steps))
        saved = [
            retention.Saved(each.step, each.saved_at, each.metrics)
            for each in map(directory.manifest, directory.steps())
        ]
        cells.append(median_ms(lambda: retention.kept(saved, POLICIES)))
        cells.append(f"{1000 * restored:.1f}")
    words = [sys.executable, "-m", "dtrain.checkpoint_tool", "list", place]
    listed = timed(
        lambda: subprocess.run(
            words, cwd=runs.ROOT, check=True, stdout=subprocess.DEVNULL
        )
    )
    return [*cells, f"{listed:.2f}"]


def checkpoints_table(place: pathlib.Path, most: int) -> list[str]:
    """Makes the table of directories that keep all their checkpoints."""
    head = ["checkpoints", "first save of a process, ms", "a save, ms"]
    head += ["of it, to list, ms", "of it, to choose, ms"]
    head += ["newest verified and restored, ms", "`checkpoint_tool list`, s"]
    counts = [10]
    while counts[-1] < most:
        counts.append(min(10 * counts[-1], most))
    rows, first = [], 1
    for count in counts:
        rows.append(checkpoints_row(str(place), first, count))
        print(rows[-1], flush=True)
        first = count + 1
    return [*table(head, rows), "", load()]


class Clock:
    """Says what it is told to."""

    def __init__(self, ns: int) -> None:
        self.ns = ns

    def __call__(self) -> int:
        return self.ns


def write_ledgers(run_dir: str, num_workers: int) -> int:
    """Writes the ledgers of a run whose workers are killed; returns how many.

    Each start goes on from a save, and does a part of the steps again. The
    ledgers are the run's own, at a clock of this program.
    """
    num_starts = _STARTS * num_workers
    length_ns = 2 * _LOOPS * _LOOP_NS
    for start in range(num_starts):
        # When it is made it is as late as when the last one ends.
        clock = Clock((num_starts + 1) * length_ns)
        begun_ns = (start + 1) * length_ns
        book = Ledger(
            run_dir,
            num_workers=num_workers,
            num_replicas=num_workers,
            clock_ns=clock,
            started_ns=begun_ns,
        )
        clock.ns = begun_ns + 10 * _NS
        step = 90 * start * _LOOPS
        book.restored(step)
        for loop in range(_LOOPS):
            with book.spending("train"):
                clock.ns += _LOOP_NS
            if loop % 50 == 0:
                with book.spending("save"):
                    clock.ns += _LOOP_NS // 10
            step += 100
            book.progress(step)
    book.close(0)
    return num_starts


def report(run_dir: str) -> tuple[float, float]:
    """Reports on a run; returns the seconds, and the most MiB in memory."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _REPORT, f"--run_dir={run_dir}"],
        cwd=runs.ROOT,
        env=runs.environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    secs = time.perf_counter() - begin
    kib = done.stdout.partition("VmHWM:")[2].split()[0]
    return secs, int(kib) / 1024


def ledgers_table(
    root: pathlib.Path, run_dir: pathlib.Path, num_steps: int, most: int
) -> list[str]:
    """Makes the table of reports.

    Args:
        root: of the runs that are made up.
        run_dir: of one that was run.
        num_steps: of that.
        most: workers.
    """
    head = ["of a run", "ledgers", "kB", "a report, s", "in memory, MiB"]
    places = [(f"{num_steps:,} steps, with their metrics", run_dir, 1)]
    workers = 1
    while workers <= most:
        place = root / f"{workers}-workers"
        place.mkdir()
        number = write_ledgers(str(place), workers)
        places.append((f"workers: {workers}", place, number))
        workers *= 10
    rows = []
    for name, place, number in places:
        files = list((place / "ledger").iterdir())
        assert len(files) == number, files
        kb = sum(path.stat().st_size for path in files) / 1000
        secs, mib = report(str(place))
        rows.append(
            [name, f"{number:,}", f"{kb:,.0f}", f"{secs:.1f}", f"{mib:.0f}"]
        )
        print(rows[-1], flush=True)
    return [*table(head, rows), "", load()]


def main() -> None:
    """Measures, prints the tables, and draws."""
    own = command.only_own_flags(
        sys.argv[1:], {"steps": 100_000, "checkpoints": 10_000, "ledgers": 100}
    )
    with tempfile.TemporaryDirectory(prefix="growth-") as directory:
        root = pathlib.Path(directory)
        run_dir = root / "run"
        samples = watch(run_dir, own["steps"])
        tables = {"run": run_table(samples, own["steps"])}
        print("\n".join(tables["run"]), flush=True)
        tables["checkpoints"] = checkpoints_table(
            root / "checkpoints", own["checkpoints"]
        )
        tables["ledgers"] = ledgers_table(
            root, run_dir, own["steps"], own["ledgers"]
        )
    for name, lines in tables.items():
        print("", *lines, sep="\n", flush=True)
        if "--write" in sys.argv:
            pages.replace_table(PAGE, f"growth_{name}", lines)
    if "--write" in sys.argv:
        CURVES.write_bytes(draw(samples))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
