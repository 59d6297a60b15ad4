"""Draws images from a run, on a machine without GPU.

The data is needed where a program makes pictures of it, as image-to-image.

It is started by

    python -m dtrain.sample --run_dir=runs/default --num_images=64
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtrain import errors, flags
from dtrain.storage import access, files, startup

if TYPE_CHECKING:
    from dtrain.config import Config
    from dtrain.data import pipeline
    from dtrain.run import export


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be drawn."""

    run_dir: str = flags.directory("Directory of the run.")
    num_images: int = flags.field(64, flags.FLAGS, "Images to draw.")
    grid: bool = flags.field(
        True,
        flags.FLAGS,
        "One picture of all of them, samples.png; otherwise one PNG for each.",
    )
    gif: bool = flags.field(
        True,
        flags.FLAGS,
        "Also writes interpolation.gif, a walk through the latents.",
    )
    seed: int = flags.field(0, flags.FLAGS, "Other seeds draw other images.")
    step: int = flags.field(
        -1, flags.FLAGS, "Step of the checkpoint.", shown="the newest"
    )
    model: str = flags.field(
        "",
        flags.FLAGS,
        "Model of the run, package.module:make. What config.json names is "
        "imported only if it is named here, too.",
        shown="a built-in one",
    )
    output_dir: str = flags.field(
        "", flags.FLAGS, "Where the files go.", shown="RUN_DIR/drawn"
    )


_PAGE = flags.Page(
    "python -m dtrain.sample",
    """\
Draws images with the moving averages of a run, as they are in its newest
checkpoint, and writes them with an animation to a directory.""",
    Request,
    usage="--run_dir=DIR [--flag=value ...]",
)


def parse(arguments: Sequence[str]) -> Request:
    """Parses a command line, whose first word is the program's name.

    Raises:
        UserError: a flag is unknown, malformed or out of its range.
    """
    request = Request(**flags.parse(Request, arguments))
    if not 1 <= request.num_images <= 100_000:
        raise errors.UserError(
            f"num_images ({request.num_images}) must be between 1 and 100000"
        )
    if not 0 <= request.seed < 2**31:
        raise errors.UserError(
            f"seed ({request.seed}) must be at least 0 and below 2147483648"
        )
    if request.step < -1:
        raise errors.UserError(f"step ({request.step}) must be at least 0")
    return request


def draw(request: Request) -> list[str]:
    """Draws images, and returns the paths of the files that were written.

    Raises:
        UserError: there is no such run or checkpoint, it does not fit the
            model, or the output directory cannot be made.
        StorageError: a picture cannot be written.
    """
    # Here, after `startup.import_tensorflow`, which keeps it from printing.
    from dtrain.run import export

    step = None if request.step < 0 else request.step
    trained = export.restore(request.run_dir, step, request.model)
    output_dir = request.output_dir or os.path.join(request.run_dir, "drawn")
    access.make("output_dir", output_dir)
    with (
        files.storage_errors(output_dir),
        access.to("output_dir", output_dir),
    ):
        return _write_pictures(request, trained, output_dir)


def _write_pictures(
    request: Request, trained: export.Trained, output_dir: str
) -> list[str]:
    from dtrain.gan import pictures
    from dtrain.record import drawing, images

    gan, config, num_classes = trained
    draw_some = pictures.Pictures(gan, lambda number: _examples(config, number))
    drawn = drawing.draw(
        draw_some,
        drawing.latents(config, request.seed, request.num_images),
        drawing.class_columns(config, num_classes, request.num_images),
    )
    paths = []
    if request.grid:
        paths.append(os.path.join(output_dir, "samples.png"))
        columns = drawing.num_columns(config, num_classes)
        images.write_png(paths[-1], images.make_grid(drawn, columns))
    else:
        for number, image in enumerate(images.to_uint8(drawn)):
            paths.append(os.path.join(output_dir, f"sample-{number:05}.png"))
            images.write_png(paths[-1], image)
    if request.gif:
        paths.append(os.path.join(output_dir, "interpolation.gif"))
        frames = drawing.interpolation(
            draw_some, config, num_classes, request.seed
        )
        images.write_gif(paths[-1], list(frames))
    return paths


def _examples(config: Config, number: int) -> pipeline.Batch:
    """Reads the first examples of a run, which its pictures are made of."""
    from dtrain.data import pipeline, sources

    return pipeline.first_batch(sources.open_data(config), config, number)


def run(arguments: Sequence[str]) -> int:
    """Draws as a command line says; returns the exit code of the process.

    Raises:
        UserError: the command line or the run is wrong.
    """
    if flags.answer(arguments[1:], _PAGE.render):
        return errors.FINISHED
    request = parse(arguments)
    startup.import_tensorflow()
    first, *rest = draw(request)
    more = f", {len(rest) - 1} more" if len(rest) > 1 else ""
    last = f" and {rest[-1]}" if rest else ""
    print(f"wrote {first}{more}{last}")
    return errors.FINISHED


def main() -> None:
    """Runs the program."""
    errors.exit_with(lambda: run(sys.argv))


if __name__ == "__main__":
    main()
