"""Starts the workers of a run, and keeps it alive.

python -m launch.main --num_workers=2 -- --run_dir=runs/two --num_steps=500
"""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from dtrain import cluster, config, errors
from launch import local, supervisor

_HELP = f"""\
usage: python -m launch.main [--flag=value ...] -- [flags of dtrain.main]

Starts the workers of this machine, prints their lines with the worker's name in
front, and keeps the run alive: when a worker dies all end, and all start again
from the newest state that verifies. Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 let
them save and end, a second one ends them at once.

  --backend=local  (default: local)
      Where the workers run: local, processes of this machine.

  --num_workers=N  (default: 1)
      Processes. More than one sets TF_CONFIG and --strategy=multi_worker. With
      TF_CONFIG in the environment it stays 1: the other workers of that
      cluster have supervisors of their own.

  --min_workers=N  (default: 0)
      With how many the run may go on when a worker fails at two starts in a
      row that saved nothing new; 0 is all. The next restart tries all again.

  --max_restarts=N  (default: {supervisor.MAX_RESTARTS})
      Restarts after a crash; those after a notice do not count. Three crashes
      in a row without a new save end the run in any case. 0 starts once.

  --grace_secs=SECS  (default: 0)
      How long the workers may take to save after a notice before they are
      killed; 0 is as long as they need.

  --[no]dry_run  (default: false)
      Prints the commands instead of running them.

What follows -- are the flags of python -m dtrain.main; they are checked before
anything starts. Exits with 0 when all workers are finished, 75 to be run again,
78 for a mistake in the command, else with the code of the worker that failed,
128 + N for signal N, after one line that names the cause."""


@dataclasses.dataclass(frozen=True)
class _Own:
    """The flags in front of the --."""

    num_workers: int
    min_workers: int
    max_restarts: int
    grace_secs: float
    dry_run: bool


def run(
    arguments: Sequence[str], environment: Mapping[str, str] = os.environ
) -> int:
    """Starts what a command line says.

    Args:
        arguments: the command line, the program's name first.
        environment: the environment variables of the process.

    Returns:
        The exit code of the process.

    Raises:
        UserError: the command line is wrong.
    """
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    ours, theirs = arguments[:end], arguments[end + 1 :]
    if {"--help", "-h"} & set(ours):
        print(_HELP)
        return errors.FINISHED
    own = _parse(ours)
    parsed = config.parse([ours[0], *theirs])
    _check(own, parsed, cluster.from_environment(environment))

    def plan(workers: Sequence[int]) -> tuple[local.Process, ...]:
        names = [f"worker {index}" for index in workers]
        return local.plan(local.free_ports(len(workers)), theirs, names)

    everyone = range(own.num_workers)
    if own.dry_run:
        print("\n".join(process.to_shell() for process in plan(everyone)))
        return errors.FINISHED
    options = supervisor.Options(
        num_workers=own.num_workers,
        min_workers=own.min_workers,
        max_restarts=own.max_restarts,
        grace_secs=own.grace_secs,
        fits=_fits(parsed),
    )
    return supervisor.run(options, plan)


def _parse(ours: list[str]) -> _Own:
    flag_values = flags.FlagValues()
    values: dict[str, Any] = {"flag_values": flag_values, "help": ""}
    flags.DEFINE_enum("backend", "local", ["local"], **values)
    flags.DEFINE_integer("num_workers", 1, **values)
    flags.DEFINE_integer("min_workers", 0, **values)
    flags.DEFINE_integer("max_restarts", supervisor.MAX_RESTARTS, **values)
    flags.DEFINE_float("grace_secs", 0.0, **values)
    flags.DEFINE_boolean("dry_run", False, **values)
    try:
        rest = flag_values(ours)
    except flags.Error as error:
        raise errors.UserError(
            f"{error}; the flags of dtrain.main go after --, --help lists the "
            "others"
        ) from error
    if len(rest) > 1:
        raise errors.UserError(
            f"{rest[1]!r} is not a flag; the flags of dtrain.main go after --"
        )
    names = [field.name for field in dataclasses.fields(_Own)]
    found: dict[str, Any] = {name: flag_values[name].value for name in names}
    return _Own(**found)


def _check(own: _Own, parsed: config.Config, workers: cluster.Cluster) -> None:
    """Checks what the flags say of each other.

    Raises:
        UserError: a value is out of its range, or contradicts another.
    """
    for name, least, most in (
        ("num_workers", 1, 1000),
        ("min_workers", 0, own.num_workers),
        ("max_restarts", 0, 10**9),
        ("grace_secs", 0, 10**9),
    ):
        value = getattr(own, name)
        # In this form, since not-a-number is neither below nor above.
        if not least <= value <= most:
            raise errors.UserError(
                f"{name} ({value}) must be between {least} and {most}"
            )
    if own.num_workers == 1:
        return
    if parsed.strategy not in ("default", "multi_worker"):
        raise errors.UserError(
            f"strategy ({parsed.strategy}) runs in one process; with "
            f"num_workers ({own.num_workers}) leave it out"
        )
    if workers != cluster.ALONE:
        raise errors.UserError(
            f"TF_CONFIG makes this worker {workers.index} of "
            f"{workers.num_workers}; leave num_workers ({own.num_workers}) "
            "out, or unset TF_CONFIG"
        )


def _fits(parsed: config.Config) -> Callable[[int], bool]:
    """Tells which numbers of workers can share a batch."""

    def fits(num_workers: int) -> bool:
        replicas = num_workers * (parsed.num_devices or 1)
        # Without micro-batches there is one for each replica.
        share, rest = divmod(parsed.micro_batches, replicas)
        if parsed.batch_size % replicas or rest:
            return False
        is_power_of_two = share & (share - 1) == 0
        return parsed.reduction == "fast" or replicas == 1 or is_power_of_two

    return fits


def main() -> None:
    """Runs the program."""
    # A worker may print what the terminal cannot show.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    errors.exit_with(lambda: run(sys.argv))


if __name__ == "__main__":
    main()
