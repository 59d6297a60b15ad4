"""Ctrl-C while a program is still being imported: it ends, without a traceback.

Python raises KeyboardInterrupt wherever an import happens to be. Until `main`
runs there is nothing to save and nothing to say, so the signal itself ends the
process, as it ends any program of C.
"""

from __future__ import annotations

# Of C: `signal` is a file of Python, in the midst of which a Ctrl-C may come.
import _signal as signal  # type: ignore[import-not-found]
import sys

_PACKAGES = ("dtrain.", "launch.")
_PYTHONS = signal.default_int_handler


def end_quietly() -> None:
    """Lets Ctrl-C end this process at once, if it is a program of ours.

    A program of somebody else's, which imports a package, is left alone; so is
    one whose Ctrl-C is ignored, as in the background of a script.
    """
    _, _, program = " ".join(sys.orig_argv).partition(" -m ")
    is_ours = program.startswith(_PACKAGES)
    if is_ours and signal.getsignal(signal.SIGINT) is _PYTHONS:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def hear() -> None:
    """Raises KeyboardInterrupt for a Ctrl-C again; a program's `main` does."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, _PYTHONS)
