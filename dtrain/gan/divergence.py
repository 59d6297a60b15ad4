"""Judges whether a run has diverged, and counts the data that it then skips.

Each step is judged inside the graph, by numbers that come out of an all-reduce:
every worker sees the same ones and decides alike. A run has diverged by

- not finite: the loss or the gradient of a network. A step that a loss scale
  skips is not judged, until the scale is down to 1.
- a spike: the loss of a network is, in magnitude, over `spike_factor` and over
  `spike_factor` times its moving average (half-life 100 steps). The first 100
  steps are not judged.
- a collapse: the gradient of a network has a norm below 1e-7 for
  `collapse_steps` steps in a row: it learns nothing any more, such as a
  discriminator whose hinge loss is zero everywhere.

The run then goes back to the last good checkpoint, or to an older one where
three starts from that did not help. It skips the data of the steps between the
checkpoint and the divergence: the images, latents and all else that is drawn
for step s of the run are from then on those of step s + skipped_steps.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dtrain.config import DivergenceSettings

FINE = 0
NOT_FINITE = 1
SPIKE = 2
COLLAPSE = 3

_HALF_LIFE_STEPS = 100
_RATE = 1.0 - 0.5 ** (1.0 / _HALF_LIFE_STEPS)
_NO_GRADIENT = 1e-7


class Counts(NamedTuple):
    """How often a run went back, and where.

    Attributes:
        skipped_steps: steps whose data it has left out.
        rollbacks: how often it went back.
        target: the step that it went back to last.
        times: how often in a row it went back to that one.
    """

    skipped_steps: int
    rollbacks: int
    target: int
    times: int


_NUM_COUNTS = len(Counts._fields)
# A state that leads to a divergence so often, whatever the data, is no good.
_MOST_TIMES = 3


def healthy_below(
    verdict: int, step: int, counts: Counts, config: DivergenceSettings
) -> list[int]:
    """Returns the steps below which a state is good, to go back to.

    Args:
        verdict: of `Divergence.judge`, not `FINE`.
        step: the steps that were done.
        counts: what is known of the rollbacks so far.
        config: the run's settings.

    Returns:
        One step, or two: the second counts if there is no state below the
        first.
    """
    # Without a gradient the network was no good for all of that time.
    ill_steps = config.collapse_steps - 1 if verdict == COLLAPSE else 0
    below = step - ill_steps
    limits = [below]
    if counts.times >= _MOST_TIMES and 0 < counts.target < below:
        limits.insert(0, counts.target)
    return limits


def describe(verdict: int, config: DivergenceSettings) -> str:
    """Says in words why a step has diverged."""
    return {
        NOT_FINITE: "a loss or a gradient is not finite",
        SPIKE: f"a loss is over {config.spike_factor:g} times its average",
        COLLAPSE: "a network had no gradient for "
        f"{config.collapse_steps:,} steps",
    }[verdict]


class Divergence:
    """Judges each step; part of the state, to be made in a strategy's scope.

    Attributes:
        state: float64 [4 + 2 networks]: the `Counts`, then for each network
            the moving average of its loss's magnitude, then for each network
            the number of steps that it has had no gradient for. One variable,
            for whoever reads a checkpoint without dtrain.
    """

    def __init__(
        self, config: DivergenceSettings, num_networks: int = 2
    ) -> None:
        """Makes the variable.

        Args:
            config: `spike_factor` and `collapse_steps` count.
            num_networks: how many are judged.
        """
        self._config = config
        self.state = tf.Variable(
            tf.zeros([_NUM_COUNTS + 2 * num_networks], tf.float64),
            trainable=False,
            name="divergence",
            # Every replica assigns the same.
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    @property
    def skipped_steps(self) -> tf.Tensor:
        """Number of steps whose data the run has skipped; int64 scalar."""
        return tf.cast(self.state[0], tf.int64)

    @property
    def rollbacks(self) -> tf.Tensor:
        """How often the run went back; int64 scalar."""
        return tf.cast(self.state[1], tf.int64)

    @property
    def counts(self) -> Counts:
        """What is known of the rollbacks so far."""
        numbers = self.state[:_NUM_COUNTS].numpy().tolist()
        return Counts(*(int(number) for number in numbers))

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
            losses: float32 [networks], their magnitudes.
            norms: float32 [networks], of the gradients.

        Returns:
            int32 scalar: `FINE`, `NOT_FINITE`, `SPIKE` or `COLLAPSE`.
        """
        config = self._config
        sizes = tf.cast(losses, tf.float64)
        count = losses.shape[0]
        kept, averages, idle = tf.split(self.state, [_NUM_COUNTS, count, count])
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

    def roll_back(self, before: Counts, restored: int, step: int) -> None:
        """Makes the run skip the data between a restored state and `step`.

        Every worker calls this.

        Args:
            before: the `counts` before the state was restored.
            restored: step of the state.
            step: at which the run diverged.
        """
        again = restored == before.target and before.rollbacks > 0
        after = Counts(
            skipped_steps=before.skipped_steps + step - restored,
            rollbacks=before.rollbacks + 1,
            target=restored,
            times=before.times + 1 if again else 1,
        )
        counts = tf.constant(after, tf.float64)
        self.state.assign(tf.concat([counts, self.state[_NUM_COUNTS:]], 0))
