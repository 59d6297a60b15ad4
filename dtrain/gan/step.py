"""The step: what changes the state of a GAN, many at a time on the devices.

A step is a sequence of phases, each of which updates one network: by default
`discriminator_steps` updates of the discriminator, each with fresh images and
latents, then one of the generator. After them the average of the generator
moves, and the step is judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dtrain.cluster import strategy as strategy_lib
from dtrain.config import DeviceSettings
from dtrain.data import pipeline
from dtrain.errors import UserError
from dtrain.gan import divergence, traced
from dtrain.gan import phases as phases_lib
from dtrain.gan.phases import NETWORKS, Networks
from dtrain.gan.state import GAN
from dtrain.gan.update import Update


class _Outcome(NamedTuple):
    """The result of a step, equal on all replicas.

    Attributes:
        metrics: float32 scalars by name.
        losses: float32 [2], for each network the largest magnitude of a loss
            among its phases.
        norms: float32 [2], for each network the largest norm of a gradient.
        is_finite: bool scalar, whether all losses and norms are finite.
        scaled_finite: bool scalars by network, whether its gradients were
            finite; only with loss scales.
        stop: float32 scalar, not zero if a worker is told to end.
    """

    metrics: dict[str, tf.Tensor]
    losses: tf.Tensor
    norms: tf.Tensor
    is_finite: tf.Tensor
    scaled_finite: dict[str, tf.Tensor]
    stop: tf.Tensor


class Step:
    """Runs steps of a GAN on its devices.

    Attributes:
        num_draws: batches of real images that one step takes.
    """

    def __init__(self, gan: GAN) -> None:
        """Arranges the phases; nothing is traced yet. Every worker calls this.

        Raises:
            UserError: the replicas cannot share a batch, or `jit_compile` is
                on and XLA cannot compile these networks.
        """
        config = gan.config
        self._gan = gan
        self.num_draws = config.discriminator_steps
        micro_batches = strategy_lib.check_batch(config, gan.strategy)
        jit_compile = _jit_compile(config, gan.strategy, gan.networks)
        phases = gan.networks.phases or phases_lib.adversarial_phases(config)
        self._updates = [
            Update(gan, phase, number, micro_batches, jit_compile=jit_compile)
            for number, phase in enumerate(phases)
        ]
        self._draw_of_update = _draws(self._updates, self.num_draws)
        with tf.device("CPU:0"):
            # This worker's own, and read in every step.
            self._stop = tf.Variable(0.0, trainable=False, name="stop")
        # Here: a decorated method would let go of `self` where nobody holds it.
        self._run = tf.function(self._loop, autograph=False)

    def run(
        self, iterator: Iterator[pipeline.Batch], num_steps: tf.Tensor
    ) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        """Runs some steps on the devices, as one graph.

        Every worker calls this, with the same `num_steps`, and all return
        after the same step: before `num_steps` if `stop` was called on one of
        them, or if the step has diverged.

        Args:
            iterator: of `pipeline.make_iterator`, at this GAN's step.
            num_steps: int32 scalar, at least 1.

        Returns:
            The metrics by name, float32 [steps] each; and int32 scalar, the
            verdict on the last step, see `divergence`.
        """
        return self._run(iterator, num_steps)

    def _loop(
        self, iterator: Iterator[pipeline.Batch], num_steps: tf.Tensor
    ) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        names: list[str] = []

        def goes_on(
            count: tf.Tensor, rows: Any, verdict: tf.Tensor, stop: tf.Tensor
        ) -> tf.Tensor:
            del rows
            is_fine = tf.equal(verdict, divergence.FINE)
            return (count < num_steps) & is_fine & tf.logical_not(stop)

        def one_step(
            count: tf.Tensor, rows: Any, verdict: tf.Tensor, stop: tf.Tensor
        ) -> tuple[tf.Tensor, Any, tf.Tensor, tf.Tensor]:
            draws = [next(iterator) for _ in range(self.num_draws)]
            with traced.nothing_random():
                metrics, verdict, stop = self._one_step(draws)
            graph = tf.compat.v1.get_default_graph()
            traced.check(graph, self._gan.checkpoint, [self._stop])
            names[:] = metrics
            rows = rows.write(count, tf.stack(list(metrics.values())))
            return count + 1, rows, verdict, stop

        rows = tf.TensorArray(tf.float32, size=0, dynamic_size=True)
        fine, no = tf.constant(divergence.FINE), tf.constant(False)
        _, rows, verdict, _ = tf.while_loop(
            goes_on, one_step, (tf.constant(0), rows, fine, no)
        )
        columns = tf.unstack(rows.stack(), len(names), axis=1)
        return dict(zip(names, columns, strict=True)), verdict

    def stop(self) -> None:
        """Makes `run` return early, on all workers; any thread may call it."""
        self._stop.assign(1.0)

    def _one_step(
        self, draws: list[pipeline.Batch]
    ) -> tuple[dict[str, tf.Tensor], tf.Tensor, tf.Tensor]:
        gan = self._gan
        gan.set_learning_rates()
        result = gan.strategy.run(self._update_networks, args=(draws,))
        # Equal on all replicas: they come out of an all-reduce.
        outcome = tf.nest.map_structure(
            lambda value: gan.strategy.experimental_local_results(value)[0],
            result,
        )
        for name, loss_scale in gan.loss_scales.items():
            loss_scale.update(outcome.scaled_finite[name])
        gan.update_average()
        verdict = gan.divergence.judge(
            gan.step, outcome.is_finite, outcome.losses, outcome.norms
        )
        gan.step.assign_add(1)
        return outcome.metrics, verdict, outcome.stop > 0

    def _update_networks(self, draws: Sequence[pipeline.Batch]) -> _Outcome:
        """Runs the phases on one replica."""
        metrics: dict[str, tf.Tensor] = {}
        scaled_finite = {
            name: tf.constant(True) for name in self._gan.loss_scales
        }
        zero = tf.constant(0.0)
        losses: dict[str, tf.Tensor] = dict.fromkeys(NETWORKS, zero)
        norms: dict[str, tf.Tensor] = dict.fromkeys(NETWORKS, zero)
        is_finite, stop = tf.constant(True), zero
        for update, draw in zip(
            self._updates, self._draw_of_update, strict=True
        ):
            name = update.network
            updated = update.run(draws[draw], self._stop.read_value())
            metrics |= updated.metrics
            stop = updated.stop
            if updated.applies is not None:
                scaled_finite[name] &= updated.applies
            is_finite &= tf.math.is_finite(updated.loss)
            is_finite &= tf.math.is_finite(updated.norm)
            losses[name] = tf.maximum(losses[name], tf.abs(updated.loss))
            norms[name] = tf.maximum(norms[name], updated.norm)
        return _Outcome(
            metrics,
            tf.stack([losses[name] for name in NETWORKS]),
            tf.stack([norms[name] for name in NETWORKS]),
            is_finite,
            scaled_finite,
            stop,
        )


def _draws(updates: Sequence[Update], num_draws: int) -> list[int]:
    """Chooses which of its step's draws of real images each phase is given.

    A discriminator phase takes the next one. A generator phase, whose
    objective may compare with real images, takes the last one again.
    """
    chosen: list[int] = []
    taken = 0
    for update in updates:
        taken += update.network == phases_lib.DISCRIMINATOR
        chosen.append(min(max(taken - 1, 0), num_draws - 1))
    return chosen


def _jit_compile(
    config: DeviceSettings, strategy: tf.distribute.Strategy, networks: Networks
) -> bool:
    """Decides whether XLA compiles the gradients.

    Raises:
        UserError: `jit_compile` is on, and XLA cannot.
    """
    if config.jit_compile == "off":
        return False
    # In ordered mode, what is compiled returns state and assigns none.
    has_state = config.reduction == "fast" and bool(
        networks.generator.non_trainable_variables
        or networks.discriminator.non_trainable_variables
    )
    several = strategy.num_replicas_in_sync > 1
    if config.jit_compile == "auto":
        on_gpu = bool(tf.config.get_visible_devices("GPU"))
        return on_gpu and not (has_state and several)
    if has_state and several:
        raise UserError(
            "jit_compile (on) cannot compile networks with state of their own, "
            "such as BatchNorm, on several replicas; use auto or off"
        )
    return True
