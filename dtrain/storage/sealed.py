"""JSON that notices when a bit of it has changed.

The text ends with the SHA-256 of the rest. It is compared as a whole with what
writing it anew would give, so a change anywhere is found, in a blank too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


class DamagedError(ValueError):
    """Something on disk is not what was written; the text is the reason."""


def dumps(body: Mapping[str, Any]) -> bytes:
    """Writes a mapping, sealed.

    Args:
        body: of JSON's own types; its key `sha256`, if there is one, is
            replaced.

    Returns:
        Indented UTF-8 text.
    """
    plain = {name: body[name] for name in body if name != "sha256"}
    digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    return (json.dumps({**plain, "sha256": digest}, indent=1) + "\n").encode()


def loads(data: bytes) -> dict[str, Any]:
    """Reads what `dumps` wrote.

    Args:
        data: the whole text.

    Returns:
        The mapping, `sha256` included.

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
