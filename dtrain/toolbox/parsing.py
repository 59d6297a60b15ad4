"""Edits and slices as a person writes them: on a command line, or in YAML."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import yaml

from dtrain.bundle.tree import Tree
from dtrain.errors import UserError
from dtrain.toolbox import edits
from dtrain.toolbox.edits import Edit

# Of a file that is written by hand, or by a short program.
_MAX_BYTES = 4 << 20


class Wish(NamedTuple):
    """An edit, as it was written.

    Attributes:
        verb: as in `rename`.
        name: what it is applied to; empty where the verb needs none.
        value: the rest, if there is any.
    """

    verb: str
    name: str
    value: Any = None


# Verbs by what they need: a name and a value, a name alone, a value alone.
PAIRS = ("rename", "rename_all", "cast", "scale", "fill", "set", "copy")
NAMES = ("drop", "keep", "zero_slots", "drop_slots")
VALUES = ("set_step",)
# Of the pairs, those whose value is text, even if it looks like a number.
_TEXTS = ("rename", "rename_all", "cast", "copy")


def wish(verb: str, text: str) -> Wish:
    """Reads what a flag says.

    Args:
        verb: name of the flag.
        text: its value, as in `generator=gen`.

    Raises:
        UserError: the verb needs both a name and a value.
    """
    if verb in NAMES:
        return Wish(verb, text)
    if verb in VALUES:
        return Wish(verb, "", literal(text))
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"{verb} ({text}) must be NAME=VALUE")
    return Wish(verb, name, value if verb in _TEXTS else literal(value))


def literal(text: str) -> Any:
    """Reads a number, a list of numbers, or anything else as text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        # nan and inf, which JSON writes otherwise.
        return float(text)
    except ValueError:
        return text


def yaml_of(data: bytes, path: str) -> Any:
    """Reads a file that was written by hand.

    Args:
        data: YAML.
        path: of the file, for errors.

    Raises:
        UserError: it is no YAML, or too large for a file of that kind.
    """
    if len(data) > _MAX_BYTES:
        raise UserError(f"{path} has more than {_MAX_BYTES >> 20} MB")
    try:
        return yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is no YAML: {reason}") from error


def load(data: bytes, path: str) -> list[Wish]:
    """Reads a file of edits.

        - rename: {gen: generator}
        - drop: [discriminator, discriminator_optimizer]
        - cast: {generator: bfloat16}
        - set_step: 0

    Args:
        data: YAML.
        path: of the file, for errors.

    Raises:
        UserError: it is no list of edits.
    """
    content = yaml_of(data, path)
    if not isinstance(content, list):
        raise UserError(f"{path} must be a list of edits, as - drop: step")
    return [one for entry in content for one in _wishes(entry, path)]


def _wishes(entry: Any, path: str) -> list[Wish]:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(
            f"{path}: {reprlib.repr(entry)} must be one edit: its value"
        )
    verb, value = next(iter(entry.items()))
    if verb in PAIRS and isinstance(value, dict):
        texts = [*value, *(value.values() if verb in _TEXTS else ())]
        if all(isinstance(text, str) for text in texts):
            return [Wish(verb, *pair) for pair in value.items()]
    if verb in NAMES:
        names = value if isinstance(value, list) else [value]
        if names and all(isinstance(name, str) for name in names):
            return [Wish(verb, str(name)) for name in names]
    if verb in VALUES:
        return [Wish(verb, "", value)]
    known = ", ".join((*PAIRS, *NAMES, *VALUES))
    raise UserError(
        f"{path}: {reprlib.repr(entry)} is no edit; there are {known}"
    )


def make(wishes: Sequence[Wish], source: Callable[[str], Tree]) -> list[Edit]:
    """Makes edits of wishes, in their order.

    Renames in a row are one edit, so that two names can be swapped; so are
    keeps in a row, which leave what any of them names.

    Args:
        wishes: as they were written.
        source: opens a checkpoint that something is copied from.

    Raises:
        UserError: a value is not of the kind that its verb needs.
    """
    groups: list[list[Wish]] = []
    for one in wishes:
        is_joined = groups and groups[-1][0].verb == one.verb
        if is_joined and one.verb in ("rename", "keep"):
            groups[-1].append(one)
        else:
            groups.append([one])
    return [_make(group, source) for group in groups]


def _make(group: Sequence[Wish], source: Callable[[str], Tree]) -> Edit:
    verb, name, value = group[0]
    if verb == "rename":
        return edits.rename(_changes(group))
    if verb == "keep":
        return edits.keep([one.name for one in group])
    if verb == "copy":
        path, colon, other = value.rpartition("::")
        if not colon:
            path, other = other, name
        return edits.copy(name, source(path), other)
    if verb == "scale":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"scale ({value}) must be a number")
        return edits.scale(name, float(value))
    if verb == "set_step":
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"set_step ({value}) must be a whole number")
        return edits.set_step(value)
    makers: dict[str, Callable[..., Edit]] = {
        "drop": edits.drop,
        "zero_slots": edits.zero_slots,
        "drop_slots": edits.drop_slots,
        "rename_all": edits.rename_all,
        "cast": edits.cast,
        "fill": edits.fill,
        "set": edits.put,
    }
    return makers[verb](name, *([value] if verb in PAIRS else []))


def _changes(group: Sequence[Wish]) -> dict[str, str]:
    changes = {one.name: one.value for one in group}
    if len(changes) < len(group) or len(set(changes.values())) < len(group):
        pairs = ", ".join(f"{one.name}={one.value}" for one in group)
        raise UserError(
            f"rename ({pairs}): each name is renamed once, to one of its own"
        )
    return changes


def slices(text: str) -> tuple[Any, ...]:
    """Reads what is taken of a tensor, as NumPy writes it.

    Args:
        text: as in `0,:5,...,-1`; empty is all.

    Raises:
        UserError: it is no slice of NumPy's.
    """
    if not text:
        return ()
    return tuple(_slice(part.strip(), text) for part in text.split(","))


def _slice(part: str, text: str) -> Any:
    if part == "...":
        return ...
    if re.fullmatch(r"-?\d{1,18}", part):
        return int(part)
    if re.fullmatch(r"(-?\d{0,18})(:-?\d{0,18}){1,2}", part):
        ends = [
            int(end) if end not in ("", "-") else None
            for end in part.split(":")
        ]
        if len(ends) < 3 or ends[2] != 0:
            return slice(*ends)
    raise UserError(f"slice ({text}) must be as in 0,:5,...,-1")
