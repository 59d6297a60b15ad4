"""What one does with a job that was submitted: status, logs, stop, list."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from dtrain import errors, flags
from dtrain.errors import UserError
from launch import submission
from launch.backends import slurm
from launch.job import QUEUED, RUNNING, UNKNOWN, State
from launch.submission import Submission
from launch.submit import BACKENDS

_POLL_SECS = 2.0
_ASK_EVERY_SECS = 5.0
_RUN_DIR = {"run_dir": ("", "Directory of the run, or its record_dir.")}


def status(arguments: Sequence[str]) -> int:
    """Says how the job of a run is, and how far the run."""
    job = _find(flags.parse_flags(arguments, _RUN_DIR)["run_dir"])
    print(f"{job.name}  {job.backend}  submitted {job.submitted}")
    for state in _states(job):
        print(f"{state.phase}  {state.details}")
    for run_dir in job.run_dirs:
        progress = _progress(run_dir)
        if progress:
            print(f"{run_dir}: {progress}")
    return errors.FINISHED


def logs(arguments: Sequence[str]) -> int:
    """Prints what the workers say."""
    known = {**_RUN_DIR, "follow": (False, "Goes on until the job is over.")}
    values = flags.parse_flags(arguments, known)
    job = _find(values["run_dir"])
    # Schedulers should not be asked twice a second.
    asked_at, over = -math.inf, False

    def is_over() -> bool:
        nonlocal asked_at, over
        if time.monotonic() - asked_at >= _ASK_EVERY_SECS:
            over = not _is_any(job, QUEUED, RUNNING, missed=True)
            asked_at = time.monotonic()
        return over

    BACKENDS[job.backend].show_logs(job, values["follow"], is_over)
    return errors.FINISHED


def stop(arguments: Sequence[str]) -> int:
    """Lets the run save and end, then takes the job out of its queue."""
    record_dir = flags.parse_flags(arguments, _RUN_DIR)["run_dir"]
    job = _find(record_dir)
    if len(job.run_dirs) > 1 and _is_any(job, QUEUED):
        # Or a run of a sweep that ends would let the next one start.
        slurm.cancel_queued(job)
    run_dirs = job.run_dirs if _is_any(job, RUNNING) else ()
    untold = [run_dir for run_dir in run_dirs if not _tell(run_dir)]
    if len(untold) < len(run_dirs):
        print(f"{job.name} saves and ends", flush=True)
        while _is_any(job, RUNNING, missed=True):
            time.sleep(_POLL_SECS)
            # A run of a sweep may have had no directory yet.
            untold = [run_dir for run_dir in untold if not _tell(run_dir)]
    if _is_any(job, QUEUED, RUNNING):
        BACKENDS[job.backend].cancel(job)
    print(f"{job.name} is not started again; {_states(job)[0].details}")
    return errors.FINISHED


def list_jobs(arguments: Sequence[str]) -> int:
    """Prints a line for each job of the runs in a directory."""
    known = {"run_dir": ("runs", "Directory of the runs.")}
    values = flags.parse_flags(arguments, known)
    jobs = submission.find(os.path.expanduser(values["run_dir"]))
    if not jobs:
        print(f"no run in {values['run_dir']} was submitted")
        return errors.FINISHED
    rows = [("job", "backend", "name", "how", "submitted", "run")]
    for job in jobs:
        try:
            phases = sorted({state.phase for state in _states(job)})
        except UserError as error:
            # The others have another scheduler, or it answers again.
            print(f"{job.name}: {error}", file=sys.stderr)
            phases = [UNKNOWN]
        rows.append(
            (
                job.job_id,
                job.backend,
                job.name,
                "+".join(phases),
                job.submitted,
                # Of a sweep, the directory of all; `gs://` is no path to it.
                os.path.commonpath(job.run_dirs)
                if len(job.run_dirs) > 1
                else job.run_dirs[0],
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(
            text.ljust(width) for text, width in zip(row, widths, strict=True)
        )
        print(line.rstrip())
    return errors.FINISHED


def _find(record_dir: str) -> Submission:
    if not record_dir:
        raise UserError("run_dir is missing; use --run_dir=DIR")
    job = submission.read(os.path.expanduser(record_dir))
    if job is None:
        raise UserError(
            f"run_dir ({record_dir}) has no job; name the run_dir, or the "
            "record_dir, that it was submitted with"
        )
    return job


def _states(job: Submission) -> list[State]:
    return BACKENDS[job.backend].states(job)


def _is_any(job: Submission, *phases: str, missed: bool | None = None) -> bool:
    """Tells whether a run of a job is in one of some phases.

    Raises:
        UserError: the scheduler does not answer, and `missed` is None; else
            that is returned, and a line says so.
    """
    try:
        return any(state.phase in phases for state in _states(job))
    except UserError as error:
        if missed is None:
            raise
        print(f"{job.name}: {error}", file=sys.stderr)
        return missed


def _tell(run_dir: str) -> bool:
    """Writes the stop file; returns whether there is a run to be stopped.

    Raises:
        StorageError: it cannot be written.
    """
    done = subprocess.run(
        [sys.executable, "-m", "dtrain.stop", f"--run_dir={run_dir}"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode not in (errors.FINISHED, errors.USER_ERROR):
        raise errors.StorageError(done.stderr.strip()[-300:])
    return done.returncode == errors.FINISHED


def _progress(run_dir: str) -> str:
    """Says how far a run on a disk is; empty if that cannot be seen."""
    path = os.path.join(run_dir, "metrics.jsonl")
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - (1 << 16)))
            # Behind the last end of a line one may just be written.
            lines = file.read().split(b"\n")[-3:]
        ago = time.time() - os.path.getmtime(path)
        step = max(json.loads(line)["step"] for line in lines[:-1] if line)
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"step {step:,}, {ago:.0f} s ago"
