"""Lists a file of HDF5 as JSON, in a process that may crash.

python -m dtrain.tensorfiles.h5_listing model.weights.h5 UNPACKED

libhdf5 crashes on some damaged files, and loops on others. So it only lists
what is where, in a process of its own with limits; the bytes of the tensors are
read by `h5_file`, without it. What is in chunks, or compressed, is written one
after the other to the file UNPACKED.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any, BinaryIO

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
# A megabyte may inflate to a gigabyte of zeros.
_MAX_UNPACKED_BYTES = 4 * 2**30


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


def listing(path: str, unpacked: str) -> dict[str, Any]:
    """Lists the datasets of a file.

    Args:
        path: of a local file.
        unpacked: path of a file that is made, of the bytes of datasets that
            the other has in chunks.

    Returns:
        `datasets`: of each its name, dtype, byte order, shape and offset in
        the file, or in `unpacked`, None if it has no bytes; `names`: the
        readable names that Keras gives to layers, by the paths of their
        groups.

    Raises:
        RefusedError: the bytes of a dataset are elsewhere, or too many.
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
        if isinstance(item, h5py.Dataset) and item.shape is None:
            # Of h5py.Empty: it has no elements, and no shape.
            return
        if isinstance(item, h5py.Dataset):
            datasets.append(_describe(name, item, copies))
        elif "name" in item.attrs:
            names[name] = str(item.attrs["name"])[:_MAX_NAME_LENGTH]
        if len(datasets) + len(names) > _MAX_DATASETS:
            raise RefusedError(f"it has more than {_MAX_DATASETS} datasets")

    with open(unpacked, "wb") as copies, h5py.File(path, "r") as file:
        # Neither follows a link out of the file, or visits anything twice.
        outside = file.visititems_links(_outside)
        if outside:
            raise RefusedError(outside)
        file.visititems(visit)
    return {"datasets": datasets, "names": names}


def _outside(name: str | bytes, link: object) -> str | None:
    """Says where a link leads, if that is another file; else None."""
    if not isinstance(link, h5py.ExternalLink):
        return None
    return f"{name[:80]!r} is in another file, {link.filename[:80]!r}"


def _describe(
    name: str, dataset: h5py.Dataset, unpacked: BinaryIO
) -> dict[str, Any]:
    if dataset.is_virtual or dataset.external:
        raise RefusedError(f"{name!r} is in another file")
    dtype = dataset.dtype
    if dtype.kind == "O":
        raise RefusedError(f"{name!r} holds texts, and not numbers")
    # HDF5 has floats of any exponent and integers of any width, and converts
    # them to NumPy's only where it reads them itself.
    if dataset.id.get_type() != h5py.h5t.py_create(dtype, logical=True):
        raise RefusedError(f"{name!r} is not quite of type {dtype.name}")
    # Keras marks bfloat16 like this, which HDF5 has no type for.
    if dataset.attrs.get("dtype") == "bfloat16" and dtype == np.dtype("V2"):
        dtype = np.dtype(ml_dtypes.bfloat16)
    is_packed = dataset.chunks is not None
    offset = dataset.id.get_offset()
    if dataset.chunks:
        # As many rows as a chunk has, which is unpacked whole for any of them.
        offset = _unpack(name, dataset, unpacked, dataset.chunks[0])
    elif offset is None and dataset.size:
        raise RefusedError(f"{name!r} has no bytes in one piece")
    return {
        "name": name,
        "dtype": dtype.name,
        "big_endian": dtype.byteorder == ">",
        "shape": list(dataset.shape),
        "offset": offset,
        "is_unpacked": is_packed,
    }


def _unpack(
    name: str, dataset: h5py.Dataset, unpacked: BinaryIO, num_rows: int
) -> int:
    """Writes the bytes of a dataset, some rows at a time.

    Returns where they begin.

    Raises:
        RefusedError: they are too many, or cannot be unpacked.
    """
    start = unpacked.tell()
    if start + dataset.nbytes > _MAX_UNPACKED_BYTES:
        raise RefusedError(
            f"{name!r} has {dataset.nbytes} bytes when it is unpacked, and "
            f"at most {_MAX_UNPACKED_BYTES} are of all together"
        )
    try:
        for row in range(0, dataset.shape[0] if dataset.size else 0, num_rows):
            rows = dataset[row : row + num_rows]
            unpacked.write(np.ascontiguousarray(rows).view(np.uint8).data)
    except (MemoryError, OSError) as error:
        raise RefusedError(f"{name!r} cannot be unpacked: {error}") from error
    return start


def main() -> None:
    """Runs the program: JSON on the standard output, or a line why not."""
    limit(sys.argv[1])
    try:
        print(json.dumps(listing(*sys.argv[1:])))
    except RefusedError as error:
        sys.exit(error.why)


if __name__ == "__main__":
    main()
