"""The one line that says how far a run is."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

import numpy as np

Clock = Callable[[], float]

# Shorter names, for the line; metrics.jsonl has the full ones.
_SHORT = {"discriminator_loss": "D loss", "generator_loss": "G loss"}


class Progress:
    """One line that says how far a run is; it rewrites itself on a terminal.

    Where the output is no terminal it is a plain line every few seconds.
    """

    def __init__(
        self,
        num_steps: int,
        batch_size: int,
        *,
        is_chief: bool = True,
        stream: TextIO | None = None,
        every_secs: float = 10.0,
        clock: Clock = time.monotonic,
    ) -> None:
        """Starts the clock.

        Args:
            num_steps: steps of the whole run.
            batch_size: images per step.
            is_chief: whether this worker is the one that shows it.
            stream: where the line goes; None is the standard output.
            every_secs: seconds between two lines where it is no terminal.
            clock: returns seconds.
        """
        self._num_steps = num_steps
        self._batch_size = batch_size
        self._is_chief = is_chief
        self._stream = stream or sys.stdout
        self._on_terminal = self._stream.isatty()
        self._every_secs = 0.2 if self._on_terminal else every_secs
        self._clock = clock
        self._steps_per_sec = 0.0
        # Time and step of the newest update; None before the first.
        self._seen: tuple[float, int] | None = None
        self._shown_secs = clock()
        self._is_open = False

    def update(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Shows how far the run is, if it is time to.

        Args:
            step: the steps that are done.
            metrics: float32 [steps] by name; the newest losses are shown.
        """
        now = self._clock()
        if self._seen:
            # The first call only starts the clock: compiling is no training.
            secs, steps = now - self._seen[0], step - self._seen[1]
            rate = steps / max(secs, 1e-9)
            weight = (
                1.0 if not self._steps_per_sec else 1 - math.exp(-secs / 5.0)
            )
            self._steps_per_sec += weight * (rate - self._steps_per_sec)
        self._seen = (now, step)
        if self._is_chief and now - self._shown_secs >= self._every_secs:
            self._shown_secs = now
            self._show(self._line(step, metrics))

    @property
    def images_per_sec(self) -> float:
        """How fast the run is at this moment; 0 before that is known."""
        return self._steps_per_sec * self._batch_size

    def _line(self, step: int, metrics: Mapping[str, np.ndarray]) -> str:
        parts = [f"step {step:,}/{self._num_steps:,}"]
        if self._steps_per_sec:
            left = round((self._num_steps - step) / self._steps_per_sec)
            parts += [
                f"{self.images_per_sec:,.0f} images/s",
                f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
            ]
        # Last, for a narrow terminal cuts the end off.
        parts += [
            f"{_SHORT.get(name, name)} {column[-1]:.3f}"
            for name, column in metrics.items()
            if name.endswith("_loss")
        ]
        return "  ".join(parts)

    def _show(self, line: str) -> None:
        if self._on_terminal:
            width = shutil.get_terminal_size().columns - 1
            # Clears the rest of the line, where spaces would push whatever is
            # typed, such as ^C, to the next one.
            self._stream.write(f"\r{line[:width]}\x1b[K")
            self._is_open = True
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Prints a line of its own, below the progress so far."""
        if self._is_chief:
            self._stream.write(f"\n{text}\n" if self._is_open else f"{text}\n")
            self._is_open = False
            self._stream.flush()
