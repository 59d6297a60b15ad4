"""The state of a `tf.train.Checkpoint` at one moment, for another thread.

TensorFlow copies the value of a variable when it is assigned to, not when it
is read. So the values that were read stay what they were while training goes
on, and taking them costs microseconds. TensorFlow's own asynchronous option
copies everything first, and raises on the second save of a Keras 3 model (it
makes a variable inside a `tf.function`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dtrain.bundle import fingerprint, objects
from dtrain.storage import files

_SAVE_COUNTER = f"save_counter{fingerprint.VALUE}"


class Snapshot(NamedTuple):
    """The state at one moment.

    Attributes:
        keys: names of the tensors in a checkpoint.
        tensors: their values, on the devices of their variables.
        graph: TensorFlow's serialized TrackableObjectGraph.
        step: the steps that were done.
        not_finite: keys of the tensors that may hold infinities, because
            they did to begin with, such as the mask of a layer.
    """

    keys: tuple[str, ...]
    tensors: list[tf.Tensor]
    graph: bytes
    step: int
    not_finite: frozenset[str] = frozenset()

    def write(self, prefix: str) -> fingerprint.State:
        """Writes `<prefix>.index` and its data, as TensorFlow does.

        The prefix is a local path. Any thread may call this. The files are not
        synced to the disk.

        Returns:
            The fingerprints of the tensors, taken before they are written.

        Raises:
            OSError: the state is not finite, and so not worth a checkpoint;
                or the disk is full, or gone.
        """
        with files.os_errors(), tf.device("CPU:0"):
            # Here, and not where the training waits, they leave a GPU.
            tensors = [
                tf.identity(tensor)
                if key != _SAVE_COUNTER
                else tf.constant(self.step, tensor.dtype)
                for key, tensor in zip(self.keys, self.tensors, strict=True)
            ]
            bad = _not_finite(self.keys, tensors) - self.not_finite
            if bad:
                name = min(bad).removesuffix(fingerprint.VALUE)
                raise OSError(
                    f"{name} holds numbers that are not finite at step "
                    f"{self.step}"
                )
            tensors.append(tf.constant(self.graph))
            keys = [*self.keys, fingerprint.GRAPH_KEY]
            written = fingerprint.State()
            for key, tensor in sorted(
                zip(keys, tensors, strict=True), key=lambda item: item[0]
            ):
                written.add(key, fingerprint.values_of(tensor))
            tf.raw_ops.SaveV2(
                prefix=prefix,
                tensor_names=keys,
                shape_and_slices=[""] * len(keys),
                tensors=tensors,
            )
        return written


class SnapshotTaker:
    """Takes snapshots of a checkpoint."""

    def __init__(self, checkpoint: tf.train.Checkpoint) -> None:
        """Finds the variables, which all have to exist by now.

        Args:
            checkpoint: of Keras 3 models and optimizers, `tf.Variable`s, and
                other checkpoints, under any strategy.

        Raises:
            UserError: something in it cannot be read by one worker alone, or
                is no variable.
        """

        def device(item: tuple[str, Any]) -> str:
            return item[1].device

        variables, self._graph = objects.variables_of(checkpoint)
        # By device, each of which is read by one operation.
        by_device = sorted(variables.items(), key=device)
        self._keys = tuple(key for key, _ in by_device)
        self._reads = [
            objects.Read.of([variable for _, variable in group])
            for _, group in itertools.groupby(by_device, device)
        ]
        self._not_finite: frozenset[str] = frozenset()
        self._not_finite = _not_finite(self._keys, self.take(0).tensors)

    def take(self, step: int) -> Snapshot:
        """Takes a snapshot, between two steps, on the training thread.

        Args:
            step: the steps that are done. It is saved as TensorFlow's
                `save_counter` too: a count of saves would differ between a
                run that was killed and one that was not.
        """
        tensors = [tensor for read in self._reads for tensor in read.run()]
        return Snapshot(
            self._keys, tensors, self._graph, step, self._not_finite
        )


def _not_finite(
    keys: Iterable[str], tensors: Iterable[tf.Tensor]
) -> frozenset[str]:
    """Returns the keys of the tensors that hold an infinity or a NaN."""
    return frozenset(
        key
        for key, tensor in zip(keys, tensors, strict=True)
        # One pass and no copy; a sum that is finite has finite parts.
        if tensor.dtype.is_floating
        and not np.isfinite(
            np.sum(fingerprint.values_of(tensor), dtype=np.float64)
        )
    )
