"""Takes over what TensorFlow itself has saved in a directory.

`tf.train.CheckpointManager` and `tf.train.Checkpoint.save` write no manifest,
and the first removes checkpoints but not manifests that it finds. What they
have written gets a manifest here, of what it is now, and is a checkpoint like
any other from then on.
"""

from __future__ import annotations

import collections
import os
import re

import tensorflow as tf

from dtrain.bundle import fingerprint, index, reader
from dtrain.bundle.fingerprint import Fingerprint
from dtrain.bundle.literal import literal
from dtrain.checkpoint import opening
from dtrain.checkpoint.directory import CheckpointDirectory, describe
from dtrain.checkpoint.readable import INDEX, MANIFEST, read_tensors
from dtrain.errors import UserError
from dtrain.storage import files

# With a number that a manifest may hold.
_NUMBERED = re.compile(r".+-(\d{1,18})")


def found(directory: CheckpointDirectory) -> list[str]:
    """Lists what TensorFlow has saved there by itself; oldest first.

    Those are what its pointer file names, and all with a number where nothing
    is of dtrain.

    Returns:
        Names, as `ckpt-5`.
    """
    looks, steps = set(directory.candidates()), set(directory.steps())
    pointed = _pointed(directory.path) if steps else None
    by_step: dict[int, str] = {}
    for file in files.names(directory.path):
        name = file.removesuffix(f".{INDEX}")
        match = _NUMBERED.fullmatch(name)
        if name == file or not match or int(match[1]) in steps:
            continue
        step = int(match[1])
        is_ours = name == f"ckpt-{step}"
        # Or it is on its way in, or out.
        is_there = not is_ours or step in looks
        if is_there and (pointed is None or name in pointed):
            # Of two of one step that which has its place already.
            by_step[step] = name if is_ours else by_step.get(step, name)
    return [by_step[step] for step in sorted(by_step)]


def _pointed(path: str) -> set[str]:
    """Returns the names in the pointer file; none if there is no such file."""
    try:
        state = tf.train.get_checkpoint_state(path)
    except ValueError:
        # It is empty, or no text; all else TensorFlow itself passes over.
        state = None
    if state is None:
        return set()
    paths = (*state.all_model_checkpoint_paths, state.model_checkpoint_path)
    # Absolute ones are of before a directory was moved.
    return {os.path.basename(path) for path in paths}


def take_over(directory: CheckpointDirectory) -> list[str]:
    """Makes checkpoints of what TensorFlow has saved in a directory.

    What has another name than `ckpt-<number>` is copied.

    Args:
        directory: one that this process alone may change.

    Returns:
        A line for each.

    Raises:
        OSError: the directory cannot be read, or written to.
    """
    notes = []
    for name in found(directory):
        prefix = f"{directory.path}/{name}"
        try:
            step = _take_over(directory, prefix)
        except UserError as error:
            notes.append(f"{error}; passed over")
        else:
            notes.append(
                f"{prefix} was saved by TensorFlow and is taken over as step "
                f"{step}"
            )
    if notes:
        _forget_removed(directory)
    return notes


def _forget_removed(directory: CheckpointDirectory) -> None:
    """Removes the manifests of what TensorFlow's manager has removed."""
    names = files.names(directory.path)
    num_files = collections.Counter(
        name.partition(".")[0] for name in names if "." in name
    )
    for step in directory.steps():
        if num_files[f"ckpt-{step}"] == 1:
            files.remove(f"{directory.prefix(step)}.{MANIFEST}")


def _take_over(directory: CheckpointDirectory, prefix: str) -> int:
    match = _NUMBERED.fullmatch(prefix)
    assert match
    step = int(match[1])
    with opening.on_disk(prefix) as local:
        changed = files.stat(f"{prefix}.{INDEX}")
        assert changed
        manifest = describe(
            local,
            step,
            _summed(local),
            # Not by dtrain, which may find more than TensorFlow does.
            {"saved_at": changed.changed_secs, "versions": {}},
        )
        if prefix == directory.prefix(step):
            directory.recognize(manifest)
        else:
            directory.adopt(manifest, local, copies=True)
    return step


def _summed(local: str) -> dict[str, Fingerprint]:
    """Reads all tensors of a checkpoint on this machine.

    Raises:
        UserError: it is damaged, or is none of `tf.train.Checkpoint`.
    """
    index.check(local)
    written: dict[str, Fingerprint] = {}
    with reader.damage(local), literal(local) as plain:
        kinds = tf.train.load_checkpoint(plain).get_variable_to_dtype_map()
        if fingerprint.GRAPH_KEY not in kinds:
            raise UserError(
                f"{local} was not saved by tf.train.Checkpoint, but by a Saver "
                "of TensorFlow 1; make one of it by `python -m "
                "dtrain.checkpoint_tool edit`"
            )
        dtypes = {key: kind.name for key, kind in kinds.items()}
        for key in sorted(dtypes):
            for _, value in read_tensors(plain, [key], dtypes):
                written[key] = fingerprint.of(value, dtypes[key])
    return written
