"""Who trains in a run directory: one process at a time.

On a disk the kernel keeps a lock on `run_dir/.lock`, and drops it with the
process, however that ends. On an object store, and on a disk without locks,
there is a lease; see `lease`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

from dtrain.errors import StorageError, UserError
from dtrain.storage import access, files, locks
from dtrain.storage.holder import Holder, refusal
from dtrain.storage.lease import LEASE_SECS, Clock, Lease, Seen, Watch

# As long as a step and a save to a slow disk may take.
_ORPHAN_SECS = 120.0
_POLL_SECS = 0.2
_MAX_BYTES = 4096


class Claim(Protocol):
    """What says whether a run directory is still this process's own."""

    def raise_if_lost(self) -> None:
        """Raises if the run is not this process's own any more.

        Any thread may call it, as before each commit.

        Raises:
            UserError: another process has it, or the directory is not the one
                any more that was claimed.
            StorageError: another process may have it.
        """


def _say(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def claim(
    run_dir: str,
    *,
    name: str = "run_dir",
    lease_secs: float = LEASE_SECS,
    clock: Clock | None = None,
    report: Callable[[str], object] = _say,
) -> Iterator[Claim]:
    """Keeps a second process out of a run directory; the chief calls this.

    Args:
        run_dir: the directory; made if it is not there.
        name: of the setting that names it.
        lease_secs: where there is a lease, how long a process that does not
            renew it is waited for.
        clock: the time, for a lease; None is this host's.
        report: called with a line before it waits.

    Yields:
        The claim, which ends with the block.

    Raises:
        UserError: another process trains in it.
        StorageError: the store does not answer, or a process that is about to
            end does not.
    """
    with contextlib.ExitStack() as stack:
        if not files.is_remote(run_dir):
            access.make(name, run_dir)
            lock = _Lock(run_dir, name)
            stack.callback(lock.close)
            if lock.acquire(report):
                yield lock
                return
            report(
                f"{name} ({run_dir}) is on a disk without locks; a lease is "
                "taken there"
            )
        lease = Lease(run_dir, name, lease_secs, clock or Clock(), report)
        stack.callback(lease.release)
        lease.acquire()
        yield lease


class _Lock:
    """A claim by a lock of the kernel."""

    def __init__(self, run_dir: str, name: str) -> None:
        self._run_dir = run_dir
        self._name = name
        self._path = os.path.join(run_dir, ".lock")
        self._file = -1
        _locks.add(self)

    def acquire(self, report: Callable[[str], object]) -> bool:
        """Takes the lock; False if the disk has none.

        Raises:
            UserError: another process has it.
            StorageError: one that was to end does not.
        """
        while True:
            self.close()
            self._file = self._open()
            is_locked = self._wait(report)
            # Somebody may have removed the directory since it was opened.
            if not is_locked or self._is_there():
                break
        if is_locked:
            # For whoever waits; a disk that is full need not know.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, Holder.this().encode(), 0)
        return is_locked

    def _open(self) -> int:
        try:
            access.make(self._name, self._run_dir)
            # For writing, or a network disk gives no lock.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            return os.open(self._path, flags, 0o644)
        except OSError as error:
            failure = access.refusal(
                self._name, self._run_dir, "written to", error
            )
            raise failure from error

    def _wait(self, report: Callable[[str], object]) -> bool:
        """Takes the lock, from one that is about to end if need be."""
        # If a supervisor was killed, its workers are about to save and end.
        is_supervised = bool(os.environ.get("DTRAIN_SUPERVISOR_PID"))
        began, has_said = time.monotonic(), False
        while True:
            try:
                return locks.take(self._file)
            except BlockingIOError:
                holder = self._holder()
            is_orphan = holder is not None and holder.is_orphan()
            waited = time.monotonic() - began
            if not (is_orphan or (is_supervised and waited < _ORPHAN_SECS)):
                failure = refusal(self._name, self._run_dir, holder, "lock")
                raise failure
            if not has_said:
                report(
                    f"another process trains in {self._name} "
                    f"({self._run_dir}); waiting {_ORPHAN_SECS:.0f} s for "
                    f"{holder or 'it'} to end"
                )
                has_said = True
            if holder and is_orphan:
                self._end(holder, waited)
            time.sleep(_POLL_SECS)

    def _holder(self) -> Holder | None:
        try:
            return Holder.decode(os.pread(self._file, _MAX_BYTES, 0))
        except OSError:
            return None

    def _end(self, orphan: Holder, waited: float) -> None:
        """Lets an orphan save and end; ends it when it has had its time.

        Raises:
            StorageError: it does not even end by a kill.
        """
        if waited > 2 * _ORPHAN_SECS:
            raise StorageError(
                f"another process trains in {self._name} ({self._run_dir}): "
                f"{orphan} was killed and does not end, its disk may hang; run "
                "the same command again"
            )
        # It cannot see that its supervisor is gone while it is stopped.
        is_late = waited > _ORPHAN_SECS
        with contextlib.suppress(ProcessLookupError):
            os.kill(orphan.pid, signal.SIGKILL if is_late else signal.SIGCONT)

    def _is_there(self) -> bool:
        """Tells whether the path still names what is locked."""
        try:
            known = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            # The disk does not answer, which says nothing.
            return True
        mine = os.fstat(self._file)
        return (known.st_dev, known.st_ino) == (mine.st_dev, mine.st_ino)

    def raise_if_lost(self) -> None:
        """Raises if the directory is another one now; see `Claim`.

        Raises:
            UserError: it is.
        """
        if not self._is_there():
            raise UserError(
                f"{self._name} ({self._run_dir}) was moved or removed while "
                "this process trained in it; nothing more is written there: "
                f"bring it back, or give {self._name} its new place"
            )

    def close(self) -> None:
        """Drops the lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


_locks: weakref.WeakSet[_Lock] = weakref.WeakSet()


def _close_inherited() -> None:
    """Closes the locks of the process that this one was forked from.

    A lock is dropped with its last descriptor: a child, as a data loader's,
    would keep it for as long as it lives.
    """
    for lock in list(_locks):
        lock.close()


os.register_at_fork(after_in_child=_close_inherited)


def is_held(run_dir: str, watch: Watch | None = None) -> bool | None:
    """Tells whether a process trains in a directory; takes nothing.

    Args:
        run_dir: the directory.
        watch: of an earlier call, or None for the first; see `watch`.

    Returns:
        None if it takes another look, some seconds later, to tell.

    Raises:
        OSError: the disk or the store fails.
    """
    if not files.is_remote(run_dir):
        try:
            # Shared and for an instant: hardly ever in the way of a start.
            path = f"{run_dir}/.lock"
            with locks.held(path, os.O_RDONLY, shared=True) as is_known:
                if is_known:
                    return False
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
    seen = (watch or watch_of(run_dir)).look()
    return {Seen.HELD: True, Seen.UNCLEAR: None}.get(seen, False)


def watch_of(run_dir: str) -> Watch:
    """Returns what looks at the lease of a directory; see `is_held`."""
    return Watch(f"{run_dir.rstrip('/')}/lease.json", Clock())
