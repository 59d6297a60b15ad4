"""A model file of a user's own: it trains, is killed, resumes and samples."""

from __future__ import annotations

import pathlib
import signal

from dtrain import errors
from dtrain.bundle import tensors
from tests import runs

# Everything at once that TensorFlow and Keras save, or forget, in their ways:
# subclassed, nested and functional networks, a layer with a weight of its
# own, layers in a list and in a dict, and all that holds state beside weights.
MODEL = '''
"""Networks that dtrain has never heard of."""

import keras
from keras import layers


class Gain(layers.Layer):
    """Multiplies each channel by a weight of its own."""

    def build(self, input_shape):
        self.gain = self.add_weight(shape=input_shape[-1:], initializer="ones")

    def call(self, inputs):
        return self.gain * inputs


class Block(keras.Model):
    """A model inside of models."""

    def __init__(self, width):
        super().__init__()
        self.dense = layers.Dense(width)
        self.rest = [layers.BatchNormalization(), Gain(), layers.ReLU()]

    def call(self, inputs, training=False):
        features = self.dense(inputs)
        for layer in self.rest:
            if isinstance(layer, layers.BatchNormalization):
                features = layer(features, training=training)
            else:
                features = layer(features)
        return features


class Generator(keras.Model):
    def __init__(self, image_shape, num_classes):
        super().__init__()
        height, width, channels = image_shape
        self.parts = {
            "labels": layers.Embedding(num_classes, 4),
            "noise": layers.GaussianNoise(0.1),
        }
        self.block = Block(16)
        self.dense = layers.Dense(height * width * channels, "tanh")
        self.reshape = layers.Reshape(image_shape)

    def call(self, inputs, training=False):
        latents, labels = inputs
        features = latents + self.parts["labels"](labels)
        features = self.parts["noise"](features, training=training)
        features = self.block(features, training=training)
        return self.reshape(self.dense(features))


class Discriminator(keras.Model):
    def __init__(self, image_shape, num_classes):
        super().__init__()
        images = keras.Input(image_shape)
        features = layers.Flatten()(images)
        features = layers.SpectralNormalization(layers.Dense(16))(features)
        features = layers.LeakyReLU()(features)
        self.features = keras.Model(images, layers.Dropout(0.3)(features))
        self.embedding = layers.Embedding(num_classes, 16)
        self.logits = layers.Dense(1)

    def call(self, inputs, training=False):
        images, labels = inputs
        features = self.features(images, training=training)
        features = features * (1.0 + self.embedding(labels))
        return self.logits(features)


def make(config, image_shape, num_classes):
    return (
        Generator(image_shape, num_classes),
        Discriminator(image_shape, num_classes),
    )
'''

NUM_STEPS = 60


def test_users_model_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "own_networks.py").write_text(MODEL)
    path = {"PYTHONPATH": f"{tmp_path}:{runs.ROOT}"}

    def flags(name: str) -> list[str]:
        return [
            *runs.SMALL,
            "--model=own_networks:make",
            "--conditional",
            f"--run_dir={tmp_path / name}",
            f"--num_steps={NUM_STEPS}",
            "--checkpoint_every_steps=0",
            "--backup_every_secs=0.001",
        ]

    whole = runs.start("dtrain.main", *flags("whole"), **path)
    cut = runs.start("tests.killed", "3", "committed", *flags("cut"), **path)
    code, output = runs.finish(whole)
    assert code == errors.FINISHED, output
    code, output = runs.finish(cut)
    assert code == -signal.SIGKILL, output
    code, output = runs.run("dtrain.main", *flags("cut"), **path)
    assert code == errors.FINISHED, output
    assert f"resumed from {tmp_path}/cut/backup/ckpt-" in output
    last = f"checkpoints/ckpt-{NUM_STEPS}"
    digests = {
        name: tensors.digest(f"{tmp_path}/{name}/{last}")
        for name in ("whole", "cut")
    }
    assert digests["cut"] == digests["whole"]
    assert runs.metrics(tmp_path / "cut") == runs.metrics(tmp_path / "whole")

    code, output = runs.run(
        "dtrain.sample",
        f"--run_dir={tmp_path}/cut",
        "--model=own_networks:make",
        "--interpolation_frames=0",
        **path,
    )
    assert code == errors.FINISHED, output
    assert (tmp_path / "cut/drawn/samples.png").stat().st_size > 1000
