"""Prints log files that others write, as they grow."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Sequence

from dtrain import streams

_POLL_SECS = 0.5
_CHUNK = 1 << 20


def show(
    patterns: Sequence[str], follow: bool, is_over: Callable[[], bool]
) -> int:
    """Prints the lines of files, each once; returns how many files.

    Args:
        patterns: of files; those of a job that is started again are added to.
        follow: whether to go on as they grow, until the job is over.
        is_over: whether nothing is written any more; asked now and then.
    """
    offsets: dict[str, int] = {}
    ends = False
    while not ends and streams.has_reader():
        # Before the last look: what is written until then is seen.
        ends = not follow or is_over()
        for path in sorted(
            path for pattern in patterns for path in glob.glob(pattern)
        ):
            offset = offsets.setdefault(path, 0)
            offsets[path] = _print_from(path, offset, ends)
        if not ends:
            time.sleep(_POLL_SECS)
    return len(offsets)


def _print_from(path: str, offset: int, is_last: bool) -> int:
    """Prints the whole lines from an offset on; returns where they end."""
    name = os.path.basename(path).removesuffix(".log")
    with open(path, "rb") as file:
        file.seek(offset)
        while True:
            data = file.read(_CHUNK)
            end = data.rfind(b"\n") + 1
            # A line longer than the chunk, or one that gets no end any more.
            if (not end and len(data) == _CHUNK) or (is_last and data):
                end = end or len(data)
            if not end:
                return offset
            offset += end
            file.seek(offset)
            for line in data[:end].decode(errors="replace").splitlines():
                # A line that a supervisor handed on has its worker's name.
                prefix = "" if line.startswith("[worker ") else f"[{name}] "
                print(f"{prefix}{line}", flush=True)
