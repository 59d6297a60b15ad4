"""Counts the modes of 25 Gaussians that a loss covers, on one CPU core.

    python -m tests.benchmarks.grid [--seeds=5] [--write] [dtrain flags]

The protocol is that of Lin et al. 2018, "PacGAN", and of VEEGAN before: 2,500
samples; one is of high quality within three deviations of the nearest mode; a
mode is covered by one such sample; the reverse KL is of the histogram of all
samples by their nearest mode, against the uniform one. Each run is a process of
`dtrain.main` with one thread. `--write` puts the table and the picture of the
first seed into docs/results.md and docs/grid.png.
"""

from __future__ import annotations

import io
import pathlib
import resource
import sys
import tempfile
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dtrain import errors
from dtrain.data import sources
from dtrain.data.sources import points
from dtrain.quality.samples import AVERAGE, RAW, Samples
from dtrain.run import export
from tests import runs
from tests.benchmarks import command
from tests.benchmarks.pages import replace_table

DATASET, NAME = "points:grid", "grid"
NUM_SAMPLES = 2500
# The rows, by the flags of each; the second has another loss, and no more.
RECIPES = {
    "relativistic, R1 + R2 (`--preset=mlp`)": ("--preset=mlp",),
    "plain": (
        *("--preset=mlp", "--loss=non_saturating", "--r1_gamma=0"),
        *("--r2_gamma=0", "--end_gamma_factor=1"),
    ),
}
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1"
)
PICTURE = runs.ROOT / "docs/grid.png"
_HEAD = (
    "| | weights | modes of 25 | high quality | reverse KL | CPU seconds |",
    "|---|---|---|---|---|---|",
)


class Coverage(NamedTuple):
    """What the protocol says of samples.

    Attributes:
        modes: that are covered.
        high_quality: share of samples, in [0, 1].
        reverse_kl: at least 0; (k - 1) / 2n is expected of the data itself.
    """

    modes: int
    high_quality: float
    reverse_kl: float


def coverage(
    samples: npt.NDArray[np.floating], mixture: points.Mixture
) -> Coverage:
    """Measures samples by the protocol.

    Args:
        samples: [n, 2], as the data is.
        mixture: of the data.
    """
    modes = mixture.modes
    distances = np.linalg.norm(samples[:, None] - modes[None], axis=2)
    nearest, number = distances.argmin(1), len(modes)
    is_fine = distances.min(1) <= 3 * mixture.deviation
    shares = np.bincount(nearest, minlength=number) / len(samples)
    shown = shares[shares > 0]
    return Coverage(
        int((np.bincount(nearest[is_fine], minlength=number) > 0).sum()),
        float(is_fine.mean()),
        float((shown * np.log(shown * number)).sum()),
    )


def drawn(run_dir: str, weights: str) -> npt.NDArray[np.float64]:
    """Draws the samples of a run, as the data is."""
    trained = export.restore(run_dir)
    data = sources.open_data(trained.config)
    samples = Samples(trained.gan, data, 0, weights)
    samples.prepare()
    made, _ = samples.make(tf.range(NUM_SAMPLES, dtype=tf.int64))
    found = points.of_run(trained.config)
    assert found
    return found.plane.to_points(made.numpy())


def trained(run_dir: str, *flags: str) -> float:
    """Trains to the end; returns the seconds of one core that it took."""
    began = _cpu_secs()
    code, output = runs.finish(
        runs.start_anew(
            *("dtrain.main", f"--run_dir={run_dir}", *flags), **ONE_THREAD
        ),
        timeout=None,
    )
    assert code == errors.FINISHED, output
    return _cpu_secs() - began


def _cpu_secs() -> float:
    """Returns what the processes took that have been waited for."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _row(name: str, weights: str, rows: list[Coverage], secs: str) -> str:
    cells = (
        " ".join(str(each.modes) for each in rows),
        " ".join(f"{100 * each.high_quality:.0f}" for each in rows) + " %",
        " ".join(f"{each.reverse_kl:.3f}" for each in rows),
    )
    return f"| {name} | {weights} | {' | '.join(cells)} | {secs} |"


def _draw(samples: dict[str, npt.NDArray[np.float64]]) -> bytes:
    """Draws samples over the modes; returns a PNG file."""
    figure = Figure(figsize=(10, 5.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(samples), sharey=True)
    mixture = points.MIXTURES[NAME]
    for axes, (name, values) in zip(panels, samples.items(), strict=True):
        found = coverage(values, mixture)
        axes.scatter(*mixture.modes.T, s=220, c="#dddddd", label="modes")
        axes.scatter(*values.T, s=1.5, c="#0072b2", label="samples")
        axes.set(xlim=(-5, 5), ylim=(-5, 5), aspect="equal")
        axes.set_title(
            f"{name.partition(' (')[0]}: {found.modes} modes, "
            f"{found.high_quality:.0%} of high quality",
            fontsize=11,
        )
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def main() -> None:
    """Trains, measures and prints the table."""
    is_written = "--write" in sys.argv
    arguments = [each for each in sys.argv[1:] if each != "--write"]
    own, rest = command.own_flags(arguments, {"seeds": 5})
    lines, shown = list(_HEAD), {}
    print("\n".join(lines))
    for name, flags in RECIPES.items():
        found: dict[str, list[Coverage]] = {RAW: [], AVERAGE: []}
        secs = []
        for seed in range(own["seeds"]):
            with tempfile.TemporaryDirectory() as place:
                run_dir = str(pathlib.Path(place) / "run")
                told = (f"--dataset={DATASET}", f"--seed={seed}", *flags)
                secs.append(trained(run_dir, *told, *rest))
                for weights, rows in found.items():
                    samples = drawn(run_dir, weights)
                    shown.setdefault(name, samples)
                    rows.append(coverage(samples, points.MIXTURES[NAME]))
        took = f"{min(secs):.0f} to {max(secs):.0f}"
        for weights, rows in found.items():
            lines.append(_row(name, weights, rows, took))
            print(lines[-1], flush=True)
    if is_written:
        replace_table(runs.ROOT / "docs/results.md", "grid", lines)
        PICTURE.write_bytes(_draw(shown))


if __name__ == "__main__":
    main()
