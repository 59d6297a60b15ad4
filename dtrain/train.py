"""The training loop: one for every strategy.

The devices run `steps_per_loop` steps at a time; between two such loops the
host writes the metrics, asks whether the run is to stop, and saves what is
due. A loop ends early where a checkpoint or a grid of samples is due, so
these are functions of the step and not of how the run was cut.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import keras
import numpy as np
import tensorflow as tf

from dtrain import errors
from dtrain.checkpoint import manager
from dtrain.cluster import workers
from dtrain.cluster.environment import Cluster
from dtrain.config import Config
from dtrain.data import pipeline, sources
from dtrain.gan import divergence
from dtrain.gan import state as gan_lib
from dtrain.record import drawing, images, ledger, metrics
from dtrain.resilience import stop_file, watchdog
from dtrain.resilience import watcher as watcher_lib
from dtrain.run import checkpointer as checkpointer_lib
from dtrain.run import identity, init_from, places
from dtrain.storage import access, claim, files

# May differ between the workers of a run, whose disks may.
_OF_A_WORKER = (
    "run_dir",
    "backup_dir",
    "data_dir",
    "manual_dir",
    "download",
    "cache_gib",
)


# A notice may leave less time than a picture takes.
_DRAWING_SECS = 15.0


class _Run(NamedTuple):
    """What the loop works with."""

    config: Config
    cluster: Cluster
    strategy: tf.distribute.Strategy
    source: sources.Source
    gan: gan_lib.GAN
    checkpointer: checkpointer_lib.Checkpointer
    recorder: metrics.Recorder
    progress: metrics.Progress
    watcher: watcher_lib.Watcher
    watchdog: watchdog.Watchdog
    ledger: ledger.Ledger
    claims: list[claim.Claim]
    # Kept to the end: taking one down may wait for threads for half a minute.
    inputs: list[Any]


def train(
    config: Config,
    cluster: Cluster,
    watcher: watcher_lib.Watcher,
    dog: watchdog.Watchdog,
    leave: Callable[[int], int] = int,
) -> int:
    """Trains a GAN, from the newest state of its run directory if it has one.

    Every worker calls this.

    Args:
        config: the run's settings.
        cluster: the workers, and which of them this is.
        watcher: started; sees the notices.
        dog: started; sees the progress.
        leave: called with the exit code when all is done, before the input
            is taken down; a program passes `errors.leave`. The default goes
            on and returns the code.

    Returns:
        The exit code of the process: `errors.FINISHED`, or `errors.RUN_AGAIN`
        if the run was told to stop and has saved its state.

    Raises:
        UserError: the settings fit neither each other, nor the data, nor the
            machine, nor the run directory; or the run has diverged.
        StorageError: the state could not be read, or not saved at the end.
        OpError: TensorFlow failed, and not for want of another worker.
    """
    try:
        # Here, for `leave` does not come back.
        with contextlib.closing(dog):
            with contextlib.ExitStack() as stack:
                strategy = workers.make(config, cluster)
                # Building it may have put TensorFlow's own handlers in place.
                watcher.arm()
                run, restored = _open(
                    config, cluster, strategy, watcher, dog, stack
                )
                run.progress.say(_introduction(run, restored.prefix))
                _say(restored.notes)
                code = _loop(run)
                run.ledger.close(code, watcher.notice)
            # A worker that leaves takes the collectives of the others with it.
            # One of them may still have a store to wait for.
            with dog.patience():
                workers.agree(strategy, cluster, (True,))
        return leave(code)
    except Exception as error:
        if cluster.num_workers > 1 and workers.is_lost_worker(error):
            _leave_at_once(error)
        raise


def _open(
    config: Config,
    cluster: Cluster,
    strategy: tf.distribute.Strategy,
    watcher: watcher_lib.Watcher,
    dog: watchdog.Watchdog,
    stack: contextlib.ExitStack,
) -> tuple[_Run, checkpointer_lib.Restored]:
    """Builds everything and restores the newest state.

    Args:
        config: the run's settings.
        cluster: the workers, and which of them this is.
        strategy: the strategy of the run.
        watcher: sees the notices.
        dog: sees the progress.
        stack: takes what is to be closed at the end.

    Returns:
        What the loop works with, and what was restored.

    Raises:
        UserError: see `train`.
        StorageError: see `train`.
    """
    _check_same_flags(config, cluster, strategy)
    source, description, note = workers.together(
        strategy, cluster, lambda: _look(config, cluster)
    )
    gan = gan_lib.GAN(config, strategy, source.image_shape, source.num_classes)
    # Not before all is known to fit: a mistake must leave nothing behind.
    claims = workers.together(
        strategy, cluster, lambda: _claim(config, cluster, stack)
    )
    book = stack.enter_context(_ledger(config, cluster, strategy, watcher))
    checkpointer, recorder, restored = _restore(
        gan, description, strategy, cluster, book, stack
    )
    run = _Run(
        config=config,
        cluster=cluster,
        strategy=strategy,
        source=source,
        gan=gan,
        checkpointer=checkpointer,
        recorder=recorder,
        progress=metrics.Progress(
            config.num_steps, config.batch_size, is_chief=cluster.is_chief
        ),
        watcher=watcher,
        watchdog=dog,
        ledger=book,
        claims=claims,
        inputs=[],
    )
    notes = [each for each in (note, recorder.notice) if each]
    return run, restored._replace(notes=[*notes, *restored.notes])


def _restore(
    gan: gan_lib.GAN,
    description: identity.Description,
    strategy: tf.distribute.Strategy,
    cluster: Cluster,
    book: ledger.Ledger,
    stack: contextlib.ExitStack,
) -> tuple[
    checkpointer_lib.Checkpointer, metrics.Recorder, checkpointer_lib.Restored
]:
    """Restores the newest state, and opens what is written from there on."""
    checkpointer = checkpointer_lib.Checkpointer(
        gan.checkpoint,
        description.config,
        cluster,
        run=identity.to_dict(description),
    )
    config, taken = description.config, None
    with book.spending("restore"):
        restored = checkpointer.restore(strategy)
        if config.init_from and restored.manifest is None:
            taken = workers.together(
                strategy,
                cluster,
                lambda: init_from.take(gan.checkpoint, config),
            )
    recorder = workers.together(
        strategy, cluster, lambda: _begin(restored, description, gan, cluster)
    )
    stack.callback(recorder.close)
    # Before the recorder, which a save that is being written still needs.
    stack.callback(checkpointer.close)
    book.restored(int(gan.step.numpy()))
    if taken:
        if cluster.is_chief:
            taken.write(config.run_dir)
        restored = restored._replace(notes=[str(taken), *restored.notes])
    return checkpointer, recorder, restored


@contextlib.contextmanager
def _ledger(
    config: Config,
    cluster: Cluster,
    strategy: tf.distribute.Strategy,
    watcher: watcher_lib.Watcher,
) -> Iterator[ledger.Ledger]:
    """Keeps the ledger of this attempt; an error that leaves ends it."""
    book = ledger.Ledger(
        config.run_dir,
        is_chief=cluster.is_chief,
        num_workers=cluster.num_workers,
        num_replicas=strategy.num_replicas_in_sync,
        batch_size=config.batch_size,
    )
    try:
        yield book
    except BaseException as error:
        code = errors.code_of(error)
        if cluster.num_workers > 1 and workers.is_lost_worker(error):
            code = errors.LOST_WORKER
        book.close(code, watcher.notice)
        raise


def _look(
    config: Config, cluster: Cluster
) -> tuple[sources.Source, identity.Description, str]:
    """Opens the data and looks at the run's directory; changes nothing.

    Returns:
        The data, what the run is, and a line if the directory is damaged.
    """
    for name in ("run_dir", "checkpoint_dir", "backup_dir"):
        access.check(name, getattr(config, name))
    source = sources.open_source(config)
    description = identity.Description(
        config, source.image_shape, source.num_classes, source.num_images
    )
    note = identity.check(
        description,
        is_chief=cluster.is_chief,
        is_alone=cluster.num_workers == 1 and not config.backup_dir,
    )
    return source, description, note


def _begin(
    restored: checkpointer_lib.Restored,
    description: identity.Description,
    gan: gan_lib.GAN,
    cluster: Cluster,
) -> metrics.Recorder:
    """Describes the run in its directory, and opens its metrics.

    Raises:
        UserError: what was restored is another run's.
        StorageError: the directory cannot be written to.
    """
    _check_restored(restored, description)
    run_dir = description.config.run_dir
    if cluster.is_chief:
        identity.write(description, gan.networks)
    with files.storage_errors(run_dir):
        return metrics.Recorder(
            run_dir,
            int(gan.step.numpy()),
            is_chief=cluster.is_chief,
            expected=restored.manifest and restored.manifest.log,
        )


def _claim(
    config: Config,
    cluster: Cluster,
    stack: contextlib.ExitStack,
) -> list[claim.Claim]:
    """Claims what the chief alone may write to."""
    if not cluster.is_chief:
        return []
    claims = [
        stack.enter_context(claim.claim(directory, name=name))
        for name, directory in (
            ("run_dir", config.run_dir),
            ("checkpoint_dir", places.checkpoint_dir(config)),
        )
    ]
    stop_file.remove(
        config.run_dir, stop_file.since_secs(ledger.process_start_secs())
    )
    return claims


def _check_restored(
    restored: checkpointer_lib.Restored, description: identity.Description
) -> None:
    """Checks that what was restored is of this run, and not of its future.

    Raises:
        UserError: it is not so.
    """
    if restored.manifest is None:
        return
    made, config = restored.manifest, description.config
    identity.check_restored(description, made.run, restored.prefix)
    if made.step > config.num_steps:
        raise errors.UserError(
            f"num_steps ({config.num_steps}) is below the step of the run in "
            f"{config.run_dir} ({made.step}); raise it, or name another run_dir"
        )


def _check_same_flags(
    config: Config, cluster: Cluster, strategy: tf.distribute.Strategy
) -> None:
    """Checks that all workers were told the same.

    Raises:
        UserError: on every worker, if they were not.
    """
    workers.check_batch(config, strategy)
    flags = config.to_dict()
    for name in _OF_A_WORKER:
        del flags[name]
    digest = zlib.crc32(json.dumps(flags).encode())
    if len(set(workers.gather(strategy, cluster, digest))) > 1:
        raise errors.UserError(
            "the workers were started with different flags; only "
            f"{', '.join(_OF_A_WORKER)} may differ between them"
        )


def _leave_at_once(error: Exception) -> NoReturn:
    """Ends this process because another worker is gone."""
    reason = " ".join(str(error).split())[:200]
    print(
        f"lost another worker ({reason}); run again to go on from the last "
        "save",
        file=sys.stderr,
        flush=True,
    )
    # A normal exit waits up to 20 s for the worker that is gone.
    os._exit(errors.LOST_WORKER)


def _loop(run: _Run) -> int:
    config = run.config
    step, iterator = _input(run)
    _beat(run, step)
    # One step, for there is nothing to save before it is done; then more and
    # more, for the watchdog to learn how long a step takes.
    num_steps = ramp = 1
    while step < config.num_steps:
        # At the top, for a notice that came while all was built.
        if _stop_or_save(run, step):
            return errors.RUN_AGAIN
        with run.ledger.spending("train"):
            rows, verdict = _run_steps(run, iterator, step, num_steps)
        names = run.gan.metric_names
        run.recorder.write(step + 1, names, rows)
        step += len(rows)
        run.ledger.progress(step)
        run.watcher.begin(run.gan.stop)
        run.progress.update(step, _losses(names, rows[-1]))
        if verdict != divergence.FINE:
            with run.ledger.spending("restore"), run.watchdog.patience():
                _roll_back(run, step, verdict)
            step, iterator = _input(run)
        elif _samples_due(config, step):
            with run.ledger.spending("draw"), run.watchdog.patience():
                # To a store that is away, it is tried for minutes.
                _draw_samples(run, step)
                # The others must be as patient.
                workers.agree(run.strategy, run.cluster, (True,))
        _beat(run, step)
        ramp = min(2 * ramp, config.steps_per_loop)
        num_steps = min(ramp, _loop_length(config, step))
    _check_replicas(run, step)
    _save_last(run, step)
    with run.watchdog.patience():
        _say(filter(None, [run.checkpointer.complete()]))
    run.progress.say(
        f"finished: step {step:,}, the last grid is {_grid_path(config, step)}"
    )
    return errors.FINISHED


def _beat(run: _Run, step: int) -> None:
    """Tells how far the run is; a supervisor hears it from the watchdog."""
    run.ledger.progress(step)
    run.watchdog.beat(step, run.checkpointer.saved_step)


def _samples_due(config: Config, step: int) -> bool:
    return step >= config.num_steps or _due(config.sample_every_steps, step)


def _input(run: _Run) -> tuple[int, Any]:
    """Returns the steps that are done, and the images from there on."""
    step = int(run.gan.step.numpy())
    skipped = int(run.gan.divergence.skipped_steps.numpy())
    iterator = pipeline.make_iterator(
        run.source, run.config, run.strategy, step + skipped
    )
    run.inputs.append(iterator)
    return step, iterator


def _run_steps(
    run: _Run, iterator: Any, step: int, num_steps: int
) -> tuple[np.ndarray, int]:
    """Runs some steps; returns the metrics of each, and the verdict.

    Raises:
        UserError: an image cannot be read; it is named.
        OpError: something else failed.
    """
    gan = run.gan
    try:
        rows, verdict = gan.train_steps(
            iterator, tf.constant(num_steps, tf.int64)
        )
        return rows.numpy(), int(verdict.numpy())
    except tf.errors.OpError as error:
        if workers.is_lost_worker(error):
            raise
        step += int(gan.divergence.skipped_steps.numpy())
        mistake = pipeline.explain(error, run.source, run.config, step)
        if mistake is None:
            raise
        raise mistake from error


def _roll_back(run: _Run, step: int, verdict: int) -> None:
    """Goes back to the last good checkpoint, and leaves out what led here.

    Every worker does, since all have seen the same numbers.

    Raises:
        UserError: it has done so often enough, or there is none.
        StorageError: the disk or the store failed.
    """
    config, judged = run.config, run.gan.divergence
    reason, counts = divergence.describe(verdict, config), judged.counts
    if counts.rollbacks >= config.max_rollbacks:
        raise errors.UserError(
            f"diverged at step {step:,}: {reason}. The run has gone back "
            f"{counts.rollbacks} times (max_rollbacks) and left out the data "
            f"of {counts.skipped_steps:,} steps; lower the learning rates, or "
            "look at metrics.jsonl"
        )
    _wait(run, run.checkpointer.wait)
    limits = divergence.healthy_below(verdict, step, counts, config)
    made = run.checkpointer.roll_back(run.strategy, step, limits)
    judged.roll_back(counts, made.step, step)

    def rewind() -> None:
        with files.storage_errors(config.run_dir):
            run.recorder.rewind(made.step, made.log)

    workers.together(run.strategy, run.cluster, rewind)
    run.progress.say(
        f"diverged at step {step:,}: {reason}; back to step {made.step:,}, "
        f"without the data that led there ({counts.rollbacks + 1} of at most "
        f"{config.max_rollbacks})"
    )


def _losses(names: Sequence[str], row: np.ndarray) -> dict[str, float]:
    """Picks what fits on the progress line; the files have the rest."""
    short = {"discriminator_loss": "D loss", "generator_loss": "G loss"}
    return {
        short.get(name, name): value
        for name, value in zip(names, row.tolist(), strict=True)
        if name.endswith("_loss")
    }


def _due(every_steps: int, step: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _loop_length(config: Config, step: int) -> int:
    """Counts the steps until the host has something to do."""
    ends = [step + config.steps_per_loop, config.num_steps]
    for every_steps in (
        config.checkpoint_every_steps,
        config.sample_every_steps,
    ):
        if every_steps:
            ends.append((step // every_steps + 1) * every_steps)
    return min(ends) - step


def _stop_or_save(run: _Run, step: int) -> bool:
    """Saves if the chief wants to; returns whether the run is to stop.

    The one place between two loops where the workers agree.

    Raises:
        StorageError: a worker could not save, and `on_save_error` is stop.
    """
    for each in run.claims:
        each.raise_if_lost()
    failure = run.checkpointer.failure()
    if failure:
        _say([f"{failure}; training goes on from what was saved before"])
    mine = (
        run.watcher.requested,
        run.watcher.is_over,
        run.checkpointer.due(step),
        bool(failure) and run.config.on_save_error == "stop",
        not run.checkpointer.wait_for_room(0.0),
    )
    stop, is_over, save, give_up, is_full = workers.agree(
        run.strategy, run.cluster, mine
    )
    if give_up:
        raise errors.StorageError(failure or "another worker could not save")
    if stop or save:
        _check_replicas(run, step)
    if not stop:
        if save:
            with run.ledger.spending("save"):
                if is_full:
                    _wait(run, run.checkpointer.wait_for_room)
                run.checkpointer.save(step, _facts(run, step))
        return False
    if run.watcher.requested and not run.cluster.is_chief:
        # The chief may know no more than that it was not its own.
        _say([f"told to end by {run.watcher.notice} at step {step:,}"])
    run.watcher.hear(is_over)
    _save_last(run, step)
    run.progress.say(
        f"stopped by {run.watcher.notice} and saved at step {step:,}; the "
        "same command goes on from there"
    )
    return True


def _save_last(run: _Run, step: int) -> None:
    """Saves before the run ends; on all workers, or the run has failed.

    Raises:
        StorageError: a worker could not save.
    """
    checkpointer = run.checkpointer

    def begin() -> None:
        for each in run.claims:
            each.raise_if_lost()
        # What is being written may fail, and is made good by this one.
        checkpointer.begin_last(step, _facts(run, step))

    with run.ledger.spending("save"):
        _wait(run, run.checkpointer.wait)
        workers.together(run.strategy, run.cluster, begin)
        _wait(run, run.checkpointer.wait)
        workers.together(run.strategy, run.cluster, checkpointer.drain)


def _wait(run: _Run, is_ready: Callable[[float], bool]) -> None:
    """Waits until all workers are ready.

    A slow store may take longer than a collective waits for a worker, and
    than the watchdog waits for a step.

    Args:
        run: the run.
        is_ready: waits for some seconds; returns whether this worker is.
    """
    is_waiting = True
    while is_waiting:
        mine = (not is_ready(1.0),)
        _beat(run, int(run.gan.step.numpy()))
        [is_waiting] = workers.agree(run.strategy, run.cluster, mine)


def _facts(run: _Run, step: int) -> manager.Facts:
    recorder = run.recorder
    return manager.Facts(
        metrics=recorder.last,
        log=recorder.state_of(step),
        sync=recorder.sync,
        publish=recorder.publish,
    )


def _say(notes: Iterable[str]) -> None:
    for note in notes:
        print(note, file=sys.stderr, flush=True)


def _check_replicas(run: _Run, step: int) -> None:
    """Checks, before a save, that the state is the same on all replicas.

    Raises:
        RuntimeError: it is not.
    """
    differing = run.gan.differing_variables()
    if differing:
        raise RuntimeError(
            f"at step {step} the replicas differ in {len(differing)} "
            f"variables, the first is {differing[0]}; nothing was saved. A "
            "variable that a model assigns by itself must get the same value "
            "on every replica."
        )


def _draw_samples(run: _Run, step: int) -> None:
    """Writes the grid of the fixed latents; the chief does, if it has time."""
    if not run.cluster.is_chief or run.watcher.secs_left < _DRAWING_SECS:
        return
    grid = drawing.fixed_grid(
        run.gan.ema_generator, run.config, run.source.num_classes
    )
    png = images.encode_png(grid)
    try:
        images.write(_grid_path(run.config, step), png)
    except OSError as error:
        _say([f"the grid was not written: {files.reason(error)}"])
    run.recorder.write_image(step, "samples", png)


def _grid_path(config: Config, step: int) -> str:
    return os.path.join(config.run_dir, "samples", f"step-{step:06}.png")


def _introduction(run: _Run, restored: str) -> str:
    """Says what is about to happen, in a line for each question."""
    config, source, gan = run.config, run.source, run.gan
    height, width, channels = source.image_shape
    classes = f", {source.num_classes} classes" if source.num_classes else ""
    replicas = run.strategy.num_replicas_in_sync
    start = f"resumed from {restored}" if restored else "a fresh start"
    return "\n".join(
        (
            f"data      {source.name}: {source.num_images:,} images "
            f"{height}x{width}x{channels}{classes}",
            f"model     {config.model}: generator "
            f"{_count(gan.networks.generator)}, discriminator "
            f"{_count(gan.networks.discriminator)} parameters",
            f"devices   {config.strategy}: {replicas} "
            f"replica{'s' if replicas > 1 else ''} on "
            f"{_device_kind()}, batch {config.batch_size}, {config.precision}",
            f"run       {config.run_dir}: {start}, "
            f"{config.num_steps:,} steps in all",
        )
    )


def _count(network: keras.Model) -> str:
    count = sum(
        int(np.prod(weight.shape)) for weight in network.trainable_weights
    )
    return f"{count:,}"


def _device_kind() -> str:
    return "GPU" if tf.config.get_visible_devices("GPU") else "CPU"
