"""How much the samples differ from each other: a figure of a run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dtrain.config import Config
from dtrain.record import drawing
from dtrain.record.periodic import Periodic

_NUM_SAMPLES = 64


class SampleSpread(Periodic):
    """Measures `sample_spread`, from the same latents each time.

    It is the standard deviation of a pixel over 64 samples, averaged over the
    pixels, where a pixel lies in [-1, 1]. A generator that draws one picture
    whatever the latents has 0: all modes are lost.
    """

    names = ("sample_spread",)

    def __init__(
        self,
        config: Config,
        num_classes: int,
        draw: drawing.Draw,
        *,
        is_chief: bool,
    ) -> None:
        """Draws nothing yet.

        Args:
            config: `sample_every_steps`, `seed`, `latent_size` and
                `conditional` count.
            num_classes: of the data.
            draw: draws the pictures of the run.
            is_chief: whether this worker measures.
        """
        super().__init__(config.sample_every_steps)
        self._config = config
        self._labels = drawing.class_columns(config, num_classes, _NUM_SAMPLES)
        self._draw = draw
        self._is_chief = is_chief

    def run(self, step: int) -> Mapping[str, float]:
        """Measures it at a step; see `Periodic.run`."""
        del step
        if not self._is_chief:
            return {}
        latents = drawing.latents(self._config, self._config.seed, _NUM_SAMPLES)
        samples = drawing.draw(self._draw, latents, self._labels)
        return {"sample_spread": float(np.std(samples, axis=0).mean())}
