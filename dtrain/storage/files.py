"""The one place where bytes become durable.

What is local goes through the operating system, which can be told to put it on
the disk; what has a scheme, as in gs://, goes through TensorFlow's file
systems. A remote object is there whole or not at all, and is durable when the
call returns; it cannot be renamed, only copied, and nothing here relies on it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from dtrain.errors import StorageError

# What goes wrong when a disk is full, gone, or not ours.
FAILURES = (OSError, tf.errors.OpError)


def is_remote(path: str) -> bool:
    """Tells whether a path is that of an object store."""
    return "://" in path


def reason(error: BaseException) -> str:
    """Says in a few words what went wrong, without where."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(getattr(error, "message", error)) or type(error).__name__
    # TensorFlow writes the node before it and the operation behind it.
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*\]", "", text.splitlines()[0])
    return " ".join(text.split())[:300]


def make_directory(path: str) -> None:
    """Makes a directory and those above it, where they are not there."""
    if is_remote(path):
        tf.io.gfile.makedirs(path)
        return
    missing = []
    while path and not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(each)
        sync(os.path.dirname(each) or ".")


def names(directory: str) -> list[str]:
    """Lists what a directory holds, sorted; nothing if it is not there."""
    if not is_remote(directory):
        try:
            return sorted(os.listdir(directory))
        except (FileNotFoundError, NotADirectoryError):
            return []
    try:
        listed = tf.io.gfile.listdir(directory)
    except tf.errors.NotFoundError:
        return []
    return sorted({name.rstrip("/") for name in listed} - {""})


def size(path: str) -> int | None:
    """Returns the bytes of a file; None if there is none."""
    try:
        if is_remote(path):
            return tf.io.gfile.stat(path).length
        return os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError, tf.errors.NotFoundError):
        return None


def read(path: str) -> bytes | None:
    """Returns all of a file; None if there is none."""
    try:
        if is_remote(path):
            with tf.io.gfile.GFile(path, "rb") as remote:
                return remote.read()
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError, tf.errors.NotFoundError):
        return None


def read_part(path: str, start: int, length: int) -> bytes:
    """Returns some bytes of a file, fewer only at its end."""
    opened = tf.io.gfile.GFile if is_remote(path) else open
    with opened(path, "rb") as file:
        file.seek(start)
        return file.read(length)


def append(path: str, data: bytes) -> None:
    """Adds to a local file; nothing is put on the disk for certain."""
    with open(path, "ab") as file:
        file.write(data)


def write(path: str, data: bytes) -> None:
    """Writes a file that holds the old bytes or the new ones at any moment.

    When this returns, the new ones are on the disk.
    """
    if is_remote(path):
        with tf.io.gfile.GFile(path, "wb") as remote:
            remote.write(data)
        return
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(os.path.dirname(path) or ".")


def sync(path: str) -> None:
    """Puts a file, or the names in a directory, on the disk."""
    if is_remote(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: str, target: str) -> None:
    """Gives a file another name; what had that name before is gone.

    A remote object is copied first and removed then: a kill in between leaves
    both.
    """
    if is_remote(source):
        tf.io.gfile.rename(source, target, overwrite=True)
    else:
        os.replace(source, target)


def copy(source: str, target: str) -> None:
    """Copies a file, from or to anywhere."""
    if is_remote(source) or is_remote(target):
        tf.io.gfile.copy(source, target, overwrite=True)
        return
    shutil.copyfile(source, target)
    sync(target)


def remove(path: str) -> None:
    """Removes a file, if there is one."""
    with contextlib.suppress(FileNotFoundError, tf.errors.NotFoundError):
        if is_remote(path):
            tf.io.gfile.remove(path)
        else:
            os.remove(path)


def remove_tree(directory: str) -> None:
    """Removes a directory and all in it, if there is one."""
    if not is_remote(directory):
        shutil.rmtree(directory, onerror=_ignore_missing)
        return
    try:
        tf.io.gfile.rmtree(directory)
    except tf.errors.OpError:
        # Of a listing of a while ago some are not there any more.
        for parent, _, there in tf.io.gfile.walk(directory):
            for name in there:
                remove(f"{parent.rstrip('/')}/{name}")


def _ignore_missing(
    function: Callable[..., object], path: str, info: tuple[Any, ...]
) -> None:
    """Raises what is being raised, unless somebody else removed it."""
    del function, path
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]


@contextlib.contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Turns what goes wrong with a disk or a store into one line.

    Args:
        path: what is written to or read from.

    Raises:
        StorageError: it failed.
    """
    try:
        yield
    except FAILURES as error:
        raise StorageError(f"{path}: {reason(error)}") from error
