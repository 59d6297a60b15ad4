"""The manifest of a checkpoint: a file beside it that says what it must be.

It is written last: a checkpoint exists when its manifest does. The checksums in
it are of the tensors in memory, taken before they were written, so that reading
back finds whatever went wrong on the way to the disk.
"""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Mapping
from typing import Any

from dtrain import version
from dtrain.bundle.fingerprint import Fingerprint
from dtrain.storage import sealed
from dtrain.storage.sealed import DamagedError

# Of a file of a checkpoint, after `ckpt-<step>.`: nothing else is touched on
# the word of a manifest.
_SUFFIX = re.compile(r"index|data-\d{5}-of-\d{5}")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint must be, and what was saved with it.

    Attributes:
        step: the steps that were done.
        saved_at: seconds since 1970, by the clock of the machine that wrote.
        sizes: bytes of each file, by its name after `ckpt-<step>.`.
        index_sha256: of TensorFlow's index, a small file.
        tensors: the fingerprint of each, by its key in the checkpoint.
        digest: of the state, as `checkpoint_tool digest` prints it; empty in
            those of dtrain 0.1.0.
        metrics: of the step, by name; None where not finite.
        log: `bytes` and `sha256` of metrics.jsonl up to the step; empty where
            there is none.
        run: settings and data of the run, as in config.json; empty for one
            that has none.
        versions: of the programs that wrote it, by name.
    """

    step: int
    saved_at: float
    sizes: Mapping[str, int]
    index_sha256: str
    tensors: Mapping[str, Fingerprint]
    digest: str = ""
    metrics: Mapping[str, float | None] = dataclasses.field(
        default_factory=dict
    )
    log: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: versions()
    )

    def encode(self) -> bytes:
        """Returns it as sealed JSON."""
        return sealed.dumps(dataclasses.asdict(self))


def decode(data: bytes) -> Manifest:
    """Reads what `Manifest.encode` returned.

    Raises:
        DamagedError: they are not what was written.
    """
    body = sealed.loads(data)
    del body["sha256"]
    try:
        tensors = {
            key: Fingerprint(
                tensor["dtype"], tuple(tensor["shape"]), tensor["sha256"]
            )
            for key, tensor in body.pop("tensors").items()
        }
        manifest = Manifest(tensors=tensors, **body)
        if not all(map(_SUFFIX.fullmatch, manifest.sizes)):
            raise DamagedError("it names files that are not a checkpoint's")
        return manifest
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError("it is of another version of dtrain") from error


def versions() -> dict[str, str]:
    """Returns the versions of what writes the bits, by name."""
    # Here, for a manifest is read where TensorFlow is not imported.
    import keras
    import tensorflow as tf

    return {
        "dtrain": version.VERSION,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
    }
