"""Trains a GAN.

It is started by

    python -m dtrain.main --strategy=mirrored
    python -m dtrain.main --help
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

from dtrain import config, errors, flags, streams
from dtrain.cluster import environment, rendezvous, xla_cache
from dtrain.resilience import standby, stop_file, watchdog
from dtrain.resilience import watcher as watcher_lib
from dtrain.storage import startup

_PAGE = flags.Page(
    "python -m dtrain.main",
    f"""\
Trains a GAN, and goes on where it stopped: a run that was killed and started
again with the same command ends with the bits of one that was not. Ctrl-C and
SIGTERM save and exit with {errors.RUN_AGAIN}, which means "run me again".""",
    config.Config,
    mark=lambda metadata: " *" if metadata.get("may_change") else "",
    end=f"""\
A run may be resumed with another value of what is marked with *.
--flagfile=FILE reads flags from a file, one on each line.

Exit codes:
{errors.exit_codes()}""",
)


def run(arguments: list[str], leave: Callable[[int], int] = int) -> int:
    """Trains as a command line says.

    Args:
        arguments: the command line, the program's name first.
        leave: see `train.train`.

    Returns:
        The exit code of the process.

    Raises:
        UserError: the command line, the data or the run directory is wrong.
        LostWorkerError: another worker has not come in time.
    """
    if flags.answer(arguments[1:], _PAGE.render):
        return errors.FINISHED
    parsed = config.parse(arguments)
    workers = environment.from_environment(os.environ)
    streams.never_wait()
    with contextlib.ExitStack() as stack:
        # From here on a signal ends the process with 75, not with its own.
        watcher = stack.enter_context(
            watcher_lib.watch(parsed.stop_after_secs, parsed.grace_secs)
        )
        dog = stack.enter_context(_watchdog(parsed, workers, watcher))
        # On a disk before TensorFlow is imported, which takes seconds: a file
        # that is written meanwhile is meant for this process.
        before = stop_file.look_before(parsed.run_dir)
        stack.enter_context(xla_cache.used(parsed))
        # A wrong command needs no TensorFlow.
        startup.import_tensorflow()
        from dtrain import train

        _look_for_stop_file(parsed.run_dir, watcher, before)
        # Another strategy is a mistake, which nobody need wait for.
        if parsed.strategy == "multi_worker" and not rendezvous.meet(
            workers, parsed.start_timeout_secs, lambda: watcher.requested
        ):
            # TensorFlow would wait for workers that are not there, and let no
            # other thread run meanwhile: not the one that ends the process.
            watcher.wait_for_end()
        return train.train(parsed, workers, watcher, dog, leave)


def _look_for_stop_file(
    run_dir: str, watcher: watcher_lib.Watcher, before: stop_file.Before
) -> None:
    """Lets a person stop the run by a file in its directory.

    Every worker looks for it, from now on: while one waits for the others,
    nobody else can tell it.
    """
    watcher.on_claimed = lambda: stop_file.remove(run_dir, before)
    watcher.look_for(
        stop_file.path(run_dir),
        stop_file.secs_between_looks(run_dir),
        lambda path: stop_file.exists(path, before),
    )


def _watchdog(
    parsed: config.Config,
    workers: environment.Cluster,
    watcher: watcher_lib.Watcher,
) -> contextlib.AbstractContextManager[watchdog.Watchdog]:
    """Starts the watchdog, which also tells a supervisor that this is alive."""
    dog = watchdog.Watchdog(
        os.path.join(parsed.run_dir, "stacks", f"worker-{workers.index}"),
        parsed.hang_timeout_secs,
        os.environ.get("DTRAIN_STATUS_FILE", ""),
        lambda: (watcher.notice, watcher.is_over),
        steps_per_loop=parsed.steps_per_loop,
        start_up_secs=watchdog.START_UP_SECS + parsed.start_timeout_secs,
    )
    dog.start()
    watcher.before_end = dog.tell
    return contextlib.closing(dog)


def _import_all() -> None:
    """Imports what a run needs; touches no device and no file of the run."""
    startup.import_modules()
    from dtrain import train  # noqa: F401


def _start() -> int:
    standby.stand_by(_import_all)
    return run(sys.argv, errors.leave)


def main() -> None:
    """Runs the program."""
    errors.exit_with(_start, errors.leave)


if __name__ == "__main__":
    main()
