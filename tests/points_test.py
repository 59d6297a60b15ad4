"""Points in the plane: read, trained on, drawn, and what does not suit them."""

from __future__ import annotations

import math
import pathlib
import zlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from dtrain import check_data, errors, evaluate, sample, store
from dtrain import config as config_lib
from dtrain import main as dtrain_main
from dtrain.config import Config
from dtrain.data import sources
from dtrain.data.sources import points
from dtrain.errors import UserError
from dtrain.record import drawing, images, scatter
from tests.benchmarks import grid

OWN = np.array([[10.0, 3.0], [14.0, 4.0], [12.0, 3.5]])
BLUE, PAPER = [0, 114, 178], [255, 255, 255]


def write(path: pathlib.Path, **arrays: Any) -> str:
    np.savez(path / "own.npz", **arrays)
    return f"points:{path}/own.npz"


def read_all(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    source = sources.open_source(Config(dataset=dataset, model="mlp"))
    assert source.in_memory
    assert source.image_shape == scatter.SHAPE
    read, labels = source.read(tf.range(source.num_images, dtype=tf.int64))
    seen = source.seen(read, tf.ones([source.num_images], tf.bool))
    np.testing.assert_array_equal(seen, read)
    return read.numpy(), labels.numpy()


@pytest.mark.parametrize(
    ("name", "num_modes", "deviation", "digest"),
    [
        ("grid", 25, 0.05, 0x3330374F),
        ("ring", 8, 0.01, 0x6DD46F5F),
    ],
)
def test_mixtures_are_those_of_the_papers(
    name: str, num_modes: int, deviation: float, digest: int
) -> None:
    seen, labels = read_all(f"points:{name}")
    found = points.of_run(Config(dataset=f"points:{name}", model="mlp"))
    assert found
    values = found.plane.to_points(seen)
    np.testing.assert_allclose(values, found.values, atol=1e-6)
    assert values.shape == (100_000, 2)
    modes = points.MIXTURES[name].modes
    assert len(modes) == num_modes
    assert np.bincount(labels).tolist() == [100_000 // num_modes] * num_modes
    if name == "grid":
        assert {tuple(mode) for mode in modes} == {
            (x, y) for x in range(-4, 5, 2) for y in range(-4, 5, 2)
        }
    else:
        np.testing.assert_allclose(np.hypot(*modes.T), 1.0)
    offsets = values - modes[labels]
    np.testing.assert_allclose(offsets.std(0), deviation, rtol=0.01)
    assert np.abs(offsets.mean(0)).max() < 0.01 * deviation
    # Of the largest coordinate of a mode; all of them are far from the edge.
    assert np.abs(found.plane.to_images(modes)).max() == np.float32(0.8)
    assert np.abs(seen).max() < 0.9
    # Another NumPy must not make another data set of a run.
    assert zlib.crc32(found.values.tobytes()) == digest


def test_the_protocol_of_the_grid() -> None:
    mixture = points.MIXTURES["grid"]
    found = points.of_run(Config(dataset="points:grid", model="mlp"))
    assert found
    modes, high_quality, reverse_kl = grid.coverage(
        found.values[:2500], mixture
    )
    # Of a normal in the plane, 1 - exp(-9 / 2) is within three deviations.
    assert (modes, high_quality) == (25, pytest.approx(0.989, abs=0.01))
    assert reverse_kl == pytest.approx(0.0, abs=1e-9)
    # Two modes, and half of the samples beside one of them.
    there = mixture.modes[[0, 0, 1, 1]] + [[0, 0], [0, 0.16], [0.1, 0], [0, 0]]
    assert grid.coverage(there, mixture) == (
        2,
        0.75,
        pytest.approx(math.log(25 / 2)),
    )


def test_own_points_are_moved_and_scaled_as_one(tmp_path: pathlib.Path) -> None:
    dataset = write(tmp_path, x=OWN, y=np.array([1, 0, 1]))
    seen, labels = read_all(dataset)
    np.testing.assert_allclose(
        seen[:, 0, 0], [[-0.8, -0.2], [0.8, 0.2], [0.0, 0.0]], atol=1e-6
    )
    assert labels.tolist() == [1, 0, 1]
    # Far from 0, where the numbers of float32 are 0.5 apart.
    seen, _ = read_all(write(tmp_path, x=OWN / 100 + 5e6))
    np.testing.assert_allclose(seen[:, 0, 0, 0], [-0.8, 0.8, 0], atol=1e-4)
    other, _ = read_all(write(tmp_path, way=OWN[:1]) + "#way")
    assert other.tolist() == [[[[0.0, 0.0]]]]


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (
            "points:gridd",
            "must be points:grid, points:ring or points:/path.npz",
        ),
        ("points:", "names no path"),
        ("points:/nowhere.npz", "must name an npz file"),
    ],
)
def test_names_that_are_no_points(dataset: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_all(dataset)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 3)), "x in .* is 3x3; points must be"),
        (np.zeros((0, 2)), "is 0x2"),
        (np.zeros(2), "is 2; points"),
        (np.float64(1), "is one number"),
        (np.full((3, 2), np.nan), "holds what is no finite number"),
        (np.array([[0, np.inf], [0, 0]]), "holds what is no finite number"),
        (np.array([[0, -1.7e308], [0, 1.7e308]]), "too far apart"),
        (np.full((3, 2), "a"), "is of type <U1; store it as"),
        (np.zeros((3, 2), complex), "is of type complex128"),
    ],
)
def test_arrays_that_are_no_points(
    array: Any, words: str, tmp_path: pathlib.Path
) -> None:
    dataset = write(tmp_path, x=array)
    with pytest.raises(UserError, match=words) as caught:
        read_all(dataset)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "option",
    [
        *("--image_size=8", "--channels=3", "--mirror", "--white_level=255"),
        *("--augment=diff", "--background=000000"),
    ],
)
def test_options_of_pictures_are_refused(option: str) -> None:
    name = option.strip("-").partition("=")[0]
    with pytest.raises(UserError, match=rf"{name} \(.*\) changes pictures"):
        config_lib.parse(["main", "--dataset=points:grid", option])


def test_points_are_dots_over_real_ones(tmp_path: pathlib.Path) -> None:
    config = Config(dataset=write(tmp_path, x=OWN), model="mlp")
    behind = drawing.behind(config)
    assert behind
    np.testing.assert_allclose(behind.corners, [[9.5, 1.0], [14.5, 6.0]])
    drawn = np.array([[-1.0, 1.0], [0.5, -7.0], [np.nan, 0.0]])
    picture = images.make_grid(
        drawn.reshape(3, 1, 1, 2), 8, min_width=101, behind=behind
    )
    assert picture.shape == (101, 101, 3)
    assert picture[0, 0].tolist() == picture[100, 75].tolist() == BLUE
    grey = picture[50 + 10, 50 - 40]
    assert grey.tolist() not in (BLUE, PAPER)
    assert picture[30, 30].tolist() == PAPER
    np.testing.assert_array_equal(picture[50, 50], grey)
    # A file that is gone leaves nothing behind.
    assert drawing.behind(Config(dataset="points:/no.npz", model="mlp")) is None


def test_a_run_on_points(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["main", f"--run_dir={run_dir}", "--dataset=points:ring"]
    arguments += ["--model=mlp", "--base_channels=4", "--latent_size=2"]
    arguments += ["--batch_size=8", "--num_steps=2"]
    assert dtrain_main.run(arguments) == errors.FINISHED
    for name in ("reals.png", "init.png", "samples/step-000002.png"):
        with Image.open(run_dir / name) as picture:
            assert picture.size == (512, 512)
            assert (np.asarray(picture) == BLUE).all(-1).sum() > 100
    sample.run(["sample", f"--run_dir={run_dir}", "--interpolation_frames=2"])
    grid = (run_dir / "samples/step-000002.png").read_bytes()
    assert (run_dir / "drawn/samples.png").read_bytes() == grid
    with pytest.raises(UserError, match="leave it out"):
        sample.run(["sample", f"--run_dir={run_dir}", "--nogrid"])
    capsys.readouterr()
    evaluate.run(
        [
            *("evaluate", f"--run_dir={run_dir}", "--num_images=64"),
            *("--extractor=pixels", f"--cache_dir={tmp_path}"),
        ]
    )
    assert "frechet_distance" in capsys.readouterr().out


def test_programs_for_pictures_say_so(tmp_path: pathlib.Path) -> None:
    points_of = "--dataset=points:grid"
    for run, words in (
        (
            lambda: dtrain_main.run(
                ["main", points_of, f"--run_dir={tmp_path}/r"]
            ),
            r"model \(dcgan\) draws pictures, .* give --preset=mlp",
        ),
        (lambda: check_data.run(["check_data", points_of]), "at each start"),
        (
            lambda: store.run(
                ["store", "a", points_of, f"--data_dir={tmp_path}"]
            ),
            "is of points, and no pictures",
        ),
    ):
        with pytest.raises(UserError, match=words):
            run()
