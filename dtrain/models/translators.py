"""Networks that turn images into images, and judges of their patches.

The U-Net and the PatchGAN of Isola et al. 2017, "Image-to-Image Translation
with Conditional Adversarial Networks" (appendix 6.1), and the ResNet of Zhu et
al. 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent
Adversarial Networks" (appendix 7.2), with as many weights as the authors' code
has: 54.414 and 2.769 million, 11.378 and 2.765 million.

Where pix2pix has BatchNorm over a batch of one, which is used in drawing, too,
here is what that comes to: each channel of each image is normalized.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

_SLOPE = 0.2
_EPSILON = 1e-5
_MOST_FACTOR = 8
_NUM_DROPPED = 3
# Of the ResNet: blocks for images of this size on, and for smaller ones.
_LARGE, _OF_LARGE, _OF_SMALL = 256, 9, 6

Shape = tuple[int, int, int]


# pix2pix.


def unet_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Returns the sizes inside a U-Net, the largest first.

    Args:
        height: of the images, in pixels.
        width: likewise. Both are halved while both are even, eight times at
            most.
    """
    sizes: list[tuple[int, int]] = []
    while height % 2 == 0 and width % 2 == 0 and len(sizes) < 8:
        height, width = height // 2, width // 2
        sizes.append((height, width))
    return sizes


def dropped_shapes(height: int, width: int, base_channels: int) -> list[Shape]:
    """Returns the shapes of the features of which a U-Net drops a half.

    They are those of its inputs behind the first.

    Args:
        height: of the images, in pixels.
        width: likewise.
        base_channels: of the U-Net.
    """
    shapes = [
        (*size, base_channels * _MOST_FACTOR)
        for level, size in enumerate(unet_sizes(height, width)[:-1])
        if 2**level >= _MOST_FACTOR
    ]
    # From the innermost on.
    return shapes[::-1][:_NUM_DROPPED]


def make_unet(
    given_shape: Shape, channels: int, base_channels: int
) -> keras.Model:
    """Makes a U-Net, whose noise is what is dropped of its features.

    Args:
        given_shape: height, width and channels of what is translated.
        channels: of what it is translated into.
        base_channels: 64 in the paper; doubled at each halving, up to eight
            times as many.

    Returns:
        What turns a list of images [b, H, W, C] and of uniform numbers in
        [0, 1) of `dropped_shapes` into images float32 [b, H, W, channels] in
        [-1, 1].
    """
    given = keras.Input(given_shape, name="given")
    sizes = unet_sizes(*given_shape[:2])
    drawn = {
        shape[:2]: keras.Input(shape, name=f"drawn_{shape[0]}x{shape[1]}")
        for shape in dropped_shapes(*given_shape[:2], base_channels)
    }
    widths = [
        base_channels * min(2**level, _MOST_FACTOR)
        for level in range(len(sizes))
    ]
    encoded = _encoded(given, sizes, widths)
    features = encoded[-1]
    for level in reversed(range(len(sizes) - 1)):
        name = _name("up", sizes[level])
        features = layers.ReLU(name=f"{name}_activation")(features)
        features = _conv(
            layers.Conv2DTranspose, widths[level], name, use_bias=False
        )(features)
        features = _normalized(features, name)
        if sizes[level] in drawn:
            features = _half_dropped(features, drawn[sizes[level]])
        join = layers.Concatenate(name=f"{name}_joined")
        features = join([features, encoded[level]])
    features = layers.ReLU(name="to_image_activation")(features)
    image = _to_image(layers.Conv2DTranspose, channels, 4, strides=2)(features)
    inputs: Any = [given, *drawn.values()]
    return keras.Model(inputs, image, name="generator")


def _encoded(
    given: keras.KerasTensor, sizes: list[tuple[int, int]], widths: list[int]
) -> list[keras.KerasTensor]:
    """Returns the features at each size, before their activations."""
    encoded = []
    features = given
    for level, size in enumerate(sizes):
        name = _name("down", size)
        # A pixel that is normalized by itself would be nothing.
        is_normal = 0 < level < len(sizes) - 1
        features = _conv(
            layers.Conv2D, widths[level], name, use_bias=not is_normal
        )(features)
        if is_normal:
            features = _normalized(features, name)
        encoded.append(features)
        if level < len(sizes) - 1:
            features = layers.LeakyReLU(_SLOPE, name=f"{name}_activation")(
                features
            )
    return encoded


def _half_dropped(
    features: keras.KerasTensor, drawn: keras.KerasTensor
) -> keras.KerasTensor:
    """Drops features by uniform numbers, and doubles the others."""
    is_kept = keras.ops.cast(drawn >= 0.5, features.dtype)
    return features * is_kept * 2.0


# CycleGAN.


def make_resnet(image_shape: Shape, base_channels: int) -> keras.Model:
    """Makes the ResNet of CycleGAN, which keeps the size.

    Args:
        image_shape: height, width and channels; both sides multiples of 4.
        base_channels: 64 in the paper.

    Returns:
        What turns images [b, H, W, C] in [-1, 1] into such, float32.
    """
    images = keras.Input(image_shape, name="images")
    features = _reflected(images, 3)
    features = _activated(
        _plain(layers.Conv2D, base_channels, 7, "from_image")(features)
    )
    for factor in (2, 4):
        name = f"down_{factor}"
        features = _activated(
            _plain(
                layers.Conv2D,
                base_channels * factor,
                3,
                name,
                strides=2,
                padding="same",
            )(features)
        )
    is_large = min(image_shape[:2]) >= _LARGE
    for number in range(_OF_LARGE if is_large else _OF_SMALL):
        inner = features
        for part in ("first", "second"):
            name = f"block_{number}_{part}"
            inner = _plain(layers.Conv2D, base_channels * 4, 3, name)(
                _reflected(inner, 1)
            )
            is_first = part == "first"
            inner = _activated(inner) if is_first else _whitened(inner)
        features = layers.Add(name=f"block_{number}")([features, inner])
    for factor in (2, 1):
        up = _plain(
            layers.Conv2DTranspose,
            base_channels * factor,
            3,
            f"up_{factor}",
            strides=2,
            padding="same",
        )
        features = _activated(up(features))
    image = _to_image(layers.Conv2D, image_shape[-1], 7, padding="valid")
    return keras.Model(images, image(_reflected(features, 3)))


def _reflected(features: keras.KerasTensor, margin: int) -> Any:
    sides = [[0, 0], [margin, margin], [margin, margin], [0, 0]]
    return keras.ops.pad(features, sides, mode="reflect")


def _activated(features: keras.KerasTensor) -> keras.KerasTensor:
    return layers.ReLU()(_whitened(features))


def _whitened(features: keras.KerasTensor) -> keras.KerasTensor:
    """Normalizes each channel of each image, and learns nothing of it."""
    # With as many groups as channels.
    return layers.GroupNormalization(
        -1, epsilon=_EPSILON, scale=False, center=False, dtype="float32"
    )(features)


# Both.


def make_patch_gan(
    image_shape: Shape, base_channels: int, *, is_whitened: bool = False
) -> keras.Model:
    """Makes a judge of the patches of an image, each of 70 pixels a side.

    Args:
        image_shape: height, width and channels, of all images that it sees at
            once, one behind another; at least 8 pixels a side, and its patches
            are smaller below 32.
        base_channels: 64 in the papers; doubled up to eight times as many.
        is_whitened: whether what is normalized is not scaled again, as in
            CycleGAN.

    Returns:
        What turns images into logits, float32 [b, h, w, 1].
    """
    images = keras.Input(image_shape, name="images")
    features = images
    num_halvings = _num_halvings(min(image_shape[:2]))
    for level in range(num_halvings + 1):
        name = f"judge_{2**level}"
        is_normal = level > 0
        conv = _plain(
            layers.Conv2D,
            base_channels * 2**level,
            4,
            name,
            strides=2 if level < num_halvings else 1,
            use_bias=not is_normal or is_whitened,
        )
        features = conv(layers.ZeroPadding2D(1)(features))
        if is_normal and is_whitened:
            features = _whitened(features)
        elif is_normal:
            features = _normalized(features, name)
        features = layers.LeakyReLU(_SLOPE, name=f"{name}_activation")(features)
    logits = _plain(layers.Conv2D, 1, 4, "logits", dtype="float32")
    return keras.Model(images, logits(layers.ZeroPadding2D(1)(features)))


def _num_halvings(size: int) -> int:
    """Counts the halvings that leave as much as two convolutions need."""
    return min((size // 4).bit_length() - 1, 3)


def _name(way: str, size: tuple[int, int]) -> str:
    return f"{way}_{size[0]}x{size[1]}"


def _conv(kind: Any, channels: int, name: str, **more: Any) -> Any:
    """Makes a convolution that halves or doubles the size."""
    return _plain(kind, channels, 4, name, strides=2, padding="same", **more)


def _plain(kind: Any, channels: int, size: int, name: str, **more: Any) -> Any:
    weights: Any = keras.initializers.RandomNormal(stddev=0.02)
    return kind(channels, size, kernel_initializer=weights, name=name, **more)


def _to_image(kind: Any, channels: int, size: int, **more: Any) -> Any:
    # float32 in mixed precision too: bfloat16 has 8 bits for 256 grey levels.
    more = {"padding": "same", **more}
    return _plain(
        kind,
        channels,
        size,
        "to_image",
        activation="tanh",
        dtype="float32",
        **more,
    )


def _normalized(features: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Normalizes each channel of each image, and scales it again."""
    return layers.GroupNormalization(
        -1, epsilon=_EPSILON, dtype="float32", name=f"{name}_norm"
    )(features)
