"""TensorFlow's tutorial CycleGAN: the networks are those of pix2pix.

Zhu et al. 2017, as `cyclegan`, with a U-Net in place of the ResNet, the cross
entropy in place of squares, and a phase for each network: four optimizers.

    --model=tests.programs.cyclegan_tensorflow:make --unpaired=other=DATASET
"""

from __future__ import annotations

import functools
from typing import Any

import keras

import dtrain
from dtrain import losses
from tests.programs import cyclegan, pix2pix

NAMES = ("x_to_y", "y_to_x", "judge_x", "judge_y")


def make(
    config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> dtrain.Program:
    """Makes the four networks."""
    del num_classes
    objective = functools.partial(
        cyclegan.objective, error=losses.cross_entropy
    )
    makers = (
        *[pix2pix.make_generator] * 2,
        *[cyclegan.make_discriminator] * 2,
    )
    return dtrain.Program(
        networks={
            name: maker(image_shape, config.base_channels)
            for name, maker in zip(NAMES, makers, strict=True)
        },
        phases=[dtrain.Phase(NAMES, objective)],
        optimizers={
            name: keras.optimizers.Adam(2e-4, beta_1=0.5) for name in NAMES
        },
        averaged=("x_to_y", "y_to_x"),
        draw=cyclegan.draw,
    )
