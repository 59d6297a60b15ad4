"""Notices that this process is to end, and what becomes of them.

A notice is a signal, or comes from one of the `sources`. It only sets a flag:
the training loop asks `requested`, saves, and exits with `errors.RUN_AGAIN`.
Before there is anything to save, a notice ends the process at once.

A thread sees the signals and asks the sources that answer at once; each that
may take long, as a disk or a server, is asked on a thread of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from dtrain import errors
from dtrain.resilience import signals, sources, status
from dtrain.resilience.signals import Signals

# Schedulers signal a process and its group, and launchers hand signals on: one
# notice may come twice.
_SAME_NOTICE_SECS = 2.0
_TICK_SECS = 0.5


class _Heard(NamedTuple):
    """A notice, and when it came, in seconds of `time.monotonic`."""

    notice: sources.Notice
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
        on_claimed: to be called by the chief when the run is its own; removes
            a stop file that is none of its notices.
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
        self._sources: list[sources.Source] = []
        self._stop_file: sources.StopFile | None = None
        self._on_notice: Callable[[], object] | None = None
        self.before_end: Callable[[], object] = lambda: None
        self.on_claimed: Callable[[], object] = lambda: None
        if stop_after_secs > 0:
            name = "the time limit (--stop_after_secs)"
            notice = sources.Notice(name, True, False)
            self._sources.append(sources.TimeLimit(stop_after_secs, notice))
        # It is only added to, which needs no lock: a signal handler that waits
        # for one may wait for the very thread that it interrupts.
        self._notices: list[_Heard] = []
        self._first_signal = math.inf
        self._was_interrupted = False
        self._has_begun = False
        self._was_announced = False
        self._stderr = -1
        self._signals = Signals(lambda number: self._add(_of_signal(number)))
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    @property
    def requested(self) -> bool:
        """Whether this process was told to end."""
        return bool(self._notices)

    @property
    def notice(self) -> str:
        """What told it first, as in `SIGTERM`; "" before."""
        return self._notices[0].notice.name if self._notices else ""

    @property
    def is_over(self) -> bool:
        """Whether a new start on this machine is pointless."""
        return any(heard.notice.is_over for heard in self._notices)

    @property
    def secs_left(self) -> float:
        """Seconds until this process ends itself; infinite without a grace."""
        times = [
            heard.time for heard in self._notices if heard.notice.has_deadline
        ]
        if not times or not self._grace_secs:
            return math.inf
        return max(0.0, min(times) + self._grace_secs - time.monotonic())

    def start(self) -> None:
        """Watches from now on. Only the main thread may call this.

        To be called before TensorFlow is imported, which takes seconds.
        """
        # While TensorFlow is imported, 2 is a file: see `startup.quiet`.
        self._stderr = os.dup(2)
        self._signals.start(_TICK_SECS)
        applying = sources.of_environment(self._environment, self._grace_secs)
        self._sources += [source for source in applying if not source.is_slow]
        self._thread = self._run(self._watch)
        for source in applying:
            if source.is_slow:
                self._run(self._ask, source)

    def arm(self) -> None:
        """Installs the handlers again.

        To be called by the main thread as soon as the strategy is built. A
        MultiWorkerMirroredStrategy puts a C++ handler over Python's for
        SIGTERM, which swallows it: neither the handler nor the thread hears of
        a SIGTERM between its construction and this call. Nothing can be done
        about that window but keep it short.
        """
        self._signals.arm()

    def look_for(
        self, path: str, every_secs: float, exists: Callable[[str], bool]
    ) -> None:
        """Takes a file for a notice, as soon as it is there.

        Args:
            path: of the file.
            every_secs: seconds between two looks.
            exists: tells whether there is one; it must not raise.
        """
        self._stop_file = sources.StopFile(path, every_secs, exists)
        self._run(self._ask, self._stop_file)

    def begin(self, on_notice: Callable[[], object] | None = None) -> None:
        """Lets notices set the flag only: there is something to save now.

        Args:
            on_notice: called once, on a thread of its own, when there is one.
        """
        self._on_notice = on_notice
        self._has_begun = True
        self._signals.wake()

    def wait_for_end(self) -> NoReturn:
        """Waits for the end of a process that was told before `begin`."""
        while True:
            time.sleep(60)

    def hear(self, is_over: bool) -> None:
        """Takes another worker's notice for this one's, if it has none.

        Args:
            is_over: as in that worker's notice.
        """
        if self._notices:
            return
        # The other may have looked for the stop file a moment earlier.
        notice = self._stop_file.look() if self._stop_file else None
        name = notice.name if notice else status.ANOTHERS_NOTICE
        self._add(sources.Notice(name, is_over, False))

    def close(self) -> None:
        """Stops watching; puts the previous handlers back. Idempotent.

        Only the main thread may call this.
        """
        if self._closed.is_set() or not self._thread:
            return
        self._closed.set()
        self._signals.let_go()
        self._signals.wake()
        self._thread.join()
        self._signals.close()
        os.close(self._stderr)

    def _add(self, notice: sources.Notice) -> None:
        if all(heard.notice.name != notice.name for heard in self._notices):
            self._notices.append(_Heard(notice, time.monotonic()))

    def _run(self, target: Callable[..., None], *args: Any) -> threading.Thread:
        name = f"dtrain-notices-{target.__name__.strip('_')}"
        thread = threading.Thread(
            target=target, args=args, name=name, daemon=True
        )
        thread.start()
        return thread

    def _watch(self) -> None:
        """Sees signals at once; asks the quick sources every half second."""
        while not self._closed.is_set():
            for number in self._signals.read():
                self._count(number)
            if not self._closed.is_set():
                for source in self._sources:
                    notice = source.look()
                    if notice:
                        self._add(notice)
                self._act()

    def _count(self, number: int) -> None:
        """Takes a signal for a notice, or, the second one, ends the process."""
        now = time.monotonic()
        is_interrupt = number == signal.SIGINT
        # A second Ctrl-C is a person's, however soon it comes.
        if (is_interrupt and self._was_interrupted) or (
            now - self._first_signal >= _SAME_NOTICE_SECS
        ):
            signals.end_by(number)
        self._first_signal = min(self._first_signal, now)
        self._was_interrupted |= is_interrupt
        self._add(_of_signal(number))

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
                # It may wait for a device, while signals must be seen.
                threading.Thread(target=self._on_notice, daemon=True).start()
        if self.secs_left <= 0:
            self._end(
                f"and not saved within grace_secs ({self._grace_secs:g}); the "
                "same command goes on from the save before"
            )

    def _end(self, reason: str) -> NoReturn:
        self.before_end()
        line = f"stopped by {self.notice} {reason}"
        errors.end(errors.RUN_AGAIN, line, self._stderr)

    def _ask(self, source: sources.Source) -> None:
        """Asks a source that may take long, until it has a notice."""
        while not (notice := source.look()):
            if self._closed.wait(source.every_secs):
                return
        self._add(notice)
        self._signals.wake()


def _of_signal(number: int) -> sources.Notice:
    # No kill follows a Ctrl-C: a person waits.
    return sources.Notice(
        signal.Signals(number).name, False, number != signal.SIGINT
    )
