"""Directories as runs leave them, for what shows a run to a person."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dtrain.record import goodput, images
from dtrain.storage import sealed
from tests.ledger_test import make

PROTOCOL = {
    **{"extractor": "pixels", "digest": "ab" * 32, "num_real": 64},
    **{"num_generated": 64, "split": "train", "resize": "none"},
    **{"seed": 0, "weights": "average", "data": "cd" * 32},
}


def write(
    run_dir: pathlib.Path,
    num_steps: int = 100,
    *,
    settings: Mapping[str, Any] | None = None,
    spikes: Mapping[int, float] | None = None,
    attempts: Sequence[goodput.Attempt] = (),
    grids: Sequence[int] = (),
    figures: Mapping[int, float] | None = None,
) -> pathlib.Path:
    """Writes what a run of some steps would have written.

    Args:
        run_dir: of the run; it is made.
        num_steps: with a line of metrics each. The loss of the generator is
            1 + 1 / step, that of the discriminator -1.
        settings: as config.json has them, beside a few usual ones.
        spikes: losses of the generator that are others, by step.
        attempts: of the ledger; none is one that has finished.
        grids: steps that a grid is written at: green as the step is late.
        figures: Fréchet distances by step.
    """
    for name in ("ledger", "samples"):
        (run_dir / name).mkdir(parents=True)
    config = {"model": "dcgan", "dataset": "digits", "num_steps": num_steps}
    body = {
        "config": {**config, "run_dir": str(run_dir), **(settings or {})},
        "data": {"image_shape": [8, 8, 1], "num_images": 1797},
        "versions": {"dtrain": "0.1.0"},
    }
    (run_dir / "config.json").write_bytes(sealed.dumps(body))
    with open(run_dir / "metrics.jsonl", "w") as file:
        for step in range(1, num_steps + 1):
            loss = (spikes or {}).get(step, 1 + 1 / step)
            values = {"generator_loss": loss, "discriminator_loss": -1.0}
            values["generator_gradient_norm"] = abs(math.sin(step))
            file.write(json.dumps({"step": step, **values}) + "\n")
    for number, attempt in enumerate(attempts or [whole(num_steps)]):
        path = run_dir / "ledger" / f"20260101T000000Z-{number}.json"
        path.write_bytes(goodput.dumps(attempt))
    for step in grids:
        path = run_dir / "samples" / f"step-{step:06}.png"
        path.write_bytes(grid(round(255 * step / num_steps)))
    lines = [line(step, value) for step, value in (figures or {}).items()]
    if lines:
        (run_dir / "figures.jsonl").write_text("".join(lines))
    return run_dir


def whole(num_steps: int) -> goodput.Attempt:
    """Returns an attempt that did all steps: 10 s to start, 90 s to train."""
    points = [(10.0, 0, 0.0), (100.0, num_steps, 90.0)]
    return make(0, {"start": 10.0, "train": 90.0}, points, exit_code=0)


def grid(green: int) -> bytes:
    """Returns a PNG of a grid in one colour, 512 pixels wide."""
    pixels = np.full((8, 8, 3), (40, green, 40), np.uint8)
    pixels[0, 0] = 255
    return images.encode_png(pixels.repeat(64, axis=0).repeat(64, axis=1))


def line(step: int, distance: float, **protocol: Any) -> str:
    """Returns a line of figures.jsonl."""
    row = {
        "step": step,
        "checkpoint": None,
        "protocol": {**PROTOCOL, **protocol},
        "figures": {
            "frechet_distance": distance,
            "kernel_distance": distance / 100,
            "kernel_distance_error": 0.001,
        },
        "floor": {"frechet_distance": 0.5},
        "secs": 3.2,
    }
    return json.dumps(row) + "\n"
