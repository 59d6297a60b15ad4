"""What anyone may do with a directory of checkpoints: list, verify, read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures

import numpy as np
import tensorflow as tf

from dtrain.bundle import fingerprint
from dtrain.bundle import index as index_lib
from dtrain.bundle.literal import literal
from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.errors import UserError
from dtrain.storage import files, locks, temporary

# How the files of a checkpoint end, after `ckpt-<step>.`, beside the data.
INDEX, MANIFEST = "index", "json"

# What TensorFlow raises where a file is not what was written. What it raises
# where the memory is full, or a host does not answer, is not among them.
_DAMAGE = (
    tf.errors.DataLossError,
    tf.errors.OutOfRangeError,
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.FailedPreconditionError,
)
# What a disk says of a file that cannot be read at all.
_UNREADABLE = (errno.EISDIR, errno.ELOOP, errno.ENOTDIR)
# TensorFlow's words for EIO. One such error passes; if it comes again and
# again, it is damage if other files can be read.
_UNKNOWN = ("UnknownError", "InternalError")
_PAUSES_SECS = (0.1, 1.0)


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
        return _steps(files.names(self.path), rf"ckpt-(\d+)\.{MANIFEST}")

    def candidates(self) -> list[int]:
        """Lists the steps of all that looks like a checkpoint.

        What is being written or removed does not: it is named in `pending/`.
        """
        # Before the rest is listed: who removes one removes this name last.
        pending = _steps(files.names(self._pending), rf"ckpt-(\d+)\.{MANIFEST}")
        steps = _steps(
            files.names(self.path),
            rf"ckpt-(\d+)\.({MANIFEST}|{INDEX}|data-.*-of-\d+)",
        )
        committed = self.steps() if pending else []
        return [
            step for step in steps if step not in pending or step in committed
        ]

    def quarantined(self) -> list[str]:
        """Lists the names of what was put aside."""
        return files.names(f"{self.path}/quarantine")

    def manifest(self, step: int) -> Manifest:
        """Reads the manifest of a checkpoint.

        Raises:
            DamagedError: it is missing, or not what was written.
            OSError: the directory cannot be read.
        """
        data = files.read(f"{self.prefix(step)}.{MANIFEST}")
        if data is None:
            raise DamagedError("its manifest is missing")
        try:
            decoded = manifest.decode(data)
        except DamagedError as error:
            raise DamagedError(f"its manifest is damaged: {error}") from error
        if decoded.step != step:
            raise DamagedError(f"its manifest is that of step {decoded.step}")
        return decoded

    def verify(
        self, step: int, how: str = "full", *, num_threads: int = 4
    ) -> Manifest:
        """Checks that a checkpoint is what was written.

        Args:
            step: which.
            how: sizes, which looks at the sizes of the files, or full, which
                reads all tensors and compares their checksums.
            num_threads: that read them.

        Returns:
            Its manifest.

        Raises:
            DamagedError: it is not what was written; the text says why.
            FileNotFoundError: it was removed meanwhile.
            OSError: the directory cannot be read.
        """
        for pause_secs in _PAUSES_SECS:
            try:
                return self._verify_once(step, how, num_threads)
            except FileNotFoundError:
                raise
            except OSError:
                time.sleep(pause_secs)
        try:
            return self._verify_once(step, how, num_threads)
        except OSError as error:
            kind = getattr(error, "kind", "")
            if error.errno == errno.EIO or kind in _UNKNOWN:
                raise DamagedError(files.reason(error)) from error
            raise

    def _verify_once(self, step: int, how: str, num_threads: int) -> Manifest:
        try:
            return self._verify(step, how, num_threads)
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            raise DamagedError(files.reason(error)) from error

    def _verify(self, step: int, how: str, num_threads: int) -> Manifest:
        expected = self.manifest(step)
        for suffix, size in expected.sizes.items():
            actual = files.size(f"{self.prefix(step)}.{suffix}")
            if actual is None:
                raise DamagedError(f"its {suffix} is missing")
            if actual != size:
                raise DamagedError(
                    f"its {suffix} has {actual} bytes and should have {size}"
                )
        if how == "full":
            self._verify_tensors(expected, num_threads)
        return expected

    def _verify_tensors(self, expected: Manifest, num_threads: int) -> None:
        with self._on_disk(expected) as path, literal(path) as prefix:
            index = files.read(f"{prefix}.{INDEX}") or b""
            if hashlib.sha256(index).hexdigest() != expected.index_sha256:
                raise DamagedError("its index does not have its checksum")
            extents = index_lib.extents(prefix)
            lacking = expected.tensors.keys() - extents.keys()
            if lacking:
                raise DamagedError(f"its index lacks {min(lacking)}")

            def found(key: str) -> fingerprint.Fingerprint:
                return _found(prefix, key, extents[key])

            with futures.ThreadPoolExecutor(num_threads) as readers:
                results = readers.map(found, expected.tensors)
                for key, result in zip(expected.tensors, results, strict=True):
                    if result != expected.tensors[key]:
                        raise DamagedError(f"{key} does not have its checksum")

    @contextlib.contextmanager
    def _on_disk(self, manifest: Manifest) -> Iterator[str]:
        """Yields the prefix of a checkpoint, or of a copy of a remote one.

        TensorFlow looks for a checkpoint in a listing of its directory, and an
        object store may list what was there a while ago.

        Raises:
            DamagedError: raised by whoever reads it.
            UserError: likewise.
            OpError: likewise.
        """
        if not files.is_remote(self.path):
            yield self.prefix(manifest.step)
            return
        with self._temporary() as directory:
            prefix = self.prefix(manifest.step)
            copy = f"{directory}/ckpt-{manifest.step}"
            for suffix in manifest.sizes:
                files.copy(f"{prefix}.{suffix}", f"{copy}.{suffix}")
            try:
                yield copy
            except (
                *(DamagedError, FileNotFoundError, UserError),
                tf.errors.OpError,
            ) as error:
                _check_copy(manifest, copy, error)
                raise

    @contextlib.contextmanager
    def reading(self, step: int) -> Iterator[str]:
        """Keeps a checkpoint from being removed while it is read.

        Yields:
            The prefix that TensorFlow restores from, on a disk of this
            machine.

        Raises:
            DamagedError: its manifest is damaged.
            OSError: the directory cannot be read.
        """
        with (
            self._locked(step, shared=True),
            self._on_disk(self.manifest(step)) as prefix,
        ):
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
        """Yields a directory on a disk of this machine."""
        with temporary.directory("copy") as path:
            yield path


def read_tensors(
    prefix: str, keys: Sequence[str], dtypes: Mapping[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads tensors, all at once.

    Args:
        prefix: as TensorFlow reads it; see `literal`.
        keys: of the tensors.
        dtypes: TensorFlow's names of theirs, by key.

    Yields:
        The key and the value of each; of a variant its bytes.

    Raises:
        OpError: they cannot be read.
        OSError: likewise.
    """
    # What only an iterator reads counts by its bytes.
    variants = [key for key in keys if dtypes[key] == fingerprint.VARIANT]
    for key in variants:
        yield key, np.frombuffer(index_lib.raw(prefix, key), np.uint8)
    plain = [key for key in keys if key not in variants]
    if not plain:
        return
    # Not by a CheckpointReader, which makes one error of a file that is
    # damaged and a memory that is full.
    values = tf.raw_ops.RestoreV2(
        prefix=prefix,
        tensor_names=plain,
        shape_and_slices=[""] * len(plain),
        dtypes=[dtypes[key] for key in plain],
    )
    for key, value in zip(plain, values, strict=True):
        yield key, fingerprint.values_of(value)


def _check_copy(expected: Manifest, copy: str, error: Exception) -> None:
    """Checks that a copy is still there, of which an error says it is not.

    What cleans TMPDIR does not damage what was copied there.

    Raises:
        FileNotFoundError: it is gone, or some of it.
    """
    for suffix, size in expected.sizes.items():
        path = f"{copy}.{suffix}"
        if files.size(path) != size:
            raise FileNotFoundError(
                errno.ENOENT, f"its copy {path} was removed meanwhile"
            ) from error


def _found(
    prefix: str, key: str, extent: index_lib.Extent
) -> fingerprint.Fingerprint:
    """Reads a tensor; returns what it is.

    Raises:
        DamagedError: it cannot be read.
        store_error: the disk cannot be.
        OSError: likewise.
    """
    if extent.dtype != "string" and extent.is_whole:
        return extent.fingerprint()
    try:
        [(_, value)] = read_tensors(prefix, [key], {key: extent.dtype})
    except _DAMAGE as error:
        raise DamagedError(files.reason(error)) from error
    except tf.errors.OpError as error:
        raise files.store_error(error) from error
    return fingerprint.of(value, extent.dtype)


def _steps(names: Iterable[str], pattern: str) -> list[int]:
    matches = map(re.compile(pattern).fullmatch, names)
    return sorted({int(match[1]) for match in matches if match})
