"""Answers questions about a checkpoint.

python -m dtrain.checkpoint_tool digest runs/default/checkpoints/ckpt-5000
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dtrain import errors, startup

_HELP = """usage: python -m dtrain.checkpoint_tool digest CKPT

digest  prints one SHA-256 over the names, dtypes, shapes and bytes of all
        variables of a checkpoint: two states are equal if theirs are. CKPT is
        the path without .index, or the directory of checkpoints or of a run,
        whose newest one is taken."""


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: the command and what it is applied to.

    Returns:
        The exit code of the process.

    Raises:
        UserError: the command is unknown, or the checkpoint cannot be read.
    """
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(_HELP)
        return errors.FINISHED
    if len(arguments) != 2 or arguments[0] != "digest":
        raise errors.UserError(
            f"{' '.join(arguments)!r} is not a command; use: digest CKPT"
        )
    # TensorFlow takes seconds to import, and a wrong command needs none.
    startup.import_tensorflow()
    from dtrain import checkpoint_reader

    directory = arguments[1].rstrip("/")
    found = checkpoint_reader.steps(directory) or checkpoint_reader.steps(
        f"{directory}/checkpoints"
    )
    prefix = found[max(found)] if found else arguments[1].removesuffix(".index")
    print(f"{checkpoint_reader.digest(prefix)}  {prefix}")
    return errors.FINISHED


def main() -> None:
    """Runs the program."""
    errors.exit_with(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
