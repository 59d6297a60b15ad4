"""Processes that are stuck, slow, stopped or crashed, and what is left."""

from __future__ import annotations

import errno
import faulthandler
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dtrain import errors
from dtrain.resilience import status, watchdog
from tests import runs

CHILD = """
import ctypes, os, sys, threading, time
from dtrain.resilience import watchdog

run_dir = sys.argv[1]
dog = watchdog.Watchdog(
    run_dir + "/stacks/worker-0", status_file=run_dir + "/status.json",
    **eval(sys.argv[2]),
)

def wait_in_vain():
    threading.Event().wait()

def stuck_in_python():
    lock = threading.Lock()
    with lock:
        lock.acquire()

def stuck_in_c():
    os.write(1, b".")
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)

def train(secs, num_loops=1):
    for step in range(num_loops):
        time.sleep(secs)
        dog.beat(step, -1)

timer = threading.Timer(60, os._exit, (99,))
timer.daemon = True
timer.start()
threading.Thread(target=wait_in_vain, daemon=True).start()
dog.start()
exec(sys.argv[3])
dog.close()
"""

# A child that works on must not be taken for stuck on a machine that is busy
# with other tests, so what is slow is slow by minutes, or not by the clock.
LIMIT = 1.0
SETTINGS = repr(
    {"hang_timeout_secs": LIMIT, "period_secs": 0.1, "start_up_secs": 30.0}
)


def start(
    run_dir: pathlib.Path, then: str, settings: str = SETTINGS
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(run_dir), settings, then],
        env=runs.environment(TMPDIR=str(run_dir / "tmp")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, printed = process.communicate(timeout=60)
    return process.returncode, printed


@pytest.fixture
def run_dir(tmp_path: pathlib.Path) -> pathlib.Path:
    """Makes the directory of a run."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tmp").mkdir()
    return tmp_path


def stacks(directory: pathlib.Path) -> str:
    """Returns what the only file of stacks holds."""
    [path] = directory.glob("*.txt")
    return path.read_text()


@pytest.mark.parametrize("where", ["stuck_in_python", "stuck_in_c"])
def test_stuck_process_is_ended(run_dir: pathlib.Path, where: str) -> None:
    process = start(run_dir, f"dog.beat(0, -1); dog.beat(120, 100); {where}()")
    code, printed = end(process)
    assert code == errors.HUNG
    head, first, *_, last = printed.splitlines()
    assert head == "the main thread is stuck at"
    assert f"in {where}" in first
    assert last.startswith("no progress for ")
    assert f" at step 120; the stacks of all threads are in {run_dir}" in last
    text = stacks(run_dir / "stacks")
    assert "at step 120" in text.splitlines()[0]
    for name in (where, "wait_in_vain", "_watch"):
        assert f"in {name}\n" in text
    assert status.read(str(run_dir / "status.json")) == status.Status(
        process.pid, 120, 100, LIMIT
    )


def test_stuck_at_the_start(run_dir: pathlib.Path) -> None:
    settings = "{'hang_timeout_secs': 900.0, 'start_up_secs': 0.5}"
    code, printed = end(start(run_dir, "stuck_in_python()", settings))
    assert code == errors.HUNG
    assert "at step -1" in printed


def test_stopped_process_is_not_stuck(run_dir: pathlib.Path) -> None:
    """After more than its limit, it is found where it was, and goes on."""
    process = start(
        run_dir, "train(0.05, 3); os.write(1, b'.'); train(0.05, 15)"
    )
    assert process.stdout.read(1) == "."
    process.send_signal(signal.SIGSTOP)
    time.sleep(2 * LIMIT)
    process.send_signal(signal.SIGCONT)
    assert end(process) == (0, "")


def test_slow_process_is_not_stuck(run_dir: pathlib.Path) -> None:
    """It takes longer than the least limit, as its loops have all along."""
    settings = "{'hang_timeout_secs': 0.0, 'least_secs': 0.4}"
    assert end(start(run_dir, "train(1.5, 4)", settings)) == (0, "")


def test_clean_run_leaves_nothing(run_dir: pathlib.Path) -> None:
    then = "assert os.listdir(run_dir + '/stacks'); train(0.0, 4)"
    process = start(run_dir, then)
    assert end(process) == (0, "")
    assert {path.name for path in run_dir.iterdir()} == {
        "config.json",
        "status.json",
        "tmp",
    }
    assert not list((run_dir / "tmp").iterdir())
    assert status.read(str(run_dir / "status.json")) == status.Status(
        process.pid, 3, -1, LIMIT
    )


def test_a_crash_and_an_abort_leave_stacks(run_dir: pathlib.Path) -> None:
    crash = "train(0, 3); ctypes.string_at(0)"
    assert end(start(run_dir, crash))[0] == -signal.SIGSEGV
    process = start(run_dir, "train(0, 3); stuck_in_c()")
    assert process.stdout.read(1) == "."
    process.send_signal(signal.SIGABRT)
    assert end(process)[0] == -signal.SIGABRT
    # What the first left is not written over.
    first, second = sorted((run_dir / "stacks").iterdir())
    assert (first.name, second.name) == ("worker-0-1.txt", "worker-0-2.txt")
    assert "in string_at\n" in first.read_text()
    assert "in stuck_in_c\n" in second.read_text()
    assert "in wait_in_vain\n" in second.read_text()


def test_empty_file_of_a_killed_process_is_taken(run_dir: pathlib.Path) -> None:
    then = "train(0, 3); stuck_in_c()"
    settings = "{'hang_timeout_secs': 900.0}"
    first, second = (start(run_dir, then, settings) for _ in range(2))
    for process in (first, second):
        assert process.stdout.read(1) == "."
    names = ["worker-0-1.txt", "worker-0-2.txt"]
    assert sorted(os.listdir(run_dir / "stacks")) == names
    for process in (first, second):
        process.kill()
        end(process)
    assert end(start(run_dir, "train(0, 3)")) == (0, "")
    assert os.listdir(run_dir / "stacks") == ["worker-0-2.txt"]


def test_no_run_is_written_to(run_dir: pathlib.Path) -> None:
    """Until it is one: what was started by mistake leaves nothing there."""
    (run_dir / "config.json").unlink()
    settings = "{'hang_timeout_secs': 0.0, 'start_up_secs': 0.5}"
    code, printed = end(start(run_dir, "stuck_in_python()", settings))
    assert code == errors.HUNG
    assert str(run_dir / "tmp/dtrain-stacks-worker-0-") in printed
    assert "in stuck_in_python\n" in stacks(run_dir / "tmp")
    assert not (run_dir / "stacks").exists()


def test_crash_before_there_is_a_run(run_dir: pathlib.Path) -> None:
    (run_dir / "config.json").unlink()
    code, printed = end(start(run_dir, "ctypes.string_at(0)"))
    assert code == -signal.SIGSEGV
    assert "in string_at\n" in printed
    assert not (run_dir / "stacks").exists()
    assert not list((run_dir / "tmp").iterdir())


def test_stacks_move_to_the_run_when_there_is_one(
    run_dir: pathlib.Path,
) -> None:
    (run_dir / "config.json").unlink()
    begin = "open(run_dir + '/config.json', 'w').close(); train(0, 3)"
    code, _ = end(start(run_dir, f"{begin}; stuck_in_python()"))
    assert code == errors.HUNG
    assert "in stuck_in_python\n" in stacks(run_dir / "stacks")
    assert not list((run_dir / "tmp").iterdir())


# What is learned, by a clock that the test turns.


class Clock(watchdog._Clock):
    """Shows what the test says."""

    def __init__(self) -> None:
        super().__init__(period_secs=1.0)
        self.secs = 0.0

    def now(self) -> float:
        return self.secs

    def tick(self) -> None:
        pass


def learn(
    hang_timeout_secs: float, *beats: tuple[float, int], steps_per_loop: int = 1
) -> list[float]:
    """Returns the limit after each beat, by its seconds and its step."""
    dog = watchdog.Watchdog(
        "none/stacks/worker-0", hang_timeout_secs, steps_per_loop=steps_per_loop
    )
    clock = Clock()
    dog._clock = clock
    limits = [dog.limit_secs]
    for pause, step in beats:
        clock.secs += pause
        dog.beat(step, -1)
        limits.append(dog.limit_secs)
    return limits


START_UP = watchdog.START_UP_SECS


def test_limit_is_learned() -> None:
    # Built after 100 s, compiled after 20 s; then loops of steps.
    beats = ((100, 0), (20, 1), (1, 2), (5, 3), (9, 4), (9, 5))
    limits = learn(0.0, *beats)
    assert limits == [START_UP, START_UP, START_UP, 60, 60, 90, 90]
    # What takes long to compile once may do so again.
    assert learn(0.0, (1, 0), (300, 1), (1, 2))[-1] == 600
    # A picture, or a save, of no step.
    assert learn(0.0, (1, 0), (1, 1), (1, 2), (30, 2))[-1] == 300


def test_limit_allows_for_a_whole_loop() -> None:
    """One step takes two seconds, and the next loop may be of fifty."""
    beats = ((1, 7), (20, 8), (4, 10))
    limits = learn(0.0, *beats, steps_per_loop=50)
    assert limits == [START_UP, START_UP, START_UP, 1000]
    # Back to step 8, as after a divergence, which took a second.
    beats = (*beats, (1, 8), (2, 9))
    assert learn(0.0, *beats, steps_per_loop=4)[-1] == 80


def test_limit_that_is_given_holds_after_the_first_loop() -> None:
    limits = learn(7.0, (1, 0), (500, 1), (5, 2), (50, 3))
    assert limits == [START_UP, START_UP, 7, 7, 7]


def test_clock_stands_still_with_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    clock = watchdog._Clock(period_secs=1.0)
    for _ in range(5):
        now[0] += 1.0
        clock.tick()
    assert clock.now() == 5.0
    now[0] += 3600.0
    assert clock.now() == 7.0
    clock.tick()
    assert clock.now() == 7.0
    now[0] += 0.5
    assert clock.now() == 7.5


# In this process.


def test_notice_is_told(tmp_path: pathlib.Path) -> None:
    notice = ["", False]
    path = str(tmp_path / "status.json")
    dog = watchdog.Watchdog(
        f"{tmp_path}/stacks/worker-0",
        0.0,
        path,
        lambda: (str(notice[0]), bool(notice[1])),
        period_secs=0.1,
    )
    was_enabled = faulthandler.is_enabled()
    dog.start()
    notice[:] = ["the stop file", True]
    deadline = time.monotonic() + 30
    while True:
        told = status.read(path)
        if told and told.notice:
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert told == status.Status(
        os.getpid(), -1, -1, dog.limit_secs, "the stop file", True
    )
    assert told.limit_secs < math.inf
    dog.close()
    dog.close()
    assert faulthandler.is_enabled() == was_enabled
    assert sorted(os.listdir(tmp_path)) == ["status.json"]


def test_full_disk_for_the_status_is_survived(tmp_path: pathlib.Path) -> None:
    dog = watchdog.Watchdog(
        f"{tmp_path}/stacks/worker-0", 0.0, f"{tmp_path}/none/status.json"
    )
    dog.start()
    dog.beat(0, -1)
    dog.close()


def test_patience_allows_as_much_as_a_start_up(tmp_path: pathlib.Path) -> None:
    dog = watchdog.Watchdog(
        str(tmp_path / "stacks" / "worker-0"), 0.5, start_up_secs=30.0
    )
    dog.start()
    for step in range(3):
        dog.beat(step, -1)
    assert dog.limit_secs == 0.5
    with dog.patience():
        assert dog.limit_secs == 30.0
        time.sleep(2.5)
    assert dog.limit_secs == 0.5
    dog.close()


def test_a_full_disk_is_no_silence(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "status.json"
    dog = watchdog.Watchdog(str(tmp_path / "worker-0"), 0.0, str(path))
    dog.tell()
    os.utime(path, (0, 0))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(status, "write", full)
    dog.tell()
    assert path.stat().st_mtime > 0
