"""What a run says of itself before it trains."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from dtrain.run import opening
from dtrain.run.opening import Run
from dtrain.run.resuming import Restored


def say(run: Run, restored: Restored) -> None:
    """Prints what is about to happen, and what was found on the way.

    Args:
        run: what is opened.
        restored: what it goes on from.
    """
    run.progress.say(_text(run, restored.prefix))
    opening.say(restored.notes)


def _text(run: Run, restored: str) -> str:
    """Says what is about to happen, in a line for each question."""
    config, source, gan = run.config, run.source, run.gan
    height, width, channels = source.image_shape
    classes = f", {source.num_classes} classes" if source.num_classes else ""
    replicas = run.workers.strategy.num_replicas_in_sync
    start = f"resumed from {restored}" if restored else "a fresh start"
    return "\n".join(
        (
            f"data      {source.name}: {source.num_images:,} images "
            f"{height}x{width}x{channels}{classes}",
            f"model     {config.model}: generator "
            f"{_count(gan.networks.generator)}, discriminator "
            f"{_count(gan.networks.discriminator)} parameters",
            f"devices   {config.strategy}: {replicas} "
            f"replica{'s' if replicas > 1 else ''} on "
            f"{_device_kind()}, batch {config.batch_size}, {config.precision}",
            f"run       {config.run_dir}: {start}, "
            f"{config.num_steps:,} steps in all",
        )
    )


def _count(network: keras.Model) -> str:
    count = sum(
        int(np.prod(weight.shape)) for weight in network.trainable_weights
    )
    return f"{count:,}"


def _device_kind() -> str:
    return "GPU" if tf.config.get_visible_devices("GPU") else "CPU"
