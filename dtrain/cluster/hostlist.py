"""Slurm's short form of many hosts: `node[001-003,7]` names four.

Slurm sets the short form, and in a container there is no scontrol to write it
out.
"""

from __future__ import annotations

import itertools
import re

from dtrain.errors import UserError

# A comma inside brackets is a part of the term.
_TERM = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")
_LIST = re.compile(rf"{_TERM.pattern}(?:,{_TERM.pattern})*")
_RANGE = re.compile("([0-9]{1,18})(?:-([0-9]{1,18}))?")
_COUNT = re.compile(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?")
# Slurm's own limit, MAX_RANGE.
_MOST = 65536


def hosts(text: str) -> tuple[str, ...]:
    """Writes a list of hosts out, as `scontrol show hostnames` does.

    Args:
        text: the list, as in SLURM_STEP_NODELIST: names with commas between
            them, each with any number of `[ranges]`. A range keeps the width
            of its first number.

    Returns:
        The hosts, in their order.

    Raises:
        UserError: it is not such a list, or names more than 65,536 hosts.
    """
    if not _LIST.fullmatch(text):
        raise UserError(
            f"node list ({text[:80]!r}) is not of the form node[1-3,7],other"
        )
    names: list[str] = []
    for term in _TERM.findall(text):
        names += _expand(term, text)
        if len(names) > _MOST:
            raise UserError(
                f"node list ({text[:80]!r}) names more than {_MOST:,} hosts"
            )
    return tuple(names)


def counts(text: str) -> tuple[int, ...]:
    """Writes a list of counts out, as in SLURM_STEP_TASKS_PER_NODE.

    Args:
        text: the list; `2(x3),1` is 2, 2, 2, 1.

    Raises:
        UserError: it is not such a list.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if not match or len(numbers) + int(match[2] or 1) > _MOST:
            raise UserError(
                f"tasks per node ({text[:80]!r}) is not of the form 2(x3),1"
            )
        numbers += [int(match[1])] * int(match[2] or 1)
    return tuple(numbers)


def _expand(term: str, text: str) -> list[str]:
    pieces: list[list[str]] = []
    total = 1
    for piece in re.findall(r"\[[^\]]*\]|[^\[]+", term):
        pieces.append(_ranges(piece, text) if piece[0] == "[" else [piece])
        total *= len(pieces[-1])
        if total > _MOST:
            raise UserError(
                f"node list ({text[:80]!r}) names more than {_MOST:,} hosts"
            )
    # Slurm's own order: the last range varies fastest, then the first one, the
    # second, and so on.
    *first, last = pieces
    return [
        "".join((*reversed(start), end))
        for *start, end in itertools.product(*reversed(first), last)
    ]


def _ranges(piece: str, text: str) -> list[str]:
    numbers: list[str] = []
    for part in piece[1:-1].split(","):
        match = _RANGE.fullmatch(part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if not 0 <= int(last) - int(first) < _MOST:
            raise UserError(
                f"node list ({text[:80]!r}): {part!r} is not a range of numbers"
            )
        numbers += [
            str(number).zfill(len(first))
            for number in range(int(first), int(last) + 1)
        ]
    return numbers
