"""What may tell a process to end: each source of notices, and where it applies.

A source is a small class with one method. If the environment says whether it
applies, it has a row in `SOURCES`. It is asked again and again, on a thread of
its own if an answer may take long.
"""

from __future__ import annotations

import abc
import contextlib
import http.client
import math
import os
import pathlib
import sys
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

_TICK_SECS = 0.5
_REQUEST_SECS = 1.0

_VENDOR = pathlib.Path("/sys/class/dmi/id/sys_vendor")
_EC2_URL = "http://169.254.169.254"
_EC2_EVERY_SECS = 5.0
# The longest allowed; a new token for each request would be refused in time.
_EC2_TOKEN_SECS = 21600

_GCE_HOST = "metadata.google.internal"
_GCE_PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
_GCE_HEADERS = {"Metadata-Flavor": "Google"}
_GCE_EVERY_SECS = 1.0
_GCE_BACKOFF_SECS = 30.0
# The value of each key that means the end. MIGRATE_ON_HOST_MAINTENANCE does
# not: the machine runs while it is moved.
_GCE_KEYS = {
    "instance/preempted": "TRUE",
    "instance/maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE",
}

STOP_FILE = "the stop file"

# An allocation ends for all its processes at once, and a save may be slow.
_LEAST_LEAD_SECS = 60.0


class Notice(NamedTuple):
    """That this process is to end.

    Attributes:
        name: of what told it.
        is_over: whether a new start on this machine is pointless.
        has_deadline: whether it is killed `grace_secs` later.
    """

    name: str
    is_over: bool
    has_deadline: bool


class Source(abc.ABC):
    """Something that may tell this process to end.

    Attributes:
        every_secs: seconds until it is to be asked again.
        is_slow: whether an answer may take long, from a disk or a server.
    """

    every_secs = _TICK_SECS
    is_slow = False

    @abc.abstractmethod
    def look(self) -> Notice | None:
        """Asks once; None if this process may go on. Must not raise."""


class TimeLimit(Source):
    """A moment that was set beforehand.

    Attributes:
        secs: from when it was set; by a clock that nobody sets.
    """

    def __init__(self, secs: float, notice: Notice) -> None:
        """Sets it, with the notice that is due then."""
        self.secs = secs
        self._end = time.monotonic() + secs
        self._notice = notice

    def look(self) -> Notice | None:
        """Looks at the clock; see `Source.look`."""
        return self._notice if time.monotonic() >= self._end else None


class Launcher(Source):
    """The launcher that started this process, and may be gone."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def look(self) -> Notice | None:
        """Looks who the parent is; see `Source.look`."""
        if os.getppid() == self._pid:
            return None
        return Notice("the launcher is gone", False, True)


class StopFile(Source):
    """A file that a person made, to end the run."""

    is_slow = True

    def __init__(
        self, path: str, every_secs: float, exists: Callable[[str], bool]
    ) -> None:
        """Looks at nothing yet.

        Args:
            path: of the file.
            every_secs: seconds between two looks.
            exists: tells whether there is one; it must not raise.
        """
        self.every_secs = every_secs
        self._path = path
        self._exists = exists

    def look(self) -> Notice | None:
        """Looks for the file; see `Source.look`."""
        if not self._exists(self._path):
            return None
        return Notice(STOP_FILE, True, False)


class GceKey(Source):
    """A key of the metadata server of Google Compute Engine.

    Each key is a source of its own, for one may hang.
    """

    is_slow = True

    def __init__(self, host: str, key: str, value: str) -> None:
        """Asks nothing yet.

        Args:
            host: of the metadata server.
            key: as in `instance/preempted`.
            value: that means the end.
        """
        self.every_secs = self._backoff_secs = _GCE_EVERY_SECS
        self._host = host
        self._key = key
        self._value = value

    def look(self) -> Notice | None:
        """Asks the server; see `Source.look`."""
        path = f"/computeMetadata/v1/{self._key}"
        status, value = _request("GET", self._host, None, path, _GCE_HEADERS)
        if status == 200:
            self.every_secs = self._backoff_secs = _GCE_EVERY_SECS
        else:
            self.every_secs = self._backoff_secs
            self._backoff_secs = min(2 * self._backoff_secs, _GCE_BACKOFF_SECS)
        if status != 200 or value != self._value:
            return None
        return Notice(f"GCE: {self._key}", True, True)


def _request(
    verb: str,
    host: str,
    port: int | None,
    path: str,
    headers: Mapping[str, str],
) -> tuple[int, str]:
    """Asks a metadata server; returns its text and its status, 0 for none.

    By `http.client`, which goes through no proxy.
    """
    try:
        connection = http.client.HTTPConnection(
            host, port, timeout=_REQUEST_SECS
        )
        with contextlib.closing(connection):
            connection.request(verb, path, headers=headers)
            response = connection.getresponse()
            text = response.read(1000).decode(errors="replace")
            return response.status, text.strip()
    except (OSError, ValueError, http.client.HTTPException):
        return 0, ""


class Ec2Spot(Source):
    """The notice that an EC2 spot instance gets two minutes before its end.

    It is `spot/instance-action` of the instance's metadata, version 2, which
    wants a token first; the document is not there before.
    """

    is_slow = True
    every_secs = _EC2_EVERY_SECS

    def __init__(self, url: str) -> None:
        """Asks nothing yet.

        Args:
            url: of the metadata server, without a path.
        """
        self._url = url
        self._token = ""
        self._token_secs = -math.inf

    def look(self) -> Notice | None:
        """Asks the server; see `Source.look`."""
        now = time.monotonic()
        if now - self._token_secs > _EC2_TOKEN_SECS / 2:
            headers = {
                "X-aws-ec2-metadata-token-ttl-seconds": str(_EC2_TOKEN_SECS)
            }
            status, self._token = self._ask("PUT", "api/token", headers)
            if status != 200:
                return None
            self._token_secs = now
        path = "meta-data/spot/instance-action"
        headers = {"X-aws-ec2-metadata-token": self._token}
        status, text = self._ask("GET", path, headers)
        if status == 401:
            self._token_secs = -math.inf
        if status != 200 or not any(
            action in text for action in ("terminate", "stop", "hibernate")
        ):
            return None
        return Notice("EC2: spot/instance-action", True, True)

    def _ask(
        self, verb: str, path: str, headers: Mapping[str, str]
    ) -> tuple[int, str]:
        try:
            parts = urllib.parse.urlsplit(self._url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            return 0, ""
        return _request(verb, host, port, f"/latest/{path}", headers)


# Which of them the environment names.

Environment = Mapping[str, str]


def _launcher(environment: Environment, grace_secs: float) -> list[Source]:
    del grace_secs
    pid = _number(environment, "DTRAIN_SUPERVISOR_PID")
    return [Launcher(pid)] if pid else []


def _slurm(environment: Environment, grace_secs: float) -> list[Source]:
    """Finds the end of a Slurm allocation."""
    name = "SLURM_JOB_END_TIME"
    end = _number(environment, name)
    if end is None:
        return []
    # Computed once, for the wall clock may jump.
    left = end - time.time()
    if left <= 0:
        _ignore(name, environment[name], "a time to come")
        return []
    # Or a short one would end before its first step, and begin again for ever.
    lead = min(max(_LEAST_LEAD_SECS, 2 * grace_secs), left / 2)
    notice = Notice("the end of the Slurm allocation", True, True)
    return [TimeLimit(left - lead, notice)]


def _gce(environment: Environment, grace_secs: float) -> list[Source]:
    """Finds the keys to ask the metadata server for: none outside GCE."""
    del grace_secs
    if environment.get("NO_GCE_CHECK", "").lower() == "true":
        return []
    host = environment.get("GCE_METADATA_HOST")
    if not host and not _holds(_GCE_PRODUCT, "Google Compute Engine"):
        return []
    return [
        GceKey(host or _GCE_HOST, key, value)
        for key, value in _GCE_KEYS.items()
    ]


def _ec2(environment: Environment, grace_secs: float) -> list[Source]:
    """Finds the metadata server of an EC2 instance, by the SDK's variables."""
    del grace_secs
    if environment.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return []
    url = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
    if not url and not _holds(_VENDOR, "Amazon EC2"):
        return []
    return [Ec2Spot(url or _EC2_URL)]


def _holds(path: pathlib.Path, words: str) -> bool:
    try:
        return words in path.read_text(errors="replace")
    except OSError:
        return False


# Each is called with the environment and the seconds of grace.
SOURCES: Sequence[Callable[[Environment, float], list[Source]]] = (
    _launcher,
    _slurm,
    _gce,
    _ec2,
)


def of_environment(environment: Environment, grace_secs: float) -> list[Source]:
    """Finds all sources that apply to this process.

    Args:
        environment: its variables.
        grace_secs: between a notice and the kill that follows it.
    """
    return [
        source for find in SOURCES for source in find(environment, grace_secs)
    ]


def _number(environment: Environment, name: str) -> int | None:
    """Reads a positive whole number; None, and a line, for anything else."""
    text = environment.get(name, "")
    if not text:
        return None
    # No time and no process has more digits.
    if text.isascii() and text.isdigit() and len(text) < 16 and int(text):
        return int(text)
    _ignore(name, text, "a whole number")
    return None


def _ignore(name: str, value: str, rule: str) -> None:
    print(
        f"{name} ({value[:80]!r}) is ignored: it should be {rule}",
        file=sys.stderr,
        flush=True,
    )
