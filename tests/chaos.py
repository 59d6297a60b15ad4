"""Breaks a real run, again and again, and compares its bits with a whole one.

    python -m tests.chaos --minutes=10 --mean_secs=60
    python -m tests.chaos --faults=kill,stuck,link --hosts=2 --minutes=5

The run is started by `launch.main`, as a user would; two workers on this
machine, or one on each of two hosts, which are network namespaces. A fault is
drawn at random, each kind once before any comes again, and the next one as many
seconds later as an exponential distribution says; with --several, up to three
come at once. When the time is over the run is told to stop, and another one,
that nothing happens to, trains as many steps: both must end with the same
SHA-256 of all state, and with the same metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from dtrain import errors, flags, report
from dtrain.record import goodput
from dtrain.storage import startup
from tests.benchmarks import goodput as benchmark
from tests.chaos_faults import FAULTS, lacking
from tests.chaos_victim import (
    NUM_WORKERS,
    PATIENCE_SECS,
    Victim,
    finish,
    small_disk,
)

_HELP = """usage: python -m tests.chaos [--flag=value ...]

  --minutes      (default: 3)     how long the run is broken
  --mean_secs    (default: 20)    seconds between two faults, on average
  --faults       (default: all)   kinds, as in kill,stuck; see below
  --[no]several  (default: false) up to three faults at once
  --hosts        (default: 1)     2: each worker on a host of its own (root)
  --seed         (default: 0)     of all that is random here
  --keep         (default: "")    directory to keep the runs in

Kinds of fault:
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says; see `_HELP`."""

    minutes: float = 3.0
    mean_secs: float = 20.0
    faults: str = "all"
    several: bool = False
    hosts: int = 1
    seed: int = 0
    keep: str = ""


@dataclasses.dataclass
class Record:
    """What was done to a run, and how long it took to go on.

    Attributes:
        pauses: the longest time without a new step between each fault and the
            next one, in seconds, by kind.
        step: at which it was stopped.
        ends: of its supervisors, by exit code.
    """

    pauses: dict[str, list[float]]
    step: int
    ends: dict[int, int]


def torment(victim: Victim, options: Options, kinds: Sequence[str]) -> Record:
    """Breaks a run until the time is over, and stops it."""
    rng = random.Random(options.seed)
    pauses: dict[str, list[float]] = {kind: [] for kind in kinds}
    drawn = _draw(kinds, rng)
    victim.start()
    _pause(victim, 0.0, at_least=1)
    end = time.monotonic() + 60 * options.minutes
    while True:
        secs = rng.expovariate(1 / options.mean_secs)
        if time.monotonic() + secs > end:
            break
        count = rng.randint(1, 3) if options.several else 1
        chosen = dict.fromkeys(itertools.islice(drawn, count))
        before = victim.step()
        print(f"{', '.join(chosen)} at step {before:,}", flush=True)
        for kind in chosen:
            FAULTS[kind][1](victim, rng)
        pause = _pause(victim, secs, at_least=before + 1)
        for kind in chosen:
            pauses[kind].append(pause)
    return Record(pauses, victim.stop(), dict(victim.ends))


def _draw(kinds: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Yields kinds at random, each of them once before any comes again."""
    while True:
        yield from rng.sample(kinds, len(kinds))


def _pause(victim: Victim, secs: float, at_least: int) -> float:
    """Lets a run train for a while, and until a step is done.

    Returns:
        The longest time without a new step.
    """
    start = newest = time.monotonic()
    step, longest = victim.step(), 0.0
    while newest < start + secs or step < at_least:
        victim.revive()
        time.sleep(0.1)
        now, seen = time.monotonic(), victim.step()
        longest = max(longest, now - newest)
        # A run that is resumed has lines taken away, too.
        if seen > step:
            newest = now
        step = seen
        assert now - newest < PATIENCE_SECS, victim.tail()
    return longest


def compare(victim: Victim, step: int) -> None:
    """Trains as many steps without any fault, and compares the bits."""
    startup.import_tensorflow()
    from dtrain.bundle import tensors

    whole = victim.place / "whole"
    finish(
        "dtrain.main",
        *victim.flags(),
        "--strategy=mirrored",
        f"--num_devices={NUM_WORKERS}",
        f"--run_dir={whole}",
        f"--num_steps={step}",
        "--steps_per_loop=50",
    )
    prefixes = [
        f"{run}/checkpoints/ckpt-{step}" for run in (victim.run_dir, whole)
    ]
    broken, expected = map(tensors.digest, prefixes)
    print(f"step {step:,}\n  broken again and again  {broken}")
    print(f"  nothing happened        {expected}")
    assert broken == expected, "the bits differ"
    logs = [run / "metrics.jsonl" for run in (victim.run_dir, whole)]
    assert logs[0].read_bytes() == logs[1].read_bytes(), "metrics.jsonl differs"


def _table(record: Record) -> str:
    lines = [f"{'fault':<12} {'times':>5} {'longest pause':>13}"]
    for kind, secs in record.pauses.items():
        slowest = f"{max(secs):.1f} s" if secs else "-"
        lines.append(f"{kind:<12} {len(secs):>5} {slowest:>13}")
    return "\n".join(lines)


def _goodput(victim: Victim) -> str:
    """Says how much of the time was of use, and how much could have been."""
    account = goodput.account(report.read(str(victim.run_dir)))
    restarts = len(account.placed) - 1
    found = benchmark.compare(account, restarts)
    return (
        f"{report.table(account, str(victim.run_dir))}\n"
        f"goodput {found.measured:.1%} of {found.wall_secs:.0f} s with "
        f"{restarts} restarts of {found.restart_secs:.1f} s each; these and "
        f"the saves allow {found.allowed:.1%}: {found.ratio:.1%} of that\n"
        f"a restart is {_shares(account, benchmark.RESTART, restarts + 1)}\n"
        f"of the rest, {_shares(account, ('redone', 'draw', 'other'), 1)}"
    )


def _shares(account: goodput.Account, kinds: Sequence[str], count: int) -> str:
    """Says how long each kind of time took, of so many."""
    return ", ".join(
        f"{kind} {account.seconds[kind] / count:.1f} s" for kind in kinds
    )


def run(options: Options) -> None:
    """Does all of it, and prints what came of it.

    Raises:
        AssertionError: the run did not survive, or its bits differ.
    """
    kinds = [*FAULTS] if options.faults == "all" else options.faults.split(",")
    unknown = set(kinds) - set(FAULTS)
    if unknown:
        raise errors.UserError(
            f"faults ({', '.join(sorted(unknown))}) must be of: "
            f"{', '.join(FAULTS)}"
        )
    place = pathlib.Path(options.keep or tempfile.mkdtemp(prefix="chaos-"))
    victim = Victim(place, options.hosts)
    with contextlib.ExitStack() as stack:
        has_disk = stack.enter_context(small_disk(victim.disk))
        has_tmp = stack.enter_context(small_disk(victim.tmp))
        left_out = lacking(victim, has_disk=has_disk, has_tmp=has_tmp)
        for kind in [kind for kind in kinds if kind in left_out]:
            print(f"without {kind}: it needs {left_out[kind]}")
            kinds.remove(kind)
        if options.hosts > 1:
            stack.enter_context(victim.network)
        stack.callback(victim.end)
        record = torment(victim, options, kinds)
        print(_table(record))
        ends = ", ".join(f"{code}: {n}" for code, n in record.ends.items())
        print(f"supervisors that ended, by exit code: {ends or 'none'}")
        compare(victim, record.step)
        print(_goodput(victim))
    if not options.keep:
        shutil.rmtree(place)


def parse(arguments: Sequence[str]) -> Options:
    """Reads the command line.

    Raises:
        UserError: it is wrong.
    """
    known = {
        name: (default, "")
        for name, default in dataclasses.asdict(Options()).items()
    }
    return Options(**flags.parse_flags(arguments, known))


def main() -> int:
    """Runs the program."""
    if {"--help", "-h"} & set(sys.argv):
        kinds = [f"  {kind:<12} {words}" for kind, (words, _) in FAULTS.items()]
        print(_HELP + "\n".join(kinds))
        return errors.FINISHED
    # What was mounted and started is then taken down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run(parse(sys.argv))
    return errors.FINISHED


if __name__ == "__main__":
    errors.exit_with(main)
