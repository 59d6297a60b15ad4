"""What all workers of a run must have alike, or their replicas would differ."""

from __future__ import annotations

import json
import zlib

from dtrain.cluster.workers import Workers
from dtrain.config import Config
from dtrain.data.sources import Data
from dtrain.errors import UserError

# Flags that may differ between the workers of a run, as their disks do.
_OF_A_WORKER = (
    "run_dir",
    "backup_dir",
    "data_dir",
    "manual_dir",
    "download",
    "cache_gib",
)


def check_flags(config: Config, workers: Workers) -> None:
    """Checks that all workers have the same flags. Every worker calls this.

    Args:
        config: the settings of this worker.
        workers: all of them.

    Raises:
        UserError: they do not; on every worker.
    """
    flags = config.to_dict()
    for name in _OF_A_WORKER:
        del flags[name]
    digest = zlib.crc32(json.dumps(flags).encode())
    if len(set(workers.gather(digest))) > 1:
        raise UserError(
            "the workers were started with different flags; only "
            f"{', '.join(_OF_A_WORKER)} may differ between them"
        )


def check_images(data: Data, workers: Workers) -> None:
    """Checks that all workers see the same images. Every worker calls this.

    Args:
        data: all that this worker reads.
        workers: all of them.

    Raises:
        UserError: they do not; on every worker.
    """
    for source in data.every.values():
        shape = (source.num_images, source.num_classes, source.image_shape)
        seen = repr((*shape, source.digest)).encode()
        if len(set(workers.gather(zlib.crc32(seen)))) > 1:
            raise UserError(
                f"the workers see different images in {source.name}: here are "
                f"{source.num_images:,}, and elsewhere other ones or more or "
                "less; copy the data set anew"
            )
