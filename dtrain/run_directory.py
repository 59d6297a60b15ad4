"""The directory of a run, and the files that say what the run is.

run_dir/config.json     the settings, the shape of the data, the versions
run_dir/generator.json  its layers, for `keras.models.model_from_json`
run_dir/discriminator.json
run_dir/metrics.jsonl   a line for each step
run_dir/events/         for TensorBoard: losses now and then, and the grids
run_dir/samples/        grids of images
run_dir/checkpoints/    kept history
run_dir/backup/         the newest state of a run that is not finished
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform

import keras
import tensorflow as tf

import dtrain
from dtrain import config as config_lib
from dtrain import registry
from dtrain.config import Config
from dtrain.errors import UserError


@dataclasses.dataclass(frozen=True)
class Description:
    """What config.json holds: enough to rebuild the networks without the data.

    Attributes:
        config: the settings.
        image_shape: height, width and channels of an image.
        num_classes: number of classes; 0 if there are no labels.
        num_images: images of the data set.
    """

    config: Config
    image_shape: tuple[int, int, int]
    num_classes: int
    num_images: int


def read(run_dir: str) -> Description:
    """Reads what a run is.

    Args:
        run_dir: the run's directory.

    Raises:
        UserError: there is no run, or its config.json is damaged.
    """
    path = os.path.join(run_dir, "config.json")
    if not tf.io.gfile.exists(path):
        raise UserError(
            f"{run_dir} holds no run: there is no config.json in it"
        )
    try:
        with tf.io.gfile.GFile(path) as file:
            values = json.loads(file.read())
        return Description(
            config=config_lib.from_dict(values["config"]),
            image_shape=tuple(values["data"]["image_shape"]),
            num_classes=values["data"]["num_classes"],
            num_images=values["data"]["num_images"],
        )
    except UserError as error:
        raise UserError(
            f"{path}: {error}; use the version of dtrain that wrote it, or "
            "name another run_dir"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it, or name another run_dir"
        ) from error


def check(description: Description, *, is_chief: bool) -> None:
    """Checks that the run's directory is of this run, or free for it.

    Every worker calls this. Nothing is written, so that a mistake which is
    found later, such as in the model, leaves everything as it was.

    Args:
        description: what the run is told now.
        is_chief: whether this worker writes.

    Raises:
        UserError: the directory belongs to another run, holds one although
            `resume` is never, or holds none although it is must.
    """
    config = description.config
    path = os.path.join(config.run_dir, "config.json")
    exists = tf.io.gfile.exists(path)
    if config.resume == "must" and not exists:
        raise UserError(
            f"resume (must): {config.run_dir} holds no run to go on with; name "
            "its directory, or use --resume=auto"
        )
    if exists:
        _check_same(description, read(config.run_dir))
    # Another worker may find what the chief has just begun to write.
    elif is_chief and tf.io.gfile.exists(config.run_dir):
        _check_empty(config.run_dir)


def make(name: str, directory: str) -> None:
    """Makes a directory, if it is not there.

    Args:
        name: of the setting that names it.
        directory: local, or any that `tf.io.gfile` writes.

    Raises:
        UserError: it cannot be made.
    """
    try:
        tf.io.gfile.makedirs(directory)
    except tf.errors.OpError as error:
        raise UserError(
            f"{name} ({directory}) cannot be made: {error.message}; name "
            "another one"
        ) from error


def _check_same(now: Description, before: Description) -> None:
    differences = before.config.differences(now.config)
    for name in ("image_shape", "num_classes", "num_images"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            differences[name] = (old, new)
    if differences:
        listed = ", ".join(
            f"{name} was {old} and is now {new}"
            for name, (old, new) in differences.items()
        )
        raise UserError(
            f"{now.config.run_dir} belongs to another run: {listed}; use the "
            "same settings, or name another run_dir"
        )


def _check_empty(run_dir: str) -> None:
    if not tf.io.gfile.isdir(run_dir):
        raise UserError(f"run_dir ({run_dir}) is a file; name a directory")
    names = sorted(tf.io.gfile.listdir(run_dir))
    # What a run that was killed at its very start leaves behind.
    if names and names != ["config.json.tmp"]:
        raise UserError(
            f"run_dir ({run_dir}) is not empty and holds no run: "
            f"{', '.join(names[:3])}; name another one"
        )


def write(description: Description, networks: registry.Networks) -> None:
    """Makes the run's directory and describes the run in it.

    The chief calls this. A network is described where it can be rebuilt from
    its description: functional ones of any layers, and subclassed ones with
    `get_config`. Others are built by their own code alone.

    Args:
        description: what the run is told now, and `check` found to fit.
        networks: those of the run.

    Raises:
        UserError: the directory cannot be written to.
    """
    run_dir = description.config.run_dir
    make("run_dir", run_dir)
    try:
        _write(os.path.join(run_dir, "config.json"), _to_json(description))
        for name in ("generator", "discriminator"):
            text = _architecture(getattr(networks, name))
            if text:
                _write(os.path.join(run_dir, f"{name}.json"), text)
    except tf.errors.OpError as error:
        raise UserError(
            f"run_dir ({run_dir}) cannot be written to: {error.message}; name "
            "another one"
        ) from error


def _architecture(network: keras.Model) -> str:
    """Returns the layers of a network as JSON; empty if it does not say."""
    try:
        return network.to_json(indent=2)
    except (NotImplementedError, TypeError, ValueError):
        return ""


def _to_json(description: Description) -> str:
    values = {
        "config": description.config.to_dict(),
        "data": {
            "image_shape": list(description.image_shape),
            "num_classes": description.num_classes,
            "num_images": description.num_images,
        },
        "versions": {
            "dtrain": dtrain.__version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "python": platform.python_version(),
        },
    }
    return json.dumps(values, indent=2)


def _write(path: str, text: str) -> None:
    """Writes a file by a rename: a kill leaves the old one or the new one."""
    temporary = f"{path}.tmp"
    with tf.io.gfile.GFile(temporary, "w") as file:
        file.write(text + "\n")
    tf.io.gfile.rename(temporary, path, overwrite=True)
