"""Lets TensorFlow read a checkpoint whose directory has any name.

TensorFlow looks for a checkpoint as for a pattern: of `runs/a[1]/ckpt-7` it
says that it is not there, for it looks in `runs/a1`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from dtrain.errors import UserError
from dtrain.storage import files

_PATTERN = re.compile(r"[\[\]*?\\]")


@contextlib.contextmanager
def literal(prefix: str) -> Iterator[str]:
    """Yields a path to the same checkpoint that is no pattern.

    Args:
        prefix: the checkpoint's path without `.index`.

    Yields:
        The path for TensorFlow; it ends with the block.

    Raises:
        UserError: the files themselves have such a name.
        OSError: the directory cannot be opened.
    """
    if not _PATTERN.search(prefix) or files.is_remote(prefix):
        yield prefix
        return
    directory, name = os.path.split(prefix)
    found = _PATTERN.search(name)
    if found:
        raise UserError(
            f"{prefix}: TensorFlow takes {found[0]!r} in the name of a "
            "checkpoint for a pattern; rename its files"
        )
    opened = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{opened}/{name}"
    finally:
        os.close(opened)
