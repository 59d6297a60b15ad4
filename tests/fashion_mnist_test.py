"""60,000 real images of 28x28 train end to end."""

from __future__ import annotations

import pathlib

from dtrain import errors
from dtrain.bundle import tensors
from tests import requirement, runs

DIRECTORY = pathlib.Path("/usr/share/datasets/fashion-mnist")
NUM_STEPS = 40


def train(run_dir: pathlib.Path, dataset: str, *flags: str) -> str:
    """Trains on all images; returns the digest of the state."""
    code, output = runs.run(
        "dtrain.main",
        f"--dataset={dataset}",
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
    assert len(runs.metrics(run_dir)) == NUM_STEPS
    return tensors.digest(f"{run_dir}/checkpoints/ckpt-{NUM_STEPS}")


def test_in_memory_and_from_array_record_are_the_same(
    tmp_path: pathlib.Path,
) -> None:
    if not DIRECTORY.exists():
        requirement.missing("apt-get install dataset-fashion-mnist")
    in_memory = train(tmp_path / "in_memory", f"idx:{DIRECTORY}")
    data_dir = f"--data_dir={tmp_path / 'data'}"
    code, output = runs.run(
        "dtrain.store",
        "fashion",
        f"--dataset=idx:{DIRECTORY}",
        data_dir,
    )
    assert code == errors.FINISHED, output
    assert list((tmp_path / "data/fashion").rglob("*.array_record*"))
    on_disk = train(tmp_path / "on_disk", "fashion", data_dir, "--cache_gib=0")
    assert on_disk == in_memory
