"""Files of tensors that other programs read and write.

.safetensors   Hugging Face's
.npz           NumPy's
.h5, .hdf5     Keras' .weights.h5 and what else is of HDF5, only read
.keras         Keras' archives, whose weights alone are read
.weights.json  its lists of sharded weights, only read

Nothing in a file from outside is believed unchecked, and no pickle is ever
read. One tensor at a time is in memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from dtrain.errors import UserError
from dtrain.storage import files, temporary
from dtrain.tensorfiles import entries as entries_lib
from dtrain.tensorfiles import (
    h5_file,
    keras_file,
    npz_file,
    safetensors_file,
)
from dtrain.tensorfiles.entries import Container, Entry, RefusedError

_WRITERS = {".safetensors": safetensors_file.write, ".npz": npz_file.write}
_READERS = {
    ".safetensors": safetensors_file.opened,
    ".npz": npz_file.opened,
    ".h5": h5_file.opened,
    ".hdf5": h5_file.opened,
    ".keras": keras_file.opened_archive,
    ".weights.json": keras_file.opened_shards,
}
SUFFIXES = tuple(_READERS)


def write(
    path: str,
    entries: Mapping[str, Entry],
    value: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors to a new file, which is there whole or not at all.

    Equal tensors make equal bytes. A dtype that the format does not have is
    encoded, as `entries` says.

    Args:
        path: .safetensors or .npz, local or, by way of TMPDIR, gs://. Its
            directory is made if it is not there.
        entries: dtype and shape of each tensor, by its name.
        value: returns a tensor by its name; called twice for some.
        metadata: texts that the file holds beside the tensors.

    Raises:
        UserError: there is such a file, its suffix is another one, or a name
            or a dtype cannot be written.
        StorageError: the disk or the store failed.
    """
    write_tensors = _of_suffix(path, _WRITERS)
    with _refusals(path):
        entries_lib.check_all(entries)
        with temporary.becoming(path) as written, open(written, "wb") as file:
            write_tensors(file, entries, value, metadata or {})


@contextlib.contextmanager
def open_file(path: str) -> Iterator[Container]:
    """Opens a file of tensors; all that it says is checked first.

    Args:
        path: of one of `SUFFIXES`, local or, by way of TMPDIR, gs://.

    Yields:
        What it holds. Its `read` raises UserError for a tensor that is not
        sound, and StorageError where the disk fails.

    Raises:
        UserError: there is no such file, or it is not sound.
        StorageError: the disk or the store failed.
    """
    opened = _of_suffix(path, _READERS)
    with contextlib.ExitStack() as stack:
        # Not around the yield: errors of other files are not this one's.
        with _refusals(path):
            local = stack.enter_context(_local(path))
            stored = stack.enter_context(opened(local))
            container = entries_lib.with_decoded(stored)

        def read(name: str) -> np.ndarray:
            with _refusals(path):
                return container.read(name)

        yield container._replace(read=read)


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
    """Yields the path of a local file, of a copy if it is remote.

    Raises:
        UserError: there is no such file.
    """
    if files.size(path) is None:
        raise UserError(f"{path} is not there; name a file that is")
    if files.is_remote(path):
        with temporary.directory("read") as directory:
            local = os.path.join(directory, os.path.basename(path))
            files.copy(path, local)
            yield local
        return
    # To open a pipe would be to wait for ever.
    if not os.path.isfile(path):
        raise UserError(f"{path} is no file; name one")
    yield path


@contextlib.contextmanager
def _refusals(path: str) -> Iterator[None]:
    try:
        with files.storage_errors(path):
            yield
    except RefusedError as error:
        raise UserError(f"{path}: {error}") from error


def _of_suffix(path: str, formats: Mapping[str, Callable]) -> Callable:
    for suffix in formats:
        if path.endswith(suffix):
            return formats[suffix]
    raise UserError(
        f"{path} must end in one of {', '.join(formats)}; rename it"
    )
