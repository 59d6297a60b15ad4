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
        state: float64 [2 + 2 networks]: steps whose data the run has left
            out, how often it went back, and by network, the moving average of
            its loss's magnitude and how many steps it had no gradient for.
            One variable, for whoever reads a checkpoint without dtrain.
    """

    def __init__(self, config: Config, num_networks: int = 2) -> None:
        """Makes the variable.

        Args:
            config: `spike_factor` and `collapse_steps` count.
            num_networks: how many are judged.
        """
        self._config = config
        self.state = tf.Variable(
            tf.zeros([2 + 2 * num_networks], tf.float64),
            trainable=False,
            name="divergence",
            # Every replica assigns the same.
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    @property
    def skipped_steps(self) -> tf.Tensor:
        """Steps whose data the run has left out; int64 scalar."""
        return tf.cast(self.state[0], tf.int64)

    @property
    def rollbacks(self) -> tf.Tensor:
        """How often the run went back; int64 scalar."""
        return tf.cast(self.state[1], tf.int64)

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
        config = self._config
        sizes = tf.cast(tf.abs(losses), tf.float64)
        count = losses.shape[0]
        kept, averages, idle = tf.split(self.state, [2, count, count])
        is_spike = sizes > config.spike_factor * tf.maximum(averages, 1.0)
        idle = tf.where(norms < _NO_GRADIENT, idle + 1.0, tf.zeros_like(idle))
        rate = tf.maximum(1.0 / (tf.cast(step, tf.float64) + 1.0), _RATE)
        averages += rate * (sizes - averages)
        self.state.assign(tf.concat([kept, averages, idle], 0))
        verdict = tf.constant(FINE)
        if config.collapse_steps:
            has_collapsed = tf.reduce_any(idle >= config.collapse_steps)
            verdict = tf.where(has_collapsed, COLLAPSE, verdict)
        if config.spike_factor:
            is_judged = step >= _HALF_LIFE_STEPS
            has_spike = tf.reduce_any(is_spike) & is_judged
            verdict = tf.where(has_spike, SPIKE, verdict)
        return tf.where(finite, verdict, NOT_FINITE)

    def skip(self, num_steps: int, rollbacks: int, skipped_steps: int) -> None:
        """Leaves out some data, after a state was restored.

        Every worker calls this.

        Args:
            num_steps: how many steps' more than before.
            rollbacks: how often the run had gone back before.
            skipped_steps: how many it had left out before.
        """
        counts = [skipped_steps + num_steps, rollbacks + 1]
        counts = tf.constant(counts, tf.float64)
        self.state.assign(tf.concat([counts, self.state[2:]], 0))
