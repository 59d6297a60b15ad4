"""Optimizers whose learning rates come from the flags, not the checkpoint.

The learning rate is a variable of a Keras optimizer, so a checkpoint would
override a changed flag. Here it is a function of (config, step), and written
into that variable before each step. What is saved stays that of a stock
`keras.optimizers.Adam()`, which can restore it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from dtrain.config import Config, OptimizerSettings
from dtrain.errors import UserError


def make(
    learning_rate: float,
    config: OptimizerSettings,
    name: str,
    beta_2: tf.Variable | None = None,
) -> keras.Optimizer:
    """Makes the Adam optimizer of one network, before any schedule.

    Kingma and Ba, 2015, "Adam: A Method for Stochastic Optimization".

    Args:
        learning_rate: the first one.
        config: beta_1 and beta_2 count.
        name: of the optimizer.
        beta_2: holds that of each step; None leaves it as it is.
    """
    options: dict[str, Any] = {"beta_1": config.beta_1, "name": name}
    if beta_2 is None:
        options["beta_2"] = config.beta_2
        return Adam(learning_rate, **options)
    return _MovingAdam(beta_2.read_value, learning_rate, **options)


def moving_beta_2(config: Config) -> tf.Variable | None:
    """Makes what holds beta_2 in a strategy's scope; None if it stays."""
    if not config.end_beta_2:
        return None
    return variable(config.beta_2, tf.float32, "beta_2")


class Adam(keras.optimizers.Adam):
    """Adam that computes once in a step what is the same for all variables.

    Keras computes it for each variable, by a dozen operations. The bits are the
    same.
    """

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        # In replica context: so each device has its own.
        factors = {
            dtype: self._factor(learning_rate, dtype)
            for dtype in {each.dtype for each in trainable_variables}
        }
        super()._backend_update_step(grads, trainable_variables, factors)

    def _factor(self, learning_rate: tf.Tensor, dtype: str) -> tf.Tensor:
        """Returns alpha_t, of the end of section 2 of the paper."""
        step = tf.cast(self.iterations + 1, dtype)
        beta_1_power = tf.pow(tf.cast(self.beta_1, dtype), step)
        beta_2_power = tf.pow(tf.cast(self.beta_2, dtype), step)
        rate = tf.cast(learning_rate, dtype)
        return rate * tf.sqrt(1 - beta_2_power) / (1 - beta_1_power)

    def update_step(
        self, gradient: Any, variable: Any, factors: Mapping[str, tf.Tensor]
    ) -> None:
        """Moves a variable, on one device."""
        index = self._get_variable_index(variable)
        mean, square = self._momentums[index], self._velocities[index]
        gradient = tf.cast(gradient, variable.dtype)
        self.assign_add(mean, (gradient - mean) * (1 - self.beta_1))
        self.assign_add(
            square, (tf.square(gradient) - square) * (1 - self.beta_2)
        )
        factor = factors[keras.backend.standardize_dtype(variable.dtype)]
        root = tf.sqrt(square) + self.epsilon
        self.assign_sub(variable, mean * factor / root)


class _MovingAdam(Adam):
    """Adam whose beta_2 is that of the step.

    What is saved of it is that of Adam: beta_2 is a function of the step.
    """

    def __init__(
        self, read: Callable[[], tf.Tensor], *arguments: Any, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        # Not the variable, which would be tracked, and saved.
        self._read_beta_2 = read

    @property
    def beta_2(self) -> tf.Tensor:
        """The one of this step, float32 scalar."""
        return self._read_beta_2()

    @beta_2.setter
    def beta_2(self, value: float) -> None:
        """Lets Keras write down the one that it would be."""


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
