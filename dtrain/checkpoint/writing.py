"""Writes a tree as a checkpoint: committed, and verified like any other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from dtrain.bundle import fingerprint
from dtrain.bundle.fingerprint import GRAPH_KEY, Fingerprint
from dtrain.bundle.tree import Tree
from dtrain.checkpoint import opening
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manifest import DamagedError
from dtrain.errors import StorageError, UserError
from dtrain.storage import claim, files

# At most this is in memory at once, or a single tensor that is larger.
_PART_BYTES = 64 << 20

Progress = Callable[[int], object]


class WritableTree:
    """A tree as a `directory.Writable`: it is read and written in parts."""

    def __init__(self, tree: Tree, progress: Progress = lambda _: None) -> None:
        """Takes the tree; nothing is read yet.

        Args:
            tree: its tensors are read when they are written.
            progress: called with the bytes of each tensor that is written.
        """
        self._tree = tree
        self._progress = progress

    def write(self, prefix: str) -> dict[str, Fingerprint]:
        """Writes `<prefix>.index` and one data file or more to a local disk.

        Returns:
            The fingerprints of the tensors, taken before they are written.

        Raises:
            UserError: a tensor cannot be read.
            OSError: the disk is full, or gone.
        """
        graph = np.array(self._tree.graph.SerializeToString(), np.object_)
        written = {GRAPH_KEY: fingerprint.of(graph)}
        pending, parts, size = {GRAPH_KEY: graph}, list[str](), 0
        for key, tensor in sorted(self._tree.tensors.items()):
            value = tensor.read()
            written[key] = fingerprint.of(value)
            if size + value.nbytes > _PART_BYTES and pending:
                parts.append(_save(f"{prefix}-part-{len(parts)}", pending))
                pending, size = {}, 0
            pending[key] = value
            size += value.nbytes
            self._progress(value.nbytes)
        if not parts:
            _save(prefix, pending)
            return written
        parts.append(_save(f"{prefix}-part-{len(parts)}", pending))
        with files.os_errors():
            tf.raw_ops.MergeV2Checkpoints(
                checkpoint_prefixes=parts,
                destination_prefix=prefix,
                delete_old_dirs=False,
            )
        return written


def _save(prefix: str, values: Mapping[str, np.ndarray]) -> str:
    """Writes some tensors; returns where."""
    with files.os_errors():
        tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=list(values),
            shape_and_slices=[""] * len(values),
            tensors=[tf.constant(value) for value in values.values()],
        )
    return prefix


def commit(
    tree: Tree,
    output: str,
    facts: Mapping[str, Any] | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """Writes a tree as a checkpoint, and puts it aside if it does not verify.

    Args:
        tree: what is written.
        output: as in `edited/ckpt-5000`, local or gs://; it must not exist.
        facts: the metrics, log and run of its `Manifest`.
        progress: see `WritableTree`.

    Raises:
        UserError: the output exists, a process trains there, or a tensor
            cannot be read.
        StorageError: the disk or the store failed.
        KeyboardInterrupt: a person ended it; nothing of it is left.
    """
    path, step = opening.target(output)
    with files.storage_errors(path), claimed(path):
        directory = CheckpointDirectory(path)
        if step in directory.candidates():
            raise UserError(f"output ({output}): it exists; name another")
        try:
            directory.commit(step, WritableTree(tree, progress), facts)
        except (UserError, KeyboardInterrupt):
            # Half of it, which would stay until the next one is written.
            directory.clean()
            raise
        try:
            directory.verify(step)
        except DamagedError as error:
            aside = directory.quarantine(step, str(error))
            raise StorageError(
                f"{output}: what was written reads back wrong ({error}); it "
                f"is in {aside}"
            ) from error
        directory.point(
            {
                saved: directory.manifest(saved).saved_at
                for saved in directory.steps()
            }
        )


@contextlib.contextmanager
def claimed(directory: str) -> Iterator[None]:
    """Keeps a run from saving to a directory; fails where one does."""
    with claim.claim(directory, name="output"):
        yield
