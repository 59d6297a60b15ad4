"""Optimizers whose learning rates come from the flags, not the checkpoint.

The learning rate is a variable of a Keras optimizer, so a checkpoint would
override a changed flag. Here it is a function of (config, step), and written
into that variable before each step. What is saved stays that of a stock
`keras.optimizers.Adam()`, which can restore it.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from dtrain.config import Config, OptimizerSettings
from dtrain.errors import UserError


def make(
    learning_rate: float, config: OptimizerSettings, name: str
) -> keras.Optimizer:
    """Makes the Adam optimizer of one network, before any schedule.

    Kingma and Ba, 2015, "Adam: A Method for Stochastic Optimization".
    """
    return keras.optimizers.Adam(
        learning_rate, beta_1=config.beta_1, beta_2=config.beta_2, name=name
    )


def schedule(config: Config, step: tf.Tensor) -> tf.Tensor:
    """Computes the factor of both learning rates at a step.

    Rises linearly over the first `warmup_steps`, then stays at 1 or falls
    along half a cosine to 0 at `num_steps` (Loshchilov and Hutter, 2017,
    "SGDR", equation 5, without restarts).

    Args:
        config: the run's settings.
        step: int64 scalar, the steps that are done.

    Returns:
        float32 scalar in [0, 1].
    """
    done = tf.cast(step, tf.float32)
    factor = tf.constant(1.0)
    if config.learning_rate_schedule == "cosine":
        length = float(config.num_steps - config.warmup_steps)
        fraction = tf.clip_by_value(
            (done - config.warmup_steps) / length, 0.0, 1.0
        )
        factor = 0.5 * (1.0 + tf.cos(math.pi * fraction))
    if config.warmup_steps:
        factor *= tf.minimum((done + 1.0) / config.warmup_steps, 1.0)
    return factor


def refuse_conditions(name: str, optimizer: keras.Optimizer) -> None:
    """Refuses options of Keras that assign variables under a condition.

    A replica that meets the others inside of one cannot be traced.

    Args:
        name: of the network that it trains.
        optimizer: that a program has brought.

    Raises:
        UserError: it has such an option.
    """
    remedies = {
        "use_ema": "averaged=... of a dtrain.Program",
        "gradient_accumulation_steps": "--micro_batches",
    }
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise UserError(
            f"the optimizer of {name} scales losses, which "
            "--precision=mixed_float16 does; give the one inside"
        )
    for option, remedy in remedies.items():
        if getattr(optimizer, option, None):
            raise UserError(
                f"the optimizer of {name} has {option}; use {remedy} for that"
            )


def expect_reduced_gradients(optimizer: keras.Optimizer) -> None:
    """Makes `optimizer.apply` take gradients that are already summed.

    Keras reduces each gradient by a collective of its own and has no public
    switch for it, while the GAN reduces all of a network's in one.

    Args:
        optimizer: an optimizer of Keras' TensorFlow backend; changed in place.
    """
    # Without the attribute there is nothing to replace, and each gradient
    # would silently count once for every replica.
    assert hasattr(optimizer, "_all_reduce_sum_gradients")
    optimizer._all_reduce_sum_gradients = lambda grads_and_vars: grads_and_vars


def variable(value: Any, dtype: tf.DType, name: str) -> tf.Variable:
    """Makes a variable that all replicas assign alike, in a strategy's scope.

    Args:
        value: its first one.
        dtype: of it.
        name: of it.
    """
    return tf.Variable(
        value,
        dtype=dtype,
        trainable=False,
        name=name,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


class LossScale:
    """The factor that keeps float16 gradients from vanishing.

    Micikevicius et al., 2018, "Mixed Precision Training", section 3.2, in its
    dynamic form: it is halved after a step whose gradients are not finite, and
    doubled after `GROW_EVERY_STEPS` whose were. It looks at the gradients that
    are summed over the replicas, so all replicas agree; with Keras'
    LossScaleOptimizer they would not.

    Attributes:
        checkpoint: what a checkpoint holds of it.
    """

    GROW_EVERY_STEPS = 2000
    FIRST = 2.0**15
    # Networks without gradients would double it to infinity.
    LARGEST = 2.0**24

    def __init__(self, name: str) -> None:
        """Makes the variables; to be called in the strategy's scope."""
        self._scale = variable(self.FIRST, tf.float32, f"{name}_scale")
        self._good_steps = variable(0, tf.int64, f"{name}_good_steps")
        self.checkpoint = tf.train.Checkpoint(
            scale=self._scale, good_steps=self._good_steps
        )

    def read(self) -> tf.Tensor:
        """Returns the factor, a float32 scalar of at least 1."""
        return self._scale.read_value()

    def update(self, finite: tf.Tensor) -> None:
        """Adapts the factor after a step, in cross-replica context.

        Args:
            finite: bool scalar, whether the step's gradients were.
        """
        good_steps = tf.where(
            finite, self._good_steps + 1, tf.zeros([], tf.int64)
        )
        grow = good_steps >= self.GROW_EVERY_STEPS
        scale = self._scale.read_value()
        scale = tf.where(finite, scale, tf.maximum(scale / 2.0, 1.0))
        larger = tf.minimum(scale * 2.0, self.LARGEST)
        self._scale.assign(tf.where(grow, larger, scale))
        self._good_steps.assign(
            tf.where(grow, tf.zeros_like(good_steps), good_steps)
        )
