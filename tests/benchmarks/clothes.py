"""Trains presets on Fashion-MNIST, each for an hour of one CPU core.

    python -m tests.benchmarks.clothes [--write] [--cpu_secs=3600] [NAME ...]

60,000 pictures of 28 pixels (Debian's package dataset-fashion-mnist), with few
channels. The time is the process's own: what else the machine does takes none
of it, and two cores give it in half an hour. Every few thousand images the
moving averages are measured (5,000 samples against as many pictures, by a
classifier that is trained on the labels), the best checkpoint is kept, and
measured once more by pixels. `--write` puts what was trained into
docs/clothes.csv, and table and curves of all that is there, and samples, into
docs/results.md.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dtrain import errors
from dtrain.quality import figure_log
from tests import runs
from tests.benchmarks import command
from tests.benchmarks.pages import replace_table

DATASET = "--dataset=idx:/usr/share/datasets/fashion-mnist"
BATCH_SIZE = 64
NETWORKS = ("generator", "discriminator")
# By preset: channels, and what scales with a run of some hundred thousand
# images in place of millions.
WAYS = {
    "dcgan": ("--base_channels=32", "--ema_half_life_images=10000"),
    "sngan": ("--base_channels=16", "--ema_half_life_images=5000"),
    "biggan_small": (
        *("--base_channels=12", "--conditional"),
        "--ema_half_life_images=5000",
    ),
    "stylegan2": (
        *("--base_channels=16", "--latent_size=128", "--r1_gamma=0.1"),
        *("--model_flag=mapping_layers=2", "--ema_half_life_images=5000"),
    ),
    "r3gan": (
        *("--base_channels=16", "--ema_half_life_images=5000"),
        *("--burn_in_images=200000", "--r1_gamma=5", "--r2_gamma=5"),
        *(f"--{network}_learning_rate=5e-4" for network in NETWORKS),
    ),
}
CURVES = runs.ROOT / "docs/clothes.png"
POINTS = runs.ROOT / "docs/clothes.csv"
SAMPLES = runs.ROOT / "docs"
_EVERY_IMAGES = 19_200
_HEAD = (
    "| preset | images | distance, best | at images | by pixels | floor |",
    "|---|---|---|---|---|---|",
)


class Point(NamedTuple):
    """What a preset has reached after some images; a row of the CSV file.

    Attributes:
        preset: its name.
        images: that it has seen.
        distance: the Fréchet distance by the classifier.
        floor: of one half of the pictures against the other, likewise.
        pixels: the Fréchet distance by pixels; NaN but for the best.
    """

    preset: str
    images: int
    distance: float
    floor: float
    pixels: float


def train_one(
    name: str, cpu_secs: float, place: pathlib.Path
) -> tuple[list[Point], np.ndarray]:
    """Trains a preset for some time, and measures its best checkpoint.

    Args:
        name: of `WAYS`.
        cpu_secs: that it is trained for, its start and figures included.
        place: an empty directory.

    Returns:
        What it has reached; and samples of the best, uint8 [H, W].
    """
    run_dir, every = place / name, _EVERY_IMAGES // BATCH_SIZE
    process = runs.start_anew(
        *("dtrain.main", f"--preset={name}", DATASET, *WAYS[name]),
        *(f"--run_dir={run_dir}", f"--batch_size={BATCH_SIZE}"),
        *("--num_steps=1000000", "--keep_best=1", "--sample_every_steps=0"),
        *(f"--checkpoint_every_steps={every}", "--evaluate_num_images=5000"),
        f"--evaluate_every_steps={every}",
        "--best_metric=frechet_distance",
        "--evaluate_figures=frechet_distance",
    )
    while cpu_secs_of(process.pid) < cpu_secs:
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise SystemExit(process.communicate(timeout=1)[0])
    process.terminate()
    code, output = runs.finish(process, timeout=None)
    assert code == errors.RUN_AGAIN, output
    lines = figure_log.read(str(run_dir))
    _run(
        *("dtrain.evaluate", f"--run_dir={run_dir}", "--checkpoint=best"),
        *("--extractor=pixels", "--figures=frechet_distance"),
        *("--num_images=5000", "--nearest=0"),
    )
    by_pixels = figure_log.read(str(run_dir))[-1]
    _run(
        *("dtrain.sample", f"--run_dir={run_dir}", "--checkpoint=best"),
        *("--seeds=0-31", f"--output_dir={place}/drawn-{name}"),
        "--interpolation_frames=0",
    )
    [grid] = (place / f"drawn-{name}").glob("*.png")
    points = [
        Point(
            name,
            line.step * BATCH_SIZE,
            _distance(line.figures),
            _distance(line.floor),
            _distance(by_pixels.figures)
            if line.step == by_pixels.step
            else math.nan,
        )
        for line in lines
    ]
    return points, np.asarray(Image.open(grid).convert("L"))


def cpu_secs_of(pid: int) -> float:
    """Returns what a process of this user has had of the cores; 0 after it."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except FileNotFoundError:
        return 0.0
    user, system = fields[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _run(*arguments: str) -> None:
    code, output = runs.finish(runs.start_anew(*arguments), timeout=None)
    assert code == errors.FINISHED, output


def _distance(figures: Mapping[str, float | None]) -> float:
    value = figures["frechet_distance"]
    return math.inf if value is None else value


def row(points: Sequence[Point]) -> str:
    """Returns the row of a preset."""
    best = min(points, key=lambda point: point.distance)
    cells = [
        f"{points[-1].images:,}",
        f"{best.distance:.1f}",
        f"{best.images:,}",
        f"{best.pixels:.2f}",
        f"{best.floor:.2f}",
    ]
    return f"| {best.preset} | {' | '.join(cells)} |"


def read() -> dict[str, list[Point]]:
    """Returns what is in the CSV file, by preset."""
    kept: dict[str, list[Point]] = {}
    if POINTS.exists():
        with POINTS.open(newline="") as file:
            for each in csv.DictReader(file):
                numbers = [float(each[name]) for name in Point._fields[2:]]
                point = Point(each["preset"], int(each["images"]), *numbers)
                kept.setdefault(point.preset, []).append(point)
    return kept


def write(trained: Mapping[str, Sequence[Point]]) -> None:
    """Writes the CSV file, the table and the curves, of all presets."""
    with POINTS.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(Point._fields)
        for points in trained.values():
            table.writerows(points)
    rows = [row(points) for points in trained.values()]
    replace_table(runs.ROOT / "docs/results.md", "clothes", [*_HEAD, *rows])
    CURVES.write_bytes(draw(trained))


def draw(trained: Mapping[str, Sequence[Point]]) -> bytes:
    """Draws distances over images; returns a PNG file."""
    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, points in trained.items():
        images = [point.images for point in points]
        axes.plot(images, [point.distance for point in points], label=name)
    axes.set(xlabel="images seen", ylabel="Fréchet distance, by a classifier")
    axes.set_yscale("log")
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def main() -> None:
    """Trains, measures and prints the table."""
    is_written = "--write" in sys.argv
    arguments = [each for each in sys.argv[1:] if each != "--write"]
    own, names = command.own_flags(arguments, {"cpu_secs": 3600})
    print("\n".join(_HEAD), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for name in names or WAYS:
            place = pathlib.Path(directory)
            points, samples = train_one(name, own["cpu_secs"], place)
            print(row(points), flush=True)
            if is_written:
                kept = {**read(), name: points}
                write({each: kept[each] for each in WAYS if each in kept})
                Image.fromarray(samples).save(SAMPLES / f"clothes_{name}.png")


if __name__ == "__main__":
    main()
