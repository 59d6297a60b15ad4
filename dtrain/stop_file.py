"""The file by which a person stops a run: `run_dir/stop`.

It works wherever the run's directory is, from any machine that can write there.
It is a notice as long as it is there, also to workers that start again, so the
first start by a person removes it. No TensorFlow is needed for a local one.
"""

from __future__ import annotations

import json
import os
import socket
import time

from dtrain import errors


def path(run_dir: str) -> str:
    """Returns where the file is, or would be."""
    return f"{run_dir}/stop"


def secs_between_looks(run_dir: str) -> float:
    """Returns how often to look for it: a look at a store is a request."""
    return 10.0 if _is_remote(run_dir) else 1.0


def exists(name: str) -> bool:
    """Tells whether the file is there; not, if that cannot be told.

    Args:
        name: what `path` returned.
    """
    if not _is_remote(name):
        return os.path.exists(name)
    from dtrain import files

    try:
        return files.size(name) is not None
    except files.FAILURES:
        return False


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
    if _is_remote(run_dir):
        from dtrain import files

        with files.storage_errors(run_dir):
            files.write(path(run_dir), line.encode())
        return
    try:
        with open(path(run_dir), "w") as file:
            file.write(line)
    except OSError as error:
        raise errors.StorageError(f"{run_dir}: {error.strerror}") from error


def remove(run_dir: str, older_than_secs: float) -> None:
    """Lets a run go on that was told to stop.

    The chief of a run that a person starts calls this, before any worker
    looks for it.

    Args:
        run_dir: the run's directory.
        older_than_secs: a file of a later time stays, in seconds since 1970:
            it is meant for the process that has just been started.

    Raises:
        StorageError: it cannot be changed.
    """
    name = path(run_dir)
    if _is_remote(run_dir):
        import tensorflow as tf

        from dtrain import files

        with files.storage_errors(run_dir):
            if files.size(name) is None:
                return
            if tf.io.gfile.stat(name).mtime_nsec / 1e9 < older_than_secs:
                files.remove(name)
        return
    try:
        if os.stat(name).st_mtime < older_than_secs:
            os.remove(name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise errors.StorageError(f"{run_dir}: {error.strerror}") from error


def _is_remote(name: str) -> bool:
    return "://" in name
