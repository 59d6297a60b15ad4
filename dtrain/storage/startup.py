"""Imports TensorFlow without the page of noise that it prints by itself."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator

from dtrain import streams

# What TensorFlow 2.21 says on every machine before it can be told to be silent:
# oneDNN is on, there is no GPU, the CPU could do more.
_NOISE = re.compile(
    r"^(WARNING: All log messages before absl|"
    r"[IWE]\d{4} .*(port|cudart_stub|cuda_platform|cpu_feature_guard)\.cc|"
    r"To enable the following instructions)"
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops TensorFlow's known start-up lines from the standard error.

    Everything else that Python or C++ writes meanwhile comes out at the end,
    even if the block raises, but not if it ends the process.
    """
    streams.drain()
    kept = os.dup(2)
    # In memory: TMPDIR may be full, or nobody may write there.
    with open(os.memfd_create("stderr"), "w+b", buffering=0) as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            streams.drain()
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            lines = caught.read().decode(errors="replace").splitlines(True)
            sys.stderr.writelines(
                line for line in lines if not _NOISE.match(line)
            )


@contextlib.contextmanager
def _missing(module: str) -> Iterator[None]:
    """Has imports of a module fail as if it were not installed."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def import_tensorflow() -> None:
    """Imports TensorFlow and Keras and finds the devices; takes seconds.

    Afterwards `import tensorflow` costs nothing and prints nothing.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Keras imports matplotlib where it is installed, a sixth of all this, for
    # its galleries of images, which no run draws.
    with quiet(), _missing("matplotlib"):
        import keras  # noqa: F401
        import tensorflow as tf

        tf.config.list_physical_devices()
