"""The exit codes of every dtrain program, and the error that is a user's.

Launchers and supervisors act on the exit code alone: 0 is finished, 75 is
"saved, run me again", 78 is "do not run me again before something is
changed", anything else is a crash, after which the same command goes on from
the last save. One of these, 76, is the crash of another worker. 75, 76 and 78
are EX_TEMPFAIL, EX_PROTOCOL and EX_CONFIG of BSD's sysexits.h.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

FINISHED = 0
RUN_AGAIN = 75
LOST_WORKER = 76
USER_ERROR = 78
INTERRUPTED = 128 + signal.SIGINT


class UserError(ValueError):
    """A mistake the user can mend: its text is one line.

    The text names the value, the rule and the remedy, as in `batch_size (30)
    must be a multiple of the 4 replicas; try 28 or 32`.
    """


def exit_with(main: Callable[[], int]) -> None:
    """Runs `main` and exits with its code, or with 78 and one line.

    Args:
        main: returns the exit code of the process.

    Raises:
        SystemExit: always.
    """
    try:
        code = main()
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr)
        code = USER_ERROR
    except KeyboardInterrupt:
        # Before the training loop, where a Ctrl-C saves: nothing to lose yet.
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)
