"""Signals that are seen at once, whatever the main thread is in.

The main thread may be inside TensorFlow for minutes, and runs no handler of
Python's there. So Python's handler in C writes the number of each signal to a
socket, which another thread reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
import types
from collections.abc import Callable
from typing import NoReturn

NUMBERS = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2),
)


def heard() -> tuple[signal.Signals, ...]:
    """Returns the signals that are notices to this process.

    That a terminal is closed is none to one that `nohup` has started.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return tuple(number for number in NUMBERS if number != signal.SIGHUP)
    return NUMBERS


class Signals:
    """Takes the signals of this process, from `start` to `close`.

    Only the main thread may call `start`, `arm` and `close`.
    """

    def __init__(self, on_signal: Callable[[int], object]) -> None:
        """Takes nothing yet.

        Args:
            on_signal: called with the number in the handler of a signal; it
                must wait for no lock.
        """
        self._on_signal = on_signal
        self._heard = heard()
        self._previous: dict[int, object] = {}
        self._previous_wakeup = -1
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        self._closed = threading.Event()

    def start(self, tick_secs: float) -> None:
        """Takes the signals.

        Args:
            tick_secs: how long `read` waits.
        """
        self._reader, self._writer = socket.socketpair()
        self._reader.settimeout(tick_secs)
        self._writer.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(
            self._writer.fileno(), warn_on_full_buffer=False
        )
        self.arm()
        os.register_at_fork(after_in_child=self.let_go)

    def arm(self) -> None:
        """Installs the handlers, again where another has replaced them."""
        for number in self._heard:
            previous = signal.signal(number, self._handle)
            if previous != self._handle:
                self._previous[number] = previous

    def read(self) -> list[int]:
        """Waits for signals, for a tick at most; returns their numbers."""
        assert self._reader
        with contextlib.suppress(TimeoutError):
            received = self._reader.recv(4096)
            return [number for number in received if number in self._heard]
        return []

    def wake(self) -> None:
        """Makes `read` return."""
        # If the socket is full the reader is awake; if it is closed, gone.
        with contextlib.suppress(OSError):
            if self._writer:
                self._writer.send(b"\0")

    def let_go(self) -> None:
        """Puts the handlers back; also in a process that is forked from this.

        Else that one would write its signals into the socket of this one.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        signal.set_wakeup_fd(self._previous_wakeup)
        while self._previous:
            number, previous = self._previous.popitem()
            # None is a handler that was not Python's.
            signal.signal(number, previous or signal.SIG_DFL)  # type: ignore[arg-type]

    def close(self) -> None:
        """Closes the socket, when nobody reads any more."""
        for end in (self._reader, self._writer):
            if end:
                end.close()

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self._on_signal(number)
        previous = self._previous.get(number)
        # Python's own SIGINT handler would raise KeyboardInterrupt here.
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)


def end_by(number: int) -> NoReturn:
    """Ends this process by the default action of a signal.

    Args:
        number: of the signal.
    """
    # `signal.signal` is for the main thread alone, which may be busy.
    c_signal = ctypes.CDLL(None).signal
    c_signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    c_signal.restype = ctypes.c_void_p
    c_signal(number, None)
    os.kill(os.getpid(), number)
    # The kernel spares process 1 of a container.
    time.sleep(1.0)
    os._exit(128 + number)
