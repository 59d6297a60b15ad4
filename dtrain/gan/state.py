"""The GAN: the state that training changes, all of it and nothing else.

Two networks, two optimizers, the moving average of the generator, the step,
and what is remembered of divergences. `gan.step` changes it; a checkpoint of
`GAN.checkpoint` brings it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from dtrain.bundle import keras_state
from dtrain.config import Config
from dtrain.gan import divergence, loading, optimizers, replicas
from dtrain.gan.phases import NETWORKS


class GAN:
    """Both networks, both optimizers, the EMA generator and the step.

    Attributes:
        config: the run's settings.
        strategy: the strategy whose replicas train it.
        networks: generator and discriminator.
        ema_generator: the moving average of the generator; draws the samples.
        optimizers: by the name of the network that each trains.
        loss_scales: likewise; empty unless the precision is mixed_float16.
        step: int64 variable, the number of steps that are done.
        divergence: judges each step, and remembers what it needs for that.
        checkpoint: holds all of the above that changes.
    """

    def __init__(
        self,
        config: Config,
        strategy: tf.distribute.Strategy,
        image_shape: tuple[int, int, int],
        num_classes: int,
    ) -> None:
        """Seeds Keras, and builds everything. Every worker calls this.

        Args:
            config: the run's settings.
            strategy: the strategy whose replicas train.
            image_shape: height, width and channels of an image.
            num_classes: number of classes; 0 if the images have no labels.

        Raises:
            UserError: the model does not fit the data or the strategy.
        """
        self.config, self.strategy = config, strategy
        make = loading.load(config.model)
        # Here, and no earlier: whatever draws from Python's own generator in
        # between, as TFDS does when it prepares a data set for the first time,
        # would be in the weights, and a later start would have others.
        keras.utils.set_random_seed(config.seed)
        with strategy.scope():
            self.networks = loading.build(
                make, config, image_shape, num_classes
            )
            copy = loading.build(make, config, image_shape, num_classes)
            loading.check_second(config, self.networks, copy)
            self.ema_generator = copy.generator
            for average, weight in self._pairs_to_average():
                average.assign(weight)
            self.optimizers = self._build_optimizers()
            scaled = NETWORKS if config.precision == "mixed_float16" else ()
            self.loss_scales = {
                name: optimizers.LossScale(name) for name in scaled
            }
            self.step = tf.Variable(
                0,
                dtype=tf.int64,
                trainable=False,
                name="step",
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )
            self.divergence = divergence.Divergence(config)
        if config.reduction == "ordered":
            replicas.refuse_own_state(self.networks)
        replicas.refuse_unsynchronized(self.networks, strategy)
        self.checkpoint = self._make_checkpoint()

    def _pairs_to_average(self) -> Iterator[tuple[Any, Any]]:
        """Pairs each weight of the EMA generator with the generator's."""
        return zip(
            self.ema_generator.weights,
            self.networks.generator.weights,
            strict=True,
        )

    def _build_optimizers(self) -> dict[str, keras.Optimizer]:
        config, built = self.config, {}
        for name in NETWORKS:
            optimizer = getattr(self.networks, f"{name}_optimizer")
            if optimizer is None:
                learning_rate = getattr(config, f"{name}_learning_rate")
                optimizer = optimizers.make(
                    learning_rate, config, f"{name}_optimizer"
                )
            # Built before any restore and any trace: a slot made later would
            # start from zero, or fail inside tf.function.
            optimizer.build(getattr(self.networks, name).trainable_variables)
            optimizers.expect_reduced_gradients(optimizer)
            built[name] = optimizer
        return built

    def _make_checkpoint(self) -> tf.train.Checkpoint:
        parts: dict[str, Any] = {
            "step": self.step,
            "generator": self.networks.generator,
            "discriminator": self.networks.discriminator,
            "generator_optimizer": self.optimizers["generator"],
            "discriminator_optimizer": self.optimizers["discriminator"],
            "ema_generator": self.ema_generator,
            "divergence": self.divergence.state,
        }
        for name, loss_scale in self.loss_scales.items():
            parts[f"{name}_loss_scale"] = loss_scale.checkpoint
        untracked = keras_state.untracked(parts)
        if untracked:
            parts["untracked"] = tf.train.Checkpoint(**untracked)
        return tf.train.Checkpoint(**parts)

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables that must be equal, to the bit, on all replicas."""
        owners = [
            self.networks.generator,
            self.networks.discriminator,
            self.ema_generator,
            *self.optimizers.values(),
        ]
        return [variable for owner in owners for variable in owner.variables]

    @property
    def data_step(self) -> tf.Tensor:
        """The step whose data comes next, int64 scalar.

        That is the number of steps that are done, plus the number of those
        whose data was skipped after a divergence.
        """
        return self.step + self.divergence.skipped_steps

    def set_learning_rates(self) -> None:
        """Writes the learning rates of this step into the optimizers."""
        config = self.config
        factor = optimizers.schedule(config, self.step)
        cut = config.rollback_learning_rate_factor
        if cut != 1.0:
            rollbacks = tf.cast(self.divergence.rollbacks, tf.float32)
            factor *= tf.pow(cut, rollbacks)
        for name in NETWORKS:
            # An optimizer that the user made keeps the user's learning rate.
            if getattr(self.networks, f"{name}_optimizer") is None:
                learning_rate = getattr(config, f"{name}_learning_rate")
                self.optimizers[name].learning_rate.assign(
                    learning_rate * factor
                )

    def update_average(self) -> None:
        """Moves the EMA generator towards the generator, on each device.

        Karras et al., 2018, "Progressive Growing of GANs", section 6.1. As in
        NVIDIA's StyleGAN2, the half-life is at most a twentieth of the images
        so far, or an early average would be that of the initial weights.
        State that is not trained, such as BatchNorm's averages, is copied.
        """
        config = self.config
        seen = tf.cast((self.step + 1) * config.batch_size, tf.float32)
        half_life = tf.minimum(config.ema_half_life_images, 0.05 * seen)
        decay = 0.5 ** (config.batch_size / half_life)
        for average, weight in self._pairs_to_average():
            values = (weight.value, decay)
            self.strategy.extended.update(
                average.value,
                _move_average if weight.trainable else _copy,
                args=values if weight.trainable else values[:1],
                group=False,
            )


def _move_average(
    average: tf.Variable, weight: tf.Tensor, decay: tf.Tensor
) -> tf.Operation:
    return average.assign(weight + (average - weight) * decay)


def _copy(average: tf.Variable, weight: tf.Tensor) -> tf.Operation:
    return average.assign(weight)
