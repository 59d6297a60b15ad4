"""The one place where files are touched, and where bytes become durable.

Local files go through the operating system, which can be told to put them on
the disk; a path with a scheme, as gs://, goes through TensorFlow's file
systems, and only then is TensorFlow imported. A remote object is there whole or
not at all, and is durable when the call returns; it cannot be renamed, only
copied.

All failures are OSErrors, those of a store `StoreError`s.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dtrain.errors import StorageError
from dtrain.storage import startup


class StoreError(OSError):
    """TensorFlow could not read or write; the text is its own.

    It is raised for an object store, and for what TensorFlow writes to a disk
    by itself, such as the data of a checkpoint.

    Attributes:
        kind: which of TensorFlow's errors it was, as in `UnavailableError`.
    """

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


class MissingError(StoreError, FileNotFoundError):
    """TensorFlow could not find a file."""


def store_error(error: Any) -> StoreError:
    """Makes an OSError of an error of TensorFlow.

    Args:
        error: a `tf.errors.OpError`.
    """
    kind = type(error).__name__
    if kind == "NotFoundError":
        return MissingError(error.message, kind)
    return StoreError(error.message, kind)


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Makes an OSError of what TensorFlow raises, where it touches files.

    Raises:
        StoreError: in place of a `tf.errors.OpError`.
    """
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        failure = store_error(error)
        raise failure from error


@contextlib.contextmanager
def _store() -> Iterator[Any]:
    """Yields TensorFlow's functions for files, which raise OSErrors here."""
    if "tensorflow" not in sys.modules:
        startup.import_tensorflow()
    import tensorflow as tf

    with os_errors():
        yield tf.io.gfile


def is_remote(path: str) -> bool:
    """Tells whether a path is that of an object store."""
    return "://" in path


def reason(error: BaseException) -> str:
    """Says in a few words what went wrong, without where."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(getattr(error, "message", error))
    text = text or getattr(error, "kind", type(error).__name__)
    # TensorFlow puts the node before the text and the operation behind it.
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*\]", "", text.splitlines()[0])
    return " ".join(text.split())[:300]


def make_directory(path: str, *, parents: bool = True) -> None:
    """Makes a directory and those above it, if they are not there.

    Args:
        path: of the directory.
        parents: whether those above it are made. What writes into a run's
            directory makes none: a person may have moved or removed it.

    Raises:
        NotADirectoryError: a file is in the way; the text names it.
        FileNotFoundError: the one above is not there, and `parents` is False.
    """
    if is_remote(path):
        with _store() as store:
            store.makedirs(path)
        return
    missing = []
    while path and not os.path.isdir(path):
        if missing and not parents:
            raise FileNotFoundError(errno.ENOENT, "No such directory", path)
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        try:
            os.mkdir(directory)
        except FileExistsError:
            # Another process may have made it just now.
            if not os.path.isdir(directory):
                words = f"{directory} is no directory"
                raise NotADirectoryError(errno.ENOTDIR, words, path) from None
        sync(os.path.dirname(directory) or ".")


def names(directory: str) -> list[str]:
    """Lists the names in a directory, sorted; none if it is not there."""
    try:
        if not is_remote(directory):
            return sorted(os.listdir(directory))
        return sorted({item.name for item in entries(directory)})
    except (FileNotFoundError, NotADirectoryError):
        return []


class Item(NamedTuple):
    """What is in a directory.

    Attributes:
        name: without the directory.
        is_directory: whether it is a directory.
        odd: what else it is, in words, than a file or a directory; or empty.
    """

    name: str
    is_directory: bool
    odd: str = ""


def entries(directory: str) -> Iterator[Item]:
    """Yields what is in a directory.

    Raises:
        OSError: the directory is not there, or cannot be listed.
    """
    if not is_remote(directory):
        with os.scandir(directory) as listed:
            for entry in listed:
                is_directory, odd = entry.is_dir(), ""
                if not is_directory and not entry.is_file():
                    # To open a pipe would be to wait for ever.
                    is_lost = not os.path.exists(entry.path)
                    odd = "links to nothing" if is_lost else "pipes or devices"
                yield Item(entry.name, is_directory, odd)
        return
    with _store() as store:
        remote_names = store.listdir(directory)
    for name in remote_names:
        # A store may list the directory itself, without a name.
        if name.rstrip("/"):
            yield Item(name.rstrip("/"), name.endswith("/"))


def exists(path: str) -> bool:
    """Tells whether there is a file or a directory."""
    if not is_remote(path):
        return os.path.exists(path)
    with _store() as store:
        return store.exists(path)


def is_directory(path: str) -> bool:
    """Tells whether there is a directory."""
    if not is_remote(path):
        return os.path.isdir(path)
    with _store() as store:
        return store.isdir(path)


class Stat(NamedTuple):
    """What is known of a file that is not opened.

    Attributes:
        size: in bytes.
        changed_secs: when it was changed last, in seconds since 1970.
    """

    size: int
    changed_secs: float


def stat(path: str) -> Stat | None:
    """Returns what is known of a file; None if there is none."""
    try:
        if not is_remote(path):
            local = os.stat(path)
            return Stat(local.st_size, local.st_mtime)
        with _store() as store:
            remote = store.stat(path)
            return Stat(remote.length, remote.mtime_nsec / 1e9)
    except (FileNotFoundError, NotADirectoryError):
        return None


def size(path: str) -> int | None:
    """Returns the bytes of a file; None if there is none."""
    known = stat(path)
    return known.size if known else None


def read(path: str) -> bytes | None:
    """Returns all of a file; None if there is none."""
    try:
        if not is_remote(path):
            with open(path, "rb") as file:
                return file.read()
        with _store() as store, store.GFile(path, "rb") as remote:
            return remote.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_part(path: str, start: int, length: int) -> bytes:
    """Returns some bytes of a file, fewer only at its end."""
    if not is_remote(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)
    with _store() as store, store.GFile(path, "rb") as remote:
        remote.seek(start)
        return remote.read(length)


def append(path: str, data: bytes) -> None:
    """Adds to a local file; see `sync` to have it on the disk."""
    with open(path, "ab") as file:
        file.write(data)


def write(
    path: str,
    data: bytes,
    *,
    is_durable: bool = True,
    make_parents: bool = False,
) -> None:
    """Writes a file, which has the old bytes or the new ones at any moment.

    If it fails, nothing of the new ones is left.

    Args:
        path: of the file. A device, as /dev/null, is written to as it is.
        data: all of it.
        is_durable: whether the new bytes are on the disk when this returns,
            which takes a moment.
        make_parents: whether to make the directories above it. A store needs
            none, and in a bucket that is not there TensorFlow would try to
            make them for ever.

    Raises:
        OSError: the disk is full, or has failed.
    """
    if is_remote(path):
        with _store() as store, store.GFile(path, "wb") as remote:
            remote.write(data)
        return
    if make_parents:
        make_directory(os.path.dirname(path))
    if os.path.exists(path) and not os.path.isfile(path):
        append(path, data)
        return
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if is_durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    if is_durable:
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
    """Gives a file another name; a file that had it before is gone.

    A remote object is copied, then removed: a kill in between leaves both.
    """
    if not is_remote(source):
        os.replace(source, target)
        return
    with _store() as store:
        store.rename(source, target, overwrite=True)


def copy(source: str, target: str) -> None:
    """Copies a file, from or to anywhere."""
    if not (is_remote(source) or is_remote(target)):
        shutil.copyfile(source, target)
        sync(target)
        return
    with _store() as store:
        store.copy(source, target, overwrite=True)


def remove(path: str) -> None:
    """Removes a file, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        if not is_remote(path):
            os.remove(path)
            return
        with _store() as store:
            store.remove(path)


def remove_tree(directory: str) -> None:
    """Removes a directory and all in it, if there is one."""
    if not is_remote(directory):
        shutil.rmtree(directory, onerror=_ignore_missing)
        return
    try:
        with _store() as store:
            store.rmtree(directory)
    except StoreError:
        # It stops at an object that is listed and is not there any more.
        with _store() as store:
            for parent, _, file_names in store.walk(directory):
                for name in file_names:
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
    """Turns what a disk or a store raises into an error of one line.

    Args:
        path: what is read or written.

    Raises:
        StorageError: it failed.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: {reason(error)}") from error
