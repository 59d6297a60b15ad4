"""IDX files: the layout of MNIST and of the sets made after it.

A directory holds `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, and
for --split=test the same with `t10k`; each may be gzipped (`.gz`), and the
labels may be missing. A file of images that is not gzipped is mapped, not read.
The format: https://yann.lecun.org/exdb/mnist/
"""

from __future__ import annotations

import gzip
import os
import zlib

import numpy as np

from dtrain.config import DataSettings
from dtrain.data.sources import arrays, source
from dtrain.errors import UserError
from dtrain.storage import access, files

_PREFIXES = {"train": "train", "test": "t10k"}
_UINT8 = 0x08


def open_idx(directory: str, config: DataSettings) -> arrays.ArraySource:
    """Opens a directory of IDX files: grey images, and labels if any.

    Args:
        directory: its path, which may be gs://.
        config: `split`, `image_size` and `channels` count.

    Raises:
        UserError: there are no such files, or one is malformed.
        StorageError: the store that they are on does not answer.
    """
    with access.to("dataset", directory):
        return _open(directory, config)


def _open(directory: str, config: DataSettings) -> arrays.ArraySource:
    prefix = _PREFIXES.get(config.split)
    if prefix is None:
        raise UserError(
            f"split ({config.split}) of {config.dataset} must be train or test"
        )
    if not files.is_directory(directory):
        raise UserError(
            f"dataset ({config.dataset}) must name a directory of IDX files; "
            f"{directory} is not one"
        )
    path = _find(directory, f"{prefix}-images", "idx3-ubyte")
    if path is None:
        raise UserError(
            f"{directory} holds no {prefix}-images-idx3-ubyte, nor one with "
            f".gz, for --split={config.split}"
        )
    images = read_idx(path, 3)[..., np.newaxis]
    if images.size == 0:
        raise UserError(f"{path} holds no images")
    labels = None
    labels_path = _find(directory, f"{prefix}-labels", "idx1-ubyte")
    if labels_path is not None:
        labels = read_idx(labels_path, 1).astype(np.int32)
        if len(labels) != len(images):
            raise UserError(
                f"{path} holds {len(images)} images but {labels_path} "
                f"{len(labels)} labels; they must be of one set"
            )
    return arrays.ArraySource(
        config.dataset, images, labels, config.image_size, config.channels
    )


def _find(directory: str, stem: str, kind: str) -> str | None:
    names = set(files.names(directory))
    for separator in "-.":
        for ending in ("", ".gz"):
            name = f"{stem}{separator}{kind}{ending}"
            path = os.path.join(directory, name)
            if name in names and not files.is_directory(path):
                return path
    return None


def read_idx(path: str | os.PathLike[str], rank: int) -> np.ndarray:
    """Reads one IDX file of bytes, as a read-only array of uint8.

    Args:
        path: of the file, gzipped if it ends in .gz.
        rank: number of dimensions that it must have.

    Raises:
        UserError: the file cannot be read, is not IDX, is of another type or
            rank, or is longer or shorter than its header says.
        StoreError: the store that it is on does not answer.
    """
    path = os.fspath(path)
    is_mapped = not (path.endswith(".gz") or files.is_remote(path))
    try:
        if is_mapped and files.size(path):
            content = np.memmap(path, np.uint8, mode="r")
        else:
            data = files.read(path) or b""
            if path.endswith(".gz"):
                data = gzip.decompress(data)
            content = np.frombuffer(data, np.uint8)
    except files.StoreError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return _parse(path, content, rank)


def _parse(path: str, content: np.ndarray, rank: int) -> np.ndarray:
    head = 4 + 4 * rank
    magic = bytes(content[:4])
    if magic != bytes((0, 0, _UINT8, rank)):
        raise UserError(
            f"{path} starts with {magic.hex(' ') or 'nothing'}; an IDX file "
            f"of {rank}-dimensional bytes starts with 00 00 08 0{rank}"
        )
    if len(content) < head:
        raise UserError(f"{path} is truncated within its header")
    shape = [int(size) for size in content[4:head].view(">u4")]
    expected = head + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        how = "truncated" if len(content) < expected else "too long"
        raise UserError(
            f"{path} is {how}: {len(content)} bytes, but its header "
            f"({source.shown(shape)}) asks for {expected}"
        )
    return content[head:].reshape(shape)
