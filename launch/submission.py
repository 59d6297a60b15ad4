"""A job that was submitted, as it is written down in its run's directory.

There launch/job.json describes the newest job; the files of each submission are
beside it, in a directory of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from dtrain.errors import StorageError, UserError
from dtrain.storage import files
from launch import options as options_lib
from launch.job import Job, Plan
from launch.options import Options

_T = TypeVar("_T")

_FILE = "job.json"
_VERSION = 1
# By which each scheduler knows a job: nothing that a program would take for an
# option, nor Vertex AI for another host.
_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_JOB_IDS = {
    "slurm": "[0-9]{1,20}",
    "kubernetes": f"{_LABEL}/{_LABEL}",
    "vertex": rf"projects/[\w.:-]+/locations/{_LABEL}/customJobs/[0-9]+",
    "skypilot": "[0-9]{1,20}",
}
# What a calendar has.
_MAX_SECS = 253_402_300_800
# Characters of what others say that are shown.
_MAX_WORDS = 500
# What a busy server may take for an answer; and for all logs of a job.
_TIMEOUT_SECS = 60.0
LOG_SECS = 600.0
_REMEDY = "is this a machine from which jobs are submitted?"


class NoProgramError(UserError):
    """What asks a scheduler is not on this machine."""


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
            f"{directory}/{_FILE}", f"{text}\n".encode(), make_parents=True
        )


def read(record_dir: str) -> Submission | None:
    """Reads what `write` has written; None if there is none.

    Raises:
        StorageError: it cannot be read, or is damaged.
    """
    path = os.path.join(directory_of(record_dir), _FILE)
    with files.storage_errors(path):
        text = files.read(path)
    if text is None:
        return None
    try:
        return _decode(json.loads(text))
    except (ValueError, RecursionError) as error:
        words = str(error)[:_MAX_WORDS]
        raise StorageError(
            f"{path} is damaged ({words}); remove it when its job is over, "
            "which the scheduler's own commands still know"
        ) from error


def _decode(values: Any) -> Submission:
    """Makes a submission of what a file says, which may be anything.

    Raises:
        ValueError: it is not what `write` writes.
        StorageError: another version of dtrain has written it.
    """
    record = dict(_typed("it", values, dict))
    version = _typed("version", record.pop("version", None), int)
    if version != _VERSION:
        raise StorageError(
            f"{_FILE} is of version {version}, and this dtrain knows "
            f"{_VERSION}; use the dtrain that submitted the job"
        )
    names = [field.name for field in dataclasses.fields(Submission)]
    if sorted(record) != sorted(names):
        raise ValueError(f"it must have version, {', '.join(names)}")
    backend = _typed("backend", record["backend"], str)
    if backend not in _JOB_IDS:
        raise ValueError(f"backend must be one of {', '.join(_JOB_IDS)}")
    check_job_id(backend, record["job_id"])
    if not options_lib.is_name(_typed("name", record["name"], str)):
        raise ValueError("name must be that of a job")
    for name in ("run_dirs", "arguments", "submit"):
        _check_texts(name, record[name])
    if not record["run_dirs"]:
        raise ValueError("run_dirs must not be empty")
    for path in (*record["run_dirs"], record["directory"]):
        _check_path(path)
    secs = _typed("submitted_secs", record["submitted_secs"], int)
    if not 0 <= secs < _MAX_SECS:
        raise ValueError("submitted_secs must be a time")
    _typed("versions", record["versions"], dict)
    _check_options(backend, _typed("options", record["options"], dict))
    return Submission(**record)


def check_job_id(backend: str, job_id: Any) -> None:
    """Checks that a scheduler may have called a job so.

    Args:
        backend: of the job.
        job_id: what is to be its id.

    Raises:
        ValueError: it may not.
    """
    text = _typed("job_id", job_id, str)
    if not re.fullmatch(_JOB_IDS[backend], text, re.ASCII):
        raise ValueError(f"job_id ({text[:80]!r}) is none of {backend}")


def _typed(name: str, value: Any, kind: type[_T]) -> _T:
    # A bool is an int, but for us.
    if type(value) is not kind:
        raise ValueError(f"{name} must be of {kind.__name__}")
    return value


def _check_texts(name: str, values: Any) -> None:
    for text in _typed(name, values, list):
        _typed(name, text, str)


def _check_path(path: Any) -> None:
    text = _typed("a directory", path, str)
    is_named = files.is_remote(text) or os.path.isabs(text)
    if not is_named or b"\0" in os.fsencode(text):
        raise ValueError("a directory must be absolute, or on gs://")


def _check_options(backend: str, values: Mapping[str, Any]) -> None:
    """Checks the flags in front of the -- by the rules of the flags.

    Raises:
        ValueError: one is unknown, of another type, or breaks its rule.
    """
    known = {flag.name: flag for flag in dataclasses.fields(Options)}
    options: dict[str, Any] = {"backend": backend}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"options has {name[:80]!r}, which is no flag")
        default = known[name].default
        if isinstance(default, tuple):
            _check_texts(name, value)
            value = tuple(value)
        options[name] = _typed(name, value, type(default))
    if Options(**options).backend != backend:
        raise ValueError("options must be of its backend")
    if backend == "vertex" and not options.get("project"):
        raise ValueError("options must have a project")


def find(directory: str) -> list[str]:
    """Lists where `read` may find a job: a directory, and those in it.

    Raises:
        UserError: it is no directory.
        StorageError: it cannot be read.
    """
    with files.storage_errors(directory):
        if not files.is_directory(directory):
            raise UserError(f"{directory} is no directory; use --run_dir=DIR")
        run_dirs = sorted(
            os.path.join(directory, name)
            for name, is_directory, _ in files.entries(directory)
            if is_directory
        )
    return [directory, *run_dirs]


def ask(
    command: Sequence[str],
    stdin: str = "",
    remedy: str = _REMEDY,
    timeout_secs: float | None = None,
) -> str:
    """Runs a command of a scheduler; returns what it prints.

    Args:
        command: the program and its arguments; no shell sees them.
        stdin: what it reads.
        remedy: what to do where there is no such program.
        timeout_secs: how long it may take; None is a minute.

    Raises:
        UserError: there is no such program, or it fails; with its last words.
        StorageError: it does not answer in time.
    """
    with _program(command, remedy):
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_secs or _TIMEOUT_SECS,
        )
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())[-_MAX_WORDS:]
        raise UserError(
            f"{command[0]} failed with {done.returncode}: {words or 'no word'}"
        )
    return done.stdout


def show(command: Sequence[str], remedy: str, *, is_endless: bool) -> None:
    """Runs a command that prints the logs of a job, until it ends.

    Args:
        command: the program and its arguments; its exit code may be the job's.
        remedy: what to do where there is no such program.
        is_endless: whether it follows the job; else it may take minutes.

    Raises:
        UserError: there is none.
        StorageError: it does not come to its end.
    """
    with _program(command, remedy):
        subprocess.run(command, timeout=None if is_endless else LOG_SECS)


@contextlib.contextmanager
def _program(command: Sequence[str], remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NoProgramError(
            f"{command[0]} cannot be run ({error.strerror}); {remedy}"
        ) from error
    except subprocess.TimeoutExpired as error:
        secs = round(error.timeout, 1)
        raise StorageError(
            f"{command[0]} has not answered within {secs:g} s; try again when "
            "its server answers"
        ) from error
