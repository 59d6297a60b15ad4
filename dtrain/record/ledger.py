"""Records where the wall time of an attempt goes.

The chief of a run keeps one small document for each attempt, in
run_dir/ledger/. It is replaced every few seconds: of an attempt that is killed
the last seconds are missing, and `goodput` counts them as idle. Every second
of an attempt is of exactly one kind, so the kinds add up to all of it.
Durations are those of a clock that nobody sets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

from dtrain.record import goodput
from dtrain.resilience import standby
from dtrain.storage import files

_SECS_BETWEEN_WRITES = 5.0
# A store bills each write, and may take a second for it.
_SECS_BETWEEN_REMOTE_WRITES = 60.0
# How long the end of a run waits for a store.
_LAST_SECS = 10.0
_MAX_POINTS = 1000
_NS = 1_000_000_000


def _boot_ns() -> int:
    """Returns the time since the machine was switched on, asleep or not."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


_IMPORTED_NS = _boot_ns()


def _process_start_ns() -> int:
    """Returns when this process began; when this was imported, if unknown.

    Of one that had waited as a spare, when it was called.
    """
    if standby.called_ns():
        return standby.called_ns()
    try:
        with open("/proc/self/stat", "rb") as file:
            # Behind the name, which may hold blanks and parentheses.
            fields = file.read().rpartition(b")")[2].split()
        ticks = int(fields[19])
    except (OSError, ValueError, IndexError):
        return _IMPORTED_NS
    started = ticks * _NS // os.sysconf("SC_CLK_TCK")
    return started if 0 < started <= _IMPORTED_NS else _IMPORTED_NS


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


class Ledger:
    """The ledger of one attempt; for the training thread alone.

    Where this is not the chief nothing is recorded.
    """

    def __init__(
        self,
        run_dir: str,
        *,
        is_chief: bool = True,
        num_workers: int = 1,
        num_replicas: int = 1,
        batch_size: int = 1,
        clock_ns: Callable[[], int] = _boot_ns,
        started_ns: int | None = None,
    ) -> None:
        """Begins with what the process has spent so far, as `start`.

        Args:
            run_dir: of the run, which this process has claimed.
            is_chief: whether this worker records.
            num_workers: of the run.
            num_replicas: of all workers.
            batch_size: images of a step.
            clock_ns: returns nanoseconds that only ever grow.
            started_ns: when the process began, by that clock; None asks the
                operating system.
        """
        self._is_open = is_chief
        self._clock_ns = clock_ns
        self._started_ns = (
            _process_start_ns() if started_ns is None else started_ns
        )
        self._settled_ns = self._started_ns
        self._spent_ns: dict[str, int] = dict.fromkeys(goodput.KINDS, 0)
        self._kinds = ["start"]
        self._points: list[tuple[int, int, int]] = []
        self._num_saves = 0
        self._has_compiled = False
        self._first_steps = 0
        self._is_remote = files.is_remote(run_dir)
        self._directory = f"{run_dir}/ledger"
        self._due_ns = 0
        self._thread: threading.Thread | None = None
        self._attempt = self._begun(num_workers, num_replicas, batch_size)
        started = time.gmtime(self._attempt.started)
        name = time.strftime("%Y%m%dT%H%M%SZ", started)
        self._path = f"{self._directory}/{name}-{self._attempt.pid}.json"

    def _begun(
        self, num_workers: int, num_replicas: int, batch_size: int
    ) -> goodput.Attempt:
        """Describes this process, which has done nothing yet."""
        booted = time.time() - self._clock_ns() / _NS
        number = os.environ.get("DTRAIN_ATTEMPT", "")
        return goodput.Attempt(
            started=booted + self._started_ns / _NS,
            boot_id=_boot_id(),
            boot_started=self._started_ns / _NS,
            host=socket.gethostname(),
            pid=os.getpid(),
            num_workers=num_workers,
            num_replicas=num_replicas,
            batch_size=batch_size,
            attempt=int(number) if number.isdecimal() else 0,
            num_saves=0,
            seconds={},
            points=(),
            exit_code=None,
            notice="",
        )

    @contextlib.contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Counts the time of a block, less that of blocks inside it.

        The first block of `train` is counted as `compile`, for then the step
        is compiled. One that raises is not counted: most of it was waiting for
        a worker that is gone, and it is lost as in an attempt that is killed.

        Args:
            kind: one of `goodput.KINDS`.
        """
        if not self._is_open:
            yield
            return
        self._settle()
        if kind == "train" and not self._has_compiled:
            self._has_compiled = True
            self._kinds[0] = "other"
            kind = "compile"
        self._num_saves += kind == "save"
        self._kinds.append(kind)
        spent_ns = self._spent_ns[kind]
        try:
            yield
        except BaseException:
            self._settle()
            if kind == "train":
                self._spent_ns[kind] = spent_ns
            raise
        finally:
            self._settle()
            self._kinds.pop()

    def spent(self, kind: str) -> tuple[float, float]:
        """Returns the seconds of a kind so far, and those of the attempt.

        Args:
            kind: one of `goodput.KINDS`.
        """
        if self._is_open:
            self._settle()
        total_ns = self._settled_ns - self._started_ns
        return self._spent_ns[kind] / _NS, total_ns / _NS

    def _settle(self) -> int:
        """Counts what has passed since the last call; returns the time."""
        # If a clock went back, as no Linux's does, the sum must hold.
        now = max(self._clock_ns(), self._settled_ns)
        self._spent_ns[self._kinds[-1]] += now - self._settled_ns
        self._settled_ns = now
        return now

    def restored(self, step: int) -> None:
        """Tells which step the attempt goes on from, and writes it down.

        Nothing is written before: a start that fails leaves nothing behind.

        Args:
            step: the steps that are done; 0 for a fresh start.
        """
        if self._is_open:
            self._settle()
            self._add_point(step)
            self._write()

    def progress(self, step: int) -> None:
        """Tells how far the run is, after each loop of steps.

        Args:
            step: the steps that are done; fewer than before if the run has
                gone back.
        """
        if not self._is_open:
            return
        assert self._points, "restored() comes first"
        now = self._settle()
        if step != self._points[-1][1]:
            self._take_step_off_compile(step)
            self._add_point(step)
        if now >= self._due_ns:
            self._write()

    def _take_step_off_compile(self, step: int) -> None:
        """Counts the steps of the first loop as those of the second took."""
        new = step - self._points[-1][1]
        if new <= 0 or not self._has_compiled:
            return
        if not self._first_steps:
            self._first_steps = new
        elif self._first_steps > 0:
            usual = self._spent_ns["train"] // new * self._first_steps
            moved = min(usual, self._spent_ns["compile"])
            self._spent_ns["compile"] -= moved
            self._spent_ns["train"] += moved
            self._first_steps = -1

    def _add_point(self, step: int) -> None:
        secs_ns = self._settled_ns - self._started_ns
        self._points.append((secs_ns, step, self._spent_ns["train"]))
        if len(self._points) > _MAX_POINTS:
            self._points = _thin(self._points)

    def close(self, exit_code: int, notice: str = "") -> None:
        """Writes how the attempt ended; nothing is recorded any more.

        Args:
            exit_code: of the process.
            notice: what told it to end; "" if nothing did.
        """
        if not self._is_open:
            return
        self._settle()
        self._is_open = False
        if self._points:
            self._write(exit_code, notice)
        if self._thread:
            self._thread.join(_LAST_SECS)

    def _write(self, exit_code: int | None = None, notice: str = "") -> None:
        """Replaces the document; on a thread if it is in a store."""
        secs = _SECS_BETWEEN_WRITES
        if self._is_remote:
            secs = _SECS_BETWEEN_REMOTE_WRITES
        self._due_ns = self._settled_ns + int(secs * _NS)
        attempt = dataclasses.replace(
            self._attempt,
            num_saves=self._num_saves,
            seconds={k: v / _NS for k, v in self._spent_ns.items()},
            points=[
                goodput.Point(at / _NS, step, train / _NS)
                for at, step, train in self._points
            ],
            exit_code=exit_code,
            notice=notice,
        )
        if not self._is_remote:
            self._replace(goodput.dumps(attempt))
            return
        before = self._thread
        if before and before.is_alive():
            before.join(0.0 if exit_code is None else _LAST_SECS)
            if before.is_alive():
                return
        self._thread = threading.Thread(
            target=lambda: self._replace(goodput.dumps(attempt)),
            name="ledger",
            daemon=True,
        )
        self._thread.start()

    def _replace(self, data: bytes) -> None:
        # The run is worth more than its book-keeping: no error ends it.
        with contextlib.suppress(OSError):
            files.make_directory(self._directory, parents=False)
            files.write(self._path, data, is_durable=False)


def _thin(points: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Drops every second point, but for where the run has gone back."""
    kept = {0, len(points) - 1, *range(0, len(points), 2)}
    turns = [
        index
        for index, (a, b) in enumerate(itertools.pairwise(points))
        if b[1] < a[1]
    ]
    # Old turns go in the end: the file has to stay small.
    for index in turns[-_MAX_POINTS // 8 :]:
        kept |= {index, index + 1}
    return [points[index] for index in sorted(kept)]
