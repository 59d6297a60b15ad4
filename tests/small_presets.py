"""Presets as tests and benchmarks train them: small, on data of their kind."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from dtrain.config import presets


class Way(NamedTuple):
    """How a preset is trained here.

    Attributes:
        flags: of the data, where PLACE stands for the directory of
            `programs_test.write_data`, and others.
        drawn: the network that draws, or the last of several that do.
    """

    flags: tuple[str, ...] = ("--dataset=npz:PLACE/shapes.npz",)
    drawn: str = "generator"


# Groups that a quarter of a batch of eight has, too.
_STYLES = Way(
    (
        "--dataset=npz:PLACE/shapes.npz",
        "--model_flag=group_size=2",
        "--model_flag=mapping_layers=2",
    ),
    "synthesis",
)
_WAYS = {
    "mlp": Way(("--dataset=points:grid",)),
    "r3gan": Way(
        ("--dataset=npz:PLACE/shapes.npz", "--model_flag=group_width=2")
    ),
    **dict.fromkeys(("stylegan2", "auto"), _STYLES),
    "pix2pix": Way(
        ("--dataset=npz:PLACE/pairs.npz", "--model_flag=target=left")
    ),
    "cyclegan": Way(
        (
            "--dataset=npz:PLACE/shapes.npz",
            "--unpaired=other=npz:PLACE/other.npz",
        ),
        "x_to_y",
    ),
}
# A norm over the batch is one over its parts when the batch is cut.
NORMED = ("dcgan", "lsgan", "wgan_gp", "sngan", "biggan_small")
_DECIDED = {
    "r1_gamma": 0.1,
    "generator_learning_rate": 0.0025,
    "discriminator_learning_rate": 0.0025,
    "ema_half_life_images": 1000.0,
}
WAYS = {name: _WAYS.get(name, Way()) for name in presets.PRESETS}


def flags(name: str, place: pathlib.Path) -> list[str]:
    """Returns the flags of a preset on its data, with few channels.

    Args:
        name: of the preset.
        place: where `programs_test.write_data` has written.
    """
    decided = presets.of(name).decided
    return [
        f"--preset={name}",
        *("--base_channels=4", "--latent_size=8", "--batch_size=8"),
        # Which auto decides otherwise.
        *(f"--{flag}={_DECIDED[flag]}" for flag in decided if flag in _DECIDED),
        *(each.replace("PLACE", str(place)) for each in WAYS[name].flags),
    ]
