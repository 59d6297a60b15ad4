"""What a program of somebody's own says where and when to save."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.checkpoint.retention import Policy
from dtrain.checkpoint.tier import Facts
from dtrain.errors import UserError

# As a manifest holds it.
_MAX_STEP = 2**63 - 1


def path(name: str, value: Any, example: str) -> str:
    """Returns a path that may be given as a `pathlib.Path`.

    Args:
        name: of the argument.
        value: what was given.
        example: a path, for the error.

    Raises:
        UserError: it is none.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text:
        raise UserError(f"{name} ({value!r}) must be a path; try {example!r}")
    return text


def step(value: Any) -> int:
    """Returns a number of steps.

    Args:
        value: a whole number, of Python, NumPy, TensorFlow or Keras.

    Raises:
        UserError: it is none, or negative.
    """
    try:
        plain = getattr(value, "numpy", None)
        number = np.asarray(plain() if plain else value)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        # As of a tensor in a `tf.function`.
        number = np.asarray(None)
    is_whole = number.shape == () and number.dtype.kind in "iu"
    if not is_whole or not 0 <= int(number) <= _MAX_STEP:
        raise UserError(
            f"step ({value!r}) must be a whole number of at least 0: the steps "
            "that are done; try step + 1"
        )
    return int(number)


def function(name: str, value: Any) -> None:
    """Refuses what cannot be called.

    Args:
        name: of the argument.
        value: what was given.

    Raises:
        UserError: it cannot.
    """
    if not callable(value):
        raise UserError(
            f"{name} ({value!r:.80}) must be a function without arguments; of "
            "a step, call restore(step)"
        )


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Returns one of several words.

    Args:
        name: of the argument.
        value: what was given.
        choices: what it may be.

    Raises:
        UserError: it is none of them.
    """
    if value not in choices:
        raise UserError(
            f"{name} ({value!r}) must be {' or '.join(choices)}; try "
            f"{choices[0]!r}"
        )
    return value


def policies(value: Any) -> tuple[Policy, ...]:
    """Returns what says which checkpoints stay.

    Args:
        value: several policies.

    Raises:
        UserError: it is something else.
    """
    given = tuple(value) if isinstance(value, list | tuple) else ()
    are_policies = all(hasattr(policy, "kept") for policy in given)
    # An empty list keeps the newest alone.
    if not are_policies or not (given or value in ([], ())):
        raise UserError(
            f"policies ({value!r}) must be a list of policies of "
            "dtrain.checkpoint.retention; try [retention.Last(3)]"
        )
    return given


def facts(given: Any) -> Facts:
    """Returns what is saved with a state; nothing for None.

    Raises:
        UserError: it is something else than `dtrain.Facts`.
    """
    if given is None:
        return Facts()
    if not isinstance(given, Facts):
        raise UserError(
            f"facts ({given!r:.80}) must be dtrain.Facts, as in "
            'dtrain.Facts(metrics={"loss": 0.5})'
        )
    return given
