"""The file by which a person stops a run: `run_dir/stop`.

It works wherever the run's directory is, from any machine that can write there.
It is a notice as long as it is there, to all workers, also to those that start
again, so the next start by a person removes it.
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
    """Tells whether the file is there; not, if that cannot be told.

    Args:
        name: what `path` returned.
        since_secs: an older one does not count, in seconds since 1970.
    """
    try:
        found = files.stat(name)
    except OSError:
        return False
    return found is not None and found.changed_secs >= since_secs


def since_secs(
    start_secs: float, environment: Mapping[str, str] = os.environ
) -> float:
    """Returns from when on a file is meant for this process.

    A start by a person makes older ones void, a start of a supervisor none.
    The starts of a job are by a scheduler: it began with its submission.

    Args:
        start_secs: when this process began, in seconds since 1970.
        environment: the variables of the process.

    Returns:
        Seconds since 1970.
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
    # For people: the file counts, whatever is in it.
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = json.dumps({"time": when, "host": socket.gethostname()}) + "\n"
    with files.storage_errors(run_dir):
        files.write(path(run_dir), line.encode())


def remove(run_dir: str, older_than_secs: float) -> None:
    """Lets a run go on that was told to stop.

    The chief of a run calls this, as nobody else may change its directory.

    Args:
        run_dir: the run's directory.
        older_than_secs: a file of a later time stays, in seconds since 1970:
            it is meant for the process that has just been started.

    Raises:
        StorageError: it cannot be changed.
    """
    name = path(run_dir)
    with files.storage_errors(run_dir):
        found = files.stat(name)
        if found and found.changed_secs < older_than_secs:
            files.remove(name)
