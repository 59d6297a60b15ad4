"""Ends a process that is alive and makes no progress.

A peer that is stuck in Python, input that never comes, a collective that one
worker has left out: TensorFlow waits for ever, and its heartbeats go on. So the
training loop tells of its progress (`beat`). If a thread hears of none for too
long, it writes the stacks of all threads to a file and ends the process with
`errors.HUNG`. After a crash in C++ and a SIGABRT the stacks are there, too.

    watchdog = Watchdog("runs/default/stacks/worker-0", hang_timeout_secs=0.0)
    watchdog.start()
    watchdog.beat(step=50, saved_step=0)    # after each loop of steps
    watchdog.close()                        # an empty file is removed

The thread also writes the status file, which tells a supervisor that this
process lives, how far it is, and whether it was told to end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

from dtrain import errors
from dtrain.resilience import status
from dtrain.storage import locks

# Building, restoring and compiling a large GAN on a slow machine.
START_UP_SECS = 1800.0
_LEAST_SECS = 60.0
_TIMES_THE_LONGEST = 10.0
_PERIOD_SECS = 1.0
# The file is small, but a loop of steps may be as short as a millisecond.
_STATUS_PAUSE_SECS = 0.1
_STACKS_SECS = 5.0
_NUM_FRAMES = 6
_PACKAGES = f"{os.sep}site-packages{os.sep}"


class _Clock:
    """Seconds for which this process could run.

    It stands still while the process is stopped, as by SIGSTOP, a debugger or a
    laptop that sleeps: between two ticks pass at most two periods.
    """

    def __init__(self, period_secs: float) -> None:
        self._most = 2 * period_secs
        # A tuple, so that no thread sees half of a change.
        self._last = (0.0, time.monotonic())

    def now(self) -> float:
        secs, tick = self._last
        return secs + min(time.monotonic() - tick, self._most)

    def tick(self) -> None:
        self._last = (self.now(), time.monotonic())


class _Stacks(NamedTuple):
    """The file that the stacks go to, and its descriptor, open for a crash."""

    path: str
    file: int


class Watchdog:
    """Watches the progress of this process, from `start` to `close`.

    Args:
        stacks_path: where the stacks go, without `-<number>.txt`, in a
            directory in the run's. If there is no run there yet, or it is on
            a store, those of a hang go to a temporary file, and those of a
            crash to the standard error.
        hang_timeout_secs: seconds without progress that are too many, once
            the first loop of steps is done; 0 learns them: ten times the
            longest pause, or the time of `steps_per_loop`.
        status_file: see `status`; "" writes none.
        describe: returns the notice that came, "" if none, and whether a new
            start on this machine is pointless.
        steps_per_loop: most steps between two beats.
        start_up_secs: the limit before the first loop of steps is done, and
            the second where it is learned.
        least_secs: the least limit that is learned.
        period_secs: seconds between two looks.
    """

    def __init__(
        self,
        stacks_path: str,
        hang_timeout_secs: float,
        status_file: str = "",
        describe: Callable[[], tuple[str, bool]] = lambda: ("", False),
        *,
        steps_per_loop: int = 1,
        start_up_secs: float = START_UP_SECS,
        least_secs: float = _LEAST_SECS,
        period_secs: float = _PERIOD_SECS,
    ) -> None:
        self._stacks_path = stacks_path
        self._hang_timeout_secs = hang_timeout_secs
        self._status_file = status_file
        self._describe = describe
        self._steps_per_loop = steps_per_loop
        self._limit_secs = self._start_up_secs = start_up_secs
        self._is_patient = False
        self._least_secs = least_secs
        self._period_secs = period_secs
        self._clock = _Clock(period_secs)
        self._last_beat = 0.0
        self._has_begun = False
        # Of pauses after the first loop: the longest, and those with steps.
        self._longest = 0.0
        self._secs = 0.0
        self._num_steps = 0
        self._num_loops = 0
        self._step = -1
        self._saved_step = -1
        self._stderr = -1
        self._stacks: _Stacks | None = None
        self._faulthandler_was_on = False
        self._changed = threading.Event()
        self._telling = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(
            target=self._watch, name="dtrain-watchdog", daemon=True
        )

    @property
    def limit_secs(self) -> float:
        """Seconds without progress that are too many, as of now."""
        if self._is_patient:
            return max(self._limit_secs, self._start_up_secs)
        return self._limit_secs

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        """Allows a block as much time as a start-up."""
        self._is_patient = True
        try:
            yield
        finally:
            self._last_beat = self._clock.now()
            self._is_patient = False

    def start(self) -> None:
        """Watches from now on."""
        # While TensorFlow is imported, 2 is a file: see `startup.quiet`.
        self._stderr = os.dup(2)
        self._faulthandler_was_on = faulthandler.is_enabled()
        self._record_stacks()
        self._thread.start()

    def beat(self, step: int, saved_step: int) -> None:
        """Tells of progress; to be called wherever something got done.

        Args:
            step: the newest step done. The first call says where the run
                begins; the first loop of steps is done when there are more.
            saved_step: that of the newest save known to be whole; -1 if none.
        """
        now = self._clock.now()
        pause, self._last_beat = now - self._last_beat, now
        # After a roll-back there are fewer steps than before.
        num_steps = max(0, step - self._step) if self._has_begun else 0
        self._has_begun = True
        self._step, self._saved_step = step, saved_step
        if self._num_loops:
            self._longest = max(self._longest, pause)
            self._secs += pause if num_steps else 0.0
            self._num_steps += num_steps
        elif num_steps:
            # What is compiled later, as for a picture, may take that long.
            self._least_secs = max(self._least_secs, 2 * pause)
            # On this thread: if the disk hangs, the watching one must not.
            if self._thread.is_alive() and not self._stacks:
                self._record_stacks()
        self._num_loops += num_steps > 0
        self._limit_secs = self._limit()
        self._changed.set()

    def close(self) -> None:
        """Stops watching, and removes the file of stacks if it is empty."""
        if self._is_closed or self._stderr < 0:
            return
        self._is_closed = True
        self._changed.set()
        self._thread.join()
        self.tell()
        if self._faulthandler_was_on and sys.__stderr__:
            faulthandler.enable(sys.__stderr__)
        else:
            faulthandler.disable()
        if self._stacks:
            _close_stacks(self._stacks)
        os.close(self._stderr)

    def _limit(self) -> float:
        """Returns the limit after the loops of steps so far."""
        if self._num_loops and self._hang_timeout_secs:
            return self._hang_timeout_secs
        # The first says little of the second: it is compiled, and shorter.
        if not self._num_steps:
            return self._limit_secs
        loop = self._secs / self._num_steps * self._steps_per_loop
        longest = max(self._longest, loop)
        return max(self._least_secs, _TIMES_THE_LONGEST * longest)

    def _record_stacks(self) -> None:
        """Opens the file that a crash writes to, which needs it open."""
        self._stacks = _open_stacks(self._stacks_path)
        file = self._stacks.file if self._stacks else self._stderr
        faulthandler.enable(file, all_threads=True)

    def _watch(self) -> None:
        while not self._is_closed:
            self._clock.tick()
            self.tell()
            idle = self._clock.now() - self._last_beat
            if idle > self.limit_secs:
                self._end(idle)
            time.sleep(min(_STATUS_PAUSE_SECS, self._period_secs))
            self._changed.wait(self._period_secs)
            self._changed.clear()

    def tell(self) -> None:
        """Writes the status now, as before this process ends; any thread."""
        if not self._status_file:
            return
        notice, is_over = self._describe()
        now = status.Status(
            pid=os.getpid(),
            step=self._step,
            saved_step=self._saved_step,
            limit_secs=self.limit_secs,
            notice=notice,
            is_over=is_over,
        )
        with self._telling, contextlib.suppress(OSError):
            try:
                status.write(self._status_file, now)
            except OSError:
                # The disk is full: this sign of life needs no space.
                os.utime(self._status_file)

    def _end(self, idle: float) -> NoReturn:
        what = f"no progress for {idle:.0f} s at step {self._step}"
        frames = _main_frames()
        text = f"{what}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n\n{_dump()}"
        stacks = self._stacks or self._anywhere()
        # The disk may be what hangs.
        writer = threading.Thread(
            target=_write, args=(stacks.file, text.encode()), daemon=True
        )
        writer.start()
        writer.join(_STACKS_SECS)
        # The summary comes last: a supervisor repeats the last line.
        errors.end(
            errors.HUNG,
            f"the main thread is stuck at\n{frames}\n{what}; the stacks of all "
            f"threads are in {stacks.path}",
            self._stderr,
        )

    def _anywhere(self) -> _Stacks:
        """Makes a file for the stacks where there is no run on this disk."""
        name = f"dtrain-stacks-{os.path.basename(self._stacks_path)}-"
        try:
            file, path = tempfile.mkstemp(prefix=name, suffix=".txt")
        except OSError:
            return _Stacks("the standard error", self._stderr)
        return _Stacks(path, file)


def _write(file: int, data: bytes) -> None:
    # A full disk; the first lines are on the standard error.
    with contextlib.suppress(OSError):
        os.write(file, data)


def _dump() -> str:
    """Returns the stacks of all threads."""
    # In memory, since no thread runs while faulthandler writes.
    file = os.memfd_create("stacks")
    try:
        faulthandler.dump_traceback(file, all_threads=True)
        return os.pread(file, os.fstat(file).st_size, 0).decode()
    finally:
        os.close(file)


def _main_frames() -> str:
    """Returns the main thread's last call, and its last outside of packages."""
    ident = threading.main_thread().ident or 0
    last, *others = traceback.walk_stack(sys._current_frames().get(ident))
    # TensorFlow's calls between them say little, and are in the file.
    own = [
        call for call in others if _PACKAGES not in call[0].f_code.co_filename
    ]
    return "\n".join(
        f"  {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
        for frame, line in (last, *own[: _NUM_FRAMES - 1])
    )


def _open_stacks(stem: str) -> _Stacks | None:
    """Opens an empty file for this process alone; None if there is no run."""
    directory = os.path.dirname(stem)
    run_dir = os.path.dirname(directory)
    # A directory that is none of a run was named by mistake: it stays as it is.
    if not os.path.exists(os.path.join(run_dir, "config.json")):
        return None
    try:
        os.makedirs(directory, exist_ok=True)
        return _open_next(stem)
    except OSError:
        # The disk is full, or read-only.
        return None


def _open_next(stem: str) -> _Stacks:
    """Opens the first of the numbered files that is empty and not in use.

    A process that was killed leaves an empty one.

    Raises:
        OSError: the directory cannot be written to.
    """
    number = 0
    while True:
        number += 1
        path = f"{stem}-{number}.txt"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            locks.take(file)
        except BlockingIOError:
            os.close(file)
            continue
        known = os.fstat(file)
        # It has no name if the process that had it removed it just now.
        if known.st_size == 0 and known.st_nlink:
            return _Stacks(path, file)
        os.close(file)


def _close_stacks(stacks: _Stacks) -> None:
    """Closes the file; a clean run leaves nothing of it."""
    # If the directory holds more it stays; a file that is gone is no error.
    with contextlib.suppress(OSError):
        if os.fstat(stacks.file).st_size == 0:
            os.remove(stacks.path)
            os.rmdir(os.path.dirname(stacks.path))
    os.close(stacks.file)
