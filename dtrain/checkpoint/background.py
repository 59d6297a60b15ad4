"""Writes on another thread, so that nobody waits for a disk.

One thing is written at a time, and one waits. What waits is replaced by what
is newer, unless it must be kept: then the newer one is refused, or, if it too
must be kept, the caller waits. So a disk slower than the training costs no more
memory than two states.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent import futures
from typing import NamedTuple


class _Job(NamedTuple):
    write: Callable[[], None]
    keep: bool


class Writer:
    """One background thread and a place for one that waits.

    One thread may call it. What a job raises is raised again by the next
    `raise_if_failed` or `close`.
    """

    def __init__(self) -> None:
        self._pool = futures.ThreadPoolExecutor(1, "dtrain-writer")
        self._lock = threading.Lock()
        self._waiting: _Job | None = None
        self._started: list[futures.Future[None]] = []

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written, and nothing waits."""
        return all(future.done() for future in self._started)

    def submit(self, write: Callable[[], None], *, keep: bool) -> bool:
        """Has something written soon.

        Args:
            write: does it, on the other thread.
            keep: whether it must be written even if something newer comes.

        Returns:
            Whether it was taken; False if what waits must be kept, and this
            need not.
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
            # Until what is being written is done, and what waits has begun.
            running = [each for each in self._started if not each.done()]
            futures.wait(running, return_when=futures.FIRST_COMPLETED)

    def _write_next(self) -> None:
        with self._lock:
            job, self._waiting = self._waiting, None
        if job:
            job.write()

    def _raise_done(self) -> None:
        done = [future for future in self._started if future.done()]
        self._started = [each for each in self._started if each not in done]
        for future in done:
            future.result()

    def raise_if_failed(self) -> None:
        """Raises what a job has raised, once; does not wait."""
        self._raise_done()

    def wait(self, secs: float | None = None) -> bool:
        """Waits until all is written, or has failed.

        Args:
            secs: how long at most; None is for ever.

        Returns:
            Whether it is.
        """
        futures.wait(self._started, secs)
        return self.is_idle

    def wait_for_room(self, secs: float) -> bool:
        """Waits until something that must be kept would be taken at once.

        Args:
            secs: how long at most.

        Returns:
            Whether it would.
        """
        if self._is_full():
            running = [each for each in self._started if not each.done()]
            futures.wait(running, secs, futures.FIRST_COMPLETED)
        return not self._is_full()

    def _is_full(self) -> bool:
        waiting = self._waiting
        return waiting is not None and waiting.keep

    def drain(self) -> None:
        """Waits until all is written; raises what a job has raised."""
        self.wait()
        self._raise_done()

    def close(self) -> None:
        """Writes what waits and ends the thread; may be called twice.

        Never returns cleanly if something was not written.
        """
        self._pool.shutdown()
        self._raise_done()
