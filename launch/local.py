"""Workers as processes of this machine.

`plan` is a pure function; what it returns is printed by `--dry_run`, run by
`run`, and compared in the tests.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from dtrain import errors
from dtrain.cluster import Cluster

# Time that the other workers have to leave when one has failed.
GRACE_SECS = 20.0


@dataclasses.dataclass(frozen=True)
class Process:
    """One worker, as it is started.

    Attributes:
        name: as in `worker 0`.
        command: the program and its arguments.
        environment: what is added to the launcher's own environment.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]

    def to_shell(self) -> str:
        """Returns the line that starts the same process in a shell."""
        variables = [
            f"{name}={shlex.quote(value)}"
            for name, value in self.environment.items()
        ]
        return " ".join([*variables, shlex.join(self.command)])


def plan(ports: Sequence[int], arguments: Sequence[str]) -> tuple[Process, ...]:
    """Makes the processes of a run.

    Args:
        ports: one for each worker, each in [1, 65535].
        arguments: the flags of `dtrain.main`, without `--strategy`.

    Returns:
        The workers; the first is the chief. A single one is started without
        TF_CONFIG, and with the strategy that its flags name.
    """
    command = (sys.executable, "-m", "dtrain.main", *arguments)
    if len(ports) == 1:
        return (Process("worker 0", command, {}),)
    workers = tuple(f"127.0.0.1:{port}" for port in ports)
    return tuple(
        Process(
            f"worker {index}",
            (*command, "--strategy=multi_worker"),
            {"TF_CONFIG": Cluster(workers, index).to_tf_config()},
        )
        for index in range(len(workers))
    )


def free_ports(count: int) -> list[int]:
    """Finds ports of the loopback address that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def run(processes: Sequence[Process], grace_secs: float = GRACE_SECS) -> int:
    """Starts the workers and waits for all of them.

    SIGINT and SIGTERM are handed on, once, as SIGTERM; the second one kills.
    When a worker fails, the others are told to end.

    Args:
        processes: of `plan`.
        grace_secs: how long they may take to, when one has failed.

    Returns:
        One exit code for all of them, see `combine`.
    """
    told = _Notices()
    previous = {
        number: signal.signal(number, told.handle)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    children = [_start(process) for process in processes]
    printers = [
        threading.Thread(target=_print_lines, args=(process.name, child.stdout))
        for process, child in zip(processes, children, strict=True)
    ]
    for printer in printers:
        printer.start()
    try:
        _wait(children, told, grace_secs)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for printer in printers:
            printer.join()
    return combine([child.returncode for child in children])


class _Notices:
    """Counts the signals that came."""

    def __init__(self) -> None:
        self.count = 0

    def handle(self, *_: object) -> None:
        """Counts one; a handler of `signal.signal`."""
        self.count += 1


def _start(process: Process) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        process.command,
        env={**os.environ, **process.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # In a session of its own: a Ctrl-C of the terminal would come twice,
        # from it and from here, and the second one ends a worker unsaved.
        start_new_session=True,
    )


def _wait(
    children: Sequence[subprocess.Popen[bytes]],
    told: _Notices,
    grace_secs: float,
) -> None:
    is_told, deadline = False, None
    while any(child.poll() is None for child in children):
        # 75 is no failure: the others are saving, too, and may take long.
        failed = any(
            child.returncode not in (None, errors.FINISHED, errors.RUN_AGAIN)
            for child in children
        )
        if failed and deadline is None:
            deadline = time.monotonic() + grace_secs
        if (failed or told.count) and not is_told:
            is_told = True
            _signal(children, signal.SIGTERM)
        is_late = deadline is not None and time.monotonic() > deadline
        if is_late or told.count > 1:
            _signal(children, signal.SIGKILL)
        time.sleep(0.05)


def _signal(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _print_lines(name: str, stream: BinaryIO) -> None:
    for line in stream:
        text = line.decode(errors="replace").rstrip("\n")
        print(f"[{name}] {text}", flush=True)


def combine(codes: Sequence[int]) -> int:
    """Makes one exit code of those of all workers.

    A user's mistake comes first, since running again cannot help; then a
    crash, the loss of another worker last; then "run me again".

    Args:
        codes: exit codes, negative for a signal.

    Returns:
        The code, as a shell would see it: 128 + N for signal N.
    """
    if errors.USER_ERROR in codes:
        return errors.USER_ERROR
    order = (errors.LOST_WORKER, errors.RUN_AGAIN, errors.FINISHED)
    crashes = [code for code in codes if code not in order]
    code = next(code for code in (*crashes, *order) if code in codes)
    return code if code >= 0 else 128 - code
