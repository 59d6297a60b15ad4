"""Makes what dtrain writes fail, or ends the process, at any one point.

Every function of `dtrain.storage.files` that changes something, and
TensorFlow's own write, has points that a run passes in an order that is the
same each time: `before` and `after` each, `half` and `whole` where a kill
leaves a part, or all of it under a temporary name. `Faults` counts them, and
does what it is told at one of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import random
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn
from unittest import mock

import tensorflow as tf

from dtrain.storage import files

# What becomes of a point: it is passed, or something else happens.
Action = Callable[[], None]

_SINGLE = ("make_directory", "sync", "move", "remove")
# Those that need room, on a disk that has none.
_GROWING = frozenset({"make_directory", "append", "write", "copy", "SaveV2"})


def kill() -> NoReturn:
    """Ends this process as the kernel ends one that has no say."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive after a SIGKILL")


class Faults:
    """The points passed so far, and what happens at one of them.

    Attributes:
        points: their names, as in `write half ckpt-3.json`.
        is_new: whether a kill there leaves something else than one at the
            point before; all are, unless a directory is watched.
    """

    def __init__(
        self,
        at: int | None = None,
        action: Action = kill,
        *,
        store: str | None = None,
        watched: str = "",
    ) -> None:
        """Only counts, unless it is told where to act.

        Args:
            at: the point, counted from 0.
            action: what happens there.
            store: a directory whose files are written as those of an object
                store are; each appears whole.
            watched: the directory where it is seen what a point leaves;
                empty is none.
        """
        self.points: list[str] = []
        self.is_new: list[bool] = []
        self._at = at
        self._action = action
        self._store = store
        self._watched = watched
        self._seen: object = None

    def _pass(self, name: str, path: str, part: Action | None = None) -> None:
        number = len(self.points)
        path = re.sub(r"tempstate\d+", "tempstate", os.path.basename(path))
        self.points.append(f"{name} {path}")
        seen = _look(self._watched) if self._watched else object()
        self.is_new.append(part is not None or seen != self._seen)
        self._seen = seen
        if number == self._at:
            if part:
                part()
            self._action()

    @contextlib.contextmanager
    def injected(self) -> Iterator[Faults]:
        """Has everything that writes pass these points."""
        with contextlib.ExitStack() as stack:

            def patch(module: Any, name: str, function: Any) -> None:
                stack.enter_context(mock.patch.object(module, name, function))

            for name in _SINGLE:
                patch(files, name, self._single(name))
            patch(files, "append", self._append(files.append))
            patch(files, "write", self._write(files.write))
            patch(files, "copy", self._copy(files.copy))
            patch(files, "remove_tree", self._remove_tree(files.remove_tree))
            patch(tf.raw_ops, "SaveV2", self._save(tf.raw_ops.SaveV2))
            if self._store is not None:
                patch(files, "is_remote", self._is_stored)
            yield self

    def _is_stored(self, path: str) -> bool:
        return self._store is not None and path.startswith(self._store)

    def _single(self, name: str) -> Callable[..., None]:
        real = getattr(files, name)

        def call(*paths: str) -> None:
            self._pass(f"{name} before", paths[-1])
            real(*paths)
            self._pass(f"{name} after", paths[-1])

        return call

    def _append(self, real: Any) -> Callable[..., None]:
        def append(path: str, data: bytes) -> None:
            self._pass("append before", path)
            half = data[: len(data) // 2]
            self._pass("append half", path, lambda: real(path, half))
            real(path, data)
            self._pass("append after", path)

        return append

    def _write(self, real: Any) -> Callable[..., None]:
        def write(path: str, data: bytes) -> None:
            self._pass("write before", path)
            if not self._is_stored(path):
                temporary = pathlib.Path(f"{path}.tmp")
                for name, length in (
                    ("half", len(data) // 2),
                    ("whole", len(data)),
                ):
                    part = data[:length]
                    self._pass(
                        f"write {name}",
                        path,
                        lambda part=part: _write_part(temporary, part),
                    )
            real(path, data)
            self._pass("write after", path)

        return write

    def _copy(self, real: Any) -> Callable[..., None]:
        def copy(source: str, target: str) -> None:
            self._pass("copy before", target)
            if not self._is_stored(target):
                data = pathlib.Path(source).read_bytes()
                half = data[: len(data) // 2]
                self._pass(
                    "copy half",
                    target,
                    lambda: _write_part(pathlib.Path(target), half),
                )
            real(source, target)
            self._pass("copy after", target)

        return copy

    def _remove_tree(self, real: Any) -> Callable[..., None]:
        def remove_tree(directory: str) -> None:
            self._pass("remove_tree before", directory)
            found = sorted(
                each
                for each in pathlib.Path(directory).rglob("*")
                if each.is_file()
            )
            half = (len(found) + 1) // 2
            # In either order: the file system chooses it.
            parts = (("first", found[:half]), ("last", found[-half:]))
            for name, gone in parts if found else ():
                self._pass(
                    f"remove_tree {name}",
                    directory,
                    lambda gone=gone: _remove(gone),
                )
            real(directory)
            self._pass("remove_tree after", directory)

        return remove_tree

    def _save(self, real: Any) -> Callable[..., Any]:
        """TensorFlow writes each file under another name, data before index."""

        def save(*, prefix: str, **rest: Any) -> Any:
            self._pass("SaveV2 before", prefix)
            data = pathlib.Path(f"{prefix}.data-00000-of-00001")
            index = pathlib.Path(f"{prefix}.index")

            def cut(path: pathlib.Path) -> None:
                """Leaves half of one under its temporary name."""
                real(prefix=prefix, **rest)
                content = path.read_bytes()
                _write_part(
                    pathlib.Path(f"{path}.tempstate1"),
                    content[: len(content) // 2],
                )
                index.unlink()
                path.unlink(missing_ok=True)

            self._pass("SaveV2 half data", prefix, lambda: cut(data))
            self._pass("SaveV2 half index", prefix, lambda: cut(index))
            done = real(prefix=prefix, **rest)
            self._pass("SaveV2 after", prefix)
            return done

        return save


def _write_part(path: pathlib.Path, data: bytes) -> None:
    path.write_bytes(data)


def _remove(paths: list[pathlib.Path]) -> None:
    for path in paths:
        path.unlink()


def _look(directory: str) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() if path.is_file() else b""
        for path in pathlib.Path(directory).rglob("*")
    }


def fail(number: int) -> Action:
    """Returns an action that raises what the operating system would."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


@contextlib.contextmanager
def broken(number: int) -> Iterator[None]:
    """Has everything fail that a disk in this state does not do.

    Args:
        number: `errno.ENOSPC` is a full disk, on which one can still remove;
            with all others nothing works.
    """

    def refuse(*paths: Any, **named: Any) -> NoReturn:
        del paths, named
        raise OSError(number, os.strerror(number))

    names = ["make_directory", "append", "write", "copy"]
    if number != errno.ENOSPC:
        names += ["sync", "move", "remove", "remove_tree"]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(files, name, refuse))
        stack.enter_context(mock.patch.object(tf.raw_ops, "SaveV2", refuse))
        yield


# Of the changes to a directory that were not put on the disk, a power cut keeps
# the first ones; of two directories, those of either. What is written to a file
# comes later or not at all.

_ROOT = 0
_CHANGING = ("replace", "rename", "mkdir", "rmdir", "remove", "unlink")


class _Change(NamedTuple):
    """Names that change at once: directory, name, and what has it now."""

    names: list[tuple[int, str, int | None]]


class _Content(NamedTuple):
    file: int
    data: bytes


class _Sync(NamedTuple):
    file: int


class Disk:
    """A directory whose state after a power cut, at any moment, can be made.

    Attributes:
        log: what happened, in its order; its length is the time.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self.log: list[_Change | _Content | _Sync] = []
        # By the number of the system, which it gives again.
        self._numbers = {path.stat().st_ino: _ROOT}
        self._names: dict[tuple[int, str], int] = {}
        self._contents: dict[int, bytes] = {}
        self._directories: set[int] = set()
        self._count = _ROOT

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Sees what this process does there."""
        fsync = os.fsync

        def sync(descriptor: int) -> None:
            self._look()
            fsync(descriptor)
            number = self._numbers.get(os.fstat(descriptor).st_ino)
            if number is not None:
                self.log.append(_Sync(number))

        with contextlib.ExitStack() as stack:
            for name in _CHANGING:
                stack.enter_context(
                    mock.patch.object(os, name, self._seeing(getattr(os, name)))
                )
            stack.enter_context(mock.patch.object(os, "fsync", sync))
            yield

    def _seeing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self._look()
            done = real(*arguments, **named)
            self._look()
            return done

        return call

    def _look(self) -> None:
        numbers = {self._path.stat().st_ino: _ROOT}
        names: dict[tuple[int, str], int] = {}
        contents: dict[int, bytes] = {}

        def visit(directory: str, number: int) -> None:
            for entry in sorted(os.scandir(directory), key=lambda e: e.name):
                inode = entry.inode()
                if inode in self._numbers:
                    each = self._numbers[inode]
                else:
                    self._count += 1
                    each = self._count
                numbers[inode] = each
                names[number, entry.name] = each
                if entry.is_dir():
                    self._directories.add(each)
                    visit(entry.path, each)
                else:
                    contents[each] = pathlib.Path(entry.path).read_bytes()

        visit(str(self._path), _ROOT)
        changed = [
            (*place, names.get(place))
            for place in sorted({*self._names, *names})
            if self._names.get(place) != names.get(place)
        ]
        if changed:
            self.log.append(_Change(changed))
        for each, data in contents.items():
            if self._contents.get(each) != data:
                self.log.append(_Content(each, data))
        self._numbers, self._names, self._contents = numbers, names, contents

    def cut(
        self, time: int, chance: random.Random, target: pathlib.Path
    ) -> None:
        """Makes a directory as it may be after a power cut.

        Args:
            time: how much of the log has happened.
            chance: chooses what of the rest is kept.
            target: where it is made.
        """
        names: dict[tuple[int, str], int] = {}
        for change in self._kept(time, chance):
            for directory, name, now in change.names:
                names.pop((directory, name), None)
                if now is not None:
                    names[directory, name] = now
        contents = self._contents_at(time, chance)

        def make(directory: pathlib.Path, number: int) -> None:
            directory.mkdir()
            for (parent, name), each in names.items():
                if parent == number and each in self._directories:
                    make(directory / name, each)
                elif parent == number:
                    (directory / name).write_bytes(contents.get(each, b""))

        make(target, _ROOT)

    def _kept(self, time: int, chance: random.Random) -> list[_Change]:
        kept = []
        # Directories of which all that is earlier is kept.
        whole: set[int] = set()
        for event in reversed(self.log[:time]):
            if isinstance(event, _Sync):
                whole.add(event.file)
            if isinstance(event, _Change):
                touched = {directory for directory, *_ in event.names}
                if touched & whole or chance.random() < 0.5:
                    whole |= touched
                    kept.append(event)
        return kept[::-1]

    def _contents_at(
        self, time: int, chance: random.Random
    ) -> dict[int, bytes]:
        now: dict[int, bytes] = {}
        safe: dict[int, bytes] = {}
        for event in self.log[:time]:
            if isinstance(event, _Content):
                now[event.file] = event.data
            elif isinstance(event, _Sync) and event.file in now:
                safe[event.file] = now[event.file]
        return {
            file: data
            if safe.get(file) == data
            else chance.choice((data, data[: len(data) // 2], b""))
            for file, data in now.items()
        }
