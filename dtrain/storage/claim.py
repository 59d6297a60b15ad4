"""Who trains in a run directory: one process at a time.

On a disk the kernel keeps a lock, and drops it with the process, however that
ends. On an object store there is `run_dir/lease.json`, which says who holds the
run, and which that process renews as long as it lives. A process that finds a
lease watches it by its own clock for as long as the lease is good for: if it
changes, it is held; if not, its holder is dead, and it is taken over. There is
no compare-and-swap here for stores; so a claim is written, left alone for a
moment, and read again.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from dtrain.errors import StorageError, UserError
from dtrain.storage import access, files, locks

_LEASE_SECS = 30.0
# As long as a step and a save to a slow disk may take.
_ORPHAN_SECS = 120.0
_SETTLE_SECS = 1.0
_NUM_TRIES = 4
_MAX_BYTES = 64 * 1024


class Claim(Protocol):
    """What says whether a run directory is still this process's own."""

    def raise_if_lost(self) -> None:
        """Raises if the run is not this process's own any more.

        Raises:
            UserError: another process has it.
            StorageError: another process may have it.
        """


class Clock:
    """Time, as a claim needs it; tests have another."""

    def now(self) -> float:
        """Returns seconds from any one moment on."""
        return time.monotonic()

    def sleep(self, secs: float) -> None:
        """Waits for some seconds."""
        time.sleep(secs)


def _say(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def claim(
    run_dir: str,
    *,
    name: str = "run_dir",
    lease_secs: float = _LEASE_SECS,
    clock: Clock | None = None,
    report: Callable[[str], object] = _say,
) -> Iterator[Claim]:
    """Keeps a second process out of a run directory; the chief calls this.

    On a network disk without locks nobody is kept out.

    Args:
        run_dir: the directory; made if it is not there.
        name: of the setting that names it.
        lease_secs: on a store, how long a process that does not renew its
            lease is waited for.
        clock: the time; None is this host's.
        report: called with a line before it waits.

    Yields:
        The claim, which ends with the block.

    Raises:
        UserError: another process trains in it.
        StorageError: the store does not answer.
    """
    if files.is_remote(run_dir):
        lease = _Lease(run_dir, name, lease_secs, clock or Clock(), report)
        lease.acquire()
        try:
            yield lease
        finally:
            lease.release()
        return
    access.make(name, run_dir)
    with _locked(run_dir, name, report) as locked:
        yield locked


class _Lock:
    def raise_if_lost(self) -> None:
        """Does nothing: the kernel gives no lock away."""


@contextlib.contextmanager
def _locked(
    run_dir: str, name: str, report: Callable[[str], object]
) -> Iterator[_Lock]:
    path = os.path.join(run_dir, ".lock")
    try:
        # For writing, or a network disk gives no lock.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(
            f"{name} ({run_dir}) cannot be written to: {error.strerror}; "
            "name another one"
        ) from error
    try:
        _lock(file, run_dir, name, report)
        yield _Lock()
    finally:
        os.close(file)


def _lock(
    file: int, run_dir: str, name: str, report: Callable[[str], object]
) -> None:
    # If a supervisor was killed, its workers are about to save and end.
    is_supervised = bool(os.environ.get("DTRAIN_SUPERVISOR_PID"))
    end = time.monotonic() + (_ORPHAN_SECS if is_supervised else 0.0)
    has_said = False
    while True:
        try:
            locks.take(file)
            return
        except BlockingIOError as error:
            if time.monotonic() >= end:
                raise UserError(
                    f"another process trains in {name} ({run_dir}); stop it, "
                    f"or name another {name}"
                ) from error
        if not has_said:
            report(
                f"another process trains in {name} ({run_dir}); waiting "
                f"{_ORPHAN_SECS:.0f} s for it to end"
            )
            has_said = True
        time.sleep(0.2)


class Holder(NamedTuple):
    """A process.

    Attributes:
        host: name of its host.
        pid: its number there.
        key: random, and no other process's.
        machine: no other host, and no other container that numbers processes,
            has the same; "" if unknown.
        started: when it started, in the kernel's ticks since the boot.
    """

    host: str
    pid: int
    key: str
    machine: str
    started: str

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"

    @classmethod
    def this(cls) -> Holder:
        """Returns this process."""
        pid = os.getpid()
        return cls(
            socket.gethostname(),
            pid,
            secrets.token_hex(8),
            _machine(),
            _started(pid),
        )

    def is_gone(self) -> bool:
        """Says whether the process is known to have ended."""
        return (
            bool(self.machine)
            and self.machine == _machine()
            and self.started != _started(self.pid)
        )


def _machine() -> str:
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
        # Each container of a host numbers its processes anew.
        return f"{boot.strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # Behind the name, which may hold anything.
    return text.rpartition(")")[2].split()[19]


class _Written(NamedTuple):
    """A lease as it was read.

    Attributes:
        data: its bytes, which change when it is renewed.
        holder: None if the bytes do not say.
        term: how often the run had been claimed, with this claim.
        lease_secs: how long it is good for.
    """

    data: bytes
    holder: Holder | None = None
    term: int = 0
    lease_secs: float = _LEASE_SECS

    @classmethod
    def parse(cls, data: bytes) -> _Written:
        """Reads a lease, or as much of it as can be read."""
        try:
            values = json.loads(data)
            return cls(
                data,
                Holder(**values["holder"]),
                int(values["term"]),
                float(values["lease_secs"]),
            )
        except (ValueError, KeyError, TypeError):
            return cls(data)


class _Lease:
    """A claim on an object store."""

    def __init__(
        self,
        run_dir: str,
        name: str,
        lease_secs: float,
        clock: Clock,
        report: Callable[[str], object],
    ) -> None:
        self._run_dir = run_dir
        self._name = name
        self._path = f"{run_dir.rstrip('/')}/lease.json"
        self._lease_secs = lease_secs
        self._clock = clock
        self._report = report
        self._holder = Holder.this()
        self._term = 0
        self._num_renewals = 0
        self._renewed_at = 0.0
        self._taken_by: Holder | None = None
        self._failure = "the store does not answer"
        self._changed = threading.Condition()
        self._released = threading.Event()
        self._thread = threading.Thread(
            target=self._keep_renewing, name="dtrain-lease", daemon=True
        )

    def acquire(self) -> None:
        """Takes the lease, or raises UserError or StorageError."""
        lease = self._try(self._read)
        if lease and not (lease.holder and lease.holder.is_gone()):
            lease = self._watch(lease)
        self._term = lease.term + 1 if lease else 1
        self._try(self._write)
        self._clock.sleep(min(_SETTLE_SECS, self._lease_secs / 10))
        lease = self._try(self._read)
        if lease is None or lease.holder != self._holder:
            raise self._refusal(lease)
        self._thread.start()

    def _watch(self, first: _Written) -> _Written | None:
        """Waits until a lease is released, which gives None, or is dead.

        Raises:
            UserError: it is held.
        """
        self._report(
            f"waiting up to {first.lease_secs:g} s for the lease of "
            f"{first.holder or 'an unknown process'} on {self._run_dir}"
        )
        until = self._clock.now() + first.lease_secs
        lease: _Written | None = first
        # A look before the time is over does not show that it is dead.
        is_over = False
        while not is_over:
            self._clock.sleep(min(1.0, first.lease_secs / 10))
            is_over = self._clock.now() >= until
            lease = self._try(self._read)
            if lease is None:
                return None
            if lease.data != first.data:
                raise self._refusal(lease)
        return lease

    def _refusal(self, lease: _Written | None) -> UserError:
        who = lease.holder if lease and lease.holder else "an unknown process"
        return UserError(
            f"another process trains in {self._name} ({self._run_dir}): {who} "
            f"holds its lease; stop it, or name another {self._name}"
        )

    def _try(self, action: Callable[[], Any]) -> Any:
        """Does something with the store, again if it fails.

        Raises:
            UserError: the store refuses.
            StorageError: it fails again and again.
        """
        number = 1
        while True:
            try:
                return action()
            except OSError as error:
                mistake = access.explain(self._name, self._run_dir, error)
                if number == _NUM_TRIES or isinstance(mistake, UserError):
                    raise mistake from error
            self._clock.sleep(float(number))
            number += 1

    def _read(self) -> _Written | None:
        try:
            # As a part, for which TensorFlow needs no size: the one that it
            # remembers is seconds old, and another process writes here.
            return _Written.parse(files.read_part(self._path, 0, _MAX_BYTES))
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        began = self._clock.now()
        self._num_renewals += 1
        lease = {
            "holder": self._holder._asdict(),
            "term": self._term,
            "lease_secs": self._lease_secs,
            "num_renewals": self._num_renewals,
            # For people; no two clocks agree.
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        files.write(self._path, (json.dumps(lease, indent=2) + "\n").encode())
        self._renewed_at = began

    def _keep_renewing(self) -> None:
        while not self._released.wait(self._lease_secs / 3):
            try:
                self.renew()
            except OSError as error:
                # It is tried again, until `raise_if_lost` finds it too late.
                self._failure = files.reason(error)
            with self._changed:
                self._changed.notify_all()
            if self._taken_by:
                return

    def renew(self) -> None:
        """Renews the lease, unless another process has it.

        Raises:
            OSError: the store fails.
        """
        lease = self._read()
        # One of an earlier term, whose holder wrote late, is overwritten.
        is_newer = lease and lease.holder and lease.term >= self._term
        if lease and is_newer and lease.holder != self._holder:
            self._taken_by = lease.holder
        else:
            self._write()

    def _is_overdue(self) -> bool:
        return self._clock.now() - self._renewed_at > self._lease_secs

    def raise_if_lost(self) -> None:
        """Raises if another process has the lease, or may have it.

        Raises:
            UserError: another process has it.
            StorageError: it could not be renewed for as long as it is good.
        """
        if self._is_overdue():
            # The process may have been stopped; the store may be well.
            with self._changed:
                self._changed.wait_for(
                    lambda: self._taken_by or not self._is_overdue(),
                    self._lease_secs / 2,
                )
        if self._taken_by:
            raise UserError(
                f"another process trains in {self._name} ({self._run_dir}): "
                f"{self._taken_by} took its lease over from this one; name "
                f"another {self._name}"
            )
        if self._is_overdue():
            raise StorageError(
                f"{self._name} ({self._run_dir}): its lease could not be "
                f"renewed for {self._lease_secs:g} s, and another process may "
                f"take it ({self._failure}); run the same command again"
            )

    def release(self) -> None:
        """Gives the lease up; a process that waits for it has it at once."""
        self._released.set()
        self._thread.join(self._lease_secs / 3)
        # If this fails, the next process waits until the lease is over.
        with contextlib.suppress(OSError):
            lease = self._read()
            if lease and lease.holder == self._holder:
                files.remove(self._path)
