"""What a person sees of a run: metrics.jsonl, TensorBoard, a progress line.

A line of metrics.jsonl holds the losses of one step and no time, so the file
of a run that was killed is, at its end, the file of one that was not.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

import numpy as np
import tensorflow as tf

Clock = Callable[[], float]


class Recorder:
    """Writes the metrics of every step to the run's directory.

    For a worker that is not the chief every method does nothing.
    """

    def __init__(self, run_dir: str, step: int, *, is_chief: bool) -> None:
        """Opens the files and drops what was written after `step`.

        Args:
            run_dir: the run's directory.
            step: the steps that are done.
            is_chief: whether this worker writes.
        """
        self._is_chief = is_chief
        if not is_chief:
            return
        path = os.path.join(run_dir, "metrics.jsonl")
        _truncate(path, step)
        self._lines = tf.io.gfile.GFile(path, "a")
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        tf.io.gfile.makedirs(os.path.join(run_dir, "events"))
        self._events = tf.io.TFRecordWriter(
            os.path.join(run_dir, "events", name)
        )
        self._write_event(file_version="brain.Event:2")
        # TensorBoard drops what it has of the steps after a START.
        start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
        self._write_event(step=step + 1, session_log=start)

    def write(
        self, first_step: int, names: Sequence[str], rows: np.ndarray
    ) -> None:
        """Writes the metrics of consecutive steps.

        Args:
            first_step: the number of the first one; the first step of a run
                is 1.
            names: of the metrics.
            rows: float32 [steps, len(names)].
        """
        if not self._is_chief:
            return
        for step, row in enumerate(rows, first_step):
            values = {
                name: _shortest(value)
                for name, value in zip(names, row, strict=True)
            }
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
        last = first_step + len(rows) - 1
        summary = tf.compat.v1.Summary()
        for name, value in zip(names, rows[-1].tolist(), strict=True):
            summary.value.add(tag=name, simple_value=value)
        self._write_event(step=last, summary=summary)
        # Before any checkpoint of these steps: resumed from it, they would
        # never be written again.
        self.flush()

    def write_image(self, step: int, tag: str, png: bytes) -> None:
        """Shows a picture in TensorBoard.

        Args:
            step: the steps that are done.
            tag: the picture's name.
            png: the bytes of a PNG file.
        """
        if not self._is_chief:
            return
        summary = tf.compat.v1.Summary()
        summary.value.add(tag=tag).image.encoded_image_string = png
        self._write_event(step=step, summary=summary)

    def _write_event(self, **fields: object) -> None:
        event = tf.compat.v1.Event(wall_time=time.time(), **fields)
        self._events.write(event.SerializeToString())

    def flush(self) -> None:
        """Hands everything written so far to the file system."""
        if self._is_chief:
            self._lines.flush()
            self._events.flush()

    def close(self) -> None:
        """Closes the files; may be called twice."""
        if self._is_chief:
            self._lines.close()
            self._events.close()
            self._is_chief = False


def _shortest(value: np.float32) -> float | None:
    """Returns the shortest number that float32 rounds back to the value.

    None stands for what JSON cannot say: infinity, and no number at all.
    """
    return float(str(value)) if np.isfinite(value) else None


def _truncate(path: str, step: int) -> None:
    """Drops the lines of later steps, and one that a kill left unfinished."""
    if not tf.io.gfile.exists(path):
        return
    temporary = f"{path}.tmp"
    with (
        tf.io.gfile.GFile(path) as old,
        tf.io.gfile.GFile(temporary, "w") as new,
    ):
        # A GFile to which nothing is written is not made.
        new.write("")
        for line in old:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            new.write(line)
    tf.io.gfile.rename(temporary, path, overwrite=True)


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
        # Of the newest update, and of the newest line; None before the first.
        self._seen: tuple[float, int] | None = None
        self._shown_secs = clock()
        self._is_open = False

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows how far the run is, if it is time to.

        Args:
            step: the steps that are done.
            metrics: the newest, by name.
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

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = [f"step {step:,}/{self._num_steps:,}"]
        if self._steps_per_sec:
            parts.append(
                f"{self._steps_per_sec * self._batch_size:,.0f} images/s"
            )
        parts += [f"{name} {value:.3f}" for name, value in metrics.items()]
        if self._steps_per_sec:
            left = round((self._num_steps - step) / self._steps_per_sec)
            parts.append(
                f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
            )
        return "  ".join(parts)

    def _show(self, line: str) -> None:
        if self._on_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{line[:width]:<{width}}")
            self._is_open = True
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Prints a line of its own, below the progress so far."""
        if not self._is_chief:
            return
        self._stream.write(f"\n{text}\n" if self._is_open else f"{text}\n")
        self._is_open = False
        self._stream.flush()
