"""What is written on another thread, in which order, and what is not."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from dtrain.checkpoint.background import Writer


class Slow:
    """Jobs that are written when the test says so."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self._begun = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def job(self, name: str):  # noqa: ANN201
        def write() -> None:
            self._begun.release()
            self._go.acquire()
            self.written.append(name)

        return write

    def wait_until_begun(self) -> None:
        assert self._begun.acquire(timeout=10)

    def release(self, count: int) -> None:
        for _ in range(count):
            self._go.release()


def test_a_newer_one_replaces_one_that_waits() -> None:
    slow, writer = Slow(), Writer()
    assert writer.submit(slow.job("first"), keep=False)
    slow.wait_until_begun()
    assert writer.submit(slow.job("second"), keep=False)
    assert writer.submit(slow.job("third"), keep=False)
    slow.release(2)
    writer.close()
    assert slow.written == ["first", "third"]


def test_one_that_must_be_kept_replaces_one_that_need_not() -> None:
    slow, writer = Slow(), Writer()
    writer.submit(slow.job("first"), keep=False)
    slow.wait_until_begun()
    writer.submit(slow.job("backup"), keep=False)
    writer.submit(slow.job("checkpoint"), keep=True)
    assert not writer.submit(slow.job("newer backup"), keep=False)
    slow.release(2)
    writer.close()
    assert slow.written == ["first", "checkpoint"]


def test_two_that_must_be_kept_are_both_written() -> None:
    slow, writer = Slow(), Writer()
    writer.submit(slow.job("first"), keep=True)
    slow.wait_until_begun()
    writer.submit(slow.job("second"), keep=True)
    # The third has to wait until the first is done.
    threading.Timer(0.05, slow.release, (1,)).start()
    assert writer.submit(slow.job("third"), keep=True)
    assert slow.written == ["first"]
    slow.release(2)
    writer.close()
    assert slow.written == ["first", "second", "third"]


def fail() -> None:
    raise OSError("the disk is full")


def test_a_failure_reaches_the_caller_once() -> None:
    writer = Writer()
    writer.submit(fail, keep=True)
    writer.wait()
    with pytest.raises(OSError, match="the disk is full"):
        writer.raise_if_failed()
    writer.raise_if_failed()
    done = threading.Event()
    writer.submit(done.set, keep=True)
    writer.drain()
    assert done.is_set()
    writer.close()


def test_of_two_failures_the_caller_hears_of_both() -> None:
    writer = Writer()
    for _ in range(2):
        writer.submit(fail, keep=True)
    writer.wait()
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is full"):
            writer.raise_if_failed()
    writer.raise_if_failed()
    writer.close()


def test_close_never_returns_cleanly_after_a_failure() -> None:
    writer = Writer()
    writer.submit(fail, keep=True)
    with pytest.raises(OSError, match="the disk is full"):
        writer.close()
    writer.close()


def test_a_mistake_of_ours_is_no_exception() -> None:
    writer = Writer()
    writer.submit(lambda: [][0], keep=True)
    with pytest.raises(IndexError):
        writer.drain()


def test_room_for_what_must_be_kept() -> None:
    writer = Writer()
    gate = threading.Event()
    assert writer.wait_for_room(0.0)
    writer.submit(gate.wait, keep=True)
    while writer._waiting:
        time.sleep(0.01)
    assert writer.wait_for_room(0.0)
    writer.submit(lambda: None, keep=True)
    assert not writer.wait_for_room(0.05)
    gate.set()
    assert writer.wait_for_room(10.0)
    writer.close()


@pytest.mark.skipif(
    sys.platform != "linux", reason="a thread has no priority of its own"
)
def test_the_training_comes_first() -> None:
    """Before the thread that writes, and before those that it starts."""
    found: list[int] = []

    def look() -> None:
        thread = threading.get_native_id()
        found.append(os.getpriority(os.PRIO_PROCESS, thread))

    def write() -> None:
        look()
        beside = threading.Thread(target=look)
        beside.start()
        beside.join()

    writer = Writer()
    writer.submit(write, keep=True)
    writer.close()
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert found == [max(own, 10)] * 2
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
