"""Leaves layers as they are: `--frozen_layers=discriminator/from_image*`.

Mo, Cho and Shin 2020, "Freeze the Discriminator: a Simple Baseline for
Fine-Tuning GANs": with few pictures, the lower layers of a discriminator that
another run has trained (`--init_from`) are worth more than what it would learn.
"""

from __future__ import annotations

import fnmatch

from dtrain.errors import UserError
from dtrain.gan.program import Program


def freeze(patterns: str, program: Program) -> None:
    """Takes layers out of what is trained, before there are optimizers.

    Gradients go through them, and BatchNorm's averages still move.

    Args:
        patterns: of network/layer, with commas between them; empty is none.
        program: whose networks are built.

    Raises:
        UserError: a pattern is of no layer with weights, or nothing is left
            to train of a network.
    """
    layers = {
        f"{name}/{layer.name}": layer
        for name in program.trained
        for layer in program.networks[name]._flatten_layers(include_self=False)
        if layer.weights
    }
    for pattern in filter(None, patterns.split(",")):
        found = fnmatch.filter(layers, pattern)
        if not found:
            raise UserError(
                f"frozen_layers ({pattern}) is no layer with weights; there "
                f"are {', '.join(layers)}"
            )
        for name in found:
            layers[name].trainable = False
    for name in program.trained:
        if not program.networks[name].trainable_variables:
            raise UserError(
                f"frozen_layers ({patterns}) leaves nothing of {name} to "
                "train; leave some of its layers out"
            )
