"""Trains a GAN.

python -m dtrain.main --strategy=mirrored
python -m dtrain.main --help
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from dtrain import cluster, config, errors, preemption, rendezvous, startup

_SUMMARY = """\
Trains a GAN, and goes on where it stopped: a run that was killed and started
again with the same command ends with the bits of one that was not. Ctrl-C and
SIGTERM save and exit with 75, which means "run me again"; 0 is finished, 74 a
disk or a store that failed, and 78 a mistake in the command."""


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
    if {"--help", "-h", "-help", "--helpfull"} & set(arguments[1:]):
        print(config.help_page("python -m dtrain.main", _SUMMARY))
        return errors.FINISHED
    parsed = config.parse(arguments)
    workers = cluster.from_environment(os.environ)
    # From here on a signal ends the process with 75, and not with its own.
    with preemption.watch(parsed.stop_after_secs, parsed.grace_secs) as watcher:
        # TensorFlow takes seconds to import, and a wrong command needs none.
        startup.import_tensorflow()
        from dtrain import train

        # Another strategy is a mistake, which nobody need wait for.
        if parsed.strategy == "multi_worker":
            rendezvous.meet(
                workers, parsed.start_timeout_secs, lambda: watcher.requested
            )
        return train.train(parsed, workers, watcher, leave)


def main() -> None:
    """Runs the program."""
    errors.exit_with(lambda: run(sys.argv, errors.leave), errors.leave)


if __name__ == "__main__":
    main()
