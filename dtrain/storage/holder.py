"""Which process holds a run: how it is written down, and whether it lives."""

from __future__ import annotations

import json
import os
import pathlib
import secrets
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

from dtrain.errors import UserError

_NUMBERS = ("pid", "user", "supervisor")


class Holder(NamedTuple):
    """A process.

    Attributes:
        host: name of its host.
        pid: its number there.
        key: random, and no other process's.
        machine: no other host, and no other container that numbers processes,
            has the same; "" if unknown.
        started: when it started, in the kernel's ticks since the boot.
        user: number of the user that it belongs to; -1 if unknown.
        supervisor: number of the process that keeps it alive; 0 if none does.
        supervisor_started: when that one started.
    """

    host: str
    pid: int
    key: str
    machine: str
    started: str
    user: int = -1
    supervisor: int = 0
    supervisor_started: str = ""

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"

    @classmethod
    def this(cls, environment: Mapping[str, str] = os.environ) -> Holder:
        """Returns this process.

        Args:
            environment: the variables of this process.
        """
        supervisor = environment.get("DTRAIN_SUPERVISOR_PID", "")
        is_number = supervisor.isascii() and supervisor.isdigit()
        number = int(supervisor) if is_number and len(supervisor) < 16 else 0
        return cls(
            socket.gethostname(),
            os.getpid(),
            secrets.token_hex(8),
            machine(),
            started(os.getpid()),
            os.getuid(),
            number,
            started(number) if number else "",
        )

    @classmethod
    def parse(cls, values: Any) -> Holder:
        """Makes one of what `_asdict` returned; of an older release, too.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(values, dict):
            raise ValueError("not an object")
        try:
            holder = cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from error
        for name, value in holder._asdict().items():
            kind = int if name in _NUMBERS else str
            if type(value) is not kind:
                raise ValueError(f"{name} is {value!r}")
        if holder.pid < 1 or holder.supervisor < 0:
            raise ValueError("no number of a process")
        return holder

    @classmethod
    def decode(cls, data: bytes) -> Holder | None:
        """Reads one as it is written down; None if the bytes are none."""
        try:
            return cls.parse(json.loads(data))
        except (ValueError, RecursionError):
            return None

    def encode(self) -> bytes:
        """Returns what `decode` reads."""
        return (json.dumps(self._asdict()) + "\n").encode()

    def is_this(self) -> bool:
        """Says whether it is this process."""
        return (
            self._is_here()
            and self.pid == os.getpid()
            and self.started == started(self.pid)
        )

    def is_gone(self) -> bool:
        """Says whether the process is known to have ended."""
        return self._is_here() and _is_gone(self.pid, self.started)

    def is_orphan(self) -> bool:
        """Says whether it is this user's, lives, and has lost its supervisor.

        Such a process is to save and to end, and can do neither while it is
        stopped.
        """
        return (
            self._is_here()
            and self.user == os.getuid()
            and bool(self.supervisor)
            and _is_gone(self.supervisor, self.supervisor_started)
            and not _is_gone(self.pid, self.started)
        )

    def _is_here(self) -> bool:
        return bool(self.machine) and self.machine == machine()


def refusal(
    name: str, run_dir: str, holder: Holder | None, by: str
) -> UserError:
    """Says that a directory is taken.

    Args:
        name: of the setting that names it.
        run_dir: the directory.
        holder: who has it; None if that is unknown.
        by: what is held there, a lock or a lease.
    """
    if holder and holder.is_this():
        return UserError(
            f"this process saves in {name} ({run_dir}) already; close what "
            f"does, or name another {name}"
        )
    who = f": {holder} holds its {by}" if holder else ""
    return UserError(
        f"another process trains in {name} ({run_dir}){who}; stop it, or name "
        f"another {name}"
    )


def machine() -> str:
    """Returns what no other host or container has; "" if it is unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
        # Each container of a host numbers its processes anew.
        return f"{boot.strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(pid: int) -> str:
    """Returns when a process started; "" if it is not there, or not shown."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # Behind the name, which may hold anything.
    return text.rpartition(")")[2].split()[19]


def _is_gone(pid: int, since: str) -> bool:
    now = started(pid)
    if now:
        return now != since
    # With hidepid, /proc shows nobody else's.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
