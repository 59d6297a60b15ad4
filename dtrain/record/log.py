"""A file of lines, one for each step, of which none is lost, torn or twice.

What cannot be written waits in memory and is written with the next line. What
a checkpoint knows of the file at its step, its size and its checksum, is
compared when a run goes on from there.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dtrain.storage import files


class Found(NamedTuple):
    """What there is of the lines up to a step.

    Attributes:
        content: the lines.
        is_whole: whether they are all that was written.
    """

    content: bytes
    is_whole: bool


def find(
    candidates: Sequence[bytes], step: int, expected: Mapping[str, Any] | None
) -> Found:
    """Finds the lines up to a step.

    Args:
        candidates: contents of files, any of which may have them.
        step: later lines are left out.
        expected: `bytes` and `sha256` of the lines; empty or None if that is
            not known.

    Returns:
        The lines of a candidate that has them all, or else of the one that
        has most: those that can be read, and whose steps increase.
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
        if not line.endswith(b"\n"):
            # What a kill left unfinished.
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
    """Returns the step of a line; None if it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    is_line = line.endswith(b"\n") and isinstance(step, int)
    return step if is_line else None


def put_aside(path: str, directory: str) -> str:
    """Moves a damaged file where nothing reads it.

    Args:
        path: of the file.
        directory: where to; made if it is not there.

    Returns:
        Its path there.

    Raises:
        OSError: the disk or the store is at fault.
    """
    stem, ending = os.path.splitext(os.path.basename(path))
    there = files.names(directory)
    name, number = f"{stem}{ending}", 1
    while name in there:
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

    def __init__(self, path: str, content: bytes) -> None:
        """Goes on after what the file holds.

        Args:
            path: of the file; it need not be there.
            content: what it holds; more is cut off, anything else replaced.

        Raises:
            OSError: the disk is at fault.
        """
        self.path = path
        self.failure = ""
        self._sha256 = hashlib.sha256(content)
        # With what waits, and without.
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
        """Adds lines; where that fails they wait for the next call.

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
            size = files.size(self.path)
            if size is None and self._num_bytes:
                files.make_directory(os.path.dirname(self.path))
            if self._waiting or (size is None and self._num_bytes):
                self._cut_off()
                files.append(self.path, bytes(self._waiting))
                self._num_written += len(self._waiting)
                self._waiting.clear()
        self.failure = ""

    def _cut_off(self) -> None:
        """Removes what a write that failed has left behind."""
        if (files.size(self.path) or 0) > self._num_written:
            os.truncate(self.path, self._num_written)

    def sync(self) -> None:
        """Puts every line so far on the disk.

        Raises:
            OSError: it cannot be done.
        """
        self._write_waiting()
        if self._num_bytes:
            files.sync(self.path)
            files.sync(os.path.dirname(self.path))


class Spool:
    """A local directory that is copied to a remote one, in the background.

    On an object store nothing can be added to an object: each line would send
    the whole file again, while the training waits.

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
        return [
            path
            for path in glob.glob(f"{glob.escape(root)}*")
            if os.stat(path).st_uid == os.getuid()
        ]

    def candidates(self, name: str) -> list[bytes]:
        """Returns what there may be of a file, from before this process.

        A process of this host that was killed may not have sent all of it.
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
                    path = os.path.join(directory, name)
                    self._send_file(os.path.relpath(path, self.path))
            self.failure = ""

    def _send_file(self, name: str) -> None:
        data = files.read(os.path.join(self.path, name)) or b""
        if name.endswith(".jsonl"):
            # Another thread may be writing one.
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
        """Copies what is new, if that can be, and removes the directory.

        Where it cannot be, the directory stays: the next process of this
        host finds it.

        Args:
            patience_secs: how long a store that does not answer is waited
                for.
        """
        self._is_closed = True
        self._is_wanted.set()
        self._thread.join(patience_secs)
        if not self._thread.is_alive() and not self.failure:
            shutil.rmtree(self.path, ignore_errors=True)
