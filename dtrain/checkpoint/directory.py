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
import glob
import hashlib
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
from dtrain.checkpoint.readable import INDEX, MANIFEST, ReadableDirectory
from dtrain.storage import files, locks


class Writable(Protocol):
    """A state that can be written."""

    def write(self, prefix: str) -> fingerprint.State:
        """Writes `<prefix>.index` and its data; see `Snapshot.write`."""
        ...


class CheckpointDirectory(ReadableDirectory):
    """Commits and removes the checkpoints of one directory.

    One thread of one process may; anyone may read meanwhile.
    """

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
            written = state.write(prefix)
            index = files.read(f"{prefix}.{INDEX}") or b""
            paths = glob.glob(f"{glob.escape(prefix)}.*")
            sizes = {
                path.removeprefix(f"{prefix}."): os.path.getsize(path)
                for path in sorted(paths)
            }
            return Manifest(
                step=step,
                saved_at=time.time(),
                sizes=sizes,
                index_sha256=hashlib.sha256(index).hexdigest(),
                tensors=written.tensors,
                digest=written.digest,
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
