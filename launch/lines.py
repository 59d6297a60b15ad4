"""What a launcher prints, wherever it goes."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TextIO


def print_what_cannot_be_shown() -> None:
    """Lets a worker print what the terminal of this process cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(line: str, stream: TextIO) -> None:
    """Prints a line in one piece, if anybody listens.

    Where nobody does, as behind `| head` or on a disk that is full, it is lost:
    a run must not end for it, and a worker would wait for ever to write into a
    pipe that nobody reads.
    """
    with contextlib.suppress(OSError, ValueError):
        stream.write(f"{line}\n")
        stream.flush()
