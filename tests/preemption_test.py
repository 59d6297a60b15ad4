"""A signal sets a flag, and the second one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_flag_then_end(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER],
        env=runs.environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "armed\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"saw {number.name}\n"
        process.send_signal(number)
        assert process.wait(30) == -number


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
