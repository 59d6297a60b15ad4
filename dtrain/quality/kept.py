"""Arrays in a file, under a key that says what they were computed from.

What real images say, and half an evaluation, take long to compute again. A
file has its key and a checksum inside: one that is damaged is made anew, and
one of another key is refused, for somebody has put it there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from dtrain.errors import StorageError, UserError
from dtrain.storage import files
from dtrain.tensorfiles import containers, safetensors_file
from dtrain.tensorfiles.entries import Entry

Arrays = Mapping[str, np.ndarray]


def path_of(directory: str, kind: str, key: Mapping[str, Any]) -> str:
    """Returns where a file of a key is.

    Args:
        directory: of such files.
        kind: a word, for whoever looks at them.
        key: of JSON's own types.
    """
    digest = hashlib.sha256(_text(key).encode()).hexdigest()
    return os.path.join(directory, f"{kind}-{digest[:16]}.safetensors")


def write(path: str, key: Mapping[str, Any], arrays: Arrays) -> None:
    """Writes arrays, whole or not at all; makes the directory.

    Args:
        path: of the file; one that is there is replaced.
        key: what they follow from.
        arrays: by name.

    Raises:
        OSError: the disk or the store failed.
    """
    entries = {
        name: Entry(str(array.dtype), array.shape)
        for name, array in arrays.items()
    }
    metadata = {"key": _text(key), "sha256": _checksum(arrays)}
    content = io.BytesIO()
    safetensors_file.write(content, entries, arrays.__getitem__, metadata)
    files.make_directory(os.path.dirname(path))
    files.write(path, content.getvalue(), is_durable=False)


def read(path: str, key: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Reads arrays.

    Args:
        path: of the file.
        key: what they are to follow from.

    Returns:
        The arrays by name; None if there is no file, or it is damaged.

    Raises:
        UserError: the file has another key.
        OSError: the disk or the store failed.
    """
    if files.size(path) is None:
        return None
    try:
        with containers.open_file(path) as stored:
            arrays = {name: stored.read(name) for name in stored.entries}
            metadata = stored.metadata
    except UserError:
        return None
    except StorageError as error:
        raise OSError(str(error)) from error
    if metadata.get("sha256") != _checksum(arrays):
        return None
    if metadata.get("key") != _text(key):
        raise UserError(
            f"{path} was computed from something else "
            f"({metadata.get('key', 'which it does not say')}); somebody has "
            "renamed it: remove it"
        )
    return arrays


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _checksum(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
