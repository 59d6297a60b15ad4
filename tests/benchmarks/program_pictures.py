"""Draws what each of `tests/programs` has learned, as docs/programs.png.

    python -m tests.benchmarks.program_pictures [--steps=4000] FILE [NAME ...]

Each is trained on the digits or on shapes in colour, as its test has it, with
the sizes of `tests.benchmarks.programs`; the picture has the upper left of the
grid that the run draws at its end.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

import numpy as np
from PIL import Image, ImageDraw

from dtrain import main as dtrain_main
from tests import programs_test
from tests.benchmarks import command, programs

SIDE, TITLE, GAP, COLUMNS = 200, 14, 6, 4


def trained(name: str, place: pathlib.Path, num_steps: int) -> Image.Image:
    """Trains a program, and returns its grid, cut to a square."""
    run_dir = place / name
    told = programs_test.flags(name, place)
    code = dtrain_main.run(
        [
            *("main", *told, *programs.SIZES, "--steps_per_loop=50"),
            *(f"--num_steps={num_steps}", "--sample_every_steps=0"),
            *("--backup_every_secs=0", f"--run_dir={run_dir}"),
        ]
    )
    assert code == 0, name
    grid = Image.open(run_dir / f"samples/step-{num_steps:06}.png")
    # Whole pixels of the digits, and of wider pictures.
    factor = -(-SIDE // min(grid.size))
    grid = grid.resize(
        (grid.width * factor, grid.height * factor), Image.Resampling.NEAREST
    )
    return grid.convert("RGB").crop((0, 0, SIDE, SIDE))


def sheet(pictures: dict[str, Image.Image]) -> Image.Image:
    """Puts pictures beside each other, with their names."""
    rows = -(-len(pictures) // COLUMNS)
    width, height = SIDE + GAP, SIDE + TITLE + GAP
    whole = Image.new("RGB", (COLUMNS * width, rows * height), "white")
    draw = ImageDraw.Draw(whole)
    for number, (name, picture) in enumerate(pictures.items()):
        left, top = number % COLUMNS * width, number // COLUMNS * height
        draw.text((left + 2, top), name, fill="black")
        whole.paste(picture, (left, top + TITLE))
    return whole


def main() -> None:
    """Trains all of them, one after another, and writes the picture."""
    own, (path, *names) = command.own_flags(sys.argv[1:], {"steps": 4000})
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        programs_test.write_data(place)
        whole = sheet(
            {
                name: trained(name, place, own["steps"])
                for name in names or programs_test.PROGRAMS
            }
        )
    colours = len(np.unique(np.asarray(whole).reshape(-1, 3), axis=0))
    assert colours > 1, "nothing was drawn"
    whole.save(path, optimize=True)


if __name__ == "__main__":
    main()
