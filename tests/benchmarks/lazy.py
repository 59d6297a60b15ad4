"""Shows what a phase costs that is run in each 16th step alone.

    python -m tests.benchmarks.lazy [--rounds=9] [--steps=48] [dtrain flags]

Three StyleGAN2 of `tests/programs` take turns in one process: without the R1
phase, with it in every step, and in each 16th. The share is what the lazy one
costs of what the other does; a sixteenth, 0.0625, is what it should.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
import tempfile

from dtrain import config as config_lib
from dtrain.cluster import environment
from dtrain.cluster import strategy as strategy_lib
from dtrain.config import Config
from dtrain.data import sources
from dtrain.gan.program import Program
from tests import programs_test
from tests.benchmarks import command, programs, train
from tests.programs import stylegan2

EVERY_STEPS = {"without": 0, "always": 1, "lazy": 16}


def make(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    r1_every_steps: int = 16,
) -> Program:
    """Makes StyleGAN2 with another interval of R1; 0 is without."""
    made = stylegan2.make(config, image_shape, num_classes)
    phases = []
    for phase in made.phases:
        if phase.objective is not stylegan2.penalize:
            phases.append(phase)
        elif r1_every_steps:
            phases.append(phase._replace(every_steps=r1_every_steps))
    return dataclasses.replace(made, phases=phases)


def main() -> None:
    """Measures and prints the table."""
    own, rest = command.own_flags(sys.argv[1:], {"rounds": 9, "steps": 48})
    turns, size = {}, 0
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        told = programs_test.flags("stylegan2", place)
        for name, every_steps in EVERY_STEPS.items():
            config = config_lib.parse(
                [
                    *("main", *told, *programs.SIZES, "--steps_per_loop=16"),
                    *("--image_size=32", "--base_channels=32"),
                    *("--model=tests.benchmarks.lazy:make", *rest),
                    f"--model_flag=r1_every_steps={every_steps}",
                    "--run_dir=nowhere",
                ]
            )
            strategy = strategy_lib.make(config, environment.ALONE)
            data = sources.open_data(config)
            turns[name] = train.by_dtrain(config, strategy, data)
            size = config.batch_size
            turns[name](2 * config.steps_per_loop)
    print("milliseconds of a step\n without    always      lazy   share")
    shares = []
    for _ in range(own["rounds"]):
        without, always, lazy = (
            1000.0 * size / train.measure(turn, own["steps"], config)
            for turn in turns.values()
        )
        share = (lazy - without) / (always - without)
        shares.append(share)
        print(
            f"{without:>8.2f}  {always:>8.2f}  {lazy:>8.2f}  {share:>6.3f}",
            flush=True,
        )
    print(f"median of the shares {statistics.median(shares):.3f}")


if __name__ == "__main__":
    main()
