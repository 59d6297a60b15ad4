"""A process that has imported what a worker needs, and waits to be one.

A supervisor starts it as it starts the worker itself, with the same command
and variables, but for VARIABLE, and with a socket as its standard input. When
it is warm it says so, and then sleeps, until the supervisor sends the command
and the variables of the start that it is to be:

    from dtrain.resilience import standby
    standby.stand_by(prepare)       # returns at once where this is no spare

What it has imported must be what a new process would import. Where it cannot
tell, as when a file has changed since, it becomes a new process, in place.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence

# Of the environment of a spare.
VARIABLE = "DTRAIN_SPARE"

# What a spare says when it is warm.
WARM = b"warm\n"

# What is read when it is used. Whatever else differs may have had its say when
# TensorFlow was imported, or Python started.
_READ_LATER = ("DTRAIN_", "TF_CONFIG")

_called_ns = 0


def called_ns() -> int:
    """Returns when this spare was called; 0 in a process that was none.

    In nanoseconds since the machine was switched on (CLOCK_BOOTTIME).
    """
    return _called_ns


def to_call(command: Sequence[str], variables: Mapping[str, str]) -> bytes:
    """Writes what a spare is called with.

    Args:
        command: of the start that it is to be.
        variables: all of its environment.
    """
    call = {"command": list(command), "variables": dict(variables)}
    return json.dumps(call).encode() + b"\n"


def stand_by(prepare: Callable[[], object]) -> None:
    """Waits to be called, if this process is a spare.

    It ends when its supervisor has: nobody else could call it.

    Args:
        prepare: imports what takes long, and touches no device.
    """
    global _called_ns
    if os.environ.pop(VARIABLE, None) is None:
        return
    known = dict(os.environ)
    prepare()
    imported = _imported()
    call = _wait()
    if not call:
        os._exit(0)
    _called_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    command, variables = call["command"], call["variables"]
    names = {*known, *variables}
    changed = {n for n in names if known.get(n) != variables.get(n)}
    is_new = (
        command != sys.orig_argv
        or not all(name.startswith(_READ_LATER) for name in changed)
        or imported != _imported(imported)
    )
    if is_new:
        os.execve(sys.executable, command, variables)
    # No others: what the imports have set, they would have set again.
    for name in changed:
        if name in variables:
            os.environ[name] = variables[name]
        else:
            del os.environ[name]


def _wait() -> dict:
    """Says that this is warm; returns the call, empty if none comes."""
    with socket.socket(fileno=os.dup(0)) as connection:
        # As a worker that is started has none.
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        try:
            connection.sendall(WARM)
            with connection.makefile("rb") as file:
                line = file.readline()
        except OSError:
            return {}
    # It ends in the midst of a line if the supervisor does.
    return json.loads(line) if line.endswith(b"\n") else {}


def _imported(paths: Sequence[str] | Mapping = ()) -> dict:
    """Returns the version of each imported file, or of these files."""
    files = paths or [
        str(module.__file__)
        for module in list(sys.modules.values())
        if getattr(module, "__file__", None)
    ]
    versions = {}
    for path in files:
        try:
            found = os.stat(path)
        except OSError:
            versions[path] = None
        else:
            versions[path] = (found.st_ino, found.st_mtime_ns, found.st_size)
    return versions
