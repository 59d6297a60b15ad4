"""How far the estimate of a step's memory is from what a step takes.

    python -m tests.benchmarks.memory

Each line is a run of `dcgan` on a CPU in a process of its own: two steps, and
the largest resident size since it was opened.
"""

from __future__ import annotations

import ctypes
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

SIDES = ((8, 4096), (32, 64), (32, 512), (64, 128), (64, 512), (128, 64))
MORE: tuple[dict[str, Any], ...] = (
    {"side": 32, "batch_size": 512, "batch_norm": True},
    {"side": 32, "batch_size": 512, "r1_gamma": 0.0},
    {"side": 32, "batch_size": 512, "loss": "wgan_gp"},
    {"side": 32, "batch_size": 2048, "micro_batches": 8},
    {"side": 64, "batch_size": 128, "precision": "mixed_bfloat16"},
    {"side": 64, "batch_size": 512, "micro_batches": 4},
    {"side": 64, "batch_size": 512, "micro_batches": 16},
)
_STATUS = pathlib.Path("/proc/self/status")


def measure(settings: dict[str, Any]) -> tuple[float, float]:
    """Estimates and measures a step in a process of its own, in MiB.

    Args:
        settings: of a `Config`, and `side`, of its images.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.memory", json.dumps(settings)],
        capture_output=True,
        check=True,
        text=True,
    )
    estimated, measured = json.loads(done.stdout.splitlines()[-1])
    return estimated, measured


def _resident_mib(name: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(name)


def peak_mib(action: Callable[[], object]) -> float:
    """Does something; returns how much this process had beyond before."""
    # Or what others have given back would be there to be taken.
    ctypes.CDLL(None).malloc_trim(0)
    # As proc(5) has it: the largest resident size counts from now on.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _resident_mib("VmRSS")
    action()
    return _resident_mib("VmHWM") - before


def _run(side: int, **settings: Any) -> None:
    import numpy as np
    import tensorflow as tf

    from dtrain.cluster import environment, strategy
    from dtrain.config import Config
    from dtrain.data import pipeline, sources
    from dtrain.data.sources import arrays
    from dtrain.gan import memory, state, step

    config = Config(**settings)
    alone = strategy.make(config, environment.ALONE)
    images = np.zeros((256, side, side, 3), np.uint8)
    source = arrays.ArraySource(config, images, None)
    gan = state.GAN(config, alone, source.image_shape, 0)
    steps = step.Step(gan)
    estimated = (
        memory.Estimate(gan, sources.Data(source), 1).need().num_bytes / 2**20
    )
    iterator = pipeline.make_iterator(
        sources.Data(source), config, alone, 0, config.discriminator_steps
    )
    # The largest from here on, and not of the import.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _resident_mib("VmRSS")
    steps.run(iterator, tf.constant(2))
    print(json.dumps([estimated, _resident_mib("VmHWM") - before]))


def main() -> None:
    """Measures one, or all."""
    if len(sys.argv) > 1:
        _run(**json.loads(sys.argv[1]))
        return
    sizes = [{"side": side, "batch_size": size} for side, size in SIDES]
    for settings in (*sizes, *MORE):
        estimated, measured = measure(settings)
        print(
            f"{estimated / measured:5.2f}  {estimated:6.0f} of "
            f"{measured:6.0f} MiB  {json.dumps(settings)}"
        )


if __name__ == "__main__":
    main()
