"""What the checkpoint tool takes, beside `cp` of the same files.

    python -m tests.benchmarks.toolbox --num_bytes=2000000000

Writes a checkpoint of that size, and prints for each command its seconds, how
many times that of `cp` it is, and its memory at the peak, with all of Python
and TensorFlow. `cp` puts the copy on the disk, as the tool does.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from tests import runs

NUM_BYTES = flags.DEFINE_integer("num_bytes", 2_000_000_000, "Of the values.")
WRITE = flags.DEFINE_string("write", "", "Only writes, to this directory.")
ROUNDS = flags.DEFINE_integer("rounds", 2, "The median is printed.")
# As large as the largest kernel of a network of 512 channels.
_TENSOR_BYTES = 32 << 20
_TOOL = (sys.executable, "-m", "dtrain.checkpoint_tool")


def write(directory: str, num_bytes: int) -> None:
    """Writes a checkpoint of random numbers, no more than one in memory."""
    # Not in the process that measures: what it starts would begin with the
    # peak of its memory.
    from dtrain.bundle.tree import Tensor, of_names
    from dtrain.checkpoint import writing

    shape = (_TENSOR_BYTES // 4,)

    def read(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=shape).astype("float32")

    tensors = {
        f"generator/layer_{number}/kernel": Tensor(
            "float32", shape, lambda number=number: read(number)
        )
        for number in range(max(1, num_bytes // _TENSOR_BYTES))
    }
    writing.commit(of_names(tensors), f"{directory}/ckpt-1")


def measure(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns its seconds and its peak of memory, in MB."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        env=runs.environment(TF_CPP_MIN_LOG_LEVEL="3"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, command
    return time.monotonic() - began, used.ru_maxrss * 1024 / 1e6


def main(_: list[str]) -> None:
    """Prints the table."""
    if WRITE.value:
        write(WRITE.value, NUM_BYTES.value)
        return
    with tempfile.TemporaryDirectory() as place:
        source = f"{place}/source/ckpt-1"
        again = (f"--write={place}/source", f"--num_bytes={NUM_BYTES.value}")
        measure([sys.executable, "-m", "tests.benchmarks.toolbox", *again])
        files = [str(path) for path in pathlib.Path(place, "source").iterdir()]
        commands = {
            "cp": ["sh", "-c", 'cp "$@" && sync "${@:$#}"', "sh", *files],
            "inspect": [*_TOOL, "inspect", source],
            "inspect --no_values": [*_TOOL, "inspect", source, "--no_values"],
            "verify": [*_TOOL, "verify", source],
            "diff": [*_TOOL, "diff", source, source],
            "edit --scale": [*_TOOL, "edit", source, "--scale=generator=0.5"],
            "export .safetensors": [*_TOOL, "export", source],
            "export .npz": [*_TOOL, "export", source],
        }
        print(f"{'command':22}{'seconds':>9}{'over cp':>9}{'peak MB':>9}")
        of_cp = 0.0
        for name, command in commands.items():
            taken = []
            for number in range(ROUNDS.value):
                output = f"{place}/{name.split()[-1].strip('-.')}-{number}"
                whole = {
                    "cp": ["bash", *command[1:], f"{place}/"],
                    "edit --scale": [*command, f"--output={output}/ckpt-1"],
                    "export .safetensors": [
                        *command,
                        f"--output={output}.safetensors",
                    ],
                    "export .npz": [*command, f"--output={output}.npz"],
                }.get(name, command)
                taken.append(measure(whole))
                subprocess.run(
                    [
                        *("find", place, "-mindepth", "1", "-maxdepth", "1"),
                        *("!", "-name", "source", "-exec", "rm", "-r", "{}"),
                        "+",
                    ],
                    check=True,
                )
            secs = statistics.median(each for each, _ in taken)
            peak = max(each for _, each in taken)
            of_cp = of_cp or secs
            print(f"{name:22}{secs:9.1f}{secs / of_cp:9.1f}{peak:9.0f}")


if __name__ == "__main__":
    app.run(main)
