"""Looks at checkpoints, edits them, and carries them to other programs.

python -m dtrain.checkpoint_tool inspect runs/default

The checkpoints are those of any TensorFlow 2 program, dtrain's or not.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from dtrain import errors, flags
from dtrain.checkpoint import retention
from dtrain.config.keeping import SavingSettings
from dtrain.storage import startup

_HELP = """usage: python -m dtrain.checkpoint_tool COMMAND ...

Looks at checkpoints of any TensorFlow 2 program, edits them, and carries them
to other programs. Nothing needs the code of the model, but for .keras and
SavedModel.

Look:
  list DIR                 the checkpoints of a directory, or of a run
  inspect CKPT             names, shapes, what the values are like
  cat CKPT NAME            the values of a tensor
  diff A B                 what is not the same
  verify CKPT              reads all of it, and compares with its checksums
  digest CKPT              one SHA-256 over all variables

Change; the source stays as it is:
  edit CKPT --output=NEW   rename, drop, cast, set, copy, ...
  average A B ... --output=NEW
                           the mean of checkpoints of one program
  merge NAME=CKPT ... --output=NEW
                           the generator of one, the discriminator of another

Carry:
  export CKPT --output=FILE
                           .safetensors, .npz, or of a run the EMA generator
                           as .keras, or what draws as a SavedModel, DIR/
  import FILE --output=NEW
                           back from these, .h5, .hdf5 or .weights.json

Keep:
  prune DIR                removes what no policy keeps
  pin CKPT NAME            keeps one for ever
  unpin DIR NAME           lets it go

CKPT is a path without .index; or a directory of checkpoints or of a run, whose
newest one is taken. A NAME is as `inspect` shows it, and stands for all below
it. Everything may be on gs://. `COMMAND --help` tells the rest."""

# Verbs of an edit, in the order of the help, and what each says of itself.
EDITS = {
    "rename": ("OLD=NEW", "another name, for all that is below it too"),
    "rename_all": ("REGEX=NEW", "likewise, in all names; NEW may have \\1"),
    "drop": ("NAME", "leaves it out; a NAME may have * and ?"),
    "keep": ("NAME", "leaves out all else"),
    "cast": ("NAME=DTYPE", "converts those with fractions"),
    "scale": ("NAME=FACTOR", "multiplies"),
    "fill": ("NAME=VALUE", "the same value everywhere"),
    "set": ("NAME=VALUE", "as in step=0, or v=[1.5,2]"),
    "copy": ("NAME=CKPT", "from another one; of another name as CKPT::NAME"),
    "zero_slots": ("OPTIMIZER", "makes it forget its moments; * is each"),
    "drop_slots": ("OPTIMIZER", "leaves its moments out"),
    "set_step": ("N", "how many steps were done"),
}


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Writes lines of the same length on every terminal, and defaults."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=78)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            textwrap.fill(line, width, subsequent_indent=indent)
            for line in text.splitlines()
        )

    def _get_help_string(self, action: argparse.Action) -> str:
        words, default = action.help or "", action.default
        is_flag = bool(action.option_strings) and action.nargs != 0
        if is_flag and default not in ("", None) and "default:" not in words:
            words = f"{words} (default: %(default)s)".lstrip()
        return words


class _Parser(argparse.ArgumentParser):
    """Raises what the other programs raise, and does not take `--out`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=_Formatter, **options
        )

    def error(self, message: str) -> NoReturn:
        """Says what is wrong with a command line.

        Args:
            message: what argparse says.

        Raises:
            UserError: always.
        """
        raise errors.UserError(f"{message}; see {self.prog} --help")


class _Wish(argparse.Action):
    """Keeps the edits in the order in which they are written."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        del parser
        verb = (option_string or "").removeprefix("--")
        namespace.wishes = [*(namespace.wishes or []), (verb, values)]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m dtrain.checkpoint_tool", add_help=False)
    commands = parser.add_subparsers(dest="command", parser_class=_Parser)
    _add_looking(commands)
    _add_comparing(commands)
    _add_changing(commands)
    _add_carrying(commands)
    _add_keeping(commands)
    return parser


def _add_looking(commands: Any) -> None:
    command = commands.add_parser("list", description="Lists checkpoints.")
    command.add_argument("directory", metavar="DIR")
    command.add_argument("--metric", default="", help="also shown, by name")

    command = commands.add_parser(
        "inspect", description="Shows what is in a checkpoint."
    )
    command.add_argument("checkpoint", metavar="CKPT")
    command.add_argument(
        "--filter", default="", metavar="NAME", help="a NAME, or with * and ?"
    )
    command.add_argument("--json", action="store_true", help="for programs")
    command.add_argument(
        "--no_values", action="store_true", help="reads only names and shapes"
    )

    command = commands.add_parser(
        "cat",
        description="Prints the values of a tensor, to all their figures.",
    )
    command.add_argument("checkpoint", metavar="CKPT")
    command.add_argument("name", metavar="NAME")
    command.add_argument(
        "--slice", default="", help="as NumPy writes it: 0,:5,...,-1"
    )


def _add_comparing(commands: Any) -> None:
    command = commands.add_parser(
        "diff",
        description="Shows what differs; exits with 1 if anything does.",
    )
    command.add_argument("a", metavar="A")
    command.add_argument("b", metavar="B")
    command.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="largest difference that is none (default: 0, bit for bit)",
    )

    command = commands.add_parser(
        "verify",
        description="Reads all of a checkpoint, or of each of a directory; "
        "exits with 1 if one is damaged.",
    )
    command.add_argument("checkpoint", metavar="CKPT")

    command = commands.add_parser(
        "digest",
        description="Prints one SHA-256 over the names, dtypes, shapes and "
        "bytes of all variables: two states are equal if theirs are.",
    )
    command.add_argument("checkpoint", metavar="CKPT")


def _add_output(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--output", required=True, metavar=what)


def _add_changing(commands: Any) -> None:
    command = commands.add_parser(
        "edit",
        description="Makes another checkpoint, by edits in the order in which "
        "they are written; without one, a copy.\nSeveral --rename in a row are "
        "one: two names can be swapped.",
        usage="python -m dtrain.checkpoint_tool edit CKPT\n"
        "       (--output=DIR/ckpt-N | --dry_run) --EDIT ...",
    )
    command.add_argument("checkpoint", metavar="CKPT")
    command.add_argument("--output", default="", metavar="DIR/ckpt-N")
    command.add_argument(
        "--dry_run", action="store_true", help="shows the differences only"
    )
    command.add_argument(
        "--edits", default="", metavar="FILE", help="YAML, before the others"
    )
    for verb, (value, words) in EDITS.items():
        command.add_argument(
            f"--{verb}", action=_Wish, dest="wishes", metavar=value, help=words
        )

    command = commands.add_parser(
        "average",
        description="Computes the mean of checkpoints of one program. What has "
        "no fractions is that of the last.",
    )
    command.add_argument("checkpoints", metavar="CKPT", nargs="+")
    _add_output(command, "DIR/ckpt-N")
    command.add_argument("--weights", default="", help="as in 1,1,2")

    command = commands.add_parser(
        "merge",
        description="Takes each part from its own checkpoint, and what is not "
        "named from the first.",
    )
    command.add_argument("parts", metavar="NAME=CKPT", nargs="+")
    _add_output(command, "DIR/ckpt-N")


def _add_carrying(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        description="Writes tensors as .safetensors or .npz, by their names, "
        "or a network of a dtrain run, its average where it has one, as a "
        ".keras file; or, for the name of a directory, as a SavedModel what "
        "makes pictures of latents, by however many networks, or the network "
        "that is named.",
    )
    command.add_argument("checkpoint", metavar="CKPT")
    _add_output(command, "FILE")
    command.add_argument(
        "--filter", default="", metavar="NAME", help="a NAME, or with * and ?"
    )
    command.add_argument(
        "--network",
        default="",
        metavar="NAME",
        help="which one is written as a model; without it what draws, in a "
        ".keras file the generator, or the only one that is averaged",
    )
    command.add_argument(
        "--model",
        default="",
        metavar="MODULE:MAKE",
        help="model of the run, if it is none of dtrain's own: what its "
        "config.json names is imported only if it is named here, too",
    )

    _add_import(commands)


def _add_import(commands: Any) -> None:
    command = commands.add_parser(
        "import",
        description="Makes a checkpoint of a file of tensors, or of another "
        "checkpoint.",
    )
    command.add_argument("file", metavar="FILE")
    _add_output(command, "DIR/ckpt-N")
    command.add_argument(
        "--into",
        default="",
        metavar="CKPT",
        help="gives names, shapes and what the file has not; without, the "
        "tree is made of the names in the file",
    )
    command.add_argument(
        "--map",
        default="",
        metavar="FILE",
        help="YAML, names in the checkpoint by those in the file",
    )
    command.add_argument(
        "--partial",
        action="store_true",
        help="leaves out what has no place, and keeps what is not in the file",
    )


def _add_keeping(commands: Any) -> None:
    command = commands.add_parser(
        "prune",
        description="Removes the checkpoints of a directory that none of these "
        "keeps; the newest and what is pinned always stay.",
    )
    command.add_argument("directory", metavar="DIR")
    for field in dataclasses.fields(SavingSettings):
        if field.name in retention.FLAGS:
            kind = type(field.default)
            command.add_argument(
                f"--{field.name}",
                type=kind,
                # A run keeps some by itself; here all must be asked for.
                default=field.default if kind is str else kind(0),
                choices=field.metadata["choices"] or None,
                metavar="NAME" if kind is str else "N",
                help=field.metadata["help"].replace("%", "%%"),
            )
    command.add_argument(
        "--dry_run", action="store_true", help="removes nothing"
    )

    command = commands.add_parser("pin", description="Keeps one for ever.")
    command.add_argument("checkpoint", metavar="CKPT")
    command.add_argument("name", metavar="NAME")

    command = commands.add_parser("unpin", description="Lets it go.")
    command.add_argument("directory", metavar="DIR")
    command.add_argument("name", metavar="NAME")


def run(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit code of the process.

    Args:
        arguments: the command and what it is applied to.

    Raises:
        UserError: the command line is wrong, or a checkpoint cannot be read.
        StorageError: a disk or a store failed.
    """
    # The page of a command is argparse's.
    if flags.answer(arguments[:1], lambda: _HELP):
        return errors.FINISHED
    parsed = _parser().parse_args(arguments)
    if parsed.command is None:
        print(_HELP)
        return errors.USER_ERROR
    if parsed.command == "list":
        return _list(parsed.directory, parsed.metric)
    # It takes seconds, and a wrong command line needs none of it.
    startup.import_tensorflow()
    from dtrain.toolbox import commands as commands_lib

    return commands_lib.COMMANDS[parsed.command](parsed)


def _list(directory: str, metric: str) -> int:
    # Without TensorFlow, which takes seconds to import.
    from dtrain.checkpoint import listing

    rows = listing.find(directory)
    if not rows:
        raise errors.UserError(f"{directory} holds no checkpoints")
    for line in listing.lines(rows, metric):
        print(errors.printable(line))
    return errors.FINISHED


def main() -> None:
    """Runs the program."""
    errors.exit_with(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
