"""The ledger of an attempt, and what is made of those of a run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import random as random_lib
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from dtrain import report
from dtrain.record import goodput, ledger
from dtrain.record.goodput import Attempt, Point
from tests import odd_values
from tests.benchmarks import goodput as benchmark

NS = 1_000_000_000


class Clock:
    """A clock that moves when it is told to, in seconds."""

    def __init__(self, secs: float = 100.0) -> None:
        self.ns = int(secs * NS)

    def __call__(self) -> int:
        return self.ns

    def pass_(self, secs: float) -> None:
        self.ns += round(secs * NS)


def open_ledger(
    run_dir: pathlib.Path, clock: Clock, started: float = 90.0
) -> ledger.Ledger:
    return ledger.Ledger(
        str(run_dir), clock_ns=clock, started_ns=int(started * NS)
    )


def read(run_dir: pathlib.Path) -> Attempt:
    [path] = (run_dir / "ledger").iterdir()
    return goodput.loads(path.read_bytes())


def train(book: ledger.Ledger, clock: Clock, secs: float, step: int) -> None:
    with book.spending("train"):
        clock.pass_(secs)
    book.progress(step)


def make(
    start: float,
    seconds: dict[str, float],
    points: list[tuple[float, int, float]],
    **more: object,
) -> Attempt:
    """Returns an attempt on a machine that was switched on in 1970."""
    values = {
        "started": start,
        "boot_id": "boot",
        "boot_started": start,
        "host": "host",
        "pid": 1,
        "num_workers": 1,
        "num_replicas": 1,
        "batch_size": 8,
        "attempt": 0,
        "num_saves": 0,
        "seconds": dict.fromkeys(goodput.KINDS, 0.0) | seconds,
        "points": [Point(*each) for each in points],
        "exit_code": None,
        "notice": "",
    }
    return Attempt(**(values | more))


def test_all_time_of_an_attempt_is_of_one_kind(tmp_path: pathlib.Path) -> None:
    clock = Clock()
    book = open_ledger(tmp_path, clock)
    clock.pass_(1)
    with book.spending("restore"):
        clock.pass_(2)
    book.restored(40)
    clock.pass_(3)
    train(book, clock, 10.5, 41)
    train(book, clock, 5.0, 51)
    with book.spending("save"):
        clock.pass_(0.25)
        with book.spending("draw"):
            clock.pass_(0.125)
            assert book.spent("draw")[0] == 0.125
        clock.pass_(0.25)
    clock.pass_(4)
    book.close(75, "SIGTERM")
    clock.pass_(100)
    book.close(0)
    book.progress(99)

    found = read(tmp_path)
    assert found.seconds == {
        "start": 10 + 1 + 3,
        "restore": 2,
        # Less a step, which takes half a second.
        "compile": 10.0,
        "train": 5.5,
        "save": 0.5,
        "draw": 0.125,
        "evaluate": 0,
        "other": 4,
    }
    assert found.secs == pytest.approx(clock.ns / NS - 100 - 90, abs=1e-9)
    assert found.points == [
        Point(13, 40, 0),
        Point(26.5, 41, 0),
        Point(31.5, 51, 5.5),
    ]
    assert (found.exit_code, found.notice) == (75, "SIGTERM")
    assert found.num_saves == 1


def test_a_loop_that_waited_for_a_worker_that_is_gone(
    tmp_path: pathlib.Path,
) -> None:
    """It is no training: nobody trained, until the next attempt did."""
    clock = Clock()
    book = open_ledger(tmp_path, clock)
    book.restored(0)
    train(book, clock, 1.0, 10)
    train(book, clock, 2.0, 30)

    def wait() -> None:
        with book.spending("train"):
            clock.pass_(13)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        wait()
    clock.pass_(0.5)
    book.close(76)
    lost = read(tmp_path)
    assert lost.seconds["train"] + lost.seconds["compile"] == 3.0
    clock.pass_(2)
    after = dataclasses.replace(
        lost, boot_started=clock.ns / NS, started=clock.ns / NS, pid=2
    )
    found = goodput.account([lost, after])
    assert found.seconds["idle"] == pytest.approx(13 + 2)


def test_a_mistake_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    book = open_ledger(tmp_path, Clock())
    book.close(78)
    assert not list(tmp_path.iterdir())


def test_a_worker_that_is_not_the_chief_writes_nothing(
    tmp_path: pathlib.Path,
) -> None:
    book = ledger.Ledger(str(tmp_path), is_chief=False)
    book.restored(0)
    with book.spending("train"):
        book.progress(1)
    book.close(0)
    assert not list(tmp_path.iterdir())


def test_a_kill_loses_five_seconds_at_most(tmp_path: pathlib.Path) -> None:
    clock = Clock()
    book = open_ledger(tmp_path, clock)
    book.restored(0)
    for step in range(1, 1000):
        train(book, clock, 0.3, step)
        written = read(tmp_path)
        assert written.exit_code is None
        now = clock.ns / NS - 90
        assert now - 5.0 - 0.3 < written.secs <= now + 1e-6


def test_a_disk_that_fails_stops_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "ledger").write_text("in the way")
    clock = Clock()
    book = open_ledger(tmp_path, clock)
    book.restored(0)
    for step in range(1, 10):
        train(book, clock, 10, step)
    (tmp_path / "ledger").unlink()
    train(book, clock, 10, 10)
    assert read(tmp_path).points[-1].step == 10


def test_a_ledger_stays_small_and_keeps_where_it_went_back(
    tmp_path: pathlib.Path,
) -> None:
    clock = Clock()
    book = open_ledger(tmp_path, clock)
    book.restored(0)
    step = 0
    for number in range(1, 10_001):
        step += 1_000_000
        if number in (4_000, 4_001, 8_000):
            book.progress(step)
            step -= 1_000_000_000
        train(book, clock, 0.87654321, step)
    book.close(0)
    [path] = (tmp_path / "ledger").iterdir()
    assert path.stat().st_size < 42_000
    found = read(tmp_path)
    assert 500 <= len(found.points) <= 1000
    assert found.points[0].step == 0
    assert found.points[-1].step == step
    back = [a.step - b.step for a, b in itertools.pairwise(found.points)]
    assert [each for each in back if each > 0] == [1_000_000_000] * 3


def test_a_process_knows_when_it_began(tmp_path: pathlib.Path) -> None:
    book = ledger.Ledger(str(tmp_path))
    book.restored(0)
    book.close(0)
    found = read(tmp_path)
    with open("/proc/uptime", encoding="ascii") as file:
        uptime = float(file.read().split()[0])
    assert 0 < found.secs < uptime
    assert found.boot_started + found.secs == pytest.approx(uptime, abs=1.0)
    assert found.started + found.secs == pytest.approx(time.time(), abs=1.0)


def test_a_call_takes_microseconds(tmp_path: pathlib.Path) -> None:
    book = ledger.Ledger(str(tmp_path))
    book.restored(0)
    begun = time.perf_counter()
    for step in range(1, 10_001):
        with book.spending("train"):
            pass
        book.progress(step)
    # Some 5 us each; the margin is for a machine that is busy.
    assert (time.perf_counter() - begun) / 10_000 < 200e-6


def test_a_damaged_document_is_told_from_one_of_the_future() -> None:
    sound = goodput.dumps(make(0, {"train": 2}, [(0, 0, 0), (2, 5, 2)]))
    assert goodput.loads(sound).points[-1] == Point(2, 5, 2)
    for damaged in (
        b"",
        b"[]",
        b"\xff",
        sound[:-20],
        sound.replace(b'"train":2', b'"train":-2'),
        sound.replace(b'"train":2', b'"train":NaN'),
        sound.replace(b'"train":2', b'"tram":2'),
        sound.replace(b'"pid":1', b'"pid":"x"'),
        sound.replace(b'"pid":1', b'"pid":1' + b"0" * 400),
        sound.replace(b'"host":"host"', b'"host":[]'),
        sound.replace(b'"exit_code":null', b'"exit_code":1.5'),
        sound.replace(b"[[0,", b"[[9,"),
        sound.replace(b"[2,5,2]", b"[2,1e999,2]"),
        sound.replace(b"[2,5,2]", b"[2,5,97]"),
        sound.replace(b"[2,5,2]", b"[" * 100_000),
        sound.replace(b'"schema":2', b'"schema":"2"'),
        # Of the kind that the schema before this one did not have.
        sound.replace(b'"evaluate":0.0,', b""),
    ):
        assert damaged != sound
        with pytest.raises(goodput.DamagedError):
            goodput.loads(damaged)
    with pytest.raises(goodput.FutureError, match="schema 3"):
        goodput.loads(sound.replace(b'"schema":2', b'"schema":3'))
    before = sound.replace(b'"schema":2', b'"schema":1')
    before = before.replace(b'"evaluate":0.0,', b"")
    assert goodput.loads(before) == goodput.loads(sound)


def test_steps_above_a_restart_were_done_again() -> None:
    first = make(
        1000,
        {"start": 10, "compile": 5, "train": 40},
        [(10, 0, 0), (15, 1, 0), (35, 101, 20), (55, 201, 40)],
    )
    second = make(
        1060,
        {"start": 10, "compile": 5, "train": 10, "save": 1},
        [(10, 151, 0), (15, 152, 0), (25, 202, 10)],
        exit_code=0,
    )
    account = goodput.account([second, first])
    assert account.wall_secs == 86
    assert account.seconds == {
        "useful": 30 + 10,
        "redone": 10,
        "start": 20,
        "restore": 0,
        "compile": 10,
        "save": 1,
        "draw": 0,
        "evaluate": 0,
        "other": 0,
        "idle": 5,
    }
    assert (account.num_steps, account.num_redone) == (202, 50)
    assert account.goodput == pytest.approx(40 / 86)


def test_an_attempt_may_go_back_below_the_one_before_it() -> None:
    steps = [(0.0, 0, 0.0), (100.0, 100, 100.0)]
    first = make(0, {"train": 100}, steps)
    second = make(100, {"train": 5}, [(0, 80, 0), (5, 85, 5)])
    third = make(105, {"train": 50}, [(0, 50, 0), (50, 100, 50)])
    account = goodput.account([first, second, third])
    assert account.seconds["useful"] == 50 + 50
    assert account.seconds["redone"] == 50 + 5
    assert account.num_steps == 100


def test_steps_before_the_run_went_back_were_done_again() -> None:
    attempt = make(
        0,
        {"train": 60, "restore": 10},
        [(0, 0, 0), (40, 40, 40), (50, 20, 40), (70, 40, 60)],
    )
    account = goodput.account([attempt])
    assert account.seconds["useful"] == 40
    assert account.seconds["redone"] == 20
    assert (account.num_steps, account.num_redone) == (40, 20)


def test_steps_that_were_saved_and_not_written_down_are_useful() -> None:
    first = make(0, {"train": 50}, [(0, 0, 0), (50, 50, 50)])
    second = make(60, {"train": 10}, [(0, 53, 0), (10, 63, 10)])
    account = goodput.account([first, second])
    assert account.num_steps == 63
    assert account.seconds["useful"] == 50 + 3 + 10
    assert account.seconds["idle"] == 7
    # The gap is all there can have been.
    late = dataclasses.replace(second, points=[Point(0, 99, 0)])
    assert goodput.account([first, late]).seconds["idle"] == 0


def test_a_wall_clock_that_jumps_moves_nothing_on_one_machine() -> None:
    first = make(0, {"train": 50}, [])
    second = make(60, {"train": 10}, [], started=60 - 86_400.0)
    third = make(80, {"train": 10}, [], started=80 + 3_600.0)
    account = goodput.account([first, second, third])
    assert account.wall_secs == 90
    assert [each.start for each in account.placed] == [0, 60, 80]


def test_another_machine_is_placed_by_the_wall_clock() -> None:
    first = make(1000, {"start": 50}, [])
    second = make(1060, {"start": 10}, [], boot_id="other", boot_started=7)
    unknown = make(1080, {"start": 10}, [], boot_id="", boot_started=0)
    account = goodput.account([unknown, second, first])
    assert [each.start for each in account.placed] == [0, 60, 80]
    assert account.wall_secs == 90


def test_a_start_that_waited_for_the_one_before_is_not_counted_twice() -> None:
    first = make(0, {"train": 50}, [])
    second = make(45, {"start": 10, "train": 10}, [(10, 0, 0), (20, 5, 10)])
    account = goodput.account([first, second])
    assert account.wall_secs == 65
    assert account.seconds["start"] == 5
    assert account.placed[1].stretches[0].points[0].secs == 55


def test_what_is_allowed_is_what_restarts_and_saves_leave() -> None:
    # A save of 1 s each 10 s; a restart takes 20 s, and the first start, too.
    attempts = [
        make(
            each * 100,
            {"start": 20, "train": 72, "save": 8},
            [(20, each * 72, 0), (100, each * 72 + 72, 72)],
            num_saves=8,
        )
        for each in range(10)
    ]
    account = goodput.account(attempts)
    assert benchmark.restart_secs(account) == 20
    expected = 1 - 1 / 10 - (20 + (20 + 5) * 9) / 1000
    assert benchmark.allowed(account, 9) == pytest.approx(expected)
    assert benchmark.allowed(account, 1000) == 0


@st.composite
def histories(draw: st.DrawFn) -> list[Attempt]:
    """Attempts of which each begins at or below where the last one was."""
    attempts = []
    now, done = draw(st.floats(0, 1e6)), 0
    for _ in range(draw(st.integers(1, 6))):
        now += draw(st.floats(0, 1e4))
        seconds = {
            kind: draw(st.floats(0, 1e3))
            for kind in goodput.KINDS
            if kind != "train"
        }
        secs = sum(seconds.values())
        train, step = 0.0, draw(st.integers(0, done))
        points = []
        if draw(st.booleans()):
            points = [Point(secs, step, 0.0)]
            for _ in range(draw(st.integers(0, 5))):
                step = max(0, step + draw(st.integers(-50, 200)))
                train += draw(st.floats(0, 100))
                points.append(Point(secs + train, step, train))
            done = step + draw(st.integers(0, 10))
        seconds["train"] = train + draw(st.floats(0, 10))
        attempts.append(make(now, seconds, points))
        now += attempts[-1].secs
    return attempts


@hypothesis.given(histories(), st.randoms())
@hypothesis.settings(deadline=None)
def test_the_account_is_all_wall_time(
    history: list[Attempt], random: random_lib.Random
) -> None:
    account = goodput.account(random.sample(history, len(history)))
    first, last = history[0], history[-1]
    wall = last.started + last.secs - first.started
    assert account.wall_secs == pytest.approx(wall, abs=1e-3)
    assert sum(account.seconds.values()) == pytest.approx(wall, abs=1e-3)
    assert all(secs >= -1e-6 for secs in account.seconds.values())
    assert 0 <= account.goodput <= 1 + 1e-6


@hypothesis.given(histories())
@hypothesis.settings(deadline=None)
def test_every_useful_step_is_counted_once(history: list[Attempt]) -> None:
    useful: dict[int, int] = {}
    for each in goodput.account(history).placed:
        for stretch in each.stretches:
            first, last = stretch.points[0].step, stretch.points[-1].step
            for step in range(first + 1, int(min(last, stretch.bound)) + 1):
                useful[step] = useful.get(step, 0) + 1
    assert all(count == 1 for count in useful.values())


@hypothesis.given(histories())
@hypothesis.settings(deadline=None)
def test_a_document_comes_back_as_it_was(history: list[Attempt]) -> None:
    for attempt in history:
        rounded = dataclasses.replace(
            attempt,
            points=[
                Point(round(a, 3), step, round(b, 3))
                for a, step, b in attempt.points
            ],
        )
        assert goodput.loads(goodput.dumps(rounded)) == rounded
        assert math.isfinite(rounded.secs)


@hypothesis.given(st.data())
@hypothesis.settings(deadline=None)
def test_no_value_in_a_document_surprises_its_readers(
    data: st.DataObject,
) -> None:
    attempt = make(0, {"train": 2}, [(0, 0, 0), (2, 5, 2)], exit_code=75)
    body = json.loads(goodput.dumps(attempt))
    changed = json.dumps(data.draw(odd_values.mutations(body))).encode()
    try:
        read = goodput.loads(changed)
    except (goodput.DamagedError, goodput.FutureError):
        return
    account = goodput.account([attempt, read])
    assert math.isfinite(account.goodput)
    assert report.table(account, "runs/a")
