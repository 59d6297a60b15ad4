"""What a start costs: a whole process, beside the import of TensorFlow.

    python -m tests.benchmarks.start [--rounds=10]

Each round times, one after the other, `python -c "import tensorflow"`, one
step of the embedded digits from nothing, and one step more of a run that was
killed. Then it prints where the time of the step from nothing goes.
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

from tests import runs
from tests.benchmarks import command

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
step._run.get_concrete_function(iterator, tf.constant(1))
mark("the trace of the step")
step.run(iterator, tf.constant(1))[1].numpy()
mark("the step")
for (_, before), (name, after) in zip(marks, marks[1:]):
    print(f"{after - before:8.2f} s  {name}")
"""


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


def main() -> None:
    """Measures and prints the tables."""
    rounds = command.only_own_flags(sys.argv[1:], {"rounds": 10})["rounds"]
    ratios: dict[str, list[float]] = {"start": [], "after a kill": []}
    print("seconds\n  import   start  ratio  after a kill  ratio")
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        killed = root / "killed"
        step = kill(killed)
        for number in range(rounds):
            base = secs(IMPORT)
            fresh = secs((*TRAIN, "--num_steps=1", f"--run_dir={root / 'new'}"))
            shutil.rmtree(root / "new")
            again = root / f"again-{number}"
            shutil.copytree(killed, again)
            flags = (f"--num_steps={step + 1}", f"--run_dir={again}")
            resumed = secs((*TRAIN, *flags))
            ratios["start"].append(fresh / base)
            ratios["after a kill"].append(resumed / base)
            print(
                f"{base:8.2f}{fresh:8.2f}{fresh / base:7.2f}"
                f"{resumed:14.2f}{resumed / base:7.2f}",
                flush=True,
            )
    for name, values in ratios.items():
        print(
            f"{name}: median {statistics.median(values):.2f} of the import, "
            f"{min(values):.2f} to {max(values):.2f}"
        )
    print("where it goes")
    subprocess.run(
        [sys.executable, "-c", PARTS, *TRAIN[3:]],
        cwd=runs.ROOT,
        env=runs.environment(TF_CPP_MIN_LOG_LEVEL="2"),
        stderr=subprocess.DEVNULL,
        check=True,
    )


if __name__ == "__main__":
    main()
