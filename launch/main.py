"""Starts the workers of a run.

python -m launch.main --num_workers=2 -- --run_dir=runs/two --num_steps=500
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from dtrain import config, errors
from launch import local

_HELP = """\
usage: python -m launch.main [--num_workers=N] [--dry_run] -- [dtrain flags]

Starts N processes on this machine that train together, and prints their lines
with the worker's name in front. Ctrl-C lets all of them save and end, a second
one ends them at once.

  --num_workers=N  (default: 1)
      Processes. More than one sets TF_CONFIG and --strategy=multi_worker.

  --[no]dry_run  (default: false)
      Prints the commands instead of running them.

What follows -- are the flags of python -m dtrain.main; they are checked before
anything starts. Exits with 0 when all workers are finished, 75 to be run
again, 78 for a mistake in the command."""


def run(arguments: Sequence[str]) -> int:
    """Starts what a command line says.

    Args:
        arguments: the command line, the program's name first.

    Returns:
        The exit code of the process.

    Raises:
        UserError: the command line is wrong.
    """
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, theirs = arguments[:end], arguments[end + 1 :]
    if {"--help", "-h"} & set(own):
        print(_HELP)
        return errors.FINISHED
    num_workers, dry_run = _parse(own)
    parsed = config.parse([own[0], *theirs])
    if num_workers > 1 and parsed.strategy not in ("default", "multi_worker"):
        raise errors.UserError(
            f"strategy ({parsed.strategy}) runs in one process; with "
            f"num_workers ({num_workers}) leave it out"
        )
    processes = local.plan(local.free_ports(num_workers), theirs)
    if dry_run:
        print("\n".join(process.to_shell() for process in processes))
        return errors.FINISHED
    return local.run(processes)


def _parse(own: list[str]) -> tuple[int, bool]:
    flag_values = flags.FlagValues()
    flags.DEFINE_integer("num_workers", 1, "", flag_values=flag_values)
    flags.DEFINE_boolean("dry_run", False, "", flag_values=flag_values)
    try:
        rest = flag_values(own)
    except flags.Error as error:
        raise errors.UserError(
            f"{error}; the flags of dtrain.main go after --, --help lists the "
            "others"
        ) from error
    if len(rest) > 1:
        raise errors.UserError(
            f"{rest[1]!r} is not a flag; the flags of dtrain.main go after --"
        )
    num_workers = flag_values.num_workers
    if not 1 <= num_workers <= 1000:
        raise errors.UserError(
            f"num_workers ({num_workers}) must be between 1 and 1000"
        )
    return num_workers, flag_values.dry_run


def main() -> None:
    """Runs the program."""
    errors.exit_with(lambda: run(sys.argv))


if __name__ == "__main__":
    main()
