"""What a start costs: a whole process, beside the import of TensorFlow.

    python -m tests.benchmarks.start [--rounds=10] [--xla_rounds=3] [--write]

Each round times, one after the other, `python -c "import tensorflow"`, one
step of the embedded digits from nothing, and one step more of a run that was
killed; the ratios are to the import. Then it tells where the time of the step
from nothing goes; and what a step of `stylegan2` takes that XLA compiles, or
has kept of an earlier start, again in turns. `--write` puts all three tables
into docs/speed.md.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from tests import runs
from tests.benchmarks import command
from tests.benchmarks.pages import replace_table

TRAIN = (
    *(sys.executable, "-m", "dtrain.main", "--strategy=mirrored"),
    *("--conditional", "--sample_every_steps=0"),
)
IMPORT = (sys.executable, "-c", "import tensorflow")
# What `dtrain.main` does, in its order, one part after the other.
PARTS = """
import time
marks = [("", time.perf_counter())]
def mark(name):
    marks.append((name, time.perf_counter()))
from dtrain.storage import startup
startup.import_tensorflow()
mark("import tensorflow, and its devices")
from dtrain import train
mark("import dtrain")
import contextlib, sys
import tensorflow as tf
from dtrain import config as config_lib
from dtrain.cluster import environment, strategy
from dtrain.data import pipeline, sources
from dtrain.gan.state import GAN
from dtrain.gan.step import Step
config = config_lib.parse(["", *sys.argv[1:]])
made = strategy.make(config, environment.ALONE)
mark("the strategy")
source = sources.open_source(config)
mark("the data")
gan = GAN(config, made, source.image_shape, source.num_classes)
step = Step(gan)
mark("networks, optimizers")
iterator = pipeline.make_iterator(
    sources.Data(source), config, made, 0, config.discriminator_steps
)
mark("the input")
step.trace(iterator)
mark("the trace of the step")
step.run(iterator, tf.constant(1))[1].numpy()
mark("the step")
for (_, before), (name, after) in zip(marks, marks[1:]):
    print(f"| {name} | {after - before:.2f} |")
"""
_HEAD = (
    "| | seconds | of the import | least to most |",
    "|---|---|---|---|",
)
_HEAD_OF_XLA = (
    "| one step of `stylegan2` | seconds | ratio |",
    "|---|---|---|",
)
_HEAD_OF_PARTS = ("| of a step from nothing | seconds |", "|---|---|")


def secs(command: tuple[str, ...]) -> float:
    """Runs a command to its end; returns how long that took."""
    start = time.perf_counter()
    subprocess.run(
        command,
        cwd=runs.ROOT,
        env=runs.environment(TF_CPP_MIN_LOG_LEVEL="2"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - start


def kill(run_dir: pathlib.Path) -> int:
    """Makes a run that was killed; returns the step of its newest state."""
    process = subprocess.Popen(
        [*TRAIN, f"--run_dir={run_dir}", "--backup_every_secs=0.5"],
        cwd=runs.ROOT,
        env=runs.environment(TF_CPP_MIN_LOG_LEVEL="2"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    step = 0
    while not step:
        time.sleep(0.05)
        saved = (run_dir / "backup").glob("ckpt-*.json")
        steps = [int(path.stem.removeprefix("ckpt-")) for path in saved]
        step = max(steps, default=0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return step


def rounds(count: int, root: pathlib.Path) -> dict[str, list[float]]:
    """Times all in turns; returns the seconds of each.

    Args:
        count: of the rounds.
        root: an empty directory.
    """
    times: dict[str, list[float]] = {
        '`python -c "import tensorflow"`': [],
        "one step, from nothing": [],
        "one step more, after a kill": [],
    }
    killed = root / "killed"
    step = kill(killed)
    for number in range(count):
        again = root / f"again-{number}"
        shutil.copytree(killed, again)
        commands = (
            IMPORT,
            (*TRAIN, "--num_steps=1", f"--run_dir={root / 'new'}"),
            (*TRAIN, f"--num_steps={step + 1}", f"--run_dir={again}"),
        )
        for values, each in zip(times.values(), commands, strict=True):
            values.append(secs(each))
        shutil.rmtree(root / "new")
    return times


def rows(times: Mapping[str, Sequence[float]]) -> list[str]:
    """Makes the rows of the table, of medians."""
    bases = next(iter(times.values()))
    lines = []
    for name, values in times.items():
        ratios = [
            value / base for value, base in zip(values, bases, strict=True)
        ]
        lines.append(
            f"| {name} | {statistics.median(values):.2f} "
            f"| {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    return lines


def of_xla(count: int, root: pathlib.Path) -> list[str]:
    """Times steps that XLA compiles, and such that it has kept.

    Args:
        count: of the rounds.
        root: an empty directory.

    Returns:
        The rows of the table, of medians.
    """
    step = (
        *(*TRAIN[:4], "--preset=stylegan2", "--batch_size=8", "--num_steps=1"),
        *("--sample_every_steps=0", "--jit_compile=on"),
    )
    kept = f"--xla_cache_dir={root / 'kept'}"
    secs((*step, kept, f"--run_dir={root / 'first'}"))
    turns = [
        [
            secs((*step, *more, f"--run_dir={root / name}-{number}"))
            for name, more in (("compiled", ()), ("kept", (kept,)))
        ]
        for number in range(count)
    ]
    compiled, loaded = zip(*turns, strict=True)
    ratio = statistics.median(after / before for before, after in turns)
    return [
        f"| compiled by XLA | {statistics.median(compiled):.1f} | 1.00 |",
        f"| kept from an earlier start, `--xla_cache_dir` "
        f"| {statistics.median(loaded):.1f} | {ratio:.2f} |",
    ]


def parts() -> list[str]:
    """Does one step from nothing; returns a row for each part of it."""
    output = subprocess.run(
        [sys.executable, "-c", PARTS, *TRAIN[3:]],
        cwd=runs.ROOT,
        env=runs.environment(TF_CPP_MIN_LOG_LEVEL="2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        text=True,
    ).stdout
    return output.splitlines()


def main() -> None:
    """Measures and prints the tables."""
    is_written = "--write" in sys.argv
    own = command.only_own_flags(sys.argv[1:], {"rounds": 10, "xla_rounds": 3})
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        lines = [*_HEAD, *rows(rounds(own["rounds"], root / "rounds"))]
        kept = [*_HEAD_OF_XLA, *of_xla(own["xla_rounds"], root / "xla")]
    of_parts = [*_HEAD_OF_PARTS, *parts()]
    print("\n".join([*lines, "", *of_parts, "", *kept]), flush=True)
    if is_written:
        replace_table(runs.ROOT / "docs/speed.md", "start", lines)
        replace_table(runs.ROOT / "docs/speed.md", "start_parts", of_parts)
        replace_table(runs.ROOT / "docs/speed.md", "start_xla", kept)


if __name__ == "__main__":
    main()
