"""The lines that a run begins with."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from dtrain.cluster.workers import Workers
from dtrain.config import Config, presets
from dtrain.data import sources
from dtrain.gan.memory import Estimate
from dtrain.gan.state import GAN
from dtrain.run.resuming import Restored


def text(
    gan: GAN,
    data: sources.Data,
    workers: Workers,
    estimate: Estimate,
    restored: Restored,
) -> str:
    """Says in a few lines what a run is about to do.

    Args:
        gan: its state.
        data: all that it reads.
        workers: all of them.
        estimate: of the memory of a step.
        restored: what it goes on from.
    """
    config = gan.config
    replicas = workers.strategy.num_replicas_in_sync
    kind = "GPU" if tf.config.get_visible_devices("GPU") else "CPU"
    networks = ", ".join(
        f"{name} {_count(network)}"
        for name, network in gan.program.networks.items()
    )
    prefix = restored.prefix
    start = f"resumed from {prefix}" if prefix else "a fresh start"
    return (
        "".join(f"{line}\n" for line in data.said())
        + _preset(config)
        + f"model     {config.model}: {networks} parameters\n"
        f"devices   {config.strategy}: {replicas} "
        f"replica{'s' if replicas > 1 else ''} on "
        f"{kind}, batch {config.batch_size}, {config.precision}, "
        f"about {estimate.need()}\n"
        f"run       {config.run_dir}: {start}, "
        f"{config.num_steps:,} steps in all"
    )


def _preset(config: Config) -> str:
    """Says what the preset is, and what it has decided."""
    if not config.preset:
        return ""
    decided = ", ".join(
        f"{name} {getattr(config, name):g}"
        for name in presets.of(config.preset).decided
    )
    values = f": {decided}" if decided else ""
    return f"preset    {config.preset}{values}\n"


def _count(network: keras.Model) -> str:
    count = sum(
        int(np.prod(weight.shape)) for weight in network.trainable_weights
    )
    return f"{count:,}"
