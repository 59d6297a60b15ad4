"""Says where the wall time of a run went, and draws it.

python -m dtrain.report --run_dir=runs/default
"""

from __future__ import annotations

import collections
import dataclasses
import os
import sys
from collections.abc import Sequence

from dtrain import errors, flags
from dtrain.record import goodput, reading
from dtrain.storage import access, files


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says."""

    run_dir: str = flags.directory(
        "Directory of the run, on a disk or gs://. It may be training."
    )
    output: str = flags.field(
        "",
        flags.FLAGS,
        "PNG file that the picture is written to.",
        shown="RUN_DIR/report.png",
    )


_PAGE = flags.Page(
    "python -m dtrain.report",
    """\
Accounts for all wall time of all attempts of a run, and draws its losses, its
throughput and its restarts on one time line. See docs/goodput.md.""",
    Options,
    usage="--run_dir=DIR [--output=FILE]",
)


def read(run_dir: str) -> list[goodput.Attempt]:
    """Reads the attempts of a run, at least one; says which are damaged.

    Args:
        run_dir: on a disk or gs://.

    Raises:
        UserError: there is no run, no ledger, or none that can be read.
        StorageError: the disk or the store failed.
    """
    with files.storage_errors(run_dir):
        names = files.names(run_dir)
    if not {"config.json", "ledger"} & set(names):
        raise errors.UserError(
            f"run_dir ({run_dir}) holds no run; name the directory that it "
            "was started with"
        )
    attempts, notes = reading.attempts(run_dir)
    for note in notes:
        print(note, file=sys.stderr)
    if not attempts:
        raise errors.UserError(
            f"run_dir ({run_dir}) holds no ledger that can be read; a run "
            "writes one in ledger/ when it has started"
        )
    return attempts


def read_losses(run_dir: str) -> dict[str, reading.Curve]:
    """Reads the losses of a run; lines that cannot be read are left out.

    Args:
        run_dir: see `read`.

    Returns:
        By name, two float64 arrays [n]: the steps, ascending, and the values.

    Raises:
        StorageError: the disk or the store failed.
    """
    return {
        name: curve.finite()
        for name, curve in reading.metrics(run_dir).curves.items()
        if name.endswith("_loss")
    }


def table(account: goodput.Account, run_dir: str) -> str:
    """Returns what is printed.

    Args:
        account: of the run.
        run_dir: to be named.
    """
    seconds, wall = account.seconds, max(account.wall_secs, 1e-9)
    train = max(seconds["useful"], 1e-9)
    rows = [
        f"{label:<14}{goodput.clock(secs):>11}{secs / wall:>9.1%}"
        for label, secs in account.labelled()
    ]
    return "\n".join(
        (
            f"run       {run_dir}: {account.num_steps:,} useful steps, "
            f"{account.num_redone:,} redone",
            f"attempts  {len(account.placed):,}: {_ends(account)}",
            "",
            f"{'':<14}{'h:mm:ss':>11}{'share':>9}",
            *rows,
            f"{'all':<14}{goodput.clock(account.wall_secs):>11}{1:>9.1%}",
            "",
            f"images/s  {account.num_images / train:,.0f} in useful steps, "
            f"{account.num_images / wall:,.0f} over all",
            f"goodput   {account.goodput:.1%}",
        )
    )


def _ends(account: goodput.Account) -> str:
    """Says how the attempts ended, and how many did so."""
    ends = collections.Counter(
        goodput.ending(placed.attempt) for placed in account.placed
    ).most_common()
    return ", ".join(f"{count:,} {words}" for words, count in ends)


def run(arguments: Sequence[str]) -> int:
    """Reports on a run as a command line says; returns the exit code.

    Args:
        arguments: the command line, the program's name first.

    Raises:
        UserError: the command line is wrong, or there is nothing to report.
        StorageError: the disk or the store failed.
    """
    if flags.answer(arguments[1:], _PAGE.render):
        return errors.FINISHED
    options = Options(**flags.parse(Options, arguments))
    run_dir = options.run_dir
    output = flags.expand_home(options.output) or f"{run_dir}/report.png"
    account = goodput.account(read(run_dir))
    print(table(account, run_dir), flush=True)
    from dtrain.record import plotting

    name = os.path.basename(os.path.abspath(run_dir))
    picture = plotting.draw(account, read_losses(run_dir), name)
    access.make("output", os.path.dirname(output) or ".")
    try:
        files.write(output, picture)
    except OSError as error:
        failure = access.refusal("output", output, "written", error)
        raise failure from error
    print(f"picture   {output}")
    return errors.FINISHED


def main() -> None:
    """Runs the program."""
    errors.exit_with(lambda: run(sys.argv))


if __name__ == "__main__":
    main()
