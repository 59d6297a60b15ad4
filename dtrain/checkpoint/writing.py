"""Writes a tree as a checkpoint: committed, and verified like any other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from dtrain.bundle import writer
from dtrain.bundle.fingerprint import GRAPH_KEY, Fingerprint
from dtrain.bundle.tree import Tree
from dtrain.checkpoint import opening
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manifest import DamagedError
from dtrain.errors import StorageError, UserError
from dtrain.storage import claim, files

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
        tensors = self._tree.tensors.values()
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        return writer.write(prefix, self._read(), num_bytes)

    def _read(self) -> Iterator[tuple[str, tf.Tensor]]:
        graph = self._tree.graph.SerializeToString()
        yield GRAPH_KEY, tf.constant(graph)
        for key, tensor in sorted(self._tree.tensors.items()):
            value = tensor.read()
            yield key, tf.constant(value)
            self._progress(value.nbytes)


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
