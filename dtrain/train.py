"""The training loop: one for every strategy.

The devices run `steps_per_loop` steps at a time; between two such loops the
host writes the metrics, asks whether the run is to stop, and saves what is
due. A loop ends early where a checkpoint or a grid of samples is due, so
these are functions of the step and not of how the run was cut.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf

from dtrain import errors
from dtrain.checkpoint.tier import Facts
from dtrain.cluster import strategy as strategy_lib
from dtrain.cluster import xla_cache
from dtrain.cluster.environment import Cluster
from dtrain.cluster.workers import Workers, is_lost_worker
from dtrain.config import Config
from dtrain.data import pipeline
from dtrain.errors import UserError
from dtrain.gan import divergence, memory
from dtrain.record import samples
from dtrain.record.periodic import UnfinishedError
from dtrain.resilience.watchdog import Watchdog
from dtrain.resilience.watcher import Watcher
from dtrain.run import best
from dtrain.run.opening import Run, introduce, open_run, say
from dtrain.run.rehearsal import rehearse
from dtrain.storage import files


def train(
    config: Config,
    cluster: Cluster,
    watcher: Watcher,
    dog: Watchdog,
    leave: Callable[[int], int] = int,
) -> int:
    """Trains a GAN, from the newest state of its run directory if it has one.

    Every worker calls this.

    Args:
        config: the run's settings.
        cluster: the workers, and which of them this is.
        watcher: started; sees the notices that tell this process to end.
        dog: started; ends the process if the run makes no progress.
        leave: called with the exit code when all is done, before the input
            pipeline is taken down. A program passes `errors.leave`, which ends
            the process there; the default returns the code.

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
                workers = Workers(strategy_lib.make(config, cluster), cluster)
                # Building it may have put TensorFlow's own handlers in place.
                watcher.arm()
                code, kept = _run(config, workers, watcher, dog, stack)
            # A worker that leaves takes the collectives of the others with it.
            # One of them may still have a store to wait for.
            with dog.patience():
                workers.meet()
        code = leave(code)
        kept.clear()
        return code
    except Exception as error:
        if cluster.num_workers > 1 and is_lost_worker(error):
            _leave_at_once(error)
        raise


def _run(
    config: Config,
    workers: Workers,
    watcher: Watcher,
    dog: Watchdog,
    stack: contextlib.ExitStack,
) -> tuple[int, list[Any]]:
    """Returns the exit code, and what takes too long to be taken down."""
    if config.dry_run:
        return rehearse(config, workers), []
    run, restored = open_run(config, workers, watcher, dog, stack)
    introduce(run, restored)
    code = _loop(run)
    run.ledger.close(code, watcher.notice)
    return code, run.inputs


def _leave_at_once(error: Exception) -> NoReturn:
    """Ends this process because another worker is gone."""
    reason = " ".join(str(error).split())[:200]
    print(
        f"lost another worker ({reason}); run again to go on from the last "
        "save",
        file=sys.stderr,
    )
    # A normal exit waits up to 20 s for the worker that is gone.
    errors.leave(errors.LOST_WORKER)


def _loop(run: Run) -> int:
    config = run.config
    step, iterator = _input(run)
    _beat(run, step)
    # One step, for there is nothing to save before it is done; then more and
    # more, for the watchdog to learn how long a step takes.
    num_steps = ramp = 1
    started = step
    is_held = _take_up(run, step)
    while step < config.num_steps or is_held:
        # At the top, for a notice that came while all was built.
        if _stop_or_save(run, step):
            return errors.RUN_AGAIN
        with run.ledger.spending("train"):
            metrics, verdict = _run_steps(run, iterator, step, num_steps)
        first_step = step + 1
        step += len(next(iter(metrics.values())))
        if first_step == started + 1:
            _refuse_model_that_differs(run, step)
            best.refuse_unknown(config, metrics, run.periodic)
        run.ledger.progress(step)
        run.watcher.begin(run.step.stop)
        run.progress.update(step, metrics)
        is_fine = verdict == divergence.FINE
        figures = _run_periodic(run, step) if is_fine else {}
        # Or the log of another run would be written to.
        run.checkpointer.check_claims()
        is_held = figures is None
        if is_held:
            run.recorder.hold(first_step, metrics)
        else:
            speed = run.progress.images_per_sec
            run.recorder.write(first_step, metrics, figures, speed)
        if not is_fine:
            with run.ledger.spending("restore"), run.watchdog.patience():
                _roll_back(run, step, verdict)
            step, iterator = _input(run)
            is_held = _take_up(run, step)
        _beat(run, step)
        ramp = min(2 * ramp, config.steps_per_loop)
        num_steps = min(ramp, _loop_length(run, step))
    _refuse_differing(run, step)
    _save_last(run, step)
    with run.watchdog.patience():
        say(filter(None, [run.checkpointer.complete()]))
    last_grid = samples.grid_path(config, step)
    run.progress.say(f"finished: step {step:,}, the last grid is {last_grid}")
    return errors.FINISHED


def _take_up(run: Run, step: int) -> bool:
    """Does again what a notice has ended at the step that the run goes on from.

    Tells whether a notice has ended it again.
    """
    [owes] = run.workers.agree(run.recorder.owes)
    if not owes:
        return False
    # A notice ends it, and no more: what has been seen by then is kept.
    run.watcher.begin(run.step.stop)
    figures = _run_periodic(run, step)
    if figures is None:
        return True
    run.recorder.finish(figures)
    run.checkpointer.save_again()
    return False


def _run_periodic(run: Run, step: int) -> dict[str, float] | None:
    """Does what is due at a step; returns the figures of all of it.

    None if a notice has ended it before it was done.
    """
    figures: dict[str, float] = {}
    for periodic in run.periodic:
        if periodic.is_due(step, run.config.num_steps):
            with run.ledger.spending(periodic.spends), run.watchdog.patience():
                # With a store that is away, it is tried for minutes.
                try:
                    figures |= periodic.run(step)
                except UnfinishedError:
                    return None
                # The others must be as patient.
                run.workers.meet()
    return figures


def _beat(run: Run, step: int) -> None:
    """Tells the ledger, and the watchdog, how many steps are done."""
    run.ledger.progress(step)
    run.watchdog.beat(step, run.checkpointer.saved_step)


def _input(run: Run) -> tuple[int, Any]:
    """Returns how many steps are done, and the real images for the next."""
    step = int(run.gan.step.numpy())
    skipped = int(run.gan.divergence.skipped_steps.numpy())
    iterator = pipeline.make_iterator(
        run.data,
        run.config,
        run.workers.strategy,
        step + skipped,
        run.step.num_draws,
    )
    run.inputs.append(iterator)
    if run.config.xla_cache_dir:
        # Before a save begins: its thread counts in the names, too.
        with run.ledger.spending("train"):
            run.step.trace(iterator)
    return step, iterator


def _run_steps(
    run: Run, iterator: Any, step: int, num_steps: int
) -> tuple[Mapping[str, np.ndarray], int]:
    """Runs some steps; returns their metrics by name, and the verdict.

    Raises:
        UserError: an image cannot be read; it is named. Or a step takes more
            memory than there is.
        StorageError: XLA could not keep what it has compiled.
        OpError: something else failed.
    """
    try:
        metrics, verdict = run.step.run(iterator, tf.constant(num_steps))
        return (
            {name: column.numpy() for name, column in metrics.items()},
            int(verdict.numpy()),
        )
    except tf.errors.OpError as error:
        if is_lost_worker(error):
            raise
        mistake = xla_cache.fault(run.config, error.message)
        mistake = mistake or memory.out_of_memory(error, run.estimate)
        if mistake is not None:
            raise mistake from error
        step += int(run.gan.divergence.skipped_steps.numpy())
        mistake = pipeline.explain(
            error, run.data, run.config, step, run.step.num_draws
        )
        if mistake is None:
            raise
        raise mistake from error


def _roll_back(run: Run, step: int, verdict: int) -> None:
    """Goes back to the last good checkpoint, and skips the data since then.

    Every worker calls this: all have seen the same numbers.

    Raises:
        UserError: the run has gone back `max_rollbacks` times already.
    """
    config, state = run.config, run.gan.divergence
    reason, counts = divergence.describe(verdict, config), state.counts
    if counts.rollbacks >= config.max_rollbacks:
        raise errors.UserError(
            f"diverged at step {step:,}: {reason}. The run has gone back "
            f"{counts.rollbacks} times (max_rollbacks) and left out the data "
            f"of {counts.skipped_steps:,} steps; lower the learning rates, or "
            "look at metrics.jsonl"
        )
    _wait(run, run.checkpointer.wait)
    limits = divergence.healthy_below(verdict, step, counts, config)
    restored = run.checkpointer.roll_back(run.workers, step, limits)
    state.roll_back(counts, restored.step, step)

    def rewind() -> None:
        with files.storage_errors(config.run_dir):
            run.recorder.rewind(restored.step, restored.log, restored.metrics)

    run.workers.together(rewind)
    run.progress.say(
        f"diverged at step {step:,}: {reason}; back to step {restored.step:,}, "
        f"without the data that led there ({counts.rollbacks + 1} of at most "
        f"{config.max_rollbacks})"
    )


def _loop_length(run: Run, step: int) -> int:
    """Counts the steps until the host has something to do again."""
    config = run.config
    ends = [step + config.steps_per_loop, config.num_steps]
    intervals = [periodic.every_steps for periodic in run.periodic]
    for every_steps in (config.checkpoint_every_steps, *intervals):
        if every_steps:
            ends.append((step // every_steps + 1) * every_steps)
    return min(ends) - step


def _stop_or_save(run: Run, step: int) -> bool:
    """Saves where a save is due; returns whether the run is to stop.

    All that the workers have to agree on between two loops is agreed on here.

    Raises:
        StorageError: a worker could not save, and `on_save_error` is stop.
    """
    run.checkpointer.check_claims()
    failure = run.checkpointer.rearm_failed_save()
    ends_it = bool(failure) and run.config.on_save_error == "stop"
    say(filter(None, [run.recorder.failure()]))
    if failure and not ends_it:
        say([f"{failure}; training goes on from what was saved before"])
    stop, is_over, save, give_up, is_full = run.workers.agree(
        run.watcher.requested,
        run.watcher.is_over,
        run.checkpointer.due(step),
        ends_it,
        not run.checkpointer.wait_for_room(0.0),
    )
    if give_up:
        raise errors.StorageError(failure or "another worker could not save")
    if stop or save:
        _refuse_differing(run, step)
    if not stop:
        if save:
            with run.ledger.spending("save"):
                if is_full:
                    _wait(run, run.checkpointer.wait_for_room)
                run.checkpointer.save(step, _facts(run, step))
        return False
    if run.watcher.requested and not run.workers.is_chief:
        # The chief may know no more than that it was not its own.
        say([f"told to end by {run.watcher.notice} at step {step:,}"])
    run.watcher.hear(is_over)
    _save_last(run, step)
    run.progress.say(
        f"stopped by {run.watcher.notice} and saved at step {step:,}; the "
        "same command goes on from there"
    )
    return True


def _save_last(run: Run, step: int) -> None:
    """Saves before the run ends; fails on all workers if it does on one."""
    checkpointer = run.checkpointer

    def begin() -> None:
        run.checkpointer.check_claims()
        checkpointer.begin_last(step, _facts(run, step))

    with run.ledger.spending("save"):
        # A save that still runs may fail, which the last one makes good.
        _wait(run, checkpointer.wait)
        run.workers.together(begin)
        _wait(run, checkpointer.wait)
        run.workers.together(checkpointer.drain)


def _wait(run: Run, is_ready: Callable[[float], bool]) -> None:
    """Waits until `is_ready`, which waits for some seconds, is true of all.

    A slow store may take longer than a collective waits for a worker, and
    than the watchdog waits for a step: so all meet and are heard of meanwhile.
    """
    is_waiting = True
    while is_waiting:
        is_this_ready = is_ready(1.0)
        _beat(run, int(run.gan.step.numpy()))
        [is_waiting] = run.workers.agree(not is_this_ready)


def _facts(run: Run, step: int) -> Facts:
    recorder = run.recorder
    return Facts(
        metrics=recorder.last,
        log=recorder.state_of(step),
        sync_log=recorder.sync,
        publish_log=recorder.publish,
    )


def _refuse_model_that_differs(run: Run, step: int) -> None:
    """Refuses a model whose first step leaves the replicas different.

    Raises:
        UserError: it does; later on it is the hardware's fault, and not its.
    """
    differing = run.replicas.differing()
    if differing:
        raise UserError(
            f"after step {step} the replicas differ in {len(differing)} "
            f"variables, the first is {differing[0]}: a variable that a model "
            "assigns by itself must get the same value on every replica; make "
            "it of a mean over all of them"
        )


def _refuse_differing(run: Run, step: int) -> None:
    """Refuses to save a state that is not the same on all replicas.

    Raises:
        RuntimeError: a variable differs; the first is named.
    """
    differing = run.replicas.differing()
    if differing:
        raise RuntimeError(
            f"at step {step} the replicas differ in {len(differing)} "
            f"variables, the first is {differing[0]}; nothing was saved. A "
            "variable that a model assigns by itself must get the same value "
            "on every replica."
        )
