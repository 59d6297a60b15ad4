"""Compares the goodput of a run with what its own costs allow.

    python -m tests.benchmarks.goodput --run_dir=DIR --faults=N [--interval=S]

allowed = 1 - save cost / interval
            - (restart + (restart + interval / 2) x faults) / wall time

The costs are those of the run's ledger. The interval between two saves is the
run's mean one, in seconds of training, unless it is given. A restart is what
start-up, restore, compiling and idling take in the mean of all attempts; the
first start has no fault, and its cost.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from dtrain import errors, flags, report
from dtrain.record import goodput


class Comparison(NamedTuple):
    """What a run did with its time, and what it could have done.

    Attributes:
        measured: the goodput of the run.
        allowed: what its costs allow.
        restart_secs: mean time from an end to the next useful step.
        wall_secs: of the run.
    """

    measured: float
    allowed: float
    restart_secs: float
    wall_secs: float

    @property
    def ratio(self) -> float:
        """Returns the measured goodput as a share of the allowed one."""
        return self.measured / max(self.allowed, 1e-9)


def compare(
    account: goodput.Account, num_faults: int, interval_secs: float = 0.0
) -> Comparison:
    """Compares a run with what it could have been; see `goodput.allowed`."""
    return Comparison(
        measured=account.goodput,
        allowed=goodput.allowed(account, num_faults, interval_secs),
        restart_secs=goodput.restart_secs(account),
        wall_secs=account.wall_secs,
    )


def run(arguments: list[str]) -> int:
    """Prints the comparison; returns the exit code.

    Raises:
        UserError: the command line is wrong, or there is no ledger.
    """
    options = flags.parse_flags(
        arguments,
        {"run_dir": ("", ""), "faults": (-1, ""), "interval": (0.0, "")},
    )
    for name, is_given in (
        ("run_dir", options["run_dir"]),
        ("faults", options["faults"] >= 0),
    ):
        if not is_given:
            raise errors.UserError(f"{name} is missing; use --{name}=...")
    account = goodput.account(report.read(options["run_dir"]))
    found = compare(account, options["faults"], options["interval"])
    print(
        f"wall      {found.wall_secs:>9.1f} s, "
        f"{len(account.placed)} attempts, {options['faults']} faults\n"
        f"restart   {found.restart_secs:>9.1f} s\n"
        f"measured  {found.measured:>9.1%}\n"
        f"allowed   {found.allowed:>9.1%}\n"
        f"ratio     {found.ratio:>9.1%}"
    )
    return errors.FINISHED


if __name__ == "__main__":
    errors.exit_with(lambda: run(sys.argv))
