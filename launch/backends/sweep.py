"""The runs of a sweep: one for each combination of values of some flags."""

from __future__ import annotations

import itertools
import math
import os
import re

from dtrain import config
from dtrain.errors import UserError
from launch.job import Job
from launch.options import Options

# The limit of a job array, unless the site has set MaxArraySize.
_MOST_RUNS = 1000
_MOST_NAME_BYTES = 255


def runs(job: Job) -> list[tuple[str, ...]]:
    """Returns the arguments of each run of a job; without a sweep of one.

    Args:
        job: the job.

    Raises:
        UserError: the sweep is malformed, or a run of it has wrong flags.
    """
    axes = _axes(job.options)
    if not axes:
        return [job.worker_arguments]
    all_arguments = []
    for combination in itertools.product(*axes):
        name = ",".join(combination)
        if len(os.fsencode(name)) > _MOST_NAME_BYTES:
            raise UserError(
                f"sweep ({name[:80]}...) makes the name of a directory longer "
                f"than {_MOST_NAME_BYTES} bytes; take shorter values"
            )
        arguments = (
            *job.worker_arguments,
            *(f"--{setting}" for setting in combination),
            f"--run_dir={job.parsed.run_dir}/{name}",
        )
        # A mistake is found before anything waits in a queue.
        config.parse(["dtrain.main", *arguments])
        all_arguments.append(arguments)
    return all_arguments


def _axes(options: Options) -> list[list[str]]:
    """Returns, for each flag that is swept over, `flag=value` of each value.

    Raises:
        UserError: it is malformed, or makes one run twice, or too many.
    """
    axes = []
    for text in options.sweep:
        name, equals, values = text.partition("=")
        if not re.fullmatch(r"\w+", name) or not equals:
            raise UserError(
                f"sweep ({text}) must be of the form flag=value,value"
            )
        axes.append([f"{name}={value}" for value in values.split(",")])
        if len(set(axes[-1])) < len(axes[-1]):
            raise UserError(
                f"sweep ({text}) has a value twice, and two jobs would train "
                "one run; leave one out"
            )
    names = [axis[0].partition("=")[0] for axis in axes]
    if "run_dir" in names or len(set(names)) < len(names):
        raise UserError(
            f"sweep ({', '.join(names)}) must be over different flags, and not "
            "over run_dir, which it chooses"
        )
    if options.max_parallel and not axes:
        raise UserError(
            f"max_parallel ({options.max_parallel}) is for the runs of a "
            "sweep; add --sweep, or leave it out"
        )
    num_runs = math.prod(map(len, axes))
    if num_runs > _MOST_RUNS:
        raise UserError(
            f"sweep makes {num_runs:,} runs, and must make at most "
            f"{_MOST_RUNS:,}; submit parts of it, in other run_dirs"
        )
    return axes
