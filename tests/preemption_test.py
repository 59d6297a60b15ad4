"""A signal sets a flag, and the second one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dtrain import preemption
from tests import runs

SLEEPER = """
import os, time
from dtrain import preemption
watcher = preemption.Watcher()
watcher.arm()
print("armed", flush=True)
while not watcher.requested:
    time.sleep(0.01)
print("saw", watcher.notice, flush=True)
time.sleep(60)
"""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER],
        env=runs.environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "armed\n"
        yield process
        process.kill()


def test_second_interrupt_ends(sleeper: subprocess.Popen[str]) -> None:
    sleeper.send_signal(signal.SIGINT)
    assert sleeper.stdout.readline() == "saw SIGINT\n"
    sleeper.send_signal(signal.SIGINT)
    assert sleeper.wait(30) == -signal.SIGINT


def test_terminate_may_come_twice(sleeper: subprocess.Popen[str]) -> None:
    sleeper.send_signal(signal.SIGTERM)
    assert sleeper.stdout.readline() == "saw SIGTERM\n"
    sleeper.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        sleeper.wait(0.5)


def test_previous_handler_is_called_and_comes_back() -> None:
    called = []
    before = signal.signal(signal.SIGTERM, lambda *_: called.append("previous"))
    try:
        watcher = preemption.Watcher()
        watcher.arm()
        os.kill(os.getpid(), signal.SIGTERM)
        assert watcher.requested
        assert called == ["previous"]
        watcher.disarm()
        os.kill(os.getpid(), signal.SIGTERM)
        assert called == ["previous", "previous"]
    finally:
        signal.signal(signal.SIGTERM, before)
