"""The sizes of images that halve down to a small map of features."""

from __future__ import annotations

from dtrain.errors import UserError

MIN_IMAGE_SIZE = 8
MAX_IMAGE_SIZE = 128

_BASE_SIZES = range(4, 8)


def base_size(image_size: int) -> int | None:
    """Returns the side of the smallest feature maps, 4 to 7 pixels.

    The size of the images is halved until it is reached; None for a size from
    which it cannot be.

    Args:
        image_size: pixels a side, at least 1.
    """
    size = image_size
    while size % 2 == 0 and size > _BASE_SIZES[-1]:
        size //= 2
    in_range = MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE
    return size if in_range and size in _BASE_SIZES else None


def num_halvings(image_size: int) -> int:
    """Returns how often a size that `check` has passed halves to its base."""
    smallest = base_size(image_size)
    assert smallest is not None
    return (image_size // smallest).bit_length() - 1


def check(model: str, image_shape: tuple[int, int, int]) -> None:
    """Checks that images are square, and of a size with a base.

    Args:
        model: in the words of an error.
        image_shape: height, width and channels.

    Raises:
        UserError: they are not.
    """
    height, width, _ = image_shape
    if height != width:
        raise UserError(
            f"images of {height}x{width} pixels are not square, as {model} "
            f"wants them; try --image_size={_near_sizes(min(height, width))[0]}"
        )
    if base_size(height) is None:
        near = " or ".join(str(size) for size in _near_sizes(height))
        raise UserError(
            f"{model} makes no images of {height} pixels a side: a size from "
            f"{MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} must halve to "
            f"{_BASE_SIZES[0]}, 5, 6 or {_BASE_SIZES[-1]}; try "
            f"--image_size={near}"
        )


def _near_sizes(size: int) -> list[int]:
    """Returns the nearest possible size below (or at) `size` and above it."""
    sizes = range(MIN_IMAGE_SIZE, MAX_IMAGE_SIZE + 1)
    possible = [one for one in sizes if base_size(one) is not None]
    below = [one for one in possible if one <= size]
    return below[-1:] + possible[len(below) :][:1]
