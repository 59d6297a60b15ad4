"""Standard output and standard error, which never decide over a program.

A terminal may stop reading (Ctrl-S, a frozen ssh session), a reader may be
gone, a disk full, a stream closed, a letter not in the encoding: what cannot be
printed is lost, and the program goes on. Here it may wait for its reader,
unless it has called `never_wait`.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import io
import os
import select
import sys
import threading

# As much as an hour or more of a run prints.
_MOST_BYTES = 1 << 20
# How long the end of a program waits for its last words to be read.
_LAST_SECS = 2.0


class _Descriptor(io.RawIOBase):
    """A standard stream that takes all bytes, whatever becomes of them.

    Attributes:
        failure: the first error of a write; None if there was none.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: object, /) -> int:
        piece = bytes(data)  # type: ignore[call-overload]
        backlog = _backlogs.get(self._descriptor)
        if backlog:
            backlog.add(self, piece)
        else:
            self.write_now(piece)
        return len(piece)

    def write_now(self, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                # Another program has made the terminal so, which it shares.
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.failure = self.failure or error
                return


class _Backlog:
    """What waits to be read, and the thread that waits for the reader."""

    def __init__(self) -> None:
        self._pieces: collections.deque[tuple[_Descriptor, bytes]] = (
            collections.deque()
        )
        self._num_bytes = 0
        self._is_writing = False
        self._changed = threading.Condition()
        threading.Thread(
            target=self._keep_writing, name="dtrain-output", daemon=True
        ).start()

    def add(self, stream: _Descriptor, piece: bytes) -> None:
        with self._changed:
            self._pieces.append((stream, piece))
            self._num_bytes += len(piece)
            # The newest are those that a reader who is back wants to see.
            while self._num_bytes > _MOST_BYTES:
                self._num_bytes -= len(self._pieces.popleft()[1])
            self._changed.notify_all()

    def drain(self, secs: float) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: not self._pieces and not self._is_writing, secs
            )

    def _keep_writing(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._pieces)
                stream, piece = self._pieces.popleft()
                self._num_bytes -= len(piece)
                self._is_writing = True
            stream.write_now(piece)


# By descriptor; empty while the program may wait.
_backlogs: dict[int, _Backlog] = {}


def protect() -> None:
    """Makes `sys.stdout` and `sys.stderr` streams that never raise.

    Every program calls it first. Streams that somebody has replaced, as a test
    that captures what is printed, stay as they are.
    """
    _open_closed()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None and stream is not getattr(sys, f"__{name}__"):
            continue
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        safe = io.TextIOWrapper(
            _Descriptor(descriptor),  # type: ignore[arg-type]
            encoding=getattr(stream, "encoding", "utf-8"),
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, safe)


def _open_closed() -> None:
    """Puts nothing behind a standard descriptor that is closed, as by `>&-`.

    Else the next file that is opened gets it, and all that C++ prints.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the least that is free: those below it are open.
            os.open(os.devnull, os.O_RDWR)


def never_wait() -> None:
    """Lets no reader hold this program up from now on.

    To be called by a program that trains, or keeps one that trains alive.
    What nobody reads waits, a megabyte of it; then the oldest is lost.
    """
    if _backlogs or not isinstance(sys.stdout, io.TextIOWrapper):
        return
    if not isinstance(sys.stdout.buffer, _Descriptor):
        return
    # What the interpreter prints of an error that nobody caught comes before.
    atexit.register(drain)
    # Threads are not forked.
    os.register_at_fork(after_in_child=_backlogs.clear)
    _backlogs[1] = _Backlog()
    # In the order in which it was printed, where both go to the same place.
    is_same = os.path.sameopenfile(1, 2)
    _backlogs[2] = _backlogs[1] if is_same else _Backlog()


def drain() -> None:
    """Waits a moment until all that was printed is read, or lost."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    for backlog in list(_backlogs.values()):
        backlog.drain(_LAST_SECS)


def lost() -> OSError | None:
    """Returns why standard output is not whole; None if that is no failure.

    It is none of a program that waits for nobody, nor where the reader has seen
    enough, as in `| head`.
    """
    error = _first_error()
    is_whole = _backlogs or isinstance(error, BrokenPipeError)
    return None if is_whole else error


def has_reader() -> bool:
    """Tells whether nothing printed on the standard output was lost so far."""
    return _first_error() is None


def _first_error() -> OSError | None:
    stream = getattr(sys.stdout, "buffer", None)
    return stream.failure if isinstance(stream, _Descriptor) else None
