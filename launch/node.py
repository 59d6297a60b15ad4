"""What each node of a job runs: the supervisor of its worker.

A scheduler starts it, by the plan of a backend:

    python -m launch.node --log_dir=DIR --grace_secs=60 -- --run_dir=gs://...

Who the other nodes are is read from the environment; see
`dtrain.cluster.environment`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import urllib.parse
from collections.abc import Mapping, Sequence

from dtrain import config, errors, flags, streams
from dtrain.cluster import environment as environment_lib
from dtrain.resilience import stop_file
from launch.keep import supervisor, worker


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags in front of the --."""

    log_dir: str = flags.field(
        "",
        flags.FLAGS,
        "Directory of a log of this worker, which is added to; empty prints.",
    )
    max_restarts: int = flags.field(
        supervisor.MAX_RESTARTS, flags.FLAGS, "As in launch.main.", minimum=0
    )
    grace_secs: float = flags.field(
        0.0, flags.FLAGS, "As in launch.main.", minimum=0.0
    )
    warm_spare: bool = flags.field(True, flags.FLAGS, "As in launch.main.")
    again_code: int = flags.field(
        0,
        flags.FLAGS,
        f"Exits with it in place of {errors.RUN_AGAIN} and "
        f"{errors.LOST_WORKER}, for a scheduler that starts a job again after "
        "this code alone; 0 does not.",
        minimum=0,
        below=256,
    )
    is_encoded: bool = flags.field(
        False,
        flags.FLAGS,
        "The flags behind the -- are percent-encoded, for a scheduler that "
        "would replace $(VARIABLE) in them.",
    )

    def __post_init__(self) -> None:
        flags.check(self)


_PAGE = flags.Page(
    "python -m launch.node",
    """\
Runs the worker of a node and keeps it alive. A scheduler starts it, by the plan
of a backend. Who the other nodes are is read from the environment.""",
    Options,
    usage="[--flag=value ...] -- [dtrain's flags]",
)


def run(
    arguments: Sequence[str], environment: Mapping[str, str] = os.environ
) -> int:
    """Runs the worker of this node until the run is finished.

    Args:
        arguments: the command line, the program's name first.
        environment: the variables of this process.

    Returns:
        The exit code of the supervisor; but that of a finished run if a person
        has stopped it, for the scheduler would start it again.

    Raises:
        UserError: the command line or the environment is wrong.
    """
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if flags.answer(arguments[1:end], _PAGE.render):
        return errors.FINISHED
    options = Options(**flags.parse(Options, arguments[:end]))
    theirs = arguments[end + 1 :]
    if options.is_encoded:
        theirs = [
            urllib.parse.unquote(argument, errors="surrogateescape")
            for argument in theirs
        ]
    parsed = config.parse([arguments[0], *theirs])
    before = stop_file.look_before(parsed.run_dir, environment)
    workers = environment_lib.from_environment(environment)
    name = f"worker {workers.index}"
    if options.log_dir:
        _log_to(options.log_dir, workers.index)
    streams.never_wait()
    code = supervisor.run(
        supervisor.Options(
            max_restarts=options.max_restarts,
            grace_secs=options.grace_secs,
            is_of_a_job=True,
            warm_spare=options.warm_spare,
        ),
        lambda _: worker.plan((0,), theirs, (name,)),
    )
    if code not in (errors.RUN_AGAIN, errors.LOST_WORKER):
        return code
    # A person has ended the run, whatever became of this worker.
    if stop_file.exists(stop_file.path(parsed.run_dir), before):
        print(f"{name} ends: the stop file is there", file=sys.stderr)
        return errors.FINISHED
    return options.again_code or code


def _log_to(directory: str, index: int) -> None:
    path = os.path.join(directory, f"worker-{index}.log")
    try:
        os.makedirs(directory, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise errors.StorageError(f"{path}: {error.strerror}") from error
    streams.drain()
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    os.close(file)


def main() -> None:
    """Runs the program."""
    errors.exit_with(lambda: run(sys.argv))


if __name__ == "__main__":
    main()
