"""A run that is killed comes back by itself, or ends with its cause."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import time

from dtrain import errors
from dtrain.bundle import tensors
from tests import runs

SAVE_ALWAYS = ("--checkpoint_every_steps=0", "--backup_every_secs=0.001")


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, in their order."""
    listed = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def wait_for_step(run_dir: pathlib.Path, step: int) -> None:
    """Waits until a run has written the metrics of a step."""
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        assert time.monotonic() < deadline, f"{path} has no line {step}"
        time.sleep(0.002)


def test_killed_workers_come_back(
    tmp_path: pathlib.Path, chance: random.Random
) -> None:
    """The long form kills 20 times: DTRAIN_NUM_KILLS=20."""
    num_kills = int(os.environ.get("DTRAIN_NUM_KILLS", "2"))
    steps_between = 40
    num_steps = (num_kills + 2) * steps_between

    def flags(name: str) -> list[str]:
        return [
            *("--num_workers=2", "--", *runs.SMALL, *SAVE_ALWAYS),
            f"--run_dir={tmp_path / name}",
            f"--num_steps={num_steps}",
        ]

    code, output = runs.run("launch.main", *flags("whole"))
    assert code == errors.FINISHED, output

    process = runs.start("launch.main", *flags("cut"))
    victims = []
    for number in range(num_kills):
        wait_for_step(tmp_path / "cut", (number + 1) * steps_between)
        time.sleep(chance.uniform(0.0, 0.1))
        victims.append(chance.randrange(2))
        os.kill(children_of(process.pid)[victims[-1]], signal.SIGKILL)
    code, output = runs.finish(process, timeout=60 + 60 * num_kills)
    assert code == errors.FINISHED, output
    restarts = [line for line in output.splitlines() if "; start " in line]
    assert [line.partition(";")[0] for line in restarts] == [
        f"worker {victim} was killed by SIGKILL" for victim in victims
    ]
    # Each came after progress, and so without a wait.
    assert all(line.endswith(" in 0 s") for line in restarts), restarts
    last = f"checkpoints/ckpt-{num_steps}"
    digests = {
        tensors.digest(f"{tmp_path}/{name}/{last}") for name in ("whole", "cut")
    }
    assert len(digests) == 1
    assert runs.metrics(tmp_path / "cut") == runs.metrics(tmp_path / "whole")


def test_a_long_run_needs_no_more_threads(tmp_path: pathlib.Path) -> None:
    """With a timeout for its collectives it needed three for each, for long.

    TensorFlow lets a thread sleep until the timeout, whether the collective is
    done or not; a process of 32,768 threads ended in std::system_error.
    """
    process = runs.start(
        "launch.main",
        *("--num_workers=2", "--", *runs.SMALL, f"--run_dir={tmp_path}"),
        "--num_steps=100000",
    )

    def num_threads() -> list[int]:
        return [
            len(os.listdir(f"/proc/{pid}/task"))
            for pid in children_of(process.pid)
        ]

    wait_for_step(tmp_path, 50)
    before = num_threads()
    wait_for_step(tmp_path, 300)
    after = num_threads()
    process.send_signal(signal.SIGTERM)
    code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    assert max(after) < max(before) + 50, (before, after)


# Counts its steps, as a part of its state, and fails always at the same.
FAILING_MODEL = """
import keras
import tensorflow as tf
from dtrain.models import dcgan


class Count(keras.layers.Layer):
    def build(self, input_shape):
        self.count = self.add_weight(
            shape=(), initializer="zeros", trainable=False
        )

    def call(self, inputs, training=False):
        if training:
            self.count.assign(self.count + 1.0)
            tf.debugging.assert_less(self.count, 200.0, "too many")
        return inputs


def make(config, image_shape, num_classes):
    generator, discriminator = dcgan.make(config, image_shape, num_classes)
    images = keras.Input(image_shape)
    return generator, keras.Model(images, discriminator(Count()(images)))
"""


def test_a_run_that_always_fails_ends_with_its_cause(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "failing.py").write_text(FAILING_MODEL)
    code, output = runs.run(
        "launch.main",
        "--",
        *runs.SMALL,
        *SAVE_ALWAYS,
        "--model=failing:make",
        f"--run_dir={tmp_path}/run",
        "--num_steps=1000",
        PYTHONPATH=f"{tmp_path}:{runs.ROOT}",
    )
    assert code == 1, output
    *restarts, last = [
        line
        for line in output.splitlines()
        if "; start " in line or line.startswith("error: ")
    ]
    # The first came forward, and one that came a step further than it may have.
    assert 3 <= len(restarts) <= 5, output
    assert last.startswith(
        "error: gave up after 3 starts in a row without a new save: worker 0 "
        "exited with 1, its last error: "
    )
    assert "assertion failed: [too many]" in last, output
