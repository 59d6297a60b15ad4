"""What a newcomer adds takes a file or a class, and a row where it is named.

Each addition of CONTRIBUTING's table that is not in the history as a commit is
made to a copy of the code, and used. (A figure every N steps, a retention
policy and a source of notices are `record/spread.py`, `--keep_doubling_steps`
and EC2's, and a network of one's own is `user_model_test`.)
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests import runs

NETWORK = """
import math

import keras

from dtrain.models import dcgan


def make(config, image_shape, num_classes):
    generator, discriminator = dcgan.make(config, image_shape, num_classes)
    flat = keras.Sequential(
        [
            keras.Input((config.latent_size,)),
            keras.layers.Dense(math.prod(image_shape)),
            keras.layers.Reshape(image_shape),
        ]
    )
    return flat, discriminator
"""

SOURCE = """
import numpy as np

from dtrain.data.sources import arrays


def open_grey(path, config, wanted):
    images = np.full((64, 8, 8, 1), int(path), np.uint8)
    return arrays.ArraySource(config, images, None)
"""

LAUNCHER = """
from launch.job import QUEUED, Plan, State


def plan(job):
    return Plan(files={}, run_dirs=("run",), submit=("at", "now"))


def check(plan):
    pass


def submit(job, plan):
    return "7"


def states(submission):
    return [State(QUEUED, f"at {submission.job_id}")]
"""


@pytest.fixture
def code(tmp_path: pathlib.Path) -> pathlib.Path:
    for package in ("dtrain", "launch"):
        shutil.copytree(
            runs.ROOT / package,
            tmp_path / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return tmp_path


def add_row(file: pathlib.Path, before: str, row: str) -> None:
    """Puts a row into a table, after the row that it is to follow."""
    text = file.read_text()
    assert text.count(before) == 1, (file, before)
    file.write_text(text.replace(before, f"{before}{row}"))


def run(code: pathlib.Path, *arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=code,
        env={**os.environ, "PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout + finished.stderr


def test_a_network_a_loss_and_a_source_of_data(code: pathlib.Path) -> None:
    (code / "dtrain/models/flat.py").write_text(NETWORK)
    loading = code / "dtrain/gan/loading.py"
    row = '"dcgan": "dtrain.models.dcgan",'
    add_row(loading, row, ' "flat": "dtrain.models.flat",')
    learning = code / "dtrain/config/learning.py"
    add_row(learning, 'MODELS = (\n    "dcgan",', ' "flat",')
    add_row(
        code / "dtrain/gan/losses.py",
        "LOSSES: dict[str, Loss] = {",
        '\n    "critic": Loss(_critic_discriminator, _critic_generator),',
    )
    add_row(learning, '            "hinge",', '\n            "critic",')
    (code / "dtrain/data/sources/grey.py").write_text(SOURCE)
    sources = code / "dtrain/data/sources/__init__.py"
    add_row(sources, "    folder,\n", "    grey,\n")
    add_row(sources, '"folder": folder.open_folder,', '"grey": grey.open_grey,')

    output = run(
        code,
        *("dtrain.main", "--model=flat", "--loss=critic", "--dataset=grey:128"),
        *("--run_dir=run", "--num_steps=2", *runs.SMALL),
    )
    assert "finished: step 2" in output
    made = json.loads((code / "run/config.json").read_text())
    assert made["config"]["model"] == "flat"


def test_a_launcher(code: pathlib.Path) -> None:
    (code / "launch/backends/at.py").write_text(LAUNCHER)
    submit = code / "launch/submit.py"
    add_row(submit, "from launch.backends import", " at,")
    add_row(submit, '"slurm": slurm,', '"at": at,')
    add_row(code / "launch/options.py", 'BACKENDS = ("local",', ' "at",')
    add_row(
        code / "launch/submission.py", '"slurm": "[0-9]{1,20}",', ' "at": "7",'
    )
    flags = ("--", "--run_dir=run", "--num_steps=2")
    launch = ("launch.main", "--backend=at")
    assert "at now" in run(code, *launch, "--dry_run", *flags)
    assert "as job 7" in run(code, *launch, *flags)
    assert "at 7" in run(code, "launch.main", "status", "--run_dir=run")


def test_a_retention_policy(code: pathlib.Path) -> None:
    """Its flag is one of a run and of `prune`."""
    retention = code / "dtrain/checkpoint/retention.py"
    add_row(
        retention,
        "_BY_FLAG: Mapping[str, Callable[[Any], Policy]] = {",
        '\n    "keep_oldest": lambda flags: Oldest(flags.keep_oldest),',
    )
    add_row(
        retention,
        "import UserError\n",
        """

class Oldest:
    def __init__(self, num):
        self.num = num

    def kept(self, saved):
        return {checkpoint.step for checkpoint in saved[: self.num]}

""",
    )
    add_row(
        code / "dtrain/config/keeping.py",
        '3, "Newest checkpoints that are kept.", minimum=1\n    )',
        '\n    keep_oldest: int = _saving(0, "Oldest that stay.", minimum=0)',
    )
    often = ("--checkpoint_every_steps=1", "--num_steps=4", "--max_to_keep=3")
    run(
        code,
        *("dtrain.main", "--run_dir=run", *runs.SMALL, *often),
        "--keep_oldest=1",
    )
    output = run(
        code,
        *("dtrain.checkpoint_tool", "prune", "run", "--keep_oldest=1"),
    )
    assert "2 kept: 0, 4" in output
