"""A directory of checkpoints, each of which is there whole or not at all.

    ckpt-<step>.data-00000-of-00001   TensorFlow's own format; may be several
    ckpt-<step>.index
    ckpt-<step>.json                  the manifest; with it, it is committed
    checkpoint                        for stock TensorFlow; never trusted here
    pending/ckpt-<step>.json          what is on its way in, or out
    quarantine/ckpt-<step>/           what did not verify, and why

A manifest in `pending/` says that the files of that step are being written or
removed. So what a kill leaves behind can be told from what was damaged: the
first is removed, the second is put aside and reported. On a local disk each
change is on the disk before the next is made; on an object store the data is
copied first and the manifest last.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import tensorflow as tf

from dtrain.bundle.fingerprint import Fingerprint
from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.checkpoint.readable import INDEX, MANIFEST, ReadableDirectory
from dtrain.storage import files, temporary


class Writable(Protocol):
    """A state that can be written."""

    def write(self, prefix: str) -> Mapping[str, Fingerprint]:
        """Writes `<prefix>.index` and its data; see `Snapshot.write`."""
        ...


class CheckpointDirectory(ReadableDirectory):
    """Commits and removes the checkpoints of one directory.

    One thread of one process may do so; anyone may read meanwhile.

    Attributes:
        guard: called before anything is made; raises where that is not to be.
    """

    guard: Callable[[], None] = staticmethod(lambda: None)

    def commit(
        self,
        step: int,
        state: Writable,
        facts: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Writes a state as a checkpoint.

        Args:
            step: the steps that are done.
            state: what is written.
            facts: the metrics, log and run of its `Manifest`.

        Returns:
            The manifest.

        Raises:
            OSError: the directory cannot be written to; it is as it was.
        """

        def stage(prefix: str) -> Manifest:
            return describe(prefix, step, state.write(prefix), facts or {})

        return self._commit(step, stage)

    def adopt(
        self, manifest: Manifest, prefix: str, *, copies: bool = False
    ) -> None:
        """Commits files that come from elsewhere.

        Args:
            manifest: theirs.
            prefix: where they are, on the disk of this directory if that is
                local.
            copies: whether they stay there, too.

        Raises:
            OSError: the directory cannot be written to; it is as it was.
        """
        put = files.copy if copies else files.move

        def stage(staged: str) -> Manifest:
            for suffix in manifest.sizes:
                put(f"{prefix}.{suffix}", f"{staged}.{suffix}")
            return manifest

        self._commit(manifest.step, stage)

    def recognize(self, manifest: Manifest) -> None:
        """Commits files that another program has written to their place here.

        Args:
            manifest: theirs.

        Raises:
            OSError: the directory cannot be written to.
        """
        prefix = self.prefix(manifest.step)
        if not files.is_remote(self.path):
            for suffix in manifest.sizes:
                files.sync(f"{prefix}.{suffix}")
        files.write(f"{prefix}.{MANIFEST}", manifest.encode())

    def _commit(self, step: int, stage: Callable[[str], Manifest]) -> Manifest:
        try:
            self.clean()
            self.guard()
            files.make_directory(self._pending)
            with self._staging() as staging:
                manifest = self._commit_from(staging, step, stage)
            files.remove_tree(self._pending)
        except OSError:
            # Every try would leave another half on a disk that is full.
            with contextlib.suppress(OSError):
                self.clean()
            raise
        return manifest

    def _commit_from(
        self, staging: str, step: int, stage: Callable[[str], Manifest]
    ) -> Manifest:
        staged = f"{staging}/ckpt-{step}"
        manifest = stage(staged)
        is_remote = files.is_remote(self.path)
        if not is_remote:
            for suffix in manifest.sizes:
                files.sync(f"{staged}.{suffix}")
        if files.exists(f"{self.prefix(step)}.{MANIFEST}"):
            self._withdraw(step)
        intent = f"{self._pending}/ckpt-{step}.{MANIFEST}"
        files.write(intent, manifest.encode())
        put = files.copy if is_remote else files.move
        for suffix in manifest.sizes:
            put(f"{staged}.{suffix}", f"{self.prefix(step)}.{suffix}")
        files.sync(self.path)
        if is_remote:
            files.write(f"{self.prefix(step)}.{MANIFEST}", manifest.encode())
            files.remove(intent)
        else:
            files.move(intent, f"{self.prefix(step)}.{MANIFEST}")
            files.sync(self.path)
        return manifest

    @contextlib.contextmanager
    def _staging(self) -> Iterator[str]:
        """Yields a local directory, from which a local commit can rename."""
        if not files.is_remote(self.path):
            # Not by its name: TensorFlow would make a directory anew that was
            # moved or removed meanwhile, and another run may begin there.
            opened = os.open(self._pending, os.O_PATH | os.O_DIRECTORY)
            try:
                yield f"/proc/self/fd/{opened}"
            finally:
                os.close(opened)
            return
        with self._temporary() as path:
            yield path

    def clean(self) -> None:
        """Removes what killed commits and removals left behind, and only that.

        Only who may write here may call this.

        Raises:
            OSError: the directory cannot be written to.
        """
        if files.is_remote(self.path):
            temporary.sweep()
        pending = files.names(self._pending)
        for name in pending:
            # If a commit to a store was killed before it removed this name, it
            # is complete. A listing would not do: it may be of a while ago.
            is_committed = files.size(f"{self.path}/{name}") is not None
            match = re.fullmatch(rf"ckpt-(\d+)\.{MANIFEST}", name)
            if match and not is_committed:
                self._remove_files(
                    int(match[1]), files.read(f"{self._pending}/{name}") or b""
                )
        if pending:
            files.sync(self.path)
        files.remove_tree(self._pending)
        if not files.is_remote(self.path):
            for name in ("checkpoint", "pins.json"):
                files.remove(f"{self.path}/{name}.tmp")

    def remove(self, step: int) -> bool:
        """Removes a checkpoint unless somebody reads it; tells whether it did.

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
        """Removes a checkpoint such that a kill leaves none half removed."""
        files.make_directory(self._pending)
        intent = f"{self._pending}/ckpt-{step}.{MANIFEST}"
        files.move(f"{self.prefix(step)}.{MANIFEST}", intent)
        # From here on it is no checkpoint, whatever of it is left.
        for directory in (self._pending, self.path):
            files.sync(directory)
        self._remove_files(step, files.read(intent) or b"")
        files.sync(self.path)
        files.remove(intent)

    def _remove_files(self, step: int, encoded: bytes) -> None:
        """Removes the files of a checkpoint that its manifest names."""
        try:
            suffixes = list(manifest.decode(encoded).sizes)
        except DamagedError:
            start = f"ckpt-{step}."
            suffixes = [
                name.removeprefix(start)
                for name in files.names(self.path)
                if name.startswith(start) and not name.endswith(MANIFEST)
            ]
        # The index first: without it the rest is nothing to TensorFlow.
        for suffix in sorted(suffixes, key=lambda suffix: suffix != INDEX):
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
        """Puts a checkpoint aside, and notes why; returns where it is then.

        Raises:
            OSError: the directory cannot be written to.
        """
        taken = self.quarantined()
        name, number = f"ckpt-{step}", 1
        while name in taken:
            number += 1
            name = f"ckpt-{step}-{number}"
        target = f"{self.path}/quarantine/{name}"
        files.make_directory(target)
        files.write(f"{target}/reason.txt", f"{reason}\n".encode())
        names = files.names(self.path)
        # The manifest first: without it the rest is no checkpoint.
        for name in sorted(names, key=lambda name: not name.endswith(MANIFEST)):
            if name.startswith(f"ckpt-{step}."):
                files.move(f"{self.path}/{name}", f"{target}/{name}")
        files.sync(self.path)
        return target


def describe(
    prefix: str,
    step: int,
    written: Mapping[str, Fingerprint],
    facts: Mapping[str, Any],
) -> Manifest:
    """Makes the manifest of files on a disk of this machine.

    Args:
        prefix: of the files, without `.index`.
        step: the steps that were done.
        written: the fingerprints of their tensors.
        facts: other fields of the manifest.

    Raises:
        OSError: they cannot be read.
    """
    place, name = os.path.split(prefix)
    # Not by glob, which keeps the pattern of each step in memory.
    paths = [
        f"{prefix}.{INDEX}",
        *(
            os.path.join(place, file)
            for file in files.names(place or ".")
            if file.startswith(f"{name}.data-")
        ),
    ]
    sizes = {
        path.removeprefix(f"{prefix}."): os.path.getsize(path) for path in paths
    }
    index = files.read(f"{prefix}.{INDEX}") or b""
    described = {
        "saved_at": time.time(),
        "sizes": sizes,
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "tensors": written,
    }
    return Manifest(step=step, **{**described, **facts})
