"""Accounts for all wall time of a run, from the ledgers of its attempts.

A document of `ledger` is of one attempt: when it began, how many seconds it
spent on each kind of work, and at which step it was when. Put on one time line,
the attempts show which steps were done for good and which were done again.

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

from dtrain import errors

# 2 has the kind `evaluate`.
SCHEMA = 2
# Neither seconds nor a count are more: what is added up stays finite.
_MOST = 1e15

# What an attempt spends its time on; see docs/goodput.md.
KINDS = (
    *("start", "restore", "compile", "train", "save", "draw", "evaluate"),
    "other",
)

# What each kind of time is called for a person, in this order.
LABELS = {
    "useful": "useful steps",
    "redone": "steps redone",
    "save": "save stalls",
    "draw": "pictures",
    "evaluate": "evaluations",
    "restore": "restore",
    "start": "start-up",
    "compile": "compile",
    "other": "other",
    "idle": "idle",
}

_ENDINGS = {
    **{code: f"{words} ({code})" for code, words, *_ in errors.EXITS},
    None: "no end written (killed, or still running)",
    errors.FINISHED: "finished",
}


class DamagedError(ValueError):
    """A document is not what `ledger` wrote; the text is the reason."""


class FutureError(ValueError):
    """A newer version wrote a document; the text says which."""


class Point(NamedTuple):
    """How far an attempt was at a time.

    Attributes:
        secs: since the attempt began; in a `Stretch` since the run began.
        step: the steps of the run that were done.
        train_secs: how many of the attempt's seconds it had spent on training.
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
        attempt: the number that its supervisor gave to its start; 0 without.
        num_saves: how often it saved.
        seconds: by kind, of `KINDS`; their sum is how long the attempt was
            known to last when this was written.
        points: in the order of time. The first is where it began; one with
            fewer steps than the one before it is where it went back.
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


def ending(attempt: Attempt) -> str:
    """Says how an attempt ended, and what told it to."""
    code = attempt.exit_code
    words = _ENDINGS.get(code, f"crashed ({code})")
    return f"{words}: {attempt.notice}" if attempt.notice else words


def clock(secs: float) -> str:
    """Writes seconds as h:mm:ss."""
    whole = round(secs)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


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
        data: the whole document.

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
        if schema < 2:
            body["seconds"] = {"evaluate": 0.0, **body["seconds"]}
        attempt = Attempt(points=points, **body)
    except FutureError:
        raise
    except (
        *(ValueError, TypeError, KeyError, AttributeError),
        # A step such as 1e999 raises the one, very many brackets the other.
        *(OverflowError, RecursionError),
    ) as error:
        raise DamagedError("it is not what was written") from error
    if not _is_sound(attempt):
        raise DamagedError("its numbers make no sense")
    return attempt


def _is_sound(attempt: Attempt) -> bool:
    code = attempt.exit_code
    counts = [
        *(0 if code is None else code, attempt.num_saves, attempt.pid),
        *(attempt.num_workers, attempt.num_replicas, attempt.attempt),
        attempt.batch_size,
    ]
    texts = [attempt.notice, attempt.boot_id, attempt.host]
    if not all(type(count) is int for count in counts):
        return False
    if not all(isinstance(text, str) for text in texts):
        return False
    try:
        numbers = [attempt.started, attempt.boot_started, *counts]
        seconds = [attempt.seconds[kind] for kind in KINDS]
        pairs = itertools.pairwise([Point(0.0, 0, 0.0), *attempt.points])
        return (
            all(abs(number) <= _MOST for number in numbers)
            and len(seconds) == len(attempt.seconds)
            and all(0 <= secs <= _MOST for secs in seconds)
            and all(
                a.secs <= b.secs <= _MOST
                and a.train_secs <= b.train_secs <= _MOST
                and 0 <= b.step <= _MOST
                for a, b in pairs
            )
            # The points are rounded.
            and all(
                point.train_secs <= attempt.seconds["train"] + 0.001
                for point in attempt.points[-1:]
            )
        )
    except (TypeError, KeyError, AttributeError, OverflowError):
        return False


class Stretch(NamedTuple):
    """Steps in a row, of an attempt that did not go back meanwhile.

    Attributes:
        points: on the time line of the run; at least two, if a step was done.
        bound: steps above this one were done again later; inf if none were.
        useful_secs: of training whose steps were not done again.
    """

    points: Sequence[Point]
    bound: float
    useful_secs: float

    def secs_at(self, step: float) -> float:
        """Returns when, on the time line, it was at a step."""
        return _interpolate(self.points, step).secs


class Placed(NamedTuple):
    """An attempt on the time line, whose zero is the first one's start.

    Attributes:
        attempt: what is known of it.
        start: seconds since the run began.
        end: likewise; when its document was written last.
        seconds: by kind; their sum is `end - start`.
        stretches: its steps, in the order of time.
        unwritten_steps: steps that it did after its document was written last,
            known from where the next attempt went on.
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
        num_steps: steps that were done for good.
        num_redone: steps that were done, and done again later.
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

    def labelled(self) -> list[tuple[str, float]]:
        """Returns what each kind of time is called, and its seconds."""
        return [(label, self.seconds[kind]) for kind, label in LABELS.items()]

    @property
    def num_images(self) -> int:
        """Returns the images of the useful steps."""
        return self.num_steps * self.placed[-1].attempt.batch_size


def account(attempts: Iterable[Attempt]) -> Account:
    """Puts attempts on one time line, and adds up where their time went.

    Args:
        attempts: at least one, in any order.
    """
    placed = _judge(_place(attempts))
    kinds = ("useful", "redone", *KINDS, "idle")
    seconds: dict[str, float] = dict.fromkeys(kinds, 0.0)
    num_steps = num_redone = 0
    for this, after in itertools.zip_longest(placed, placed[1:]):
        for kind in KINDS:
            seconds[kind] += this.seconds[kind]
        idle = after.start - this.end if after else 0.0
        seconds["idle"] += idle - this.unwritten_secs
        useful = sum(stretch.useful_secs for stretch in this.stretches)
        # The points, in whole milliseconds, may add up to a little more.
        useful = min(useful, this.seconds["train"])
        seconds["useful"] += useful + this.unwritten_secs
        seconds["redone"] += this.seconds["train"] - useful
        num_steps += this.unwritten_steps
        for stretch in this.stretches:
            first, last = stretch.points[0].step, stretch.points[-1].step
            done = int(max(0, min(last, stretch.bound) - first))
            num_steps += done
            num_redone += last - first - done
    del seconds["train"]
    return Account(placed, seconds, placed[-1].end, num_steps, num_redone)


def _place(attempts: Iterable[Attempt]) -> list[Placed]:
    """Puts attempts on a time line, one after the other.

    Attempts between two boots of a machine are placed by its clock that nobody
    sets; others can only be placed by the wall clock.
    """
    attempts = list(attempts)
    guesses: dict[str, list[float]] = {}
    for attempt in attempts:
        if attempt.boot_id:
            booted = attempt.started - attempt.boot_started
            guesses.setdefault(attempt.boot_id, []).append(booted)
    boots = {name: statistics.median_low(g) for name, g in guesses.items()}

    def start_of(attempt: Attempt) -> float:
        booted = boots.get(attempt.boot_id)
        if booted is None:
            return attempt.started
        return booted + attempt.boot_started

    attempts.sort(key=start_of)
    zero = start_of(attempts[0])
    placed: list[Placed] = []
    for attempt in attempts:
        start = start_of(attempt) - zero
        seconds = dict(attempt.seconds)
        late = placed[-1].end - start if placed else 0.0
        if late > 0:
            # It waited for the one before it to end, or the clocks of two
            # machines differ; no second may count twice.
            cut = min(late, seconds["start"])
            seconds["start"] -= cut
            start = placed[-1].end
        end = start + sum(seconds.values())
        placed.append(Placed(attempt, start, end, seconds, (), 0, 0.0))
    return placed


def _judge(placed: Sequence[Placed]) -> list[Placed]:
    """Tells the useful steps from those that were done again."""
    ahead = [
        (b.step - a.step, b.train_secs - a.train_secs)
        for this in placed
        for a, b in itertools.pairwise(this.attempt.points)
        if b.step > a.step
    ]
    num_steps = sum(steps for steps, _ in ahead)
    secs_per_step = sum(secs for _, secs in ahead) / max(num_steps, 1)
    judged: list[Placed] = []
    bound = math.inf
    for this in reversed(placed):
        stretches: list[Stretch] = []
        unwritten, unwritten_secs = 0, 0.0
        for points in reversed(_split(this)):
            if not stretches and judged and bound < math.inf:
                unwritten = max(0, int(bound) - points[-1].step)
                gap = max(0.0, judged[0].start - this.end)
                unwritten_secs = min(gap, unwritten * secs_per_step)
            end = _interpolate(points, bound)
            useful_secs = end.train_secs - points[0].train_secs
            stretches.insert(0, Stretch(points, bound, useful_secs))
            bound = min(bound, points[0].step)
        this = this._replace(
            stretches=stretches,
            unwritten_steps=unwritten,
            unwritten_secs=unwritten_secs,
        )
        judged.insert(0, this)
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
