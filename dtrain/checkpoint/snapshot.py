"""The state of a `tf.train.Checkpoint` at one moment, for another thread.

TensorFlow copies the value of a variable when it is assigned to, not when it
is read. So the values that were read stay what they were while training goes
on, and taking them costs microseconds. TensorFlow's own asynchronous option
copies everything first, and raises on the second save of a Keras 3 model (it
makes a variable inside a `tf.function`).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dtrain.bundle import fingerprint, keras_state, objects, writer
from dtrain.bundle.fingerprint import Fingerprint

_SAVE_COUNTER = f"save_counter{fingerprint.VALUE}"


class Snapshot(NamedTuple):
    """The state at one moment.

    Attributes:
        keys: names of the tensors in a checkpoint.
        tensors: their values, on the devices of their variables.
        graph: TensorFlow's serialized TrackableObjectGraph.
        step: the steps that were done.
        not_finite: keys of the tensors that may hold infinities, because
            they did to begin with, such as the mask of a layer, or because
            they are of no variable, as those of a table.
    """

    keys: tuple[str, ...]
    tensors: list[tf.Tensor]
    graph: bytes
    step: int
    not_finite: frozenset[str] = frozenset()

    def write(self, prefix: str) -> dict[str, Fingerprint]:
        """Writes `<prefix>.index` and its data, as TensorFlow does.

        The prefix is a local path. Any thread may call this. Not all of the
        files are synced to the disk.

        Returns:
            The fingerprints of the tensors, as they are in the memory.

        Raises:
            OSError: the state is not finite, and so not worth a checkpoint;
                or the disk is full, or gone.
        """
        bad = set[str]()

        def look(key: str, tensor: tf.Tensor) -> None:
            if key not in self.not_finite and not _is_finite(tensor):
                bad.add(key)

        num_bytes = sum(map(writer.num_bytes_of, self.tensors))
        written = writer.write(prefix, self._on_host(), num_bytes, look)
        if bad:
            name = min(bad).removesuffix(fingerprint.VALUE)
            raise OSError(
                f"{name} holds numbers that are not finite at step {self.step}"
            )
        return written

    def _on_host(self) -> Iterator[tuple[str, tf.Tensor]]:
        """Yields all there is to write.

        Here, and not where the training waits, they leave a GPU.
        """
        for key, tensor in zip(self.keys, self.tensors, strict=True):
            if key == _SAVE_COUNTER:
                yield key, _scalar(self.step, tensor.dtype)
                continue
            with tf.device("CPU:0"):
                on_host = tf.identity(tensor)
            yield key, on_host
        yield fingerprint.GRAPH_KEY, tf.constant(self.graph)


def _scalar(value: int, dtype: tf.DType) -> tf.Tensor:
    # Not of the number itself: TensorFlow keeps each that it has ever made a
    # tensor of, and a run would grow with each save.
    return tf.constant(np.array(value, dtype.as_numpy_dtype))


class SnapshotTaker:
    """Takes snapshots of a checkpoint whose objects stay the same."""

    def __init__(
        self,
        checkpoint: tf.train.Checkpoint,
        before: SnapshotTaker | None = None,
    ) -> None:
        """Finds the variables, which all have to exist by now.

        Args:
            checkpoint: of Keras 3 models and optimizers, `tf.Variable`s, what
                else TensorFlow saves, and other checkpoints, under any
                strategy.
            before: what took snapshots until there were other objects.

        Raises:
            UserError: something in it cannot be read by one worker alone.
        """

        def device(item: tuple[str, Any]) -> str:
            return item[1].device

        self._checkpoint = checkpoint
        state = objects.state_of(checkpoint)
        self._graph = state.graph
        self._others = tuple(state.others)
        # By device, each of which is read by one operation.
        by_device = sorted(state.variables.items(), key=device)
        self._variables = dict(by_device)
        self._reads = [
            objects.Read.of([variable for _, variable in group])
            for _, group in itertools.groupby(by_device, device)
        ]
        self._not_finite = self._not_finite_before(before)

    def _not_finite_before(
        self, before: SnapshotTaker | None
    ) -> frozenset[str]:
        """Returns the keys of the variables that begin with infinities."""
        values = dict(zip(self._variables, self._read(), strict=True))
        now = frozenset(
            key for key, value in values.items() if not _is_finite(value)
        )
        if before is None:
            return now
        # Keys change with the objects; and what is new may be trained by now,
        # so that a NaN is no beginning.
        known = {
            id(variable): key in before._not_finite
            for key, variable in before._variables.items()
        }
        return frozenset(
            key
            for key in now
            if known.get(id(self._variables[key]), not _has_nan(values[key]))
        )

    def _read(self) -> list[tf.Tensor]:
        return [tensor for read in self._reads for tensor in read.run()]

    def take(self, step: int) -> Snapshot:
        """Takes a snapshot, between two steps, on the training thread.

        Args:
            step: the steps that are done. It is saved as TensorFlow's
                `save_counter` too: a count of saves would differ between a
                run that was killed and one that was not.
        """
        others: dict[str, tf.Tensor] = {}
        if self._others:
            others = objects.state_of(self._checkpoint).others
        return Snapshot(
            (*self._variables, *others),
            [*self._read(), *others.values()],
            self._graph,
            step,
            self._not_finite.union(others),
        )


class LiveTaker:
    """Takes snapshots of a checkpoint whose objects may change meanwhile.

    What is attached, replaced or appended is in the next snapshot, as it is in
    what TensorFlow saves.
    """

    def __init__(self, checkpoint: tf.train.Checkpoint) -> None:
        """Adds, as `untracked`, what TensorFlow would not find.

        Raises:
            UserError: a part of the state is not built, or cannot be saved.
        """
        self._checkpoint = checkpoint
        self._taker: SnapshotTaker | None = None
        self._has_saved = False
        self._warned: set[str] = set()
        self.update()

    def update(self) -> SnapshotTaker:
        """Looks for other objects than there were.

        Raises:
            UserError: one of them is not built, or cannot be saved.
        """
        shape = objects.shape_of(self._checkpoint)
        if self._taker is None or not shape.is_of(self._shape):
            keras_state.refuse_unbuilt(self._checkpoint)
            keras_state.include_untracked(self._checkpoint)
            self._taker = SnapshotTaker(self._checkpoint, self._taker)
            self._shape = objects.shape_of(self._checkpoint)
        return self._taker

    def take(self, step: int) -> Snapshot:
        """Takes a snapshot; see `SnapshotTaker.take`.

        Raises:
            UserError: see `update`.
        """
        before = self._taker
        taker = self.update()
        if not self._has_saved or taker is not before:
            self._warn_of_unbuilt()
            self._has_saved = True
        return taker.take(step)

    def _warn_of_unbuilt(self) -> None:
        """Says once of each layer that is not built that nothing is saved."""
        found = keras_state.unbuilt_layers(self._checkpoint)
        new = {
            name: layer
            for name, layer in found.items()
            if name not in self._warned
        }
        if new:
            self._warned |= new.keys()
            warnings.warn(
                f"{keras_state.unbuilt_said(new)}; what is saved before has "
                "nothing of that",
                stacklevel=4,
            )


def _is_finite(tensor: tf.Tensor) -> bool:
    """Tells whether a tensor holds neither an infinity nor a NaN."""
    if not tensor.dtype.is_floating:
        return True
    values = fingerprint.values_of(tensor)
    with np.errstate(over="ignore", invalid="ignore"):
        # One pass and no copy: a sum that is finite has finite parts. Of one
        # that is not they may be, and are looked at.
        total = np.sum(values)
    return bool(np.isfinite(total) or np.isfinite(values).all())


def _has_nan(tensor: tf.Tensor) -> bool:
    return bool(np.isnan(fingerprint.values_of(tensor)).any())
