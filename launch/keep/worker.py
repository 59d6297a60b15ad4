"""Workers as processes of this machine.

`plan` is a pure function: `--dry_run` prints the processes that it returns, the
tests compare them, and each is started as a `Worker`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from dtrain.cluster.environment import Cluster
from launch import code as code_lib

# Variables by which a worker knows which start this is, where to write its
# status, and who its supervisor is.
ATTEMPT = "DTRAIN_ATTEMPT"
STATUS_FILE = "DTRAIN_STATUS_FILE"
SUPERVISOR_PID = "DTRAIN_SUPERVISOR_PID"

# Lines of a worker that are kept: between the name of an error and what it was
# TensorFlow prints hundreds of lines of its graph.
_KEPT = 2000

# How the line begins that says what went wrong: of dtrain, of a traceback, of
# the C library, and of TensorFlow where it aborts.
_LINE_BYTES = 1 << 16
_ERROR = re.compile(
    r"^(error: |lost another worker|Fatal |F\d{4} |terminate called|"
    r"([\w]+\.)*\w*(Error|Exception|Exhausted)\b)"
)


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


def plan(
    ports: Sequence[int],
    arguments: Sequence[str],
    names: Sequence[str] = (),
    gpus: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> tuple[Process, ...]:
    """Makes the processes of a run.

    Args:
        ports: one for each worker, each in [1, 65535].
        arguments: the flags of `dtrain.main`, without `--strategy`.
        names: of the workers, as many; `worker 0`, `worker 1`, ... if empty.
        gpus: the CUDA_VISIBLE_DEVICES of each; if empty, each sees them all.
        variables: what else is added to the environment of each.

    Returns:
        The workers; the first is the chief. A single one is started without a
        TF_CONFIG of its own, and with the strategy that its flags name.
    """
    command = [*_program(), *arguments]
    names = names or [f"worker {index}" for index in range(len(ports))]
    environments: list[dict[str, str]] = [dict(variables or {}) for _ in ports]
    if len(ports) > 1:
        command.append("--strategy=multi_worker")
        workers = tuple(f"127.0.0.1:{port}" for port in ports)
        for index, environment in enumerate(environments):
            environment["TF_CONFIG"] = Cluster(workers, index).to_tf_config()
    for environment, visible in zip(environments, gpus, strict=False):
        environment["CUDA_VISIBLE_DEVICES"] = visible
    return tuple(
        Process(name, tuple(command), environment)
        for name, environment in zip(names, environments, strict=True)
    )


def _program() -> tuple[str, ...]:
    """Returns how the trainer is started; of a job, its own copy of it."""
    code_dir = os.environ.get("DTRAIN_CODE_DIR")
    if code_dir:
        runner = os.path.join(code_dir, code_lib.RUNNER)
        return (sys.executable, runner, "dtrain.main")
    return (sys.executable, "-m", "dtrain.main")


def free_ports(count: int) -> list[int]:
    """Finds ports of the loopback address that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def start(
    process: Process,
    stdin: int = subprocess.DEVNULL,
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a process; nobody reads yet what it says.

    Args:
        process: see above.
        stdin: descriptor of its standard input.
        variables: what else is added to its environment.
    """
    return subprocess.Popen(
        process.command,
        env={**environment(process), **(variables or {})},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # In a session of its own: a Ctrl-C of the terminal would come twice,
        # from it and from here, and the second one ends a worker unsaved.
        start_new_session=True,
    )


def environment(process: Process) -> dict[str, str]:
    """Returns all variables of a process."""
    return {**os.environ, **process.environment}


class Worker:
    """A process that runs, and what it says.

    Its lines are printed with its name in front.

    Args:
        process: what it is.
        child: its process, where that runs already.

    Attributes:
        name: of the process.
        pid: of the process, and of the session it leads.
    """

    def __init__(
        self, process: Process, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self._child = child or start(process)
        self.name = process.name
        self.pid = self._child.pid
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT)
        assert self._child.stdout is not None
        self._printer = threading.Thread(
            target=self._print_lines, args=(self._child.stdout,), daemon=True
        )
        self._printer.start()

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._child.poll()

    def signal(self, number: int) -> None:
        """Sends a signal, if it still runs.

        Args:
            number: of the signal.
        """
        self._child.send_signal(number)

    def kill(self) -> None:
        """Ends it at once, with every process that it has started."""
        # The group lives as long as any of them, even without its leader.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Waits until its last lines are printed; to be called at its end."""
        # A process that it left behind may hold the pipe open for ever.
        self._printer.join(timeout=1.0)

    def last_error(self) -> str:
        """Returns the last line that looks like an error, else the last."""
        lines = [line for line in list(self._lines) if line.strip()]
        indices = [i for i, line in enumerate(lines) if _ERROR.search(line)]
        error = lines[indices[-1]] if indices else lines[-1] if lines else ""
        if indices and error.endswith(":"):
            # What it was comes last, behind a stack that is indented.
            rest = lines[indices[-1] + 1 :]
            error += " ".join(
                ["", *[x for x in rest if not x[0].isspace()][-1:]]
            )
        return " ".join(error.split())[:300]

    def _print_lines(self, stream: BinaryIO) -> None:
        # In pieces, for a line may have no end.
        for line in iter(lambda: stream.readline(_LINE_BYTES), b""):
            text = line.decode(errors="replace").rstrip("\n")
            self._lines.append(text)
            # In one piece, for other workers say something, too.
            sys.stdout.write(f"[{self.name}] {text}\n")
