"""The pictures of a page: few enough, and small enough, by a stated rule.

A page has room for 4 MB of pictures, which its runs share evenly. Half of what
a run has is for its film: up to 60 of its grids, evenly chosen by their order,
the first and the last among them. A picture that was enlarged pixel by pixel is
taken back to its own size; what is then larger than its share becomes a WebP
of high quality, and is made smaller until it fits.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from dtrain.storage import files

MAX_BYTES = 4_000_000
_MOST_FRAMES = 60
_FEWEST_BYTES = 6_000
# As many stills as there may be of a run.
_NUM_STILLS = 5
# What is larger was not drawn by a run, and would fill the memory.
_MOST_PIXELS = 64_000_000
_SMALLEST_SIDE = 64
# Of a WebP, 16,383.
_LARGEST_SIDE = 4096
_QUALITY = 82
# No photograph takes less.
_PIXELS_PER_BYTE = 20


class Picture(NamedTuple):
    """A picture, as a page holds it.

    Attributes:
        source: a `data:` address.
        width: in pixels of the page; that of the file.
        height: likewise.
        is_small: whether it is to be enlarged pixel by pixel.
    """

    source: str
    width: int
    height: int
    is_small: bool


class Pictures:
    """Reads the pictures of runs; those that it has read it keeps.

    Attributes:
        notes: what was left out, in lines; since `begin`.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._share = MAX_BYTES
        self._kept: dict[tuple[object, ...], Picture] = {}
        self._used: set[tuple[object, ...]] = set()

    def begin(self, num_runs: int) -> None:
        """Begins a page.

        Args:
            num_runs: that share the room.
        """
        self.notes = []
        self._share = MAX_BYTES // num_runs
        # What a page before it had, and the last had not, is not kept.
        self._kept = {key: self._kept[key] for key in self._used}
        self._used = set()

    def still(self, path: str) -> Picture | None:
        """Returns a picture that is shown large; None if there is none.

        Args:
            path: of a PNG.

        Raises:
            StorageError: the disk or the store failed.
        """
        return self._read(path, self._share // 2 // _NUM_STILLS)

    def film(self, grids: Mapping[int, str]) -> dict[int, Picture]:
        """Returns the frames of a film, by step.

        Args:
            grids: paths by step, ascending.

        Raises:
            StorageError: the disk or the store failed.
        """
        room = self._share // 2
        most = max(1, min(_MOST_FRAMES, room // _FEWEST_BYTES))
        steps = evenly(list(grids), most)
        # In powers of two, or each grid that is added would change them all.
        num_parts = 1 << max(len(steps) - 1, 0).bit_length()
        most_bytes = room // min(num_parts, most)
        frames = {step: self._read(grids[step], most_bytes) for step in steps}
        return {step: frame for step, frame in frames.items() if frame}

    def _read(self, path: str, most_bytes: int) -> Picture | None:
        with files.storage_errors(path):
            known = files.stat(path)
            key = (path, most_bytes, known)
            if known is None:
                return None
            if key not in self._kept:
                content = files.read(path) or b""
                try:
                    self._kept[key] = _encoded(_opened(content), most_bytes)
                except _UnreadableError as error:
                    self.notes.append(f"{path} is left out: {error}")
                    return None
        self._used.add(key)
        return self._kept[key]


class _UnreadableError(ValueError):
    """A file holds no picture; the text is the reason."""


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """Chooses some steps by their order, the first and the last among them.

    Args:
        steps: ascending.
        most: how many may be chosen, at least 1; of one it is the last.
    """
    if len(steps) <= most:
        return list(steps)
    if most == 1:
        return [steps[-1]]
    last = len(steps) - 1
    return [steps[number * last // (most - 1)] for number in range(most)]


def _opened(content: bytes) -> Image.Image:
    """Decodes a picture to grey or RGB.

    Raises:
        _UnreadableError: it is none, or too large.
    """
    try:
        with warnings.catch_warnings():
            # What Pillow warns of is refused here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=("PNG",))
        with image:
            if image.width * image.height > _MOST_PIXELS:
                raise _UnreadableError(
                    f"it has {image.width:,}x{image.height:,} pixels"
                )
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except _UnreadableError:
        raise
    except (
        *(OSError, ValueError, SyntaxError, EOFError),
        Image.DecompressionBombError,
    ) as error:
        raise _UnreadableError("it is no picture") from error


def _encoded(image: Image.Image, most_bytes: int) -> Picture:
    whole, factor = _own_size(image)
    content, kind = b"", "png"
    if whole.width * whole.height <= _PIXELS_PER_BYTE * most_bytes:
        image, content = whole, _saved(whole, "PNG")
    if not 0 < len(content) <= most_bytes:
        kind = "webp"
        image, content = _shrunk_to(whole, most_bytes)
    text = base64.b64encode(content).decode()
    return Picture(
        f"data:image/{kind};base64,{text}", *image.size, is_small=factor > 1
    )


def _shrunk_to(
    whole: Image.Image, most_bytes: int
) -> tuple[Image.Image, bytes]:
    """Makes a picture smaller until it fits as a WebP, but not tiny."""
    scale = (
        _PIXELS_PER_BYTE * most_bytes / (whole.width * whole.height)
    ) ** 0.5
    side = max(whole.size)
    side = min(side, _LARGEST_SIDE, max(_SMALLEST_SIDE, int(side * scale)))
    while True:
        image = _shrunk(whole, side)
        content = _saved(image, "WEBP")
        if len(content) <= most_bytes or side <= _SMALLEST_SIDE:
            return image, content
        # By its bytes the side that it should have, and a little less.
        shrink = 0.95 * (most_bytes / len(content)) ** 0.5
        side = max(_SMALLEST_SIDE, int(side * min(shrink, 0.95)))


def _saved(image: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    options = {"quality": _QUALITY, "method": 2} if kind == "WEBP" else {}
    image.save(content, kind, **options)
    return content.getvalue()


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    if side == max(image.size):
        return image
    scale = side / max(image.size)
    width, height = (max(1, round(scale * each)) for each in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _own_size(image: Image.Image) -> tuple[Image.Image, int]:
    """Undoes that a picture was enlarged by a whole factor, as grids are."""
    pixels = np.asarray(image)
    side = min(pixels.shape[:2])
    for factor in range(min(side, 64), 1, -1):
        small = pixels[::factor, ::factor]
        if _is_enlarged(pixels, small, factor):
            return Image.fromarray(small), factor
    return image, 1


def _is_enlarged(
    pixels: npt.NDArray[np.uint8], small: npt.NDArray[np.uint8], factor: int
) -> bool:
    if pixels.shape[0] % factor or pixels.shape[1] % factor:
        return False
    # Of most pictures a row tells it, in no time.
    if not np.array_equal(small[0].repeat(factor, axis=0), pixels[0]):
        return False
    enlarged = small.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.array_equal(enlarged, pixels)
