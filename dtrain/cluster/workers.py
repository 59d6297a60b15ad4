"""The workers of a run, and the collectives by which they agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dtrain.cluster.environment import Cluster
from dtrain.errors import StorageError, UserError
from dtrain.storage.files import StoreError

# Errors of a collective whose other worker is gone.
_LOST_WORKER = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
)


def is_lost_worker(error: BaseException | None) -> bool:
    """Tells whether an error, or its cause, says that a worker is gone."""
    while error is not None:
        # A store that does not answer causes them by the same kinds.
        if isinstance(error, (UserError, StorageError, StoreError)):
            return False
        if isinstance(error, _LOST_WORKER):
            return True
        error = error.__cause__ or error.__context__
    return False


class Workers(NamedTuple):
    """All workers of a run, as one of them sees them.

    A method that every worker calls is a collective: while one does not call
    it, the others wait. It costs nothing for a worker that is alone.

    Attributes:
        strategy: whose collectives they use.
        cluster: who they are, and which of them this is.
    """

    strategy: tf.distribute.Strategy
    cluster: Cluster

    @property
    def is_chief(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.cluster.is_chief

    @property
    def are_several(self) -> bool:
        """Whether there is another one."""
        return self.cluster.num_workers > 1

    def agree(self, *flags: bool) -> list[bool]:
        """Tells every worker which flags are up on at least one of them.

        Every worker calls this, with as many flags; it is one all-reduce.

        Args:
            *flags: this worker's.

        Returns:
            For each flag, whether it is up on any worker.
        """
        if not self.are_several:
            return list(flags)
        own = tf.constant([int(flag) for flag in flags], tf.int32)
        return [bool(count) for count in self._sum(lambda _: own).numpy()]

    def meet(self) -> None:
        """Waits for all other workers. Every worker calls this."""
        self.agree(True)

    def gather(self, number: int) -> list[int]:
        """Returns the numbers of all workers, on each. Every worker calls this.

        Args:
            number: this worker's, of 63 bits.

        Returns:
            One for each replica, in their order.
        """
        if not self.are_several:
            return [number]
        num_replicas = self.strategy.num_replicas_in_sync

        def of_replica(context: tf.distribute.ValueContext) -> tf.Tensor:
            numbers = np.zeros(num_replicas, np.int64)
            numbers[context.replica_id_in_sync_group] = number
            return tf.constant(numbers)

        # A sum of zeros and one number; `strategy.gather` is traced anew each
        # time, and TensorFlow warns of that.
        return self._sum(of_replica).numpy().tolist()

    def broadcast(self, data: bytes, size: int, source: int) -> bytes:
        """Sends bytes from one worker to all.

        Every worker calls this, with the same `size` and `source`.

        Args:
            data: what is sent; that of the other workers is ignored.
            size: its length in bytes.
            source: a replica of the worker that sends, by its position in
                what `gather` returns.

        Returns:
            The bytes, on every worker.
        """
        # The sum of one worker's words and the zeros of all others: every
        # backend has this collective, and adds this type exactly.
        length = -(-size // 8) * 8
        words = np.frombuffer(data.ljust(length, b"\0")[:length], np.int64)

        def of_replica(context: tf.distribute.ValueContext) -> tf.Tensor:
            is_sender = context.replica_id_in_sync_group == source
            return tf.constant(words if is_sender else np.zeros_like(words))

        return self._sum(of_replica).numpy().tobytes()[:size]

    def concatenate(self, rows: np.ndarray) -> np.ndarray:
        """Puts the rows of all replicas behind each other, in their order.

        Every worker calls this, with as many rows of the same type.

        Args:
            rows: of this worker's replicas, as many of each; not empty, for
                TensorFlow ends the process over a sum of nothing.

        Returns:
            Those of all, on every worker.
        """
        assert rows.size, "there is nothing to send"
        if not self.are_several:
            return rows
        total = self.strategy.num_replicas_in_sync
        own = total // self.cluster.num_workers
        parts = [part.tobytes() for part in np.split(rows, own)]
        size = len(parts[0])
        length = -(-size // 8)

        def of_replica(context: tf.distribute.ValueContext) -> tf.Tensor:
            words = np.zeros([total, length], np.int64)
            number = context.replica_id_in_sync_group
            part = parts[number % own].ljust(length * 8, b"\0")
            words[number] = np.frombuffer(part, np.int64)
            return tf.constant(words)

        words = self._sum(of_replica).numpy()
        data = b"".join(each.tobytes()[:size] for each in words)
        shape = (len(rows) // own * total, *rows.shape[1:])
        return np.frombuffer(data, rows.dtype).reshape(shape)

    def share(self, make: Callable[[], Any]) -> Any:
        """Gives all workers what the chief makes. Every worker calls this.

        Args:
            make: called on the chief; returns what JSON can hold.

        Raises:
            UserError: `make` raised it, on the chief.
            StorageError: likewise.
        """
        data = b""
        made = self.together(lambda: make() if self.is_chief else None)
        if self.is_chief:
            data = json.dumps(made).encode()
        sizes = self.gather(len(data))
        # The first replica is the chief's.
        return json.loads(self.broadcast(data, sizes[0], 0))

    def _sum(
        self, of_replica: Callable[[tf.distribute.ValueContext], tf.Tensor]
    ) -> tf.Tensor:
        values = self.strategy.experimental_distribute_values_from_function(
            of_replica
        )
        return self.strategy.reduce(
            tf.distribute.ReduceOp.SUM, values, axis=None
        )

    def together(self, action: Callable[[], Any]) -> Any:
        """Does something on every worker, and fails on all if it fails on one.

        Otherwise the others would wait, in the next collective, for the one
        that has left. Every worker calls this.

        Args:
            action: what this worker does; it takes part in the same
                collectives on all workers, or in none.

        Returns:
            What `action` returns.

        Raises:
            UserError: the action of any worker raised it.
            StorageError: the same.
        """
        own_error: UserError | StorageError | None = None
        result = None
        try:
            result = action()
        except (UserError, StorageError) as error:
            own_error = error
        mistaken, failed = self.agree(
            isinstance(own_error, UserError),
            isinstance(own_error, StorageError),
        )
        if own_error:
            raise own_error
        if mistaken:
            raise UserError(
                "another worker has a mistake to report; see its line"
            )
        if failed:
            raise StorageError("a disk of another worker failed; see its line")
        return result

    def is_lost(self, error: BaseException) -> bool:
        """Tells whether an error says that another worker of these is gone."""
        return self.are_several and is_lost_worker(error)
