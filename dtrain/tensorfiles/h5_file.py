"""Keras' .weights.h5, of HDF5, read without HDF5: see `h5_listing`.

The name of a tensor is its path, as in layers/dense/vars/0. The metadata have,
for layers/dense/vars, the name that the model gives to this layer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dtrain.tensorfiles import entries as entries_lib
from dtrain.tensorfiles.entries import Container, Entry, RefusedError

_TIMEOUT_SECS = 120
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


class _Dataset(NamedTuple):
    """A dataset of the file, `offset` bytes from its beginning."""

    entry: Entry
    is_big_endian: bool
    offset: int


@contextlib.contextmanager
def opened(path: str) -> Iterator[Container]:
    """Opens a local file; see `containers.open_file`."""
    listed = look(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        datasets = _check(listed["datasets"], size)

        def read(name: str) -> np.ndarray:
            dataset = datasets[name]
            array = entries_lib.read_at(
                name, file, dataset.offset, dataset.entry
            )
            if dataset.is_big_endian:
                array.byteswap(inplace=True)
            return array

        yield Container(
            {name: dataset.entry for name, dataset in datasets.items()},
            listed["names"],
            read,
        )


def look(path: str) -> dict[str, Any]:
    """Returns what `h5_listing` prints of a file.

    Args:
        path: of a local file.

    Raises:
        RefusedError: HDF5 cannot read it, or crashes.
    """
    command = [sys.executable, "-m", "dtrain.tensorfiles.h5_listing"]
    # Its memory is limited, and idle threads would take some of it.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            filter(None, (_ROOT, os.environ.get("PYTHONPATH")))
        ),
        "OPENBLAS_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            [*command, os.path.abspath(path)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_SECS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RefusedError("HDF5 does not come to an end with it") from None
    if done.returncode == -signal.SIGXCPU:
        raise RefusedError("HDF5 does not come to an end with it")
    if done.returncode < 0:
        raise RefusedError("HDF5 crashes on it")
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        lines = [line for line in lines if line.strip()]
        raise RefusedError(lines[-1][:300] if lines else "HDF5 fails")
    return json.loads(done.stdout)


def _check(listed: list[dict[str, Any]], size: int) -> dict[str, _Dataset]:
    datasets: dict[str, _Dataset] = {}
    for row in listed:
        name, offset = row["name"], row["offset"] or 0
        entry = Entry(row["dtype"], tuple(row["shape"]))
        entries_lib.check(name, entry)
        if entry.dtype == entries_lib.STRING:
            raise RefusedError(f"{name!r} is of type {entry.dtype}")
        end = offset + entries_lib.num_bytes(entry)
        if not 0 <= offset <= end <= size:
            raise RefusedError(
                f"{name!r} ends at {end}, and the file at {size}"
            )
        datasets[name] = _Dataset(entry, row["big_endian"], offset)
    _check_apart(datasets)
    return datasets


def _check_apart(datasets: Mapping[str, _Dataset]) -> None:
    # If bytes were of two tensors, a small file could fill the memory.
    end, before = 0, ""
    for name, dataset in sorted(
        datasets.items(), key=lambda item: item[1].offset
    ):
        num_bytes = entries_lib.num_bytes(dataset.entry)
        if num_bytes and dataset.offset < end:
            raise RefusedError(f"{before!r} and {name!r} overlap")
        if num_bytes:
            end, before = dataset.offset + num_bytes, name
