"""The grid of samples that a run draws as it goes, from the same latents."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from dtrain.config import Config, RunSettings
from dtrain.record import drawing, images
from dtrain.record.metrics import Recorder
from dtrain.record.periodic import Periodic

# A notice may leave less time than a picture takes.
_DRAWING_SECS = 15.0


def grid_path(config: RunSettings, step: int) -> str:
    """Returns where the grid of a step is written."""
    return os.path.join(config.run_dir, "samples", f"step-{step:06}.png")


def first_path(run_dir: str) -> str:
    """Returns where the grid of a run's first weights is written."""
    return os.path.join(run_dir, "init.png")


def write_first(config: Config, num_classes: int, draw: drawing.Draw) -> None:
    """Writes the grid of a run that is about to take its first step.

    There is seen whether what `--init_from` names was taken.

    Args:
        config: the run's settings.
        num_classes: of the data.
        draw: draws the pictures of the run.
    """
    grid = drawing.fixed_grid(draw, config, num_classes)
    images.write_or_say(first_path(config.run_dir), images.encode_png(grid))


class Samples(Periodic):
    """Draws the grid: on the chief alone, and if there is time for it."""

    at_end = True

    def __init__(
        self,
        config: Config,
        num_classes: int,
        draw: drawing.Draw,
        recorder: Recorder,
        secs_left: Callable[[], float],
        *,
        is_chief: bool,
    ) -> None:
        """Draws nothing yet.

        Args:
            config: `run_dir`, `sample_every_steps`, `seed`, `latent_size` and
                `conditional` count.
            num_classes: of the data.
            draw: draws the pictures of the run.
            recorder: shows the grid in TensorBoard.
            secs_left: returns the seconds until the process is killed;
                infinite if it was not told to end.
            is_chief: whether this worker draws.
        """
        super().__init__(config.sample_every_steps)
        self._config = config
        self._num_classes = num_classes
        self._draw = draw
        self._recorder = recorder
        self._secs_left = secs_left
        self._is_chief = is_chief

    def run(self, step: int) -> Mapping[str, float]:
        """Draws the grid of a step; see `Periodic.run`."""
        if not self._is_chief or self._secs_left() < _DRAWING_SECS:
            return {}
        grid = drawing.fixed_grid(self._draw, self._config, self._num_classes)
        png = images.encode_png(grid)
        images.write_or_say(grid_path(self._config, step), png)
        self._recorder.write_image(step, "samples", png)
        return {}
