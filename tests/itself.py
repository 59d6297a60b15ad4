"""Says what it was started as, and ends in one of several ways.

    python -m tests.itself END

A fork of `tests.fork_server` must say and do what a true start does.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable

import numpy as np


def _open_files() -> list[tuple[int, str]]:
    """What is open beside what TensorFlow keeps open: numbers and names."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.exists(path) or os.path.islink(path):
            target = os.readlink(path)
            # Which pipe it is differs, and so does the listing of this folder.
            kind = target.partition(":")[0]
            if not target.startswith(f"/proc/{os.getpid()}"):
                found.append((int(name), kind))
    return sorted(found)


def _situation() -> dict[str, object]:
    """What a program can see of how it was started."""
    import tensorflow as tf

    return {
        "argv": sys.argv,
        "orig_argv": sys.orig_argv[1:],
        "path": sys.path,
        "directory": os.getcwd(),
        "environment": dict(os.environ),
        "group": os.getpgid(0),
        "session": os.getsid(0),
        "files": _open_files(),
        "is_main": sys.modules["__main__"]._situation is _situation,
        "signals": [
            str(signal.getsignal(each)) for each in signal.valid_signals()
        ],
        "blocked": [*signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        "threads": [each.name for each in threading.enumerate()],
        "buffers": [sys.stdout.line_buffering, sys.stderr.line_buffering],
        "encodings": [sys.stdout.encoding, sys.stderr.encoding],
        "devices": len(tf.config.list_physical_devices()),
    }


def _drawn() -> list[float]:
    """What nobody may know before."""
    return [random.random(), float(np.random.random())]


def _raise() -> None:
    raise ValueError("as it was told")


def _with_thread() -> None:
    # The interpreter waits for it.
    def speak() -> None:
        time.sleep(0.2)
        print("the thread", flush=True)

    threading.Thread(target=speak).start()


ENDS: dict[str, Callable[[], object]] = {
    "returns": lambda: None,
    "tells": lambda: print(json.dumps(_situation())),
    "exits": lambda: sys.exit(75),
    "exits with words": lambda: sys.exit("some words"),
    "raises": _raise,
    "is interrupted": lambda: signal.raise_signal(signal.SIGINT),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "leaves": lambda: os._exit(3),
    "has a thread": _with_thread,
}


def main() -> None:
    """Prints who it is and what it has drawn, and ends."""
    atexit.register(print, "the end", flush=True)
    print(json.dumps([os.getpid(), *_drawn()]), flush=True)
    ENDS[sys.argv[1]]()


if __name__ == "__main__":
    main()
