"""Accounts for all wall time of a run, from the ledgers of its attempts.

A document of `ledger` tells of one attempt: when it began, the seconds that it
spent on each kind of thing, and how far it was when. Put on one time line they
tell which steps were done for good and which were done again.

Nothing here reads a file or imports TensorFlow.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

SCHEMA = 1

# What an attempt spends its time on; see docs/goodput.md.
KINDS = ("start", "restore", "compile", "train", "save", "draw", "other")


class DamagedError(ValueError):
    """A document is not what `ledger` wrote; the text is the reason."""


class FutureError(ValueError):
    """A newer version wrote a document; the text says which."""


class Point(NamedTuple):
    """How far an attempt was.

    Attributes:
        secs: since the attempt began.
        step: the steps of the run that were done.
        train_secs: of `secs`, those spent on training.
    """

    secs: float
    step: int
    train_secs: float


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What is known of one attempt.

    Attributes:
        started: when its process began, in seconds since 1970.
        boot_id: of the machine since it was switched on; "" if unknown.
        boot_started: when its process began, in seconds since then.
        host: name of the machine.
        pid: of the process.
        num_workers: of the run.
        num_replicas: of all workers.
        batch_size: images of a step.
        attempt: which start of its supervisor it was.
        num_saves: how often it saved.
        seconds: by kind; together they are the whole attempt, up to when
            this was written.
        points: in the order of time. The first is where it began; one with
            fewer steps than that before it is where it went back.
        exit_code: of the process; None if no end was written.
        notice: what told it to end; "" if nothing did.
    """

    started: float
    boot_id: str
    boot_started: float
    host: str
    pid: int
    num_workers: int
    num_replicas: int
    batch_size: int
    attempt: int
    num_saves: int
    seconds: Mapping[str, float]
    points: Sequence[Point]
    exit_code: int | None
    notice: str

    @property
    def secs(self) -> float:
        """Returns how long it is known to have lasted."""
        return sum(self.seconds.values())


def dumps(attempt: Attempt) -> bytes:
    """Writes an attempt as JSON, in at most 40 kB for 1,000 points."""
    body = {"schema": SCHEMA, **vars(attempt)}
    body["points"] = [
        [round(secs, 3), step, round(train_secs, 3)]
        for secs, step, train_secs in attempt.points
    ]
    return (json.dumps(body, separators=(",", ":")) + "\n").encode()


def loads(data: bytes) -> Attempt:
    """Reads what `dumps` wrote.

    Args:
        data: the whole text.

    Returns:
        The attempt.

    Raises:
        DamagedError: it is something else.
        FutureError: a newer version wrote it.
    """
    try:
        body: dict[str, Any] = json.loads(data)
        schema = body.pop("schema")
        if schema > SCHEMA:
            raise FutureError(
                f"it is of schema {schema}, and {SCHEMA} is known"
            )
        points = [
            Point(float(secs), int(step), float(train_secs))
            for secs, step, train_secs in body.pop("points")
        ]
        attempt = Attempt(points=points, **body)
    except FutureError:
        raise
    except (
        *(ValueError, TypeError, KeyError, AttributeError),
        # Of a step such as 1e999, and of brackets in brackets without end.
        *(OverflowError, RecursionError),
    ) as error:
        raise DamagedError("it is not what was written") from error
    if not _is_sound(attempt):
        raise DamagedError("its numbers make no sense")
    return attempt


def _is_sound(attempt: Attempt) -> bool:
    code = attempt.exit_code
    try:
        numbers = [
            *(attempt.started, attempt.boot_started, attempt.batch_size),
            *(0 if code is None else code, attempt.num_saves, attempt.pid),
            *(attempt.num_workers, attempt.num_replicas, attempt.attempt),
        ]
        seconds = [attempt.seconds[kind] for kind in KINDS]
        later = itertools.pairwise([Point(0.0, 0, 0.0), *attempt.points])
        return (
            all(math.isfinite(number) for number in numbers)
            and len(seconds) == len(attempt.seconds)
            and all(0 <= each < math.inf for each in seconds)
            and all(
                a.secs <= b.secs < math.inf
                and a.train_secs <= b.train_secs < math.inf
                and b.step >= 0
                for a, b in later
            )
            # The points are rounded.
            and all(
                point.train_secs <= attempt.seconds["train"] + 0.001
                for point in attempt.points[-1:]
            )
            and isinstance(attempt.notice, str)
            and isinstance(attempt.boot_id, str)
        )
    except (TypeError, KeyError, AttributeError):
        return False


class Stretch(NamedTuple):
    """Steps in a row, of an attempt that did not go back meanwhile.

    Attributes:
        points: on the time line of the run; two at least, unless nothing was
            done.
        bound: the steps above it were done again, later.
        train_secs: from the first to the last point.
        useful_secs: of these, those whose steps were not done again.
    """

    points: Sequence[Point]
    bound: float
    train_secs: float
    useful_secs: float

    def secs_at(self, step: float) -> float:
        """Returns when, on the time line, it was at a step."""
        return _interpolate(self.points, step).secs


class Placed(NamedTuple):
    """An attempt on the time line, whose zero is the first one's start.

    Attributes:
        attempt: what is known of it.
        start: seconds since the run began.
        end: likewise, of when the last was written.
        seconds: by kind, together `end - start`.
        stretches: of its steps.
        unwritten_steps: steps that were done after the last was written, and
            that the next attempt went on from.
        unwritten_secs: about how long they took.
    """

    attempt: Attempt
    start: float
    end: float
    seconds: Mapping[str, float]
    stretches: Sequence[Stretch]
    unwritten_steps: int
    unwritten_secs: float


class Account(NamedTuple):
    """Where all wall time of a run went.

    Attributes:
        placed: the attempts, in the order of time.
        seconds: by kind, with `useful` and `redone` in the place of `train`,
            and `idle`; together they are `wall_secs`.
        wall_secs: from the first start to the last end.
        num_steps: that were done for good.
        num_redone: that were done, and done again.
    """

    placed: Sequence[Placed]
    seconds: Mapping[str, float]
    wall_secs: float
    num_steps: int
    num_redone: int

    @property
    def goodput(self) -> float:
        """Returns the share of all time that went into useful steps."""
        return self.seconds["useful"] / max(self.wall_secs, 1e-9)

    @property
    def num_images(self) -> int:
        """Returns the images of the useful steps."""
        return self.num_steps * self.placed[-1].attempt.batch_size


def account(attempts: Iterable[Attempt]) -> Account:
    """Puts attempts on one time line, and adds up.

    Args:
        attempts: one at least, in any order.

    Returns:
        Where their time went.
    """
    placed = _judge(_place(attempts))
    kinds = ("useful", "redone", *KINDS, "idle")
    seconds: dict[str, float] = dict.fromkeys(kinds, 0.0)
    num_steps = num_redone = 0
    for each, after in itertools.zip_longest(placed, placed[1:]):
        for kind in KINDS:
            seconds[kind] += each.seconds[kind]
        idle = after.start - each.end if after else 0.0
        seconds["idle"] += idle - each.unwritten_secs
        useful = sum(stretch.useful_secs for stretch in each.stretches)
        # The points are of whole milliseconds.
        useful = min(useful, each.seconds["train"])
        seconds["useful"] += useful + each.unwritten_secs
        seconds["redone"] += each.seconds["train"] - useful
        num_steps += each.unwritten_steps
        for stretch in each.stretches:
            first, last = stretch.points[0].step, stretch.points[-1].step
            done = int(max(0, min(last, stretch.bound) - first))
            num_steps += done
            num_redone += last - first - done
    del seconds["train"]
    return Account(placed, seconds, placed[-1].end, num_steps, num_redone)


def _place(attempts: Iterable[Attempt]) -> list[Placed]:
    """Puts attempts on a time line, one after the other.

    Those of one boot of a machine are placed by its clock that nobody sets;
    others can only be placed by the wall clock.
    """
    attempts = list(attempts)
    boots: dict[str, list[float]] = {}
    for each in attempts:
        if each.boot_id:
            booted = each.started - each.boot_started
            boots.setdefault(each.boot_id, []).append(booted)
    booted = {name: statistics.median_low(all_) for name, all_ in boots.items()}

    def start_of(each: Attempt) -> float:
        known = booted.get(each.boot_id)
        return each.started if known is None else known + each.boot_started

    attempts.sort(key=start_of)
    zero = start_of(attempts[0])
    placed: list[Placed] = []
    for each in attempts:
        start = start_of(each) - zero
        seconds = dict(each.seconds)
        late = placed[-1].end - start if placed else 0.0
        if late > 0:
            # It waited for the one before it to end, or the clocks of two
            # machines differ: no second is counted twice.
            cut = min(late, seconds["start"])
            seconds["start"] -= cut
            start = placed[-1].end
        end = start + sum(seconds.values())
        placed.append(Placed(each, start, end, seconds, (), 0, 0.0))
    return placed


def _judge(placed: Sequence[Placed]) -> list[Placed]:
    """Tells the useful steps from those that were done again."""
    judged: list[Placed] = []
    bound = math.inf
    steps, secs = 0, 0.0
    for each in placed:
        points = each.attempt.points
        for a, b in itertools.pairwise(points):
            if b.step > a.step:
                steps += b.step - a.step
                secs += b.train_secs - a.train_secs
    secs_per_step = secs / max(steps, 1)
    after: Placed | None = None
    for each in reversed(placed):
        stretches: list[Stretch] = []
        unwritten, unwritten_secs = 0, 0.0
        for points in reversed(_split(each)):
            if not stretches and after and bound < math.inf:
                unwritten = max(0, int(bound) - points[-1].step)
                gap = max(0.0, after.start - each.end)
                unwritten_secs = min(gap, unwritten * secs_per_step)
            stretches.insert(0, _stretch(points, bound))
            bound = min(bound, points[0].step)
        each = each._replace(
            stretches=stretches,
            unwritten_steps=unwritten,
            unwritten_secs=unwritten_secs,
        )
        judged.insert(0, each)
        after = each
    return judged


def _split(placed: Placed) -> list[list[Point]]:
    """Splits the points of an attempt where it went back."""
    shift = placed.end - placed.attempt.secs
    stretches: list[list[Point]] = []
    for point in placed.attempt.points:
        moved = point._replace(secs=max(placed.start, point.secs + shift))
        if not stretches or point.step < stretches[-1][-1].step:
            stretches.append([])
        stretches[-1].append(moved)
    return stretches


def _stretch(points: Sequence[Point], bound: float) -> Stretch:
    first, last = points[0], points[-1]
    useful = _interpolate(points, bound).train_secs - first.train_secs
    return Stretch(points, bound, last.train_secs - first.train_secs, useful)


def _interpolate(points: Sequence[Point], step: float) -> Point:
    """Returns where a stretch was at a step, which may be a fraction."""
    if step <= points[0].step:
        return points[0]
    for a, b in itertools.pairwise(points):
        if step <= b.step:
            part = (step - a.step) / max(b.step - a.step, 1)
            return Point(
                a.secs + part * (b.secs - a.secs),
                int(step),
                a.train_secs + part * (b.train_secs - a.train_secs),
            )
    return points[-1]


def allowed(
    account: Account, num_faults: int, interval_secs: float = 0.0
) -> float:
    """Returns the goodput that the costs of a run allow for its faults.

    The first start has its cost. A fault costs a restart and, on average, half
    of what lies between two saves; a save costs what it keeps the training
    waiting. What it took to see a hang is idle time, and so in the restarts.

    Args:
        account: of the run.
        num_faults: that it suffered.
        interval_secs: between two saves; 0 takes the mean of the run.

    Returns:
        A share of the wall time; 0 if the costs are higher than that.
    """
    seconds = account.seconds
    num_saves = sum(each.attempt.num_saves for each in account.placed)
    save_secs = seconds["save"] / max(num_saves, 1)
    busy = seconds["useful"] + seconds["redone"] + seconds["save"]
    interval = interval_secs or busy / max(num_saves, 1)
    restart = restart_secs(account)
    wall = max(account.wall_secs, 1e-9)
    lost_secs = restart + (restart + interval / 2) * num_faults
    return max(0.0, 1 - save_secs / max(interval, 1e-9) - lost_secs / wall)


def restart_secs(account: Account) -> float:
    """Returns the mean seconds from an end to the next useful step."""
    kinds = ("start", "restore", "compile", "idle")
    total = sum(account.seconds[kind] for kind in kinds)
    return total / len(account.placed)
