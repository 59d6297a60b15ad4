"""Warm spares: processes that have imported everything, and wait.

One for each worker of this machine. It takes the worker's place at the next
start, which then need not wait for the import of TensorFlow; see
`dtrain.resilience.standby` for its side. A spare that is dead or not yet warm
is no spare: the start is then a cold one.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

from dtrain.resilience import standby
from dtrain.storage import host_memory
from launch.keep import worker

# How long a worker makes steps before it gets one: a run of seconds needs none,
# and a worker that fails at once would fail again.
SETTLED_SECS = 5.0

# Memory that must be free where one is started. It takes a quarter of a GiB of
# its own, and maps files that the worker has mapped already.
_LEAST_FREE_BYTES = 2 << 30

# If so many died by themselves, the next would, too.
_MOST_DEAD = 3

# A warm one reads at once. One that was stopped, or is swapped out, may not.
_CALL_SECS = 1.0
_LOWEST = 19


class Spares:
    """The spares of the workers of this machine, until `close`.

    Args:
        is_on: whether any are kept.
    """

    def __init__(self, *, is_on: bool) -> None:
        self._is_on = is_on
        self._spares: dict[str, _Spare] = {}
        self._num_dead = 0
        self._has_told = False

    def __enter__(self) -> Spares:
        return self

    def __exit__(self, *_: object) -> None:
        while self._spares:
            self._spares.popitem()[1].close()

    def keep(self, process: worker.Process, steps_secs: float) -> None:
        """Sees to it that a worker has a spare, and that it lives.

        Args:
            process: the worker, which runs.
            steps_secs: for how long it has been making steps.
        """
        spare = self._spares.get(process.name)
        if spare is None:
            if self._is_on and steps_secs >= SETTLED_SECS:
                self._start(process)
        elif spare.is_dead:
            self._bury(process.name)
        elif spare.becomes_warm() and not self._has_told:
            self._has_told = True
            _say(
                f"{process.name} has a warm spare{spare.describe_memory()}; "
                "--nowarm_spare keeps none"
            )

    def take(self, process: worker.Process) -> subprocess.Popen[bytes] | None:
        """Calls the spare of a worker; returns it, or None if there is none.

        Args:
            process: what it is to be.
        """
        spare = self._spares.pop(process.name, None)
        return spare and spare.call(process)

    def _start(self, process: worker.Process) -> None:
        free_bytes = host_memory.available_bytes()
        if free_bytes >= _LEAST_FREE_BYTES:
            self._spares[process.name] = _Spare(process)
            return
        self._is_on = False
        _say(
            f"{process.name} has no warm spare: {free_bytes / 2**30:.1f} GiB "
            f"of memory are free, and {_LEAST_FREE_BYTES >> 30} should be"
        )

    def _bury(self, name: str) -> None:
        code = self._spares.pop(name).close()
        self._num_dead += 1
        self._is_on = self._num_dead < _MOST_DEAD
        then = "is kept" if self._is_on else "is not tried again"
        _say(f"the warm spare of {name} ended with {code}; another {then}")


class _Spare:
    """A process that becomes, or is, warm."""

    def __init__(self, process: worker.Process) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._child = worker.start(
                process, theirs.fileno(), {standby.VARIABLE: "1"}
            )
        self._is_warm = False
        self._nice = os.getpriority(os.PRIO_PROCESS, 0)
        # While it imports, the workers come first; and where memory runs
        # out, it is what the kernel takes.
        self._set_priority(
            _LOWEST if _may_go_back() else self._nice, os.SCHED_BATCH
        )
        self._oom_score = self._set_oom_score("1000")

    @property
    def is_dead(self) -> bool:
        return self._child.poll() is not None

    def becomes_warm(self) -> bool:
        """Returns whether it has become warm since the last look."""
        if self._is_warm:
            return False
        self._socket.setblocking(False)
        with contextlib.suppress(OSError):
            self._is_warm = bool(self._socket.recv(len(standby.WARM)))
        if self._is_warm:
            # It sleeps from now on, until it is called.
            self._set_priority(self._nice, os.SCHED_OTHER)
        return self._is_warm

    def call(self, process: worker.Process) -> subprocess.Popen[bytes] | None:
        """Has it become a worker; None if it cannot, and then it is ended."""
        self.becomes_warm()
        if self._is_warm and not self.is_dead:
            self._set_oom_score(self._oom_score)
            # If it was stopped.
            self._child.send_signal(signal.SIGCONT)
            call = standby.to_call(process.command, worker.environment(process))
            with contextlib.suppress(OSError), self._socket:
                self._socket.settimeout(_CALL_SECS)
                self._socket.sendall(call)
                return self._child
        self.close()
        return None

    def close(self) -> int:
        """Ends it, with what it has started; returns its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._socket.close()
        assert self._child.stdout is not None
        self._child.stdout.close()
        return self._child.wait()

    def describe_memory(self) -> str:
        """Says how much it takes, if that is known."""
        kib = dict.fromkeys(("Rss", "Anonymous"), math.nan)
        with contextlib.suppress(OSError):
            for line in self._proc("smaps_rollup").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in kib:
                    kib[name] = int(rest.split()[0])
        own, total = kib["Anonymous"] / 2**20, kib["Rss"] / 2**20
        if math.isnan(total):
            return ""
        return f": {total:.2f} GiB of memory, {own:.2f} of it its own alone"

    def _set_priority(self, nice: int, policy: int) -> None:
        """Sets it for each thread, for Linux has it so."""
        for path in self._proc("task").glob("*"):
            # It may have ended meanwhile.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, int(path.name), nice)
                os.sched_setscheduler(int(path.name), policy, os.sched_param(0))

    def _set_oom_score(self, score: str) -> str:
        """Sets for how willingly the kernel ends it; returns what it was."""
        path = self._proc("oom_score_adj")
        before = ""
        with contextlib.suppress(OSError):
            before = path.read_text()
            path.write_text(score)
        return before

    def _proc(self, name: str) -> pathlib.Path:
        return pathlib.Path(f"/proc/{self._child.pid}/{name}")


def _may_go_back() -> bool:
    """Returns whether the kernel lets this user undo a lower priority.

    Linux has a priority for each thread, so that one can try.
    """
    went_back = []

    def try_it() -> None:
        usual = os.getpriority(os.PRIO_PROCESS, 0)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, min(usual + 1, _LOWEST))
            os.setpriority(os.PRIO_PROCESS, 0, usual)
            went_back.append(True)

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    return bool(went_back)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
