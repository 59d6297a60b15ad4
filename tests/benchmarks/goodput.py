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

# What a restart is made of.
RESTART = ("idle", "start", "restore", "compile")


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
    """Compares a run with what it could have been; see `allowed`."""
    return Comparison(
        measured=account.goodput,
        allowed=allowed(account, num_faults, interval_secs),
        restart_secs=restart_secs(account),
        wall_secs=account.wall_secs,
    )


def allowed(
    account: goodput.Account, num_faults: int, interval_secs: float = 0.0
) -> float:
    """Returns the goodput that the costs of a run allow for its faults.

    The first start has its cost. A fault costs a restart and, on average, half
    of what lies between two saves; a save costs what it keeps the training
    waiting. What it took to see a hang is idle time, and so in the restarts.

    Args:
        account: of the run.
        num_faults: that it suffered.
        interval_secs: between two saves; 0 takes the mean of the run.

    Returns:
        A share of the wall time; 0 if the costs are higher than that.
    """
    seconds = account.seconds
    num_saves = sum(placed.attempt.num_saves for placed in account.placed)
    save_secs = seconds["save"] / max(num_saves, 1)
    busy = seconds["useful"] + seconds["redone"] + seconds["save"]
    interval = interval_secs or busy / max(num_saves, 1)
    restart = restart_secs(account)
    wall = max(account.wall_secs, 1e-9)
    lost_secs = restart + (restart + interval / 2) * num_faults
    return max(0.0, 1 - save_secs / max(interval, 1e-9) - lost_secs / wall)


def restart_secs(account: goodput.Account) -> float:
    """Returns the mean seconds from an end to the next useful step."""
    total = sum(account.seconds[kind] for kind in RESTART)
    return total / len(account.placed)


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
