"""What `checkpoint_tool` does with what is kept: prune, pin, unpin."""

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
        UserError: nothing says what is kept, or something is damaged.
    """
    policies = retention.of_flags(arguments)
    if not policies:
        raise UserError(
            "name what is kept, as --max_to_keep=3 or --keep_best=2"
        )
    path = arguments.directory.rstrip("/")
    if listing.find(f"{path}/checkpoints"):
        path = f"{path}/checkpoints"
    directory = CheckpointDirectory(path)
    with files.storage_errors(path), writing.claimed(path):
        saved = []
        for step in directory.steps():
            with _damage(directory.prefix(step)):
                made = directory.manifest(step)
            saved.append(retention.Saved(step, made.saved_at, made.metrics))
        if not saved:
            raise UserError(f"{path} holds no checkpoints of dtrain")
        with _damage(f"{path}/pins.json"):
            pinned = frozenset(pins.read(path).values())
        kept = retention.kept(saved, (*policies, retention.Pinned(pinned)))
        gone = [each.step for each in saved if each.step not in kept]
        if gone and not arguments.dry_run:
            # The newest is all there is if the others go.
            with _damage(directory.prefix(max(kept))):
                directory.verify(max(kept))
        _remove(directory, gone, dry_run=arguments.dry_run)
        if not arguments.dry_run:
            directory.point(
                {
                    each.step: each.saved_at
                    for each in saved
                    if each.step in kept
                }
            )
    print(f"{len(kept)} kept: {', '.join(map(str, sorted(kept)))}")
    return errors.FINISHED


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
    """Says what is damaged.

    Raises:
        UserError: it is.
    """
    try:
        yield
    except DamagedError as error:
        raise UserError(f"{path}: {error}") from error


def pin(arguments: argparse.Namespace) -> int:
    """Keeps a checkpoint for ever."""
    prefix = opening.resolve(arguments.checkpoint)
    path, step = opening.target(prefix)
    with files.storage_errors(path), _damage(f"{path}/pins.json"):
        pins.add(path, step, arguments.name)
    print(f"{prefix} is pinned as {arguments.name}")
    return errors.FINISHED


def unpin(arguments: argparse.Namespace) -> int:
    """Lets a pinned checkpoint go."""
    path = arguments.directory.rstrip("/")
    if listing.find(f"{path}/checkpoints"):
        path = f"{path}/checkpoints"
    with files.storage_errors(path), _damage(f"{path}/pins.json"):
        pins.remove(path, arguments.name)
    print(f"nothing is pinned as {arguments.name} any more")
    return errors.FINISHED
