"""Translates outlines into shapes, with pix2pix and with CycleGAN.

    python -m tests.benchmarks.translation [--write] [NAME ...] [--steps=5000]

The data is made here: circles, squares and diamonds of 32 pixels, each kind of
a colour of its own, and their white outlines. pix2pix learns from pairs,
CycleGAN from outlines and from shapes of other outlines. Of 200 others the
distance of the translation to the shape (the mean of |a - b|, in [0, 2]) is
printed beside that of the outline itself; `--write` puts it and a picture into
docs/results.md.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from dtrain import errors
from dtrain.run import export
from tests import runs
from tests.benchmarks import command
from tests.benchmarks.pages import replace_table

SIDE, NUM_PAIRS, NUM_OTHERS = 32, 2000, 200
PICTURE = runs.ROOT / "docs/translation.png"
_HEAD = ("| | pairs | L1 | of the outline itself |", "|---|---|---|---|")
# Of circles, squares and diamonds.
_COLOURS = ((213, 94, 0), (0, 158, 115), (86, 180, 233))
Images = npt.NDArray[np.uint8]


class Way(NamedTuple):
    """How a preset is trained here.

    Attributes:
        flags: of the run, where PLACE stands for the data.
        network: that turns outlines into shapes.
        pairs: what it is told of pairs.
    """

    flags: tuple[str, ...]
    network: str
    pairs: str


WAYS = {
    "pix2pix": Way(
        (
            "--dataset=npz:PLACE/shapes.npz",
            "--paired=given=npz:PLACE/outlines.npz",
            *("--base_channels=16", "--batch_size=8"),
        ),
        "generator",
        "all",
    ),
    "cyclegan": Way(
        (
            "--dataset=npz:PLACE/outlines.npz",
            "--unpaired=other=npz:PLACE/others.npz",
            *("--base_channels=8", "--batch_size=4"),
        ),
        "x_to_y",
        "none",
    ),
}


def pairs(number: int, seed: int) -> tuple[Images, Images]:
    """Makes outlines and shapes, uint8 [n, 32, 32, 3] each.

    Args:
        number: of each.
        seed: other shapes for each.
    """
    numbers = np.random.default_rng(seed)
    rows, columns = np.indices((SIDE, SIDE))
    outlines = np.zeros((number, SIDE, SIDE, 3), np.uint8)
    shapes = outlines.copy()
    for index in range(number):
        radius = numbers.integers(6, 13)
        down, right = numbers.integers(radius + 1, SIDE - radius - 1, 2)
        kind = numbers.integers(3)
        distance = (
            np.hypot(rows - down, columns - right),
            np.maximum(abs(rows - down), abs(columns - right)),
            abs(rows - down) + abs(columns - right),
        )[kind]
        shapes[index][distance < radius] = _COLOURS[kind]
        outlines[index][abs(distance - radius + 1) < 1] = 255
    return outlines, shapes


def write(place: pathlib.Path) -> None:
    """Writes the data sets that `WAYS` names."""
    outlines, shapes = pairs(NUM_PAIRS, 0)
    _, others = pairs(NUM_PAIRS, 1)
    for name, images in (
        ("outlines", outlines),
        ("shapes", shapes),
        ("others", others),
    ):
        np.savez(place / f"{name}.npz", images=images)


def translated(run_dir: str, network: str, outlines: Images) -> Images:
    """Translates outlines by the moving average of a run."""
    average = export.restore(run_dir).gan.averages[network]
    numbers = np.random.default_rng(0)
    given = outlines.astype(np.float32) / 127.5 - 1.0
    # pix2pix drops features in drawing, too.
    drawn = [
        numbers.random((len(given), *each.shape[1:]), np.float32)
        for each in average.inputs[1:]
    ]
    made = np.asarray(average([given, *drawn] if drawn else given))
    return np.round((np.clip(made, -1, 1) + 1.0) * 127.5).astype(np.uint8)


def distance(one: Images, two: Images) -> float:
    """Returns the mean of |a - b| of images in [-1, 1]."""
    return float(np.abs(one.astype(float) - two.astype(float)).mean() / 127.5)


def main() -> None:
    """Trains, measures and prints the table."""
    is_written = "--write" in sys.argv
    arguments = [each for each in sys.argv[1:] if each != "--write"]
    own, names = command.own_flags(arguments, {"steps": 5000})
    outlines, shapes = pairs(NUM_OTHERS, 2)
    shown, lines = [outlines], list(_HEAD)
    print("\n".join(lines), flush=True)
    for name in names or WAYS:
        way = WAYS[name]
        with tempfile.TemporaryDirectory() as directory:
            place = pathlib.Path(directory)
            write(place)
            told = [each.replace("PLACE", directory) for each in way.flags]
            code, output = runs.finish(
                runs.start_anew(
                    *("dtrain.main", f"--preset={name}", *told),
                    *(f"--num_steps={own['steps']}", f"--run_dir={place}/run"),
                    *("--sample_every_steps=0", "--ema_half_life_images=1000"),
                ),
                timeout=None,
            )
            assert code == errors.FINISHED, output
            made = translated(f"{place}/run", way.network, outlines)
        shown.append(made)
        itself = distance(outlines, shapes)
        lines.append(
            f"| {name} | {way.pairs} | {distance(made, shapes):.3f} | "
            f"{itself:.3f} |"
        )
        print(lines[-1], flush=True)
    if is_written:
        replace_table(runs.ROOT / "docs/results.md", "translation", lines)
        rows = [np.concatenate(each[:16], axis=1) for each in (*shown, shapes)]
        picture = Image.fromarray(np.concatenate(rows))
        picture.resize(
            (2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST
        ).save(PICTURE)


if __name__ == "__main__":
    main()
