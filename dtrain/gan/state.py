"""The GAN: the state that training changes, all of it and nothing else.

The networks, their optimizers and moving averages, the state of the program,
the step, and what is remembered of divergences. `gan.step` changes it; a
checkpoint of `GAN.checkpoint` brings it back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from dtrain.bundle import keras_state
from dtrain.config import Config
from dtrain.gan import (
    divergence,
    full_form,
    loading,
    optimizers,
    replicas,
    schedules,
    trial,
)
from dtrain.gan.program import Named, Program


class GAN:
    """The networks, the optimizers, the moving averages and the step.

    Attributes:
        config: the run's settings.
        strategy: the strategy whose replicas train it.
        image_shape: height, width and channels of an image of the data.
        inputs: what else the data has of one example, by name.
        program: what the model is.
        networks: an attribute for each network, by its name.
        averages: the moving averages by the name of their network, as in
            generator; they draw the pictures.
        optimizers: by the name of the first network that each trains.
        loss_scales: likewise; empty unless the precision is mixed_float16.
        state: variables of the program's state, by name.
        step: int64 variable, the number of steps that are done.
        divergence: judges each step, and remembers what it needs for that.
        beta_2: variable of what it is in a step, which no checkpoint holds;
            None unless it changes.
        checkpoint: holds all of the above that changes.
    """

    def __init__(
        self,
        config: Config,
        strategy: tf.distribute.Strategy,
        image_shape: tuple[int, int, int],
        num_classes: int,
        inputs: Mapping[str, tf.TensorSpec] | None = None,
    ) -> None:
        """Seeds Keras, and builds everything. Every worker calls this.

        Args:
            config: the run's settings.
            strategy: the strategy whose replicas train.
            image_shape: height, width and channels of an image.
            num_classes: number of classes; 0 if the images have no labels.
            inputs: what else the data has of one example, by name.

        Raises:
            UserError: the model does not fit the data or the strategy.
        """
        self.config, self.strategy = config, strategy
        self.image_shape, self.inputs = image_shape, dict(inputs or {})
        data = image_shape, num_classes, self.inputs
        make = loading.load(config.model)
        # Here, and no earlier: whatever draws from Python's own generator in
        # between, as TFDS does when it prepares a data set for the first time,
        # would be in the weights, and a later start would have others.
        keras.utils.set_random_seed(config.seed)
        with strategy.scope():
            self.beta_2 = optimizers.moving_beta_2(config)
            self.program = loading.build(make, config, *data)
            self.averages = self._averages_of(
                loading.build(make, config, *data, is_tried=True)
            )
            self.networks = Named(**self.program.networks)
            self.optimizers = self._build_optimizers()
            self.loss_scales = self._make_loss_scales()
            self.state = {
                name: optimizers.variable(value, tf.float32, name)
                for name, value in self.program.state.items()
            }
            self.step = optimizers.variable(0, tf.int64, "step")
            num_trained = len(self.program.trained)
            self.divergence = divergence.Divergence(config, num_trained)
        networks = self.program.networks.values()
        if config.reduction == "ordered":
            replicas.refuse_own_state(networks)
        replicas.refuse_unsynchronized(networks, strategy)
        self.checkpoint = self._make_checkpoint()

    def _averages_of(self, copy: Program) -> dict[str, keras.Model]:
        """Makes networks of a second program averages of those of the first."""
        loading.check_second(self.config, self.program, copy)
        names = self.program.averaged or ()
        averages = {name: copy.networks[name] for name in names}
        for average, weight in self._pairs(averages):
            average.assign(weight)
        return averages

    def _pairs(
        self, averages: Mapping[str, keras.Model]
    ) -> Iterator[tuple[Any, Any]]:
        """Pairs each weight of moving averages with its network's."""
        for name, average in averages.items():
            weights = self.program.networks[name].weights
            yield from zip(average.weights, weights, strict=True)

    def _build_optimizers(self) -> dict[str, keras.Optimizer]:
        config, built = self.config, {}
        networks = self.program.networks
        for first, names in self.program.optimized.items():
            optimizer = self.program.optimizers.get(first)
            if optimizer is None:
                learning_rate = getattr(
                    config, full_form.learning_rate_flag(first)
                )
                optimizer = optimizers.make(
                    learning_rate, config, f"{first}_optimizer", self.beta_2
                )
            optimizers.refuse_conditions(first, optimizer)
            # Built before any restore and any trace: a slot made later would
            # start from zero, or fail inside tf.function.
            optimizer.build(
                [
                    variable
                    for name in names
                    for variable in networks[name].trainable_variables
                ]
            )
            optimizers.expect_reduced_gradients(optimizer)
            built[first] = optimizer
        return built

    def _make_loss_scales(self) -> dict[str, optimizers.LossScale]:
        """Makes them where gradients would vanish without."""
        is_scaled = self.config.precision == "mixed_float16"
        names = self.optimizers if is_scaled else ()
        return {name: optimizers.LossScale(name) for name in names}

    def _make_checkpoint(self) -> tf.train.Checkpoint:
        parts: dict[str, Any] = {"step": self.step, **self.program.networks}
        for name, optimizer in self.optimizers.items():
            parts[f"{name}_optimizer"] = optimizer
        for name, average in self.averages.items():
            parts[f"ema_{name}"] = average
        parts["divergence"] = self.divergence.state
        if self.state:
            parts["state"] = tf.train.Checkpoint(**self.state)
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
            *self.program.networks.values(),
            *self.averages.values(),
            *self.optimizers.values(),
        ]
        return [variable for owner in owners for variable in owner.variables]

    def state_values(self) -> dict[str, tf.Tensor]:
        """Reads the state of the program, by name, where this is called."""
        return {name: each.read_value() for name, each in self.state.items()}

    @functools.cached_property
    def draws_from_data(self) -> bool:
        """Whether pictures are made of the data's images, not of latents."""
        config, program = self.config, self.program
        if program.draw is None:
            return False
        given = trial.specs(config, program, self.image_shape, self.inputs, 2)
        with self.strategy.scope():
            graph = trial.trace_draw(config.model, program, config, given)
        return trial.uses_data(graph, given)

    @property
    def data_step(self) -> tf.Tensor:
        """The step whose data comes next, int64 scalar.

        That is the number of steps that are done, plus the number of those
        whose data was skipped after a divergence.
        """
        return self.step + self.divergence.skipped_steps

    def follow_schedules(self) -> None:
        """Writes what the optimizers are told in this step into them."""
        config = self.config
        if self.beta_2 is not None:
            self.beta_2.assign(schedules.beta_2(config, self.step))
        factor = schedules.learning_rate_factor(config, self.step)
        cut = config.rollback_learning_rate_factor
        if cut != 1.0:
            rollbacks = tf.cast(self.divergence.rollbacks, tf.float32)
            factor *= tf.pow(cut, rollbacks)
        for name, optimizer in self.optimizers.items():
            # An optimizer that the user made keeps the user's learning rate.
            if name not in self.program.optimizers:
                flag = full_form.learning_rate_flag(name)
                optimizer.learning_rate.assign(getattr(config, flag) * factor)

    def update_average(self) -> None:
        """Moves the averages towards their networks, on each device.

        Karras et al., 2018, "Progressive Growing of GANs", section 6.1.
        State that is not trained, such as BatchNorm's averages, is copied.
        """
        config = self.config
        half_life = schedules.half_life_images(config, self.step)
        decay = 0.5 ** (config.batch_size / half_life)
        for average, weight in self._pairs(self.averages):
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
    # A variable is read each time that it is named.
    weight = tf.convert_to_tensor(weight)
    return average.assign(weight + (average - weight) * decay)


def _copy(average: tf.Variable, weight: tf.Tensor) -> tf.Operation:
    return average.assign(weight)
