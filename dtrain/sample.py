"""Draws images from a run, on a machine without GPU.

The data is needed where a program makes pictures of it, as image-to-image.

It is started by

    python -m dtrain.sample --run_dir=runs/default --seeds=0-63
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dtrain import errors, flags
from dtrain.record import film
from dtrain.storage import access, files, startup

if TYPE_CHECKING:
    from dtrain.config import Config
    from dtrain.data import pipeline
    from dtrain.record import drawing
    from dtrain.run import export


NEWEST, BEST = "newest", "best"
# What is drawn at once, with or without classes.
_MOST_PICTURES = 100_000


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be drawn."""

    run_dir: str = flags.directory("Directory of the run.")
    checkpoint: str = flags.field(
        NEWEST,
        flags.FLAGS,
        "Which one: newest, best (of those that dtrain.evaluate has measured) "
        "or a step.",
    )
    seeds: str = flags.field(
        "",
        flags.FLAGS,
        "A picture for each: numbers and ranges, as in 0-63 or 1,5,8-11. A "
        "seed gives the same picture whatever others there are.",
        shown="those of the run's own grids",
    )
    classes: str = flags.field(
        "",
        flags.FLAGS,
        "Classes of a conditional model, of each of which all seeds are drawn: "
        "numbers and ranges.",
        shown="all",
    )
    truncation: float = flags.field(
        0.0,
        flags.FLAGS,
        "Largest distance of a latent from 0: less is more typical, and less "
        "varied. A program that draws for itself finds it as "
        "example.truncation. 0 is no limit.",
        minimum=0.0,
    )
    grid: bool = flags.field(
        True,
        flags.FLAGS,
        "One picture of all of them, samples.png, laid out as the grids of the "
        "run; otherwise one PNG for each.",
    )
    interpolation_frames: int = flags.field(
        48,
        flags.FLAGS,
        "Frames of interpolation.gif, which walks from seed to seed; 0 writes "
        "none.",
        minimum=0,
        below=10_000,
    )
    interpolation_images: int = flags.field(
        16,
        flags.FLAGS,
        "Images that walk side by side, at most.",
        minimum=1,
        below=1025,
    )
    interpolation_width: int = flags.field(
        256,
        flags.FLAGS,
        "Pixels of a frame, at least.",
        minimum=1,
        below=8193,
    )
    interpolation_through: str = flags.field(
        "seeds",
        flags.FLAGS,
        "What an image passes through: the seeds, or the classes at its seed.",
        choices=("seeds", "classes"),
    )
    film: bool = flags.field(
        False,
        flags.FLAGS,
        "Also makes film.gif of the grids that the run has written as it went, "
        "and film.mp4 where there is an ffmpeg.",
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
Draws images with the moving averages of a run, as they are in one of its
checkpoints, and writes them with an animation to a directory.""",
    Request,
    usage="--run_dir=DIR [--flag=value ...]",
)


def parse(arguments: Sequence[str]) -> Request:
    """Parses a command line, whose first word is the program's name.

    Raises:
        UserError: a flag is unknown, malformed or out of its range.
    """
    request = Request(**flags.parse(Request, arguments))
    flags.check(request)
    for name in ("seeds", "classes"):
        _numbers(name, getattr(request, name))
    is_named = request.checkpoint in (NEWEST, BEST)
    if not is_named and not request.checkpoint.isdecimal():
        raise errors.UserError(
            f"checkpoint ({request.checkpoint}) must be {NEWEST}, {BEST} or a "
            "step, such as 1000"
        )
    return request


def _numbers(name: str, text: str) -> list[int]:
    """Reads numbers and ranges, in their order.

    Raises:
        UserError: there is something else, or too much.
    """
    numbers: list[int] = []
    for part in text.split(",") if text else ():
        found = re.fullmatch(r"\s*(\d{1,10})(?:-(\d{1,10}))?\s*", part)
        first, last = (
            map(int, (found[1], found[2] or found[1])) if found else (1, 0)
        )
        if first > last:
            raise errors.UserError(
                f"{name} ({text}) must be numbers and ranges, such as 0-63 or "
                f"1,5,8-11; {part!r} is neither"
            )
        if last >= 2**31:
            raise errors.UserError(f"{name} ({text}) must lie below 2147483648")
        if len(numbers) + last - first >= _MOST_PICTURES:
            raise errors.UserError(
                f"{name} ({text}) must be at most {_MOST_PICTURES:,} numbers"
            )
        numbers += range(first, last + 1)
    return numbers


def draw(request: Request) -> list[str]:
    """Draws images, and returns the paths of the files that were written.

    Raises:
        UserError: there is no such run or checkpoint, it does not fit the
            model, or the output directory cannot be made.
        StorageError: a picture cannot be written.
    """
    # Here, after `startup.import_tensorflow`, which keeps it from printing.
    from dtrain.run import best, export

    step = None
    if request.checkpoint == BEST:
        step = best.step_of(request.run_dir)
    elif request.checkpoint != NEWEST:
        step = int(request.checkpoint)
    grids = film.grids(request.run_dir) if request.film else []
    trained = export.restore(request.run_dir, step, request.model)
    subject = _subject(request, trained)
    output_dir = request.output_dir or os.path.join(request.run_dir, "drawn")
    access.make("output_dir", output_dir)
    with (
        files.storage_errors(output_dir),
        access.to("output_dir", output_dir),
    ):
        paths = _write_pictures(request, subject, output_dir)
        if grids:
            paths += film.write(grids, output_dir)
    return paths


class _Subject(NamedTuple):
    """What is drawn, of a run at a step.

    Attributes:
        config: of the run.
        draw_some: draws some pictures.
        seeds: of the pictures.
        classes: each of which has all seeds; empty for a model without.
        truncation: of the latents.
    """

    config: Config
    draw_some: drawing.Draw
    seeds: Sequence[int]
    classes: Sequence[int]
    truncation: float


def _classes(request: Request, trained: export.Trained) -> Sequence[int]:
    """Finds out of which classes pictures are; of none if they have none.

    Raises:
        UserError: there are no such classes.
    """
    _, config, num_classes = trained
    classes: Sequence[int] = _numbers("classes", request.classes)
    if config.conditional:
        classes = classes or range(num_classes)
    elif classes:
        raise errors.UserError(
            f"classes ({request.classes}) are of a conditional model, and "
            f"{request.run_dir} has none; leave out --classes"
        )
    if classes and max(classes) >= num_classes:
        raise errors.UserError(
            f"classes ({request.classes}) must be below {num_classes}, the "
            f"number of classes of {request.run_dir}"
        )
    if request.interpolation_through == "classes" and not classes:
        raise errors.UserError(
            "interpolation_through (classes) needs a conditional model, and "
            f"{request.run_dir} has none; leave it out"
        )
    return classes


def _subject(request: Request, trained: export.Trained) -> _Subject:
    """Finds out what is to be drawn.

    Raises:
        UserError: see `_classes`, or it is too much.
    """
    from dtrain.gan import pictures
    from dtrain.record import drawing, scatter

    gan, config, _ = trained
    classes = _classes(request, trained)
    seeds = _numbers("seeds", request.seeds) or drawing.default_seeds(config)
    if not request.grid and gan.image_shape == scatter.SHAPE:
        raise errors.UserError(
            f"nogrid writes a file for each picture, and {request.run_dir} "
            "draws points, which are dots of one; leave it out"
        )
    if len(seeds) * max(1, len(classes)) > _MOST_PICTURES:
        raise errors.UserError(
            f"seeds ({request.seeds}) of {len(classes)} classes are more than "
            f"{_MOST_PICTURES:,} pictures; give fewer seeds or --classes"
        )
    draw_some = pictures.Pictures(
        gan,
        lambda number: _examples(config, number),
        truncation=request.truncation,
    )
    has_own = gan.program.draw is not None
    return _Subject(
        config,
        draw_some,
        seeds,
        classes,
        0.0 if has_own else request.truncation,
    )


def _write_pictures(
    request: Request, subject: _Subject, output_dir: str
) -> list[str]:
    from dtrain.record import drawing, images

    paths = []
    if request.grid:
        paths.append(os.path.join(output_dir, "samples.png"))
        images.write_png(
            paths[-1],
            drawing.grid(
                *(subject.draw_some, subject.config, subject.seeds),
                *(subject.classes, subject.truncation),
            ),
        )
    else:
        paths += _write_each(subject, output_dir)
    walk = drawing.Walk(
        request.interpolation_frames,
        request.interpolation_images,
        request.interpolation_width,
        request.interpolation_through == "classes",
    )
    # One seed leads nowhere.
    if walk.num_frames and (walk.through_classes or len(subject.seeds) > 1):
        paths.append(os.path.join(output_dir, "interpolation.gif"))
        frames = drawing.interpolation(
            *(subject.draw_some, subject.config, subject.seeds),
            *(subject.classes, walk, subject.truncation),
        )
        images.write_gif(paths[-1], list(frames))
    return paths


def _write_each(subject: _Subject, output_dir: str) -> list[str]:
    """Writes a file for each picture; returns their paths."""
    from dtrain.record import drawing, images

    paths = []
    for label in subject.classes or [None]:
        beside = "" if label is None else f"class-{label:03}-"
        drawn = drawing.draw_seeds(
            *(subject.draw_some, subject.config, subject.seeds),
            *(label, subject.truncation),
        )
        for seed, image in zip(
            subject.seeds, images.to_uint8(drawn), strict=True
        ):
            name = f"{beside}seed-{seed:05}.png"
            paths.append(os.path.join(output_dir, name))
            images.write_png(paths[-1], image)
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
