"""The sizes of images that halve down to a small map of features."""

from __future__ import annotations

from dtrain.errors import UserError

MIN_IMAGE_SIZE = 8
MAX_IMAGE_SIZE = 128

_BASE_SIZES = range(4, 8)


def base_size(image_size: int, largest: int = MAX_IMAGE_SIZE) -> int | None:
    """Returns the side of the smallest feature maps, 4 to 7 pixels.

    The size of the images is halved until it is reached; None for a size from
    which it cannot be.

    Args:
        image_size: pixels a side, at least 1.
        largest: that a model has.
    """
    size = image_size
    while size % 2 == 0 and size > _BASE_SIZES[-1]:
        size //= 2
    in_range = MIN_IMAGE_SIZE <= image_size <= largest
    return size if in_range and size in _BASE_SIZES else None


def num_halvings(image_size: int) -> int:
    """Returns how often a size that `check` has passed halves to its base."""
    smallest = base_size(image_size, image_size)
    assert smallest is not None
    return (image_size // smallest).bit_length() - 1


def check(
    model: str,
    image_shape: tuple[int, int, int],
    largest: int = MAX_IMAGE_SIZE,
) -> None:
    """Checks that images are square, and of a size with a base.

    Args:
        model: in the words of an error.
        image_shape: height, width and channels.
        largest: that it has.

    Raises:
        UserError: they are not.
    """
    height, width, _ = image_shape
    if height != width:
        raise UserError(
            f"images of {height}x{width} pixels are not square, as {model} "
            "wants them; try --image_size="
            f"{_near_sizes(min(height, width), largest)[0]}"
        )
    if base_size(height, largest) is None:
        near = " or ".join(map(str, _near_sizes(height, largest)))
        raise UserError(
            f"{model} makes no images of {height} pixels a side: a size from "
            f"{MIN_IMAGE_SIZE} to {largest} must halve to "
            f"{_BASE_SIZES[0]}, 5, 6 or {_BASE_SIZES[-1]}; try "
            f"--image_size={near}"
        )


def _near_sizes(size: int, largest: int) -> list[int]:
    """Returns the nearest possible size below (or at) `size` and above it."""
    sizes = range(MIN_IMAGE_SIZE, largest + 1)
    possible = [one for one in sizes if base_size(one, largest) is not None]
    below = [one for one in possible if one <= size]
    return below[-1:] + possible[len(below) :][:1]
