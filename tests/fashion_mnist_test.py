"""60,000 real images of 28x28 train end to end."""

from __future__ import annotations

import pathlib

from dtrain import checkpoint_reader, errors
from tests import requirement, runs

DIRECTORY = pathlib.Path("/usr/share/datasets/fashion-mnist")
NUM_STEPS = 40


def train(run_dir: pathlib.Path, *flags: str) -> str:
    """Trains on all images; returns the digest of the state."""
    if not DIRECTORY.exists():
        requirement.missing(
            f"{DIRECTORY}: apt-get install dataset-fashion-mnist"
        )
    code, output = runs.run(
        "dtrain.main",
        f"--dataset=idx:{DIRECTORY}",
        f"--run_dir={run_dir}",
        f"--num_steps={NUM_STEPS}",
        "--base_channels=4",
        "--conditional",
        "--sample_every_steps=20",
        *flags,
    )
    assert code == errors.FINISHED, output
    assert "60,000 images 28x28x1, 10 classes" in output
    assert (run_dir / f"samples/step-{NUM_STEPS:06}.png").stat().st_size > 1000
    losses = [line["generator_loss"] for line in runs.metrics(run_dir)]
    assert len(losses) == NUM_STEPS
    return checkpoint_reader.digest(f"{run_dir}/checkpoints/ckpt-{NUM_STEPS}")


def test_in_memory_and_from_array_record_are_the_same(
    tmp_path: pathlib.Path,
) -> None:
    in_memory = train(tmp_path / "in_memory")
    on_disk = train(
        tmp_path / "on_disk", "--cache_gib=0", f"--data_dir={tmp_path / 'data'}"
    )
    assert on_disk == in_memory
