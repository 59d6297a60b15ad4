"""Locks of a disk, which the kernel drops with the process that holds them.

Some network disks have none: nobody is kept out there, and the caller is told.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator


def take(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Locks an open file or directory until it is closed.

    A network disk gives a lock for one process alone only on a directory, or on
    a file that is open for writing.

    Args:
        descriptor: of the file.
        shared: whether others may have it at the same time, who share it too.
        wait: whether to wait for those who have it.

    Returns:
        Whether it is locked; False on a disk without locks.

    Raises:
        BlockingIOError: another process has it.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextlib.contextmanager
def held(
    path: str, flags: int, *, shared: bool = False, wait: bool = False
) -> Iterator[bool]:
    """Opens and locks a file or a directory for as long as the block lasts.

    Args:
        path: of the file.
        flags: how to open it, as in `os.O_RDWR | os.O_CREAT`.
        shared: see `take`.
        wait: see `take`.

    Yields:
        What `take` returned.

    Raises:
        BlockingIOError: another process has it.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield take(descriptor, shared=shared, wait=wait)
    finally:
        os.close(descriptor)
