"""Flags that are the fields of a frozen dataclass.

A field declares the absl flag of the same name: its default, its help text, and
the rule that its value must keep.

    @dataclasses.dataclass(frozen=True)
    class Options:
        run_dir: str = flags.directory("Directory of the run.")
        num_nodes: int = flags.field(1, "Nodes", "How many.", minimum=1)

        def __post_init__(self) -> None:
            flags.check(self)

    page = flags.Page("python -m program", "Does it.", Options)
    if not flags.answer(sys.argv, page.render):
        options = Options(**flags.parse(Options, sys.argv))
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from dtrain import version
from dtrain.errors import UserError

_DEFINE: dict[type, Callable[..., Any]] = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    tuple: flags.DEFINE_multi_string,
}
# By absl's name of a flag's type.
_KINDS = {"bool": "true or false", "float": "a number", "int": "a whole number"}
_WIDTH = 78
# Letters of all choices of a flag that stand behind its name.
_MOST_CHOICES = 60
# TensorFlow, numpy and JSON have no larger whole numbers.
_MOST = 2**63
_NONE: Mapping[str, Any] = types.MappingProxyType({})
# The group of a program whose flags need none.
FLAGS = "Flags"


def field(
    default: Any,
    group: str,
    help_text: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    below: float | None = None,
    **more: Any,
) -> Any:
    """Declares a flag: its group on the help page, its rule, its text.

    Args:
        default: the value when the flag is not given; its type is the flag's.
            An empty tuple makes a flag that may be given several times.
        group: the title under which `--help` shows it.
        help_text: what `--help` says.
        choices: the strings allowed; empty means any.
        minimum: the smallest number allowed.
        below: a number that the value must stay under.
        more: further metadata of the field.
    """
    metadata = {
        "group": group,
        "help": help_text,
        "choices": tuple(choices),
        "minimum": minimum,
        "below": below,
        **more,
    }
    return dataclasses.field(default=default, metadata=metadata)


def fields_of(group: str, **common: Any) -> Callable[..., Any]:
    """Returns a `field(default, help_text, ...)` for the flags of one group.

    Args:
        group: the title under which `--help` shows them.
        common: what all of them share of the other arguments of `field`.
    """

    def field_of_group(default: Any, help_text: str, **more: Any) -> Any:
        return field(default, group, help_text, **common, **more)

    return field_of_group


def directory(help_text: str, default: str | None = None) -> Any:
    """Declares a flag that names a directory, on a disk or gs://.

    `parse` puts the home directory for a `~`, which no shell does behind an
    equals sign, and takes a slash from its end.

    Args:
        help_text: what `--help` says.
        default: what `--help` calls the directory that is taken if the flag
            is not given; None if it must be given.
    """
    return field(
        "",
        FLAGS,
        help_text,
        is_directory=True,
        is_required=default is None,
        shown=default,
    )


def check(instance: Any) -> None:
    """Checks that the value of each field keeps its rule.

    Args:
        instance: of a dataclass, all of whose fields are of `field`.

    Raises:
        UserError: a value breaks its rule.
    """
    for flag in dataclasses.fields(instance):
        _check_value(flag, getattr(instance, flag.name))


def parse(
    kind: type, argv: Sequence[str], defaults: Mapping[str, Any] = _NONE
) -> dict[str, Any]:
    """Parses a command line by the flags of a dataclass.

    Args:
        kind: the dataclass, all of whose fields are of `field`.
        argv: the command line, the program's name first.
        defaults: by name, in place of those of the fields.

    Returns:
        The values by name. They have the right type, and may break a rule.

    Raises:
        UserError: a flag is missing, unknown or malformed, or something that
            is no flag is left over.
    """
    known = {
        flag.name: (flag.default, flag.metadata["help"])
        for flag in dataclasses.fields(kind)
    }
    values = parse_flags(argv, known, defaults)
    for flag in dataclasses.fields(kind):
        if flag.metadata.get("is_required") and not values[flag.name]:
            raise UserError(f"{flag.name} is missing; use --{flag.name}=DIR")
        if flag.metadata.get("is_directory") and values[flag.name]:
            path = expand_home(values[flag.name])
            values[flag.name] = path.rstrip("/") or "/"
    return values


def parse_flags(
    argv: Sequence[str],
    known: dict[str, tuple[Any, str]],
    defaults: Mapping[str, Any] = _NONE,
) -> dict[str, Any]:
    """Parses a command line that holds nothing but flags.

    Args:
        argv: the command line, the program's name first.
        known: default and help text of each flag.
        defaults: others of some of them, by name, which may be None.

    Returns:
        The values by name.

    Raises:
        UserError: a flag is unknown or malformed, or something that is no
            flag is left over.
    """
    flag_values = flags.FlagValues()
    for name, (default, help_text) in known.items():
        # A list is what absl wants for several, and what it returns.
        first = list(default) if isinstance(default, tuple) else default
        first = defaults.get(name, first)
        define = _DEFINE[type(default)]
        define(name, first, help_text, flag_values=flag_values)
    try:
        rest = flag_values(list(argv))
    except flags.UnrecognizedFlagError as error:
        if error.flagname in ("help", "version"):
            raise UserError(f"--{error.flagname} takes no value") from error
        near = difflib.get_close_matches(error.flagname, known, n=1)
        hint = f"did you mean --{near[0]}? " if near else ""
        raise UserError(
            f"there is no flag --{error.flagname}; {hint}--help lists them all"
        ) from error
    # A ValueError is a --noflag=value, or a flagfile that is no text.
    except (flags.Error, ValueError) as error:
        raise UserError(
            f"{_flag_problem(flag_values, str(error))}; --help lists the flags"
        ) from error
    if len(rest) > 1:
        raise UserError(
            f"{rest[1]!r} is not a flag; write --name=value, --help lists them"
        )
    values = {name: flag_values[name].value for name in known}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
    }


def expand_home(path: str) -> str:
    """Replaces the `~` that a path begins with: no shell does it behind a `=`.

    Args:
        path: of a file or a directory; may be empty.

    Returns:
        The path; as it is if it begins otherwise, or names nobody's home.

    Raises:
        UserError: this user has no home.
    """
    expanded = os.path.expanduser(path)
    if expanded == path and path.split("/")[0] == "~":
        raise UserError(
            f"{path!r} begins with ~, and user {os.getuid()} has no home: HOME "
            "is not set; give the whole path"
        )
    return expanded


def expand(arguments: Sequence[str]) -> tuple[str, ...]:
    """Replaces `--flagfile` by the flags that the file has at this moment."""
    read = flags.FlagValues().read_flags_from_files
    return tuple(read(list(arguments), force_gnu=False))


class Page(NamedTuple):
    """What `--help` prints.

    Attributes:
        program: how the program is called, as in `python -m dtrain.main`.
        summary: what it does, in lines.
        kind: the dataclass of its flags, all of whose fields are of `field`.
        groups: which of them it shows, in this order; empty is all, in the
            order of the fields.
        usage: what stands behind the program, if it is not flags alone.
        mark: called with a flag's metadata; returns what is put behind the
            first line of the flag.
        end: lines below the flags.
    """

    program: str
    summary: str
    kind: type
    groups: Sequence[str] = ()
    usage: str = "[--flag=value ...]"
    mark: Callable[[Mapping[str, Any]], str] = lambda _: ""
    end: str = ""

    def render(self) -> str:
        """Returns the page."""
        parts = [f"usage: {self.program} {self.usage}", "", self.summary]
        shown = dataclasses.fields(self.kind)
        groups = self.groups or list(
            dict.fromkeys(flag.metadata["group"] for flag in shown)
        )
        for group in groups:
            parts += ["", group] if len(groups) > 1 else [""]
            for flag in shown:
                if flag.metadata["group"] == group:
                    parts += self._lines(flag)
        parts += ["", self.end] if self.end else []
        return "\n".join(parts)

    def _lines(self, flag: dataclasses.Field[Any]) -> list[str]:
        choices = "|".join(filter(None, flag.metadata["choices"]))
        help_text = flag.metadata["help"]
        if len(choices) > _MOST_CHOICES:
            # A terminal has no room for them beside the name.
            help_text += f" One of {', '.join(choices.split('|'))}."
            choices = ""
        head = _head(flag, choices) + self.mark(flag.metadata)
        return [*_wrapped(head, "  "), *_wrapped(help_text, " " * 6)]


def answer(arguments: Sequence[str], page: Callable[[], str]) -> bool:
    """Prints the help page or the version; tells if either was asked for."""
    if {"--help", "-h", "-help", "--helpfull"} & set(arguments):
        print(page())
        return True
    if "--version" in arguments:
        print(f"dtrain {version.VERSION}")
        return True
    return False


def _wrapped(text: str, first: str) -> list[str]:
    return textwrap.wrap(
        text,
        width=_WIDTH,
        initial_indent=first,
        subsequent_indent=" " * 6,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _head(flag: dataclasses.Field[Any], choices: str) -> str:
    """Returns the name of a flag, with its choices and its default."""
    name, value = flag.name, flag.default
    if flag.metadata.get("is_required"):
        return f"--{name}  (must be given)"
    if isinstance(value, tuple):
        return f"--{name}  (may be given several times)"
    if isinstance(value, bool):
        name, value = f"[no]{name}", str(value).lower()
    if choices:
        name += f"={choices}"
    shown = flag.metadata.get("shown") or ('""' if value == "" else value)
    return f"--{name}  (default: {shown})"


def _check_value(flag: dataclasses.Field[Any], value: Any) -> None:
    rule = flag.metadata
    name = flag.name
    if value is None:
        # Decided later on, by a rule that keeps the others.
        return
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and not _can_be_typed(text):
            raise UserError(f"{name} ({text!r}) must be text of a command line")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} ({value}) must be a finite number")
    if type(value) is int and abs(value) >= _MOST:
        raise UserError(f"{name} ({value}) must be below {_MOST}")
    if rule["choices"] and value not in rule["choices"]:
        choices = ", ".join(filter(None, rule["choices"]))
        near = difflib.get_close_matches(str(value), rule["choices"], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{name} ({value}) must be one of {choices}{hint}")
    if rule["minimum"] is not None and value < rule["minimum"]:
        raise UserError(
            f"{name} ({value}) must be at least {rule['minimum']:.10g}"
        )
    if rule["below"] is not None and value >= rule["below"]:
        raise UserError(f"{name} ({value}) must be below {rule['below']:.10g}")


def _can_be_typed(text: str) -> bool:
    """Tells whether a process can be given a text, as it can not a NUL."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _flag_problem(flag_values: flags.FlagValues, text: str) -> str:
    """Says what absl says of a flag, without the words of Python's errors."""
    illegal = re.match(r"flag --(\w+)=(.*?): ", text, re.DOTALL)
    if not illegal:
        return text.removeprefix("ERROR:: ")
    name, value = illegal.groups()
    kind = _KINDS.get(flag_values[name].flag_type(), "another value")
    return f"{name} ({value}) must be {kind}"
