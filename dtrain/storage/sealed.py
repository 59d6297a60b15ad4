"""JSON that notices when a bit of it has changed.

The text ends with the SHA-256 of the rest. What is read is written anew and has
to be the same text, so a change of any byte is found, even of a blank.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

# More than this no program here counts to.
_MOST = 2**63 - 1


class DamagedError(ValueError):
    """Something on disk is not what was written; the text is the reason."""


def dumps(body: Mapping[str, Any]) -> bytes:
    """Writes a mapping as indented UTF-8 text, sealed.

    Args:
        body: of JSON's own types; its key `sha256`, if there is one, is
            replaced.
    """
    plain = {name: body[name] for name in body if name != "sha256"}
    digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    return (json.dumps({**plain, "sha256": digest}, indent=1) + "\n").encode()


def loads(data: bytes) -> dict[str, Any]:
    """Reads the mapping that `dumps` wrote, `sha256` included.

    Args:
        data: the whole text.

    Raises:
        DamagedError: a byte is missing, added or changed.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError("it is no JSON any more") from error
    if not isinstance(body, dict) or dumps(body) != data:
        raise DamagedError("its text does not have its checksum")
    return body


# A seal shows that a text is what was written, and not who wrote it: whoever
# reads a field checks its type, too.


def field(
    body: Mapping[str, Any], name: str, is_right: Callable[[Any], object]
) -> Any:
    """Returns a value of a mapping that was read.

    Args:
        body: what was read.
        name: of the value.
        is_right: tells whether the value is of the type that it must have.

    Raises:
        DamagedError: it is missing, or of another type.
    """
    if name not in body:
        raise DamagedError(f"it has no {name}")
    if not is_right(body[name]):
        raise DamagedError(f"its {name} is not what dtrain writes")
    return body[name]


def is_count(value: Any) -> TypeGuard[int]:
    """Tells whether a value is a whole number from 0 that fits 63 bits."""
    return type(value) is int and 0 <= value <= _MOST


def is_name(value: Any) -> TypeGuard[str]:
    """Tells whether a value is text that can be a name in UTF-8."""
    if not isinstance(value, str):
        return False
    try:
        return bool(value.encode())
    except UnicodeEncodeError:
        return False


def is_path(value: Any) -> TypeGuard[str]:
    """Tells whether a value is text that can be the path of a file."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        return bool(os.fsencode(value))
    except UnicodeEncodeError:
        return False
