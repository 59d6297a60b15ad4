"""What a worker tells its supervisor, in a small file of the local disk.

The worker rewrites the file about once a second, from a thread that runs even
while the training waits; the supervisor reads it. If the file is not rewritten
any more, the worker's threads do not run: it was stopped by SIGSTOP, or is in C
code that holds Python's lock.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping

from dtrain.storage import files

# The notice of a worker that the other workers have told to end.
ANOTHERS_NOTICE = "another worker's notice"


@dataclasses.dataclass(frozen=True)
class Status:
    """What a worker tells.

    Attributes:
        pid: of the worker's process.
        step: newest step that is done; -1 before the GAN is built.
        saved_step: newest committed save that this worker knows of; -1 none.
        limit_secs: seconds without progress after which the worker takes
            itself for stuck; without end is `math.inf`.
        notice: what told the worker to end, as in `SIGTERM`; empty if nothing.
        is_over: whether, after that notice, a restart on this machine is
            pointless: a stop file, a time limit, a machine that is taken away.
    """

    pid: int
    step: int = -1
    saved_step: int = -1
    limit_secs: float = float("inf")
    notice: str = ""
    is_over: bool = False


def is_restart(environment: Mapping[str, str] = os.environ) -> bool:
    """Tells whether this start follows another one, and no person made it.

    Args:
        environment: the variables of this process: of a supervisor, or of Slurm
            where it has queued a job again.
    """
    names = ("DTRAIN_ATTEMPT", "SLURM_RESTART_COUNT")
    return any(environment.get(name, "0") != "0" for name in names)


def write(path: str, status: Status) -> None:
    """Replaces the file; a reader finds the old text or the new one.

    Args:
        path: of the file, in a directory that is there.
        status: what to tell.

    Raises:
        OSError: the disk failed.
    """
    # Not durable: if the machine loses power, its supervisor is gone, too.
    text = json.dumps(dataclasses.asdict(status))
    files.write(path, text.encode(), is_durable=False)


def read(path: str) -> Status | None:
    """Reads the file; None if there is none, or it cannot be understood.

    Args:
        path: of the file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        status = Status(**values)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = {"int": [int], "float": [int, float], "str": [str], "bool": [bool]}
    is_sound = all(
        type(getattr(status, field.name)) in kinds[str(field.type)]
        for field in dataclasses.fields(Status)
    )
    return status if is_sound else None
