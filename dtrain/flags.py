"""Flags that are the fields of a frozen dataclass.

A field declares the absl flag of the same name: its default, its help text, and
the rule that its value must keep.

    @dataclasses.dataclass(frozen=True)
    class Options:
        num_nodes: int = flag_fields.field(1, "Nodes", "How many.", minimum=1)

        def __post_init__(self) -> None:
            flag_fields.check(self)

    options = Options(**flag_fields.parse(Options, sys.argv))
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

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


def check(instance: Any) -> None:
    """Checks each field of a dataclass by its own rule.

    Args:
        instance: of a dataclass, all of whose fields are of `field`.

    Raises:
        UserError: a value breaks its rule.
    """
    for each in dataclasses.fields(instance):
        _check_value(each, getattr(instance, each.name))


def parse(kind: type, argv: Sequence[str]) -> dict[str, Any]:
    """Parses a command line by the flags of a dataclass.

    Args:
        kind: the dataclass, all of whose fields are of `field`.
        argv: the command line, the program's name first.

    Returns:
        The values by name. They have the right type, and may break a rule.

    Raises:
        UserError: a flag is unknown or malformed, or something that is no
            flag is left over.
    """
    return parse_flags(
        argv,
        {
            each.name: (each.default, each.metadata["help"])
            for each in dataclasses.fields(kind)
        },
    )


def parse_flags(
    argv: Sequence[str], known: dict[str, tuple[Any, str]]
) -> dict[str, Any]:
    """Parses a command line that holds nothing but flags.

    Args:
        argv: the command line, the program's name first.
        known: default and help text of each flag.

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
        define = _DEFINE[type(default)]
        define(name, first, help_text, flag_values=flag_values)
    try:
        rest = flag_values(list(argv))
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, known, n=1)
        hint = f"did you mean --{near[0]}? " if near else ""
        raise UserError(
            f"there is no flag --{error.flagname}; {hint}--help lists them all"
        ) from error
    except (flags.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"{_flag_problem(flag_values, str(error))}; --help lists the flags"
        ) from error
    if len(rest) > 1:
        raise UserError(
            f"{rest[1]!r} is not a flag; write --name=value, --help lists them"
        )
    found = {name: flag_values[name].value for name in known}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
    }


def expand(arguments: Sequence[str]) -> tuple[str, ...]:
    """Writes out what `--flagfile` stands for, at this moment.

    Args:
        arguments: flags that `parse` takes, without the program's name.
    """
    read = flags.FlagValues().read_flags_from_files
    return tuple(read(list(arguments), force_gnu=False))


def help_lines(
    kind: type, group: str, mark: Callable[[Any], str] = lambda _: ""
) -> list[str]:
    """Returns what `--help` says of the flags of a group.

    Args:
        kind: the dataclass, all of whose fields are of `field`.
        group: the group.
        mark: returns what is put behind the first line of a flag, of its
            metadata.
    """
    lines: list[str] = []
    for each in dataclasses.fields(kind):
        if each.metadata["group"] == group:
            lines.append(_head(each) + mark(each.metadata))
            indent = " " * 6
            lines.append(
                textwrap.fill(
                    each.metadata["help"],
                    width=_WIDTH,
                    initial_indent=indent,
                    subsequent_indent=indent,
                    break_on_hyphens=False,
                )
            )
    return lines


def _head(each: dataclasses.Field[Any]) -> str:
    value = each.default
    if isinstance(value, bool):
        return f"  --[no]{each.name}  (default: {str(value).lower()})"
    if isinstance(value, tuple):
        return f"  --{each.name}  (may be given several times)"
    if each.metadata["choices"]:
        choices = "|".join(filter(None, each.metadata["choices"]))
        shown = value or '""'
        return f"  --{each.name}={choices}  (default: {shown})"
    shown = '""' if value == "" else value
    return f"  --{each.name}  (default: {shown})"


def _check_value(each: dataclasses.Field[Any], value: Any) -> None:
    rule = each.metadata
    name = each.name
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} ({value}) must be a finite number")
    if rule["choices"] and value not in rule["choices"]:
        raise UserError(
            f"{name} ({value}) must be one of {', '.join(rule['choices'])}"
        )
    if rule["minimum"] is not None and value < rule["minimum"]:
        raise UserError(
            f"{name} ({value}) must be at least {rule['minimum']:.10g}"
        )
    if rule["below"] is not None and value >= rule["below"]:
        raise UserError(f"{name} ({value}) must be below {rule['below']:.10g}")


def _flag_problem(flag_values: flags.FlagValues, text: str) -> str:
    """Says what absl says of a flag, without the words of Python's errors."""
    illegal = re.match(r"flag --(\w+)=(.*?): ", text, re.DOTALL)
    if not illegal:
        return text.removeprefix("ERROR:: ")
    name, value = illegal.groups()
    kind = _KINDS.get(flag_values[name].flag_type(), "another value")
    return f"{name} ({value}) must be {kind}"
