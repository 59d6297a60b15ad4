"""Starts a run on this machine, or submits it to a cluster.

python -m launch.main --num_workers=2 -- --run_dir=runs/two --num_steps=500
python -m launch.main --backend=slurm --num_nodes=2 -- --run_dir=runs/two
python -m launch.main status --run_dir=runs/two
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dtrain import config, errors, flags, streams
from dtrain.cluster import environment as environment_lib
from launch.keep import supervisor, worker
from launch.options import BACKENDS, GROUPS, TITLES, Options, variables
from launch.visible import settings_before


def _mark(metadata: Mapping[str, Any]) -> str:
    """Says which backends a flag is for, if its title does not."""
    backends = metadata["backends"]
    own = TITLES.get(metadata["group"])
    is_general = backends in (BACKENDS, (own,))
    return "" if is_general else f"  [{', '.join(backends)}]"


_PAGE = flags.Page(
    "python -m launch.main",
    """\
Runs python -m dtrain.main, with the flags behind the --, and keeps it alive:
when a worker dies all end, and all start again from the newest state that
verifies. With --backend=local it starts workers on this machine and prints
their lines with the worker's name in front; Ctrl-C, SIGTERM, SIGUSR1 and
SIGUSR2 let them save and end, a second one ends them at once. The other
backends submit a job, in which each node does the same, and come back.

status, logs and stop are told the run's directory and know its job. stop lets
the run save, and takes the job out of the queue; submitted again, it goes on.
list has a line for the job of each run in a directory (default: runs).""",
    Options,
    GROUPS,
    usage="""[submit] [--flag=value ...] -- [dtrain's flags]
       python -m launch.main status|stop --run_dir=DIR
       python -m launch.main logs --run_dir=DIR [--follow]
       python -m launch.main list [--run_dir=DIR]""",
    mark=_mark,
    end=f"""\
All flags are checked before anything starts or is queued. Exits with
{errors.FINISHED} when all workers are finished or the job is submitted, else
with the code of the worker that failed, 128 + N for signal N, after one line
that names the cause.

Exit codes:
{errors.exit_codes()}""",
)

_VERBS = ("submit", "status", "logs", "stop", "list")


def run(
    arguments: Sequence[str], environment: Mapping[str, str] = os.environ
) -> int:
    """Does what a command line says; returns the exit code.

    Args:
        arguments: the command line, the program's name first.
        environment: the environment variables of the process.

    Raises:
        UserError: the command line is wrong.
        StorageError: what is written down of a job cannot be.
    """
    program, *rest = arguments
    is_named = bool(rest) and not rest[0].startswith("-")
    verb = rest.pop(0) if is_named else "submit"
    if verb not in _VERBS:
        raise errors.UserError(
            f"{verb!r} is none of {', '.join(_VERBS)}; the flags of "
            "dtrain.main go after --"
        )
    end = rest.index("--") if "--" in rest else len(rest)
    ours, theirs = [program, *rest[:end]], rest[end + 1 :]
    if flags.answer(ours[1:], _PAGE.render):
        return errors.FINISHED
    if verb == "submit":
        _check_place(theirs)
        options = Options(**_parse(ours))
        if options.backend == "local":
            return _run_here(options, theirs, environment)
        # Not at the top: it takes a tenth of a second, and few need it.
        from launch import submit

        submit.run(options, theirs)
        return errors.FINISHED
    from launch import verbs

    actions = {
        "status": verbs.status,
        "logs": verbs.logs,
        "stop": verbs.stop,
        "list": verbs.list_jobs,
    }
    return actions[verb](ours)


def _parse(ours: Sequence[str]) -> dict[str, Any]:
    try:
        return flags.parse(Options, ours)
    except errors.UserError as error:
        raise errors.UserError(
            f"{error}; the flags of dtrain.main go after --"
        ) from error


def _check_place(theirs: Sequence[str]) -> None:
    """Refuses a flag of this program that stands behind the --.

    Raises:
        UserError: there is one.
    """
    ours, trainer = (
        {field.name for field in dataclasses.fields(kind)}
        for kind in (Options, config.Config)
    )
    for argument in theirs:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name in ours - trainer:
            raise errors.UserError(
                f"{name} is a flag of launch.main; write it in front of the --"
            )


def _run_here(
    options: Options, theirs: Sequence[str], environment: Mapping[str, str]
) -> int:
    """Runs the workers on this machine until the run is finished."""
    parsed = config.parse(["dtrain.main", *theirs])
    _check(options, parsed, environment_lib.from_environment(environment))

    gpus = _share_gpus(options, environment)
    if options.devices_per_worker:
        theirs = [*theirs, f"--num_devices={options.devices_per_worker}"]
        if options.num_workers == 1:
            # Its strategy may be for one device alone.
            config.parse(["dtrain.main", *theirs])

    added = variables(options)

    def plan(workers: Sequence[int]) -> tuple[worker.Process, ...]:
        names = [f"worker {index}" for index in workers]
        ports = worker.free_ports(len(workers))
        # Each keeps its GPUs, even if others are left out.
        visible = [gpus[index] for index in workers] if gpus else []
        return worker.plan(ports, theirs, names, visible, added)

    if options.dry_run:
        everyone = plan(range(options.num_workers))
        print("\n".join(process.to_shell() for process in everyone))
        return errors.FINISHED
    streams.never_wait()
    return supervisor.run(
        supervisor.Options(
            num_workers=options.num_workers,
            min_workers=options.min_workers,
            max_restarts=options.max_restarts,
            grace_secs=options.grace_secs,
            fits=_fits(options, parsed),
            warm_spare=options.warm_spare,
        ),
        plan,
    )


def _check(
    options: Options, parsed: config.Config, workers: environment_lib.Cluster
) -> None:
    if options.min_workers > options.num_workers:
        raise errors.UserError(
            f"min_workers ({options.min_workers}) must be between 0 and "
            f"{options.num_workers}"
        )
    if options.devices_per_worker and parsed.num_devices:
        raise errors.UserError(
            f"num_devices ({parsed.num_devices}) is set by devices_per_worker "
            f"({options.devices_per_worker}); leave one of them out"
        )
    if options.num_workers == 1:
        return
    if parsed.strategy not in ("default", "multi_worker"):
        raise errors.UserError(
            f"strategy ({parsed.strategy}) runs in one process; with "
            f"num_workers ({options.num_workers}) leave it out"
        )
    if workers != environment_lib.ALONE:
        raise errors.UserError(
            f"{workers.source} makes this worker {workers.index} of "
            f"{workers.num_workers}; leave num_workers "
            f"({options.num_workers}) out, or unset {workers.source}"
        )


def _share_gpus(options: Options, environment: Mapping[str, str]) -> list[str]:
    # Of each worker CUDA_VISIBLE_DEVICES; nothing if it is not asked for.
    share = options.devices_per_worker
    total = options.num_workers * share
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    # If the machine has fewer, TensorFlow tells the worker.
    devices = visible.split(",") if visible else [*map(str, range(total))]
    if len(devices) < total:
        raise errors.UserError(
            f"devices_per_worker ({share}) must be at most "
            f"{len(devices) // options.num_workers}: CUDA_VISIBLE_DEVICES "
            f"({visible}) names {len(devices)} for {options.num_workers} "
            "workers"
        )
    return [
        ",".join(devices[first : first + share])
        for first in range(0, total, share or 1)
    ]


def _fits(options: Options, parsed: config.Config) -> Callable[[int], bool]:
    """Makes what tells whether so many workers can share a batch."""
    devices = options.devices_per_worker or parsed.num_devices or 1

    def fits(num_workers: int) -> bool:
        replicas = num_workers * devices
        # Without micro-batches there is one for each replica.
        share, rest = divmod(parsed.micro_batches, replicas)
        # A preset may have decided at the start of the run.
        before = None
        if config.undecided(parsed):
            before = settings_before(parsed)
        batch_size = (before or parsed).batch_size or replicas
        if batch_size % replicas or rest:
            return False
        is_power_of_two = share & (share - 1) == 0
        return parsed.reduction == "fast" or replicas == 1 or is_power_of_two

    return fits


def main() -> None:
    """Runs the program."""
    errors.exit_with(lambda: run(sys.argv))


if __name__ == "__main__":
    main()
