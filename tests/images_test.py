from __future__ import annotations

import pathlib

import numpy as np
import pytest
from PIL import Image

from dtrain.record import images


def test_to_uint8_covers_the_range() -> None:
    values = [-1.0, 0.0, 1.0, -1.5, 7.0, 2 * 200 / 255 - 1]
    np.testing.assert_array_equal(
        images.to_uint8(values), [0, 128, 255, 0, 255, 200]
    )


def test_to_uint8_inverts_every_grey_level() -> None:
    levels = np.arange(256)
    np.testing.assert_array_equal(
        images.to_uint8(levels / np.float32(127.5) - 1), levels
    )


def test_grid_places_images_row_by_row() -> None:
    # Three 1x2 images in two columns with a frame of one pixel.
    batch = np.array([-1.0, 0.2, 1.0], np.float32)
    batch = np.broadcast_to(batch[:, None, None, None], (3, 1, 2, 1))
    grid = images.make_grid(batch, columns=2, padding=1, min_width=0)
    b = 64
    np.testing.assert_array_equal(
        grid[..., 0],
        [
            [b, b, b, b, b, b, b],
            [b, 0, 0, b, 153, 153, b],
            [b, b, b, b, b, b, b],
            [b, 255, 255, b, b, b, b],
            [b, b, b, b, b, b, b],
        ],
    )


@pytest.mark.parametrize(
    ("size", "columns", "factor"),
    # 8 digits: 8 * 9 + 1 = 73 pixels, 8 times that is the first above 512.
    [(8, 8, 8), (28, 10, 2), (128, 10, 1), (8, 1, 52)],
)
def test_grid_is_enlarged_by_a_whole_factor(
    size: int, columns: int, factor: int
) -> None:
    batch = np.random.default_rng(0).uniform(-1, 1, (columns, size, size, 3))
    small = images.make_grid(batch, columns, min_width=0)
    grid = images.make_grid(batch, columns)
    assert grid.shape[1] == factor * small.shape[1] >= 512
    np.testing.assert_array_equal(grid[::factor, ::factor], small)
    np.testing.assert_array_equal(
        grid[factor - 1 :: factor, factor - 1 :: factor], small
    )


def test_grid_shows_what_is_transparent() -> None:
    batch = np.ones((2, 1, 1, 4), np.float32)
    batch[0, ..., 3] = -1
    grid = images.make_grid(batch, columns=2, padding=0, min_width=0)
    assert grid.tolist() == [[[64] * 3, [255] * 3]]
    grey = batch[..., 2:].repeat(2, axis=1)
    grid = images.make_grid(grey, columns=2, padding=0, min_width=0)
    assert grid.tolist() == [[[64], [255]]] * 2


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_keeps_every_pixel(tmp_path: pathlib.Path, channels: int) -> None:
    path = tmp_path / "samples" / "step-000001.png"
    image = np.random.default_rng(0).integers(
        0, 256, (5, 7, channels), np.uint8
    )
    images.write_png(str(path), image)
    with Image.open(path) as read:
        assert read.format == "PNG"
        np.testing.assert_array_equal(
            np.reshape(np.asarray(read), image.shape), image
        )
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_gif_has_every_frame(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "walk.gif"
    frames = [np.full((6, 6, 1), level, np.uint8) for level in (0, 128, 255)]
    images.write_gif(str(path), frames, milliseconds=50)
    with Image.open(path) as gif:
        assert (getattr(gif, "n_frames", 1), gif.info["loop"]) == (3, 0)
        for index, frame in enumerate(frames):
            gif.seek(index)
            assert gif.info["duration"] == 50
            np.testing.assert_array_equal(
                np.asarray(gif.convert("L")), frame[..., 0]
            )
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_png_replaces_the_one_that_is_there(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "grid.png"
    for level in (10, 20):
        images.write_png(str(path), np.full((2, 2, 1), level, np.uint8))
    with Image.open(path) as read:
        np.testing.assert_array_equal(np.asarray(read), [[20, 20], [20, 20]])


def test_failed_write_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    in_the_way = tmp_path / "grid.png"
    in_the_way.mkdir()
    with pytest.raises(IsADirectoryError):
        images.write_png(str(in_the_way), np.zeros((2, 2, 1), np.uint8))
    assert list(tmp_path.iterdir()) == [in_the_way]
