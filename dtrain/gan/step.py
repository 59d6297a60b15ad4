"""The step: what changes the state of a GAN, many at a time on the devices.

A step is a sequence of phases, each of which updates networks: by default
`discriminator_steps` updates of the discriminator, each with fresh images and
latents, then one of the generator. After them the state of the program and the
moving averages change, and the step is judged.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dtrain.cluster import strategy as strategy_lib
from dtrain.config import DeviceSettings
from dtrain.data import pipeline
from dtrain.errors import UserError
from dtrain.gan import divergence, objectives, replicas, traced
from dtrain.gan.program import Program
from dtrain.gan.state import GAN
from dtrain.gan.update import Moment, Outcome, Update


class _Round(NamedTuple):
    """Phases that are run one after another, all of them or none.

    Attributes:
        every_steps: they are run in each so many-th step.
        numbers: of the phases.
    """

    every_steps: int
    numbers: list[int]


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
        config, program = gan.config, gan.program
        self._gan = gan
        self._draw_of_update = program.draws
        self.num_draws = max(program.draws) + 1
        micro_batches = strategy_lib.check_batch(config, gan.strategy)
        jit_compile = _jit_compile(config, gan.strategy, program)
        self._updates = [
            Update(gan, phase, number, micro_batches, jit_compile=jit_compile)
            for number, phase in enumerate(program.phases)
        ]
        self._rounds = _rounds(program)
        with tf.device("CPU:0"):
            # This worker's own, and read in every step.
            self._stop = tf.Variable(0.0, trainable=False, name="stop")
        # Here: a decorated method would let go of `self` where nobody holds it.
        self._run = tf.function(self._loop, autograph=False)

    def trace(self, iterator: Iterator[pipeline.Batch]) -> None:
        """Traces a step, as else the first `run` does. Every worker calls this.

        Args:
            iterator: as that of `run`.
        """
        self._run.get_concrete_function(iterator, tf.constant(1))

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
            self._check_traced()
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
        gan.follow_schedules()
        outcomes = [
            outcome
            for part in self._rounds
            for outcome in self._run_round(part, draws)
        ]
        for name, loss_scale in gan.loss_scales.items():
            applies = [
                outcome.applies[name]
                for outcome in outcomes
                if name in outcome.applies
            ]
            loss_scale.update(tf.reduce_all(applies))
        self._update_state(outcomes)
        gan.update_average()
        verdict = gan.divergence.judge(
            gan.step.read_value(), *_judged(gan.program.trained, outcomes)
        )
        metrics = self._metrics(outcomes)
        gan.step.assign_add(1)
        last = max(self._always)
        return metrics, verdict, outcomes[last].stop > 0

    def _run_round(
        self, part: _Round, draws: list[pipeline.Batch]
    ) -> list[Outcome]:
        """Runs phases on all replicas, if they are due, or none of them."""
        if part.every_steps == 1:
            return self._run_phases(part.numbers, draws)
        like: list[Outcome] = []

        def run() -> list[Outcome]:
            like[:] = self._run_phases(part.numbers, draws)
            self._check_traced()
            return like

        trained = {
            name for number in self._always for name in self._names(number)
        }
        # Out here: in replica context a condition cannot hold an optimizer.
        return tf.cond(
            self._is_due(part.every_steps),
            run,
            # Traced after the other, whose form it must have.
            lambda: [_skipped(outcome, trained) for outcome in like],
        )

    def _is_due(self, every_steps: int) -> tf.Tensor:
        return tf.equal(self._gan.step % every_steps, 0)

    def _run_phases(
        self, numbers: Sequence[int], draws: list[pipeline.Batch]
    ) -> list[Outcome]:
        strategy = self._gan.strategy
        result = strategy.run(
            functools.partial(self._run_on_replica, numbers), args=(draws,)
        )
        # Equal on all replicas: they come out of an all-reduce.
        return tf.nest.map_structure(
            lambda value: strategy.experimental_local_results(value)[0], result
        )

    def _run_on_replica(
        self, numbers: Sequence[int], draws: Sequence[pipeline.Batch]
    ) -> list[Outcome]:
        gan = self._gan
        # Read once: of small networks a step is as long as its operations.
        moment = Moment(
            gan.data_step,
            gan.step.read_value(),
            gan.state_values(),
            self._stop.read_value(),
        )
        return [
            self._updates[number].run(
                draws[self._draw_of_update[number]], moment
            )
            for number in numbers
        ]

    @property
    def _always(self) -> list[int]:
        """Numbers of the phases that are run in every step."""
        return [
            number
            for part in self._rounds
            if part.every_steps == 1
            for number in part.numbers
        ]

    def _names(self, number: int) -> tuple[str, ...]:
        return self._gan.program.phases[number].names

    def _update_state(self, outcomes: Sequence[Outcome]) -> None:
        """Updates the state of the program by the means of each phase."""
        gan = self._gan
        state = gan.state_values()
        for number, outcome in enumerate(outcomes):
            phase = gan.program.phases[number]
            if phase.update is None:
                continue
            means = {**outcome.metrics, **outcome.further}
            is_due = self._is_due(phase.every_steps)
            for name, new in objectives.updated(
                phase, number, state, means
            ).items():
                state[name] = tf.where(is_due, new, state[name])
        for name, value in state.items():
            gan.state[name].assign(value)

    def _metrics(self, outcomes: Sequence[Outcome]) -> dict[str, tf.Tensor]:
        """Joins the metrics of all phases, and what is a number of the state.

        Raises:
            UserError: different phases have a metric of one name.
        """
        phases = self._gan.program.phases
        metrics: dict[str, tf.Tensor] = {}
        origins: dict[str, Any] = {}
        for number, outcome in enumerate(outcomes):
            is_due = self._is_due(self._gan.program.phases[number].every_steps)
            for name, value in outcome.metrics.items():
                origin = origins.setdefault(name, phases[number].objective)
                is_own = not name.endswith("_gradient_norm")
                if is_own and origin != phases[number].objective:
                    raise UserError(
                        f"{objectives.title(phases[number], number)}: an "
                        f"earlier phase has a metric {name}, too; give one of "
                        "them another name"
                    )
                # One that is not run leaves what there is, as of the norm.
                before = metrics.get(name, value)
                is_kept = number not in self._always and name in metrics
                metrics[name] = (
                    tf.where(is_due, value, before) if is_kept else value
                )
        for name, variable in self._gan.state.items():
            if not variable.shape.rank:
                metrics.setdefault(name, variable.read_value())
        return metrics

    def _check_traced(self) -> None:
        """Refuses what a resumed run would not do again, in this graph."""
        graph = tf.compat.v1.get_default_graph()
        own = [self._stop]
        if self._gan.beta_2 is not None:
            own.append(self._gan.beta_2)
        traced.check(graph, self._gan.checkpoint, own)


def _skipped(like: Outcome, trained: Collection[str]) -> Outcome:
    """Makes the outcome of a phase that is not run in a step.

    Args:
        like: one of the same form.
        trained: networks that others train in this step, which have a gradient
            without it.
    """
    zeros = tf.nest.map_structure(tf.zeros_like, like)
    return zeros._replace(
        metrics={
            name: tf.fill(value.shape, np.float32(np.nan))
            for name, value in like.metrics.items()
        },
        norms={
            name: tf.constant(0.0 if name in trained else 1.0)
            for name in like.norms
        },
        applies={name: tf.constant(True) for name in like.applies},
    )


def _judged(
    names: Sequence[str], outcomes: Sequence[Outcome]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Sums up a step for its judge; see `Divergence.judge`."""
    losses, norms = (
        [[values[name] for values in each if name in values] for name in names]
        for each in (
            [outcome.losses for outcome in outcomes],
            [outcome.norms for outcome in outcomes],
        )
    )
    # In one array, with zeros for networks that fewer phases train.
    rows = [
        *itertools.zip_longest(*losses, fillvalue=0.0),
        *itertools.zip_longest(*norms, fillvalue=0.0),
    ]
    numbers = tf.stack(list(itertools.chain.from_iterable(rows)))
    is_finite = tf.reduce_all(tf.math.is_finite(numbers))
    table = tf.reshape(tf.abs(numbers), [2, len(rows) // 2, len(names)])
    largest = tf.reduce_max(table, 1)
    return is_finite, *tf.unstack(largest)


def _rounds(program: Program) -> list[_Round]:
    """Puts together what is run in every step, and so needs no condition."""
    groups = itertools.groupby(
        range(len(program.phases)),
        lambda number: program.phases[number].every_steps,
    )
    return [_Round(every_steps, list(group)) for every_steps, group in groups]


def _jit_compile(
    config: DeviceSettings, strategy: tf.distribute.Strategy, program: Program
) -> bool:
    """Decides whether XLA compiles the gradients.

    Raises:
        UserError: `jit_compile` is on, and XLA cannot.
    """
    if config.jit_compile == "off":
        return False
    # In ordered mode, what is compiled returns state and assigns none.
    has_state = config.reduction == "fast" and bool(
        replicas.with_own_state(program.networks.values())
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
