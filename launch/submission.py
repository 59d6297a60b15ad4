"""A job that was submitted, as it is written down in its run's directory.

There launch/job.json describes the newest job; the files of each submission are
beside it, in a directory of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dtrain.errors import StorageError, UserError
from dtrain.storage import files
from launch.job import Job, Plan
from launch.options import BACKENDS

_VERSION = 1
# Characters of what a scheduler says that are shown.
_MAX_WORDS = 500
_REMEDY = "is this a machine from which jobs are submitted?"


@dataclasses.dataclass(frozen=True)
class Submission:
    """A job that was submitted.

    Attributes:
        backend: whose job it is.
        job_id: by which its scheduler knows it.
        name: of the job.
        run_dirs: of the runs; more than one of a sweep.
        directory: where the files of the plan are.
        submitted_secs: when, in seconds since 1970.
        options: values of the flags in front of the --, but for defaults.
        arguments: the flags behind it.
        submit: the command that submitted it.
        versions: see `code.versions`.
    """

    backend: str
    job_id: str
    name: str
    run_dirs: Sequence[str]
    directory: str
    submitted_secs: int
    options: Mapping[str, Any]
    arguments: Sequence[str]
    submit: Sequence[str]
    versions: Mapping[str, Any]

    @property
    def submitted(self) -> str:
        """When, for people."""
        return time.strftime(
            "%Y-%m-%d %H:%M:%S", time.localtime(self.submitted_secs)
        )


def directory_of(record_dir: str) -> str:
    """Returns where the jobs of a run are written down."""
    return os.path.join(record_dir, "launch")


def absolute(path: str) -> str:
    """Returns a path that means the same from any directory."""
    return path if files.is_remote(path) else os.path.abspath(path)


def make(
    job: Job, plan: Plan, job_id: str, versions: Mapping[str, Any]
) -> Submission:
    """Describes a job that has just been submitted."""
    options = {
        flag.name: getattr(job.options, flag.name)
        for flag in dataclasses.fields(job.options)
        if getattr(job.options, flag.name) != flag.default
    }
    return Submission(
        backend=job.options.backend,
        job_id=job_id,
        name=job.name,
        run_dirs=[absolute(run_dir) for run_dir in plan.run_dirs],
        directory=job.directory,
        submitted_secs=job.submitted_secs,
        options=options,
        arguments=job.arguments,
        submit=plan.submit,
        versions=versions,
    )


def write(submission: Submission, record_dir: str) -> None:
    """Writes a submission down; one that was there before is replaced.

    Args:
        submission: what to write.
        record_dir: see `directory_of`.

    Raises:
        StorageError: it cannot be written.
    """
    text = json.dumps(
        {"version": _VERSION, **dataclasses.asdict(submission)}, indent=1
    )
    directory = directory_of(record_dir)
    with files.storage_errors(directory):
        files.write(
            f"{directory}/job.json", f"{text}\n".encode(), make_parents=True
        )


def read(record_dir: str) -> Submission | None:
    """Reads what `write` has written; None if there is none.

    Raises:
        StorageError: it cannot be read, or is damaged.
    """
    path = os.path.join(directory_of(record_dir), "job.json")
    with files.storage_errors(path):
        text = files.read(path)
    if not text:
        return None
    try:
        values = json.loads(text)
        if values.pop("version") != _VERSION:
            raise StorageError(
                f"{path} is of another version of dtrain; use that one"
            )
        return _check(Submission(**values))
    except (
        *(ValueError, TypeError, KeyError),
        *(AttributeError, RecursionError),
    ) as error:
        raise StorageError(
            f"{path} is damaged ({error}); the scheduler's own commands still "
            "know the job"
        ) from error


def _check(submission: Submission) -> Submission:
    """Checks what the verbs rely on.

    Raises:
        ValueError: it is not what `make` makes.
    """
    if not isinstance(submission.run_dirs, list) or not submission.run_dirs:
        raise ValueError("it has no run_dirs")
    texts = [
        *(submission.backend, submission.job_id, submission.name),
        *(submission.directory, *submission.run_dirs),
    ]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("what is to be text is none")
    if (
        submission.backend not in BACKENDS[1:]
        or type(submission.submitted_secs) is not int
    ):
        raise ValueError("backend or submitted_secs is unknown")
    return submission


def find(directory: str) -> list[Submission]:
    """Finds the submissions of the runs in a directory, and of itself.

    Raises:
        UserError: it is no directory.
        StorageError: it, or a submission in it, cannot be read.
    """
    with files.storage_errors(directory):
        if not files.is_directory(directory):
            raise UserError(f"{directory} is no directory; use --run_dir=DIR")
        run_dirs = sorted(
            os.path.join(directory, name)
            for name, is_directory in files.entries(directory)
            if is_directory
        )
    submissions = [read(run_dir) for run_dir in (directory, *run_dirs)]
    return [submission for submission in submissions if submission]


def ask(command: Sequence[str], stdin: str = "", remedy: str = _REMEDY) -> str:
    """Runs a command of a scheduler; returns what it prints.

    Args:
        command: the program and its arguments; no shell sees them.
        stdin: what it reads.
        remedy: what to do where there is no such program.

    Raises:
        UserError: there is no such program, or it fails; with its last words.
    """
    with _program(command, remedy):
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())[-_MAX_WORDS:]
        raise UserError(
            f"{command[0]} failed with {done.returncode}: {words or 'no word'}"
        )
    return done.stdout


def show(command: Sequence[str], remedy: str) -> None:
    """Runs a command that prints the logs of a job, until it ends.

    Args:
        command: the program and its arguments; its exit code may be the job's.
        remedy: what to do where there is no such program.

    Raises:
        UserError: there is none.
    """
    with _program(command, remedy):
        subprocess.run(command)


@contextlib.contextmanager
def _program(command: Sequence[str], remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{command[0]} cannot be run ({error.strerror}); {remedy}"
        ) from error
