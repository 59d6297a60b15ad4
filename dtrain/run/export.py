"""A run at a step, and its networks as files that other programs load.

A SavedModel needs TensorFlow alone. A .keras file needs Keras and, where the
network has layers of its own, the modules that register them: those of the
user's model, and `dtrain.models.batch_norm` for `--batch_norm`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from dtrain.cluster import environment, strategy
from dtrain.config import Config
from dtrain.config.learning import MODELS
from dtrain.data.sources import points
from dtrain.errors import UserError
from dtrain.gan import state
from dtrain.gan.pictures import Pictures
from dtrain.gan.program import GENERATOR
from dtrain.run import identity, resuming
from dtrain.storage import files, temporary

_KERAS = ".keras"
# Without it no program takes a directory for a SavedModel.
_SAVED_MODEL = "saved_model.pb"


class Trained(NamedTuple):
    """A run at a step.

    Attributes:
        gan: the state.
        config: the run's settings, for one device.
        num_classes: number of classes; 0 if there are no labels.
    """

    gan: state.GAN
    config: Config
    num_classes: int

    @property
    def draws_latents(self) -> bool:
        """Whether pictures are made of latents, and labels, alone."""
        return not self.gan.draws_from_data

    def network(self, name: str = "") -> tuple[str, keras.Model]:
        """Returns a network by its name, or its average.

        Args:
            name: of the network; empty for the generator, or for the only one
                that is averaged. The average is taken where there is one.

        Raises:
            UserError: there is none of this name, or several.
        """
        averages, networks = self.gan.averages, self.gan.program.networks
        if not name:
            name = GENERATOR if GENERATOR in averages else ""
        if not name and len(averages) == 1:
            [name] = averages
        if name not in networks:
            raise UserError(
                f"network ({name}) must be one of {', '.join(networks)}"
                if name
                else f"the run averages {', '.join(averages) or 'no network'}; "
                "say by --network which is exported"
                + ", or name a directory for a SavedModel of what they draw"
                * self.draws_latents
            )
        return name, averages.get(name, networks[name])

    @property
    def drawing(self) -> tuple[str, ...]:
        """Names of the networks that draw, as far as that is known."""
        networks = self.gan.program.networks
        alone = (GENERATOR,) if GENERATOR in networks else networks
        return tuple(self.gan.averages or alone)

    def describe(self, name: str) -> str:
        """Says which weights a network is exported with."""
        return f"EMA {name}" if name in self.gan.averages else name


def restore(run_dir: str, step: int | None = None, model: str = "") -> Trained:
    """Rebuilds the networks of a run, without its data, and restores them.

    Args:
        run_dir: the run's directory.
        step: of the checkpoint; None is the newest that verifies.
        model: see `build`.

    Raises:
        UserError: there is no such run or checkpoint, it does not fit the
            model, or the model is code that the user has not named.
        StorageError: the disk or the store cannot be read.
    """
    trained, run_id = build(run_dir, model)
    resuming.restore_step(trained.gan.checkpoint, trained.config, step, run_id)
    return trained


def build(
    run_dir: str, model: str = "", **settings: str | int
) -> tuple[Trained, str]:
    """Rebuilds the networks of a run, without its data, as they began.

    Args:
        run_dir: the run's directory.
        model: that the user names, in place of the one in config.json; empty
            for a run of a built-in one.
        **settings: of the run, where they are others now.

    Returns:
        The run, and its id.

    Raises:
        UserError: there is no such run, or the model is code that the user
            has not named.
        StorageError: the disk or the store cannot be read.
    """
    description = identity.read(run_dir)
    # The run's own directory may have moved, and its devices be elsewhere.
    now: dict[str, Any] = {
        "run_dir": run_dir,
        "model": model or _built_in(description.config.model, run_dir),
        "strategy": "default",
        "num_devices": 0,
        "jit_compile": "off",
        **settings,
    }
    config = dataclasses.replace(description.config, **now)
    image_shape, num_classes = description.image_shape, description.num_classes
    alone = strategy.make(config, environment.ALONE)
    specs = description.specs
    gan = state.GAN(config, alone, image_shape, num_classes, specs)
    return Trained(gan, config, num_classes), description.run_id


def _built_in(model: str, run_dir: str) -> str:
    """Returns the model that config.json names.

    The directory may be anybody's: what it names is not imported, as the code
    would run, until this user has named it.

    Raises:
        UserError: it is none of dtrain's own.
    """
    if model in MODELS:
        return model
    raise UserError(
        f"model ({model}) of {run_dir}/config.json would be imported, from "
        f"{os.getcwd()} or PYTHONPATH, and its code run; if you trust it, "
        f"name it: --model={shlex.quote(model)}"
    )


def modules_of(network: keras.Model) -> list[str]:
    """Names the modules of dtrain that Keras needs to load a network.

    They register its layers; a SavedModel needs none.

    Args:
        network: that was saved.
    """
    homes = {type(layer).__module__ for layer in network._flatten_layers()}
    return sorted(home for home in homes if home.startswith("dtrain."))


def save(trained: Trained, path: str, name: str = "") -> str:
    """Writes what a run draws, or a network, to a new file or directory.

    It is a .keras file of a network, or of its average, if the path ends so,
    and otherwise the directory of a SavedModel. Where pictures are made of
    latents, and no other network is named, that draws them, by however many
    networks, as the run's own grids are drawn. It has a signature
    `serving_default` (and `serve`, as a method) that takes one or more:

        latents    float32 [b, latent_size], standard normal
        labels     int32 [b], if conditional: the classes, from 0
        -> images  float32 [b, H, W, C] in [-1, 1]; points, [b, 1, 1, 2], may
                   lie anywhere in their `Plane`

    What is drawn at random beside these, as the noise of StyleGAN2, is a
    function of the run's seed and of the place in the batch. The SavedModel of
    any other network takes and returns what the network does.

    Args:
        trained: of a run.
        path: local, or gs://, which takes room in TMPDIR. Its directory is
            made if it is not there.
        name: of the network, see `Trained.network`.

    Returns:
        What was written, in words.

    Raises:
        UserError: the path exists, there is no such network, or it cannot be
            written.
        StorageError: the disk or the store failed.
    """
    is_generator = trained.gan.program.draw is None and name == GENERATOR
    is_keras = path.endswith(_KERAS)
    may_be_drawn = not is_keras and (not name or is_generator)
    if may_be_drawn and trained.draws_latents:
        write = functools.partial(_save_pictures, trained)
        names = trained.drawing
    else:
        name, network = trained.network(name)
        save_network = _save_keras if is_keras else _save_model
        write = functools.partial(save_network, name, network)
        names = (name,)
    with (
        files.storage_errors(path),
        temporary.becoming(path.rstrip("/"), _copy) as written,
    ):
        write(written)
    return f"the {', '.join(map(trained.describe, names))}"


def _copy(written: str, target: str) -> None:
    """Copies a file or a directory; what makes that a SavedModel comes last."""
    if not os.path.isdir(written):
        files.copy(written, target)
        return
    paths = [
        os.path.relpath(os.path.join(parent, file), written)
        for parent, _, in_parent in os.walk(written)
        for file in in_parent
    ]
    for path in sorted(paths, key=lambda path: (path == _SAVED_MODEL, path)):
        files.copy(os.path.join(written, path), f"{target}/{path}")


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _save_keras(name: str, network: keras.Model, path: str) -> None:
    try:
        network.save(path)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(
            f"the {name} cannot be written as {_KERAS}: {_said(error)}; give "
            "its layers a get_config, or name a directory for a SavedModel"
        ) from error


def _save_pictures(trained: Trained, path: str) -> None:
    """Writes what draws pictures of latents.

    Raises:
        UserError: it knows but batches of one size.
    """
    gan, config, num_classes = trained
    inputs = [
        tf.TensorSpec([None, config.latent_size], tf.float32, name="latents")
    ]
    if config.conditional:
        inputs.append(tf.TensorSpec([None], tf.int32, name="labels"))

    pictures = Pictures(gan)

    def serve(
        latents: tf.Tensor, labels: tf.Tensor | None = None
    ) -> dict[str, tf.Tensor]:
        if labels is not None:
            # Of a negative one TensorFlow takes that so far from the end.
            rule = f"labels must be from 0 to {num_classes - 1}"
            checks = [
                tf.debugging.assert_non_negative(labels, rule),
                tf.debugging.assert_less(labels, num_classes, rule),
            ]
            with tf.control_dependencies(checks):
                labels = tf.identity(labels)
        images = tf.cast(pictures(latents, labels), tf.float32)
        if gan.image_shape != points.SHAPE:
            # A user's generator may exceed the range of an image.
            images = tf.clip_by_value(images, -1, 1)
        return {"images": images}

    archive = keras.export.ExportArchive()
    archive.add_endpoint("serve", serve, input_signature=inputs)
    # For what is no variable, as the table of a layer.
    for name in trained.drawing:
        archive.track(trained.network(name)[1])
    try:
        with files.os_errors():
            archive.write_out(path, verbose=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"what {config.model} draws cannot be written as a graph for "
            f"batches of any size: {_said(error)}; let its draw take "
            "tf.shape(example.latents)[0] for the size, or name a --network"
        ) from error


def _save_model(name: str, network: keras.Model, path: str) -> None:
    """Writes a network as it is called by itself.

    Raises:
        UserError: Keras cannot.
    """
    try:
        with files.os_errors():
            network.export(path, verbose=False)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(
            f"the {name} cannot be written as a SavedModel: {_said(error)}; "
            f"make it a functional model, or export {_KERAS}"
        ) from error
