"""Restores a run: its newest state, or its last good one."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from dtrain.checkpoint import exchange, going_on, listing, pins
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.cluster.environment import ALONE
from dtrain.cluster.workers import Workers
from dtrain.config import Config, ModelSettings, RunSettings
from dtrain.errors import StorageError, UserError
from dtrain.resilience import status
from dtrain.run import places
from dtrain.run.tiers import Tiers
from dtrain.storage import files


class Restored(NamedTuple):
    """What a run goes on from.

    Attributes:
        prefix: of the checkpoint; empty for a run that starts.
        manifest: of the checkpoint; None for a run that starts.
        notes: lines for the user: of each checkpoint that does not verify, and
            of a damaged list of pins.
    """

    prefix: str
    manifest: Manifest | None
    notes: list[str]


def restore(
    checkpoint: tf.train.Checkpoint, tiers: Tiers, workers: Workers
) -> Restored:
    """Restores the newest state of the run. Every worker calls this.

    Args:
        checkpoint: what is restored into.
        tiers: of this worker.
        workers: of the run.

    Returns:
        What was restored.

    Raises:
        UserError: there is a state and `resume` is never, there is none and
            it is must, none can be used, or it does not fit the networks.
        StorageError: a disk or the store failed.
    """
    try:
        return _restore_newest(checkpoint, tiers, workers, tiers.config.verify)
    except StorageError:
        # On all workers alike: see `together`.
        if tiers.config.verify == "full":
            raise
    # Its sizes did not show that it is damaged, if it is.
    return _restore_newest(checkpoint, tiers, workers, "full")


def _restore_newest(
    checkpoint: tf.train.Checkpoint, tiers: Tiers, workers: Workers, how: str
) -> Restored:
    config = tiers.config
    seen = workers.together(lambda: _search(tiers, how))
    with contextlib.ExitStack() as stack:
        newest = exchange.agree(workers, seen, _own(tiers), stack)
        _check_resume(config, newest)
        [is_new] = workers.agree(_may_be_new(tiers, seen))
        if newest and is_new:
            raise UserError(
                f"{config.run_dir} holds no run, and backup_dir "
                f"({config.backup_dir}) has step {newest.manifest.step} of an "
                "earlier one; use --resume=must to go on from there, or remove "
                f"{places.backup_root(config)} to start over"
            )
        if newest is None:
            return Restored("", None, seen.notes)
        workers.together(lambda: _restore(checkpoint, newest, config))
    return Restored(newest.prefix, newest.manifest, seen.notes)


def look(tiers: Tiers) -> Restored:
    """Tells what this worker would restore, and changes nothing.

    Args:
        tiers: of a dry run.

    Raises:
        UserError: there is a state and `resume` is never, or there is none
            and it is must.
        StorageError: a disk or the store failed.
    """
    seen = _search(tiers, tiers.config.verify)
    newest = seen.newest
    _check_resume(tiers.config, newest)
    if newest is None:
        return Restored("", None, seen.notes)
    return Restored(newest.prefix, newest.manifest, seen.notes)


def roll_back(
    checkpoint: tf.train.Checkpoint,
    tiers: Tiers,
    workers: Workers,
    step: int,
    limits: Sequence[int],
) -> Manifest:
    """Restores the last good state of a run that has diverged.

    Every worker calls this, when nothing is being written. A checkpoint that
    was due by its step is preferred to one saved by the clock, so that a run
    goes back to the same one however often it was killed before.

    Args:
        checkpoint: what is restored into.
        tiers: of this worker.
        workers: of the run.
        step: at which it diverged.
        limits: steps; the state is the newest below the first of them that
            has any.

    Returns:
        The manifest of what was restored.

    Raises:
        UserError: nothing was saved before, or it cannot be used.
        StorageError: a disk or the store failed.
    """
    config = tiers.config
    seen = workers.together(lambda: _search_below(tiers, limits))
    with contextlib.ExitStack() as stack:
        good = exchange.agree(workers, seen, _own(tiers), stack)
        if good is None:
            raise UserError(
                f"the run diverged at step {step}, before anything was saved; "
                "lower the learning rates, or look at the data"
            )
        workers.together(lambda: _restore(checkpoint, good, config))
        tiers.forget_after(good.manifest.step)
        # A run that is killed now would go on from these, and diverge again.
        for place in places.find(config, tiers.cluster, tiers.run_id):
            if place.is_mine:
                going_on.put_aside_after(
                    place.directory,
                    good.manifest.step,
                    f"the run diverged at step {step}",
                )
    return good.manifest


def restore_step(
    checkpoint: tf.train.Checkpoint,
    config: Config,
    step: int | None = None,
    run_id: str = "",
) -> None:
    """Restores a state of a run, in whose directories nothing is changed.

    Args:
        checkpoint: what is restored into.
        config: the run's settings.
        step: which; None is the newest that verifies.
        run_id: of the run; empty if it has none.

    Raises:
        UserError: there is none, it is damaged, or it does not fit the
            networks.
        StorageError: the disk or the store cannot be read.
    """
    with files.storage_errors(config.run_dir):
        going_on.restore_chosen(
            _read_only(places.find(config, ALONE, run_id)),
            config.run_dir,
            config.verify,
            checkpoint,
            step,
            **_words(config),
        )


def _read_only(readable: list[going_on.Place]) -> list[going_on.Place]:
    return [place._replace(is_mine=False) for place in readable]


def _restore(
    checkpoint: tf.train.Checkpoint,
    verified: going_on.Verified,
    config: ModelSettings,
) -> None:
    going_on.restore(verified, checkpoint, **_words(config))


def _words(config: ModelSettings) -> dict[str, str]:
    """Returns what an error of `going_on.restore` calls things."""
    return {
        "what": f"the networks of --model={config.model}",
        "remedy": "make the model as it was, or name another run_dir",
    }


def _own(tiers: Tiers) -> going_on.CheckpointDirectory | None:
    """Returns where this worker keeps what it receives from another."""
    return tiers.backup.directory if tiers.backup else None


def _may_be_new(tiers: Tiers, seen: going_on.Search) -> bool:
    """Tells whether a person may want to start over; the chief alone can.

    That is where the run's directory is empty, and this host's own backups are
    older than that. Where the chief's host is a new one, they are another's.
    """
    config = tiers.config
    if not seen.newest or not tiers.cluster.is_chief or not config.backup_dir:
        return False
    if config.resume == "must" or status.is_restart():
        return False
    names = files.names(config.run_dir)
    root = places.backup_root(config)
    return (
        seen.newest.prefix.startswith(f"{root}/")
        and "config.json" not in names
        and "saved.json" not in names
    )


def _search(tiers: Tiers, how: str) -> going_on.Search:
    """Finds the newest state that this worker has, with notes for the user."""
    config = tiers.config
    with files.storage_errors(config.run_dir):
        readable = places.find(config, tiers.cluster, tiers.run_id)
        if config.resume == "never" or config.dry_run:
            # A state is refused, or only shown: nothing may be moved.
            readable = _read_only(readable)
        else:
            tiers.clean()
        seen = going_on.search(readable, how)
        recorded = listing.recorded(config.run_dir)
    pin_notes = _pin_notes(tiers)
    if recorded is None or seen.holds_something:
        return seen._replace(notes=[*seen.notes, *pin_notes])
    where = ", ".join(recorded) or "a directory that cannot be told"
    gone = f"{config.run_dir} was saved to {where}, and nothing of it is there"
    # As if there were something, so that `exchange.agree` refuses to start
    # over; the first note is what the user is told.
    notes = [*seen.notes, gone, *pin_notes]
    return going_on.Search(None, notes, holds_something=True)


def _search_below(tiers: Tiers, limits: Sequence[int]) -> going_on.Search:
    """Finds a state below the first possible limit; see `roll_back`."""
    config = tiers.config
    seen = going_on.Search(None, [], holds_something=False)
    with files.storage_errors(config.run_dir):
        readable = places.find(config, tiers.cluster, tiers.run_id)
        intervals = (config.checkpoint_every_steps, 1)
        for below, every_steps in itertools.product(limits, intervals):
            seen = going_on.search(readable, config.verify, below, every_steps)
            if seen.newest:
                break
    return seen


def _pin_notes(tiers: Tiers) -> list[str]:
    path = tiers.history.directory.path
    try:
        pins.read(path)
    except DamagedError as error:
        return [f"{path}/pins.json is damaged ({error}); all are kept"]
    return []


def _check_resume(
    config: RunSettings, newest: going_on.Verified | None
) -> None:
    resume, run_dir = config.resume, config.run_dir
    if newest is None and resume == "must":
        raise UserError(
            f"resume (must): {run_dir} holds no checkpoint to go on from; "
            "use --resume=auto"
        )
    if newest and resume == "never":
        raise UserError(
            f"resume (never): {run_dir} holds checkpoints up to step "
            f"{newest.manifest.step}; name another run_dir, or use "
            "--resume=auto"
        )
