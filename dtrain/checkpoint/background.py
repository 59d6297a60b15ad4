"""Writes on another thread, so that training does not wait for a disk.

One job runs at a time, and at most one waits. A newer job takes the place of
the one that waits, unless that must be kept: then the newer one is refused, or,
if it must be kept too, the caller waits. So a disk slower than the training
costs no more memory than two states.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent import futures
from typing import NamedTuple

# Of the writing thread: where both want a core, it gets a tenth of it, so that
# it slows steps less (docs/recovery.md), and takes more time. It is not the
# lowest, for where other programs take all cores it must not starve.
_NICE = 10


class _Job(NamedTuple):
    write: Callable[[], None]
    keep: bool


class Writer:
    """Runs jobs on a thread of its own; one thread may call it.

    What a job raises is raised again, once, by the next `raise_if_failed`,
    `drain` or `close`.

    Attributes:
        is_closed: whether it takes no more.
    """

    def __init__(self) -> None:
        self.is_closed = False
        self._pool = futures.ThreadPoolExecutor(
            1, "dtrain-writer", initializer=_give_way
        )
        self._lock = threading.Lock()
        self._waiting: _Job | None = None
        self._started: list[futures.Future[None]] = []

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written, and nothing waits."""
        return all(future.done() for future in self._started)

    def submit(self, write: Callable[[], None], *, keep: bool) -> bool:
        """Takes a job, to be run soon.

        Args:
            write: the job.
            keep: whether it must be run even if a newer one comes.

        Returns:
            Whether it was taken; False if the one that waits must be kept, and
            this need not.
        """
        job = _Job(write, keep)
        while True:
            with self._lock:
                waiting, self._waiting = self._waiting, job
                if waiting is None:
                    self._started.append(self._pool.submit(self._write_next))
                    return True
                if not waiting.keep:
                    return True
                self._waiting = waiting
            if not keep:
                return False
            # Until one job is done, and the one that waits has begun.
            self._wait_for_one(None)

    def _write_next(self) -> None:
        with self._lock:
            job, self._waiting = self._waiting, None
        if job:
            job.write()

    def _wait_for_one(self, secs: float | None) -> None:
        running = [future for future in self._started if not future.done()]
        futures.wait(running, secs, futures.FIRST_COMPLETED)

    def raise_if_failed(self) -> None:
        """Raises what a job has raised, once; does not wait.

        What another one has raised is kept for the next call.
        """
        for future in [future for future in self._started if future.done()]:
            self._started.remove(future)
            future.result()

    def wait(self, secs: float | None = None) -> bool:
        """Waits until all jobs have ended, or for `secs`; tells whether."""
        futures.wait(self._started, secs)
        return self.is_idle

    def wait_for_room(self, secs: float) -> bool:
        """Waits until any job would be taken, or for `secs`; tells whether."""
        if self._is_full():
            self._wait_for_one(secs)
        return not self._is_full()

    def _is_full(self) -> bool:
        waiting = self._waiting
        return waiting is not None and waiting.keep

    def drain(self) -> None:
        """Waits until all jobs are done; raises what one has raised."""
        self.wait()
        self.raise_if_failed()

    def close(self) -> None:
        """Runs what waits and ends the thread; raises what a job has raised.

        May be called twice.
        """
        self.is_closed = True
        self._pool.shutdown()
        self.raise_if_failed()


def _give_way() -> None:
    """Lets the training come before this thread, and before what it starts."""
    # Elsewhere a priority is that of a whole process.
    if sys.platform == "linux":
        # A sandbox may forbid it, and a save is worth more.
        with contextlib.suppress(OSError):
            nice = max(_NICE, os.getpriority(os.PRIO_PROCESS, 0))
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
