"""What a person sees of a run: metrics.jsonl, TensorBoard, a progress line.

A line of metrics.jsonl holds the losses of one step and no time, so the file
of a run that was killed is, at its end, the file of one that was not.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
import tensorflow as tf

from dtrain.record import log
from dtrain.storage import files

Clock = Callable[[], float]

# What the disk raises, and TensorFlow's own writer.
_FAILURES = (OSError, tf.errors.OpError)


class Recorder:
    """Writes the metrics of every step to the run's directory.

    For a worker that is not the chief every method does nothing. A disk that
    fails stops nobody here: the lines wait in memory for one that works, and
    `sync` says whether they are safe.

    Attributes:
        notice: what was wrong with the lines at the start; "" if nothing was.
        last: the metrics of the newest step, by name.
    """

    def __init__(
        self,
        run_dir: str,
        step: int,
        *,
        is_chief: bool,
        expected: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the files and drops what was written after `step`.

        Args:
            run_dir: the run's directory.
            step: the steps that are done.
            is_chief: whether this worker writes.
            expected: what `state_of` returned at `step`; empty or None if
                that is not known.

        Raises:
            OSError: the disk or the store is at fault.
        """
        self._is_chief = is_chief
        self._run_dir = run_dir
        self.notice = ""
        self.last: dict[str, float | None] = {}
        if is_chief:
            self._begin(step, expected)

    def _begin(self, step: int, expected: Mapping[str, Any] | None) -> None:
        run_dir = self._run_dir
        self._spool = log.Spool(run_dir) if files.is_remote(run_dir) else None
        self._step = step
        self._log = self._open_log(run_dir, step, expected)
        if self._spool:
            self._spool.forget()
        where = self._spool.path if self._spool else run_dir
        self._events = _Events(os.path.join(where, "events"))
        # TensorBoard drops what it has of the steps after a START.
        start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
        self._events.write(step=step + 1, session_log=start)

    def _open_log(
        self, run_dir: str, step: int, expected: Mapping[str, Any] | None
    ) -> log.Log:
        path = os.path.join(run_dir, "metrics.jsonl")
        if self._spool:
            candidates = self._spool.candidates("metrics.jsonl")
        else:
            held = files.read(path)
            candidates = [] if held is None else [held]
        found = log.find(candidates or [b""], step, expected)
        if not found.is_whole:
            where = "is gone"
            if files.size(path) is not None:
                target = log.put_aside(
                    path, os.path.join(run_dir, "quarantine")
                )
                where = f"was moved to {target}"
            num_lines = found.content.count(b"\n")
            self.notice = (
                f"{path} is not what it was at step {step}: it {where}; "
                f"{num_lines:,} of its lines are kept"
            )
        if self._spool:
            path = os.path.join(self._spool.path, "metrics.jsonl")
            # Even without a line: the store may have some of later steps.
            files.append(path, b"")
        return log.Log(path, found.content)

    def rewind(self, step: int, expected: Mapping[str, Any] | None) -> None:
        """Drops what was written after `step`: the run has gone back.

        Args:
            step: the steps that are done.
            expected: what `state_of` returned at `step`.

        Raises:
            OSError: the disk or the store is at fault.
        """
        if self._is_chief:
            self._end()
            self._begin(step, expected)

    def write(
        self, first_step: int, names: Sequence[str], rows: np.ndarray
    ) -> None:
        """Writes the metrics of consecutive steps; fails never.

        Args:
            first_step: the number of the first one; the first step of a run
                is 1.
            names: of the metrics.
            rows: float32 [steps, len(names)].
        """
        if not self._is_chief:
            return
        lines = []
        for step, row in enumerate(rows, first_step):
            self.last = {
                name: _shortest(value)
                for name, value in zip(names, row, strict=True)
            }
            lines.append(json.dumps({"step": step, **self.last}) + "\n")
        self._step = first_step + len(rows) - 1
        # Before any checkpoint of these steps: resumed from it, they would
        # never be written again.
        self._log.write("".join(lines).encode())
        summary = tf.compat.v1.Summary()
        for name, value in zip(names, rows[-1].tolist(), strict=True):
            summary.value.add(tag=name, simple_value=value)
        self._events.write(step=self._step, summary=summary)
        self._events.flush()

    def write_image(self, step: int, tag: str, png: bytes) -> None:
        """Shows a picture in TensorBoard; fails never.

        Args:
            step: the steps that are done.
            tag: the picture's name.
            png: the bytes of a PNG file.
        """
        if not self._is_chief:
            return
        summary = tf.compat.v1.Summary()
        summary.value.add(tag=tag).image.encoded_image_string = png
        self._events.write(step=step, summary=summary)

    @property
    def failure(self) -> str:
        """Why lines wait, or are not in the store yet; "" if none do."""
        if not self._is_chief:
            return ""
        return self._log.failure or (self._spool.failure if self._spool else "")

    def state_of(self, step: int) -> dict[str, Any]:
        """Returns `bytes` and `sha256` of metrics.jsonl, up to `step`.

        Args:
            step: the newest that was written, or that of the start.
        """
        if not self._is_chief:
            return {}
        assert step == self._step, f"{step} is not {self._step}"
        return self._log.state

    def flush(self) -> None:
        """Hands everything written so far to the file system, if it can."""
        if self._is_chief:
            self._log.write(b"")
            self._events.flush()

    def sync(self) -> None:
        """Puts every line so far on the disk; any thread may call it.

        Of a run on an object store this is the disk of this host, where a
        process that starts here again finds them; the store gets them soon.

        Raises:
            OSError: it cannot be done.
        """
        if self._is_chief:
            self._log.sync()
            if self._spool:
                self._spool.send_soon()

    def publish(self) -> None:
        """Puts every line so far where the run is; any thread may call it.

        Raises:
            OSError: the disk or the store is at fault.
        """
        if self._is_chief:
            self._log.sync()
            if self._spool:
                self._spool.send()

    def close(self) -> None:
        """Closes the files; may be called twice."""
        if self._is_chief:
            self._end()
            self._is_chief = False

    def _end(self) -> None:
        self.flush()
        self._events.close()
        if self._spool:
            self._spool.close()


class _Events:
    """A file for TensorBoard.

    What cannot be written is left out, for metrics.jsonl has all of it.
    """

    # A file that is sent to a store is sent whole each time.
    _MAX_BYTES = 16 << 20

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._writer: tf.io.TFRecordWriter | None = None
        self._num_bytes = 0
        # The writer is not safe to be used by two threads.
        self._lock = threading.Lock()

    def write(self, **fields: object) -> None:
        """Writes one event."""
        event = tf.compat.v1.Event(wall_time=time.time(), **fields)
        with self._lock:
            try:
                self._write(event.SerializeToString())
            except _FAILURES:
                self._abandon()

    def _write(self, event: bytes) -> None:
        if self._num_bytes > self._MAX_BYTES:
            self._abandon()
        writer = self._writer or self._open()
        self._writer = writer
        writer.write(event)
        self._num_bytes += len(event)

    def _open(self) -> tf.io.TFRecordWriter:
        os.makedirs(self._directory, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}"
        path = os.path.join(self._directory, name)
        writer = tf.io.TFRecordWriter(path)
        version = tf.compat.v1.Event(
            wall_time=now, file_version="brain.Event:2"
        )
        try:
            writer.write(version.SerializeToString())
            writer.flush()
        except _FAILURES:
            # Each event would leave another empty one on a disk that is full.
            with contextlib.suppress(*_FAILURES):
                writer.close()
            files.remove(path)
            raise
        self._num_bytes = 0
        return writer

    def flush(self) -> None:
        with self._lock:
            if self._writer:
                try:
                    self._writer.flush()
                except _FAILURES:
                    self._abandon()

    def _abandon(self) -> None:
        """Ends a file; after a failure another one is begun."""
        if self._writer:
            with contextlib.suppress(*_FAILURES):
                self._writer.close()
            self._writer = None

    def close(self) -> None:
        with self._lock:
            self._abandon()


def _shortest(value: np.float32) -> float | None:
    """Returns the shortest number that float32 rounds back to the value.

    None stands for what JSON cannot say: infinity, and no number at all.
    """
    return float(str(value)) if np.isfinite(value) else None


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
            rate = self._steps_per_sec * self._batch_size
            left = round((self._num_steps - step) / self._steps_per_sec)
            parts += [
                f"{rate:,.0f} images/s",
                f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
            ]
        # Last, for a narrow terminal cuts the end off.
        parts += [f"{name} {value:.3f}" for name, value in metrics.items()]
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
        if not self._is_chief:
            return
        self._stream.write(f"\n{text}\n" if self._is_open else f"{text}\n")
        self._is_open = False
        self._stream.flush()
