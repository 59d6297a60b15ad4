"""Which checkpoint is meant, and where TensorFlow can read it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from dtrain.bundle import index, reader
from dtrain.bundle.tree import Tree
from dtrain.checkpoint import listing
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.errors import UserError
from dtrain.storage import files, temporary
from dtrain.tensorfiles import containers

_NUMBERED = re.compile(r"(?:(.*)/)?ckpt-(\d+)")


class Opened(NamedTuple):
    """A checkpoint that can be read.

    Attributes:
        prefix: as its user names it.
        local: prefix that TensorFlow reads from, which may be of a copy.
        tree: its tensors, read from the file when they are asked for.
        manifest: of a checkpoint that dtrain wrote; None for any other.
    """

    prefix: str
    local: str
    tree: Tree
    manifest: Manifest | None


def resolve(path: str) -> str:
    """Finds the checkpoint that a path stands for.

    Args:
        path: a checkpoint, with or without `.index`; or a directory of
            checkpoints, or of a run, whose newest one is meant, or a
            SavedModel.

    Returns:
        Its prefix.

    Raises:
        UserError: there is none.
        StorageError: the disk or the store cannot be read.
    """
    prefix = re.sub(r"\.(index|json|data-\d+-of-\d+)$", "", path)
    with files.storage_errors(path):
        if files.size(f"{prefix}.index") is not None or index.is_v1(prefix):
            return prefix
        variables = f"{path.rstrip('/')}/variables/variables"
        if files.size(f"{variables}.index") is not None:
            return variables
        newest = listing.newest(path.rstrip("/"))
        is_file = path.endswith(containers.SUFFIXES) and files.exists(path)
    if newest is None and is_file:
        raise UserError(
            f"{path} is a file of tensors, and here a checkpoint is needed; "
            f"make one: python -m dtrain.checkpoint_tool import {path} "
            "--into=CKPT --output=DIR/ckpt-0"
        )
    if newest is None:
        raise UserError(
            f"there is no checkpoint {path}; name it by its path without "
            ".index, or name a directory of checkpoints"
        )
    return newest


@contextlib.contextmanager
def opened(path: str) -> Iterator[Opened]:
    """Opens a checkpoint; a run that saves there does not remove it meanwhile.

    Args:
        path: see `resolve`.

    Raises:
        UserError: there is none, or it is damaged.
        StorageError: the disk or the store cannot be read.
    """
    prefix = resolve(path)
    manifest = manifest_of(prefix)
    with contextlib.ExitStack() as stack:
        with files.storage_errors(prefix):
            if manifest:
                directory = CheckpointDirectory(os.path.dirname(prefix) or ".")
                local = stack.enter_context(directory.reading(manifest.step))
            else:
                local = stack.enter_context(on_disk(prefix))
        yield Opened(prefix, local, reader.read(local), manifest)


def manifest_of(prefix: str) -> Manifest | None:
    """Reads the manifest of a checkpoint; None if dtrain did not write it.

    Raises:
        UserError: the manifest is damaged.
        StorageError: the disk or the store cannot be read.
    """
    match = _NUMBERED.fullmatch(prefix)
    with files.storage_errors(prefix):
        if not match or files.size(f"{prefix}.json") is None:
            return None
        try:
            return CheckpointDirectory(match[1] or ".").manifest(int(match[2]))
        except DamagedError as error:
            raise UserError(
                f"{prefix}: {error}; to read it all the same, without a "
                f"check, move {prefix}.json away"
            ) from error


def target(output: str) -> tuple[str, int]:
    """Splits a path, as `edited/ckpt-5000`, into its directory and its step.

    Raises:
        UserError: it is no such path.
    """
    match = _NUMBERED.fullmatch(output)
    if not match:
        raise UserError(
            f"output ({output}) must end with the name of a checkpoint; try "
            f"{output.rstrip('/')}/ckpt-0"
        )
    return match[1] or ".", int(match[2])


@contextlib.contextmanager
def on_disk(prefix: str) -> Iterator[str]:
    """Yields the prefix of a checkpoint, or of a copy of a remote one.

    Raises:
        OSError: it cannot be copied.
    """
    if not files.is_remote(prefix):
        yield prefix
        return
    directory, _, name = prefix.rpartition("/")
    with temporary.directory("read") as copy:
        for file in files.names(directory):
            if re.fullmatch(rf"{re.escape(name)}(\.(index|data-.*))?", file):
                files.copy(f"{directory}/{file}", f"{copy}/{file}")
        yield f"{copy}/{name}"
