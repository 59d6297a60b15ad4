"""The GAN: the state that training changes, and the step that changes it.

A step is a sequence of phases, each a network and an objective: by default
`discriminator_steps` updates of the discriminator, each with fresh images and
latents, then one of the generator. A phase, on every replica alike:

    its part of the batch -> micro-batches -> gradients, added
        -> one packed all-reduce (the losses ride along) -> optimizer

Everything random in it is a function of (seed, step, phase, position of the
image in the global batch), so nothing random is ever saved, and the same
global batch is seen by any number of replicas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from dtrain.bundle import objects
from dtrain.cluster import workers
from dtrain.config import Config
from dtrain.data import pipeline
from dtrain.errors import UserError
from dtrain.gan import divergence, loading, optimizers, reduction
from dtrain.gan import phases as phases_lib
from dtrain.models import batch_norm

# What a random draw is for, folded into its seed.
_LATENTS = 0
_UNIFORMS = 1

# What rides along with the metrics of a phase; no metric is called so.
_LOSS = "(loss)"
_STOP = "(stop)"
_NETWORKS = ("generator", "discriminator")


def latents_at(
    config: Config, step: tf.Tensor, phase: int, num_latents: int
) -> tf.Tensor:
    """Draws the latents of one phase's global batch.

    Args:
        config: the run's settings.
        step: int64 scalar, the steps that are done, and those whose data was
            skipped.
        phase: place of the phase in the step.
        num_latents: how many; the first are the same for any number.

    Returns:
        float32 [num_latents, latent_size], standard normal.
    """
    return tf.random.stateless_normal(
        [num_latents, config.latent_size], _seed(config, _LATENTS, step, phase)
    )


def _seed(
    config: Config, purpose: int, step: tf.Tensor, phase: int
) -> tf.Tensor:
    seed = tf.stack([config.seed, purpose])
    seed = tf.random.fold_in(seed, tf.cast(step, tf.int64))
    # As int64, or the whole seed is folded into 32 bits.
    return tf.random.fold_in(seed, tf.constant(phase, tf.int64))


class _Part(NamedTuple):
    """What one phase computed on one replica, to be summed over all.

    Attributes:
        gradients: of the network's trainable variables.
        metrics: float32 scalars by name.
        statistics: float32 [2, channels] each, of the passes through a
            BatchNorm in their order; only in ordered mode.
    """

    gradients: list[tf.Tensor]
    metrics: dict[str, tf.Tensor]
    statistics: list[tf.Tensor]


class _Outcome(NamedTuple):
    """What a step was, equal on all replicas.

    Attributes:
        metrics: float32 scalars by name.
        losses: float32 [2], the largest in magnitude of each network's phases.
        norms: float32 [2], likewise of its gradients. Both are zero where a
            loss scale skips the step.
        is_finite: bool scalar, whether all of these are.
        scaled_finite: bool scalars, by network, for its loss scale.
        stop: float32 scalar, not zero if a worker is told to end.
    """

    metrics: dict[str, tf.Tensor]
    losses: tf.Tensor
    norms: tf.Tensor
    is_finite: tf.Tensor
    scaled_finite: dict[str, tf.Tensor]
    stop: tf.Tensor


class GAN:
    """Both networks, both optimizers, the EMA generator and the step.

    Attributes:
        networks: generator and discriminator.
        ema_generator: the moving average of the generator; draws the samples.
        step: int64 variable, the steps that are done.
        divergence: judges each step.
        checkpoint: a `tf.train.Checkpoint` of all of it.
        metric_names: names of the columns that `train_steps` returns; known
            after its first call.
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
        self._config = config
        self._strategy = strategy
        self._micro_batches = workers.check_batch(config, strategy)
        self.metric_names: tuple[str, ...] = ()
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
            self._optimizers = self._build_optimizers()
            self._loss_scales = self._build_loss_scales()
            self.step = tf.Variable(
                0,
                dtype=tf.int64,
                trainable=False,
                name="step",
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )
            self.divergence = divergence.Divergence(config)
        with tf.device("CPU:0"):
            # This worker's own, and read in every step.
            self._stop = tf.Variable(0.0, trainable=False, name="stop")
        self._ordered = config.reduction == "ordered"
        if self._ordered:
            _refuse_own_state(self.networks)
        _refuse_unsynchronized(self.networks, strategy)
        self._phases = self.networks.phases or phases_lib.adversarial_phases(
            config
        )
        self._draw_of_phase = _draws(self._phases, self.num_draws)
        self._micro_parts, self._phase_parts = self._compile()
        # The BatchNorm layer of each of a phase's `statistics`.
        self._layers: list[list[batch_norm.BatchNorm]]
        self._layers = [[] for _ in self._phases]
        self.checkpoint = self._make_checkpoint()

    def _copy_generator(self) -> None:
        for average, weight in zip(
            self.ema_generator.weights,
            self.networks.generator.weights,
            strict=True,
        ):
            average.assign(weight)

    def _build_optimizers(self) -> dict[str, keras.Optimizer]:
        config, networks = self._config, self.networks
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
        if self._config.precision != "mixed_float16":
            return {}
        return {
            name: optimizers.LossScale(name)
            for name in ("generator", "discriminator")
        }

    def _compile(self) -> tuple[list[Any], list[Any]]:
        """Returns `_micro_part` and `_phase_part` for each phase.

        What XLA compiles at once decides how it fuses, and so how it rounds:
        in ordered mode that is a micro-batch, the same on any replicas.
        """
        num_phases = len(self._phases)
        micro_parts: list[Any] = [self._micro_part] * num_phases
        phase_parts: list[Any] = [self._phase_part] * num_phases
        if _jit_compile(self._config, self._strategy, self.networks):
            parts = micro_parts if self._ordered else phase_parts
            parts[:] = [tf.function(part, jit_compile=True) for part in parts]
        return micro_parts, phase_parts

    def _make_checkpoint(self) -> tf.train.Checkpoint:
        parts: dict[str, Any] = {
            "step": self.step,
            "generator": self.networks.generator,
            "discriminator": self.networks.discriminator,
            "generator_optimizer": self._optimizers["generator"],
            "discriminator_optimizer": self._optimizers["discriminator"],
            "ema_generator": self.ema_generator,
            "divergence": self.divergence.state,
        }
        for name, loss_scale in self._loss_scales.items():
            parts[f"{name}_loss_scale"] = loss_scale.checkpoint
        untracked = objects.untracked_variables(parts)
        if untracked:
            parts["untracked"] = tf.train.Checkpoint(**untracked)
        return tf.train.Checkpoint(**parts)

    @property
    def num_draws(self) -> int:
        """Batches of real images that one step takes."""
        return self._config.discriminator_steps

    @tf.function
    def train_steps(
        self, iterator: Iterator[pipeline.Batch], num_steps: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Runs some steps without a look at the host.

        Every worker calls this, with the same `num_steps`, and all return
        after the same step: earlier than told if one of them was stopped, or
        if the step has diverged.

        Args:
            iterator: of `pipeline.make_iterator`, at this GAN's step.
            num_steps: int64 scalar, at least 1.

        Returns:
            float32 [steps, len(metric_names)], a row for each step; and int32
            scalar, the verdict on the last one, see `divergence`.
        """
        rows = tf.TensorArray(tf.float32, size=0, dynamic_size=True)
        verdict = tf.constant(divergence.FINE)
        for index in tf.range(tf.cast(num_steps, tf.int32)):
            draws = [next(iterator) for _ in range(self.num_draws)]
            row, verdict, stop = self._train_step(draws)
            rows = rows.write(index, row)
            if stop or verdict != divergence.FINE:
                break
        return rows.stack(), verdict

    def stop(self) -> None:
        """Ends `train_steps` after the step that runs; any thread may call it.

        If one worker does, all of them return after the same step.
        """
        self._stop.assign(1.0)

    def _train_step(
        self, draws: list[pipeline.Batch]
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        factor = optimizers.schedule(self._config, self.step)
        self._set_learning_rates(factor)
        result = self._strategy.run(self._replica_step, args=(draws,))
        # Equal on all replicas: they come out of an all-reduce.
        outcome = tf.nest.map_structure(
            lambda value: self._strategy.experimental_local_results(value)[0],
            result,
        )
        for name, loss_scale in self._loss_scales.items():
            loss_scale.update(outcome.scaled_finite[name])
        self._update_average()
        verdict = self.divergence.judge(
            self.step, outcome.is_finite, outcome.losses, outcome.norms
        )
        self.step.assign_add(1)
        self.metric_names = tuple(outcome.metrics)
        row = tf.stack(list(outcome.metrics.values()))
        return row, verdict, outcome.stop > 0

    def _set_learning_rates(self, factor: tf.Tensor) -> None:
        config = self._config
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
                self._optimizers[name].learning_rate.assign(base * factor)

    def _replica_step(self, draws: Sequence[pipeline.Batch]) -> _Outcome:
        metrics: dict[str, tf.Tensor] = {}
        scaled_finite = {name: tf.constant(True) for name in self._loss_scales}
        zero = tf.constant(0.0)
        losses: dict[str, tf.Tensor] = dict.fromkeys(_NETWORKS, zero)
        norms: dict[str, tf.Tensor] = dict.fromkeys(_NETWORKS, zero)
        is_finite, stop = tf.constant(True), zero
        for index, draw in enumerate(self._draw_of_phase):
            name = self._phases[index].network
            part, applies = self._run_phase(index, draws[draw])
            loss, stop = part.metrics.pop(_LOSS), part.metrics.pop(_STOP)
            norm = tf.linalg.global_norm(part.gradients)
            metrics |= {**part.metrics, f"{name}_gradient_norm": norm}
            if applies is not None:
                scaled_finite[name] &= applies
                # Skipped: judged only when the scale can fall no further.
                forgiven = ~applies & (self._loss_scales[name].read() > 1.0)
                loss = tf.where(forgiven, 0.0, loss)
                norm = tf.where(forgiven, 0.0, norm)
            is_finite &= tf.math.is_finite(loss) & tf.math.is_finite(norm)
            losses[name] = tf.maximum(losses[name], tf.abs(loss))
            norms[name] = tf.maximum(norms[name], norm)
        return _Outcome(
            metrics,
            tf.stack([losses[name] for name in _NETWORKS]),
            tf.stack([norms[name] for name in _NETWORKS]),
            is_finite,
            scaled_finite,
            stop,
        )

    def _run_phase(
        self, index: int, batch: pipeline.Batch
    ) -> tuple[_Part, tf.Tensor | None]:
        """Updates one network on one replica.

        Returns:
            The phase's sums over all replicas; and, under a loss scale,
            whether the update was applied.
        """
        name = self._phases[index].network
        variables = getattr(self.networks, name).trainable_variables
        scale = self._loss_scales[name].read() if self._loss_scales else None
        example = self._example(index, batch)
        part = self._phase_parts[index](index, example, scale)
        part.metrics[_STOP] = self._stop.read_value()
        part = self._all_reduce(part)
        self._move_statistics(index, part)
        if scale is None:
            self._optimizers[name].apply(part.gradients, variables)
            return part, None
        gradients = [gradient / scale for gradient in part.gradients]
        finite = tf.reduce_all(
            [tf.reduce_all(tf.math.is_finite(value)) for value in gradients]
        )
        self._apply_if(finite, name, gradients, variables)
        return part._replace(gradients=gradients), finite

    def _example(self, index: int, batch: pipeline.Batch) -> phases_lib.Example:
        """Adds the random numbers of this replica's images to them."""
        config = self._config
        size = config.batch_size // self._strategy.num_replicas_in_sync
        start = tf.cast(batch.positions[0] % config.batch_size, tf.int32)
        step = self.step + self.divergence.skipped_steps
        latents = latents_at(config, step, index, config.batch_size)
        uniforms = tf.random.stateless_uniform(
            [config.batch_size], _seed(config, _UNIFORMS, step, index)
        )
        return phases_lib.Example(
            real_images=batch.images,
            labels=batch.labels,
            latents=tf.slice(latents, [start, 0], [size, config.latent_size]),
            uniforms=tf.slice(uniforms, [start], [size]),
        )

    def _phase_part(
        self, index: int, example: phases_lib.Example, scale: tf.Tensor | None
    ) -> _Part:
        """Computes gradients and metrics of one phase on one replica.

        Pure but for BatchNorm's averages and Keras' seeds: this, and nothing
        around it, is what XLA may compile.
        """
        size = example.latents.shape[0] // self._micro_batches

        def micro_part(number: int, newest: _Part | None) -> _Part:
            cut = slice(number * size, (number + 1) * size)
            micro = phases_lib.Example(*(value[cut] for value in example))
            # One after the other, or all of them are in memory at once.
            with tf.control_dependencies(newest.gradients if newest else []):
                return self._micro_parts[index](index, micro, scale)

        return reduction.accumulate(
            self._micro_batches, micro_part, ordered=self._ordered
        )

    def _micro_part(
        self, index: int, example: phases_lib.Example, scale: tf.Tensor | None
    ) -> _Part:
        phase = self._phases[index]
        variables = [
            variable.value
            for variable in getattr(
                self.networks, phase.network
            ).trainable_variables
        ]
        with (
            tf.GradientTape(watch_accessed_variables=False) as tape,
            batch_norm.ghost_batch(self._ordered) as passes,
        ):
            tape.watch(variables)
            losses, metrics = phase.objective(self.networks, example)
            loss = tf.reduce_sum(losses) / self._config.batch_size
            target = loss if scale is None else loss * scale
        gradients = tape.gradient(
            target,
            variables,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        sums = {
            name: tf.reduce_sum(tf.cast(value, tf.float32))
            / self._config.batch_size
            for name, value in {**metrics, _LOSS: losses}.items()
        }
        # Known when this is traced, and the same in every trace.
        self._layers[index] = [layer for layer, _ in passes]
        return _Part(
            [self._as_it_travels(value) for value in gradients],
            sums,
            [statistics for _, statistics in passes],
        )

    def _as_it_travels(self, gradient: Any) -> tf.Tensor:
        # That of an Embedding is sparse.
        dense = tf.convert_to_tensor(gradient)
        # Or an ordered sum would be rounded where it leaves.
        return tf.cast(dense, tf.float32) if self._ordered else dense

    def _all_reduce(self, part: _Part) -> _Part:
        """Sums a phase over the replicas in one exchange."""
        names, metrics = list(part.metrics), list(part.metrics.values())
        num_gradients = len(part.gradients)
        values = reduction.over_replicas(
            [*part.gradients, *metrics, *part.statistics],
            ordered=self._ordered,
        )
        end = num_gradients + len(names)
        return _Part(
            values[:num_gradients],
            dict(zip(names, values[num_gradients:end], strict=True)),
            values[end:],
        )

    def _move_statistics(self, index: int, part: _Part) -> None:
        """Moves BatchNorm's averages by the mean over the micro-batches."""
        for layer, total in zip(
            self._layers[index], part.statistics, strict=True
        ):
            layer.move(*tf.unstack(total / self._config.micro_batches))

    def _apply_if(
        self,
        finite: tf.Tensor,
        name: str,
        gradients: list[tf.Tensor],
        variables: list[keras.Variable],
    ) -> None:
        """Applies gradients, and takes it back where they are not finite.

        A `tf.cond` around `apply` cannot be traced under a strategy, since
        `apply` meets the other replicas in a merge_call.
        """
        optimizer = self._optimizers[name]
        changed = [
            variable.value for variable in [*variables, *optimizer.variables]
        ]
        # Copies: a read alone may share the buffer that `apply` updates.
        before = [tf.identity(variable.read_value()) for variable in changed]
        with tf.control_dependencies(before):
            optimizer.apply(gradients, variables)

        def select(
            strategy: tf.distribute.Strategy, finite: Any, old: Any
        ) -> None:
            for variable, value in zip(changed, old, strict=True):
                strategy.extended.update(
                    variable, _assign_where, args=(finite, value), group=False
                )

        context = tf.distribute.get_replica_context()
        context.merge_call(select, args=(finite, before))

    def _update_average(self) -> None:
        """Moves the EMA generator, on each device by itself.

        Karras et al., 2018, "Progressive Growing of GANs", section 6.1; the
        half-life, and that it is at most a twentieth of the images seen so
        far, are those of NVIDIA's StyleGAN2: an early average would be that of
        the initial weights. State that is not trained, such as BatchNorm's
        averages, is copied.
        """
        config = self._config
        seen = tf.cast((self.step + 1) * config.batch_size, tf.float32)
        half_life = tf.minimum(config.ema_half_life_images, 0.05 * seen)
        decay = 0.5 ** (config.batch_size / half_life)
        pairs = zip(
            self.ema_generator.weights,
            self.networks.generator.weights,
            strict=True,
        )
        for average, weight in pairs:
            self._strategy.extended.update(
                average.value,
                _move_average if weight.trainable else _copy,
                args=(weight.value, decay)
                if weight.trainable
                else (weight.value,),
                group=False,
            )

    def differing_variables(self) -> list[str]:
        """Names the variables that are not equal, bit for bit, on all replicas.

        Every worker calls this.
        """
        variables = self._variables()
        if self._strategy.num_replicas_in_sync == 1:
            return []
        checksums = self._checksums().numpy()
        return [
            variable.path
            for variable, column in zip(variables, checksums.T, strict=True)
            if len(set(column.tolist())) > 1
        ]

    def _variables(self) -> list[keras.Variable]:
        owners = [
            self.networks.generator,
            self.networks.discriminator,
            self.ema_generator,
            *self._optimizers.values(),
        ]
        return [variable for owner in owners for variable in owner.variables]

    @tf.function
    def _checksums(self) -> tf.Tensor:
        """Returns int64 [replicas, variables]."""
        variables = self._variables()

        def of_replica() -> tf.Tensor:
            sums = [_checksum(variable.value) for variable in variables]
            return tf.stack(sums)[tf.newaxis]

        return self._strategy.gather(self._strategy.run(of_replica), axis=0)


def _draws(phases: Sequence[phases_lib.Phase], num_draws: int) -> list[int]:
    """Chooses the real images of each phase: which draw of its step.

    Each discriminator phase takes the next one; a generator phase, whose
    objective may compare with real images, takes the one before it again.
    """
    draws: list[int] = []
    taken = 0
    for phase in phases:
        taken += phase.network == "discriminator"
        draws.append(min(max(taken - 1, 0), num_draws - 1))
    return draws


def _assign_where(
    variable: tf.Variable, condition: tf.Tensor, otherwise: tf.Tensor
) -> tf.Operation:
    return variable.assign(tf.where(condition, variable, otherwise))


def _move_average(
    average: tf.Variable, weight: tf.Tensor, decay: tf.Tensor
) -> tf.Operation:
    return average.assign(weight + (average - weight) * decay)


def _copy(average: tf.Variable, weight: tf.Tensor) -> tf.Operation:
    return average.assign(weight)


def _checksum(value: tf.Tensor) -> tf.Tensor:
    """Weighs the bits of a tensor by their place; int64 scalar."""
    tensor = tf.convert_to_tensor(value)
    if tensor.dtype == tf.bool:
        tensor = tf.cast(tensor, tf.uint8)
    word = tf.uint8 if tensor.dtype.size < 4 else tf.int32
    words = tf.reshape(tf.bitcast(tensor, word), [-1])
    places = 2 * tf.range(tf.size(words, tf.int64), dtype=tf.int64) + 1
    return tf.reduce_sum(tf.cast(words, tf.int64) * places)


def _refuse_unsynchronized(
    networks: phases_lib.Networks, strategy: tf.distribute.Strategy
) -> None:
    """Refuses BatchNorm whose averages would differ between replicas.

    Raises:
        UserError: a network has one.
    """
    if strategy.num_replicas_in_sync == 1:
        return
    for network in (networks.generator, networks.discriminator):
        for layer in network._flatten_layers():
            is_norm = isinstance(layer, keras.layers.BatchNormalization)
            if is_norm and not layer.synchronized:
                raise UserError(
                    f"{layer.name} is a BatchNormalization of its own on each "
                    f"of the {strategy.num_replicas_in_sync} replicas; give it "
                    "synchronized=True"
                )


def _refuse_own_state(networks: phases_lib.Networks) -> None:
    """Refuses layers whose state depends on which replica calls them when.

    Raises:
        UserError: a network has one.
    """
    for network in (networks.generator, networks.discriminator):
        for layer in network._flatten_layers():
            if isinstance(layer, batch_norm.BatchNorm):
                continue
            if layer._non_trainable_variables or layer._seed_generators:
                remedy = (
                    "dtrain.models.batch_norm.BatchNorm"
                    if isinstance(layer, keras.layers.BatchNormalization)
                    else "a layer without"
                )
                raise UserError(
                    f"reduction (ordered): {layer.name} is a "
                    f"{type(layer).__name__}, whose state would depend on the "
                    f"number of replicas; use {remedy}, or --reduction=fast"
                )


def _jit_compile(
    config: Config,
    strategy: tf.distribute.Strategy,
    networks: phases_lib.Networks,
) -> bool:
    """Decides whether XLA compiles the gradients.

    Raises:
        UserError: it is to, and cannot.
    """
    if config.jit_compile == "off":
        return False
    # In ordered mode, what is compiled returns it instead of assigning it.
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
