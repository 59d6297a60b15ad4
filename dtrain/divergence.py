"""When a run has diverged, and what of the data it skips after that.

Judged after every step, inside the graph, on numbers that come out of an
all-reduce: every worker sees the same and decides alike. The rule:

- not finite: the loss or the gradient of a network. A step that a loss scale
  skips is not judged, until the scale is down to 1.
- a spike: the loss of a network is, in magnitude, over `spike_factor` and over
  `spike_factor` times its moving average (half-life 100 steps). The first 100
  steps are not judged.
- a collapse: the gradient of a network has a norm below 1e-7 for
  `collapse_steps` steps in a row: it learns nothing any more, such as a
  discriminator whose hinge loss is zero everywhere.

The run then goes back to the last good checkpoint and skips the steps' data
up to the one that failed: images, latents and all else that is drawn for step
s of the run are those of s + skipped_steps.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from dtrain.config import Config

FINE = 0
NOT_FINITE = 1
SPIKE = 2
COLLAPSE = 3

_HALF_LIFE_STEPS = 100
_RATE = 1.0 - 0.5 ** (1.0 / _HALF_LIFE_STEPS)
_NO_GRADIENT = 1e-7


def describe(verdict: int, config: Config) -> str:
    """Says in words what was found.

    Args:
        verdict: of `Divergence.judge`, not `FINE`.
        config: the run's settings.
    """
    return {
        NOT_FINITE: "a loss or a gradient is not finite",
        SPIKE: f"a loss is over {config.spike_factor:g} times its average",
        COLLAPSE: "a network had no gradient for "
        f"{config.collapse_steps:,} steps",
    }[verdict]


class Divergence:
    """Judges each step; part of the state, to be made in a strategy's scope.

    Attributes:
        skipped_steps: int64 variable, steps whose data the run has left out.
        rollbacks: int64 variable, how often it went back.
        checkpoint: a `tf.train.Checkpoint` of all of it.
    """

    def __init__(self, config: Config, num_networks: int = 2) -> None:
        """Makes the variables.

        Args:
            config: `spike_factor` and `collapse_steps` count.
            num_networks: how many are judged.
        """
        self._config = config
        self.skipped_steps = _variable("skipped_steps", tf.zeros([], tf.int64))
        self.rollbacks = _variable("rollbacks", tf.zeros([], tf.int64))
        self._average_losses = _variable(
            "average_losses", tf.zeros([num_networks])
        )
        self._idle_steps = _variable(
            "idle_steps", tf.zeros([num_networks], tf.int64)
        )
        self.checkpoint = tf.train.Checkpoint(
            skipped_steps=self.skipped_steps,
            rollbacks=self.rollbacks,
            average_losses=self._average_losses,
            idle_steps=self._idle_steps,
        )

    def judge(
        self,
        step: tf.Tensor,
        finite: tf.Tensor,
        losses: tf.Tensor,
        norms: tf.Tensor,
    ) -> tf.Tensor:
        """Judges a step that was just done, and remembers it.

        Args:
            step: int64 scalar, the steps that were done before it.
            finite: bool scalar, whether all that has to be finite is.
            losses: float32 [networks].
            norms: float32 [networks], of the gradients.

        Returns:
            int32 scalar: `FINE`, `NOT_FINITE`, `SPIKE` or `COLLAPSE`.
        """
        sizes = tf.abs(losses)
        factor = self._config.spike_factor
        limit = factor * tf.maximum(self._average_losses, 1.0)
        is_spike = tf.reduce_any(sizes > limit) & (step >= _HALF_LIFE_STEPS)
        idle = tf.where(
            norms < _NO_GRADIENT,
            self._idle_steps + 1,
            tf.zeros_like(self._idle_steps),
        )
        is_collapse = tf.reduce_any(idle >= max(self._config.collapse_steps, 1))
        rate = tf.maximum(1.0 / (tf.cast(step, tf.float32) + 1.0), _RATE)
        self._average_losses.assign_add(rate * (sizes - self._average_losses))
        self._idle_steps.assign(idle)
        verdict = tf.constant(FINE)
        if self._config.collapse_steps:
            verdict = tf.where(is_collapse, COLLAPSE, verdict)
        if factor:
            verdict = tf.where(is_spike, SPIKE, verdict)
        return tf.where(finite, verdict, NOT_FINITE)

    def skip(self, num_steps: int, rollbacks: int, skipped_steps: int) -> None:
        """Leaves out some data, after a state was restored.

        Every worker calls this.

        Args:
            num_steps: how many steps' more than before.
            rollbacks: how often the run had gone back before.
            skipped_steps: how many it had left out before.
        """
        self.rollbacks.assign(rollbacks + 1)
        self.skipped_steps.assign(skipped_steps + num_steps)


def _variable(name: str, value: Any) -> tf.Variable:
    return tf.Variable(
        value,
        trainable=False,
        name=name,
        # Every replica assigns the same.
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
