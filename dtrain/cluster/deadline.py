"""Ends a process that is stuck where no Python can run.

TensorFlow connects the workers in one call that keeps Python's lock: while it
waits for one that has died, no other thread runs, and no handler of a signal.
So the end comes from timers of the C library, whose threads need no Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator
from typing import Any

from dtrain import streams

# Of <signal.h>, and between the line and the end.
_SIGEV_THREAD = 2
_LAST_SECS = 0.5


class _Event(ctypes.Structure):
    """A `struct sigevent` of Linux: a function of one word, and the word."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_byte * 32),
    )


class _Setting(ctypes.Structure):
    """A `struct itimerspec`: how often, and when, in seconds and the rest."""

    _fields_ = (
        ("every", ctypes.c_long * 2),
        ("after", ctypes.c_long * 2),
    )


@contextlib.contextmanager
def ends_with(code: int, words: str, secs: float) -> Iterator[None]:
    """Ends the process if the block takes too long, whatever it waits for.

    Args:
        code: what the process exits with.
        words: one line that says why; it goes to the standard output.
        secs: how long the block may take.

    Raises:
        OSError: there are no timers left.
    """
    streams.drain()
    library = ctypes.CDLL(None, use_errno=True)
    # Unbuffered, for `_exit` writes nothing that is still there.
    stdout = ctypes.c_void_p.in_dll(library, "stdout")
    library.setvbuf(stdout, None, 2, 0)
    text = ctypes.create_string_buffer(words.encode())
    said = (library.puts, ctypes.addressof(text), secs)
    over = (library._exit, code, secs + _LAST_SECS)
    timers: list[ctypes.c_void_p] = []
    try:
        for function, word, after in (said, over):
            timers.append(_start(library, function, word, after))
        yield
    finally:
        for timer in timers:
            library.timer_delete(timer)


def _start(
    library: Any, function: Any, word: int, secs: float
) -> ctypes.c_void_p:
    """Has a thread of its own call a function of C with one word, once.

    Raises:
        OSError: there are no timers left.
    """
    event = _Event(
        value=word,
        notify=_SIGEV_THREAD,
        function=ctypes.cast(function, ctypes.c_void_p).value,
    )
    setting = _Setting()
    setting.after = (int(secs), int(secs % 1 * 1e9) or 1)
    timer = ctypes.c_void_p()
    if library.timer_create(
        time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)
    ) or library.timer_settime(timer, 0, ctypes.byref(setting), None):
        raise OSError(ctypes.get_errno(), "no timer")
    return timer
