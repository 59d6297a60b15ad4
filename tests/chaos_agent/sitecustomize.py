"""Does to the process that loads it what a file asks for.

Python imports this by itself when its directory is on PYTHONPATH, so `tests.
chaos` can break a real trainer from the inside. A command is the name of a
function below, in `$DTRAIN_CHAOS_DIR/<pid>`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from typing import Any, NoReturn

_wanted: set[str] = set()


def stuck() -> None:
    """The main thread sleeps for ever between two loops of steps."""
    _wanted.add("stuck")


def exception() -> None:
    """The main thread raises between two loops of steps."""
    _wanted.add("exception")


def stuck_data() -> None:
    """The next batch never comes."""
    _wanted.add("stuck_data")


def slow_disk() -> None:
    """Every sync takes a second more, for twenty seconds."""
    end, sync = time.monotonic() + 20, os.fsync

    def slow(file: int) -> None:
        if time.monotonic() < end:
            time.sleep(1)
        sync(file)

    os.fsync = slow


def clock(days: int = 1) -> None:
    """The clock on the wall is a day ahead."""
    now = time.time
    time.time = lambda: now() + 86400 * days


def clock_back() -> None:
    """The clock on the wall is set back a day."""
    clock(-1)


def gil() -> None:
    """No Python code runs any more: C code holds the interpreter's lock."""
    ctypes.PyDLL(None).sleep(100_000)


def abort() -> NoReturn:
    """The process ends as by an assertion in C++."""
    os.abort()


def _interfere() -> None:
    """Puts the hooks into the trainer, when it is there."""
    while not hasattr(sys.modules.get("dtrain.train"), "train"):
        time.sleep(0.05)
    from dtrain import train
    from dtrain.data import pipeline

    run_steps, make_dataset = train._run_steps, pipeline.make_dataset_of_part

    def run(*args: Any) -> Any:
        if "exception" in _wanted:
            raise RuntimeError("chaos: an exception in the loop")
        while "stuck" in _wanted:
            time.sleep(1)
        return run_steps(*args)

    def make(*args: Any) -> Any:
        import tensorflow as tf

        def look() -> int:
            while "stuck_data" in _wanted:
                time.sleep(1)
            return 0

        def wait(*parts: Any) -> pipeline.Batch:
            [batch] = parts if len(parts) == 1 else [pipeline.Batch(*parts)]
            looked = tf.numpy_function(look, [], tf.int64)
            with tf.control_dependencies([looked]):
                return tf.nest.map_structure(tf.identity, batch)

        return make_dataset(*args).map(wait)

    train._run_steps, pipeline.make_dataset_of_part = run, make


def _obey(directory: str) -> None:
    path = os.path.join(directory, str(os.getpid()))
    while True:
        time.sleep(0.05)
        with contextlib.suppress(FileNotFoundError):
            with open(path) as file:
                command = file.read()
            os.remove(path)
            globals()[command]()


if os.environ.get("DTRAIN_CHAOS_DIR") and "dtrain.main" in " ".join(
    sys.orig_argv
):
    for target, arguments in (
        (_interfere, ()),
        (_obey, (os.environ["DTRAIN_CHAOS_DIR"],)),
    ):
        threading.Thread(target=target, args=arguments, daemon=True).start()
