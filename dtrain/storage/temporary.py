"""Directories that are gone with the process that made them, also by a kill.

Their names are by chance and they are open to their user alone, so nobody's
file is in the way. Whoever made one holds a lock on it as long as it lives;
what is not locked any more is swept by the next that makes one.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import NoReturn

from dtrain.errors import UserError
from dtrain.storage import files, locks

# The memory, which is there when the disks are full.
_MEMORY = "/dev/shm"
# What `link` fails with where there are none.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
# Directories in which this process has swept.
_SWEPT: set[str] = set()


def _start() -> str:
    # The user's number, for only one's own can be swept.
    return f"dtrain-{os.getuid()}-"


@contextlib.contextmanager
def directory(purpose: str, inside: str | None = None) -> Iterator[str]:
    """Makes a directory, and removes it with all that is in it.

    Args:
        purpose: a word for whoever finds it.
        inside: where it is made; None is TMPDIR.

    Raises:
        OSError: it cannot be made.
    """
    parent = tempfile.gettempdir() if inside is None else inside
    if parent not in _SWEPT:
        _SWEPT.add(parent)
        sweep(parent)
    path, descriptor = _make(f"{_start()}{purpose}-", parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def in_memory(purpose: str) -> contextlib.AbstractContextManager[str]:
    """Makes a directory for small files that a full disk must not stop."""
    is_there = os.path.isdir(_MEMORY) and os.access(_MEMORY, os.W_OK)
    return directory(purpose, _MEMORY if is_there else None)


def _make(start: str, parent: str) -> tuple[str, int]:
    """Makes and locks a directory; returns its path and its descriptor."""
    while True:
        path = tempfile.mkdtemp(prefix=start, dir=parent)
        # Before it is locked, somebody may sweep it.
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            continue
        locks.take(descriptor, shared=True, wait=True)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return path, descriptor
        os.close(descriptor)


def sweep(parent: str | None = None) -> None:
    """Removes what killed processes of this user have left in a directory.

    What is in use, a stranger's or anything but a directory stays.

    Args:
        parent: where; None is TMPDIR.
    """
    parent = tempfile.gettempdir() if parent is None else parent
    pattern = os.path.join(glob.escape(parent), f"{glob.escape(_start())}*")
    for path in glob.glob(pattern):
        with contextlib.suppress(OSError):
            known = os.lstat(path)
            if not stat.S_ISDIR(known.st_mode) or known.st_uid != os.getuid():
                continue
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            with locks.held(path, flags) as is_locked:
                # On a disk without locks nobody knows who is alive.
                if is_locked:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def becoming(
    path: str, put: Callable[[str, str], object] = files.copy
) -> Iterator[str]:
    """Yields a path to write to, and gives what is there its name, whole.

    Args:
        path: of a new file or directory, local or on a store.
        put: copies what was written to a store.

    Raises:
        UserError: there is one of that name, made before or meanwhile.
        OSError: the disk or the store failed.
    """
    name = os.path.basename(path)
    if files.exists(path):
        _refuse(path)
    if files.is_remote(path):
        with directory("new") as place:
            yield os.path.join(place, name)
            put(os.path.join(place, name), path)
        return
    parent = os.path.dirname(path) or "."
    files.make_directory(parent)
    with directory("new", parent) as place:
        yield os.path.join(place, name)
        _give_name(os.path.join(place, name), path)
    files.sync(parent)


def _give_name(written: str, path: str) -> None:
    """Moves what was written to a name that must be free.

    Raises:
        OSError: the disk failed.
        UserError: it is not.
    """
    try:
        if os.path.isdir(written):
            # It fails where there is a file, or a directory with anything.
            os.rename(written, path)
            return
        files.sync(written)
        if not _linked(written, path):
            # An empty file takes the name.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            os.close(os.open(path, flags, 0o644))
            os.replace(written, path)
    except OSError:
        # Which error it is depends on what is there.
        if os.path.lexists(path) and os.path.exists(written):
            _refuse(path)
        raise


def _linked(written: str, path: str) -> bool:
    """Links a file; False on a disk that has no links.

    Raises:
        OSError: the name is taken, or the disk failed.
    """
    try:
        os.link(written, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def _refuse(path: str) -> NoReturn:
    raise UserError(
        f"{path} is there already, and nothing is overwritten; remove it, or "
        "name another path"
    )
