"""The files of jobs, on a disk or on an object store.

`gs://` imports TensorFlow; a disk does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from etils import epath

from dtrain.errors import StorageError


@contextlib.contextmanager
def access(path: str | epath.Path) -> Iterator[None]:
    """Makes one line of what fails at a path.

    Raises:
        StorageError: the disk or the store has failed.
    """
    try:
        yield
    except Exception as error:
        # Those of `gs://` are TensorFlow's, which no launcher imports.
        of_store = type(error).__module__.startswith("tensorflow.")
        if not of_store and not isinstance(error, OSError):
            raise
        raise StorageError(f"{path}: {error}") from error


def make_directory(path: epath.Path) -> None:
    """Makes a directory where there are such things.

    A store has none; and in a bucket that is not there, TensorFlow tries to
    make one without end.
    """
    if "://" not in str(path):
        path.mkdir(parents=True, exist_ok=True)
