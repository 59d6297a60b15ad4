"""Has all workers go on from the same state, whoever of them has it.

The newest of what they offer is taken by all; a worker that does not have it
receives it from one that has, over the strategy's own collectives.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from typing import Any

from dtrain.checkpoint import manifest
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.going_on import Found, Search
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.cluster.workers import Workers
from dtrain.errors import StorageError, UserError
from dtrain.storage import files

_CHUNK_BYTES = 16 << 20


def agree(
    workers: Workers,
    mine: Search,
    own: CheckpointDirectory | None,
    stack: contextlib.ExitStack,
) -> Found | None:
    """Has all workers go on from the newest state that any of them has.

    Every worker calls this.

    Args:
        workers: of the run.
        mine: what this worker has found.
        own: where this worker keeps what it receives; None keeps it for as
            long as `stack` is open.
        stack: takes what is to be removed.

    Returns:
        Where this worker has the state; None if no worker has any.

    Raises:
        UserError: something looks like a checkpoint, and nothing verifies.
        StorageError: what is to be sent cannot be read, or what was received
            cannot be written.
    """
    offer = (-1, 0)
    if mine.found:
        made = mine.found.manifest
        # Where there is no digest, the index has its checksums of the values.
        state = made.digest or made.index_sha256
        offer = (made.step, int(state[:15], 16))
    steps, digests = (workers.gather(number) for number in offer)
    held = workers.agree(mine.holds_something)[0]
    if max(steps) < 0 and held:
        raise UserError(_nothing_verifies(mine))
    offers = set(zip(steps, digests, strict=True))
    if len(offers) == 1:
        return mine.found
    source = steps.index(max(steps))
    wanted = (steps[source], digests[source])
    found = mine.found if offer == wanted else None
    return _share(workers, found, source, own, stack)


def _nothing_verifies(mine: Search) -> str:
    why = mine.notes[0] if mine.notes else "all there was is in quarantine/"
    return (
        f"there are checkpoints and none of them can be used ({why}); bring "
        "one back from a copy, or name another run_dir to start over"
    )


def _share(
    workers: Workers,
    found: Found | None,
    source: int,
    own: CheckpointDirectory | None,
    stack: contextlib.ExitStack,
) -> Found:
    """Sends a state from the worker of a replica to those without it.

    Returns:
        Where this worker has it.
    """
    encoded = found.manifest.encode() if found else b""
    sizes = workers.gather(len(encoded))
    encoded = workers.broadcast(encoded, sizes[source], source)
    made = manifest.decode(encoded)
    if found:

        def send() -> None:
            _transfer(workers, found, made, source)

        workers.together(_as_storage(send))
        return found

    def receive() -> Found:
        # Without a place the others would wait for this one: it takes part
        # all the same, and tells of it afterwards.
        failure: OSError | None = None
        made_at = ""
        try:
            made_at = stack.enter_context(
                tempfile.TemporaryDirectory(
                    prefix="dtrain-received-", dir=_beside(own)
                )
            )
        except OSError as error:
            failure = error
        prefix = f"{made_at}/received" if made_at else ""
        _transfer(workers, None, made, source, prefix)
        if failure:
            raise failure
        target = own or CheckpointDirectory(f"{made_at}/checkpoints")
        target.adopt(made, prefix)
        target.verify(made.step)
        return Found(target, made)

    return workers.together(_as_storage(receive))


def _beside(own: CheckpointDirectory | None) -> str | None:
    """Returns where a local directory is made from which it can be moved."""
    if own is None or files.is_remote(own.path):
        return None
    files.make_directory(os.path.dirname(own.path))
    return os.path.dirname(own.path)


def _as_storage(action: Callable[[], Any]) -> Callable[[], Any]:
    def act() -> Any:
        try:
            with files.storage_errors("a state that another worker has"):
                return action()
        except DamagedError as error:
            raise StorageError(
                f"what another worker sent reads back wrong: {error}"
            ) from error

    return act


def _transfer(
    workers: Workers,
    found: Found | None,
    made: Manifest,
    source: int,
    prefix: str = "",
) -> None:
    """Sends the files of a state in pieces; every worker does this.

    A disk that fails is told of at the end: a worker that left in the middle
    would have the others wait for it.

    Args:
        workers: of the run.
        found: where this worker has it, if it has.
        made: its manifest.
        source: the replica whose worker sends.
        prefix: where it is written; empty is nowhere.
    """
    failure: Exception | None = None
    for suffix, size in made.sizes.items():
        for start in range(0, size, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, size - start)
            data = b""
            try:
                if found:
                    path = f"{found.prefix}.{suffix}"
                    data = files.read_part(path, start, length)
            except OSError as error:
                failure = error
            data = workers.broadcast(data, length, source)
            try:
                if prefix:
                    files.append(f"{prefix}.{suffix}", data)
            except OSError as error:
                failure = error
    if failure:
        raise failure
