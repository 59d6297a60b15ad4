"""The command lines of benchmarks: numbers, each with a default."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from dtrain import errors

_NUMBERS = re.compile(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", re.ASCII)


def own_flags(
    arguments: Sequence[str], defaults: Mapping[str, int | tuple[int, ...]]
) -> tuple[dict[str, Any], list[str]]:
    """Splits a command line into a benchmark's own numbers, and the rest.

    What is no number from 1 on ends the process.

    Args:
        arguments: of the command line, as `--rounds=5`.
        defaults: by the name of a flag; a tuple is for several numbers.
    """
    own, rest = dict(defaults), []
    for argument in arguments:
        name, _, value = argument.lstrip("-").partition("=")
        if name not in own:
            rest.append(argument)
            continue
        is_one = isinstance(own[name], int)
        if not _NUMBERS.fullmatch(value) or (is_one and "," in value):
            refuse(f"{name} ({value}) must be a number from 1 on")
        numbers = tuple(map(int, value.split(",")))
        own[name] = numbers[0] if is_one else numbers
    return own, rest


def only_own_flags(
    arguments: Sequence[str], defaults: Mapping[str, int | tuple[int, ...]]
) -> dict[str, Any]:
    """Reads a command line of nothing but `own_flags`, and --write."""
    arguments = [each for each in arguments if each != "--write"]
    own, rest = own_flags(arguments, defaults)
    if rest:
        flags = ", ".join(f"--{name}" for name in (*own, "write"))
        refuse(f"{rest[0]} is none of {flags}")
    return own


def refuse(reason: str) -> NoReturn:
    """Ends the process, as doors do after a mistake."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(errors.USER_ERROR)
