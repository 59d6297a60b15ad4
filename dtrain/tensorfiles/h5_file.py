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

from dtrain.storage import temporary
from dtrain.tensorfiles import entries as entries_lib
from dtrain.tensorfiles.entries import Container, Entry, RefusedError

_TIMEOUT_SECS = 120
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


class _Dataset(NamedTuple):
    """A dataset, `offset` bytes from the beginning of its file."""

    entry: Entry
    is_big_endian: bool
    offset: int
    is_unpacked: bool


@contextlib.contextmanager
def opened(path: str) -> Iterator[Container]:
    """Opens a local file; see `containers.open_file`."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(temporary.directory("unpacked"))
        unpacked = os.path.join(directory, "datasets")
        listed = look(path, unpacked)
        # By whether it is of what was unpacked.
        opened_files = [
            stack.enter_context(open(name, "rb")) for name in (path, unpacked)
        ]
        sizes = [os.fstat(file.fileno()).st_size for file in opened_files]
        datasets = _check(listed["datasets"], sizes)

        def read(name: str) -> np.ndarray:
            dataset = datasets[name]
            array = entries_lib.read_at(
                name,
                opened_files[dataset.is_unpacked],
                dataset.offset,
                dataset.entry,
            )
            if dataset.is_big_endian:
                array.byteswap(inplace=True)
            return array

        yield Container(
            {name: dataset.entry for name, dataset in datasets.items()},
            listed["names"],
            read,
        )


def look(path: str, unpacked: str) -> dict[str, Any]:
    """Returns what `h5_listing` prints of a file.

    Args:
        path: of a local file.
        unpacked: of a local file that it makes; see `h5_listing.listing`.

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
            [*command, os.path.abspath(path), unpacked],
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


def _check(
    listed: list[dict[str, Any]], sizes: list[int]
) -> dict[str, _Dataset]:
    datasets: dict[str, _Dataset] = {}
    for row in listed:
        name, offset = row["name"], row["offset"] or 0
        entry = Entry(row["dtype"], tuple(row["shape"]))
        entries_lib.check(name, entry)
        if entry.dtype == entries_lib.STRING:
            raise RefusedError(f"{name!r} is of type {entry.dtype}")
        end = offset + entries_lib.num_bytes(entry)
        size = sizes[row["is_unpacked"]]
        if not 0 <= offset <= end <= size:
            raise RefusedError(
                f"{name!r} ends at {end}, and the file at {size}"
            )
        datasets[name] = _Dataset(
            entry, row["big_endian"], offset, row["is_unpacked"]
        )
    _check_apart(datasets)
    return datasets


def _check_apart(datasets: Mapping[str, _Dataset]) -> None:
    # If bytes were of two tensors, a small file could fill the memory.
    end, before = 0, ""
    in_file = {
        name: dataset
        for name, dataset in datasets.items()
        if not dataset.is_unpacked
    }
    for name, dataset in sorted(
        in_file.items(), key=lambda item: item[1].offset
    ):
        num_bytes = entries_lib.num_bytes(dataset.entry)
        if num_bytes and dataset.offset < end:
            raise RefusedError(f"{before!r} and {name!r} overlap")
        if num_bytes:
            end, before = dataset.offset + num_bytes, name
