"""What Keras puts around its weights: an archive, or a list of several files.

.keras          a zip archive, of which model.weights.h5 is read
.weights.json   names the .weights.h5 files beside it, each of some layers

The layers of the model, which both have too, are code, and are never read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping

import numpy as np

from dtrain.storage import temporary
from dtrain.tensorfiles import entries as entries_lib
from dtrain.tensorfiles import h5_file, npz_file
from dtrain.tensorfiles.entries import Container, Entry, RefusedError

_WEIGHTS = "model.weights.h5"
# Of the list of files, which has a line for each layer.
_MAX_LIST_BYTES = 64 * 2**20
_MAX_SHARDS = 1000


@contextlib.contextmanager
def opened_archive(path: str) -> Iterator[Container]:
    """Opens a local .keras file; see `containers.open_file`.

    Raises:
        RefusedError: it is no such archive.
    """
    with temporary.directory("unpacked") as directory:
        weights = os.path.join(directory, _WEIGHTS)
        with npz_file.opened_zip(path) as archive:
            if _WEIGHTS not in archive.namelist():
                raise RefusedError(f"it has no {_WEIGHTS}")
            info = archive.getinfo(_WEIGHTS)
            npz_file.check_packing(_WEIGHTS, info, archive)
            with (
                npz_file.sound(_WEIGHTS),
                archive.open(info) as packed,
                open(weights, "wb") as file,
            ):
                shutil.copyfileobj(packed, file, 2**20)
        with h5_file.opened(weights) as container:
            yield container


@contextlib.contextmanager
def opened_shards(path: str) -> Iterator[Container]:
    """Opens a local .weights.json file; see `containers.open_file`.

    Raises:
        RefusedError: it is no such list, or a file that it names is missing.
    """
    with contextlib.ExitStack() as stack:
        containers = []
        for name in _shards(path):
            shard = os.path.join(os.path.dirname(path), name)
            if not os.path.isfile(shard):
                raise RefusedError(
                    f"its file {name} is not beside it", "copy all of them"
                )
            containers.append(stack.enter_context(h5_file.opened(shard)))
        yield _joined(containers)


def _shards(path: str) -> list[str]:
    """Reads the names of the files, all of which must be beside the list.

    Raises:
        RefusedError: it is no such list, or a file would be elsewhere.
    """
    if os.path.getsize(path) > _MAX_LIST_BYTES:
        raise RefusedError(f"it has more than {_MAX_LIST_BYTES >> 20} MB")
    with open(path, "rb") as file:
        data = file.read()
    try:
        layers = entries_lib.JSON.decode(data.decode())["weight_map"].values()
        names = {
            os.fspath(name)
            for layer in layers
            for name in (layer if isinstance(layer, list) else [layer])
        }
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise RefusedError("it is no list of Keras' sharded weights") from None
    if len(names) > _MAX_SHARDS:
        raise RefusedError(f"it names {len(names)} files")
    for name in names:
        if not name or "/" in name or "\0" in name:
            raise RefusedError(f"it names {name[:80]!r}, no file beside it")
    return sorted(names)


def _joined(containers: list[Container]) -> Container:
    owners: dict[str, Container] = {}
    metadata: dict[str, str] = {}
    for container in containers:
        for name in container.entries:
            if name in owners:
                raise RefusedError(f"{name[:80]!r} is in two of its files")
            owners[name] = container
        metadata.update(container.metadata)
    entries: Mapping[str, Entry] = {
        name: container.entries[name] for name, container in owners.items()
    }

    def read(name: str) -> np.ndarray:
        return owners[name].read(name)

    return Container(entries, metadata, read)
