"""What Keras' own `BackupAndRestore` has left: a `fit` goes on from that, too.

It holds the weights, the state of the optimizer that the model was compiled
with, and the epochs that are done, and of seeds and metrics nothing.
"""

from __future__ import annotations

import json
import re

import keras

from dtrain.errors import UserError
from dtrain.storage import files, temporary

# Of all its files, as a pattern.
NAMES = r"(latest\.weights\.h5|training_metadata\.json)(\.bkp)?"


def is_there(path: str) -> bool:
    """Tells whether a directory holds one."""
    return any(re.fullmatch(NAMES, name) for name in files.names(path))


def load(model: keras.Model, path: str) -> int | None:
    """Loads the newest state that can be read, of one or two.

    Args:
        model: built.
        path: of the directory.

    Returns:
        The epochs that are done; None if there is no such state.

    Raises:
        UserError: there is one, and it cannot be read or does not fit.
        OSError: the directory cannot be read.
    """
    names = files.names(path)
    reasons = []
    for suffix in ("", ".bkp"):
        name = f"latest.weights.h5{suffix}"
        if name not in names:
            continue
        metadata = files.read(f"{path}/training_metadata.json{suffix}")
        with temporary.directory("read") as copy:
            # Keras goes by the ending.
            local = f"{copy}/latest.weights.h5"
            files.copy(f"{path}/{name}", local)
            try:
                num_epochs = _num_epochs(metadata)
                _load(model, local)
            except (OSError, TypeError, ValueError, KeyError) as error:
                reasons.append(f"{name}: {files.reason(error)}")
            else:
                return num_epochs
    if reasons:
        raise UserError(
            f"{path} holds a backup of Keras' own that cannot be used "
            f"({reasons[0]}); make the model as it was, or name another "
            "directory to start over"
        )
    return None


def _num_epochs(metadata: bytes | None) -> int:
    # Keras writes it after the weights, and may have been killed before.
    num_epochs = json.loads(metadata)["epoch"] if metadata else 0
    if type(num_epochs) is not int or num_epochs < 0:
        raise ValueError(f"{num_epochs!r} is no number of epochs")
    return num_epochs


def _load(model: keras.Model, weights: str) -> None:
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not optimizer.built:
        with model.distribute_strategy.scope():
            optimizer.build(model.trainable_variables)
    model.load_weights(weights)
