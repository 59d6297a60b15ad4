"""The workers of a run, and what they agree on."""

from __future__ import annotations

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
    """Tells whether an error, or what caused it, is that of a lost worker."""
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

    What is said here to be called by every worker is a collective: one that
    does not call it leaves the others waiting. A worker that is alone waits for
    nobody and pays nothing.

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
            For each flag, whether any worker's is up.
        """
        if not self.are_several:
            return list(flags)
        mine = tf.constant([int(flag) for flag in flags], tf.int32)
        return [bool(count) for count in self._sum(lambda _: mine).numpy()]

    def meet(self) -> None:
        """Waits for all other workers. Every worker calls this."""
        self.agree(True)

    def gather(self, number: int) -> list[int]:
        """Tells every worker a number of each worker.

        Every worker calls this.

        Args:
            number: this worker's, of 63 bits.

        Returns:
            The numbers, in the order of the replicas.
        """
        if not self.are_several:
            return [number]
        mine = tf.constant([number], tf.int64)
        strategy = self.strategy
        values = strategy.experimental_distribute_values_from_function(
            lambda _: mine
        )
        return strategy.gather(values, axis=0).numpy().tolist()

    def broadcast(self, data: bytes, size: int, source: int) -> bytes:
        """Sends bytes from one worker to all.

        Every worker calls this, with the same `size` and `source`.

        Args:
            data: what is sent; what the others pass is not looked at.
            size: its length.
            source: a replica of the worker that sends, as numbered by
                `gather`.

        Returns:
            The bytes, on every worker.
        """
        # The sum of one worker's words and the zeros of all others: a
        # collective that every backend has, for a type that each adds exactly.
        length = -(-size // 8) * 8
        words = np.frombuffer(data.ljust(length, b"\0")[:length], np.int64)

        def of_replica(context: tf.distribute.ValueContext) -> tf.Tensor:
            is_sender = context.replica_id_in_sync_group == source
            return tf.constant(words if is_sender else np.zeros_like(words))

        return self._sum(of_replica).numpy().tobytes()[:size]

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

        Without it the others would wait, in the next collective, for the one
        that has left. Every worker calls this.

        Args:
            action: what this worker does; takes part in the same collectives
                on all of them, or in none.

        Returns:
            What `action` returns.

        Raises:
            UserError: this worker's action raised it, or another worker's did.
            StorageError: this worker's action raised it.
        """
        mistake: UserError | StorageError | None = None
        result = None
        try:
            result = action()
        except (UserError, StorageError) as error:
            mistake = error
        mistaken, failed = self.agree(
            isinstance(mistake, UserError), isinstance(mistake, StorageError)
        )
        if mistake:
            raise mistake
        if mistaken:
            raise UserError(
                "another worker has a mistake to report; see its line"
            )
        if failed:
            raise StorageError("a disk of another worker failed; see its line")
        return result

    def is_lost(self, error: BaseException) -> bool:
        """Tells whether an error says that another worker is gone."""
        return self.are_several and is_lost_worker(error)
