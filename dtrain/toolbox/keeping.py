"""Commands of `checkpoint_tool` on what is kept: prune, pin, unpin."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence

from dtrain import errors
from dtrain.checkpoint import listing, opening, pins, retention, writing
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manifest import DamagedError
from dtrain.errors import UserError
from dtrain.storage import files


def prune(arguments: argparse.Namespace) -> int:
    """Removes what no policy keeps.

    Raises:
        UserError: no policy is named, there is nothing to remove, or what is
            kept is damaged.
    """
    policies = retention.of_flags(arguments)
    if not policies:
        raise UserError(
            "name what is kept, as --max_to_keep=3 or --keep_best=2"
        )
    path = _of_checkpoints(arguments.directory)
    directory = CheckpointDirectory(path)
    with files.storage_errors(path):
        has_any = bool(directory.steps())
    if not has_any:
        # Before a lock is left there.
        raise UserError(
            f"{path} holds no checkpoints of dtrain, and those of another "
            "program are not removed; CheckpointManager.restore takes them over"
        )
    with files.storage_errors(path), writing.claimed(path):
        saved = []
        for step in directory.steps():
            with _damage(directory.prefix(step)):
                manifest = directory.manifest(step)
            saved.append(
                retention.Saved(step, manifest.saved_at, manifest.metrics)
            )
        with _damage(f"{path}/pins.json"):
            pinned = frozenset(pins.read(path).values())
        kept = retention.kept(saved, (*policies, retention.Pinned(pinned)))
        gone = [state.step for state in saved if state.step not in kept]
        if gone and not arguments.dry_run:
            # If it were damaged, the others would be all there is.
            with _damage(directory.prefix(max(kept))):
                directory.verify(max(kept))
        _remove(directory, gone, dry_run=arguments.dry_run)
        if not arguments.dry_run:
            times = {state.step: state.saved_at for state in saved}
            directory.point(
                {step: times[step] for step in times if step in kept}
            )
    print(f"{len(kept)} kept: {', '.join(map(str, sorted(kept)))}")
    return errors.FINISHED


def _of_checkpoints(directory: str) -> str:
    """Returns the directory of the checkpoints, of a run's too."""
    path = directory.rstrip("/")
    inside = f"{path}/checkpoints"
    return inside if listing.find(inside) else path


def _remove(
    directory: CheckpointDirectory, steps: Sequence[int], *, dry_run: bool
) -> None:
    for step in steps:
        prefix = directory.prefix(step)
        if dry_run:
            print(f"would remove {prefix}")
        elif directory.remove(step):
            print(f"removed {prefix}")
        else:
            print(f"somebody reads {prefix}: it stays")


@contextlib.contextmanager
def _damage(path: str) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise UserError(f"{path}: {error}") from error


def pin(arguments: argparse.Namespace) -> int:
    """Keeps a checkpoint for ever.

    Raises:
        UserError: there is none, or another program saved it, which knows of
            no pins.
    """
    prefix = opening.resolve(arguments.checkpoint)
    if not opening.manifest_of(prefix):
        raise UserError(
            f"{prefix} was not saved by dtrain, and who saved it knows of no "
            f"pins; copy it: edit {prefix} --output=kept/ckpt-0"
        )
    path, step = opening.target(prefix)
    with files.storage_errors(path), _damage(f"{path}/pins.json"):
        pins.add(path, step, arguments.name)
    print(f"{prefix} is pinned as {arguments.name}")
    return errors.FINISHED


def unpin(arguments: argparse.Namespace) -> int:
    """Lets a pinned checkpoint go."""
    path = _of_checkpoints(arguments.directory)
    with files.storage_errors(path), _damage(f"{path}/pins.json"):
        pins.remove(path, arguments.name)
    print(f"nothing is pinned as {arguments.name} any more")
    return errors.FINISHED
