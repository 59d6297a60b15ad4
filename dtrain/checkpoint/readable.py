"""What anyone may do with a directory of checkpoints: list, verify, read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Iterator

import tensorflow as tf

from dtrain.bundle import fingerprint
from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.storage import files, locks

# What is in a file of a checkpoint, after `ckpt-<step>.` and beside the data;
# a manifest is last.
INDEX, MANIFEST = "index", "json"

# Says that a file on a disk is not what was written. What a full memory makes
# of a good one is not among them.
_DAMAGE = (
    tf.errors.DataLossError,
    tf.errors.OutOfRangeError,
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
    tf.errors.InternalError,
    tf.errors.FailedPreconditionError,
)
_UNREADABLE = (errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENOTDIR)
_BATCH_BYTES = 64 << 20


class ReadableDirectory:
    """Lists, verifies and reads the checkpoints of one directory.

    Any process may, at any time; it changes nothing.

    Attributes:
        path: local or gs://.
    """

    def __init__(self, path: str) -> None:
        """Names the directory, which is made at the first commit."""
        self.path = path.rstrip("/")
        self._pending = f"{self.path}/pending"

    def prefix(self, step: int) -> str:
        """Returns what stock TensorFlow restores from."""
        return f"{self.path}/ckpt-{step}"

    def steps(self) -> list[int]:
        """Lists the steps that are committed, oldest first."""
        return self._steps(rf"ckpt-(\d+)\.{MANIFEST}")

    def candidates(self) -> list[int]:
        """Lists the steps of all that looks like a checkpoint.

        What is on its way in or out does not, while its owner may be at it.
        """
        # Before the rest is listed: who sweeps removes the intent last.
        on_the_way = [
            int(match[1])
            for name in files.names(self._pending)
            if (match := re.fullmatch(rf"ckpt-(\d+)\.{MANIFEST}", name))
        ]
        found = self._steps(rf"ckpt-(\d+)\.({MANIFEST}|{INDEX}|data-.*-of-\d+)")
        committed = self.steps() if on_the_way else []
        return [
            step
            for step in found
            if step not in on_the_way or step in committed
        ]

    def _steps(self, pattern: str) -> list[int]:
        matches = [re.fullmatch(pattern, name) for name in self._names()]
        return sorted({int(match[1]) for match in matches if match})

    def _names(self) -> list[str]:
        return files.names(self.path)

    def quarantined(self) -> list[str]:
        """Lists what was put aside."""
        return files.names(f"{self.path}/quarantine")

    def manifest(self, step: int) -> Manifest:
        """Reads what a checkpoint must be.

        Raises:
            DamagedError: it cannot be told any more.
            OSError: the directory cannot be read.
        """
        data = files.read(f"{self.prefix(step)}.{MANIFEST}")
        if data is None:
            raise DamagedError("its manifest is missing")
        try:
            made = manifest.decode(data)
        except DamagedError as error:
            raise DamagedError(f"its manifest is damaged: {error}") from error
        if made.step != step:
            raise DamagedError(f"its manifest is that of step {made.step}")
        return made

    def verify(self, step: int, how: str = "full") -> Manifest:
        """Checks that a checkpoint is what was written.

        Args:
            step: which.
            how: sizes, or full, which reads and sums all of it.

        Returns:
            Its manifest.

        Raises:
            DamagedError: it is not; the text is the reason.
            OSError: the directory cannot be read.
        """
        try:
            return self._verify(step, how)
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            raise DamagedError(files.reason(error)) from error

    def _verify(self, step: int, how: str) -> Manifest:
        made = self.manifest(step)
        for suffix, size in made.sizes.items():
            there = files.size(f"{self.prefix(step)}.{suffix}")
            if there is None:
                raise DamagedError(f"its {suffix} is missing")
            if there != size:
                raise DamagedError(
                    f"its {suffix} has {there} bytes and should have {size}"
                )
        if how == "full":
            self._verify_tensors(made)
        return made

    def _verify_tensors(self, made: Manifest) -> None:
        with self._on_disk(made) as prefix:
            index = files.read(f"{prefix}.{INDEX}") or b""
            if hashlib.sha256(index).hexdigest() != made.index_sha256:
                raise DamagedError("its index does not have its checksum")
            for keys in _batches(made):
                tensors = [made.tensors[key] for key in keys]
                try:
                    # Not by a CheckpointReader, which makes one error of a
                    # file that is damaged and a memory that is full.
                    values = tf.raw_ops.RestoreV2(
                        prefix=prefix,
                        tensor_names=keys,
                        shape_and_slices=[""] * len(keys),
                        dtypes=[tensor.dtype for tensor in tensors],
                    )
                except _DAMAGE as error:
                    raise DamagedError(files.reason(error)) from error
                except tf.errors.OpError as error:
                    raise files.store_error(error) from error
                for key, tensor, value in zip(
                    keys, tensors, values, strict=True
                ):
                    values = fingerprint.values_of(value)
                    if fingerprint.of(values) != tensor:
                        raise DamagedError(f"{key} does not have its checksum")

    @contextlib.contextmanager
    def _on_disk(self, made: Manifest) -> Iterator[str]:
        """Yields the prefix of a checkpoint, or of a copy of a remote one.

        TensorFlow looks for a checkpoint in a listing of its directory, and an
        object store may list what was there a while ago.
        """
        if not files.is_remote(self.path):
            yield self.prefix(made.step)
            return
        with self._temporary() as directory:
            copy = f"{directory}/ckpt-{made.step}"
            for suffix in made.sizes:
                files.copy(
                    f"{self.prefix(made.step)}.{suffix}", f"{copy}.{suffix}"
                )
            yield copy

    @contextlib.contextmanager
    def reading(self, step: int) -> Iterator[str]:
        """Keeps a checkpoint from being removed while it is read.

        Args:
            step: which.

        Yields:
            The prefix that TensorFlow restores from, on the disk of this
            machine.

        Raises:
            DamagedError: what it is cannot be told any more.
            OSError: the directory cannot be read.
        """
        with self._locked(step, shared=True):
            made = self.manifest(step)
            with self._on_disk(made) as prefix:
                yield prefix

    @contextlib.contextmanager
    def _locked(self, step: int, *, shared: bool) -> Iterator[None]:
        if files.is_remote(self.path):
            yield
            return
        # A network disk locks for writing only what is open for writing.
        flags = os.O_RDONLY if shared else os.O_RDWR
        # On a disk without locks, whoever reads takes the risk.
        with locks.held(
            f"{self.prefix(step)}.{MANIFEST}", flags, shared=shared
        ):
            yield

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[str]:
        """Yields a directory on the disk of this machine."""
        with (
            tempfile.TemporaryDirectory(prefix=self._staging_prefix()) as made,
            # Says that whoever made it lives. In the moment before, another
            # process that cleans may take it: what is made in it then fails.
            locks.held(made, os.O_RDONLY, shared=True),
        ):
            yield made

    def _staging_prefix(self) -> str:
        name = f"{os.getuid()} {self.path}"
        return f"dtrain-{hashlib.sha256(name.encode()).hexdigest()[:16]}-"


def _batches(made: Manifest) -> Iterator[list[str]]:
    """Cuts the keys into parts that fit the memory; few, for each opens all."""
    batch: list[str] = []
    size = 0
    for key, tensor in sorted(made.tensors.items()):
        size += math.prod(tensor.shape) * tf.as_dtype(tensor.dtype).size
        batch.append(key)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
