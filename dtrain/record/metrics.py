"""The metrics of a run: metrics.jsonl, and what TensorBoard shows.

A line of metrics.jsonl holds the metrics of one step and no time of day, so a
run that was killed and went on has, at its end, the same file as one that was
not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dtrain.record import groups, hparams, log
from dtrain.record.events import Events
from dtrain.record.tracking import Tracker
from dtrain.storage import files


class Recorder:
    """Keeps the metrics of a run; the chief has a `RunRecorder`.

    The other workers have this one, whose methods do nothing.

    Attributes:
        notice: what was wrong with the file at the start; "" if nothing was.
        last: the metrics of the newest step, by name; None if not finite.
        owes: whether the line of the newest step waits for its figures.
    """

    owes = False

    def __init__(self) -> None:
        self.notice = ""
        self.last: dict[str, float | None] = {}

    def write(
        self,
        first_step: int,
        metrics: Mapping[str, np.ndarray],
        figures: Mapping[str, float] | None = None,
        images_per_sec: float = 0.0,
    ) -> None:
        """Writes the metrics of consecutive steps; never fails.

        Args:
            first_step: the number of the first one; a run begins with 1.
            metrics: float32 [steps] by name.
            figures: further metrics of the last step, by name; None are none.
            images_per_sec: for TensorBoard alone, for it is another one each
                time; 0 is not known.
        """

    def hold(self, first_step: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Writes as `write` does, but for the last step.

        Its line waits for figures that a notice has ended; a checkpoint has
        its metrics until then.
        """

    def finish(self, figures: Mapping[str, float]) -> None:
        """Writes the line that was owed; never fails.

        Args:
            figures: see `write`.
        """

    def write_image(self, step: int, tag: str, png: bytes) -> None:
        """Shows a picture in TensorBoard; never fails.

        Args:
            step: the steps that are done.
            tag: the picture's name.
            png: the bytes of a PNG file.
        """

    def failure(self) -> str:
        """Tells why lines wait in memory; "" if none do, or it was told."""
        return ""

    def state_of(self, step: int) -> dict[str, Any]:
        """Returns `bytes` and `sha256` of metrics.jsonl, for a checkpoint.

        Args:
            step: the newest that was written, or that of the start.
        """
        del step
        return {}

    def rewind(
        self,
        step: int,
        expected: Mapping[str, Any] | None,
        metrics: Mapping[str, float | None],
    ) -> None:
        """Drops what was written after `step`: the run has gone back.

        Args:
            step: the steps that are done.
            expected: what `state_of` returned at `step`.
            metrics: of the step.

        Raises:
            OSError: the disk or the store is at fault.
        """

    def flush(self) -> None:
        """Hands everything written so far to the file system, if it can."""

    def sync(self) -> None:
        """Puts every line so far on the disk; any thread may call it.

        If the run is on an object store, this is the disk of this host, where
        the next process of the host finds them; the store gets them soon.

        Raises:
            OSError: it cannot be done.
        """

    def publish(self) -> None:
        """Puts every line so far where the run is; any thread may call it.

        Raises:
            OSError: the disk or the store is at fault.
        """

    def close(self) -> None:
        """Closes the files; may be called twice."""


class RunRecorder(Recorder):
    """Writes the metrics of every step to the run's directory.

    If the disk fails, training goes on: the lines wait in memory until it
    works again. `sync` and `publish` raise if they are not safe.
    """

    def __init__(
        self,
        run_dir: str,
        step: int,
        expected: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float | None] | None = None,
        settings: Mapping[str, Any] | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        """Opens the files and drops what was written after `step`.

        Args:
            run_dir: the run's directory.
            step: the steps that are done.
            expected: what `state_of` returned at `step`; empty or None if it
                is not known.
            metrics: of the step, whose line is owed if it is not there.
            settings: of the run, for TensorBoard; None shows none.
            tracker: is shown what TensorBoard is; closed with this.

        Raises:
            OSError: the disk or the store is at fault.
        """
        super().__init__()
        self._run_dir = run_dir
        self._settings = settings
        self._tracker = tracker or Tracker()
        self._is_open = True
        self._has_told = False
        self._begin(step, expected, metrics or {})

    def _begin(
        self,
        step: int,
        expected: Mapping[str, Any] | None,
        metrics: Mapping[str, float | None],
    ) -> None:
        run_dir = self._run_dir
        self.last = dict(metrics)
        self._spool = log.Spool(run_dir) if files.is_remote(run_dir) else None
        self._step = step
        self._log = self._open_log(step, expected)
        if self._spool:
            self._spool.forget()
        directory = self._spool.path if self._spool else run_dir
        self._events = Events(os.path.join(directory, "events"))
        # After a START, TensorBoard drops what it has of later steps.
        start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
        self._events.write(step=step + 1, session_log=start)
        if self._settings:
            summary = hparams.summary(self._settings, time.time())
            self._events.write(step=step + 1, summary=summary)

    def _open_log(
        self, step: int, expected: Mapping[str, Any] | None
    ) -> log.Log:
        path = os.path.join(self._run_dir, "metrics.jsonl")
        if self._spool:
            candidates = self._spool.candidates("metrics.jsonl")
        else:
            candidates = [files.read(path) or b""]
        lines, is_whole = log.find(candidates or [b""], step, expected)
        # Saved by a process that was told to end before it had the figures.
        is_short = bool(step) and log.last_step(lines) == step - 1
        self.owes = is_whole and is_short
        if not is_whole:
            event = "is gone"
            if files.size(path) is not None:
                quarantine = os.path.join(self._run_dir, "quarantine")
                event = f"was moved to {log.put_aside(path, quarantine)}"
            num_lines = lines.count(b"\n")
            self.notice = (
                f"{path} is not what it was at step {step}: it {event}; "
                f"{num_lines:,} of its lines are kept"
            )
        if self._spool:
            path = os.path.join(self._spool.path, "metrics.jsonl")
            # Even if it is empty it is sent: the store may have later lines.
            files.append(path, b"")
        return log.Log(path, lines, is_temporary=self._spool is not None)

    def rewind(
        self,
        step: int,
        expected: Mapping[str, Any] | None,
        metrics: Mapping[str, float | None],
    ) -> None:
        """Begins again at an earlier step; see `Recorder.rewind`."""
        self._end()
        self._begin(step, expected, metrics)

    def write(
        self,
        first_step: int,
        metrics: Mapping[str, np.ndarray],
        figures: Mapping[str, float] | None = None,
        images_per_sec: float = 0.0,
    ) -> None:
        """Writes a line for each step; see `Recorder.write`."""
        rows = _rows(metrics)
        rows[-1] |= _shortest_of(figures or {})
        self._write(first_step, rows, figures or {}, images_per_sec)

    def hold(self, first_step: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Writes all lines but the last; see `Recorder.hold`."""
        *rows, last = _rows(metrics)
        self._write(first_step, rows)
        self._step, self.last, self.owes = first_step + len(rows), last, True

    def finish(self, figures: Mapping[str, float]) -> None:
        """Writes the line that was owed; see `Recorder.finish`."""
        self.owes = False
        rows = [self.last | _shortest_of(figures)]
        self._write(self._step, rows, figures)

    def _write(
        self,
        first_step: int,
        rows: Sequence[dict[str, float | None]],
        figures: Collection[str] = (),
        images_per_sec: float = 0.0,
    ) -> None:
        """Writes the lines of consecutive steps, and shows the last."""
        if not rows:
            return
        self.last = rows[-1]
        self._step = first_step + len(rows) - 1
        lines = [
            json.dumps({"step": step, **row}) + "\n"
            for step, row in enumerate(rows, first_step)
        ]
        # Before any checkpoint of these steps: a run that resumes from it
        # does not write their lines again.
        self._log.write("".join(lines).encode())
        self._show(figures, images_per_sec)

    def _show(self, figures: Collection[str], images_per_sec: float) -> None:
        """Writes the newest values for TensorBoard, in groups."""
        shown = {}
        for name, value in self.last.items():
            group = groups.of(name)
            group = group or ("figures" if name in figures else "metrics")
            shown[f"{group}/{name}"] = math.nan if value is None else value
        if images_per_sec:
            shown["speed/images_per_sec"] = images_per_sec
        self._tracker.write(self._step, shown)
        summary = tf.compat.v1.Summary()
        for tag, value in shown.items():
            summary.value.add(tag=tag, simple_value=value)
        self._events.write(step=self._step, summary=summary)
        self._events.flush()

    def write_image(self, step: int, tag: str, png: bytes) -> None:
        """Writes an event; see `Recorder.write_image`."""
        summary = tf.compat.v1.Summary()
        summary.value.add(tag=tag).image.encoded_image_string = png
        self._events.write(step=step, summary=summary)

    def failure(self) -> str:
        """Tells of lines that wait; see `Recorder.failure`."""
        reason = self._log.failure or (self._spool and self._spool.failure)
        has_told, self._has_told = self._has_told, bool(reason)
        if not reason or has_told:
            return self._tracker.news()
        return (
            f"the metrics wait in memory: {reason}; they are written when it "
            "works again"
        )

    def state_of(self, step: int) -> dict[str, Any]:
        """Sums what is written; see `Recorder.state_of`."""
        assert step == self._step, f"{step} is not {self._step}"
        return self._log.state

    def flush(self) -> None:
        """Flushes log and events; see `Recorder.flush`."""
        self._log.write(b"")
        self._events.flush()

    def sync(self) -> None:
        """Syncs the log; see `Recorder.sync`."""
        self._log.sync()
        if self._spool:
            self._spool.send_soon()

    def publish(self) -> None:
        """Sends the log; see `Recorder.publish`."""
        self._log.sync()
        if self._spool:
            self._spool.send()

    def close(self) -> None:
        """Closes log and events; see `Recorder.close`."""
        if self._is_open:
            self._tracker.close(self._step)
            self._end()
            self._is_open = False

    def _end(self) -> None:
        self.flush()
        self._events.close()
        if self._spool:
            self._spool.close()


def _rows(
    metrics: Mapping[str, np.ndarray],
) -> list[dict[str, float | None]]:
    """Returns the metrics of each step, by name."""
    return [
        dict(zip(metrics, map(_shortest, row), strict=True))
        for row in zip(*metrics.values(), strict=True)
    ]


def _shortest_of(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {
        name: _shortest(np.float32(value)) for name, value in figures.items()
    }


def _shortest(value: np.float32) -> float | None:
    """Returns the shortest number that float32 rounds back to the value.

    None stands for infinities and NaN, which JSON has no words for.
    """
    return float(str(value)) if np.isfinite(value) else None
