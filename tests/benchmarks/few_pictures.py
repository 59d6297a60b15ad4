"""Trains on few pictures, with and without augmentation.

    python -m tests.benchmarks.few_pictures [--write] [NAME ...] [--seeds=2]

Of the digits 180 are trained on, of Fashion-MNIST 100 (Debian's package
dataset-fashion-mnist). Samples are compared with 1,617 other digits, and with
the 10,000 clothes of the test set, by a classifier that is trained on these;
the copy score is of the pictures that were trained on, by pixels. Five
checkpoints of each run are measured; the table has the best and the last, and
`--write` puts it into docs/results.md.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dtrain import errors
from dtrain.data import digits
from dtrain.data.sources import idx
from dtrain.quality import figure_log
from tests import runs
from tests.benchmarks import command
from tests.benchmarks.pages import replace_table

CLOTHES = "/usr/share/datasets/fashion-mnist"
WAYS = {
    "none": (),
    "diff": ("--augment=diff",),
    "ada": ("--augment=ada", "--augment_ramp_images=100000"),
}
_NUM_CHECKPOINTS = 5
_HEAD = (
    "| pictures | `--augment` | seed | distance, best | last | copies, last |",
    "|---|---|---|---|---|---|",
)

Labelled = tuple[np.ndarray, np.ndarray]


class Few(NamedTuple):
    """Pictures of which few are trained on.

    Attributes:
        load: returns those that are trained on, and the others.
        steps: of a run.
        flags: of a run.
    """

    load: Callable[[], tuple[Labelled, Labelled]]
    steps: int
    flags: tuple[str, ...]


def _digits() -> tuple[Labelled, Labelled]:
    images, labels = digits.read()
    chosen = np.random.default_rng(0).permutation(len(images))
    few, others = chosen[:180], chosen[180:]
    return (images[few], labels[few]), (images[others], labels[others])


def _clothes() -> tuple[Labelled, Labelled]:
    of_train, of_test = (
        (
            idx.read_idx(f"{CLOTHES}/{kind}-images-idx3-ubyte.gz", 3),
            idx.read_idx(f"{CLOTHES}/{kind}-labels-idx1-ubyte.gz", 1),
        )
        for kind in ("train", "t10k")
    )
    few = np.random.default_rng(0).permutation(len(of_train[1]))[:100]
    images, labels = of_train
    return (images[few], labels[few]), of_test


FEW = {
    "digits": Few(_digits, 15_000, ("--batch_size=64",)),
    "clothes": Few(_clothes, 3000, ("--batch_size=32", "--base_channels=16")),
}


def _run(*arguments: str) -> None:
    code, output = runs.finish(runs.start_anew(*arguments), timeout=None)
    assert code == errors.FINISHED, output


def _measured(run_dir: pathlib.Path, *flags: str) -> list[figure_log.Line]:
    """Measures the checkpoints of a run; returns the lines that this made."""
    before = len(figure_log.read(str(run_dir)))
    _run(*("dtrain.evaluate", f"--run_dir={run_dir}", "--nearest=0"), *flags)
    return figure_log.read(str(run_dir))[before:]


def row(name: str, way: str, seed: int, place: pathlib.Path) -> str:
    """Trains once, and returns the row of the table.

    Args:
        name: of the pictures.
        way: of `WAYS`.
        seed: of the run.
        place: where the files of `write` are, and the run is put.
    """
    few, run_dir = FEW[name], place / f"{name}-{way}-{seed}"
    every = few.steps // _NUM_CHECKPOINTS
    _run(
        *("dtrain.main", f"--run_dir={run_dir}", f"--seed={seed}"),
        *(f"--dataset=npz:{place}/{name}.npz", f"--num_steps={few.steps}"),
        *(f"--checkpoint_every_steps={every}", "--sample_every_steps=0"),
        *(*few.flags, *WAYS[way]),
    )
    distances = [
        line.figures["frechet_distance"] or float("nan")
        for line in _measured(
            run_dir,
            f"--dataset=npz:{place}/{name}-others.npz",
            "--checkpoint=all",
            "--figures=frechet_distance",
        )
    ]
    [copies] = _measured(run_dir, "--figures=copy_score", "--extractor=pixels")
    cells = f"{min(distances):.1f} | {distances[-1]:.1f}"
    score = copies.figures["copy_score"]
    return f"| {name} | {way} | {seed} | {cells} | {score:.2f} |"


def write(name: str, place: pathlib.Path) -> None:
    """Writes the pictures that are trained on, and the others.

    Args:
        name: of the pictures.
        place: an empty directory.
    """
    for end, (images, labels) in zip(
        ("", "-others"), FEW[name].load(), strict=True
    ):
        np.savez(place / f"{name}{end}.npz", images=images, labels=labels)


def main() -> None:
    """Trains, measures and prints the table."""
    is_written = "--write" in sys.argv
    arguments = [each for each in sys.argv[1:] if each != "--write"]
    own, names = command.own_flags(arguments, {"seeds": 2})
    lines = list(_HEAD)
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        for name in names or FEW:
            write(name, place)
            for seed in range(own["seeds"]):
                for way in WAYS:
                    lines.append(row(name, way, seed, place))
                    print(lines[-1], flush=True)
    if is_written:
        page = runs.ROOT / "docs/results.md"
        replace_table(page, "few_pictures", lines)


if __name__ == "__main__":
    main()
