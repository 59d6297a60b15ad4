"""One phase of a step: it updates one network, on every replica alike.

The way from the images to the weights is

    a replica's part of the batch -> micro-batches -> gradients, added
    -> one packed all-reduce (the losses ride along) -> optimizer
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from dtrain.data import pipeline
from dtrain.errors import UserError
from dtrain.gan import draws, reduction
from dtrain.gan.phases import Example, Phase
from dtrain.gan.state import GAN
from dtrain.models import batch_norm

# What rides along with the metrics of a phase; no metric is called so.
_LOSS = "(loss)"
_STOP = "(stop)"

# Converts what a user wrote, as `tf.function` would, and nothing of dtrain's.
_autograph = tf.__internal__.autograph


class Outcome(NamedTuple):
    """The result of an update, equal on all replicas.

    Attributes:
        metrics: float32 scalars by name.
        loss: float32 scalar, of the batch.
        norm: float32 scalar, of the gradient. Both are zero where a loss
            scale has skipped the update and can still fall.
        applies: bool scalar, whether the gradients were finite and so were
            applied; None without a loss scale.
        stop: float32 scalar, not zero if a worker is told to end.
    """

    metrics: dict[str, tf.Tensor]
    loss: tf.Tensor
    norm: tf.Tensor
    applies: tf.Tensor | None
    stop: tf.Tensor


class _Part(NamedTuple):
    """What was computed on a part of the batch; all parts are summed.

    Attributes:
        gradients: of the network's trainable variables.
        metrics: float32 scalars by name.
        statistics: float32 [2, channels], the mean and variance that each
            pass through a BatchNorm saw; empty but in ordered mode. A name is
            "<number of the pass>:<number of the layer>", so that names sort
            in the order of the passes.
    """

    gradients: list[tf.Tensor]
    metrics: dict[str, tf.Tensor]
    statistics: dict[str, tf.Tensor]


class Update:
    """Trains one network by the objective of one phase."""

    def __init__(
        self,
        gan: GAN,
        phase: Phase,
        number: int,
        micro_batches: int,
        *,
        jit_compile: bool,
    ) -> None:
        """Marks what XLA is to compile; traces nothing.

        Args:
            gan: whose network is trained.
            phase: which of its networks, and by which objective.
            number: place of the phase in the step.
            micro_batches: of each replica.
            jit_compile: whether XLA compiles the gradients.
        """
        self.network = phase.network
        self._gan = gan
        self._number = number
        self._micro_batches = micro_batches
        self._ordered = gan.config.reduction == "ordered"
        self._objective = phase.objective
        self._optimizer = gan.optimizers[phase.network]
        self._loss_scale = gan.loss_scales.get(phase.network)
        network = getattr(gan.networks, phase.network)
        self._variables = network.trainable_variables
        self._norms = [
            layer
            for network in (gan.networks.generator, gan.networks.discriminator)
            for layer in network._flatten_layers()
            if isinstance(layer, batch_norm.BatchNorm)
        ]
        self._part_of_batch: Any = self._add_micro_batches
        self._part_of_micro_batch: Any = self._differentiate
        # How XLA fuses, and so rounds, follows from what it compiles at once:
        # in ordered mode a micro-batch, which is the same on any replicas.
        if jit_compile and self._ordered:
            self._part_of_micro_batch = _compiled(self._differentiate)
        elif jit_compile:
            self._part_of_batch = _compiled(self._add_micro_batches)

    def run(self, batch: pipeline.Batch, stop: tf.Tensor) -> Outcome:
        """Updates the network, in replica context.

        Args:
            batch: this replica's real images.
            stop: float32 scalar, not zero if this worker is told to end.
        """
        gan, replicas = self._gan, self._gan.strategy.num_replicas_in_sync
        example = draws.example_at(
            gan.config,
            gan.data_step,
            self._number,
            batch,
            replicas,
            gan.step.read_value(),
        )
        scale = self._loss_scale.read() if self._loss_scale else None
        part = self._part_of_batch(example, scale)
        part.metrics[_STOP] = stop
        sums = reduction.over_replicas(
            tf.nest.flatten(part), ordered=self._ordered
        )
        part = tf.nest.pack_sequence_as(part, sums)
        self._move_statistics(part.statistics)
        loss, stop = part.metrics.pop(_LOSS), part.metrics.pop(_STOP)
        gradients, applies = part.gradients, None
        if scale is None:
            self._optimizer.apply(gradients, self._variables)
        else:
            gradients = [gradient / scale for gradient in gradients]
            applies = _are_finite(gradients)
            self._apply_if(applies, gradients)
        norm = tf.linalg.global_norm(gradients)
        metrics = {**part.metrics, f"{self.network}_gradient_norm": norm}
        if applies is not None and self._loss_scale:
            # Skipped: judged only when the scale can fall no further.
            forgiven = ~applies & (self._loss_scale.read() > 1.0)
            loss = tf.where(forgiven, 0.0, loss)
            norm = tf.where(forgiven, 0.0, norm)
        return Outcome(metrics, loss, norm, applies, stop)

    def _add_micro_batches(
        self, example: Example, scale: tf.Tensor | None
    ) -> _Part:
        """Computes gradients and metrics of this replica's part of the batch.

        It changes nothing but BatchNorm's averages and Keras' seeds, so that
        XLA may compile it.
        """
        size = example.latents.shape[0] // self._micro_batches

        def part_of(number: int, newest: _Part | None) -> _Part:
            cut = slice(number * size, (number + 1) * size)
            parts = (value[cut] for value in example[:-1])
            micro_batch = Example(*parts, step=example.step)
            # One after the other, or all of them are in memory at once.
            with tf.control_dependencies(newest.gradients if newest else []):
                return self._part_of_micro_batch(micro_batch, scale)

        return reduction.accumulate(
            self._micro_batches, part_of, ordered=self._ordered
        )

    def _differentiate(
        self, example: Example, scale: tf.Tensor | None
    ) -> _Part:
        """Computes gradients and metrics of one micro-batch."""
        batch_size = self._gan.config.batch_size
        variables = [variable.value for variable in self._variables]
        objective = _autograph.tf_convert(
            self._objective, _autograph.control_status_ctx()
        )
        with (
            tf.GradientTape(watch_accessed_variables=False) as tape,
            batch_norm.ghost_batch(self._ordered) as passes,
        ):
            tape.watch(variables)
            losses, metrics = self._unpack(
                objective(self._gan.networks, example)
            )
            self._check_shapes(example, {_LOSS: losses, **metrics})
            loss = tf.reduce_sum(losses) / batch_size
            target = loss if scale is None else loss * scale
        gradients = self._connected(tape.gradient(target, variables), variables)
        sums = {
            name: tf.reduce_sum(tf.cast(value, tf.float32)) / batch_size
            for name, value in {**metrics, _LOSS: losses}.items()
        }
        statistics = {
            f"{number:06}:{self._norms.index(layer)}": values
            for number, (layer, values) in enumerate(passes)
        }
        # The gradient of an Embedding is sparse.
        gradients = [tf.convert_to_tensor(value) for value in gradients]
        if self._ordered:
            # Or a replica's sum would be rounded before it is added.
            gradients = [tf.cast(value, tf.float32) for value in gradients]
        return _Part(gradients, sums, statistics)

    def _connected(
        self, gradients: list[Any], variables: list[tf.Variable]
    ) -> list[Any]:
        """Puts zeros for what a loss does not depend on.

        Raises:
            UserError: it depends on none of them.
        """
        if all(gradient is None for gradient in gradients):
            raise UserError(
                f"phase {self._number + 1}, of the {self.network}: its loss "
                f"depends on no variable of the {self.network}; leave out "
                "tf.stop_gradient, or name the other network"
            )
        return [
            tf.zeros_like(variable) if gradient is None else gradient
            for gradient, variable in zip(gradients, variables, strict=True)
        ]

    def _unpack(self, returned: Any) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        """Takes the loss and the metrics out of what an objective returned.

        Raises:
            UserError: it has returned something else.
        """
        is_pair = isinstance(returned, tuple) and len(returned) == 2
        if not is_pair or not isinstance(returned[1], dict):
            raise UserError(
                f"phase {self._number + 1}, of the {self.network}: its "
                f"objective returned a {type(returned).__name__}; it must "
                "return the losses and a dict of metrics, which may be empty"
            )
        return returned

    def _check_shapes(
        self, example: Example, values: dict[str, tf.Tensor]
    ) -> None:
        """Checks that there is a loss, and each metric, for each example.

        A mean would be divided once more by the batch; and what is of more
        dimensions, as [b, b] from [b] and [b, 1], counts that many times.

        Raises:
            UserError: a shape is another one.
        """
        size = example.latents.shape[0]
        for name, value in values.items():
            shape = tf.convert_to_tensor(value).shape
            if shape.as_list() != [size]:
                what = "loss" if name == _LOSS else f"metric {name}"
                raise UserError(
                    f"phase {self._number + 1}, of the {self.network}: its "
                    f"{what} has the shape {shape.as_list()} and must have "
                    f"[{size}], a number for each example; take means over the "
                    "other dimensions alone, and none over the examples"
                )

    def _move_statistics(self, statistics: dict[str, tf.Tensor]) -> None:
        """Moves BatchNorm's averages by the mean over the micro-batches."""
        for name, total in sorted(statistics.items()):
            layer = self._norms[int(name.partition(":")[2])]
            layer.move(*tf.unstack(total / self._gan.config.micro_batches))

    def _apply_if(self, finite: tf.Tensor, gradients: list[tf.Tensor]) -> None:
        """Applies gradients, and undoes that where they are not finite.

        A `tf.cond` around `apply` cannot be traced under a strategy, since
        `apply` meets the other replicas in a merge_call.
        """
        optimizer = self._optimizer
        changed = [
            variable.value
            for variable in [*self._variables, *optimizer.variables]
        ]
        # Copies: a read alone may share the buffer that `apply` updates.
        before = [tf.identity(variable.read_value()) for variable in changed]
        with tf.control_dependencies(before):
            optimizer.apply(gradients, self._variables)

        def select(
            strategy: tf.distribute.Strategy, finite: Any, old: Any
        ) -> None:
            for variable, value in zip(changed, old, strict=True):
                strategy.extended.update(
                    variable, _assign_where, args=(finite, value), group=False
                )

        context = tf.distribute.get_replica_context()
        context.merge_call(select, args=(finite, before))


def _compiled(function: Any) -> Any:
    return tf.function(function, jit_compile=True, autograph=False)


def _are_finite(gradients: list[tf.Tensor]) -> tf.Tensor:
    return tf.reduce_all(
        [tf.reduce_all(tf.math.is_finite(value)) for value in gradients]
    )


def _assign_where(
    variable: tf.Variable, condition: tf.Tensor, otherwise: tf.Tensor
) -> tf.Operation:
    return variable.assign(tf.where(condition, variable, otherwise))
