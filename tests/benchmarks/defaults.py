"""What to begin with on which device, computed for `tests.benchmarks.scale`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from dtrain.config import Config
from dtrain.data import sources
from dtrain.data.sources import arrays
from dtrain.gan import memory, state


class Device(NamedTuple):
    """A GPU, by its data sheet.

    Attributes:
        gib: of memory.
        fast: 10^12 operations a second in 16 bits, dense.
        slow: likewise as TensorFlow computes float32: with TF32 where it is.
        precision: the 16 bits that it is fast in.
    """

    gib: float
    fast: float
    slow: float
    precision: str


DEVICES: Mapping[str, Device] = {
    "T4": Device(16, 65, 8.1, "mixed_float16"),
    "V100": Device(16, 125, 15.7, "mixed_float16"),
    "A100": Device(40, 312, 156, "mixed_bfloat16"),
    "H100": Device(80, 989, 494.5, "mixed_bfloat16"),
}
# Of a GPU's memory that is there for tensors, as `memory` takes it.
_FREE = memory._OF_GPU


class Room(NamedTuple):
    """What a step takes of a GPU's memory, in bytes.

    Attributes:
        fixed: at any batch.
        image: for each image of a replica that is there at once.
        waiting: for each image of a replica, also those of other micro-batches.
    """

    fixed: float
    image: float
    waiting: float

    def images(self, gib: float) -> int:
        """Returns how many images fit at once, without micro-batches."""
        left = _FREE * gib * 2**30 - self.fixed
        return max(0, math.floor(left / (self.image + self.waiting)))

    def micro_batches(self, images: int, gib: float) -> int | None:
        """Returns how many parts a replica's images need; None if none do.

        Args:
            images: of the replica in a step.
            gib: of its memory.
        """
        left = _FREE * gib * 2**30 - self.fixed - images * self.waiting
        for parts in range(1, images + 1):
            if not images % parts and images / parts * self.image <= left:
                return parts
        return None


def room(config: Config, side: int) -> Room:
    """Estimates what a step takes, as a run does before its first one.

    Args:
        config: of the run; its precision counts.
        side: of the images, in colour, in pixels.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.precision)
    try:
        images = np.zeros((1, side, side, 3), np.uint8)
        source = arrays.ArraySource(config, images, None)
        strategy = tf.distribute.get_strategy()
        gan = state.GAN(config, strategy, source.image_shape, 0)
        estimate = memory.Estimate(gan, sources.Data(source), 1)
    finally:
        keras.config.set_dtype_policy(before)

    def need(images: int, parts: int) -> float:
        return estimate._need(images, parts).num_bytes

    # Linear in the images of a part, and in all.
    both, of_two = need(2, 1), need(2, 2)
    image = both - of_two
    waiting = (need(4, 2) - both) / 2
    return Room(both - 2 * (image + waiting), image, waiting)


def row(name: str, device: Device, of_step: Room, images: int) -> list[str]:
    """Returns the cells of a GPU.

    Args:
        name: of the GPU.
        device: what its data sheet says.
        of_step: what a step takes.
        images: of a replica in a step.
    """
    parts = of_step.micro_batches(images, device.gib)
    return [
        f"{name}, {device.gib:.0f} GB",
        f"`{device.precision}`",
        f"{device.fast / device.slow:.1f}",
        "`auto`: on",
        f"{of_step.images(device.gib):,}",
        "does not fit" if parts is None else f"{parts}",
    ]
