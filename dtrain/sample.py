"""Draws images from a run, on a machine that needs neither data nor GPU.

python -m dtrain.sample --run_dir=runs/default --num_images=64
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtrain import config as config_lib
from dtrain import errors
from dtrain.storage import access, files, startup

if TYPE_CHECKING:
    from dtrain.run import export

_HELP = """usage: python -m dtrain.sample --run_dir=DIR [--flag=value ...]

Draws images with the EMA generator of a run, as it is in its newest
checkpoint, and writes them with an animation to a directory.

  --run_dir=DIR
      Directory of the run.

  --num_images=N  (default: 64)
      Images to draw.

  --[no]grid  (default: true)
      One picture of all of them, samples.png; otherwise one PNG for each.

  --[no]gif  (default: true)
      Also writes interpolation.gif, a walk through the latents.

  --seed=N  (default: 0)
      Other seeds draw other images.

  --step=N  (default: the newest)
      Step of the checkpoint.

  --output_dir=DIR  (default: RUN_DIR/drawn)
      Where the files go."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be drawn; see the help page."""

    run_dir: str = ""
    num_images: int = 64
    grid: bool = True
    gif: bool = True
    seed: int = 0
    step: int = -1
    output_dir: str = ""


def parse(arguments: Sequence[str]) -> Request:
    """Parses a command line.

    Args:
        arguments: the command line, the program's name first.

    Raises:
        UserError: a flag is unknown, malformed or out of its range.
    """
    defaults = {
        field.name: field.default for field in dataclasses.fields(Request)
    }
    request = Request(**config_lib.parse_values(arguments, defaults))
    if not 1 <= request.num_images <= 100_000:
        raise errors.UserError(
            f"num_images ({request.num_images}) must be between 1 and 100000"
        )
    if not 0 <= request.seed < 2**31:
        raise errors.UserError(
            f"seed ({request.seed}) must be at least 0 and below 2147483648"
        )
    if request.step < Request.step:
        raise errors.UserError(f"step ({request.step}) must be at least 0")
    return request


def draw(request: Request) -> list[str]:
    """Draws what is asked for.

    Args:
        request: what, and from which run.

    Returns:
        The paths of the files that were written.

    Raises:
        UserError: there is no such run or checkpoint, it does not fit the
            model, or the output directory cannot be made.
        StorageError: a picture cannot be written.
    """
    # After `startup.import_tensorflow`, or they import it with its noise.
    from dtrain.run import export

    restored = export.restore(request.run_dir, request.step)
    output_dir = request.output_dir or os.path.join(request.run_dir, "drawn")
    access.make("output_dir", output_dir)
    with (
        files.storage_errors(output_dir),
        access.to("output_dir", output_dir),
    ):
        return _write_pictures(request, restored, output_dir)


def _write_pictures(
    request: Request, restored: export.Restored, output_dir: str
) -> list[str]:
    """Writes the files of a request; returns their paths."""
    from dtrain.record import drawing, images

    generator, config, _, num_classes = restored
    made = drawing.draw(
        generator,
        drawing.latents(config, request.seed, request.num_images),
        drawing.class_columns(config, num_classes, request.num_images),
    )
    paths = []
    if request.grid:
        paths.append(os.path.join(output_dir, "samples.png"))
        columns = drawing.num_columns(config, num_classes)
        images.write_png(paths[-1], images.make_grid(made, columns))
    else:
        for number, image in enumerate(images.to_uint8(made)):
            paths.append(os.path.join(output_dir, f"sample-{number:05}.png"))
            images.write_png(paths[-1], image)
    if request.gif:
        paths.append(os.path.join(output_dir, "interpolation.gif"))
        frames = drawing.interpolation(
            generator, config, num_classes, request.seed
        )
        images.write_gif(paths[-1], list(frames))
    return paths


def run(arguments: Sequence[str]) -> int:
    """Draws as a command line says.

    Args:
        arguments: the command line, the program's name first.

    Returns:
        The exit code of the process.

    Raises:
        UserError: the command line or the run is wrong.
    """
    if {"--help", "-h"} & set(arguments[1:]):
        print(_HELP)
        return errors.FINISHED
    request = parse(arguments)
    startup.import_tensorflow()
    paths = draw(request)
    first, *rest = paths
    more = f", {len(rest) - 1} more" if len(rest) > 1 else ""
    last = f" and {rest[-1]}" if rest else ""
    print(f"wrote {first}{more}{last}")
    return errors.FINISHED


def main() -> None:
    """Runs the program."""
    errors.exit_with(lambda: run(sys.argv))


if __name__ == "__main__":
    main()
