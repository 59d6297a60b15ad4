"""Runs the benchmarks of docs/speed.md, one after the other.

    python -m tests.benchmarks [--write] [--gpu] [--dry_run] [NAME ...]

Each is a program of its own, `python -m tests.benchmarks.NAME`, whose first
lines say what it measures and what else it takes. `--write` puts the tables,
and the machine that they are of, into docs/speed.md.
`--gpu` runs those that say something of a node with GPUs, in ten minutes: all
its GPUs are in one strategy. `--dry_run` prints the commands.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata

from tests import runs
from tests.benchmarks import command
from tests.benchmarks.pages import replace_table

# By name: the minutes that it takes on two cores.
PARTS = {
    "train": 13,
    "kernels": 2,
    "presets": 33,
    "replicas": 9,
    "overhead": 1,
    "reading": 5,
    "reduction": 6,
    "stall": 1,
    "checkpoints": 9,
    "restart": 6,
    "requeue": 2,
    "start": 4,
    "growth": 2,
    "scale": 2,
    "figure": 1,
}
_ON_GPU = {
    # Determinism is switched on for a process, and would slow its peers, too.
    "train": (
        *("--rounds=4", "--secs=2", "--sides=28,64", "--batches=64,256"),
        "--nodeterministic",
    ),
    "overhead": ("--rounds=5",),
    "checkpoints": ("--megabytes=600", "--rounds=3"),
    "restart": ("--num_kills=2", "--workers=1,2"),
}


def commands(names: list[str], *, gpu: bool, write: bool) -> list[list[str]]:
    """Returns the commands, in their order.

    Args:
        names: of `PARTS`; all if there are none.
        gpu: whether they are those for a node with GPUs.
        write: whether they write into docs/speed.md.

    Raises:
        SystemExit: there is no benchmark of that name.
    """
    known = _ON_GPU if gpu else PARTS
    for name in names:
        if name not in known:
            command.refuse(f"{name} is none of {', '.join(known)}")
    return [
        [
            *(sys.executable, "-m", f"tests.benchmarks.{name}"),
            *(_ON_GPU[name] if gpu else ()),
            *(["--write"] if write else ()),
        ]
        for name in names or known
    ]


def machine() -> list[str]:
    """Says what is measured, and on what: a line each."""
    names = ("tensorflow", "keras", "numpy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    num_pages = os.sysconf("SC_PHYS_PAGES")
    gib = num_pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    return [
        f"- {os.cpu_count()} logical CPUs ({_cpu()}), {gib:.0f} GiB of memory"
        f"{_gpus()}",
        f"- Python {platform.python_version()}, {versions}",
    ]


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _gpus() -> str:
    import tensorflow as tf

    names = [
        tf.config.experimental.get_device_details(device)["device_name"]
        for device in tf.config.list_physical_devices("GPU")
    ]
    return f", {len(names)} x {names[0]}" if names else ", no GPU"


def main() -> int:
    """Runs the benchmarks; returns how many have failed."""
    flags = {each for each in sys.argv[1:] if each.startswith("-")}
    unknown = flags - {"--write", "--gpu", "--dry_run"}
    if unknown:
        print(__doc__)
        return len(unknown - {"--help", "-h"})
    names = [each for each in sys.argv[1:] if each not in flags]
    chosen = commands(names, gpu="--gpu" in flags, write="--write" in flags)
    told = machine()
    print("\n".join(told), flush=True)
    if "--write" in flags:
        replace_table(runs.ROOT / "docs/speed.md", "machine", told)
    failed = []
    for words in chosen:
        print(f"\n$ {shlex.join(words)}", flush=True)
        if "--dry_run" in flags:
            continue
        begin = time.monotonic()
        code = subprocess.run(words, cwd=runs.ROOT).returncode
        minutes = (time.monotonic() - begin) / 60
        print(f"(exit {code}, after {minutes:.1f} minutes)", flush=True)
        if code:
            failed.append(words[2])
    if failed:
        print(f"failed, see above: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main())
