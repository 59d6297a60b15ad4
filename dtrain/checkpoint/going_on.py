"""Where a run goes on: from the newest checkpoint that verifies.

The directories are listed, and no pointer file is trusted. What does not
verify is put aside, and the next older one is tried. Where there are
checkpoints and none verifies, the run stops: it never starts over by itself.
How several workers take the same one is in `exchange`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from dtrain.bundle import restore as whole_restore
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.errors import StorageError, UserError
from dtrain.storage import files

# Of somebody who reads where another writes, and keeps little.
_NUM_TRIES = 5


class Place(NamedTuple):
    """Where checkpoints may be that this worker can read.

    Attributes:
        directory: of the checkpoints; it need not exist.
        is_mine: whether this worker, and it alone, may change it.
        run_id: of the run whose checkpoints count; empty if any do. A place
            that is named after a path may hold those of an earlier run there.
    """

    directory: CheckpointDirectory
    is_mine: bool
    run_id: str = ""


class Verified(NamedTuple):
    """A checkpoint that was read and is what was written.

    Attributes:
        directory: where it is.
        manifest: what it is.
    """

    directory: CheckpointDirectory
    manifest: Manifest

    @property
    def prefix(self) -> str:
        """What TensorFlow restores from."""
        return self.directory.prefix(self.manifest.step)


class Search(NamedTuple):
    """What a worker has found in its places.

    Attributes:
        newest: the newest checkpoint that verifies; None if there is none.
        notes: a line for each checkpoint that does not verify, which was put
            aside or passed over, and for each of another run.
        holds_something: whether there is a checkpoint of the run, even a
            damaged one that was put aside: where nothing verifies, the run is
            then refused instead of started over.
    """

    newest: Verified | None
    notes: list[str]
    holds_something: bool


def search(
    places: Sequence[Place],
    how: str,
    below: int | None = None,
    every_steps: int = 1,
) -> Search:
    """Finds the newest checkpoint that verifies.

    Newer ones, which do not verify, are moved to `quarantine/` where the place
    is this worker's. If none verifies, none is moved.

    Args:
        places: in order of preference, for checkpoints of the same step.
        how: full or sizes.
        below: only checkpoints of earlier steps are looked at; None is all.
        every_steps: only those whose step is a multiple of this; 0 is all.

    Raises:
        OSError: a place cannot be read.
    """
    bad: list[tuple[Place, int, str]] = []
    others: list[str] = []
    unreadable: list[OSError] = []
    for place, step in _candidates(places):
        is_wanted = below is None or step < below
        if not is_wanted or step % (every_steps or 1):
            continue
        verdict = _verify(place.directory, step, how)
        if isinstance(verdict, Manifest) and verdict.is_of(place.run_id):
            return Search(
                Verified(place.directory, verdict),
                others + [_put_aside(*candidate) for candidate in bad],
                holds_something=True,
            )
        if isinstance(verdict, Manifest):
            prefix = place.directory.prefix(step)
            others.append(f"{prefix} is of an earlier run; passed over")
        elif verdict:
            bad.append((place, step, str(verdict)))
            if isinstance(verdict.__cause__, OSError):
                unreadable.append(verdict.__cause__)
    if bad and len(unreadable) == len(bad):
        # It is the disk, and not what is on it.
        raise unreadable[0]
    set_aside = any(place.directory.quarantined() for place in places)
    notes = [_does_not_verify(*candidate) for candidate in bad]
    return Search(None, [*notes, *others], bool(bad) or set_aside)


def _verify(
    directory: CheckpointDirectory, step: int, how: str
) -> Manifest | DamagedError | None:
    """Verifies a checkpoint; None if who writes there has removed it."""
    failure: DamagedError | OSError
    try:
        return directory.verify(step, how)
    except (DamagedError, FileNotFoundError) as error:
        failure = error
    if step not in directory.candidates():
        return None
    if isinstance(failure, DamagedError):
        return failure
    raise failure


def _candidates(places: Sequence[Place]) -> list[tuple[Place, int]]:
    """Lists all that looks like a checkpoint, the one to be preferred first."""
    steps = [
        (place, step, order)
        for order, place in enumerate(places)
        for step in place.directory.candidates()
    ]
    steps.sort(key=lambda candidate: (-candidate[1], candidate[2]))
    return [(place, step) for place, step, _ in steps]


def _does_not_verify(place: Place, step: int, reason: str) -> str:
    return f"{place.directory.prefix(step)} does not verify: {reason}"


def _put_aside(place: Place, step: int, reason: str) -> str:
    line = _does_not_verify(place, step, reason)
    if not place.is_mine:
        return f"{line}; passed over"
    target = place.directory.quarantine(step, reason)
    return f"{line}; moved to {target}"


def choose(
    places: Sequence[Place], where: str, how: str, step: int | None = None
) -> tuple[Verified, list[str]]:
    """Finds the checkpoint that somebody asks for: of a step, or the newest.

    Args:
        places: in order of preference, for checkpoints of the same step.
        where: what the places are called in an error.
        how: full or sizes.
        step: which; None is the newest that verifies.

    Returns:
        The checkpoint, and a line for each newer one that does not verify.

    Raises:
        UserError: there is none, or it does not verify.
        OSError: a place cannot be read.
    """
    steps = {saved for place in places for saved in place.directory.steps()}
    if step is not None:
        places = [place for place in places if step in place.directory.steps()]
    seen = search(places, how, None if step is None else step + 1)
    if seen.newest and step in (None, seen.newest.manifest.step):
        return seen.newest, seen.notes
    if step in steps:
        raise UserError(f"{seen.notes[0]}; choose another step")
    listed = ", ".join(map(str, sorted(steps))) or "none"
    wanted = " that can be used" if step is None else f" of step {step}"
    raise UserError(
        f"{where} holds no checkpoint{wanted}; there: {listed}", seen.notes
    )


def put_aside_after(
    directory: CheckpointDirectory, step: int, reason: str
) -> None:
    """Puts aside the checkpoints newer than a step, which the run goes back to.

    Args:
        directory: one that this process alone may change.
        step: the newest that stays.
        reason: why, for whoever looks at them later.

    Raises:
        OSError: the directory cannot be written to.
    """
    for saved in directory.steps():
        if saved > step:
            directory.quarantine(saved, reason)


def restore(
    verified: Verified,
    checkpoint: tf.train.Checkpoint,
    *,
    what: str = "the program",
    remedy: str = "",
) -> None:
    """Restores all variables from a checkpoint, or changes none.

    Args:
        verified: the checkpoint on the disk.
        checkpoint: the state that is restored into; its variables exist.
        what: what is restored into, in the words of an error.
        remedy: what to do if it does not fit, likewise.

    Raises:
        UserError: it does not fit; the text ends with the edit that repairs
            it, if one is known.
        StorageError: the disk or the store cannot be read, or it is damaged,
            where only its sizes were looked at.
    """
    try:
        with (
            files.storage_errors(verified.prefix),
            verified.directory.reading(verified.manifest.step) as prefix,
        ):
            whole_restore.restore(
                checkpoint,
                prefix,
                verified.prefix,
                what=what,
                remedy=remedy,
                # See `takeover`.
                is_stock="dtrain" not in verified.manifest.versions,
            )
    except DamagedError as error:
        raise StorageError(f"{verified.prefix}: {error}") from error


def restore_chosen(
    places: Sequence[Place],
    where: str,
    how: str,
    checkpoint: tf.train.Checkpoint,
    step: int | None = None,
    **words: str,
) -> tuple[Verified, list[str]]:
    """Restores the checkpoint that somebody asks for; see `choose`.

    Another is chosen if it is removed meanwhile, by whoever writes there; or,
    if only the sizes were looked at, if it turns out to be damaged.

    Args:
        places: see `choose`.
        where: see `choose`.
        how: full or sizes.
        checkpoint: see `restore`.
        step: see `choose`.
        **words: see `restore`.

    Returns:
        The checkpoint, and a line for each newer one that does not verify.

    Raises:
        UserError: there is none, it does not verify, or it does not fit.
        StorageError: the disk or the store cannot be read.
        OSError: a place cannot be read.
    """
    for _ in range(_NUM_TRIES):
        verified, notes = choose(places, where, how, step)
        try:
            restore(verified, checkpoint, **words)
        except StorageError:
            is_gone = verified.manifest.step not in verified.directory.steps()
            if how == "full" and not is_gone:
                raise
            how = "full"
        else:
            return verified, notes
    raise StorageError(
        f"{where}: what is restored is removed, time and again; keep more"
    )
