"""A run is kept alive, or ended with its cause: real processes and signals.

The workers are small programs that tell their status as dtrain's do; what
dtrain itself comes back to is shown in recoveries_test.py.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from dtrain import errors
from dtrain.resilience import signals, status
from launch.keep import cycle, supervisor, worker
from tests import runs

# What the programs begin with: tell(...) writes the status.
PRELUDE = """
import os, signal, sys, time
from dtrain.resilience import signals, status
attempt = int(os.environ["DTRAIN_ATTEMPT"])
def tell(step=-1, saved=-1, **more):
    status.write(
        os.environ["DTRAIN_STATUS_FILE"],
        status.Status(os.getpid(), step, saved, **more),
    )
"""


def plan(*programs: str) -> supervisor.Plan:
    """Makes workers that run these programs; `me` is a worker's index."""

    def processes(workers: Sequence[int]) -> list[worker.Process]:
        return [
            worker.Process(
                f"worker {index}",
                (
                    sys.executable,
                    "-c",
                    f"{PRELUDE}\nme, num_workers = {index}, {len(workers)}\n"
                    + programs[index],
                ),
                {"PYTHONPATH": str(runs.ROOT)},
            )
            for index in workers
        ]

    return processes


def run(*programs: str, **options: object) -> int:
    return supervisor.run(
        supervisor.Options(num_workers=len(programs), **options),
        plan(*programs),
    )


def later(condition: Callable[[], bool], action: Callable[[], None]) -> None:
    """Does something, on another thread, when a condition holds."""

    def wait() -> None:
        end = time.monotonic() + 60
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        action()

    threading.Thread(target=wait, daemon=True).start()


def ending(code: int, place: int = 0, **more: object) -> cycle.Ending:
    return cycle.Ending(f"worker {place}", place, code, **more)


def result(
    *endings: cycle.Ending, restored: int = -1, saved: int = -1
) -> cycle.Result:
    return cycle.Result(endings, "", restored, saved)


CRASH = result(ending(1, last_error="ValueError: no"))


# What is decided.


def test_no_wait_after_progress() -> None:
    record = supervisor.Record(supervisor.Options())
    for step in (10, 20, 30, 40):
        decision = record.next(result(ending(-9), saved=step))
        assert decision.code is None
        assert decision.delay_secs == 0
    assert decision.line == (
        "worker 0 was killed by SIGKILL; start 5 goes on from step 40 in 0 s"
    )


def test_three_crashes_without_progress_end_the_run() -> None:
    record = supervisor.Record(supervisor.Options())
    first = record.next(result(ending(1), saved=10))
    assert first.delay_secs == 0
    second = record.next(result(ending(1), restored=10, saved=10))
    third = record.next(result(ending(1), restored=10, saved=10))
    assert [second.delay_secs, third.delay_secs] == [1, 2]
    last = record.next(result(CRASH.endings[0], restored=10, saved=10))
    assert last.code == 1
    assert last.line == (
        "error: gave up after 3 starts in a row without a new save: worker 0 "
        "exited with 1, its last error: ValueError: no"
    )


def test_what_was_saved_before_is_no_progress() -> None:
    record = supervisor.Record(supervisor.Options())
    found = result(ending(1), restored=500, saved=500)
    codes = [record.next(found).code for _ in range(3)]
    assert codes == [None, None, 1]


def test_a_worker_that_knows_no_save_makes_no_progress() -> None:
    record = supervisor.Record(supervisor.Options())
    told_nothing = cycle.Result((ending(1),))
    assert [record.next(told_nothing).code for _ in range(3)] == [None, None, 1]


def test_progress_forgives() -> None:
    record = supervisor.Record(supervisor.Options())
    for step in range(0, 50, 10):
        for _ in range(2):
            assert record.next(result(ending(1), saved=step)).code is None


def test_the_wait_grows_to_a_minute() -> None:
    record = supervisor.Record(supervisor.Options())
    delays = [record.next(result(ending(75))).delay_secs for _ in range(9)]
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_max_restarts_counts_crashes_alone() -> None:
    record = supervisor.Record(supervisor.Options(max_restarts=1))
    for step in (10, 20, 30):
        told = record.next(result(ending(errors.RUN_AGAIN), saved=step))
        assert told.code is None
    assert record.may_restart
    assert record.next(result(ending(-6), saved=40)).code is None
    assert not record.may_restart
    decision = record.next(result(ending(-6), saved=50))
    assert decision.code == 128 + signal.SIGABRT
    assert "gave up after 1 restarts (--max_restarts)" in decision.line


def test_a_mistake_is_never_tried_again() -> None:
    endings = (ending(-9, 1), ending(errors.USER_ERROR, 0))
    record = supervisor.Record(supervisor.Options(num_workers=2))
    assert record.next(result(*endings)).code == errors.USER_ERROR


def test_a_notice_that_is_for_the_machine_ends_the_run() -> None:
    told = status.Status(1, 5, 5, notice="the time limit", is_over=True)
    heard = dataclasses.replace(told, notice=status.ANOTHERS_NOTICE)
    record = supervisor.Record(supervisor.Options(num_workers=2))
    decision = record.next(
        result(ending(75, 1, status=heard), ending(75, 0, status=told), saved=5)
    )
    assert decision.code == errors.RUN_AGAIN
    assert decision.line.startswith(
        "worker 0 was told to end by the time limit"
    )


@pytest.mark.parametrize(
    ("endings", "cause"),
    [
        ((ending(76, 0), ending(-9, 1)), "worker 1 was killed by SIGKILL"),
        ((ending(1, 1), ending(-9, 0, taken_down=True)), "worker 1 exited"),
        ((ending(76, 1), ending(76, 0)), "worker 1 exited with 76"),
        ((ending(70, 0, silent_secs=61.0),), "no sign of life for 61 s"),
        ((ending(70, 0),), "made no progress"),
        ((ending(-60, 0),), "signal 60"),
    ],
)
def test_the_cause(endings: tuple[cycle.Ending, ...], cause: str) -> None:
    record = supervisor.Record(supervisor.Options(num_workers=2))
    assert cause in record.next(result(*endings)).line


# A machine less.


def test_a_worker_that_fails_twice_is_left_out_and_returns() -> None:
    options = supervisor.Options(num_workers=4, min_workers=2)
    record = supervisor.Record(options)
    bad = result(ending(-9, 2))
    assert record.next(bad).workers == (0, 1, 2, 3)
    decision = record.next(bad)
    assert decision.workers == (0, 1, 3)
    assert "with 3 and without worker 2" in decision.line
    decision = record.next(result(ending(-9, 0), saved=7))
    assert decision.workers == (0, 1, 2, 3)
    assert decision.line.endswith("again with all workers")


def test_it_returns_after_a_notice_too() -> None:
    options = supervisor.Options(num_workers=2, min_workers=1)
    record = supervisor.Record(options)
    bad = result(ending(-9, 1))
    assert [record.next(bad).workers for _ in range(2)] == [(0, 1), (0,)]
    assert record.next(result(ending(75), saved=9)).workers == (0, 1)


@pytest.mark.parametrize(
    "others",
    [
        (result(ending(-9, 0)),),
        (result(ending(-9, 1), saved=4),),
        (result(ending(75, 1)),),
        (result(ending(76, 1)),),
    ],
    ids=["another", "progress", "told", "lost"],
)
def test_only_the_same_one_twice_in_a_row_is_left_out(
    others: tuple[cycle.Result, ...],
) -> None:
    record = supervisor.Record(supervisor.Options(num_workers=2, min_workers=1))
    for each in (result(ending(-9, 1)), *others):
        assert record.next(each).workers == (0, 1)
    again = record.next(result(ending(-9, 1), saved=4))
    assert again.workers == (0, 1) or again.code is not None


def test_with_as_many_as_share_the_batch() -> None:
    options = supervisor.Options(
        num_workers=8, min_workers=2, fits=lambda count: 8 % count == 0
    )
    record = supervisor.Record(options)
    bad = result(ending(-9, 1))
    record.next(bad)
    assert record.next(bad).workers == (0, 2, 3, 4)


def test_not_below_min_workers() -> None:
    options = supervisor.Options(
        num_workers=4, min_workers=3, fits=lambda count: 4 % count == 0
    )
    record = supervisor.Record(options)
    bad = result(ending(-9, 1))
    assert [record.next(bad).workers for _ in range(2)] == [(0, 1, 2, 3)] * 2


# Real processes.


def test_a_killed_worker_takes_the_others_down_and_all_start_again(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    began = tmp_path / "began"
    victim = f"""
tell(0)
if attempt:
    open({str(began)!r}, "w").write(str(time.monotonic()))
    sys.exit(0)
time.sleep(0.5)
tell(150, 120)
time.sleep(0.5)
print("dies at", time.monotonic(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    deaf = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
tell(0)
time.sleep(0 if attempt else 60)
"""
    assert run(deaf, victim) == errors.FINISHED
    out, err = capfd.readouterr()
    assert err.splitlines() == [
        "worker 1 was killed by SIGKILL; start 2 goes on from step 120 in 0 s"
    ]
    died = float(out.partition("dies at ")[2].split()[0])
    # A moment for the others to leave by themselves, and Python's start.
    assert cycle.LEAVE_SECS < float(began.read_text()) - died < 4.0


def test_a_worker_that_always_fails_ends_the_run_with_its_cause(
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = """
time.sleep(0.3)
tell(0, 7)
print("Traceback (most recent call last):")
print("ValueError: image 5 is not there")
print("and a line of no interest")
sys.exit(3)
"""
    # Knows of no save, since another one makes them.
    other = "tell(0, -1); time.sleep(60)"
    assert run(other, program) == 3
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "worker 1 exited with 3; start 2 goes on from step 7 in 1 s",
        "worker 1 exited with 3; start 3 goes on from step 7 in 2 s",
        "error: gave up after 3 starts in a row without a new save: worker 1 "
        "exited with 3, its last error: ValueError: image 5 is not there",
    ]


def test_each_start_knows_what_it_is(
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = """
assert status.read(os.environ["DTRAIN_STATUS_FILE"]) is None
tell(attempt, attempt)
print(attempt, os.environ["DTRAIN_SUPERVISOR_PID"], os.getppid())
sys.exit(attempt < 3)
"""
    assert run(program) == errors.FINISHED
    pid = os.getpid()
    assert capfd.readouterr().out.splitlines() == [
        f"[worker 0] {attempt} {pid} {pid}" for attempt in range(4)
    ]


def test_the_workers_of_a_start_share_a_secret(tmp_path: pathlib.Path) -> None:
    program = (
        f"open(f'{tmp_path}/{{attempt}}-{{me}}', 'w').write("
        "os.environ.get('DTRAIN_SECRET', ''))\n"
        "time.sleep(0.2)\n"
        "sys.exit(0 if attempt else 1)\n"
    )
    assert run(program, program) == errors.FINISHED
    first, again, second, once_more = (
        path.read_text() for path in sorted(tmp_path.iterdir())
    )
    assert first == again
    assert second == once_more
    assert len({first, second}) == 2
    assert len(first) == 32
    # One of several nodes, each of which starts one.
    assert run(f"open('{tmp_path}/alone', 'w').write(str(os.environ))") == 0
    assert "DTRAIN_SECRET" not in (tmp_path / "alone").read_text()


def test_a_worker_that_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    bad = "tell(0, 5); os.kill(os.getpid(), signal.SIGKILL)"
    good = "tell(0, 5); print(num_workers); time.sleep(60 * (num_workers > 1))"
    assert run(good, bad, min_workers=1) == errors.FINISHED
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == "[worker 0] 1"
    assert "with 1 and without worker 1: it failed twice in a row" in err


SILENT = {
    # As a debugger, a scheduler or a person does.
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(60)",
    # PyDLL keeps Python's lock: no other thread of it runs.
    "in C": "import ctypes; ctypes.PyDLL(None).sleep(60)",
}


@pytest.mark.parametrize("how", SILENT)
def test_a_silent_worker_is_ended_with_its_stacks(
    how: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stacks = tmp_path / "stacks"
    program = f"""
import faulthandler, threading
faulthandler.enable(open({str(stacks)!r}, "a"))
def repeat():
    while True:
        tell(attempt, attempt, limit_secs=1.5)
        time.sleep(0.1)
threading.Thread(target=repeat, daemon=True).start()
time.sleep(2)
if attempt:
    sys.exit(0)
def stuck_here():
    {SILENT[how]}
stuck_here()
"""
    start = time.monotonic()
    assert run(program, "tell(0); time.sleep(0 if attempt else 60)") == 0
    assert time.monotonic() - start < 30
    err = capfd.readouterr().err.splitlines()
    assert err[0].startswith("worker 0 gives no sign of life for 2 s")
    assert err[1].startswith("worker 0 gave no sign of life for 2 s; start 2")
    assert "stuck_here" in stacks.read_text()


def test_one_that_does_not_even_abort_is_killed() -> None:
    program = """
signal.signal(signal.SIGABRT, signal.SIG_IGN)
tell(attempt, attempt, limit_secs=0.5)
time.sleep(0 if attempt else 60)
"""
    start = time.monotonic()
    assert run(program) == errors.FINISHED
    assert time.monotonic() - start < 20


SAVES = """
def save(*_):
    tell(9, 9, notice="SIGTERM")
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
tell(8, 5)
"""


@pytest.mark.parametrize("number", signals.NUMBERS)
def test_a_notice_is_handed_on_and_nothing_starts_again(
    number: int, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ready = [tmp_path / str(index) for index in range(2)]
    program = (
        SAVES + f"open({str(tmp_path)!r} + f'/{{me}}', 'w'); time.sleep(60)"
    )
    later(
        lambda: all(path.exists() for path in ready),
        lambda: os.kill(os.getpid(), number),
    )
    assert run(program, program) == errors.RUN_AGAIN
    out, err = capfd.readouterr()
    assert sorted(out.split("\n")) == [
        "",
        "[worker 0] saved",
        "[worker 1] saved",
    ]
    assert err == ""


def test_a_worker_that_was_told_takes_the_others_along_and_back(
    capfd: pytest.CaptureFixture[str],
) -> None:
    told = SAVES + (
        "time.sleep(1)\nif not attempt: os.kill(os.getpid(), signal.SIGTERM)"
    )
    other = SAVES + "time.sleep(0 if attempt else 60)"
    assert run(told, other, max_restarts=0) == errors.FINISHED
    out, err = capfd.readouterr()
    assert "[worker 1] saved" in out
    assert err.splitlines() == [
        "worker 0 was told to end by SIGTERM; start 2 goes on from step 9 in "
        "0 s"
    ]


def test_one_that_knows_is_not_told_again() -> None:
    slow = """
tell(9, 9, notice="another worker's")
time.sleep(4)
sys.exit(75)
"""
    told = 'tell(9, 9, notice="the time limit", is_over=True); sys.exit(75)'
    assert run(told, slow) == errors.RUN_AGAIN


DEAF = """
signal.signal(signal.SIGTERM, lambda *_: tell(1, 1, notice="SIGTERM"))
tell(1, 1)
end = time.monotonic() + 60
while time.monotonic() < end:
    time.sleep(0.1)
"""


@pytest.mark.parametrize(
    ("numbers", "pause_secs"),
    [
        ((signal.SIGINT, signal.SIGINT), 0.5),
        ((signal.SIGTERM, signal.SIGTERM), 2.1),
    ],
)
def test_a_second_notice_kills(
    numbers: tuple[int, int],
    pause_secs: float,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def interrupt() -> None:
        time.sleep(1)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause_secs)

    later(lambda: True, interrupt)
    start = time.monotonic()
    assert run(DEAF) == errors.RUN_AGAIN
    assert time.monotonic() - start < 20
    assert "ended before all had saved" in capfd.readouterr().err


def test_a_notice_before_the_workers_can_hear_it(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody else is there to say that nothing is saved."""
    ready = tmp_path / "ready"
    program = f"open({str(ready)!r}, 'w'); time.sleep(60)"
    later(ready.exists, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(program, program) == errors.RUN_AGAIN
    assert capfd.readouterr().err == (
        "stopped by SIGTERM before the first steps were done: nothing to save; "
        "run the same command again\n"
    )


def test_two_signals_at_once_are_one_notice() -> None:
    notices = cycle.Notices()
    notices.handle(signal.SIGTERM)
    notices.handle(signal.SIGTERM)
    notices.handle(signal.SIGINT)
    assert (notices.first, notices.is_second) == ("SIGTERM", False)


def test_grace_has_an_end() -> None:
    start = time.monotonic()
    later(
        lambda: time.monotonic() > start + 1,
        lambda: signal.raise_signal(signal.SIGTERM),
    )
    assert run(DEAF, grace_secs=1.0) == errors.RUN_AGAIN
    assert time.monotonic() - start < 10


def test_a_notice_ends_the_wait_between_two_starts(
    capfd: pytest.CaptureFixture[str],
) -> None:
    seen = []

    def second_crash() -> bool:
        seen.append(capfd.readouterr().err)
        return "in 2 s" in "".join(seen)

    later(second_crash, lambda: signal.raise_signal(signal.SIGTERM))
    assert run("sys.exit(1)") == errors.RUN_AGAIN
    seen.append(capfd.readouterr().err)
    assert "stopped by SIGTERM" in "".join(seen)
    assert "start 4" not in "".join(seen)


def test_what_a_worker_leaves_behind_is_ended(tmp_path: pathlib.Path) -> None:
    pid = tmp_path / "pid"
    program = f"""
import subprocess
if attempt:
    tell(1, 1)
    sys.exit(0)
child = subprocess.Popen(["sleep", "60"])
open({str(pid)!r}, "w").write(str(child.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    start = time.monotonic()
    assert run(program) == errors.FINISHED
    assert time.monotonic() - start < 20
    stat = pathlib.Path(f"/proc/{pid.read_text()}/stat")
    # Gone, or a zombie that nobody has asked for yet.
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_a_run_that_went_back_makes_progress_from_there() -> None:
    """Its saves are older than what it had before it diverged."""
    record = supervisor.Record(supervisor.Options())
    record.next(result(ending(1), restored=0, saved=1900))
    for saved in (1300, 1600, 1890):
        crash = result(ending(1), restored=saved - 300, saved=saved)
        assert record.next(crash).delay_secs == 0.0
        assert record.saved_step == saved


def test_who_is_stuck_is_not_told_by_who_finds_it() -> None:
    options = supervisor.Options(num_workers=2, min_workers=1)
    record = supervisor.Record(options)
    for _ in range(2):
        decision = record.next(result(ending(errors.HUNG, 0)))
    assert decision.workers == (0, 1)


@pytest.mark.parametrize("code", [errors.FINISHED, errors.RUN_AGAIN])
def test_what_a_worker_has_started_ends_with_it(
    code: int, tmp_path: pathlib.Path
) -> None:
    """Or it would be there beside the next start, with devices and ports."""
    numbers = tmp_path / "numbers"
    program = f"""
import subprocess
child = subprocess.Popen(["sleep", "300"])
with open({str(numbers)!r}, "a") as file:
    print(child.pid, file=file)
    file.flush()
starts = open({str(numbers)!r}).read().count("\\n")
sys.exit({code} if starts < 2 else 0)
"""
    assert run(program) == errors.FINISHED
    for number in numbers.read_text().split():
        stat = pathlib.Path(f"/proc/{number}/stat")
        # Until its new parent looks, the number stays.
        assert not stat.exists() or stat.read_text().split()[2] == "Z"
