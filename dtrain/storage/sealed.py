"""JSON that notices when a bit of it has changed.

The text ends with the SHA-256 of the rest. What is read is written anew and has
to be the same text, so a change of any byte is found, even of a blank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


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
