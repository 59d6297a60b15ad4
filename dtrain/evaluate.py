"""Measures what the checkpoints of a run are worth.

It is started by

    python -m dtrain.evaluate --run_dir=runs/default --checkpoint=all
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from dtrain import errors, flags
from dtrain.config import figures
from dtrain.errors import UserError
from dtrain.storage import startup

NEWEST, BEST, ALL = "newest", "best", "all"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    run_dir: str = flags.directory(
        "Directory of the run, on a disk or gs://. It may be training."
    )
    checkpoint: str = flags.field(
        NEWEST,
        flags.FLAGS,
        "Which of its checkpoints: newest, best (of those that were measured "
        "before), all, or a step.",
    )
    figures: str = flags.field(
        "",
        flags.FLAGS,
        "Names with commas between them, as frechet_distance,recall.",
        shown="all that data, model and extractor allow",
    )
    extractor: str = flags.field(
        "auto",
        flags.FLAGS,
        "What makes features of images: classifier (trained here on the "
        "labels), pixels, inception:FILE (the graph of the original FID; "
        "inception:FILE#DIGEST checks it) or your own Keras model, "
        "package.module:make. auto is classifier where there are labels, and "
        "else pixels.",
    )
    num_images: int = flags.field(
        10_000, flags.FLAGS, "Samples that are drawn.", below=2**31
    )
    num_real: int = flags.field(
        0,
        flags.FLAGS,
        "Real images that they are compared with, at most.",
        shown="as many as samples",
        minimum=0,
        below=2**31,
    )
    seed: int = flags.field(
        0,
        flags.FLAGS,
        "Of the latents, and of which real images are taken.",
        minimum=0,
        below=2**31,
    )
    weights: str = flags.field(
        "average",
        flags.FLAGS,
        "Whether the moving averages draw, or the networks themselves.",
        choices=("average", "raw"),
    )
    nearest: int = flags.field(
        8,
        flags.FLAGS,
        "Samples that RUN_DIR/nearest/step-N.png shows beside the training "
        "images that are nearest to them; 0 draws none.",
        minimum=0,
        below=65,
    )
    dataset: str = flags.field(
        "",
        flags.FLAGS,
        "Where the data is now, as --dataset of training takes it.",
        shown="that of the run",
    )
    data_dir: str = flags.field(
        "",
        flags.FLAGS,
        "Where TFDS keeps prepared data sets.",
        shown="that of the run",
    )
    strategy: str = flags.field(
        "default",
        flags.FLAGS,
        "default: the first device. mirrored: all GPUs of this machine.",
        choices=("default", "mirrored"),
    )
    num_devices: int = flags.field(
        0,
        flags.FLAGS,
        "Devices that mirrored uses, as in training.",
        shown="all GPUs, or one CPU",
        minimum=0,
        below=65,
    )
    model: str = flags.field(
        "",
        flags.FLAGS,
        "Model of the run, package.module:make. What config.json names is "
        "imported only if it is named here, too.",
        shown="a built-in one",
    )
    cache_dir: str = flags.field(
        "",
        flags.FLAGS,
        "Where classifiers, and what extractors say of real images, are kept.",
        shown="~/.cache/dtrain",
    )

    def __post_init__(self) -> None:
        flags.check(self)
        figures.chosen("figures", self.figures)
        is_named = self.checkpoint in (NEWEST, BEST, ALL)
        if not is_named and not self.checkpoint.isdecimal():
            raise UserError(
                f"checkpoint ({self.checkpoint}) must be {NEWEST}, {BEST}, "
                f"{ALL} or a step, such as 1000"
            )


_PAGE = flags.Page(
    "python -m dtrain.evaluate",
    """\
Measures what the checkpoints of a run are worth, prints the figures with how
they were measured, and adds a line for each to RUN_DIR/figures.jsonl. What was
measured before in the same way is not measured again. See docs/quality.md.""",
    Options,
    usage="--run_dir=DIR [--flag=value ...]",
)


def run(arguments: Sequence[str]) -> int:
    """Measures as a command line says; returns the exit code of the process.

    Args:
        arguments: the command line, the program's name first.

    Raises:
        UserError: the command line or the run is wrong.
        StorageError: the disk or the store failed.
    """
    if flags.answer(arguments[1:], _PAGE.render):
        return errors.FINISHED
    options = Options(**flags.parse(Options, arguments))
    startup.import_tensorflow()
    # Here, after `startup.import_tensorflow`, which keeps it from printing.
    from dtrain.quality.evaluation import Wanted
    from dtrain.run import measuring

    settings: dict[str, str | int] = {
        name: value
        for name in ("dataset", "data_dir", "strategy", "num_devices")
        if (value := getattr(options, name))
    }
    measuring.measure(
        measuring.Request(
            run_dir=options.run_dir,
            checkpoint=options.checkpoint,
            wanted=Wanted(
                figures.chosen("figures", options.figures),
                options.num_images,
                options.num_real,
                options.seed,
                options.weights,
            ),
            extractor=options.extractor,
            nearest=options.nearest,
            model=options.model,
            cache_dir=flags.expand_home(options.cache_dir),
            settings=settings,
        ),
        lambda line: print(line, flush=True),
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    return errors.FINISHED


def main() -> None:
    """Runs the program."""
    errors.exit_with(lambda: run(sys.argv))


if __name__ == "__main__":
    main()
