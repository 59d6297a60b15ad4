"""Where a run goes on.

What is there is listed, no pointer is trusted, and the newest state that
verifies is taken. What does not verify is put aside, and the run falls back.
Where something looks like a checkpoint and nothing verifies, the run stops: it
never starts over by itself. How several workers take the same is in `exchange`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from dtrain.bundle import restore as whole_restore
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.errors import UserError
from dtrain.storage import files


class Place(NamedTuple):
    """A directory of checkpoints that this worker can read.

    Attributes:
        directory: what it holds.
        is_mine: whether this worker, and it alone, may change it.
    """

    directory: CheckpointDirectory
    is_mine: bool


class Found(NamedTuple):
    """A state that verifies.

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
    """What a worker has seen.

    Attributes:
        found: the newest state that verifies; None if there is none.
        notes: a line for each state that was put aside or passed over.
        holds_something: whether there was anything that looks like one.
    """

    found: Found | None
    notes: list[str]
    holds_something: bool


def search(
    places: Sequence[Place],
    how: str,
    below: int | None = None,
    every_steps: int = 1,
) -> Search:
    """Finds the newest state that verifies.

    What is newer, and does not, is moved to `quarantine/` where it is this
    worker's; if nothing verifies, nothing is moved.

    Args:
        places: in order of preference, for states of the same step.
        how: full or sizes.
        below: only states of earlier steps; None is all.
        every_steps: only states whose step is a multiple of this.

    Returns:
        What was found.

    Raises:
        OSError: a place cannot be read.
    """
    candidates = [
        (step, place)
        for step, place in _newest_first(places)
        if (below is None or step < below) and step % (every_steps or 1) == 0
    ]
    bad: list[tuple[Place, int, str]] = []
    unreadable: list[OSError] = []
    for step, place in candidates:
        try:
            made = place.directory.verify(step, how)
        except DamagedError as error:
            bad.append((place, step, str(error)))
            if isinstance(error.__cause__, OSError):
                unreadable.append(error.__cause__)
            continue
        return Search(
            Found(place.directory, made),
            [_put_aside(*each) for each in bad],
            holds_something=True,
        )
    if bad and len(unreadable) == len(bad):
        # It is the disk, and not what is on it.
        raise unreadable[0]
    set_aside = any(place.directory.quarantined() for place in places)
    notes = [_does_not_verify(*candidate) for candidate in bad]
    return Search(None, notes, bool(bad) or set_aside)


def _does_not_verify(place: Place, step: int, reason: str) -> str:
    return f"{place.directory.prefix(step)} does not verify: {reason}"


def _newest_first(places: Sequence[Place]) -> list[tuple[int, Place]]:
    """Lists what looks like a checkpoint; of a step, the preferred first."""
    candidates = [
        (step, -order, place)
        for order, place in enumerate(places)
        for step in place.directory.candidates()
    ]
    candidates.sort(key=lambda candidate: candidate[:2], reverse=True)
    return [(step, place) for step, _, place in candidates]


def _put_aside(place: Place, step: int, reason: str) -> str:
    line = _does_not_verify(place, step, reason)
    if not place.is_mine:
        return f"{line}; passed over"
    target = place.directory.quarantine(step, reason)
    return f"{line}; moved to {target}"


def choose(
    places: Sequence[Place], where: str, how: str, step: int | None = None
) -> tuple[Found, list[str]]:
    """Finds the state that somebody asks for: of a step, or the newest.

    Args:
        places: in order of preference, for states of the same step.
        where: what the places are called.
        how: full or sizes.
        step: which; None is the newest that verifies.

    Returns:
        What was found, and a line for each state that does not verify.

    Raises:
        UserError: there is none, or it does not verify.
        OSError: a place cannot be read.
    """
    there = {found for place in places for found in place.directory.steps()}
    if step is None:
        seen = search(places, how)
    else:
        holding = [place for place in places if step in place.directory.steps()]
        seen = search(holding, how, step + 1)
    if seen.found and step in (None, seen.found.manifest.step):
        return seen.found, seen.notes
    if step in there:
        raise UserError(f"{seen.notes[0]}; choose another step")
    listed = ", ".join(map(str, sorted(there))) or "none"
    wanted = " that can be used" if step is None else f" of step {step}"
    raise UserError(
        f"{where} holds no checkpoint{wanted}; there: {listed}", seen.notes
    )


def put_aside_after(
    directory: CheckpointDirectory, step: int, reason: str
) -> None:
    """Puts aside what is newer than a step: the run has another future.

    Args:
        directory: this process's own.
        step: the newest that stays.
        reason: why, for whoever looks at it later.

    Raises:
        OSError: the directory cannot be written to.
    """
    for saved in directory.steps():
        if saved > step:
            directory.quarantine(saved, reason)


def restore(
    found: Found,
    checkpoint: tf.train.Checkpoint,
    *,
    what: str = "the program",
    remedy: str = "",
) -> None:
    """Restores all variables from what verifies, or changes none.

    Args:
        found: of `search`, `choose` or `agree`.
        checkpoint: what is restored into; its variables exist.
        what: it should fit.
        remedy: what can be done about it if it does not.

    Raises:
        UserError: it does not fit; the text ends with the edit that repairs
            it, if one is known.
        StorageError: the disk or the store cannot be read.
    """
    with (
        files.storage_errors(found.prefix),
        found.directory.reading(found.manifest.step) as prefix,
    ):
        whole_restore.restore(
            checkpoint, prefix, found.prefix, what=what, remedy=remedy
        )
