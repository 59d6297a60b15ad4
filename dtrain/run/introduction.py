"""Prints what a run is about to do."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from dtrain.run import opening
from dtrain.run.opening import Run
from dtrain.run.resuming import Restored


def say(run: Run, restored: Restored) -> None:
    """Prints what is about to happen, and the notes of what was restored."""
    config, source, gan = run.config, run.source, run.gan
    height, width, channels = source.image_shape
    classes = f", {source.num_classes} classes" if source.num_classes else ""
    replicas = run.workers.strategy.num_replicas_in_sync
    kind = "GPU" if tf.config.get_visible_devices("GPU") else "CPU"
    prefix = restored.prefix
    start = f"resumed from {prefix}" if prefix else "a fresh start"
    run.progress.say(
        f"data      {source.name}: {source.num_images:,} images "
        f"{height}x{width}x{channels}{classes}\n"
        f"model     {config.model}: generator "
        f"{_count(gan.networks.generator)}, discriminator "
        f"{_count(gan.networks.discriminator)} parameters\n"
        f"devices   {config.strategy}: {replicas} "
        f"replica{'s' if replicas > 1 else ''} on "
        f"{kind}, batch {config.batch_size}, {config.precision}\n"
        f"run       {config.run_dir}: {start}, "
        f"{config.num_steps:,} steps in all"
    )
    opening.say(restored.notes)


def _count(network: keras.Model) -> str:
    count = sum(
        int(np.prod(weight.shape)) for weight in network.trainable_weights
    )
    return f"{count:,}"
