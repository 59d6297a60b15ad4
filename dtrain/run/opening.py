"""Opens a run: builds all that the loop works with, at the newest state.

The order is such that a mistake leaves nothing behind: the flags are checked,
the data and the directory are looked at, the GAN is built, the directory is
claimed, the newest state is restored, and only then is anything written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dtrain.cluster.workers import Workers
from dtrain.config import Config, RunSettings
from dtrain.data import pipeline, sources
from dtrain.errors import LOST_WORKER, UserError, code_of
from dtrain.gan.memory import Estimate
from dtrain.gan.pictures import Pictures
from dtrain.gan.replicas import Comparison
from dtrain.gan.state import GAN
from dtrain.gan.step import Step
from dtrain.quality import periodic as evaluations
from dtrain.record import drawing, ledger, metrics, reals, samples, tracking
from dtrain.record.periodic import Periodic
from dtrain.record.progress import Progress
from dtrain.record.rates import LearningRates
from dtrain.record.spread import SampleSpread
from dtrain.resilience.watchdog import Watchdog
from dtrain.resilience.watcher import Watcher
from dtrain.run import (
    checkpointer,
    identity,
    init_from,
    introduction,
    looking,
    places,
)
from dtrain.run.resuming import Restored
from dtrain.storage import claim, files


class Run(NamedTuple):
    """What the loop works with.

    Attributes:
        config: the run's settings.
        workers: all of them, and which this is.
        data: the real images, and what stands beside them.
        gan: the state.
        step: changes the state.
        estimate: of the memory that steps take.
        replicas: compares the state over all replicas.
        checkpointer: saves the state.
        recorder: writes the metrics.
        progress: shows how far the run is.
        draw: draws the pictures of the run.
        watcher: sees the notices that tell this process to end.
        watchdog: ends this process if the run makes no progress.
        ledger: counts where the time goes.
        inputs: the input pipelines so far. They are kept to the end: to take
            one down may wait for its threads for half a minute.
        periodic: what else is done every N steps.
    """

    config: Config
    workers: Workers
    data: sources.Data
    gan: GAN
    step: Step
    estimate: Estimate
    replicas: Comparison
    checkpointer: checkpointer.Checkpointer
    recorder: metrics.Recorder
    progress: Progress
    draw: drawing.Draw
    watcher: Watcher
    watchdog: Watchdog
    ledger: ledger.Ledger
    inputs: list[Any]
    periodic: tuple[Periodic, ...] = ()


def say(notes: Iterable[str]) -> None:
    """Prints lines to the standard error, but for empty ones."""
    for note in filter(None, notes):
        print(note, file=sys.stderr, flush=True)


def open_run(
    config: Config,
    workers: Workers,
    watcher: Watcher,
    dog: Watchdog,
    stack: contextlib.ExitStack,
) -> tuple[Run, Restored]:
    """Builds everything and restores the newest state. Every worker calls it.

    Args:
        config: the run's settings.
        workers: all of them, with the strategy of the run.
        watcher: sees the notices that tell this process to end.
        dog: ends this process if the run makes no progress.
        stack: is given what is to be closed at the end.

    Raises:
        UserError: the settings do not fit data, machine or run directory.
        StorageError: the state could not be read.
    """
    data, description, note = looking.look(config, workers)
    config = description.config
    gan, step, estimate = build(config, data, workers)
    evaluation = evaluations.make(gan, data, workers)
    # Not before all is known to fit: a mistake must leave nothing behind.
    claims = workers.together(lambda: _claim(config, workers, watcher, stack))
    book = stack.enter_context(_open_ledger(config, workers, watcher))
    saver, recorder, restored = _resume(
        gan, description, workers, claims, book, stack
    )
    run = Run(
        config=config,
        workers=workers,
        data=data,
        gan=gan,
        step=step,
        estimate=estimate,
        replicas=Comparison(workers.strategy, gan.variables),
        checkpointer=saver,
        recorder=recorder,
        progress=Progress(
            config.num_steps, config.batch_size, is_chief=workers.is_chief
        ),
        draw=make_draw(gan, data),
        watcher=watcher,
        watchdog=dog,
        ledger=book,
        inputs=[],
    )
    run = run._replace(periodic=_make_periodic(run, evaluation))
    return run, restored._replace(notes=[note, *restored.notes])


def build(
    config: Config, data: sources.Data, workers: Workers
) -> tuple[GAN, Step, Estimate]:
    """Builds the state and its step. Every worker calls this.

    Args:
        config: the run's settings.
        data: all that it reads.
        workers: all of them, with the strategy of the run.

    Returns:
        The state, its step, and the memory that this takes.

    Raises:
        UserError: the model does not fit, or no memory holds it.
    """
    source = data.source
    gan = GAN(
        config,
        workers.strategy,
        source.image_shape,
        source.num_classes,
        data.specs,
    )
    step = Step(gan)
    estimate = Estimate(gan, data, workers.cluster.num_workers)
    workers.together(estimate.check)
    return gan, step, estimate


def make_draw(gan: GAN, data: sources.Data) -> drawing.Draw:
    """Makes what draws the pictures of a run."""
    return Pictures(
        gan, lambda number: pipeline.first_batch(data, gan.config, number)
    )


def make_figures(
    gan: GAN, data: sources.Data, draw: drawing.Draw, *, is_chief: bool
) -> list[Periodic]:
    """Makes what every run measures beside its steps."""
    config, num_classes = gan.config, data.source.num_classes
    return [
        SampleSpread(config, num_classes, draw, is_chief=is_chief),
        LearningRates(config, gan.optimizers, is_chief=is_chief),
    ]


def _make_periodic(
    run: Run, evaluation: evaluations.Evaluation | None
) -> tuple[Periodic, ...]:
    """Makes what is done every N steps; a new one gets a row here."""
    config, is_chief = run.config, run.workers.is_chief
    grids = samples.Samples(
        config,
        run.data.source.num_classes,
        run.draw,
        run.recorder,
        lambda: run.watcher.secs_left,
        is_chief=is_chief,
    )
    measured = make_figures(run.gan, run.data, run.draw, is_chief=is_chief)
    made: list[Periodic] = [grids, *measured]
    if evaluation:
        around = evaluations.Around(
            run.workers,
            lambda: run.watcher.requested,
            run.progress.say,
            run.ledger,
        )
        made.append(evaluations.Evaluating(config, evaluation, around))
    return tuple(made)


def _name(
    description: identity.Description, restored: Restored, workers: Workers
) -> identity.Description:
    """Names a run that has no id yet. Every worker calls this.

    One whose directory was lost goes on under the id that its backup has.
    """
    before = restored.manifest.run if restored.manifest else {}
    run_id = workers.share(
        lambda: (
            description.run_id or before.get("id", "") or secrets.token_hex(8)
        )
    )
    return dataclasses.replace(description, run_id=run_id)


def _claim(
    config: Config,
    workers: Workers,
    watcher: Watcher,
    stack: contextlib.ExitStack,
) -> list[claim.Claim]:
    """Claims the directories that the chief alone may write to."""
    if not workers.is_chief:
        return []
    claims = [
        stack.enter_context(claim.claim(directory, name=name))
        for name, directory in (
            ("run_dir", config.run_dir),
            ("checkpoint_dir", places.checkpoint_dir(config)),
        )
    ]
    watcher.on_claimed()
    return claims


@contextlib.contextmanager
def _open_ledger(
    config: RunSettings, workers: Workers, watcher: Watcher
) -> Iterator[ledger.Ledger]:
    """Keeps the ledger of this start; an error closes it with its code."""
    book = ledger.Ledger(
        config.run_dir,
        is_chief=workers.is_chief,
        num_workers=workers.cluster.num_workers,
        num_replicas=workers.strategy.num_replicas_in_sync,
        batch_size=config.batch_size,
    )
    try:
        yield book
    except BaseException as error:
        code = LOST_WORKER if workers.is_lost(error) else code_of(error)
        book.close(code, watcher.notice)
        raise


def _resume(
    gan: GAN,
    description: identity.Description,
    workers: Workers,
    claims: list[claim.Claim],
    book: ledger.Ledger,
    stack: contextlib.ExitStack,
) -> tuple[checkpointer.Checkpointer, metrics.Recorder, Restored]:
    """Restores the newest state, and opens what is written from there on."""
    config, taken = description.config, None
    saver = checkpointer.Checkpointer(
        gan.checkpoint,
        config,
        workers.cluster,
        run=identity.to_dict(description),
        claims=claims,
    )
    with book.spending("restore"):
        restored = saver.restore(workers)
        description = _name(description, restored, workers)
        saver.describe(identity.to_dict(description))
        if config.init_from and restored.manifest is None:
            source = workers.share(lambda: init_from.find(config))
            taken = workers.together(
                lambda: init_from.take(
                    gan.checkpoint, config, init_from.Source(*source)
                )
            )
    recorder = workers.together(
        lambda: _begin(restored, description, gan, workers)
    )
    stack.callback(recorder.close)
    # Closed before the recorder, which a save that still runs needs.
    stack.enter_context(saver)
    book.restored(int(gan.step.numpy()))
    if taken:
        # Behind config.json, without which a directory that is not empty is
        # none of a run; and before the first step, so that a start which is
        # killed then begins from the same again.
        if workers.is_chief:
            taken.write(config.run_dir)
        restored = restored._replace(notes=[str(taken), *restored.notes])
    notes = [recorder.notice, *restored.notes]
    return saver, recorder, restored._replace(notes=notes)


def _begin(
    restored: Restored,
    description: identity.Description,
    gan: GAN,
    workers: Workers,
) -> metrics.Recorder:
    """Describes the run in its directory, and opens its metrics."""
    check_belongs(restored, description)
    run_dir = description.config.run_dir
    if not workers.is_chief:
        return metrics.Recorder()
    tracker = tracking.make(description.config, description.run_id)
    identity.write(description, gan.program.networks)
    with files.storage_errors(run_dir):
        return metrics.RunRecorder(
            run_dir,
            int(gan.step.numpy()),
            restored.manifest and restored.manifest.log,
            restored.manifest and restored.manifest.metrics,
            description.config.to_dict(),
            tracker,
        )


def check_belongs(
    restored: Restored, description: identity.Description
) -> None:
    """Checks that what was restored is of this run, and within its length.

    Args:
        restored: what was found.
        description: what the run is told now.

    Raises:
        UserError: it is beyond `num_steps`.
    """
    if restored.manifest is None:
        return
    saved, config = restored.manifest, description.config
    identity.check_restored(description, saved.run, restored.prefix)
    if saved.step > config.num_steps:
        raise UserError(
            f"num_steps ({config.num_steps}) is below the step of the run in "
            f"{config.run_dir} ({saved.step}); raise it, or name another "
            "run_dir"
        )


def introduce(run: Run, restored: Restored) -> None:
    """Shows what the run is about to do, and what was found on the way.

    Every worker calls this; the chief draws the real images, and of a new run
    those of its first weights.

    Raises:
        UserError: an image cannot be decoded.
    """
    workers = run.workers

    def draw() -> None:
        if not workers.is_chief:
            return
        reals.write(run.data, run.config)
        if restored.manifest is None:
            num_classes = run.data.source.num_classes
            samples.write_first(run.config, num_classes, run.draw)

    with run.ledger.spending("draw"):
        # On the chief alone, or all of them fail.
        workers.together(draw)
    run.progress.say(
        introduction.text(
            run.gan, run.data, run.workers, run.estimate, restored
        )
    )
    say(restored.notes)
