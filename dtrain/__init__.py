"""Fault-tolerant training of GANs on many GPUs with TensorFlow.

`python -m dtrain.main --help` lists what a run can be told. The modules are
nouns and are imported whole: `from dtrain import config`. What programs of your
own need is here:

    dtrain.CheckpointManager           saves a training loop of your own
    dtrain.BackupAndRestore            saves a `fit`, to go on after a crash
    dtrain.CheckpointManagerCallback   saves a `fit`, as a history
    dtrain.StopOnNotice                a `fit` that is told to end saves first
    dtrain.Networks, dtrain.Phase      what a `--model` may return
    dtrain.Program                     likewise, for any GAN
    dtrain.losses                      for objectives of such programs
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dtrain import interrupts, version

# Before all else, which takes a tenth of a second.
interrupts.end_quietly()

if TYPE_CHECKING:
    from dtrain.checkpoint.callbacks import (
        BackupAndRestore,
        CheckpointManagerCallback,
    )
    from dtrain.checkpoint.manager import CheckpointManager
    from dtrain.checkpoint.notices import StopOnNotice
    from dtrain.checkpoint.tier import Facts
    from dtrain.gan import losses
    from dtrain.gan.example import Example
    from dtrain.gan.program import Networks, Phase, Program

__version__ = version.VERSION
__all__ = [
    "BackupAndRestore",
    "CheckpointManager",
    "CheckpointManagerCallback",
    "Example",
    "Facts",
    "Networks",
    "Phase",
    "Program",
    "StopOnNotice",
    "losses",
]

_HOMES = {
    "BackupAndRestore": "dtrain.checkpoint.callbacks",
    "CheckpointManager": "dtrain.checkpoint.manager",
    "CheckpointManagerCallback": "dtrain.checkpoint.callbacks",
    "Example": "dtrain.gan.example",
    "Facts": "dtrain.checkpoint.tier",
    "Networks": "dtrain.gan.program",
    "Phase": "dtrain.gan.program",
    "Program": "dtrain.gan.program",
    "StopOnNotice": "dtrain.checkpoint.notices",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and TensorFlow with it.

    Args:
        name: of an attribute that is not there.

    Returns:
        The attribute.

    Raises:
        AttributeError: there is no such attribute.
    """
    if name == "losses":
        return importlib.import_module("dtrain.gan.losses")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
