"""The film of a training: the grids that a run wrote, one after another.

GIF is always made; MP4, which is smaller and has all colours, where there is an
ffmpeg.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from dtrain import errors
from dtrain.storage import files, temporary

# A film is looked at for some twenty seconds.
MOST_FRAMES = 240
_FRAMES_PER_SEC = 12
# The last one is looked at for longer.
_LAST_SECS = 2
_CAPTION_HEIGHT = 16
# Of Pillow, for what is no picture.
_DAMAGE = (OSError, SyntaxError, ValueError)
_NAME = re.compile(r"step-(\d+)\.png")


class Grid(NamedTuple):
    """A grid that a run has written.

    Attributes:
        step: of the run.
        path: of the PNG.
    """

    step: int
    path: str


def grids(run_dir: str) -> list[Grid]:
    """Lists the grids of a run, by step.

    Args:
        run_dir: the run's directory, local or gs://.

    Raises:
        UserError: they are too few for a film.
    """
    directory = os.path.join(run_dir, "samples")
    found = [
        Grid(int(match[1]), os.path.join(directory, name))
        for name in files.names(directory)
        if (match := _NAME.fullmatch(name))
    ]
    if len(found) < 2:
        raise errors.UserError(
            f"film needs two grids, and {directory} has {len(found)}; train "
            "on, or give the run --sample_every_steps"
        )
    return sorted(found)


def thinned(found: Sequence[Grid], most: int = MOST_FRAMES) -> list[Grid]:
    """Leaves out grids evenly, but neither the first nor the last.

    Args:
        found: in their order.
        most: how many may stay, at least 2.
    """
    if len(found) <= most:
        return list(found)
    last = len(found) - 1
    return [found[round(n * last / (most - 1))] for n in range(most)]


def write(found: Sequence[Grid], output_dir: str) -> list[str]:
    """Makes the film of a run; returns the paths of its files.

    Args:
        found: the grids of the run.
        output_dir: where the files go; it is there.

    Raises:
        UserError: a grid is no picture, or ffmpeg fails.
        OSError: a grid cannot be read, or the film not be written.
    """
    frames = [_frame(grid) for grid in thinned(found)]
    # A run may have been begun again with other grids at the same steps.
    size = frames[-1].size
    frames = [frame for frame in frames if frame.size == size]
    paths = [os.path.join(output_dir, "film.gif")]
    files.write(paths[0], _gif(frames), is_durable=False)
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg:
        paths.append(os.path.join(output_dir, "film.mp4"))
        files.write(paths[1], _mp4(ffmpeg, frames), is_durable=False)
    return paths


def _frame(grid: Grid) -> Image.Image:
    """Reads a grid, and writes its step below it.

    Raises:
        UserError: it is no picture.
    """
    try:
        picture = Image.open(io.BytesIO(files.read(grid.path) or b""))
        picture = picture.convert("RGB")
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        raise errors.UserError(
            f"{grid.path} is no picture ({error}); remove it"
        ) from error
    # ffmpeg's usual colours have half the resolution: an even size.
    width = picture.width + picture.width % 2
    height = picture.height + picture.height % 2 + _CAPTION_HEIGHT
    frame = Image.new("RGB", (width, height))
    frame.paste(picture)
    draw = ImageDraw.Draw(frame)
    draw.text((4, height - _CAPTION_HEIGHT + 2), f"step {grid.step:,}")
    return frame


def _gif(frames: Sequence[Image.Image]) -> bytes:
    content = io.BytesIO()
    first, *rest = frames
    milliseconds = 1000 // _FRAMES_PER_SEC
    first.save(
        content,
        format="GIF",
        save_all=True,
        append_images=rest,
        duration=[milliseconds] * len(rest) + [1000 * _LAST_SECS],
        loop=0,
    )
    return content.getvalue()


def _mp4(ffmpeg: str, frames: Sequence[Image.Image]) -> bytes:
    """Has ffmpeg make a film that browsers play.

    Raises:
        UserError: it failed.
    """
    pause = [frames[-1]] * (_FRAMES_PER_SEC * _LAST_SECS)
    pixels = b"".join(frame.tobytes() for frame in [*frames, *pause])
    width, height = frames[0].size
    with temporary.directory("film") as directory:
        path = os.path.join(directory, "film.mp4")
        ran = subprocess.run(
            [
                *(ffmpeg, "-loglevel", "error", "-f", "rawvideo"),
                *("-pix_fmt", "rgb24", "-s", f"{width}x{height}"),
                *("-r", str(_FRAMES_PER_SEC), "-i", "-"),
                *("-pix_fmt", "yuv420p", "-movflags", "+faststart", path),
            ],
            input=pixels,
            capture_output=True,
            check=False,
        )
        if ran.returncode:
            why = " ".join(ran.stderr.decode(errors="replace").split())[:200]
            raise errors.UserError(
                f"{ffmpeg} failed ({why}); leave ffmpeg out of PATH for a GIF "
                "alone"
            )
        with open(path, "rb") as file:
            return file.read()
