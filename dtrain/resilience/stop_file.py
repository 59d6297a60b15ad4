"""The file by which a person stops a run: `run_dir/stop`.

It works from any machine that can write to the run's directory, on a disk or a
store. As long as it is there it is a notice to all workers, also to those that
start again; so the next start by a person removes it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping

from dtrain.resilience import status
from dtrain.storage import files


def path(run_dir: str) -> str:
    """Returns where the file is, or would be."""
    return f"{run_dir}/stop"


def secs_between_looks(run_dir: str) -> float:
    """Returns how often to look for it: a look at a store is a request."""
    return 10.0 if files.is_remote(run_dir) else 1.0


# What was there when a process began, and does not count for it; None if any
# file does. By what it is, for no two machines agree on the time.
Before = files.Stat | None


def look_before(
    run_dir: str, environment: Mapping[str, str] = os.environ
) -> Before:
    """Looks, before a process begins, which stop file does not count for it.

    When a person starts a run, one that is there does not count; when a
    supervisor starts its workers again, it does. A scheduler starts a job any
    time: one that is older than its submission does not count. Whatever is
    written once the process runs counts, whatever its clock says.

    Args:
        run_dir: the run's directory.
        environment: the variables of the process.
    """
    submitted = environment.get("DTRAIN_SUBMITTED_SECS", "")
    is_job = submitted.isascii() and submitted.isdigit()
    if status.is_restart(environment) and not is_job:
        return None
    try:
        known = files.stat(path(run_dir))
    except OSError:
        return None
    if known and is_job:
        code_dir = environment.get("DTRAIN_CODE_DIR", "")
        since = _submitted_secs(run_dir, code_dir) or float(submitted)
        return known if known.changed_secs < since else None
    return known


def _submitted_secs(run_dir: str, code_dir: str) -> float:
    """Returns when a job was submitted, by the clock that stop files have.

    That is the file server's: the job's copy of the code was written then. 0 if
    it is on another disk.
    """
    try:
        copy, run = os.stat(code_dir), os.stat(run_dir)
    except OSError:
        return 0.0
    return copy.st_mtime if copy.st_dev == run.st_dev else 0.0


def exists(name: str, before: Before = None) -> bool:
    """Tells whether there is one that counts; False if the disk or store fails.

    Args:
        name: what `path` returned.
        before: what `look_before` returned.
    """
    try:
        known = files.stat(name)
    except OSError:
        return False
    return known is not None and known != before


def write(run_dir: str) -> None:
    """Tells a run to stop.

    Args:
        run_dir: the run's directory.

    Raises:
        StorageError: it cannot be written to.
    """
    # The content is for people; the file counts whatever is in it.
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = json.dumps({"time": when, "host": socket.gethostname()}) + "\n"
    with files.storage_errors(run_dir):
        files.write(path(run_dir), line.encode())


def remove(run_dir: str, before: Before) -> None:
    """Removes a file that does not count, so that the run goes on.

    The chief of a run calls this, as nobody else may change its directory.

    Args:
        run_dir: the run's directory.
        before: what `look_before` returned. Any other file stays: it is meant
            for the process that has just been started.

    Raises:
        StorageError: it cannot be changed.
    """
    name = path(run_dir)
    with files.storage_errors(run_dir):
        if before and files.stat(name) == before:
            files.remove(name)
