"""What one does with a job that was submitted: status, logs, stop, list."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from dtrain import errors, flags
from dtrain.errors import StorageError, UserError
from launch import submission
from launch.backends import slurm
from launch.job import QUEUED, RUNNING, UNKNOWN, State
from launch.submission import Submission
from launch.submit import BACKENDS

# For one file, which a store may be slow to take.
_STOP_SECS = 120
_POLL_SECS = 2.0
_ASK_EVERY_SECS = 5.0
_TITLES = ("job", "backend", "name", "how", "submitted", "run")
_NO_METRICS = (ValueError, KeyError, TypeError)
_RUN_DIR = {"run_dir": ("", "Directory of the run, or its record_dir.")}


def status(arguments: Sequence[str]) -> int:
    """Says how the job of a run is, and how far the run."""
    job = _find(flags.parse_flags(arguments, _RUN_DIR)["run_dir"])
    states = _states(job)
    _say(f"{job.name}  {job.backend}  submitted {job.submitted}")
    for state in states:
        _say(f"{state.phase}  {state.details}")
    for run_dir in job.run_dirs:
        progress = _progress(run_dir)
        if progress:
            _say(f"{run_dir}: {progress}")
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
        _say(f"{job.name} saves and ends")
        while _is_any(job, RUNNING, missed=True):
            time.sleep(_POLL_SECS)
            # A run of a sweep may have had no directory yet.
            untold = [run_dir for run_dir in untold if not _tell(run_dir)]
    if _is_any(job, QUEUED, RUNNING):
        BACKENDS[job.backend].cancel(job)
    _say(f"{job.name} is not started again; {_states(job)[0].details}")
    return errors.FINISHED


def list_jobs(arguments: Sequence[str]) -> int:
    """Prints a line for each job of the runs in a directory."""
    known = {"run_dir": ("runs", "Directory of the runs.")}
    values = flags.parse_flags(arguments, known)
    rows = []
    silent: set[str] = set()
    is_any = False
    for record_dir in submission.find(flags.expand_home(values["run_dir"])):
        try:
            job = submission.read(record_dir)
        except StorageError as error:
            # It hides no other.
            _say(str(error), sys.stderr)
            is_any = True
            continue
        if job:
            rows.append(_row(job, silent))
    if rows:
        _print_table([_TITLES, *rows])
    elif not is_any:
        _say(f"no run in {values['run_dir']} was submitted")
    return errors.FINISHED


def _row(job: Submission, silent: set[str]) -> tuple[str, ...]:
    """Makes the line of a job; `silent` are backends that do not answer."""
    phases = [UNKNOWN]
    try:
        if job.backend not in silent:
            phases = sorted({state.phase for state in _states(job)})
    except (UserError, StorageError) as error:
        # The others have another scheduler, or it answers for them.
        _say(f"{job.name}: {error}", sys.stderr)
        # But nobody waits a minute for each of a hundred.
        if isinstance(error, (StorageError, submission.NoProgramError)):
            silent.add(job.backend)
    # Of a sweep, the directory of all; `gs://` is no path to `os.path`.
    steps = zip(*(path.split("/") for path in job.run_dirs), strict=False)
    common = itertools.takewhile(lambda names: len({*names}) == 1, steps)
    return (
        job.job_id,
        job.backend,
        job.name,
        "+".join(phases),
        job.submitted,
        errors.printable("/".join(names[0] for names in common)),
    )


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(
            text.ljust(width) for text, width in zip(row, widths, strict=True)
        )
        _say(line.rstrip())


def _say(line: str, stream: TextIO | None = None) -> None:
    """Prints a line, in which a scheduler or a file may have had a word."""
    print(errors.printable(line), file=stream or sys.stdout, flush=True)


def _find(record_dir: str) -> Submission:
    if not record_dir:
        raise UserError("run_dir is missing; use --run_dir=DIR")
    job = submission.read(flags.expand_home(record_dir))
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
        UserError: the scheduler refuses, and `missed` is None; else that is
            returned, and a line says so. Or nobody can ask it here.
        StorageError: it does not answer; the same.
    """
    try:
        return any(state.phase in phases for state in _states(job))
    except (UserError, StorageError) as error:
        # One that is missing will not answer later.
        if missed is None or isinstance(error, submission.NoProgramError):
            raise
        _say(f"{job.name}: {error}", sys.stderr)
        return missed


def _tell(run_dir: str) -> bool:
    """Writes the stop file; returns whether there is a run to be stopped.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dtrain.stop", f"--run_dir={run_dir}"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_STOP_SECS,
        )
    except subprocess.TimeoutExpired as error:
        raise StorageError(
            f"{run_dir} does not answer within {_STOP_SECS} s"
        ) from error
    if done.returncode not in (errors.FINISHED, errors.USER_ERROR):
        raise StorageError(done.stderr.strip()[-300:])
    return done.returncode == errors.FINISHED


def _progress(run_dir: str) -> str:
    """Says how far a run on a disk is; empty if that cannot be seen."""
    path = os.path.join(run_dir, "metrics.jsonl")
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - (1 << 16)))
            # Behind the last end of a line one may just be written.
            lines = file.read().split(b"\n")[-3:]
        ago = max(0, time.time() - os.path.getmtime(path))
        step = max(int(json.loads(line)["step"]) for line in lines[:-1] if line)
        return f"step {step:,}, {ago:.0f} s ago"
    except (OSError, ArithmeticError, RecursionError, *_NO_METRICS):
        return ""
