"""The programs that people have: trained, killed, resumed, drawn, exported.

`make chaos` runs all of them on all strategies, CI one.
"""

from __future__ import annotations

import importlib
import os
import pathlib
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from dtrain import config, errors
from dtrain.bundle import fit, tensors
from dtrain.data import pipeline, sources
from dtrain.gan import state as gan_lib
from dtrain.gan.step import Step
from tests import replicas, resume_test, runs

NUM_STEPS = 24
IS_LONG = bool(os.environ.get("DTRAIN_ALL_PROGRAMS"))


class Way(NamedTuple):
    """How a program is trained here.

    Attributes:
        flags: of the data, where PLACE stands for its directory, and others.
        exported: the network that is written as a model.
    """

    flags: tuple[str, ...]
    exported: str = "generator"


PAIRS = "--dataset=npz:PLACE/pairs.npz"
SHAPES = "--dataset=npz:PLACE/shapes.npz"
OTHER = "--unpaired=other=npz:PLACE/other.npz"
PROGRAMS = {
    "acgan": Way(("--conditional",)),
    "ada": Way(()),
    "conditional_gan": Way(("--conditional", "--r1_gamma=0")),
    "cyclegan": Way((SHAPES, OTHER), "x_to_y"),
    "cyclegan_tensorflow": Way((SHAPES, OTHER), "y_to_x"),
    "dcgan_keras": Way(()),
    "dcgan_tensorflow": Way(("--r1_gamma=0",)),
    "gaugan": Way((SHAPES, "--paired=classes=map:npz:PLACE/shapes.npz#maps")),
    "pix2pix": Way((PAIRS,)),
    "stylegan": Way((SHAPES,), "synthesis"),
    "stylegan2": Way((), "synthesis"),
    "wgan_gp": Way(()),
}


def write_data(place: pathlib.Path, side: int = 16) -> None:
    """Makes data: shapes in colour, their outlines, and their labels."""
    numbers = np.random.default_rng(0)
    rows, columns = np.indices((side, side)) * 16 // side
    shapes, maps = [], []
    for _ in range(48):
        kind, radius = numbers.integers(1, 4), numbers.integers(3, 7)
        down, right = numbers.integers(6, 10, 2)
        distances = {
            1: np.hypot(rows - down, columns - right),
            2: np.maximum(abs(rows - down), abs(columns - right)),
            3: abs(rows - down) + abs(columns - right),
        }
        is_inside = distances[kind] < radius
        colour = numbers.integers(64, 256, 3)
        shapes.append(np.where(is_inside[..., None], colour, 0))
        maps.append(np.where(is_inside, kind, 0))
    images = np.stack(shapes).astype(np.uint8)
    outlines = 255 * (images != np.roll(images, 1, axis=2)).astype(np.uint8)
    labels = np.stack(maps).astype(np.uint8)
    np.savez(place / "shapes.npz", images=images, maps=labels)
    np.savez(place / "other.npz", images=255 - images[:31])
    pairs = np.concatenate([images, outlines], axis=2)
    np.savez(place / "pairs.npz", images=pairs)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("data")
    write_data(place)
    return place


def flags(name: str, place: pathlib.Path) -> list[str]:
    return [
        *("--batch_size=4", "--base_channels=2", "--latent_size=4"),
        *("--steps_per_loop=1", f"--num_steps={NUM_STEPS}"),
        *(
            f"--sample_every_steps={NUM_STEPS // 2}",
            "--checkpoint_every_steps=0",
        ),
        *("--backup_every_secs=0.001", f"--model=tests.programs.{name}:make"),
        *(flag.replace("PLACE", str(place)) for flag in PROGRAMS[name].flags),
    ]


def cases() -> list[tuple[str, str]]:
    if IS_LONG:
        return [
            (name, way) for name in PROGRAMS for way in resume_test.STRATEGIES
        ]
    return [("pix2pix", "default")]


@pytest.mark.parametrize(("name", "strategy"), cases())
def test_a_killed_program_ends_with_the_same_bits(
    name: str, strategy: str, place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    killed = end_with_the_same_bits(strategy, flags(name, place), tmp_path)
    _check_pictures_and_exports(name, killed, tmp_path)


def end_with_the_same_bits(
    strategy: str, flags: list[str], tmp_path: pathlib.Path
) -> pathlib.Path:
    """Trains twice, and kills one of them; returns that which was killed.

    Args:
        strategy: of `resume_test.STRATEGIES`.
        flags: of the run, which saves backups all the time.
        tmp_path: where both runs are put.
    """
    module, *more = resume_test.STRATEGIES[strategy]
    told = [*more, *flags]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = runs.run(module, *told, f"--run_dir={whole}")
    assert code == errors.FINISHED, output
    if module == "dtrain.main":
        code, output = runs.run(
            *("tests.killed", "3", "renamed", *told, f"--run_dir={killed}")
        )
        assert code not in (errors.FINISHED, errors.USER_ERROR), output
    else:
        process = runs.start_anew(module, *told, f"--run_dir={killed}")
        resume_test.wait_for_backup(killed)
        # With both workers.
        resume_test.kill_with_children(process.pid)
        runs.finish(process)
    code, output = runs.run(module, *told, f"--run_dir={killed}")
    assert code == errors.FINISHED, output
    assert "resumed from" in output
    # The last step alone is in the history.
    [one], [other] = (
        [
            tensors.digest(str(index.with_suffix("")))
            for index in run_dir.glob("checkpoints/*.index")
        ]
        for run_dir in (whole, killed)
    )
    assert one == other
    assert runs.metrics(whole) == runs.metrics(killed)
    return killed


def _check_pictures_and_exports(
    name: str, run_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Looks at what is drawn, sampled, inspected and exported of a run."""
    grid = np.asarray(Image.open(run_dir / f"samples/step-{NUM_STEPS:06}.png"))
    assert grid.std() > 1.0
    model = f"--model=tests.programs.{name}:make"
    code, output = runs.run(
        *("dtrain.sample", f"--run_dir={run_dir}", model, "--seeds=0-5"),
        f"--output_dir={tmp_path}/drawn",
    )
    assert code == errors.FINISHED, output
    assert (tmp_path / "drawn/interpolation.gif").exists()
    network = PROGRAMS[name].exported
    for target in ("model.keras", "saved/"):
        code, output = runs.run(
            *("dtrain.checkpoint_tool", "export", str(run_dir), model),
            *(f"--output={tmp_path}/{target}", f"--network={network}"),
        )
        assert code == errors.FINISHED, output
    assert (tmp_path / "saved/saved_model.pb").exists()
    # Which registers the layers of its own.
    importlib.import_module(f"tests.programs.{name}")
    assert keras.models.load_model(tmp_path / "model.keras").count_params()
    code, output = runs.run("dtrain.checkpoint_tool", "inspect", str(run_dir))
    assert code == errors.FINISHED, output
    assert network in output


def state_after(
    name: str, num_replicas: int, place: pathlib.Path
) -> dict[str, bytes]:
    """Trains in ordered mode; returns all of the state."""
    told = [*flags(name, place), "--reduction=ordered", "--batch_size=8"]
    settings = config.parse(["main", *told, "--run_dir=nowhere"])
    data = sources.open_data(settings)
    strategy, source = replicas.mirrored(num_replicas), data.source
    gan = gan_lib.GAN(
        *(settings, strategy, source.image_shape, source.num_classes),
        data.specs,
    )
    step = Step(gan)
    iterator = pipeline.make_iterator(
        data, settings, strategy, 0, step.num_draws
    )
    step.run(iterator, tf.constant(3))
    live = fit.of_objects(gan.checkpoint).tensors
    return {key: live[key].read().tobytes() for key in live}


# CI has one of its own in `program_test`.
if IS_LONG:

    @pytest.mark.usefixtures("sums_as_written")
    @pytest.mark.parametrize("name", ["ada", "cyclegan", "stylegan2"])
    def test_ordered_sums_have_the_same_bits_on_any_replicas(
        name: str, place: pathlib.Path
    ) -> None:
        alone = state_after(name, 1, place)
        for num_replicas in (2, 4):
            assert state_after(name, num_replicas, place) == alone
