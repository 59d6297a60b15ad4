"""Settings of a user's own model: `--model_flag=NAME=VALUE`.

They are arguments of `make` beyond the three that it is always given, each with
a default, whose type is that of the flag:

    def make(config, image_shape, num_classes, width=64, is_deep=False): ...

    --model_flag=width=32 --model_flag=is_deep=true
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from dtrain.errors import UserError

_NUM_GIVEN = 3
_WORDS = {"true": True, "false": False}


def read(
    subject: str, make: Callable[..., Any], texts: Sequence[str]
) -> dict[str, Any]:
    """Reads what `make` is called with.

    Args:
        subject: the model, in the words of an error.
        make: the function.
        texts: NAME=VALUE each.

    Raises:
        UserError: one is malformed, of another type, or unknown to `make`.
    """
    known = _known(make) if texts else {}
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name in values:
            raise UserError(
                f"model_flag ({text}) must be NAME=VALUE, each name once"
            )
        if name not in known:
            raise UserError(
                f"model_flag ({text}): the make of {subject} has no argument "
                f"{name} with a default; it has {', '.join(known) or 'none'}"
            )
        values[name] = _converted(text, value, known[name])
    return values


def _known(make: Callable[..., Any]) -> dict[str, Any]:
    """Returns the defaults of the further arguments, by name."""
    try:
        parameters = list(inspect.signature(make).parameters.values())
    except (TypeError, ValueError):
        return {}
    return {
        parameter.name: parameter.default
        for number, parameter in enumerate(parameters)
        if parameter.default is not inspect.Parameter.empty
        and (number >= _NUM_GIVEN or parameter.kind == parameter.KEYWORD_ONLY)
    }


def _converted(text: str, value: str, default: Any) -> Any:
    """Makes a value of the type that the default has.

    Raises:
        UserError: it is none.
    """
    kind = type(default)
    if kind is bool:
        if value.lower() in _WORDS:
            return _WORDS[value.lower()]
        raise UserError(f"model_flag ({text}) must be true or false")
    if kind not in (int, float):
        return value
    try:
        return kind(value)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"model_flag ({text}) must be {what}") from error
