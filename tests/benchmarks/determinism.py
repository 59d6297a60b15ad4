"""Measures what --deterministic costs.

    python -m tests.benchmarks.determinism [--rounds=5] [dtrain flags]

Whether TensorFlow is deterministic is set once for a process, so each turn is
one: they take turns, with and without, on the same images and networks as
`tests.benchmarks.train`.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys

from tests.benchmarks import command


def turn(flag: str, rest: list[str]) -> float:
    """Runs dtrain alone, in a process of its own; returns images/s."""
    output = subprocess.run(
        [
            *(sys.executable, "-m", "tests.benchmarks.train", "--rounds=3"),
            *("--sides=28", "--batches=64", flag, *rest),
        ],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout
    [speed] = re.findall(r"^\| 28 \| 64 \| ([\d,]+) \|", output, re.MULTILINE)
    return float(speed.replace(",", ""))


def main() -> None:
    """Measures and prints the table."""
    own, rest = command.own_flags(sys.argv[1:], {"rounds": 5})
    print("round  deterministic   not   ratio   (images/s)")
    ratios = []
    for number in range(own["rounds"]):
        strict = turn("--deterministic", rest)
        loose = turn("--nodeterministic", rest)
        ratios.append(strict / loose)
        print(
            f"{number:>5}  {strict:>13.1f}  {loose:>6.1f}  {ratios[-1]:>6.3f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
