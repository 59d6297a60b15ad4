"""Imports TensorFlow without the page of noise that it prints by itself."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator

from dtrain import streams
from dtrain.errors import UserError

# What TensorFlow 2.21 says on every machine before it can be told to be silent:
# oneDNN is on, there is no GPU, the CPU could do more.
_NOISE = re.compile(
    r"^(WARNING: All log messages before absl|"
    r"[IWE]\d{4} .*(port|cudart_stub|cuda_platform|cpu_feature_guard)\.cc|"
    r"To enable the following instructions)"
)

# What Keras raises for a keras.json that it does not understand.
_NOT_STARTED = (AttributeError, ImportError, OSError, TypeError, ValueError)


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


@contextlib.contextmanager
def _keras_settings() -> Iterator[None]:
    """Has Keras, which the block imports, compute as if nobody had set it up.

    What a person has written down for other programs changes no run: the bits
    of a run follow from its flags.

    Raises:
        UserError: Keras does not start with what is written down.
    """
    if "keras" in sys.modules:
        # What imported it may want what it has set.
        yield
        return
    names = ("KERAS_MAX_EPOCHS", "KERAS_MAX_STEPS_PER_EPOCH", "KERAS_BACKEND")
    given = {name: os.environ.pop(name, None) for name in names}
    os.environ["KERAS_BACKEND"] = "tensorflow"
    try:
        yield
    except _NOT_STARTED as error:
        path = _keras_json()
        if not os.path.exists(path):
            raise
        raise UserError(
            f"Keras does not start ({error}); correct or remove what it reads, "
            f"{path}, or name another directory by KERAS_HOME"
        ) from error
    finally:
        # Whatever this program starts sees what it was given.
        del os.environ["KERAS_BACKEND"]
        os.environ.update({n: value for n, value in given.items() if value})
    import keras

    keras.config.set_floatx("float32")
    keras.config.set_image_data_format("channels_last")
    keras.config.set_epsilon(1e-7)


def _keras_json() -> str:
    """Returns the file that Keras reads its settings from."""
    home = os.path.expanduser("~")
    base = home if os.access(home, os.W_OK) else "/tmp"
    directory = os.environ.get("KERAS_HOME", os.path.join(base, ".keras"))
    return os.path.join(os.path.expanduser(directory), "keras.json")


def import_modules() -> None:
    """Imports TensorFlow and Keras, and touches no device; takes seconds.

    Afterwards `import tensorflow` costs nothing and prints nothing.

    Raises:
        UserError: the person's settings of Keras are damaged.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if os.path.expanduser("~") == "~":
        # Libraries would make a directory of that name where they are.
        os.environ["HOME"] = "/nonexistent"
    # Keras imports matplotlib where it is installed, a sixth of all this, for
    # its galleries of images, which no run draws.
    with quiet(), _missing("matplotlib"), _keras_settings():
        import keras  # noqa: F401
        import tensorflow as tf  # noqa: F401


def import_tensorflow() -> None:
    """Imports TensorFlow and Keras and finds the devices; takes seconds.

    Raises:
        UserError: the person's settings of Keras are damaged.
    """
    import_modules()
    import tensorflow as tf

    with quiet():
        tf.config.list_physical_devices()
