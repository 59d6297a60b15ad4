"""A directory of checkpoints, each of which is there whole or not at all.

    ckpt-<step>.data-00000-of-00001   TensorFlow's own format; may be several
    ckpt-<step>.index
    ckpt-<step>.json                  the manifest; with it, it is committed
    checkpoint                        for stock TensorFlow; never trusted here
    pending/ckpt-<step>.json          what is on its way in, or out
    quarantine/ckpt-<step>/           what did not verify, and why

A manifest in `pending/` says that the rest of that step is nothing yet, or
nothing any more. So what a kill leaves behind can be told from what was
damaged: the first is swept, the second is put aside and reported. On a local
disk every line of it is put on the disk before the next; on an object store
the data is copied first and the manifest last.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

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


class Writable(Protocol):
    """A state that can be written."""

    def write(self, prefix: str) -> Mapping[str, fingerprint.Fingerprint]:
        """Writes `<prefix>.index` and its data; see `Snapshot.write`."""
        ...


class CheckpointDirectory:
    """Commits, verifies and removes the checkpoints of one directory.

    One thread of one process may change it; anyone may read.

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

    # Writing.

    def commit(
        self,
        step: int,
        state: Writable,
        facts: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Writes a state.

        Args:
            step: the steps that are done.
            state: what is written.
            facts: fields of `Manifest` beyond those of the state: metrics,
                log, run.

        Returns:
            The manifest.

        Raises:
            OSError: the directory cannot be written to; it is as it was.
        """

        def stage(prefix: str) -> Manifest:
            tensors = state.write(prefix)
            index = files.read(f"{prefix}.{INDEX}") or b""
            written = glob.glob(f"{glob.escape(prefix)}.*")
            sizes = {
                path.removeprefix(f"{prefix}."): os.path.getsize(path)
                for path in sorted(written)
            }
            return Manifest(
                step=step,
                saved_at=time.time(),
                sizes=sizes,
                index_sha256=hashlib.sha256(index).hexdigest(),
                tensors=tensors,
                **(facts or {}),
            )

        return self._commit(step, stage)

    def adopt(self, made: Manifest, prefix: str) -> None:
        """Commits files that come from elsewhere.

        Args:
            made: their manifest.
            prefix: where they are, on the disk of this directory if that is
                local; they are moved.

        Raises:
            OSError: the directory cannot be written to; it is as it was.
        """

        def stage(staged: str) -> Manifest:
            for suffix in made.sizes:
                files.move(f"{prefix}.{suffix}", f"{staged}.{suffix}")
            return made

        self._commit(made.step, stage)

    def _commit(self, step: int, stage: Callable[[str], Manifest]) -> Manifest:
        try:
            self.clean()
            files.make_directory(self._pending)
            with self._staging() as staging:
                made = self._commit_from(staging, step, stage)
            files.remove_tree(self._pending)
        except OSError:
            # Every try would leave another half on a disk that is full.
            with contextlib.suppress(OSError):
                self.clean()
            raise
        return made

    def _commit_from(
        self, staging: str, step: int, stage: Callable[[str], Manifest]
    ) -> Manifest:
        staged = f"{staging}/ckpt-{step}"
        made = stage(staged)
        if not files.is_remote(self.path):
            for suffix in made.sizes:
                files.sync(f"{staged}.{suffix}")
        if step in self.steps():
            self._withdraw(step)
        intent = f"{self._pending}/ckpt-{step}.{MANIFEST}"
        files.write(intent, made.encode())
        place = files.copy if files.is_remote(self.path) else files.move
        for suffix in made.sizes:
            place(f"{staged}.{suffix}", f"{self.prefix(step)}.{suffix}")
        files.sync(self.path)
        if files.is_remote(self.path):
            files.write(f"{self.prefix(step)}.{MANIFEST}", made.encode())
            files.remove(intent)
        else:
            files.move(intent, f"{self.prefix(step)}.{MANIFEST}")
            files.sync(self.path)
        return made

    @contextlib.contextmanager
    def _staging(self) -> Iterator[str]:
        """Yields a local directory, from which a local commit can rename."""
        if not files.is_remote(self.path):
            yield self._pending
            return
        with self._temporary() as made:
            yield made

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

    def clean(self) -> None:
        """Removes what killed commits and removals left behind, and only that.

        To be called by whoever alone may write here.

        Raises:
            OSError: the directory cannot be written to.
        """
        if files.is_remote(self.path):
            root = f"{tempfile.gettempdir()}/{self._staging_prefix()}"
            for left in glob.glob(f"{glob.escape(root)}*"):
                with (
                    contextlib.suppress(BlockingIOError, FileNotFoundError),
                    locks.held(left, os.O_RDONLY),
                ):
                    files.remove_tree(left)
        pending = files.names(self._pending)
        for name in pending:
            # One that is committed is that of a remote commit that was killed
            # before its last line. A listing may be of a while ago.
            is_committed = files.size(f"{self.path}/{name}") is not None
            match = re.fullmatch(rf"ckpt-(\d+)\.{MANIFEST}", name)
            if match and not is_committed:
                self._remove_files(
                    int(match[1]), files.read(f"{self._pending}/{name}") or b""
                )
        if pending:
            files.sync(self.path)
        files.remove_tree(self._pending)
        for name in self._names():
            if re.fullmatch(r"(checkpoint|pins\.json)\.tmp", name):
                files.remove(f"{self.path}/{name}")

    def remove(self, step: int) -> bool:
        """Removes a checkpoint, unless somebody reads it.

        Returns:
            Whether it is gone.

        Raises:
            OSError: the directory cannot be written to.
        """
        try:
            with self._locked(step, shared=False):
                self._withdraw(step)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            # Somebody else has removed it: it is no checkpoint any more.
            pass
        files.remove_tree(self._pending)
        return True

    def _withdraw(self, step: int) -> None:
        files.make_directory(self._pending)
        intent = f"{self._pending}/ckpt-{step}.{MANIFEST}"
        files.move(f"{self.prefix(step)}.{MANIFEST}", intent)
        # From here on it is no checkpoint, whatever of it is left.
        for directory in (self._pending, self.path):
            files.sync(directory)
        self._remove_files(step, files.read(intent) or b"")
        files.sync(self.path)
        files.remove(intent)

    def _remove_files(self, step: int, made: bytes) -> None:
        """Removes all of a checkpoint that its manifest tells of."""
        try:
            suffixes = list(manifest.decode(made).sizes)
        except DamagedError:
            start = f"ckpt-{step}."
            suffixes = [
                name.removeprefix(start)
                for name in self._names()
                if name.startswith(start) and not name.endswith(MANIFEST)
            ]
        # Without the index, TensorFlow takes the rest for nothing.
        for suffix in sorted(suffixes, key=lambda each: each != INDEX):
            files.remove(f"{self.prefix(step)}.{suffix}")

    def point(self, times: Mapping[int, float]) -> None:
        """Writes the pointer file that stock TensorFlow looks for.

        The names in it are relative, so that a run may be moved.

        Args:
            times: when each committed step was saved, in seconds since 1970.

        Raises:
            OSError: the directory cannot be written to.
        """
        names = [f"ckpt-{step}" for step in sorted(times)]
        if not names:
            files.remove(f"{self.path}/checkpoint")
            return
        state = tf.compat.v1.train.generate_checkpoint_state_proto(
            # Names would be taken as relative to the working directory, were
            # this one relative, too.
            "/",
            names[-1],
            all_model_checkpoint_paths=names,
            # Without them a stock manager would keep all of these for ever.
            all_model_checkpoint_timestamps=[
                times[step] for step in sorted(times)
            ],
        )
        files.write(f"{self.path}/checkpoint", str(state).encode())

    # Reading.

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

    def quarantine(self, step: int, reason: str) -> str:
        """Puts a checkpoint that does not verify aside.

        Args:
            step: which.
            reason: why, for whoever looks at it later.

        Returns:
            The directory where it lies now.

        Raises:
            OSError: the directory cannot be written to.
        """
        there = self.quarantined()
        name, number = f"ckpt-{step}", 1
        while name in there:
            number += 1
            name = f"ckpt-{step}-{number}"
        target = f"{self.path}/quarantine/{name}"
        files.make_directory(target)
        files.write(f"{target}/reason.txt", f"{reason}\n".encode())
        found = [
            each for each in self._names() if each.startswith(f"ckpt-{step}.")
        ]
        # The manifest first: without it the rest is no checkpoint.
        for each in sorted(found, key=lambda name: not name.endswith(MANIFEST)):
            files.move(f"{self.path}/{each}", f"{target}/{each}")
        files.sync(self.path)
        return target


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
