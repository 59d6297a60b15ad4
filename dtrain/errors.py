"""The exit codes of all dtrain programs, and the errors that have one.

Launchers and supervisors act on the exit code alone: 0 is finished, 75 is
"saved, run me again", 78 is "do not run me again before something is
changed", anything else is a crash, after which the same command goes on from
the last save. `EXITS` is the table of all that have a name; 70, 74, 75, 76 and
78 are EX_SOFTWARE, EX_IOERR, EX_TEMPFAIL, EX_PROTOCOL and EX_CONFIG of BSD's
sysexits.h.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from dtrain import interrupts, streams

FINISHED = 0
HUNG = 70
STORAGE_FAILED = 74
RUN_AGAIN = 75
LOST_WORKER = 76
USER_ERROR = 78
INTERRUPTED = 128 + signal.SIGINT

# For the last words of a process whose other threads are stuck.
_LAST_SECS = 2.0


class UserError(ValueError):
    """A mistake the user can repair: its text is one line.

    The text names the value, the rule and the remedy, as in `batch_size (30)
    must be a multiple of the 4 replicas; try 28 or 32`.

    Attributes:
        text: the line.
        details: lines for those who want to know more, printed below it.
    """

    def __init__(self, text: str, details: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.text = text
        self.details = tuple(details)

    def __str__(self) -> str:
        """Returns all lines, for a program that does not catch it."""
        return "\n".join((self.text, *self.details))


class StorageError(Exception):
    """A disk or an object store failed; its text is one line.

    What was saved before is intact, and the same command may succeed later.
    """


class LostWorkerError(Exception):
    """Another worker is gone, or never came; its text is one line.

    The same command goes on from the last save.
    """


class Exit(NamedTuple):
    """A way in which a program ends.

    Attributes:
        code: what the process exits with.
        words: what it means, in a few words.
        error: what `exit_with` exits with this code for, if anything.
        is_crash: whether the same command may do better at once.
    """

    code: int
    words: str
    error: type[BaseException] | None = None
    is_crash: bool = False


# The first that a worker ends with is the code of all (see `combine`); a crash
# comes after the first of these, and before the others.
EXITS = (
    Exit(USER_ERROR, "a mistake of the user", UserError),
    Exit(HUNG, "was stuck", is_crash=True),
    Exit(STORAGE_FAILED, "a disk or a store failed", StorageError, True),
    Exit(INTERRUPTED, "interrupted", KeyboardInterrupt, True),
    Exit(LOST_WORKER, "lost another worker", LostWorkerError),
    Exit(RUN_AGAIN, "saved and stopped"),
    Exit(FINISHED, "finished"),
)


def exit_codes() -> str:
    """Lists the exit codes for a help page, a line for each."""
    rows = sorted(EXITS, key=lambda row: row.code)
    return "\n".join(f"  {row.code:<4} {row.words}" for row in rows)


def leave(code: int) -> NoReturn:
    """Ends the process at once, after all that was printed is written.

    A Python program that ends takes TensorFlow's input pipelines down, and each
    waits for its threads: sometimes for half a minute, which a scheduler does
    not grant. It is called while the pipelines are still referred to, and when
    all files are closed.
    """
    streams.drain()
    os._exit(code)


def end(code: int, words: str, stderr: int = 2) -> NoReturn:
    """Ends the process at once, from any thread, whatever locks others hold.

    Args:
        code: the exit code.
        words: one or more lines that say why.
        stderr: the file descriptor that they go to.
    """

    def say() -> None:
        streams.drain()
        with contextlib.suppress(OSError):
            os.write(stderr, f"{words}\n".encode())

    # A pipe may be full.
    speaker = threading.Thread(target=say, daemon=True)
    speaker.start()
    speaker.join(_LAST_SECS)
    os._exit(code)


def code_of(error: BaseException) -> int:
    """Returns the exit code of a program that an error ends."""
    for row in EXITS:
        if row.error and isinstance(error, row.error):
            return row.code
    return 1


def printable(line: str) -> str:
    """Escapes what would move the cursor of a terminal, or worse.

    A name in a file from outside may hold that.
    """
    return "".join(
        character if character.isprintable() else repr(character)[1:-1]
        for character in line
    )


def exit_with(
    main: Callable[[], int], leave: Callable[[int], NoReturn] = sys.exit
) -> None:
    """Runs `main` and exits with its code, or with that of an error, in a line.

    From here on what is printed raises no error; see `streams`.

    Args:
        main: returns the exit code of the process.
        leave: ends the process; `leave` of this module ends it at once.
    """
    streams.protect()
    try:
        interrupts.hear()
        code = main()
        _check_output(code)
    except (UserError, StorageError, LostWorkerError) as error:
        summary = " ".join(str(error.args[0]).split())
        for line in (f"error: {summary}", *getattr(error, "details", ())):
            print(printable(line), file=sys.stderr)
        # In here, where the error keeps what it came from alive.
        leave(code_of(error))
    except KeyboardInterrupt as error:
        # Before the training loop, where a Ctrl-C saves: nothing to lose yet.
        print("interrupted", file=sys.stderr)
        leave(code_of(error))
    leave(code)


def _check_output(code: int) -> None:
    """Checks that what a program had to say has come out.

    Raises:
        StorageError: it has not.
    """
    lost = streams.lost()
    if lost and code == FINISHED:
        raise StorageError(f"standard output: {lost.strerror}")


def combine(codes: Sequence[int]) -> int:
    """Makes one exit code of those of all workers, negative for a signal.

    A user's mistake comes first, since to run again cannot help; then crashes,
    the loss of another worker after the others; then "run me again".

    Returns:
        The code, as a shell would see it: 128 + N for signal N.
    """
    first, *last = [row.code for row in EXITS if not row.is_crash]
    crashes = [code for code in codes if code not in (first, *last)]
    code = next(code for code in (first, *crashes, *last) if code in codes)
    return code if code >= 0 else 128 - code
