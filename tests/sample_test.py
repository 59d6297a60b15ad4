"""Pictures from a run, where neither its data nor its devices are."""

from __future__ import annotations

import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image, ImageSequence

from dtrain import checkpoint_tool, errors, sample
from dtrain import main as dtrain_main
from dtrain.config import Config
from dtrain.record import drawing, images
from tests import runs

NUM_CLASSES = 3


def train(run_dir: pathlib.Path, *arguments: str) -> None:
    """Trains four steps with a checkpoint at the second and at the last."""
    code = dtrain_main.run(
        [
            "main",
            *runs.SMALL,
            f"--run_dir={run_dir}",
            "--num_steps=4",
            "--checkpoint_every_steps=2",
            *arguments,
        ]
    )
    assert code == errors.FINISHED


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Makes two runs, `plain` and `classes`, and removes their data."""
    place = tmp_path_factory.mktemp("sample")
    random = np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        for number in range(4):
            image = random.integers(0, 256, (8, 8, 3), np.uint8)
            images.write_png(f"{place}/data/{label}/{number}.png", image)
    dataset = f"--dataset=folder:{place}/data"
    train(place / "plain", dataset)
    train(place / "elsewhere", dataset, "--conditional")
    (place / "elsewhere").rename(place / "classes")
    shutil.rmtree(place / "data")
    return place


def draw(run_dir: pathlib.Path, output: pathlib.Path, *more: str) -> list[str]:
    """Draws in this process; returns the names of the files."""
    code = sample.run(
        ["sample", f"--run_dir={run_dir}", f"--output_dir={output}", *more]
    )
    assert code == errors.FINISHED
    return sorted(path.name for path in output.iterdir())


def pixels(path: pathlib.Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_process_draws_a_grid_and_an_animation(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    code, output = runs.run("dtrain.sample", f"--run_dir={place}/plain")
    drawn = place / "plain/drawn"
    assert code == errors.FINISHED, output
    assert (
        output == f"wrote {drawn}/samples.png and {drawn}/interpolation.gif\n"
    )
    grid = Image.open(drawn / "samples.png")
    # 8 x 8 images of 8 pixels, one apart, enlarged by 8 to 512 at least.
    assert grid.size == (8 * 73, 8 * 73)
    assert grid.mode == "RGB"
    animation = Image.open(drawn / "interpolation.gif")
    assert len(list(ImageSequence.Iterator(animation))) == 48
    assert animation.info["loop"] == 0
    after = {
        path: path.stat().st_mtime_ns
        for path in place.rglob("*")
        if path != drawn and drawn not in path.parents
    }
    before.pop(place / "plain")
    after.pop(place / "plain")
    assert after == before
    # And again, elsewhere: the same bytes.
    assert draw(place / "plain", tmp_path / "again") == [
        "interpolation.gif",
        "samples.png",
    ]
    for name in ("samples.png", "interpolation.gif"):
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (drawn / name).read_bytes()


def test_single_images(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    single = ("--nogrid", "--nogif")
    few = draw(place / "plain", tmp_path / "few", "--num_images=3", *single)
    assert few == [f"sample-0000{number}.png" for number in range(3)]
    more = draw(place / "plain", tmp_path / "more", "--num_images=5", *single)
    assert len(more) == 5
    for name in few:
        assert pixels(tmp_path / "few" / name).shape == (8, 8, 3)
        np.testing.assert_array_equal(
            pixels(tmp_path / "few" / name), pixels(tmp_path / "more" / name)
        )


def test_other_seeds_and_steps_draw_other_images(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    variants = {
        "newest": [],
        "last": ["--step=4"],
        "earlier": ["--step=2"],
        "seed": ["--seed=5"],
    }
    drawn = {}
    for name, more in variants.items():
        draw(place / "plain", tmp_path / name, "--nogif", *more)
        drawn[name] = (tmp_path / name / "samples.png").read_bytes()
    assert drawn["newest"] == drawn["last"]
    assert len(set(drawn.values())) == 3


def test_a_column_for_each_class(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    draw(place / "classes", tmp_path, "--num_images=24", "--nogrid", "--nogif")
    made = [
        pixels(tmp_path / f"sample-{number:05}.png").astype(int)
        for number in range(24)
    ]
    names = draw(place / "classes", tmp_path / "grid", "--num_images=24")
    assert names == ["interpolation.gif", "samples.png"]
    grid = pixels(tmp_path / "grid/samples.png")
    factor = grid.shape[1] // (6 * 9 + 1)
    small = grid[::factor, ::factor]
    for number, image in enumerate(made):
        row, column = divmod(number, 6)
        top, left = 9 * row + 1, 9 * column + 1
        np.testing.assert_array_equal(
            small[top : top + 8, left : left + 8], image
        )


@pytest.mark.parametrize(
    ("num_classes", "columns"),
    [(1, 8), (2, 8), (3, 6), (8, 8), (10, 10), (16, 16)],
)
def test_each_column_is_of_one_class(num_classes: int, columns: int) -> None:
    config = Config(conditional=True)
    assert drawing.num_columns(config, num_classes) == columns
    labels = drawing.class_columns(config, num_classes, 6 * columns)
    assert labels is not None
    for column in labels.reshape(6, columns).T:
        assert len(set(column)) == 1
    assert set(labels) == set(range(num_classes))


def test_many_classes_do_not_make_a_grid_wider() -> None:
    assert drawing.num_columns(Config(conditional=True), 1000) == 16
    assert drawing.num_columns(Config(), 1000) == drawing.GRID_SIZE


def test_one_image(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert draw(place / "plain", tmp_path, "--num_images=1", "--nogif") == [
        "samples.png"
    ]


def test_drawing_changes_no_checkpoint(
    place: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    digests = []
    for _ in range(2):
        checkpoint_tool.run(["digest", f"{place}/classes/checkpoints"])
        digests.append(capsys.readouterr().out)
        draw(place / "classes", tmp_path, "--nogif")
        capsys.readouterr()
    assert digests[0] == digests[1]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.run(["sample", "--help"]) == errors.FINISHED
    page = capsys.readouterr().out
    for name in sample.Request.__dataclass_fields__:
        assert name in page
