"""Keeps a run alive: starts its workers again until it is finished.

What follows a start depends on how its workers ended, and on the starts before
it (`Record.next`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from dtrain import errors
from dtrain.cluster import environment as environment_lib
from dtrain.resilience import status
from dtrain.storage import temporary
from launch.keep import cycle, spares, worker

# A crash every six hours for almost a month. If there are more, somebody should
# look, even if the run comes forward between them.
MAX_RESTARTS = 100

# A cause that passes by itself seldom lasts for three starts and the waits
# between them; any other ends all starts alike.
_MAX_WITHOUT_PROGRESS = 3

_MAX_BACKOFF_SECS = 60.0
_POLL_SECS = 0.05

# Makes the processes of one start, of the workers with these indices.
Plan = Callable[[Sequence[int]], Sequence[worker.Process]]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is kept alive.

    Attributes:
        num_workers: how many are started.
        min_workers: with how many the run may go on; 0 is all.
        max_restarts: restarts after a crash.
        grace_secs: how long workers may take to save after a notice; 0 is as
            long as they need.
        is_of_a_job: whether a scheduler started this process, on each node of
            a job, and goes by its exit code.
        fits: whether the run can be shared by so many workers.
        warm_spare: whether each worker has a spare, see `spares`; for workers
            that know what that is.
    """

    num_workers: int = 1
    min_workers: int = 0
    max_restarts: int = MAX_RESTARTS
    grace_secs: float = 0.0
    is_of_a_job: bool = False
    fits: Callable[[int], bool] = lambda num_workers: num_workers > 0
    warm_spare: bool = False


@dataclasses.dataclass(frozen=True)
class Decision:
    """What follows a start of the workers.

    Attributes:
        line: says it; empty if there is nothing to say.
        code: the exit code of the supervisor; None to start again.
        delay_secs: how long to wait before that.
        workers: indices of the workers that are started then.
    """

    line: str
    code: int | None = None
    delay_secs: float = 0.0
    workers: tuple[int, ...] = ()


class Record:
    """What the starts so far came to.

    Attributes:
        workers: indices of those that run, or run next.
        attempt: number of the start that runs, from 0.
        restarts: how many of them followed a crash.
        saved_step: the newest save that any of them left; -1 none.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._all = tuple(range(options.num_workers))
        self.workers = self._all
        self.attempt = 0
        self.restarts = 0
        self.saved_step = -1
        # The newest ever.
        self._best = -1
        # Crashes, and starts, in a row that saved nothing new.
        self._crashes = 0
        self._idle_starts = 0
        # The worker that failed first in the last of these crashes; -1 none.
        self._suspect = -1

    @property
    def may_restart(self) -> bool:
        """Whether another start follows if this one fails now."""
        return (
            self.restarts < self._options.max_restarts
            and self._crashes + 1 < _MAX_WITHOUT_PROGRESS
        )

    def next(self, result: cycle.Result) -> Decision:
        """Decides what follows a start, and takes note of how it ended.

        Args:
            result: how they ended.
        """
        end = _end(result, self._options.is_of_a_job)
        if end is not None:
            return end
        has_progress = self._note(result)
        self._idle_starts = 0 if has_progress else self._idle_starts + 1
        failure = result.first_failure
        if failure is None:
            # All were told to end, but not by this process: no crash.
            self._suspect = -1
            stopped = [
                ending
                for ending in result.endings
                if ending.code == errors.RUN_AGAIN
            ]
            cause = _why(stopped) if stopped else "all were told to end"
            return self._again(cause, self._all)
        self._crashes = 0 if has_progress else self._crashes + 1
        cause = failure.describe()
        because = f"{cause}, its last error: {failure.last_error or 'none'}"
        if self._crashes >= _MAX_WITHOUT_PROGRESS:
            return Decision(
                f"error: gave up after {self._crashes} starts in a row without "
                f"a new save: {because}",
                result.code,
            )
        if self.restarts >= self._options.max_restarts:
            return Decision(
                f"error: gave up after {self.restarts} restarts "
                f"(--max_restarts): {because}",
                result.code,
            )
        self.restarts += 1
        return self._again(cause, self._choose(failure, has_progress))

    def _note(self, result: cycle.Result) -> bool:
        """Takes note of the saves; returns whether there is a new one.

        It is newer than all before, or than what this start began with, for a
        run that diverged goes back. The state of step 0 is no progress.
        """
        restored = result.restored_step
        if self._best < 0 and restored is not None:
            # What was there before this supervisor is none of its progress.
            self._best = max(restored, 0)
        if result.saved_step >= 0:
            self.saved_step = result.saved_step
        is_best = result.saved_step > self._best
        self._best = max(self._best, result.saved_step)
        return is_best or (
            restored is not None and result.saved_step > max(restored, 0)
        )

    def _choose(
        self, failure: cycle.Ending, has_progress: bool
    ) -> tuple[int, ...]:
        """Returns the workers of the next start."""
        # When one is stuck all stand still, and any may be the first to see it.
        is_stuck = failure.code == errors.HUNG and not failure.silent_secs
        is_own = failure.code != errors.LOST_WORKER and not is_stuck
        at_fault = -1
        if is_own and not has_progress:
            at_fault = self.workers[failure.index]
        is_again = at_fault >= 0 and at_fault == self._suspect
        self._suspect = at_fault
        if not is_again:
            return self._all
        left = [index for index in self.workers if index != at_fault]
        least = self._options.min_workers or len(self._all)
        sizes = range(len(left), least - 1, -1)
        size = next(filter(self._options.fits, sizes), 0)
        return tuple(left[:size]) or self._all

    def _again(self, cause: str, workers: tuple[int, ...]) -> Decision:
        delay_secs = 0.0
        if self._idle_starts:
            # 2.0 to the power of thousands overflows.
            power = min(self._idle_starts - 1, 16)
            delay_secs = min(2.0**power, _MAX_BACKOFF_SECS)
        self.attempt += 1
        where = (
            f"goes on from step {self.saved_step:,}"
            if self.saved_step >= 0
            else "goes on from what is saved"
        )
        line = (
            f"{cause}; start {self.attempt + 1} {where} in {delay_secs:.0f} s"
        )
        if workers != self.workers:
            line += _with_whom(self._all, workers)
        self.workers = workers
        return Decision(line, None, delay_secs, workers)


def _end(result: cycle.Result, is_of_a_job: bool) -> Decision | None:
    """Returns the decision to end, where the results alone make it."""
    codes = {ending.code for ending in result.endings}
    if codes == {errors.FINISHED}:
        return Decision("", errors.FINISHED)
    if errors.USER_ERROR in codes:
        return Decision("", errors.USER_ERROR)
    failure = result.first_failure
    if result.notice:
        return Decision(_after_a_notice(result), errors.RUN_AGAIN)
    over = [
        ending
        for ending in result.endings
        if ending.status and ending.status.is_over
    ]
    if over and (failure is None or failure.code == errors.LOST_WORKER):
        line = f"{_why(over)}; it is not started again here"
        return Decision(line, errors.RUN_AGAIN)
    is_alone = is_of_a_job and result.restored_step is None
    if is_alone and failure and failure.code == errors.LOST_WORKER:
        line = f"{failure.last_error}; another allocation may have all nodes"
        return Decision(line, errors.LOST_WORKER)
    return None


def _after_a_notice(result: cycle.Result) -> str:
    """Says how the workers ended, unless they have said it themselves."""
    failure = result.first_failure
    if failure:
        return (
            f"{failure.describe()} while all were to save, its last error: "
            f"{failure.last_error or 'none'}"
        )
    told = f"stopped by {result.notice}"
    codes = {ending.code for ending in result.endings if ending.taken_down}
    if codes - {-signal.SIGTERM}:
        return (
            f"{told} and ended before all had saved; the same command goes on "
            "from the save before"
        )
    if all(ending.taken_down for ending in result.endings):
        # They were still being imported.
        return (
            f"{told} before the first steps were done: nothing to save; run "
            "the same command again"
        )
    return ""


def _why(stopped: Iterable[cycle.Ending]) -> str:
    """Describes the first that was told to end, and not by the others."""

    def knows_no_more(ending: cycle.Ending) -> bool:
        last = ending.status
        return bool(last and last.notice == status.ANOTHERS_NOTICE)

    return min(stopped, key=knows_no_more).describe()


def _with_whom(everyone: Iterable[int], workers: Sequence[int]) -> str:
    missing = [str(index) for index in everyone if index not in workers]
    if not missing:
        return ", again with all workers"
    plural = "s" if len(missing) > 1 else ""
    return (
        f", with {len(workers)} and without worker{plural} "
        f"{', '.join(missing)}: it failed twice in a row"
    )


def run(options: Options, plan: Plan) -> int:
    """Starts the workers until the run is finished; returns the exit code.

    A signal (see `signals.heard`) lets all workers save and end; a second one
    ends them at once.

    Args:
        options: how the run is kept alive.
        plan: makes the processes of a start.
    """
    record = Record(options)
    with (
        cycle.Notices() as notices,
        # In memory: a worker that cannot tell its status is taken for stuck.
        temporary.in_memory("status") as directory,
        spares.Spares(is_on=options.warm_spare) as kept,
    ):
        while True:
            leave_secs = (
                cycle.LEAVE_SECS
                if record.may_restart
                else cycle.LAST_LEAVE_SECS
            )
            result = cycle.run(
                _equip(plan(record.workers), record.attempt, directory),
                notices,
                options.grace_secs,
                leave_secs,
                kept,
            )
            decision = record.next(result)
            _say(decision.line)
            if decision.code is not None:
                return decision.code
            if _wait(decision.delay_secs, notices):
                return errors.RUN_AGAIN


def _equip(
    processes: Iterable[worker.Process], attempt: int, directory: str
) -> list[worker.Process]:
    """Tells each process who its supervisor is and where to tell its status."""
    equipped = []
    started = list(processes)
    # One of several nodes shares what the scheduler tells all of them.
    shared = (
        {environment_lib.SECRET: secrets.token_hex(16)}
        if len(started) > 1
        else {}
    )
    for number, process in enumerate(started):
        path = os.path.join(directory, f"worker-{number}.json")
        # Of the start before this one.
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        environment = {
            **process.environment,
            **shared,
            worker.ATTEMPT: str(attempt),
            worker.STATUS_FILE: path,
            worker.SUPERVISOR_PID: str(os.getpid()),
        }
        equipped.append(dataclasses.replace(process, environment=environment))
    return equipped


def _wait(delay_secs: float, notices: cycle.Notices) -> bool:
    """Waits; returns whether a notice came, which ends the wait."""
    end = time.monotonic() + delay_secs
    while not notices.first and time.monotonic() < end:
        time.sleep(_POLL_SECS)
    if notices.first:
        _say(f"stopped by {notices.first}; nothing runs")
    return bool(notices.first)


def _say(line: str) -> None:
    if line:
        print(line, file=sys.stderr)
