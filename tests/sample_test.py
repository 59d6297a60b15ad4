"""Pictures from a run, where neither its data nor its devices are."""

from __future__ import annotations

import itertools
import pathlib
import shutil

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageSequence

from dtrain import checkpoint_tool, errors, sample
from dtrain import main as dtrain_main
from dtrain.record import film, images
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
            "--sample_every_steps=2",
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


SINGLE = ("--nogrid", "--interpolation_frames=0")


def test_a_seed_gives_its_picture_whatever_others_there_are(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    few = draw(place / "plain", tmp_path / "few", "--seeds=3,17,9", *SINGLE)
    assert few == [f"seed-{seed:05}.png" for seed in (3, 9, 17)]
    more = draw(place / "plain", tmp_path / "more", "--seeds=0-19", *SINGLE)
    assert len(more) == 20
    for name in few:
        made = pixels(tmp_path / "few" / name)
        assert made.shape == (8, 8, 3)
        np.testing.assert_array_equal(made, pixels(tmp_path / "more" / name))
    different = {(tmp_path / "more" / name).read_bytes() for name in more}
    assert len(different) == 20


@pytest.mark.parametrize("kind", ["plain", "classes"])
def test_the_grid_is_that_of_the_run(
    kind: str, place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    draw(place / kind, tmp_path, "--interpolation_frames=0")
    np.testing.assert_array_equal(
        pixels(tmp_path / "samples.png"),
        pixels(place / kind / "samples/step-000004.png"),
    )
    assert (place / kind / "init.png").read_bytes() != (
        place / kind / "samples/step-000004.png"
    ).read_bytes()


def test_other_seeds_and_steps_draw_other_images(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    variants = {
        "newest": [],
        "last": ["--checkpoint=4"],
        "all": ["--seeds=0-63", "--checkpoint=newest"],
        "earlier": ["--checkpoint=2"],
        "seeds": ["--seeds=64-127"],
        "typical": ["--truncation=0.5"],
    }
    drawn = {}
    for name, more in variants.items():
        told = ("--interpolation_frames=0", *more)
        draw(place / "plain", tmp_path / name, *told)
        drawn[name] = (tmp_path / name / "samples.png").read_bytes()
    assert drawn["newest"] == drawn["last"] == drawn["all"]
    assert len(set(drawn.values())) == 4


def test_each_class_has_all_seeds(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    some = ("--classes=2,0", "--seeds=0-3")
    names = draw(place / "classes", tmp_path / "each", *some, *SINGLE)
    assert names == [
        f"class-{label:03}-seed-{seed:05}.png"
        for label in (0, 2)
        for seed in range(4)
    ]
    draw(place / "classes", tmp_path, *some, "--interpolation_frames=0")
    grid = pixels(tmp_path / "samples.png")
    factor = grid.shape[1] // (4 * 9 + 1)
    small = grid[::factor, ::factor]
    assert small.shape[:2] == (2 * 9 + 1, 4 * 9 + 1)
    for row, label in enumerate((2, 0)):
        for seed in range(4):
            name = f"class-{label:03}-seed-{seed:05}.png"
            top, left = 9 * row + 1, 9 * seed + 1
            np.testing.assert_array_equal(
                small[top : top + 8, left : left + 8],
                pixels(tmp_path / "each" / name),
            )


def frames(path: pathlib.Path) -> list[np.ndarray]:
    return [
        np.asarray(frame.convert("RGB"))
        for frame in ImageSequence.Iterator(Image.open(path))
    ]


@pytest.mark.parametrize(
    ("kind", "more", "shape"),
    [
        # Two images of 8 pixels, one apart: 19 wide, enlarged to 38.
        ("plain", ("--seeds=0-3", "--interpolation_images=2"), (20, 38, 3)),
        # One of each of three classes, in two rows and columns.
        ("classes", ("--seeds=0-1",), (38, 38, 3)),
        # One seed stays, and the class changes.
        (
            "classes",
            ("--seeds=7", "--interpolation_through=classes"),
            (40, 40, 3),
        ),
    ],
)
def test_an_interpolation_has_the_length_and_size_that_are_asked_for(
    kind: str,
    more: tuple[str, ...],
    shape: tuple[int, int, int],
    place: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    told = ("--interpolation_frames=6", "--interpolation_width=32", *more)
    draw(place / kind, tmp_path, "--nogrid", *told)
    walk = frames(tmp_path / "interpolation.gif")
    # Pillow shows equal ones once, for as long as all of them.
    assert len(walk) == (3 if "--interpolation_through=classes" in more else 6)
    assert {frame.shape for frame in walk} == {shape}
    assert len({frame.tobytes() for frame in walk}) >= 3


def test_one_seed_walks_nowhere(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert draw(place / "plain", tmp_path, "--seeds=5") == ["samples.png"]


def test_a_film_has_all_grids_of_the_run(
    place: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    told = ("--interpolation_frames=0", "--film")
    monkeypatch.setenv("PATH", str(tmp_path))
    names = draw(place / "plain", tmp_path / "gif", *told)
    assert names == ["film.gif", "samples.png"]
    film = frames(tmp_path / "gif/film.gif")
    grid = pixels(place / "plain/samples/step-000002.png")
    assert len(film) == 2
    height, width = grid.shape[:2]
    # But for the 256 colours of a GIF.
    away = np.abs(film[0][:height, :width].astype(int) - grid)
    assert away.mean() < 8
    monkeypatch.setenv("PATH", str(bin_dir))
    names = draw(place / "plain", tmp_path / "both", *told)
    assert names == ["film.gif", "film.mp4", "samples.png"]
    content = (tmp_path / "both/film.mp4").read_bytes()
    assert content[4:8] == b"ftyp"
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "both/film.mp4"))
    described = next(reader)
    assert described["codec"] == "h264"
    assert described["size"] == (width, height + 16)
    first = np.frombuffer(next(reader), np.uint8).reshape(height + 16, width, 3)
    assert np.abs(first[:height].astype(int) - grid).mean() < 8
    reader.close()


@pytest.mark.parametrize("number", [1, 2, 239, 240, 241, 10_000])
def test_a_long_film_leaves_out_grids_evenly(number: int) -> None:
    grids = [film.Grid(100 * n, "") for n in range(number)]
    kept = film.thinned(grids)
    assert len(kept) == min(number, film.MOST_FRAMES)
    assert (kept[0], kept[-1]) == (grids[0], grids[-1])
    steps = [one.step for one in kept]
    gaps = {later - step for step, later in itertools.pairwise(steps)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 100


def test_drawing_changes_no_checkpoint(
    place: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    digests = []
    for _ in range(2):
        checkpoint_tool.run(["digest", f"{place}/classes/checkpoints"])
        digests.append(capsys.readouterr().out)
        draw(place / "classes", tmp_path, "--interpolation_frames=0")
        capsys.readouterr()
    assert digests[0] == digests[1]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.run(["sample", "--help"]) == errors.FINISHED
    page = capsys.readouterr().out
    for name in sample.Request.__dataclass_fields__:
        assert name in page
