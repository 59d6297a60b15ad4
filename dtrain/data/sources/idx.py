"""IDX files: the layout of MNIST and of the sets made after it.

A directory holds `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, and
for --split=test the same with `t10k`; each may be gzipped (`.gz`), and the
labels may be missing. A file of images that is not gzipped is mapped, not read.
The format: https://yann.lecun.org/exdb/mnist/
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from dtrain.config import DataSettings
from dtrain.data.sources import arrays, room, source
from dtrain.data.sources import labels as labels_lib
from dtrain.data.sources.source import Wanted
from dtrain.errors import UserError
from dtrain.storage import access, files

_PREFIXES = {"train": "train", "test": "t10k"}
_UINT8 = 0x08
_CHUNK_BYTES = 16 * 2**20
# Of a byte, gzip makes no more.
_MAX_RATIO = 1032


def open_idx(
    directory: str, config: DataSettings, wanted: Wanted = source.USUAL
) -> arrays.ArraySource:
    """Opens a directory of IDX files: grey images, and labels if any.

    Args:
        directory: its path, which may be gs://.
        config: `split`, `image_size` and `channels` count.
        wanted: what of it is read.

    Raises:
        UserError: there are no such files, or one is malformed.
        StorageError: the store that they are on does not answer.
    """
    with access.to("dataset", directory):
        return _open(directory, config, wanted)


def _open(
    directory: str, config: DataSettings, wanted: Wanted
) -> arrays.ArraySource:
    prefix = _PREFIXES.get(config.split)
    if prefix is None:
        raise UserError(
            f"split ({config.split}) of {config.dataset} must be train or test"
        )
    if not files.is_directory(directory):
        raise UserError(
            f"dataset ({config.dataset}) must name a directory of IDX files; "
            f"{directory} is not one" + source.hint(directory, "idx")
        )
    path = _find(directory, f"{prefix}-images", "idx3-ubyte")
    if path is None:
        raise UserError(
            f"{directory} holds no {prefix}-images-idx3-ubyte, nor one with "
            f".gz, for --split={config.split}" + source.hint(directory, "idx")
        )
    images = read_idx(path, 3)[..., np.newaxis]
    if images.size == 0:
        raise UserError(f"{path} holds no images")
    labels = None
    labels_path = _find(directory, f"{prefix}-labels", "idx1-ubyte")
    if labels_path is not None and wanted.has_labels:
        labels = read_idx(labels_path, 1)
        if len(labels) != len(images):
            raise UserError(
                f"{path} holds {len(images)} images but {labels_path} "
                f"{len(labels)} labels; they must be of one set"
            )
        labels = labels_lib.numbered(labels_path, labels, len(images))
    if wanted.is_map:
        images = images.astype(np.uint16)
    return arrays.ArraySource(config, images, labels, is_map=wanted.is_map)


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
            rank, is longer or shorter than its header says, or the memory does
            not hold what that asks for.
        StoreError: the store that it is on does not answer.
    """
    path = os.fspath(path)
    try:
        if path.endswith(".gz") or files.is_remote(path):
            with _stream(path) as stream:
                return _read_stream(path, stream, rank)
        # A file of no bytes cannot be mapped.
        if not files.size(path):
            return _parse(path, np.empty(0, np.uint8), rank)
        content = np.memmap(path, np.uint8, mode="r")
    except files.StoreError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return _parse(path, content, rank)


@contextlib.contextmanager
def _stream(path: str) -> Iterator[BinaryIO]:
    """Opens a file, which may be gzipped or on a store."""
    with contextlib.ExitStack() as stack:
        if files.is_remote(path):
            room.check(path, files.size(path) or 0)
            file: Any = io.BytesIO(files.read(path) or b"")
        else:
            file = stack.enter_context(open(path, "rb"))
        if path.endswith(".gz"):
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        yield file


def _read_stream(path: str, stream: BinaryIO, rank: int) -> np.ndarray:
    """Reads as many bytes as the header promises, and one more.

    Raises:
        UserError: it is no IDX file, not as long as it says, or too long for
            the memory.
    """
    head = np.frombuffer(stream.read(_head_bytes(rank)), np.uint8)
    expected = _expected_bytes(path, head, rank)
    most = (files.size(path) or 0) * (_MAX_RATIO if path.endswith(".gz") else 1)
    if expected > most:
        raise UserError(
            f"{path} is truncated: it holds at most {most} bytes, but its "
            f"header ({source.shown(_shape(head, rank))}) asks for {expected}"
        )
    room.check(path, expected)
    content = np.empty(expected + 1, np.uint8)
    content[: len(head)] = head
    done = len(head)
    # A piece at a time: what is not written to takes no memory.
    while done < len(content):
        piece = stream.read(min(_CHUNK_BYTES, len(content) - done))
        if not piece:
            break
        content[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    return _parse(path, content[:done], rank)


def _head_bytes(rank: int) -> int:
    return 4 + 4 * rank


def _expected_bytes(path: str, content: np.ndarray, rank: int) -> int:
    """Returns the bytes that a file must have, as its first ones say.

    Raises:
        UserError: it is no IDX file, or of another type or rank.
    """
    magic = bytes(content[:4])
    if magic != bytes((0, 0, _UINT8, rank)):
        raise UserError(
            f"{path} starts with {magic.hex(' ') or 'nothing'}; an IDX file "
            f"of {rank}-dimensional bytes starts with 00 00 08 0{rank}"
        )
    if len(content) < _head_bytes(rank):
        raise UserError(f"{path} is truncated within its header")
    return _head_bytes(rank) + math.prod(_shape(content, rank))


def _shape(content: np.ndarray, rank: int) -> list[int]:
    sizes = content[4 : _head_bytes(rank)].view(">u4")
    return [int(size) for size in sizes]


def _parse(path: str, content: np.ndarray, rank: int) -> np.ndarray:
    expected = _expected_bytes(path, content, rank)
    shape = _shape(content, rank)
    if len(content) != expected:
        how = "truncated" if len(content) < expected else "too long"
        raise UserError(
            f"{path} is {how}: {len(content)} bytes, but its header "
            f"({source.shown(shape)}) asks for {expected}"
        )
    return content[_head_bytes(rank) : expected].reshape(shape)
