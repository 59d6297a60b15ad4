"""The manifest of a checkpoint: a file beside it that says what it must be.

It is written last: a checkpoint exists when its manifest does. The checksums in
it are of the tensors in memory, taken before they were written, so that reading
back finds whatever went wrong on the way to the disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
import re
from collections.abc import Callable, Mapping
from typing import Any

from dtrain import version
from dtrain.bundle.fingerprint import GRAPH_KEY, VARIANT, Fingerprint
from dtrain.storage import sealed
from dtrain.storage.sealed import DamagedError
from dtrain.tensorfiles import entries

# Of a file of a checkpoint, after `ckpt-<step>.`: nothing else is touched on
# the word of a manifest.
_SUFFIX = re.compile(r"index|data-\d{5}-of-\d{5}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}")
# Seconds before or after 1970: a clock may be wrong, but no sum overflows.
_MAX_SECS = 1e12
# More dimensions no tensor of TensorFlow has.
_MAX_RANK = 254


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint must be, and what was saved with it.

    Attributes:
        step: the steps that were done.
        saved_at: seconds since 1970, by the clock of the machine that wrote.
        sizes: bytes of each file, by its name after `ckpt-<step>.`.
        index_sha256: of TensorFlow's index, a small file.
        tensors: the fingerprint of each, by its key in the checkpoint.
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
    metrics: Mapping[str, float | None] = dataclasses.field(
        default_factory=dict
    )
    log: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: versions()
    )

    def is_of(self, run_id: str) -> bool:
        """Tells whether it is of a run; where one has no id, it may be.

        Args:
            run_id: what config.json of that run says; empty in those of dtrain
                0.1.0, and where the run is not known.
        """
        return not run_id or self.run.get("id", "") in ("", run_id)

    @property
    def state(self) -> str:
        """A SHA-256 over the names and fingerprints of all variables."""
        total = hashlib.sha256()
        for key, tensor in sorted(self.tensors.items()):
            # The graph depends on the order in which a program made its
            # objects.
            if key != GRAPH_KEY:
                total.update(repr((key, *dataclasses.astuple(tensor))).encode())
        return total.hexdigest()

    def encode(self) -> bytes:
        """Returns it as sealed JSON."""
        return sealed.dumps(dataclasses.asdict(self))


def decode(data: bytes) -> Manifest:
    """Reads what `Manifest.encode` returned.

    Whoever gets a manifest may rely on the type and the range of each field;
    what `run` holds is for its reader to check.

    Raises:
        DamagedError: they are not what was written.
    """
    body = sealed.loads(data)
    del body["sha256"]
    # Of all tensors: some have it, written between releases.
    body.pop("digest", None)
    if body.keys() - _FIELDS.keys():
        raise DamagedError("it is of another version of dtrain")
    values = {
        name: sealed.field(body, name, is_right)
        for name, is_right in _FIELDS.items()
    }
    values["tensors"] = {
        key: Fingerprint(
            tensor["dtype"], tuple(tensor["shape"]), tensor["sha256"]
        )
        for key, tensor in body["tensors"].items()
    }
    return Manifest(**values)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MAX_SECS


def _is_metric(value: Any) -> bool:
    if value is None:
        return True
    if type(value) is int:
        return abs(value) < 2**63
    return type(value) is float and math.isfinite(value)


def _is_fingerprint(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"dtype", "shape", "sha256"}
        and isinstance(value["dtype"], str)
        and (entries.is_dtype(value["dtype"]) or value["dtype"] == VARIANT)
        and isinstance(value["shape"], list)
        and len(value["shape"]) <= _MAX_RANK
        and all(map(sealed.is_count, value["shape"]))
        # No side is negative, and so it is enough that the product fits.
        and sealed.is_count(math.prod(value["shape"]))
        and _is_digest(value["sha256"])
    )


def _is_log(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return value == {}
    return (
        value.keys() == {"bytes", "sha256"}
        and sealed.is_count(value["bytes"])
        and _is_digest(value["sha256"])
    )


def _mapping(
    is_key: Callable[[Any], object], is_value: Callable[[Any], object]
) -> Callable[[Any], bool]:
    def is_right(value: Any) -> bool:
        return isinstance(value, dict) and all(
            is_key(key) and is_value(item) for key, item in value.items()
        )

    return is_right


# What each field of a manifest must be.
_FIELDS: Mapping[str, Callable[[Any], object]] = {
    "step": sealed.is_count,
    "saved_at": _is_time,
    "sizes": lambda sizes: (
        _mapping(_SUFFIX.fullmatch, sealed.is_count)(sizes) and "index" in sizes
    ),
    "index_sha256": _is_digest,
    # The object graph, at least.
    "tensors": lambda tensors: (
        _mapping(sealed.is_name, _is_fingerprint)(tensors) and tensors
    ),
    "metrics": _mapping(sealed.is_name, _is_metric),
    "log": _is_log,
    "run": lambda run: isinstance(run, dict),
    "versions": _mapping(sealed.is_name, lambda text: isinstance(text, str)),
}


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
