"""Makes all workers go on from the same state, the newest that any of them has.

A worker that does not have it receives it from one that has, over the
strategy's own collectives.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from dtrain.checkpoint import manifest
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.going_on import Search, Verified
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.cluster.workers import Workers
from dtrain.errors import StorageError, UserError
from dtrain.storage import files, temporary

_CHUNK_BYTES = 16 << 20


def agree(
    workers: Workers,
    seen: Search,
    own: CheckpointDirectory | None,
    stack: contextlib.ExitStack,
) -> Verified | None:
    """Makes all workers go on from the newest state that any of them has.

    Every worker calls this.

    Args:
        workers: of the run.
        seen: what this worker has found.
        own: where this worker keeps what it receives; None keeps it for as
            long as `stack` is open.
        stack: is given what is to be removed when it is closed.

    Returns:
        Where this worker has the state; None if no worker has any.

    Raises:
        UserError: there are checkpoints, and none verifies.
        StorageError: what is to be sent cannot be read, or what was received
            cannot be written.
    """
    offer = (-1, 0)
    if seen.newest:
        offered = seen.newest.manifest
        offer = (offered.step, int(offered.state[:15], 16))
    steps, digests = (workers.gather(number) for number in offer)
    [any_holds_something] = workers.agree(seen.holds_something)
    if max(steps) < 0 and any_holds_something:
        why = seen.notes[0] if seen.notes else "all there was is in quarantine/"
        raise UserError(
            f"there are checkpoints and none of them can be used ({why}); "
            "bring one back from a copy, or name another run_dir to start over"
        )
    offers = set(zip(steps, digests, strict=True))
    if len(offers) == 1:
        return seen.newest
    source = steps.index(max(steps))
    wanted = (steps[source], digests[source])
    held = seen.newest if offer == wanted else None
    return _share(workers, held, source, own, stack)


def _share(
    workers: Workers,
    held: Verified | None,
    source: int,
    own: CheckpointDirectory | None,
    stack: contextlib.ExitStack,
) -> Verified:
    """Sends a state to the workers that do not hold it; `source` is a replica.

    Returns where this worker has it afterwards.
    """
    encoded = held.manifest.encode() if held else b""
    sizes = workers.gather(len(encoded))
    encoded = workers.broadcast(encoded, sizes[source], source)
    sent = manifest.decode(encoded)
    if held:

        def send() -> None:
            _transfer(workers, held, sent, source)

        workers.together(_as_storage(send))
        return held

    def receive() -> Verified:
        # Without a directory this worker takes part all the same, for the
        # others would wait for it, and fails afterwards.
        failure: OSError | None = None
        directory = ""
        try:
            directory = stack.enter_context(
                temporary.directory("received", _beside(own))
            )
        except OSError as error:
            failure = error
        prefix = f"{directory}/received" if directory else ""
        _transfer(workers, None, sent, source, prefix)
        if failure:
            raise failure
        target = own or CheckpointDirectory(f"{directory}/checkpoints")
        target.adopt(sent, prefix)
        target.verify(sent.step)
        return Verified(target, sent)

    return workers.together(_as_storage(receive))


def _beside(own: CheckpointDirectory | None) -> str | None:
    """Returns a directory on the disk of `own`; None if any disk will do."""
    if own is None or files.is_remote(own.path):
        return None
    files.make_directory(os.path.dirname(own.path))
    return os.path.dirname(own.path)


def _as_storage(action: Callable[[], Any]) -> Callable[[], Any]:
    """Makes what goes wrong with a file a StorageError."""

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
    held: Verified | None,
    sent: Manifest,
    source: int,
    prefix: str = "",
) -> None:
    """Sends the files of a state in pieces. Every worker calls this.

    They are written to `prefix`, if there is one. An error of a disk is raised
    at the end: for a worker that leaves in the middle, the others would wait.
    """
    failure: Exception | None = None
    for suffix, size in sent.sizes.items():
        for start in range(0, size, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, size - start)
            data = b""
            try:
                if held:
                    path = f"{held.prefix}.{suffix}"
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
