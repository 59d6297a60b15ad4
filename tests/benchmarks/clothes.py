"""Trains presets on Fashion-MNIST, each for half an hour.

    python -m tests.benchmarks.clothes [--write] [--secs=1800] [NAME ...]

60,000 pictures of 28 pixels (Debian's package dataset-fashion-mnist), with few
channels, for this is for two CPU cores. Every few thousand images the moving
averages are measured (5,000 samples against as many pictures, by a classifier
that is trained on the labels), the best checkpoint is kept, and measured once
more by pixels. `--write` puts table, curves and samples into docs/results.md;
run it where nothing else runs.
"""

from __future__ import annotations

import io
import pathlib
import sys
import tempfile
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dtrain import errors
from dtrain.quality import figure_log
from tests import runs
from tests.benchmarks import train
from tests.benchmarks.pages import replace_table

DATASET = "--dataset=idx:/usr/share/datasets/fashion-mnist"
BATCH_SIZE = 64
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
        *("--base_channels=64", "--ema_half_life_images=5000"),
        *("--burn_in_images=200000", "--r1_gamma=0.5", "--r2_gamma=0.5"),
    ),
}
CURVES = runs.ROOT / "docs/clothes.png"
SAMPLES = runs.ROOT / "docs/clothes_samples.png"
_EVERY_IMAGES = 19_200
_HEAD = (
    "| preset | images | distance, best | at images | by pixels | floor |",
    "|---|---|---|---|---|---|",
)


class Trained(NamedTuple):
    """What a preset has reached.

    Attributes:
        images: that it has seen.
        lines: of figures.jsonl, by the classifier.
        pixels: the Fréchet distance of the best checkpoint, by pixels.
        samples: of the best checkpoint, uint8 [H, W].
    """

    images: int
    lines: list[figure_log.Line]
    pixels: float
    samples: np.ndarray


def train_one(name: str, secs: int, place: pathlib.Path) -> Trained:
    """Trains a preset for some time, and measures its best checkpoint.

    Args:
        name: of `WAYS`.
        secs: that it is trained for, its start included.
        place: an empty directory.
    """
    run_dir, every = place / name, _EVERY_IMAGES // BATCH_SIZE
    code, output = _run(
        *("dtrain.main", f"--preset={name}", DATASET, *WAYS[name]),
        *(f"--run_dir={run_dir}", f"--batch_size={BATCH_SIZE}"),
        *("--num_steps=1000000", f"--stop_after_secs={secs}"),
        *(f"--checkpoint_every_steps={every}", "--keep_best=1"),
        *(f"--evaluate_every_steps={every}", "--evaluate_num_images=5000"),
        *("--best_metric=frechet_distance", "--sample_every_steps=0"),
        "--evaluate_figures=frechet_distance",
    )
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
    return Trained(
        int(runs.metrics(run_dir)[-1]["step"]) * BATCH_SIZE,
        lines,
        by_pixels.figures["frechet_distance"] or float("nan"),
        np.asarray(Image.open(grid).convert("L")),
    )


def _run(*arguments: str) -> tuple[int, str]:
    return runs.finish(runs.start_anew(*arguments), timeout=None)


def row(name: str, trained: Trained) -> str:
    """Returns the row of the table."""
    best = min(trained.lines, key=_distance)
    cells = [
        f"{trained.images:,}",
        f"{_distance(best):.1f}",
        f"{best.step * BATCH_SIZE:,}",
        f"{trained.pixels:.2f}",
        f"{best.floor['frechet_distance']:.2f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _distance(line: figure_log.Line) -> float:
    value = line.figures["frechet_distance"]
    return float("inf") if value is None else value


def draw(trained: dict[str, Trained]) -> bytes:
    """Draws distances over images; returns a PNG file."""
    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, each in trained.items():
        images = [line.step * BATCH_SIZE for line in each.lines]
        axes.plot(images, [_distance(line) for line in each.lines], label=name)
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
    own, names = train.own_flags(arguments, {"secs": 1800})
    lines, trained = list(_HEAD), {}
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for name in names or WAYS:
            place = pathlib.Path(directory)
            trained[name] = train_one(name, own["secs"], place)
            lines.append(row(name, trained[name]))
            print(lines[-1], flush=True)
    if is_written:
        replace_table(runs.ROOT / "docs/results.md", "clothes", lines)
        CURVES.write_bytes(draw(trained))
        rows = np.concatenate([each.samples for each in trained.values()])
        Image.fromarray(rows).save(SAMPLES)


if __name__ == "__main__":
    main()
