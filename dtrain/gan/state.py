"""The GAN: the state that training changes, all of it and nothing else.

Two networks, two optimizers, the moving average of the generator, the step,
and what is remembered of divergences. `gan.step` changes it; a checkpoint of
`GAN.checkpoint` brings it back.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from dtrain.bundle import objects
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
        step: int64 variable, the steps that are done.
        divergence: judges each step.
        checkpoint: a `tf.train.Checkpoint` of all of it.
    """

    def __init__(
        self,
        config: Config,
        strategy: tf.distribute.Strategy,
        image_shape: tuple[int, int, int],
        num_classes: int,
    ) -> None:
        """Builds everything in the strategy's scope. Every worker calls this.

        Seeds Keras: the weights follow from the settings alone.

        Args:
            config: the run's settings.
            strategy: the strategy whose replicas train.
            image_shape: height, width and channels of an image.
            num_classes: number of classes; 0 if the images have no labels.

        Raises:
            UserError: the model does not fit the data or the strategy.
        """
        self.config = config
        self.strategy = strategy
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
            self.ema_generator = copy.generator
            self._copy_generator()
            self.optimizers = self._build_optimizers()
            self.loss_scales = self._build_loss_scales()
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

    def _copy_generator(self) -> None:
        for average, weight in zip(
            self.ema_generator.weights,
            self.networks.generator.weights,
            strict=True,
        ):
            average.assign(weight)

    def _build_optimizers(self) -> dict[str, keras.Optimizer]:
        config, networks = self.config, self.networks
        made = {
            "generator": networks.generator_optimizer
            or optimizers.make(
                config.generator_learning_rate, config, "generator_optimizer"
            ),
            "discriminator": networks.discriminator_optimizer
            or optimizers.make(
                config.discriminator_learning_rate,
                config,
                "discriminator_optimizer",
            ),
        }
        for name, optimizer in made.items():
            # Built before any restore and any trace: a slot made later would
            # start from zero, or fail inside tf.function.
            optimizer.build(getattr(networks, name).trainable_variables)
            optimizers.expect_reduced_gradients(optimizer)
        return made

    def _build_loss_scales(self) -> dict[str, optimizers.LossScale]:
        if self.config.precision != "mixed_float16":
            return {}
        return {name: optimizers.LossScale(name) for name in NETWORKS}

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
        untracked = objects.untracked_variables(parts)
        if untracked:
            parts["untracked"] = tf.train.Checkpoint(**untracked)
        return tf.train.Checkpoint(**parts)

    @property
    def variables(self) -> list[keras.Variable]:
        """What must be equal on all replicas."""
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

        It is the steps that are done, and those whose data was left out.
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
        bases = {
            "generator": config.generator_learning_rate,
            "discriminator": config.discriminator_learning_rate,
        }
        for name, base in bases.items():
            # An optimizer that the user made keeps the user's learning rate.
            if getattr(self.networks, f"{name}_optimizer") is None:
                self.optimizers[name].learning_rate.assign(base * factor)

    def update_average(self) -> None:
        """Moves the EMA generator, on each device by itself.

        Karras et al., 2018, "Progressive Growing of GANs", section 6.1; the
        half-life, and that it is at most a twentieth of the images seen so
        far, are those of NVIDIA's StyleGAN2: an early average would be that of
        the initial weights. State that is not trained, such as BatchNorm's
        averages, is copied.
        """
        config = self.config
        seen = tf.cast((self.step + 1) * config.batch_size, tf.float32)
        half_life = tf.minimum(config.ema_half_life_images, 0.05 * seen)
        decay = 0.5 ** (config.batch_size / half_life)
        pairs = zip(
            self.ema_generator.weights,
            self.networks.generator.weights,
            strict=True,
        )
        for average, weight in pairs:
            self.strategy.extended.update(
                average.value,
                _move_average if weight.trainable else _copy,
                args=(weight.value, decay)
                if weight.trainable
                else (weight.value,),
                group=False,
            )


def _move_average(
    average: tf.Variable, weight: tf.Tensor, decay: tf.Tensor
) -> tf.Operation:
    return average.assign(weight + (average - weight) * decay)


def _copy(average: tf.Variable, weight: tf.Tensor) -> tf.Operation:
    return average.assign(weight)
