"""The file that TensorBoard reads: losses now and then, and pictures."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time

import tensorflow as tf

from dtrain.storage import files

# What the disk raises, and TensorFlow's own writer.
_FAILURES = (OSError, tf.errors.OpError)


class Events:
    """A file for TensorBoard.

    An event that cannot be written is left out: metrics.jsonl has them all.
    """

    # A run on an object store sends the whole file each time.
    _MAX_BYTES = 16 << 20

    def __init__(self, directory: str) -> None:
        """Opens nothing before something is written.

        Args:
            directory: of the event files, on a disk.
        """
        self._directory = directory
        self._writer: tf.io.TFRecordWriter | None = None
        self._num_bytes = 0
        # The writer is not safe to be used by two threads.
        self._lock = threading.Lock()

    def write(self, **fields: object) -> None:
        """Writes one event."""
        event = tf.compat.v1.Event(wall_time=time.time(), **fields)
        with self._lock:
            try:
                self._write(event.SerializeToString())
            except _FAILURES:
                self._abandon()

    def _write(self, event: bytes) -> None:
        if self._num_bytes > self._MAX_BYTES:
            self._abandon()
        writer = self._writer = self._writer or self._open()
        writer.write(event)
        self._num_bytes += len(event)

    def _open(self) -> tf.io.TFRecordWriter:
        files.make_directory(self._directory, parents=False)
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}"
        path = os.path.join(self._directory, name)
        writer = tf.io.TFRecordWriter(path)
        version = tf.compat.v1.Event(
            wall_time=now, file_version="brain.Event:2"
        )
        try:
            writer.write(version.SerializeToString())
            writer.flush()
        except _FAILURES:
            # On a full disk each event would leave another empty file.
            with contextlib.suppress(*_FAILURES):
                writer.close()
            files.remove(path)
            raise
        self._num_bytes = 0
        return writer

    def flush(self) -> None:
        """Hands what is written to the file system, if it can."""
        with self._lock:
            if self._writer:
                try:
                    self._writer.flush()
                except _FAILURES:
                    self._abandon()

    def _abandon(self) -> None:
        """Ends the file, if one is open; the next event begins another."""
        if self._writer:
            with contextlib.suppress(*_FAILURES):
                self._writer.close()
            self._writer = None

    def close(self) -> None:
        """Ends the file; an event that is written later begins another."""
        with self._lock:
            self._abandon()
