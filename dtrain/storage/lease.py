"""A claim where the kernel keeps no lock: a file that its holder renews.

A process that finds a lease watches it by its own clock for as long as the
lease is good for: if it changes, it is held; if not, its holder is dead, and it
is taken over. No store has a compare-and-swap here. So whoever writes a lease
leaves it alone for a moment and looks again, twice; and whoever took longer to
write than that moment, since it last saw the run free, may have come too late
for the other to see: it waits until the other must have seen it.
"""

from __future__ import annotations

import contextlib
import enum
import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from dtrain.errors import StorageError, UserError
from dtrain.storage import access, files
from dtrain.storage.holder import Holder, refusal

LEASE_SECS = 30.0
_SETTLE_SECS = 1.0
_NUM_TRIES = 4
_MAX_BYTES = 64 * 1024


class Clock:
    """Time, as a claim needs it; tests have another."""

    def now(self) -> float:
        """Returns seconds from any one moment on, which nobody sets."""
        return time.monotonic()

    def wall(self) -> float:
        """Returns the time of day, which also passes for a suspended VM."""
        return time.time()

    def sleep(self, secs: float) -> None:
        """Waits for some seconds."""
        time.sleep(secs)


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
    lease_secs: float = LEASE_SECS

    @classmethod
    def parse(cls, data: bytes) -> _Written:
        """Reads a lease, or as much of it as can be read."""
        try:
            values = json.loads(data)
            term, secs = values["term"], values["lease_secs"]
            if type(term) is not int or not 0 < secs <= 24 * 3600:
                return cls(data)
            return cls(data, Holder.parse(values["holder"]), term, float(secs))
        except (ValueError, KeyError, TypeError, RecursionError):
            return cls(data)


class Seen(enum.Enum):
    """What a look at a lease shows."""

    FREE = enum.auto()
    DEAD = enum.auto()
    HELD = enum.auto()
    UNCLEAR = enum.auto()


class Watch:
    """Looks at a lease from outside, until it is clear whether it is held.

    Attributes:
        first: the lease as it was at the first look; None if there was none.
        looked_at: when the last look began, by the clock.
    """

    def __init__(self, path: str, clock: Clock) -> None:
        """Looks at nothing yet.

        Args:
            path: of the lease.
            clock: the time.
        """
        self.first: _Written | None = None
        self.looked_at = 0.0
        self._path = path
        self._clock = clock
        self._until = math.inf

    def look(self) -> Seen:
        """Looks once.

        Raises:
            OSError: the store or the disk fails.
        """
        self.looked_at = self._clock.now()
        # A look before the time is over does not show that it is dead.
        is_over = self.looked_at >= self._until
        lease = read(self._path)
        if lease is None:
            return Seen.FREE
        if lease.holder and lease.holder.is_gone():
            self.first = self.first or lease
            return Seen.DEAD
        if self.first is None:
            self.first = lease
            self._until = self._clock.now() + lease.lease_secs
        if lease.data != self.first.data:
            self.first = lease
            return Seen.HELD
        return Seen.DEAD if is_over else Seen.UNCLEAR


def read(path: str) -> _Written | None:
    """Reads a lease; None if there is none.

    Raises:
        OSError: the store or the disk fails.
    """
    try:
        # As a part, for which TensorFlow needs no size: the one that it
        # remembers is seconds old, and another process writes here.
        return _Written.parse(files.read_part(path, 0, _MAX_BYTES))
    except FileNotFoundError:
        return None


class Lease:
    """A claim by a lease: `lease.json`, in a directory of a store or a disk."""

    def __init__(
        self,
        run_dir: str,
        name: str,
        lease_secs: float,
        clock: Clock,
        report: Callable[[str], object],
    ) -> None:
        """Claims nothing yet; see `claim.claim`."""
        self._run_dir = run_dir
        self._name = name
        self._path = f"{run_dir.rstrip('/')}/lease.json"
        self._lease_secs = lease_secs
        self._clock = clock
        self._report = report
        self._holder = Holder.this()
        self._term = 0
        self._num_renewals = 0
        self._renewed_at = self._renewed_wall = 0.0
        self._taken_by: Holder | None = None
        self._failure = "the store does not answer"
        self._changed = threading.Condition()
        self._released = threading.Event()
        self._thread = threading.Thread(
            target=self._keep_renewing, name="dtrain-lease", daemon=True
        )

    def acquire(self) -> None:
        """Takes the lease.

        Raises:
            UserError: another process holds it.
            StorageError: the store does not answer.
        """
        watch = Watch(self._path, self._clock)
        seen = self._try(watch.look)
        if seen is Seen.UNCLEAR:
            seen = self._wait(watch)
        if seen is Seen.HELD:
            raise self._refusal(watch.first)
        self._term = watch.first.term + 1 if watch.first else 1
        self._try(self._write)
        secs = min(_SETTLE_SECS, self._lease_secs / 10)
        if self._clock.now() - watch.looked_at > secs / 2:
            # Whoever saw it free at that time may hold it already. That one
            # sees this lease, and ends, when it renews its own.
            self._thread.start()
            self._settle(self._lease_secs)
        else:
            self._settle(secs)
            self._thread.start()

    def _wait(self, watch: Watch) -> Seen:
        """Waits until it is clear whether another holds the lease."""
        assert watch.first
        lease_secs = watch.first.lease_secs
        self._report(
            f"waiting up to {lease_secs:g} s for the lease of "
            f"{watch.first.holder or 'an unknown process'} on {self._run_dir}"
        )
        seen = Seen.UNCLEAR
        while seen is Seen.UNCLEAR:
            self._clock.sleep(min(1.0, lease_secs / 10))
            seen = self._try(watch.look)
        if seen is Seen.FREE:
            watch.first = None
        return seen

    def _settle(self, secs: float) -> None:
        """Leaves the lease alone for some seconds, and looks at it twice.

        Raises:
            UserError: it is another's.
            StorageError: the store does not answer.
        """
        for _ in range(2):
            self._clock.sleep(secs / 2)
            lease = self._try(lambda: read(self._path))
            if lease is None or lease.holder != self._holder:
                self._released.set()
                raise self._refusal(lease)

    def _refusal(self, lease: _Written | None) -> UserError:
        holder = lease.holder if lease else None
        return refusal(self._name, self._run_dir, holder, "lease")

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

    def _write(self) -> None:
        began, wall = self._clock.now(), self._clock.wall()
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
        self._renewed_at, self._renewed_wall = began, wall

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
        lease = read(self._path)
        # One of an earlier term, whose holder wrote late, is overwritten.
        is_newer = lease and lease.holder and lease.term >= self._term
        if lease and is_newer and lease.holder != self._holder:
            self._taken_by = lease.holder
        else:
            self._write()

    def _is_overdue(self) -> bool:
        """Tells whether another may have taken it for dead.

        While a virtual machine is suspended, only the time of day goes on. If
        somebody has set it, the next renewal shows that nothing has happened.
        """
        secs = max(
            self._clock.now() - self._renewed_at,
            self._clock.wall() - self._renewed_wall,
        )
        return secs > self._lease_secs

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
        if self._thread.is_alive():
            self._thread.join(self._lease_secs / 3)
        # If this fails, the next process waits until the lease is over.
        with contextlib.suppress(OSError):
            lease = read(self._path)
            if lease and lease.holder == self._holder:
                files.remove(self._path)
