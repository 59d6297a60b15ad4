"""Notices that this process is to end, and what becomes of them.

A notice is a signal, a word from the cloud, a file that somebody wrote, a time
limit, or a launcher that is gone. It sets a flag and does nothing else: the
training loop asks `requested`, saves, and exits with `errors.RUN_AGAIN`. Before
there is anything to save, a notice ends the process at once.

Signals are seen by a thread, through a socket that Python's C handler writes
to: the main thread may be inside TensorFlow for minutes, and runs no Python
handler there. What may take long, a disk or a server, is asked by threads of
its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import math
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from dtrain import errors
from dtrain.resilience import status

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Schedulers signal a process and its group, and launchers hand on: both come.
_SAME_NOTICE_SECS = 2.0
_TICK_SECS = 0.5

_GCE_HOST = "metadata.google.internal"
_GCE_PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
_GCE_HEADERS = {"Metadata-Flavor": "Google"}
_GCE_EVERY_SECS = 1.0
_GCE_BACKOFF_SECS = 30.0
# Value of each key that means the end. MIGRATE_ON_HOST_MAINTENANCE does not:
# a machine that is moved while it runs goes on.
_GCE_KEYS = {
    "instance/preempted": "TRUE",
    "instance/maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE",
}

_STOP_FILE = "the stop file"

# An allocation ends for all its processes at once, and a save may be slow.
_LEAST_LEAD_SECS = 60.0


class _Notice(NamedTuple):
    """That this process is to end.

    Attributes:
        name: what told it.
        is_over: whether a new start on this machine makes no sense.
        has_deadline: whether a kill follows, `grace_secs` later.
        time: when it came, in seconds of `time.monotonic`.
    """

    name: str
    is_over: bool
    has_deadline: bool
    time: float


class _Limit(NamedTuple):
    """A time at which a notice is due; fields as those of a notice."""

    name: str
    has_deadline: bool
    time: float


@contextlib.contextmanager
def watch(
    stop_after_secs: float = 0.0, grace_secs: float = 0.0
) -> Iterator[Watcher]:
    """Watches for notices within a block; see `Watcher`."""
    watcher = Watcher(stop_after_secs=stop_after_secs, grace_secs=grace_secs)
    watcher.start()
    try:
        yield watcher
    finally:
        watcher.close()


class Watcher:
    """Watches for notices, from `start` to `close`.

    Args:
        stop_after_secs: seconds from now to a notice; 0 is none.
        grace_secs: seconds from a notice to the kill that follows it, when
            this process ends itself; 0 lets it take as long as it takes.
        environment: the variables of this process.

    Attributes:
        before_end: called on the watcher's thread before it ends the process.
    """

    def __init__(
        self,
        *,
        stop_after_secs: float = 0.0,
        grace_secs: float = 0.0,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._grace_secs = grace_secs
        self._environment = environment
        self._on_notice: Callable[[], object] | None = None
        self._has_file: Callable[[], bool] = lambda: False
        self.before_end: Callable[[], object] = lambda: None
        self._limits: list[_Limit] = []
        if stop_after_secs > 0:
            name = "the time limit (--stop_after_secs)"
            at = time.monotonic() + stop_after_secs
            self._limits.append(_Limit(name, False, at))
        self._supervisor = 0
        # Only ever added to, which needs no lock: a handler that waited for
        # one would wait for the thread that it interrupted.
        self._notices: list[_Notice] = []
        self._first_signal = math.inf
        self._was_interrupted = False
        self._has_begun = False
        self._was_announced = False
        self._previous: dict[int, object] = {}
        self._previous_wakeup = -1
        self._stderr = -1
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    @property
    def requested(self) -> bool:
        """Whether this process was told to end."""
        return bool(self._notices)

    @property
    def notice(self) -> str:
        """What told it first, as in `SIGTERM`; "" before."""
        return self._notices[0].name if self._notices else ""

    @property
    def is_over(self) -> bool:
        """Whether a new start on this machine makes no sense."""
        return any(notice.is_over for notice in self._notices)

    @property
    def secs_left(self) -> float:
        """Seconds until this process ends itself; infinite without a grace."""
        times = [each.time for each in self._notices if each.has_deadline]
        if not times or not self._grace_secs:
            return math.inf
        return max(0.0, min(times) + self._grace_secs - time.monotonic())

    def start(self) -> None:
        """Watches from now on. Only the main thread may call this.

        To be called before TensorFlow is imported, which takes seconds.
        """
        # While TensorFlow is imported, 2 is a file: see `startup.quiet`.
        self._stderr = os.dup(2)
        self._reader, self._writer = socket.socketpair()
        self._reader.settimeout(_TICK_SECS)
        self._writer.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(
            self._writer.fileno(), warn_on_full_buffer=False
        )
        self._install()
        os.register_at_fork(after_in_child=self._let_go)
        self._read_environment()
        self._thread = self._run(self._watch)
        for key, value in _gce_keys(self._environment).items():
            self._run(self._ask_gce, key, value)

    def arm(self) -> None:
        """Installs the handlers again.

        To be called by the main thread as soon as the strategy is built. A
        MultiWorkerMirroredStrategy puts a C++ handler over Python's for
        SIGTERM, which swallows it: neither the handler nor the thread hears of
        a SIGTERM between its construction and this call. Nothing can be done
        about that window but keep it short.
        """
        self._install()

    def look_for(
        self, path: str, every_secs: float, exists: Callable[[str], bool]
    ) -> None:
        """Takes a file for a notice, as soon as it is there.

        Args:
            path: of the file.
            every_secs: seconds between two looks.
            exists: tells whether there is one; it must not raise.
        """
        self._has_file = lambda: exists(path)
        self._run(self._look_for_file, path, every_secs, exists)

    def begin(self, on_notice: Callable[[], object] | None = None) -> None:
        """Lets notices set the flag only: there is something to save now.

        Args:
            on_notice: called once, on a thread of its own, when there is one.
        """
        self._on_notice = on_notice
        self._has_begun = True
        self._wake()

    def wait_for_end(self) -> NoReturn:
        """Waits for the end of a process that was told before `begin`."""
        while True:
            time.sleep(60)

    def hear(self, is_over: bool) -> None:
        """Takes another worker's notice for this one's, if it has none.

        Args:
            is_over: that worker's.
        """
        if self._notices:
            return
        # Of those who look for the file, another one may have come first.
        name = _STOP_FILE if self._has_file() else status.ANOTHERS_NOTICE
        self._add(name, is_over, False)

    def close(self) -> None:
        """Stops watching; puts the previous handlers back. Idempotent.

        Only the main thread may call this.
        """
        if self._closed.is_set() or not self._thread:
            return
        self._let_go()
        self._wake()
        self._thread.join()
        for each in (self._reader, self._writer):
            if each:
                each.close()
        os.close(self._stderr)

    def _install(self) -> None:
        for number in _SIGNALS:
            previous = signal.signal(number, self._handle)
            if previous != self._handle:
                self._previous[number] = previous

    def _let_go(self) -> None:
        """Puts the handlers back; here, and in a process forked from this.

        A forked one would write its own signals into the socket of this one.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        signal.set_wakeup_fd(self._previous_wakeup)
        while self._previous:
            number, previous = self._previous.popitem()
            # None is a handler that was not Python's.
            signal.signal(number, previous or signal.SIG_DFL)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self._add(signal.Signals(number).name, False, number != signal.SIGINT)
        previous = self._previous.get(number)
        # Python's own SIGINT handler would raise KeyboardInterrupt here.
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)

    def _add(self, name: str, is_over: bool, has_deadline: bool) -> None:
        if all(notice.name != name for notice in self._notices):
            now = time.monotonic()
            self._notices.append(_Notice(name, is_over, has_deadline, now))

    def _run(self, target: Callable[..., None], *args: Any) -> threading.Thread:
        name = f"dtrain-notices-{target.__name__.strip('_')}"
        thread = threading.Thread(
            target=target, args=args, name=name, daemon=True
        )
        thread.start()
        return thread

    def _wake(self) -> None:
        # Full, or closed: then the thread is awake anyhow, or gone.
        with contextlib.suppress(OSError):
            if self._writer:
                self._writer.send(b"\0")

    def _watch(self) -> None:
        """Sees the signals at once, and the clock every half second."""
        assert self._reader
        while not self._closed.is_set():
            numbers = b""
            with contextlib.suppress(TimeoutError):
                numbers = self._reader.recv(4096)
            for number in numbers:
                if number in _SIGNALS:
                    self._count(number)
            if not self._closed.is_set():
                self._look_at_the_clock()
                self._act()

    def _count(self, number: int) -> None:
        """Takes a signal for a notice, or for the end of all patience."""
        now = time.monotonic()
        is_interrupt = number == signal.SIGINT
        # A second Ctrl-C is a person's finger, however fast.
        if (is_interrupt and self._was_interrupted) or (
            now - self._first_signal >= _SAME_NOTICE_SECS
        ):
            _end_by(number)
        self._first_signal = min(self._first_signal, now)
        self._was_interrupted |= is_interrupt
        self._add(signal.Signals(number).name, False, not is_interrupt)

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for limit in self._limits:
            if now >= limit.time:
                self._add(limit.name, True, limit.has_deadline)
        if self._supervisor and os.getppid() != self._supervisor:
            self._add("the launcher is gone", False, True)

    def _act(self) -> None:
        """Does what the notices so far ask for."""
        if not self._notices:
            return
        if not self._has_begun:
            self._end(
                "before the first steps were done: nothing to save; run the "
                "same command again"
            )
        if not self._was_announced:
            self._was_announced = True
            if self._on_notice:
                # It may wait for a device, and the next signal shall not.
                threading.Thread(target=self._on_notice, daemon=True).start()
        if self.secs_left <= 0:
            self._end(
                f"and not saved within grace_secs ({self._grace_secs:g}); the "
                "same command goes on from the save before"
            )

    def _end(self, what: str) -> NoReturn:
        self.before_end()
        words = f"stopped by {self.notice} {what}"
        errors.end(errors.RUN_AGAIN, words, self._stderr)

    def _look_for_file(
        self, path: str, every_secs: float, exists: Callable[[str], bool]
    ) -> None:
        while not exists(path):
            if self._closed.wait(every_secs):
                return
        self._add(_STOP_FILE, True, False)
        self._wake()

    def _ask_gce(self, key: str, value: str) -> None:
        """Polls a key: each on its own, for one may hang."""
        host = self._environment.get("GCE_METADATA_HOST") or _GCE_HOST
        delay = _GCE_EVERY_SECS
        while True:
            found = _read_gce(host, key)
            if found == value:
                break
            if found is not None:
                delay = _GCE_EVERY_SECS
            if self._closed.wait(delay):
                return
            if found is None:
                delay = min(2 * delay, _GCE_BACKOFF_SECS)
        self._add(f"GCE: {key}", True, True)
        self._wake()

    def _read_environment(self) -> None:
        """Takes what Slurm and the supervisor say."""
        name = "DTRAIN_SUPERVISOR_PID"
        self._supervisor = int(_number(self._environment, name) or 0)
        name = "SLURM_JOB_END_TIME"
        end = _number(self._environment, name)
        if end is None:
            return
        # Taken once: the clock of the wall may jump.
        left = end - time.time()
        if left <= 0:
            _ignore(name, self._environment[name], "a time to come")
            return
        lead = max(_LEAST_LEAD_SECS, 2 * self._grace_secs)
        self._limits.append(
            _Limit(
                "the end of the Slurm allocation",
                True,
                time.monotonic() + left - lead,
            )
        )


def _end_by(number: int) -> NoReturn:
    """Ends this process by the default action of a signal."""
    # `signal.signal` is for the main thread alone, which may be busy.
    c_signal = ctypes.CDLL(None).signal
    c_signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    c_signal.restype = ctypes.c_void_p
    c_signal(number, None)
    os.kill(os.getpid(), number)
    # The kernel spares process 1 of a container.
    time.sleep(1.0)
    os._exit(128 + number)


def _number(environment: Mapping[str, str], name: str) -> float | None:
    """Reads a positive whole number; None if there is none, with a line."""
    text = environment.get(name, "")
    if not text:
        return None
    # More digits than this are no time and no process.
    if text.isascii() and text.isdigit() and len(text) < 16 and int(text):
        return int(text)
    _ignore(name, text, "a whole number")
    return None


def _ignore(name: str, value: str, rule: str) -> None:
    print(
        f"{name} ({value[:80]!r}) is ignored: it should be {rule}",
        file=sys.stderr,
        flush=True,
    )


def _gce_keys(environment: Mapping[str, str]) -> Mapping[str, str]:
    """Returns what to ask the metadata server for: nothing outside GCE."""
    if environment.get("NO_GCE_CHECK", "").lower() == "true":
        return {}
    if environment.get("GCE_METADATA_HOST"):
        return _GCE_KEYS
    try:
        product = _GCE_PRODUCT.read_text(errors="replace")
    except OSError:
        return {}
    return _GCE_KEYS if "Google Compute Engine" in product else {}


def _read_gce(host: str, key: str) -> str | None:
    """Asks the metadata server; None if it does not answer, or with an error.

    By `http.client`, which goes through no proxy.
    """
    path = f"/computeMetadata/v1/{key}"
    try:
        connection = http.client.HTTPConnection(host, timeout=_GCE_EVERY_SECS)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=_GCE_HEADERS)
            response = connection.getresponse()
            text = response.read(1000).decode(errors="replace")
            return text.strip() if response.status == 200 else None
    except (OSError, ValueError, http.client.HTTPException):
        return None
