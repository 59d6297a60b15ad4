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

from dtrain.storage import files


def path(run_dir: str) -> str:
    """Returns where the file is, or would be."""
    return f"{run_dir}/stop"


def secs_between_looks(run_dir: str) -> float:
    """Returns how often to look for it: a look at a store is a request."""
    return 10.0 if files.is_remote(run_dir) else 1.0


def exists(name: str, since_secs: float = 0.0) -> bool:
    """Tells whether the file is there; False if the disk or store fails.

    Args:
        name: what `path` returned.
        since_secs: an older file does not count; in seconds since 1970.
    """
    try:
        known = files.stat(name)
    except OSError:
        return False
    return known is not None and known.changed_secs >= since_secs


def since_secs(
    start_secs: float, environment: Mapping[str, str] = os.environ
) -> float:
    """Returns the time, in seconds since 1970, before which no file counts.

    When a person starts a run, older files do not count; when a supervisor
    starts its workers again, they do. A scheduler starts a job any time: files
    count that are newer than its submission.

    Args:
        start_secs: when this process began, in seconds since 1970.
        environment: the variables of the process.
    """
    submitted = environment.get("DTRAIN_SUBMITTED_SECS", "")
    if submitted.isascii() and submitted.isdigit():
        return float(submitted)
    is_restart = environment.get("DTRAIN_ATTEMPT", "0") != "0"
    is_requeued = environment.get("SLURM_RESTART_COUNT", "0") != "0"
    return 0.0 if is_restart or is_requeued else start_secs


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


def remove(run_dir: str, older_than_secs: float) -> None:
    """Lets a run go on that was told to stop.

    The chief of a run calls this, as nobody else may change its directory.

    Args:
        run_dir: the run's directory.
        older_than_secs: a newer file stays, for it is meant for the process
            that has just been started; in seconds since 1970.

    Raises:
        StorageError: it cannot be changed.
    """
    name = path(run_dir)
    with files.storage_errors(run_dir):
        known = files.stat(name)
        if known and known.changed_secs < older_than_secs:
            files.remove(name)
