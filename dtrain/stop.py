"""Stops a run, from any machine that can write to its directory.

python -m dtrain.stop --run_dir=runs/default
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence

from dtrain import errors, flags
from dtrain.resilience import stop_file
from dtrain.storage import claim, files

# One of these a run has in its directory from its very beginning on.
_OF_A_RUN = {"config.json", "saved.json", ".lock", "lease.json", "checkpoints"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says."""

    run_dir: str = flags.directory("Directory of the run, on a disk or gs://.")
    wait: bool = flags.field(
        False,
        flags.FLAGS,
        "Comes back when no process trains there any more.",
    )


_PAGE = flags.Page(
    "python -m dtrain.stop",
    """\
Tells the run in a directory to save and to end, and its supervisor not to
start it again. The command that started it goes on from there.""",
    Options,
    usage="--run_dir=DIR [--wait]",
)


def _wait_until_free(run_dir: str, every_secs: float) -> None:
    """Waits until no process trains in a directory.

    The holder of a lease may have died: it is waited for as long as the lease
    is good.
    """
    watch = claim.watch_of(run_dir)
    while (is_held := claim.is_held(run_dir, watch)) is not False:
        if is_held:
            watch = claim.watch_of(run_dir)
        time.sleep(every_secs)


def run(arguments: Sequence[str]) -> int:
    """Stops a run as a command line says; returns the exit code.

    Args:
        arguments: the command line, the program's name first.

    Raises:
        UserError: the command line is wrong, or there is no such run.
    """
    if flags.answer(arguments[1:], _PAGE.render):
        return errors.FINISHED
    options = Options(**flags.parse(Options, arguments))
    run_dir = options.run_dir
    with files.storage_errors(run_dir):
        names = files.names(run_dir)
    if _OF_A_RUN.isdisjoint(names):
        raise errors.UserError(
            f"run_dir ({run_dir}) holds no run; name the directory that it "
            "was started with"
        )
    stop_file.write(run_dir)
    secs = stop_file.secs_between_looks(run_dir)
    with files.storage_errors(run_dir):
        is_held = claim.is_held(run_dir)
    wrote = f"wrote {stop_file.path(run_dir)}"
    if is_held is False:
        print(
            f"{wrote}: no process trains there now; a job that is queued ends "
            "when it finds it, a start by a person goes on"
        )
        return errors.FINISHED
    print(
        f"{wrote}: within {secs:g} s, and the step it is at, the run saves and "
        "exits with 75; the command that started it goes on from there",
        flush=True,
    )
    if options.wait:
        with files.storage_errors(run_dir):
            _wait_until_free(run_dir, secs / 2)
        print(f"no process trains in {run_dir} any more")
    return errors.FINISHED


def main() -> None:
    """Runs the program."""
    errors.exit_with(lambda: run(sys.argv))


if __name__ == "__main__":
    main()
