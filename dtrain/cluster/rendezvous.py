"""The workers wait for each other before TensorFlow does.

TensorFlow waits for ever for a worker that does not come, and says nothing. So
all meet here first: the chief listens on its own port, which is free until
TensorFlow takes it, and the others connect to it and say who they are. The
chief asks all of them once a second whether they are still there; when all have
come, and have answered since the last one came, it lets them go.

The messages are lines of ASCII, each ended by a newline:

    worker   hello dtrain 2 <workers' digest> <proof> <index>
    chief    wait                  or   refused <reason>
    worker   here
    chief    go

The proof shows that a worker knows the secret of its start, where there is one.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import math
import selectors
import socket
import sys
import time
from collections.abc import Callable

from dtrain.cluster import names
from dtrain.cluster.environment import Cluster
from dtrain.errors import LostWorkerError, printable

# Between two questions of the chief, and between two tries to reach it.
_ASK_SECS = 1.0
_TRY_SECS = 0.2
_FIRST_TRY_SECS = 0.01
# A peer that has been silent for this long is gone, or behind a cut link.
_SILENCE_SECS = 10.0
# Between two looks at the clock and at what tells this process to end.
_LOOK_SECS = 0.05
# No line of the protocol is as long.
_MAX_LINE = 512
_GREETING = "hello dtrain 2"
_REFUSED = "it refused this worker"


def meet(
    cluster: Cluster, deadline_secs: float, requested: Callable[[], bool]
) -> bool:
    """Waits until all workers are there. Every worker calls this.

    Args:
        cluster: the workers, and which of them this is.
        deadline_secs: how long to wait.
        requested: whether this process was told to end.

    Returns:
        Whether all are there; False if `requested` ended the wait.

    Raises:
        LostWorkerError: not all have come in time.
    """
    deadline = time.monotonic() + deadline_secs
    if cluster.num_workers == 1:
        return True
    hosts = [_address(worker)[0] for worker in cluster.workers]
    with names.told_if_unknown(hosts, _say):
        if not cluster.is_chief:
            return _Visit(cluster, requested).wait(deadline, deadline_secs)
        with _Gathering(cluster, requested) as gathering:
            return gathering.wait(deadline, deadline_secs)


def digest(cluster: Cluster) -> str:
    """Returns 32 digits that only workers of the same cluster share."""
    names = "\n".join(cluster.workers).encode()
    return hashlib.sha256(names).hexdigest()[:32]


def proof(cluster: Cluster, index: str) -> str:
    """Returns 32 digits that only one who knows the secret can tell.

    Args:
        cluster: the workers, with their secret.
        index: of the worker that shows it.
    """
    text = f"{digest(cluster)} {index}".encode()
    key = cluster.secret.encode(errors="surrogateescape")
    return hmac.new(key, text, "sha256").hexdigest()[:32]


class _Line:
    """A connection that carries lines and never blocks."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.name = name
        self.heard_at = time.monotonic()
        self._text = b""

    def send(self, line: str) -> bool:
        """Sends a line; returns whether the other side can be reached."""
        try:
            # A line is far below what the kernel buffers: never a part of it.
            self.socket.sendall(f"{line}\n".encode())
        except OSError:
            return False
        return True

    def receive(self) -> list[str] | None:
        """Returns the lines that have come; None when there are no more."""
        try:
            data = self.socket.recv(_MAX_LINE)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *whole, self._text = (self._text + data).split(b"\n")
        if not data or len(self._text) > _MAX_LINE:
            return None
        if whole:
            self.heard_at = time.monotonic()
        return [line.decode(errors="replace") for line in whole]

    @property
    def is_silent(self) -> bool:
        """Whether nothing has come for too long."""
        return time.monotonic() - self.heard_at > _SILENCE_SECS

    def close(self) -> None:
        """Hangs up."""
        self.socket.close()


class _Gathering:
    """The chief's side: it waits until all others have come."""

    def __init__(self, cluster: Cluster, requested: Callable[[], bool]) -> None:
        self._cluster = cluster
        self._requested = requested
        self._lines: list[_Line] = []
        self._present: dict[int, _Line] = {}
        self._answered: set[int] = set()
        self._asked_at = -math.inf
        self._said: set[str] = set()
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None

    def __enter__(self) -> _Gathering:
        return self

    def __exit__(self, *_: object) -> None:
        for line in self._lines:
            line.close()
        if self._server:
            self._server.close()
        self._selector.close()

    def wait(self, deadline: float, deadline_secs: float) -> bool:
        """See `meet`.

        Raises:
            LostWorkerError: not all have come in time.
        """
        others = set(range(1, self._cluster.num_workers))
        while True:
            if self._requested():
                return False
            problem = self._listen()
            self._hear()
            self._ask()
            if self._answered == others:
                self._let_go()
                return True
            if time.monotonic() > deadline:
                missing = sorted(others - set(self._present))
                raise LostWorkerError(
                    self._describe(missing, deadline_secs) + problem
                )

    def _describe(self, missing: list[int], deadline_secs: float) -> str:
        if not missing:
            return (
                f"not all workers answered at the end of {deadline_secs:g} s "
                "(--start_timeout_secs); see what their network does"
            )
        names = ", ".join(
            f"{index} ({self._cluster.workers[index]})" for index in missing
        )
        plural = "s" if len(missing) > 1 else ""
        return (
            f"worker{plural} {names} did not come within {deadline_secs:g} s "
            "(--start_timeout_secs); see whether they were started, and why "
            "they ended"
        )

    def _listen(self) -> str:
        """Opens the port; returns what is wrong with it, for an error."""
        if self._server:
            return ""
        port = _address(self._cluster.workers[0])[1]
        try:
            self._server = _serve(_loopback(self._cluster), port)
        except OSError as error:
            # The chief of an earlier start may still have it, and soon ends.
            time.sleep(_LOOK_SECS)
            return f"; the chief cannot listen on port {port}: {error.strerror}"
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        return ""

    def _hear(self) -> None:
        for key, _ in self._selector.select(_LOOK_SECS):
            if key.fileobj is self._server:
                self._accept()
            else:
                self._take(key.data)
        for line in self._lines[:]:
            if line.is_silent:
                self._drop(line)

    def _accept(self) -> None:
        assert self._server
        try:
            connection, address = self._server.accept()
        except OSError:
            # It hung up before it was let in.
            return
        host = address[0].removeprefix("::ffff:")
        line = _Line(connection, f"{host}:{address[1]}")
        self._lines.append(line)
        self._selector.register(connection, selectors.EVENT_READ, line)

    def _take(self, line: _Line) -> None:
        texts = line.receive()
        if texts is None:
            self._drop(line)
            return
        for text in texts:
            index = self._index_of(line)
            if index is None:
                self._welcome(line, text)
            elif text == "here":
                self._answered.add(index)

    def _index_of(self, line: _Line) -> int | None:
        for index, present in self._present.items():
            if present is line:
                return index
        return None

    def _welcome(self, line: _Line, text: str) -> None:
        index, reason = self._read(text)
        if reason:
            if reason not in self._said:
                self._said.add(reason)
                _say(f"refused {line.name}: {reason}")
            line.send(f"refused {reason}")
            self._drop(line)
            return
        # Of two connections the newer one is alive: the older one was cut.
        if index in self._present:
            self._drop(self._present[index])
        self._present[index] = line
        # All are asked anew, so that all are known to be there at one time.
        self._answered.clear()
        self._asked_at = -math.inf

    def _read(self, text: str) -> tuple[int, str]:
        """Reads a greeting; returns the index, or why it is refused."""
        words = text.split()
        if " ".join(words[:3]) != _GREETING or len(words) != 6:
            return 0, "it does not speak as a worker of dtrain does"
        if words[3] != digest(self._cluster):
            return 0, (
                "its TF_CONFIG names other workers than the chief's "
                f"({', '.join(self._cluster.workers)})"
            )
        expected = proof(self._cluster, words[5])
        if not hmac.compare_digest(words[4].encode(), expected.encode()):
            return 0, "it does not know the secret of this start"
        is_number = words[5].isdecimal() and len(words[5]) < 6
        index = int(words[5]) if is_number else 0
        if not 1 <= index < self._cluster.num_workers:
            return 0, f"there is no worker {words[5]} beside the chief"
        return index, ""

    def _ask(self) -> None:
        now = time.monotonic()
        if now - self._asked_at < _ASK_SECS:
            return
        self._asked_at = now
        for line in list(self._present.values()):
            if not line.send("wait"):
                self._drop(line)

    def _drop(self, line: _Line) -> None:
        if line not in self._lines:
            return
        index = self._index_of(line)
        if index is not None:
            del self._present[index]
            self._answered.discard(index)
        self._lines.remove(line)
        self._selector.unregister(line.socket)
        line.close()

    def _let_go(self) -> None:
        """Tells all to go, and waits a moment for them to hang up first.

        The side that hangs up first keeps its port busy for a minute
        (TIME_WAIT), and TensorFlow needs the chief's at once.
        """
        for line in self._present.values():
            line.send("go")
        end = time.monotonic() + _ASK_SECS
        while self._present and time.monotonic() < end:
            self._hear()


class _Visit:
    """The side of another worker: it connects to the chief and waits there."""

    def __init__(self, cluster: Cluster, requested: Callable[[], bool]) -> None:
        self._cluster = cluster
        self._requested = requested
        self._address = _address(cluster.workers[0])
        self._reason = ""

    def wait(self, deadline: float, deadline_secs: float) -> bool:
        """See `meet`.

        Raises:
            LostWorkerError: the chief cannot be reached, or does not let go.
        """
        # Of workers that are started at once, it is there in a moment.
        pause_secs = _FIRST_TRY_SECS
        while time.monotonic() < deadline:
            if self._requested():
                return False
            line = self._connect(deadline)
            if line is None:
                time.sleep(pause_secs)
                pause_secs = min(2 * pause_secs, _TRY_SECS)
                continue
            with contextlib.closing(line):
                if self._stay(line, deadline):
                    return True
        if self._requested():
            return False
        raise LostWorkerError(
            f"worker {self._cluster.index} waited {deadline_secs:g} s "
            f"(--start_timeout_secs) for the chief "
            f"({self._cluster.workers[0]}): {self._reason}"
        )

    def _connect(self, deadline: float) -> _Line | None:
        left = max(_LOOK_SECS, deadline - time.monotonic())
        try:
            connection = socket.create_connection(
                self._address, timeout=min(left, 2.0)
            )
        except OSError as error:
            self._reason = f"it cannot be reached ({error.strerror or error})"
            return None
        # A connection to a free port of this machine may reach itself.
        if connection.getsockname() == connection.getpeername():
            connection.close()
            self._reason = "it cannot be reached"
            return None
        return _Line(connection, "the chief")

    def _stay(self, line: _Line, deadline: float) -> bool:
        """Stays as long as the chief is there; returns whether it said go."""
        index = str(self._cluster.index)
        shown = f"{digest(self._cluster)} {proof(self._cluster, index)}"
        greeting = f"{_GREETING} {shown} {index}"
        if not line.send(greeting):
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(line.socket, selectors.EVENT_READ)
            while time.monotonic() < deadline and not self._requested():
                selector.select(_LOOK_SECS)
                texts = line.receive()
                if texts is None or line.is_silent:
                    if not self._reason.startswith(_REFUSED):
                        self._reason = "it hung up, and has not come back"
                    break
                for text in texts:
                    if text == "go":
                        return True
                    self._answer(line, text)
        time.sleep(_TRY_SECS)
        return False

    def _answer(self, line: _Line, text: str) -> None:
        if text == "wait":
            self._reason = "it is there and waits for other workers"
            line.send("here")
        if text.startswith("refused "):
            reason = f"{_REFUSED}: {text.removeprefix('refused ')}"
            if reason != self._reason:
                _say(f"the chief ({self._cluster.workers[0]}): {reason}")
            self._reason = reason


def _address(worker: str) -> tuple[str, int]:
    host, _, port = worker.rpartition(":")
    return host.strip("[]"), int(port)


def _loopback(cluster: Cluster) -> str:
    """Returns the chief's address if nobody comes from another machine."""
    hosts = [_address(worker)[0] for worker in cluster.workers]
    hosts = ["127.0.0.1" if host == "localhost" else host for host in hosts]
    try:
        is_local = all(ipaddress.ip_address(host).is_loopback for host in hosts)
    except ValueError:
        return ""
    return hosts[0] if is_local else ""


def _serve(address: str, port: int) -> socket.socket:
    """Listens on an address, or on all interfaces if it is empty."""
    if address:
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=kind)
    if socket.has_dualstack_ipv6():
        # A machine may have IPv6 and no address of it.
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True
            )
    return socket.create_server(("", port))


def _say(text: str) -> None:
    # A stranger may have sent a part of it.
    print(printable(text), file=sys.stderr, flush=True)
