"""Submits a job: checks everything that can be, writes its files, queues it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from types import ModuleType

from dtrain import config, flags
from dtrain.errors import StorageError, UserError
from dtrain.storage import files
from launch import code, cost, submission, visible
from launch.backends import kubernetes, skypilot, slurm, vertex
from launch.job import QUEUED, RUNNING, Job, Plan
from launch.options import Options

# What a path is that cannot be a directory.
_NO_PLACE = (
    *(FileExistsError, NotADirectoryError, FileNotFoundError),
    PermissionError,
)

# What each of them has is said in `job`.
BACKENDS: dict[str, ModuleType] = {
    "slurm": slurm,
    "kubernetes": kubernetes,
    "vertex": vertex,
    "skypilot": skypilot,
}


def run(options: Options, arguments: Sequence[str]) -> None:
    """Submits a job, and says under which name.

    Args:
        options: the flags in front of the --.
        arguments: the flags behind it.

    Raises:
        UserError: the job cannot be, or its scheduler does not take it.
        StorageError: its files cannot be written.
    """
    mark = secrets.token_hex(3)
    job = make_job(options, arguments, int(time.time()), mark)
    plan = BACKENDS[options.backend].plan(job)
    if options.dry_run:
        print(plan.describe(job.directory))
        print(f"\n{cost.lines(job, len(plan.run_dirs))}")
        return
    visible.check(job)
    with _held(job.record_dir):
        _check_alone(job.record_dir)
        # Before it is submitted: it takes seconds in a large repository, and a
        # job must be written down before anybody presses Ctrl-C.
        versions = code.versions(job.workdir)
        job_id = _submit(job, plan)
        # At once: nobody else knows its number.
        print(
            f"submitted {job.name} as job {job_id}; python -m launch.main "
            "status, logs or stop "
            f"--run_dir={shlex.quote(job.record_dir)}",
            flush=True,
        )
        submitted = submission.make(job, plan, job_id, versions)
        submission.write(submitted, job.record_dir)


def make_job(
    options: Options,
    arguments: Sequence[str],
    submitted_secs: int,
    mark: str,
) -> Job:
    """Makes the job that a command line describes.

    Args:
        options: the flags in front of the --.
        arguments: the flags behind it.
        submitted_secs: when, in seconds since 1970.
        mark: see `Job`.

    Raises:
        UserError: a flag behind the -- is wrong, or contradicts one of ours.
    """
    parsed = config.parse(["dtrain.main", *arguments])
    is_of_many = parsed.strategy in ("default", "multi_worker")
    if options.num_nodes > 1 and not is_of_many:
        raise UserError(
            f"strategy ({parsed.strategy}) runs on one machine; with "
            f"num_nodes ({options.num_nodes}) leave it out"
        )
    for name in ("run_dir", "checkpoint_dir", "backup_dir"):
        _check_store(name, getattr(parsed, name))
    _check_store("record_dir", options.record_dir)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(submitted_secs))
    job = Job(
        options=options,
        # A file of flags may be another one when the job is queued again.
        arguments=flags.expand(arguments),
        parsed=parsed,
        directory="",
        workdir=_workdir(),
        python=sys.executable,
        submitted_secs=submitted_secs,
        mark=mark,
    )
    name = f"{stamp}-{mark}"
    directory = os.path.join(submission.directory_of(job.record_dir), name)
    return dataclasses.replace(job, directory=submission.absolute(directory))


def _check_store(name: str, path: str) -> None:
    if files.is_remote(path) and not path.startswith("gs://"):
        raise UserError(
            f"{name} ({path}) must be on gs://, which is the only store that "
            "dtrain knows, or on a disk"
        )


def _workdir() -> str:
    try:
        return os.getcwd()
    except OSError as error:
        raise UserError(
            f"this directory cannot be worked in ({error.strerror}); change to "
            "that of your code"
        ) from error


@contextlib.contextmanager
def _held(record_dir: str) -> Iterator[None]:
    """Holds the directory in which the jobs of a run are written down.

    Or two submissions at once would both see that the run has no job. What is
    made here, and empty at the end, is removed.

    Raises:
        UserError: it cannot be.
        StorageError: the disk fails.
    """
    record = submission.directory_of(record_dir)
    # A store has neither directories nor locks.
    if files.is_remote(record):
        yield
        return
    with files.storage_errors(record):
        directories = (record, os.path.dirname(record))
        new = [path for path in directories if not os.path.isdir(path)]
        try:
            files.make_directory(record)
        except _NO_PLACE as error:
            raise UserError(
                f"{record}, where the job is written down, cannot be made: "
                f"{files.reason(error)}; name another place with --record_dir"
            ) from error
        held = os.open(record, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Not every disk can; the run's own claim is behind this one.
        with contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)
        for path in new:
            with contextlib.suppress(OSError):
                os.rmdir(path)


def _check_alone(record_dir: str) -> None:
    earlier = submission.read(record_dir)
    if earlier is None:
        return
    for state in BACKENDS[earlier.backend].states(earlier):
        if state.phase in (QUEUED, RUNNING):
            raise UserError(
                f"run_dir ({record_dir}) has a job already, {earlier.job_id}: "
                f"{state.details}; end it with python -m launch.main stop "
                f"--run_dir={shlex.quote(record_dir)}, or name another run_dir"
            )


def _submit(job: Job, plan: Plan) -> str:
    """Writes the files and submits; returns the job's id.

    Raises:
        UserError: the scheduler does not take the job; no file is left.
        StorageError: a file cannot be written, or it is not known whether the
            scheduler has taken the job.
    """
    if not files.is_remote(job.directory):
        with files.storage_errors(job.directory):
            # What is there already is of another job.
            os.makedirs(job.directory)
    try:
        _write(job, plan)
        BACKENDS[job.options.backend].check(plan)
    except BaseException:
        _remove(job)
        raise
    print(cost.lines(job, len(plan.run_dirs)), flush=True)
    try:
        return BACKENDS[job.options.backend].submit(job, plan)
    except UserError:
        _remove(job)
        raise
    except StorageError as error:
        # It may be queued, and need them.
        raise StorageError(
            f"{error}; the files of the job stay in {job.directory}"
        ) from error


def _remove(job: Job) -> None:
    with files.storage_errors(job.directory):
        files.remove_tree(job.directory)


def _write(job: Job, plan: Plan) -> None:
    sources = code.find(job.workdir) if plan.has_code else {}
    with files.storage_errors(job.directory):
        for name, text in plan.files.items():
            # The name of a file may be no UTF-8.
            content = os.fsencode(text)
            files.write(f"{job.directory}/{name}", content, make_parents=True)
        if plan.has_code:
            code.write(sources, os.path.join(job.directory, "code"))
