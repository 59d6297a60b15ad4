"""The first call to an object store, and what it says when it fails.

TensorFlow asks for credentials once. If that fails, it goes on without them for
as long as the process lives, and every later call is refused: so the first call
is made early, and its failure is explained. Only TensorFlow reads credentials;
nothing here does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import stat
from collections.abc import Iterator

from dtrain.errors import StorageError, UserError
from dtrain.storage import files

_PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
# What a disk says that says the same tomorrow.
_NEVER = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
)
_LOG_IN = (
    "run `gcloud auth application-default login`, or let "
    "GOOGLE_APPLICATION_CREDENTIALS name the key of a service account"
)


def check(name: str, path: str) -> None:
    """Checks that an object store can be reached, or that a path is no file.

    To be called before any other use of the store, by every worker.

    Args:
        name: of the setting that names the path.
        path: local or remote; it need not be there.

    Raises:
        UserError: there is no such store or bucket, or it refuses; or the path
            is that of a file.
        StorageError: it does not answer, or its credentials do not come.
    """
    _check_spelling(name, path)
    if not files.is_remote(path):
        _check_no_file(name, path)
        return
    try:
        files.read_part(f"{path.rstrip('/')}/lease.json", 0, 1)
    except OSError as error:
        mistake = explain(name, path, error)
        # The object may be missing; a bucket that is, is a UserError.
        if isinstance(error, FileNotFoundError) and isinstance(
            mistake, StorageError
        ):
            return
        raise mistake from error


def _check_spelling(name: str, path: str) -> None:
    """Refuses what looks like an object store, and would be a directory.

    Raises:
        UserError: the path begins with gs: and names no bucket.
    """
    if path.startswith("gs:") and not re.match("gs://[^/]", path):
        raise UserError(f"{name} ({path}) must be of the form gs://BUCKET/DIR")


def _check_no_file(name: str, path: str) -> None:
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except NotADirectoryError as error:
        failure = refusal(name, path, "made", error)
        raise failure from error
    except (OSError, ValueError):
        # It is made later, or its trouble is told then.
        return
    if not is_directory:
        raise UserError(f"{name} ({path}) is a file; name a directory")


def make(name: str, directory: str) -> None:
    """Makes a directory, if it is not there.

    Args:
        name: of the setting that names it.
        directory: local or remote.

    Raises:
        UserError: it cannot be made.
        StorageError: the disk is full, or has failed.
    """
    _check_spelling(name, directory)
    try:
        files.make_directory(directory)
    except OSError as error:
        failure = refusal(name, directory, "made", error)
        raise failure from error


def refusal(
    name: str, path: str, what: str, error: OSError
) -> UserError | StorageError:
    """Says in one line that something cannot be done with a path.

    Args:
        name: of the setting that names it.
        path: of a file or a directory.
        what: as in `written to`.
        error: why.

    Returns:
        A UserError if it cannot be done there at all.
    """
    if files.is_remote(path):
        return explain(name, path, error)
    line = f"{name} ({path}) cannot be {what}: {files.reason(error)}"
    if error.errno in _NEVER:
        return UserError(f"{line}; name another one")
    return StorageError(f"{line}; run the same command again")


@contextlib.contextmanager
def to(name: str, path: str) -> Iterator[None]:
    """Checks that a store can be reached, and says why it fails later.

    On a disk it does nothing.

    Args:
        name: of the setting that names the path.
        path: local or remote.

    Raises:
        UserError: see `check`.
        StorageError: see `check`.
    """
    if not files.is_remote(path):
        yield
        return
    check(name, path)
    try:
        yield
    except files.StoreError as error:
        mistake = explain(name, path, error)
        raise mistake from error


def explain(name: str, path: str, error: OSError) -> UserError | StorageError:
    """Says in one line why a store failed.

    Args:
        name: of the setting that names the path.
        path: remote.
        error: what `files` raised.

    Returns:
        A StorageError if another try may succeed, or else a UserError.
    """
    text, kind = str(error), getattr(error, "kind", "")
    if path.startswith("file://"):
        return UserError(
            f"{name} ({path}) must be a path alone; write "
            f"{path.removeprefix('file://')}"
        )
    if kind == "UnimplementedError":
        scheme = path.partition("://")[0]
        return UserError(
            f"{name} ({path}) must be on a disk or gs://; {scheme}:// is not "
            "read here"
        )
    if "bucket does not exist" in text:
        bucket = "/".join(path.split("/")[:3])
        return UserError(
            f"{name} ({path}) is in no bucket: there is no {bucket}; make it, "
            "or name another one"
        )
    if kind != "PermissionDeniedError":
        return StorageError(f"{name} ({path}): {files.reason(error)}")
    if "code 401" not in text:
        return UserError(
            f"{name} ({path}) is refused to the account of this process; give "
            "it the role Storage Object Admin on the bucket"
        )
    if _is_on_google():
        return StorageError(
            f"{name} ({path}) is refused without credentials, and those of "
            "this virtual machine did not come; run the same command again"
        )
    return UserError(
        f"{name} ({path}) is refused without valid credentials; {_LOG_IN}"
    )


def _is_on_google() -> bool:
    """Tells whether TensorFlow asks a virtual machine for credentials."""
    if os.environ.get("GCE_METADATA_HOST"):
        return True
    try:
        return "Google" in _PRODUCT.read_text()
    except OSError:
        return False
