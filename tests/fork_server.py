"""Starts a program in a fork of a process that has imported TensorFlow.

    order = fork_server.Order("dtrain.main", flags, directory, variables)
    process = fork_server.start(order)

The import takes two seconds of CPU, which is more than half of a run of a few
hundred weights, and few tests are about it. So one process imports TensorFlow,
and what comes with it, once; of its own threads it has none, and TensorFlow's
runtime has not begun, so it may be forked. Each fork becomes one program: with
arguments, variables, a working directory and an output of its own, in the
process group of the test, under the process id that the test knows, and with
the interpreter's usual end. Of this repository the server imports nothing, so
what a module does when it is imported it does in every fork.

A fork is not a true start in these ways, and `runs.start_anew` makes one where
they matter: the import of TensorFlow is over at once; strings hash as in every
other fork of the server, so that a set of them has one order; the parent is
the server, and the command line in /proc is the server's; and what is read
from the environment by the import cannot differ (see `suits`).

`multiprocessing` has a server of this kind. Its forks import the test's own
main module, keep the server's environment and directory, and end by
`os._exit`, without what `atexit` and the end of Python's threads do.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import gc
import importlib
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import IO

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What a trainer imports that is not this repository's.
_IMPORTED = ("tensorflow", "keras", "tensorflow_datasets", "PIL.Image")

# Beginnings of the names that are read when they are used, or by a fork when
# it begins. Whatever else differs may have had its say when TensorFlow was
# imported, or Python started.
_READ_LATER = (
    *("DTRAIN_", "PYTEST_", "SLURM_"),
    *("TF_CONFIG", "GCE_METADATA_HOST", "NO_GCE_CHECK"),
)
_PATH = "PYTHONPATH"

# Of an order; variables and arguments are some thousands.
_MAX_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Order:
    """What a fork is to become.

    Attributes:
        module: as after `python -m`.
        arguments: of the program.
        directory: to work in.
        variables: all of its environment.
    """

    module: str
    arguments: Sequence[str]
    directory: str
    variables: Mapping[str, str]


# The side of the tests.


class Process:
    """A program in a fork; has what tests use of a `subprocess.Popen`.

    Attributes:
        args: the command that a true start would have.
        pid: of the fork itself.
        stdout: what it writes to its output and its standard error.
        returncode: its exit code, negative for a signal; None until `poll` or
            `wait` has seen its end.
    """

    def __init__(
        self, args: Sequence[str], stdout: IO[str], news: IO[bytes]
    ) -> None:
        """Waits until the server has forked.

        Args:
            args: see above.
            stdout: see above.
            news: has a line with the process id, and one with the exit code;
                not buffered.

        Raises:
            RuntimeError: the server is gone.
        """
        self.args = args
        self.stdout = stdout
        self.returncode: int | None = None
        self._news = news
        self.pid = self._read_number()
        self._said: list[str] = []
        self._listener: threading.Thread | None = None

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.stdout.close()
        self.wait()

    def _read_number(self) -> int:
        line = self._news.readline()
        if not line:
            raise RuntimeError("the fork server is gone")
        return int(line)

    def poll(self) -> int | None:
        """Returns the exit code, or None while the program runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end of the program, and returns its exit code.

        Args:
            timeout: in seconds; None waits for ever.

        Raises:
            TimeoutExpired: it has not ended in time.
        """
        if self.returncode is None:
            if not select.select([self._news], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._read_number()
            self._news.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Reads all that is written, and waits for the end of the program.

        After a timeout it may be called again, and nothing is lost.

        Args:
            timeout: in seconds; None waits for ever.

        Returns:
            What was written, and None, as there is no other pipe.

        Raises:
            TimeoutExpired: it has not ended in time.
        """
        if self._listener is None:
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()
        self._listener.join(timeout)
        if self._listener.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(timeout)
        return "".join(self._said), None

    def _listen(self) -> None:
        with self.stdout:
            self._said.append(self.stdout.read())

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the program has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


class _Server:
    """The server as the tests see it; it ends when this process does.

    Attributes:
        variables: of its environment.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        """Starts it, and waits until TensorFlow is imported.

        Args:
            variables: see above.

        Raises:
            RuntimeError: it could not import TensorFlow.
        """
        self.variables = dict(variables)
        self._orders, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with tempfile.TemporaryFile("w+") as said:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(theirs.fileno())],
                    cwd=ROOT,
                    env=self.variables,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                )
            if not self._orders.recv(1):
                said.seek(0)
                raise RuntimeError(f"no fork server: {said.read()}")
        # So that its CPU time, and that of all forks, counts as the tests'.
        atexit.register(self._close)

    def _close(self) -> None:
        self._orders.close()
        self._process.wait()

    def start(self, order: Order) -> Process:
        """Has the server fork; see `start`."""
        output, their_output = os.pipe()
        news, their_news = os.pipe()
        message = json.dumps(dataclasses.asdict(order)).encode()
        try:
            socket.send_fds(self._orders, [message], [their_output, their_news])
        finally:
            os.close(their_output)
            os.close(their_news)
        return Process(
            [sys.executable, "-m", order.module, *order.arguments],
            open(output, encoding="utf-8"),
            open(news, "rb", buffering=0),
        )


# Tests start programs from several threads.
_LOCK = threading.Lock()


@functools.cache
def _only_server() -> _Server:
    return _Server({**os.environ, _PATH: str(ROOT)})


def _server() -> _Server:
    """Returns the server of this process, started if it is not yet."""
    with _LOCK:
        return _only_server()


def suits(variables: Mapping[str, str]) -> bool:
    """Returns whether a fork is in time to read these variables.

    Args:
        variables: all of the environment of a program.
    """
    known = _server().variables
    return not _has_hook(variables) and all(
        name == _PATH or name.startswith(_READ_LATER)
        for name in {*variables, *known}
        if variables.get(name) != known.get(name)
    )


def _has_hook(variables: Mapping[str, str]) -> bool:
    """Returns whether Python itself would import a module at its start."""
    return any(
        os.path.exists(os.path.join(directory, "sitecustomize.py"))
        for directory in _directories(variables)
    )


def _directories(variables: Mapping[str, str]) -> list[str]:
    path = variables.get(_PATH, "")
    return [each for each in path.split(os.pathsep) if each]


def start(order: Order) -> Process:
    """Starts a program in a fork.

    Args:
        order: what it is; its variables must suit.

    Returns:
        The process, which the caller waits for.
    """
    return _server().start(order)


# The side of the server.


def _serve(orders: socket.socket) -> Order | None:
    """Forks for each order, and tells how each fork has ended.

    Args:
        orders: where they come from.

    Returns:
        In a fork, what it is to become. In the server None, when nobody is
        left that could give an order.
    """
    # By the descriptor of a fork: its process id, and where its end is told.
    forks: dict[int, tuple[int, int]] = {}
    while True:
        for ready in select.select([orders, *forks], [], [])[0]:
            if ready in forks:
                _tell_end(ready, *forks.pop(ready))
                continue
            message, received, _, _ = socket.recv_fds(orders, _MAX_BYTES, 2)
            if not message:
                return None
            output, news = received
            pid = os.fork()
            if not pid:
                orders.close()
                for each in (*forks, *(their for _, their in forks.values())):
                    os.close(each)
                os.close(news)
                _take_output(output)
                return Order(**json.loads(message))
            os.close(output)
            os.write(news, f"{pid}\n".encode())
            forks[os.pidfd_open(pid)] = pid, news


def _take_output(output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


def _tell_end(fork: int, pid: int, news: int) -> None:
    os.close(fork)
    _, status = os.waitpid(pid, 0)
    # Whoever has started it may be gone.
    with contextlib.suppress(BrokenPipeError):
        os.write(news, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os.close(news)


def _become(order: Order, path: Sequence[str], variables: set[str]) -> None:
    """Makes this process what a true start would have made it, and runs.

    Args:
        order: what to run.
        path: where Python looks for modules, after what an order adds.
        variables: names of what the server was started with; what TensorFlow
            has added since, it would have added here.
    """
    # numpy's generator for all; Python's own is seeded anew by the fork.
    importlib.import_module("numpy").random.seed()
    os.chdir(order.directory)
    for name in variables - {*order.variables}:
        del os.environ[name]
    os.environ.update(order.variables)
    sys.path[:] = [order.directory, *_directories(order.variables), *path]
    sys.argv[:] = [order.module, *order.arguments]
    sys.orig_argv[:] = [sys.executable, "-m", *sys.argv]
    runpy.run_module(order.module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Imports TensorFlow and serves; each fork begins in here, too."""
    variables = {*os.environ}
    path = [each for each in sys.path if each != str(ROOT)]
    # As `dtrain.storage.startup` does.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in _IMPORTED:
        importlib.import_module(name)
    # A collection would touch, and so copy, all that the forks share.
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as orders:
        orders.send(b"x")
        order = _serve(orders)
    if order:
        _become(order, path, variables)


if __name__ == "__main__":
    main()
