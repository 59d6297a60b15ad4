"""Checkpoints that are kept for ever, by a name that a person gave them.

The names are in `pins.json` beside the checkpoints. To delete that file is to
unpin them all.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from dtrain.errors import UserError
from dtrain.storage import files, locks, sealed


def read(directory: str) -> dict[str, int]:
    """Returns the steps of the pinned checkpoints, by the name of the pin.

    Raises:
        DamagedError: the list is not what was written.
    """
    data = files.read(f"{directory}/pins.json")
    if data is None:
        return {}
    return sealed.field(sealed.loads(data), "pins", _are_pins)


def _are_pins(value: Any) -> bool:
    return isinstance(value, dict) and all(map(sealed.is_count, value.values()))


def add(directory: str, step: int, name: str) -> None:
    """Keeps a checkpoint for ever, under a name.

    Args:
        directory: of checkpoints.
        step: which.
        name: of the pin; what had that name is not pinned any more.

    Raises:
        UserError: there is no such checkpoint.
        DamagedError: the list is not what was written.
    """
    steps = _steps(directory)
    if step not in steps:
        raise UserError(
            f"{directory} holds no checkpoint of step {step}; there: "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    with _alone(directory):
        pins = {**read(directory), name: step}
        files.write(f"{directory}/pins.json", sealed.dumps({"pins": pins}))


def _steps(directory: str) -> list[int]:
    names = files.names(directory)
    matches = [re.fullmatch(r"ckpt-(\d+)\.json", name) for name in names]
    return sorted(int(match[1]) for match in matches if match)


def remove(directory: str, name: str) -> None:
    """Unpins a checkpoint, which is removed when no policy keeps it.

    Raises:
        UserError: nothing is pinned as that.
        DamagedError: the list is not what was written.
    """
    with _alone(directory):
        pins = read(directory)
        if name not in pins:
            raise UserError(
                f"nothing in {directory} is pinned as {name}; pinned: "
                f"{', '.join(sorted(pins)) or 'nothing'}"
            )
        del pins[name]
        files.write(f"{directory}/pins.json", sealed.dumps({"pins": pins}))


@contextlib.contextmanager
def _alone(directory: str) -> Iterator[None]:
    """Lets in one process at a time, of this disk: a pin is not lost."""
    if files.is_remote(directory) or not files.is_directory(directory):
        yield
        return
    with locks.held(directory, os.O_RDONLY, wait=True):
        yield
