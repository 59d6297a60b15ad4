"""A file with a line for each step, of which none is lost, torn or doubled.

Lines that cannot be written wait in memory, and are written with the next. A
checkpoint has the size and the checksum that the file had at its step, with
which the file is compared when a run goes on from there.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dtrain.storage import files


class Found(NamedTuple):
    """The lines up to a step, and whether they are all that were written."""

    lines: bytes
    is_whole: bool


def find(
    candidates: Sequence[bytes], step: int, expected: Mapping[str, Any] | None
) -> Found:
    """Finds the lines up to a step.

    Args:
        candidates: contents of files, any of which may have them.
        step: lines of later steps are left out.
        expected: `bytes` and `sha256` of the lines; empty or None if that is
            not known.

    Returns:
        The lines of a candidate that has them all; if there is none, of the
        one with most lines that can be read and whose steps increase.
    """
    prefixes = [_prefix(data, step, expected) for data in candidates]
    whole = [lines for lines in prefixes if lines is not None]
    if whole:
        return Found(max(whole, key=len), is_whole=True)
    salvaged = [_salvage(data, step) for data in candidates]
    return Found(max(salvaged, key=len, default=b""), is_whole=False)


def _prefix(
    data: bytes, step: int, expected: Mapping[str, Any] | None
) -> bytes | None:
    if expected:
        lines = data[: expected["bytes"]]
        is_right = hashlib.sha256(lines).hexdigest() == expected["sha256"]
        return lines if is_right else None
    end = newest = 0
    for line in io.BytesIO(data):
        # A kill may leave the last one unfinished.
        if not line.endswith(b"\n"):
            break
        number = _step_of(line)
        if number is None:
            return None
        if number > step:
            break
        end += len(line)
        newest = number
    return data[:end] if newest == step else None


def _salvage(data: bytes, step: int) -> bytes:
    kept, newest = [], 0
    for line in io.BytesIO(data):
        number = _step_of(line)
        if number is not None and newest < number <= step:
            kept.append(line)
            newest = number
    return b"".join(kept)


def _step_of(line: bytes) -> int | None:
    """Returns the step of a whole line; None of anything else."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if line.endswith(b"\n") and type(step) is int else None


def last_step(lines: bytes) -> int | None:
    """Returns the step of the last of some lines; 0 if there are none.

    Args:
        lines: whole ones.
    """
    *_, last = lines.splitlines(keepends=True) or [b'{"step": 0}\n']
    return _step_of(last)


def put_aside(path: str, directory: str) -> str:
    """Moves a damaged file where nothing reads it; returns its new path.

    Args:
        path: of the file.
        directory: where it is moved to; made if it is not there.

    Raises:
        OSError: the disk or the store is at fault.
    """
    stem, ending = os.path.splitext(os.path.basename(path))
    taken = files.names(directory)
    name, number = f"{stem}{ending}", 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}{ending}"
    files.make_directory(directory)
    files.move(path, f"{directory}/{name}")
    return f"{directory}/{name}"


class Log:
    """A local file to which lines are added; any thread may call it.

    Attributes:
        path: of the file.
        failure: why the last write failed; "" if it did not.
    """

    def __init__(
        self, path: str, content: bytes, *, is_temporary: bool = False
    ) -> None:
        """Goes on after what the file holds.

        Args:
            path: of the file; it need not be there.
            content: what it holds; more is cut off, anything else replaced.
            is_temporary: whether its directory may be tidied up, and is made
                again. That of a run is not: a person has removed it.

        Raises:
            OSError: the disk is at fault.
        """
        self.path = path
        self.failure = ""
        self._is_temporary = is_temporary
        self._sha256 = hashlib.sha256(content)
        # Of all lines so far, and of those that do not wait in memory.
        self._num_bytes = self._num_written = len(content)
        self._waiting = bytearray()
        self._lock = threading.Lock()
        held = files.read(path)
        if held is not None and held.startswith(content):
            self._cut_off()
        elif held is not None or content:
            files.write(path, content)

    @property
    def state(self) -> dict[str, Any]:
        """The `bytes` and `sha256` of all lines so far."""
        return {"bytes": self._num_bytes, "sha256": self._sha256.hexdigest()}

    def write(self, lines: bytes) -> None:
        """Adds lines; if that fails they wait for the next call.

        Args:
            lines: whole ones.
        """
        with self._lock:
            self._sha256.update(lines)
            self._num_bytes += len(lines)
            self._waiting += lines
        try:
            self._write_waiting()
        except OSError as error:
            self.failure = files.reason(error)

    def _write_waiting(self) -> None:
        with self._lock:
            is_gone = bool(self._num_bytes) and files.size(self.path) is None
            if is_gone and self._is_temporary:
                files.make_directory(os.path.dirname(self.path))
            if self._waiting or is_gone:
                self._cut_off()
                files.append(self.path, bytes(self._waiting))
                self._num_written += len(self._waiting)
                self._waiting.clear()
        self.failure = ""

    def _cut_off(self) -> None:
        """Removes what a write that failed left in the file."""
        if (files.size(self.path) or 0) > self._num_written:
            os.truncate(self.path, self._num_written)

    def sync(self) -> None:
        """Puts every line so far on the disk.

        Raises:
            OSError: it cannot be done.
        """
        self._write_waiting()
        # Another thread may have lines that are not in the file yet.
        if self._num_written:
            files.sync(self.path)
            files.sync(os.path.dirname(self.path))


class Spool:
    """A local directory that is copied to a remote one, in the background.

    Nothing can be added to an object of a store: each line would send the whole
    file again, and the training would wait for that.

    Attributes:
        path: of the local directory.
        failure: why the last copy failed; "" if it did not.
    """

    def __init__(self, remote: str) -> None:
        """Makes the local directory.

        Args:
            remote: the directory that its files are copied to.

        Raises:
            OSError: the disk is at fault.
        """
        self._remote = remote
        key = hashlib.sha256(f"{os.getuid()} {remote}".encode()).hexdigest()
        self._prefix = f"dtrain-metrics-{key[:16]}-"
        self._left = self._left_behind()
        self.path = tempfile.mkdtemp(prefix=self._prefix)
        self.failure = ""
        self._sent: dict[str, int] = {}
        self._sending = threading.Lock()
        self._is_wanted = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(
            target=self._keep_sending, name="dtrain-spool", daemon=True
        )
        self._thread.start()

    def _left_behind(self) -> list[str]:
        root = os.path.join(tempfile.gettempdir(), self._prefix)
        left = []
        for path in glob.glob(f"{glob.escape(root)}*"):
            # Anybody may put anything there, also a link that leads nowhere.
            with contextlib.suppress(OSError):
                known = os.lstat(path)
                is_own = known.st_uid == os.getuid()
                left += [path] * (is_own and stat.S_ISDIR(known.st_mode))
        return left

    def candidates(self, name: str) -> list[bytes]:
        """Returns the versions of a file from before this process.

        A process of this host that was killed may not have sent all of its
        own: that one is returned, too.

        Args:
            name: of the file.
        """
        paths = [os.path.join(path, name) for path in self._left]
        contents = map(files.read, [*paths, f"{self._remote}/{name}"])
        return [content for content in contents if content is not None]

    def forget(self) -> None:
        """Removes what killed processes of this host have left behind."""
        for path in self._left:
            shutil.rmtree(path, ignore_errors=True)

    def send(self) -> None:
        """Copies what is new; any thread may call it.

        Raises:
            OSError: the disk or the store is at fault.
        """
        with self._sending:
            for directory, _, names in os.walk(self.path):
                for name in sorted(names):
                    self._send_file(os.path.join(directory, name))
            self.failure = ""

    def _send_file(self, path: str) -> None:
        data, name = files.read(path) or b"", os.path.relpath(path, self.path)
        if name.endswith(".jsonl"):
            # Another thread may be in the middle of a line.
            data = data[: data.rfind(b"\n") + 1]
        if self._sent.get(name) != len(data):
            files.write(f"{self._remote}/{name}", data)
            self._sent[name] = len(data)

    def send_soon(self) -> None:
        """Has the background copy what is new."""
        self._is_wanted.set()

    def _keep_sending(self) -> None:
        is_last = False
        while not is_last:
            self._is_wanted.wait()
            self._is_wanted.clear()
            is_last = self._is_closed
            try:
                self.send()
            except OSError as error:
                self.failure = files.reason(error)

    def close(self, patience_secs: float = 30.0) -> None:
        """Copies what is new, and removes the local directory.

        If it cannot be copied the directory stays, for the next process of
        this host.

        Args:
            patience_secs: how long it waits for a store.
        """
        self._is_closed = True
        self._is_wanted.set()
        self._thread.join(patience_secs)
        if not self._thread.is_alive() and not self.failure:
            shutil.rmtree(self.path, ignore_errors=True)
