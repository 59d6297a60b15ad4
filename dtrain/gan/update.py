"""One phase of a step: it updates its networks, on every replica alike.

The way from the images to the weights is

    a replica's part of the batch -> micro-batches -> gradients, added
    -> one packed all-reduce (the losses ride along) -> optimizers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from dtrain.bundle import trace_names
from dtrain.data import pipeline
from dtrain.gan import draws, objectives, reduction, trial
from dtrain.gan.draws import Given
from dtrain.gan.example import Draw
from dtrain.gan.objectives import Returned
from dtrain.gan.program import Phase
from dtrain.gan.state import GAN
from dtrain.models import batch_norm, spectral_norm


class Moment(NamedTuple):
    """Where a run is, and what it is told, at the begin of phases.

    Attributes:
        data_step: see `GAN`; int64 scalar.
        step: int64 scalar, the steps that are done.
        state: of the program, by name.
        stop: float32 scalar, not zero if this worker is told to end.
    """

    data_step: tf.Tensor
    step: tf.Tensor
    state: Mapping[str, tf.Tensor]
    stop: tf.Tensor


class Outcome(NamedTuple):
    """The result of an update, equal on all replicas.

    Attributes:
        metrics: float32 scalars by name.
        further: float32 means over the batch by name, for the state.
        losses: float32 scalars of the batch, by network.
        norms: float32 scalars of the gradients, by network. Both are zero
            where a loss scale has skipped the update and can still fall.
        applies: bool scalars by optimizer, whether the gradients were finite
            and so were applied; only of those with a loss scale.
        stop: float32 scalar, not zero if a worker is told to end.
    """

    metrics: dict[str, tf.Tensor]
    further: dict[str, tf.Tensor]
    losses: dict[str, tf.Tensor]
    norms: dict[str, tf.Tensor]
    applies: dict[str, tf.Tensor]
    stop: tf.Tensor


class _Part(NamedTuple):
    """What was computed on a part of the batch; all parts are summed.

    Attributes:
        gradients: of the trainable variables, by network.
        losses: float32 scalars by network.
        metrics: float32 scalars by name.
        further: float32 by name.
        statistics: float32 [2, channels], the mean and variance that each
            pass through a BatchNorm saw; empty but in ordered mode. A name is
            "<number of the pass>:<number of the layer>", so that names sort
            in the order of the passes.
        stop: see `Outcome`; one number beside the others.
    """

    gradients: dict[str, list[tf.Tensor]]
    losses: dict[str, tf.Tensor]
    metrics: dict[str, tf.Tensor]
    further: dict[str, tf.Tensor]
    statistics: dict[str, tf.Tensor]
    stop: tf.Tensor


class Update:
    """Trains networks by the objective of one phase."""

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
            gan: whose networks are trained.
            phase: which of its networks, and by which objective.
            number: place of the phase in the step.
            micro_batches: of each replica.
            jit_compile: whether XLA compiles the gradients.
        """
        self.phase = phase
        self._gan = gan
        self._number = number
        self._micro_batches = micro_batches
        self._ordered = gan.config.reduction == "ordered"
        self._variables = {
            name: gan.program.networks[name].trainable_variables
            for name in phase.names
        }
        # The names of its networks, by that of their optimizer.
        self._optimized = {
            first: trained
            for first, names in gan.program.optimized.items()
            if (trained := [name for name in names if name in phase.names])
        }
        networks = gan.program.networks
        self._norms = _layers(batch_norm.BatchNorm, networks.values())
        self._spectral = _layers(
            spectral_norm.SpectralNorm,
            [networks[name] for name in phase.names],
        )
        self._part_of_batch: Any = self._add_micro_batches
        self._part_of_micro_batch: Any = self._differentiate
        # How XLA fuses, and so rounds, follows from what it compiles at once:
        # in ordered mode a micro-batch, which is the same on any replicas.
        self._plan = _planned(gan, number) if jit_compile else []
        if jit_compile and self._ordered:
            self._part_of_micro_batch = _compiled(gan, self._differentiate)
        elif jit_compile:
            self._part_of_batch = _compiled(gan, self._add_micro_batches)

    def run(self, batch: pipeline.Batch, moment: Moment) -> Outcome:
        """Updates the networks, in replica context.

        Args:
            batch: this replica's real images.
            moment: read on this replica.
        """
        gan = self._gan
        given = draws.given_at(
            gan.config,
            moment.data_step,
            self._number,
            batch,
            gan.strategy.num_replicas_in_sync,
            moment.step,
            moment.state,
        ).with_draws(self._plan)
        scales = {
            name: gan.loss_scales[name].read()
            for name in self._optimized
            if name in gan.loss_scales
        }
        part = self._part_of_batch(given, scales)._replace(stop=moment.stop)
        sums = reduction.over_replicas(
            tf.nest.flatten(part), ordered=self._ordered
        )
        part = tf.nest.pack_sequence_as(part, sums)
        self._move_statistics(part.statistics)
        # By the kernels that the gradients are of.
        for layer in self._spectral:
            layer.iterate()
        gradients, applies = self._apply(part.gradients, scales)
        norms = {
            name: tf.linalg.global_norm(values)
            for name, values in gradients.items()
        }
        metrics = dict(part.metrics)
        for name, norm in norms.items():
            metrics[f"{name}_gradient_norm"] = norm
        return Outcome(
            metrics,
            part.further,
            self._judged(part.losses, applies),
            self._judged(norms, applies),
            applies,
            part.stop,
        )

    def _apply(
        self,
        gradients: Mapping[str, list[tf.Tensor]],
        scales: Mapping[str, tf.Tensor],
    ) -> tuple[dict[str, list[tf.Tensor]], dict[str, tf.Tensor]]:
        """Applies gradients by each optimizer.

        Returns:
            The gradients without the loss scales; and whether each optimizer
            with one has applied them.
        """
        unscaled, applies = dict(gradients), {}
        for first, names in self._optimized.items():
            optimizer = self._gan.optimizers[first]
            if first in scales:
                for name in names:
                    unscaled[name] = [
                        gradient / scales[first] for gradient in gradients[name]
                    ]
            values = [value for name in names for value in unscaled[name]]
            variables = [
                each for name in names for each in self._variables[name]
            ]
            if first in scales:
                applies[first] = _are_finite(values)
                _apply_if(applies[first], optimizer, values, variables)
            else:
                optimizer.apply(values, variables)
        return unscaled, applies

    def _judged(
        self,
        values: Mapping[str, tf.Tensor],
        applies: Mapping[str, tf.Tensor],
    ) -> dict[str, tf.Tensor]:
        """Puts zeros where a loss scale has skipped the update.

        That is judged only when the scale can fall no further.
        """
        judged = dict(values)
        for first, is_applied in applies.items():
            scale = self._gan.loss_scales[first].read()
            is_forgiven = ~is_applied & (scale > 1.0)
            for name in self._optimized[first]:
                judged[name] = tf.where(is_forgiven, 0.0, values[name])
        return judged

    def _add_micro_batches(
        self, given: Given, scales: dict[str, tf.Tensor]
    ) -> _Part:
        """Computes gradients and metrics of this replica's part of the batch.

        But BatchNorm's averages and Keras' seeds it changes nothing, for XLA.
        """
        at_once = reduction.parts_at_once(self._gan.config)
        size = given.size // self._micro_batches

        def part_of(number: int, before: _Part | None) -> _Part:
            micro_batch = given.part(number * size, size)
            waits_for = tf.nest.flatten(before.gradients) if before else []
            # Or all of them are in memory at once.
            with tf.control_dependencies(waits_for):
                return self._part_of_micro_batch(micro_batch, scales)

        return reduction.accumulate(
            self._micro_batches, part_of, ordered=self._ordered, at_once=at_once
        )

    def _differentiate(
        self, given: Given, scales: dict[str, tf.Tensor]
    ) -> _Part:
        """Computes gradients and metrics of one micro-batch."""
        gan, batch_size = self._gan, self._gan.config.batch_size
        variables = {
            name: [variable.value for variable in each]
            for name, each in self._variables.items()
        }
        with (
            tf.GradientTape(
                persistent=len(variables) > 1, watch_accessed_variables=False
            ) as tape,
            batch_norm.ghost_batch(self._ordered) as passes,
        ):
            tape.watch(variables)
            example = objectives.prepared(gan.program, given)
            returned = objectives.call(
                self.phase, self._number, gan.networks, example
            )
            targets = self._targets(returned, scales)
        gradients = _gradients(tape, targets, variables)
        objectives.check_gradients(self.phase, self._number, gradients)
        gradients = {
            name: self._connected(values, variables[name])
            for name, values in gradients.items()
        }
        statistics = {
            f"{number:06}:{self._norms.index(layer)}": values
            for number, (layer, values) in enumerate(passes)
        }
        losses, metrics, further = (
            {
                name: tf.reduce_sum(tf.cast(value, tf.float32), 0) / batch_size
                for name, value in values.items()
            }
            for values in returned
        )
        stop = tf.constant(0.0)
        return _Part(gradients, losses, metrics, further, statistics, stop)

    def _targets(
        self, returned: Returned, scales: Mapping[str, tf.Tensor]
    ) -> list[tuple[tf.Tensor, list[str]]]:
        """Computes what is differentiated, by which networks.

        Those of one loss, and of one loss scale, are differentiated at once.
        """
        targets: dict[tuple[int, str], tuple[tf.Tensor, list[str]]] = {}
        for first, names in self._optimized.items():
            for name in names:
                losses = returned.losses[name]
                key = id(losses), first if scales else ""
                if key not in targets:
                    target = tf.reduce_sum(losses) / self._gan.config.batch_size
                    if first in scales:
                        target *= scales[first]
                    targets[key] = target, []
                targets[key][1].append(name)
        return list(targets.values())

    def _connected(
        self, gradients: list[Any], variables: list[tf.Variable]
    ) -> list[tf.Tensor]:
        """Puts zeros for what a loss does not depend on."""
        connected = [
            # The gradient of an Embedding is sparse.
            tf.convert_to_tensor(
                tf.zeros_like(variable) if gradient is None else gradient
            )
            for gradient, variable in zip(gradients, variables, strict=True)
        ]
        if self._ordered:
            # Or a replica's sum would be rounded before it is added.
            connected = [tf.cast(value, tf.float32) for value in connected]
        return connected

    def _move_statistics(self, statistics: dict[str, tf.Tensor]) -> None:
        """Moves BatchNorm's averages by the mean over the micro-batches."""
        for name, total in sorted(statistics.items()):
            layer = self._norms[int(name.partition(":")[2])]
            layer.move(*tf.unstack(total / self._gan.config.micro_batches))


def _layers(kind: type, networks: Iterable[keras.Model]) -> list[Any]:
    return [
        layer
        for network in networks
        for layer in network._flatten_layers()
        if isinstance(layer, kind)
    ]


def _planned(gan: GAN, number: int) -> list[Draw]:
    """Finds out what a phase draws: not by XLA, which draws other numbers."""
    config, program = gan.config, gan.program
    given = trial.specs(config, program, gan.image_shape, gan.inputs, 2)
    with gan.strategy.scope():
        return trial.plan(f"model ({config.model})", program, number, given)


def _gradients(
    tape: tf.GradientTape,
    targets: list[tuple[tf.Tensor, list[str]]],
    variables: dict[str, list[tf.Variable]],
) -> dict[str, list[Any]]:
    """Differentiates the losses, each by its own networks; None is nothing."""
    gradients: dict[str, list[Any]] = {}
    for target, names in targets:
        of_target = {name: variables[name] for name in names}
        gradients |= tape.gradient(target, of_target)
    # In this order, whatever optimizers and losses they share.
    return {name: gradients[name] for name in variables}


def _apply_if(
    finite: tf.Tensor,
    optimizer: Any,
    gradients: list[tf.Tensor],
    variables: list[Any],
) -> None:
    """Applies gradients, and undoes that where they are not finite.

    A `tf.cond` around `apply` cannot be traced under a strategy, since
    `apply` meets the other replicas in a merge_call.
    """
    changed = [
        variable.value for variable in [*variables, *optimizer.variables]
    ]
    # Copies: a read alone may share the buffer that `apply` updates.
    before = [tf.identity(variable.read_value()) for variable in changed]
    with tf.control_dependencies(before):
        optimizer.apply(gradients, variables)

    def select(strategy: tf.distribute.Strategy, finite: Any, old: Any) -> None:
        for variable, value in zip(changed, old, strict=True):
            strategy.extended.update(
                variable, _assign_where, args=(finite, value), group=False
            )

    context = tf.distribute.get_replica_context()
    context.merge_call(select, args=(finite, before))


def _compiled(gan: GAN, function: Any) -> Any:
    def compiled(*arguments: Any) -> Any:
        if gan.config.xla_cache_dir:
            trace_names.begin()
        return function(*arguments)

    return tf.function(compiled, jit_compile=True, autograph=False)


def _are_finite(gradients: list[tf.Tensor]) -> tf.Tensor:
    return tf.reduce_all(
        [tf.reduce_all(tf.math.is_finite(value)) for value in gradients]
    )


def _assign_where(
    variable: tf.Variable, condition: tf.Tensor, otherwise: tf.Tensor
) -> tf.Operation:
    return variable.assign(tf.where(condition, variable, otherwise))
