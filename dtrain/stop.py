"""Stops a run, from any machine that can write to its directory.

python -m dtrain.stop --run_dir=runs/default
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Sequence

from dtrain import config, errors
from dtrain.resilience import stop_file
from dtrain.storage import startup

_HELP = """usage: python -m dtrain.stop --run_dir=DIR [--wait]

Tells the run in a directory to save and to end, and its supervisor not to
start it again. The command that started it goes on from there.

  --run_dir=DIR
      Directory of the run, on a disk or gs://.

  --[no]wait  (default: false)
      Comes back when no process trains there any more."""

# What a run has in its directory, from its very beginning on.
_OF_A_RUN = {"config.json", "saved.json", ".lock", "lease.json", "checkpoints"}


def _names(run_dir: str) -> set[str]:
    """Lists what is in a directory; nothing if it is not there.

    Raises:
        StorageError: it cannot be listed.
    """
    if "://" in run_dir:
        from dtrain.storage import files

        with files.storage_errors(run_dir):
            return set(files.names(run_dir))
    try:
        return set(os.listdir(run_dir))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise errors.StorageError(f"{run_dir}: {error.strerror}") from error


def _is_running(run_dir: str) -> bool:
    """Tells whether a process has claimed the run; see `claim`."""
    if "://" in run_dir:
        return "lease.json" in _names(run_dir)
    try:
        file = os.open(f"{run_dir}/.lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Shared and for an instant: hardly ever in the way of a start.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def run(arguments: Sequence[str]) -> int:
    """Stops a run as a command line says.

    Args:
        arguments: the command line, the program's name first.

    Returns:
        The exit code of the process.

    Raises:
        UserError: the command line is wrong, or there is no such run.
    """
    if {"--help", "-h"} & set(arguments[1:]):
        print(_HELP)
        return errors.FINISHED
    values = config.parse_values(arguments, {"run_dir": "", "wait": False})
    run_dir, wait = values["run_dir"], values["wait"]
    if "://" in run_dir:
        startup.import_tensorflow()
    if not _OF_A_RUN & _names(run_dir):
        raise errors.UserError(
            f"run_dir ({run_dir}) holds no run; name the directory that it "
            "was started with"
        )
    stop_file.write(run_dir)
    secs = stop_file.secs_between_looks(run_dir)
    print(
        f"wrote {stop_file.path(run_dir)}: within {secs:g} s, and the step it "
        "is at, the run saves and exits with 75; the command that started it "
        "goes on from there",
        flush=True,
    )
    if wait:
        while _is_running(run_dir):
            time.sleep(secs / 2)
        print(f"no process trains in {run_dir} any more")
    return errors.FINISHED


def main() -> None:
    """Runs the program."""
    errors.exit_with(lambda: run(sys.argv))


if __name__ == "__main__":
    main()
