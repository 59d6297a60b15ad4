"""Fault-tolerant training of GANs on many GPUs with TensorFlow.

`python -m dtrain.main --help` lists what a run can be told. The modules are
nouns and are imported whole: `from dtrain import config`. For a `fit` of your
own there are `dtrain.BackupAndRestore` and `dtrain.CheckpointManagerCallback`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.callbacks import BackupAndRestore, CheckpointManagerCallback

__version__ = "0.1.0"
__all__ = ["BackupAndRestore", "CheckpointManagerCallback"]


def __getattr__(name: str) -> Any:
    """Imports the callbacks when they are asked for, and TensorFlow with them.

    Args:
        name: of an attribute that is not there.

    Returns:
        The attribute.

    Raises:
        AttributeError: there is no such attribute.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.callbacks"), name)
