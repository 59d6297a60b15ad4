"""One start of the workers of this machine, until the last of them has ended.

A run cannot go on without one of its workers, nor take one in: when one is
lost all end, and all are started again.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Sequence

from dtrain import errors
from dtrain.resilience import signals, status
from launch.keep import spares as spares_lib
from launch.keep import worker

_POLL_SECS = 0.05

# How long the workers may take to end when one has failed. One whose collective
# has failed says so and ends within a tenth of a second, or never does, for it
# is stuck. It may be killed: a save is whole or not there, and the next start
# waits for all.
LEAVE_SECS = 0.5
# The same if no start follows: then their last lines are worth the wait.
LAST_LEAVE_SECS = 20.0

# A worker tells its supervisor nothing before Python has read its code, which
# takes minutes from a slow network disk.
START_SECS = 600.0

# When a worker ends with 75, all should. The others are told after this time if
# they do not know: a notice before all workers have met reaches no other.
_TELL_SECS = 1.0

# Two signals within this time are one notice: schedulers signal a process and
# its group.
_SAME_NOTICE_SECS = 2.0

# For the worker's stacks to be written after SIGABRT.
_STACKS_SECS = 2.0

# If more is between two looks, this process was stopped, and the workers, too.
_PAUSE_SECS = 5.0


class Notices:
    """What told the supervisor to end.

    Attributes:
        first: name of the signal; empty before one has come.
        is_second: whether another one came, which ends the workers at once.
    """

    def __init__(self) -> None:
        self.first = ""
        self.is_second = False
        self._came_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Notices:
        for number in signals.heard():
            self._previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            number, previous = self._previous.popitem()
            signal.signal(number, previous)  # type: ignore[arg-type]

    def handle(self, number: int, frame: types.FrameType | None = None) -> None:
        """Takes a signal; a handler of `signal.signal`.

        Args:
            number: of the signal.
            frame: not looked at.
        """
        del frame
        name = signal.Signals(number).name
        now = time.monotonic()
        if not self.first:
            self.first, self._came_at = name, now
        else:
            # A person's finger is never one notice twice.
            is_finger = name == self.first == "SIGINT"
            is_later = now - self._came_at >= _SAME_NOTICE_SECS
            self.is_second = self.is_second or is_finger or is_later


@dataclasses.dataclass(frozen=True)
class Ending:
    """How one worker ended.

    Attributes:
        name: of the worker.
        index: of its process among those of this start.
        code: exit code, negative for a signal; `errors.HUNG` for one that gave
            no sign of life.
        taken_down: whether it was ended because another one had failed, or by
            a notice: its code tells nothing.
        status: the last that it told; None if it told nothing.
        last_error: the last of its lines that looks like an error.
        silent_secs: how long it gave no sign of life; 0 if it did.
    """

    name: str
    index: int
    code: int
    taken_down: bool = False
    status: status.Status | None = None
    last_error: str = ""
    silent_secs: float = 0.0

    def describe(self) -> str:
        """Says what happened, as in `worker 1 was killed by SIGKILL`."""
        if self.silent_secs:
            event = f"gave no sign of life for {self.silent_secs:.0f} s"
        elif self.code < 0:
            event = f"was killed by {_signal_name(-self.code)}"
        elif self.code == errors.HUNG:
            event = f"made no progress and exited with {self.code}"
        elif self.code == errors.RUN_AGAIN:
            notice = self.status.notice if self.status else ""
            event = f"was told to end by {notice or 'a notice'}"
        else:
            event = f"exited with {self.code}"
        return f"{self.name} {event}"


@dataclasses.dataclass(frozen=True)
class Result:
    """How one start of all workers ended.

    Attributes:
        endings: in the order in which the workers ended.
        notice: what told the supervisor to end; empty if nothing.
        restored_step: the newest save that the workers found; -1 none. None if
            they did not come as far as to look.
        saved_step: the newest that they left; -1 if it is not known.
    """

    endings: tuple[Ending, ...]
    notice: str = ""
    restored_step: int | None = None
    saved_step: int = -1

    @property
    def first_failure(self) -> Ending | None:
        """The worker that took the others with it; None if none failed."""
        failed = [ending for ending in self.endings if _is_failure(ending)]
        own = [ending for ending in failed if ending.code != errors.LOST_WORKER]
        return (own or failed or [None])[0]

    @property
    def code(self) -> int:
        """One exit code for all, see `errors.combine`."""
        codes = [
            ending.code for ending in self.endings if not ending.taken_down
        ]
        # All were ended by a notice that came twice.
        return errors.combine(codes) if codes else errors.RUN_AGAIN


def _is_failure(ending: Ending) -> bool:
    left = ending.code in (errors.FINISHED, errors.RUN_AGAIN)
    return not left and not ending.taken_down


class _Member:
    """A worker of this start, and what is known of it."""

    def __init__(
        self,
        index: int,
        process: worker.Process,
        child: subprocess.Popen[bytes] | None,
    ) -> None:
        self._index = index
        self.process = process
        self.status_path = process.environment.get(worker.STATUS_FILE, "")
        self.worker = worker.Worker(process, child)
        self.ending: Ending | None = None
        self.status: status.Status | None = None
        self.is_told = False
        self.is_taken_down = False
        self.restored_step: int | None = None
        # The step that it began with, and when it had made another.
        self._first_step: int | None = None
        self.stepped_at = math.inf
        self.silent_secs = 0.0
        self.kill_at = math.inf
        self._seen_at = time.monotonic()
        self._version: tuple[int, int] | None = None

    def look(self, now: float) -> None:
        """Reads what the worker tells, and whether it has ended."""
        # In this order: what it told last is there when it has ended.
        code = self.worker.code
        self._read(now)
        if code is None:
            return
        # What it has started would hold its devices and its ports.
        self.worker.kill()
        self.worker.close()
        # Before it has a handler, the signal itself ends it.
        by_notice = self.is_told and code == -signal.SIGTERM
        self.ending = Ending(
            name=self.worker.name,
            index=self._index,
            code=errors.HUNG if self.silent_secs else code,
            taken_down=by_notice or self.is_taken_down,
            status=self.status,
            last_error=self.worker.last_error(),
            silent_secs=self.silent_secs,
        )

    def _read(self, now: float) -> None:
        if not self.status_path:
            return
        try:
            written = os.stat(self.status_path)
        except FileNotFoundError:
            if self._version:
                # The worker did not remove it: something tidied up the disk.
                self.pardon(now)
            return
        # That it changes counts, not its time: the clock may be set.
        version = (written.st_mtime_ns, written.st_ino)
        if version != self._version:
            self._version, self._seen_at = version, now
            self.status = status.read(self.status_path) or self.status
            newest = self.status
            if newest and newest.step >= 0:
                if self._first_step is None:
                    self._first_step = newest.step
                    self.restored_step = newest.saved_step
                elif newest.step != self._first_step:
                    self.stepped_at = min(self.stepped_at, now)

    def pardon(self, now: float) -> None:
        """Begins to wait for a sign of life anew."""
        self._seen_at = now

    def silence(self, now: float) -> float:
        """Returns for how long it has been silent, if that is too long."""
        if not self.status_path:
            return 0.0
        limit = self.status.limit_secs if self.status else START_SECS
        secs = now - self._seen_at
        return secs if secs > limit else 0.0

    def tell(self) -> None:
        """Tells it, once, to save and end."""
        if not self.is_told:
            self.is_told = True
            self.worker.signal(signal.SIGTERM)

    def take_down(self) -> None:
        """Ends it at once."""
        self.is_taken_down = not self.silent_secs
        self.worker.kill()

    def abort(self, now: float, secs: float) -> None:
        """Ends one that is silent, with its stacks if it can write them."""
        self.silent_secs = secs
        self.kill_at = now + _STACKS_SECS
        self.worker.signal(signal.SIGABRT)
        # If it is stopped, it sees the signal when it goes on.
        self.worker.signal(signal.SIGCONT)


def run(
    processes: Sequence[worker.Process],
    notices: Notices,
    grace_secs: float = 0.0,
    leave_secs: float = LAST_LEAVE_SECS,
    spares: spares_lib.Spares | None = None,
) -> Result:
    """Starts the workers and waits for all; returns how they ended.

    The first notice is handed on as SIGTERM, the second one kills. When a
    worker fails, the others have `leave_secs` to see it and end.

    Args:
        processes: the workers; see `worker.plan`.
        notices: what tells this process to end.
        grace_secs: how long they may take to save after a notice; 0 is as
            long as they need.
        leave_secs: how long they may take to end when one has failed.
        spares: take the place of those that they are of, and each worker that
            runs gets one; None keeps none.
    """
    spares = spares or spares_lib.Spares(is_on=False)
    cycle = _Cycle(notices, grace_secs, leave_secs, spares)
    try:
        for index, process in enumerate(processes):
            child = spares.take(process)
            cycle.running.append(_Member(index, process, child))
        while cycle.running:
            cycle.look(time.monotonic())
            time.sleep(_POLL_SECS)
    finally:
        for member in cycle.running:
            member.take_down()
    return cycle.result()


class _Cycle:
    """The workers of one start, and the rules by which they are ended."""

    def __init__(
        self,
        notices: Notices,
        grace_secs: float,
        leave_secs: float,
        spares: spares_lib.Spares,
    ) -> None:
        self._notices = notices
        self._spares = spares
        self._grace_secs = grace_secs
        self._leave_secs = leave_secs
        self._looked_at = time.monotonic()
        self._ended: list[_Member] = []
        # When the first failed, ended with 75, and when all were told.
        self._failed_at = self._saved_at = self._told_at = math.inf
        self.running: list[_Member] = []

    def result(self) -> Result:
        """Returns how the workers ended."""
        statuses = [member.status for member in self._ended if member.status]
        # Only the chief may know of saves that the chief alone makes.
        restored = [
            member.restored_step
            for member in self._ended
            if member.restored_step is not None
        ]
        return Result(
            tuple(member.ending for member in self._ended if member.ending),
            self._notices.first,
            max(restored, default=None),
            max([status.saved_step for status in statuses], default=-1),
        )

    def look(self, now: float) -> None:
        """Looks at all workers and does what is due."""
        if now - self._looked_at > _PAUSE_SECS:
            for member in self.running:
                member.pardon(now)
        self._looked_at = now
        self._see(now)
        self._tell(now)
        self._end(now)
        self._find_silent(now)
        if not self._ended and not self._notices.first:
            for member in self.running:
                self._spares.keep(member.process, now - member.stepped_at)

    def _see(self, now: float) -> None:
        for member in self.running[:]:
            member.look(now)
            if member.ending is None:
                continue
            self.running.remove(member)
            self._ended.append(member)
            if _is_failure(member.ending):
                self._failed_at = min(self._failed_at, now)
            elif member.ending.code != errors.FINISHED:
                self._saved_at = min(self._saved_at, now)

    def _tell(self, now: float) -> None:
        is_last = self._leave_secs >= LAST_LEAVE_SECS
        all_must_know = self._notices.first or (
            is_last and self._failed_at < math.inf
        )
        if not all_must_know and now < self._saved_at + _TELL_SECS:
            return
        self._told_at = min(self._told_at, now)
        for member in self.running:
            # A second notice would end it unsaved.
            if all_must_know or not (member.status and member.status.notice):
                member.tell()

    def _end(self, now: float) -> None:
        leave_secs = self._leave_secs
        if self._notices.first:
            # No start follows, and a save may still be written.
            leave_secs = max(leave_secs, LAST_LEAVE_SECS)
        is_late = now > self._failed_at + leave_secs or (
            self._grace_secs > 0 and now > self._told_at + self._grace_secs
        )
        for member in self.running:
            if is_late or self._notices.is_second or now > member.kill_at:
                member.take_down()

    def _find_silent(self, now: float) -> None:
        for member in self.running:
            secs = member.silence(now)
            if secs and not member.silent_secs and not member.is_taken_down:
                print(
                    f"{member.worker.name} gives no sign of life for "
                    f"{secs:.0f} s: it is stopped, or stuck where Python "
                    "cannot run; it is ended",
                    file=sys.stderr,
                )
                member.abort(now, secs)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
