"""Lists a file of HDF5 as JSON, in a process that may crash.

python -m dtrain.tensorfiles.h5_listing model.weights.h5

libhdf5 crashes on some damaged files, and loops on others. So it only lists
what is where, in a process of its own with limits; the bytes of the tensors are
read by `h5_file`, without it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from dtrain.tensorfiles.entries import RefusedError

_MAX_MEMORY_BYTES = 2**30
# A megabyte of a file, with 400 datasets, takes a tenth of a second.
_MIN_CPU_SECS = 5
_MAX_CPU_SECS = 60
_MAX_DATASETS = 100_000
_MAX_NAME_LENGTH = 1024


def limit(path: str) -> None:
    """Has this process end when it takes too much time or memory for a file.

    Args:
        path: of the file that it is going to read.
    """
    mebibytes = os.path.getsize(path) >> 20
    cpu_secs = min(_MIN_CPU_SECS + mebibytes, _MAX_CPU_SECS)
    # At the first number of seconds comes SIGXCPU, at the second SIGKILL.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_secs, cpu_secs + 1))
    memory = (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, memory)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def listing(path: str) -> dict[str, Any]:
    """Lists the datasets of a file.

    Args:
        path: of a local file.

    Returns:
        `datasets`: of each its name, dtype, byte order, shape and offset in
        the file, None if it has no bytes; `names`: the readable names that
        Keras gives to layers, by the paths of their groups.

    Raises:
        RefusedError: a dataset has no bytes in a piece.
    """
    datasets: list[dict[str, Any]] = []
    names: dict[str, str] = {}

    def visit(name: str | bytes, item: h5py.Dataset | h5py.Group) -> None:
        # A name that is not UTF-8 comes as bytes.
        if not isinstance(name, str) or len(name) > _MAX_NAME_LENGTH:
            raise RefusedError(
                f"{name[:80]!r} is no name: {_MAX_NAME_LENGTH} characters of "
                "UTF-8 at most"
            )
        if isinstance(item, h5py.Dataset):
            datasets.append(_describe(name, item))
        elif "name" in item.attrs:
            names[name] = str(item.attrs["name"])[:_MAX_NAME_LENGTH]
        if len(datasets) + len(names) > _MAX_DATASETS:
            raise RefusedError(f"it has more than {_MAX_DATASETS} datasets")

    with h5py.File(path, "r") as file:
        # It follows no link out of the file, and visits nothing twice.
        file.visititems(visit)
    return {"datasets": datasets, "names": names}


def _describe(name: str, dataset: h5py.Dataset) -> dict[str, Any]:
    if dataset.chunks is not None or dataset.is_virtual or dataset.external:
        raise RefusedError(
            f"{name!r} is chunked, compressed or elsewhere, and Keras writes "
            "each variable in one piece"
        )
    dtype = dataset.dtype
    # HDF5 has floats of any exponent and integers of any width, and converts
    # them to NumPy's only where it reads them itself.
    if dataset.id.get_type() != h5py.h5t.py_create(dtype, logical=True):
        raise RefusedError(f"{name!r} is not quite of type {dtype.name}")
    # Keras marks bfloat16 like this, which HDF5 has no type for.
    if dataset.attrs.get("dtype") == "bfloat16" and dtype == np.dtype("V2"):
        dtype = np.dtype(ml_dtypes.bfloat16)
    offset = dataset.id.get_offset()
    if offset is None and dataset.size:
        raise RefusedError(f"{name!r} has no bytes in one piece")
    return {
        "name": name,
        "dtype": dtype.name,
        "big_endian": dtype.byteorder == ">",
        "shape": list(dataset.shape),
        "offset": offset,
    }


def main() -> None:
    """Runs the program: JSON on the standard output, or a line why not."""
    limit(sys.argv[1])
    try:
        print(json.dumps(listing(sys.argv[1])))
    except RefusedError as error:
        sys.exit(error.why)


if __name__ == "__main__":
    main()
