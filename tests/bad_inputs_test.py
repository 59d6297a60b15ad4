"""A mistake ends in one line, in code 78, and with nothing written over."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import keras
import numpy as np
import pytest

from dtrain import checkpoint_tool, errors, sample, store
from dtrain import main as dtrain_main
from dtrain.record import images
from dtrain.storage import sealed
from tests import runs

PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "main": lambda arguments: dtrain_main.run(["main", *arguments]),
    "sample": lambda arguments: sample.run(["sample", *arguments]),
    "store": lambda arguments: store.run(["store", *arguments]),
    "checkpoint_tool": checkpoint_tool.run,
}


class Bad(NamedTuple):
    """A command line that is wrong, and what its error says.

    Attributes:
        arguments: of the program, as a shell reads them; {place} is the
            directory that holds the bad files.
        said: parts of the error's line: the value, the rule, the remedy.
        program: which; those of main get the flags of a small run first.
        tf_config: of the environment.
    """

    arguments: str
    said: tuple[str, ...]
    program: str = "main"
    tf_config: str = ""


FLAGS = {
    "unknown": Bad(
        "--num_stepz=3", ("no flag --num_stepz; did you mean --num_steps? ",)
    ),
    "not an integer": Bad(
        "--batch_size=many", ("batch_size (many) must be a whole", "--help")
    ),
    "not a whole number": Bad(
        "--seed=1.5", ("seed (1.5) must be a whole number", "--help")
    ),
    "not a number": Bad(
        "--r1_gamma=a", ("r1_gamma (a) must be a number", "--help")
    ),
    "not a boolean": Bad(
        "--download=maybe", ("download (maybe) must be true or false",)
    ),
    "a value of a --no": Bad(
        "--nodownload=1", ("--nodownload=1 does not take an argument; --help",)
    ),
    "a value of --help": Bad("--help=seed", ("--help takes no value\n",)),
    "beyond 64 bits": Bad(
        "--num_steps=99999999999999999999",
        ("num_steps (99999999999999999999) must be below 9223372036854775808",),
    ),
    "no flag": Bad("train", ("'train' is not a flag", "--name=value")),
    "value left out": Bad("--seed", ("seed", "--help")),
    "flagfile missing": Bad(
        "--flagfile={place}/none",
        ("Unable to open flagfile", "{place}/none", "--help"),
    ),
    "flagfile of something else": Bad(
        "--flagfile={place}/unreadable/0.png", ("--help",)
    ),
    "NaN": Bad(
        "--generator_learning_rate=nan",
        ("generator_learning_rate (nan) must be a finite number",),
    ),
    "infinite": Bad(
        "--discriminator_learning_rate=inf",
        ("discriminator_learning_rate (inf) must be a finite number",),
    ),
    "negative": Bad(
        "--generator_learning_rate=-0.1", ("(-0.1) must be at least 0\n",)
    ),
    "too large": Bad("--beta_2=1", ("beta_2 (1.0) must be below 1",)),
    "a batch beyond 32 bits": Bad(
        "--batch_size=1000000000000000000",
        ("batch_size (1000000000000000000) must be below 2147483648",),
    ),
    "no batch": Bad("--batch_size=0", ("batch_size (0) must be at least 1",)),
    "no steps": Bad("--num_steps=0", ("num_steps (0) must be at least 1",)),
    "seed of 32 bits": Bad(
        "--seed=2147483648", ("seed (2147483648) must be below 2147483648",)
    ),
    "unknown choice": Bad(
        "--loss=hing",
        ("loss (hing) must be one of non_saturating, hinge", "mean hinge?"),
    ),
    "unknown strategy": Bad(
        "--strategy=tpu", ("strategy (tpu) must be one of default",)
    ),
    "too many devices": Bad(
        "--strategy=mirrored --num_devices=65",
        ("num_devices (65) must be below 65",),
    ),
}

CONTRADICTIONS = {
    "run_dir": Bad("--run_dir=", ("run_dir is empty; name a directory",)),
    "dataset": Bad("--dataset=", ("dataset is empty; try --dataset=digits",)),
    "channels": Bad("--channels=2", ("channels (2) must be 1", "3 (RGB)")),
    "micro_batches": Bad(
        "--batch_size=8 --micro_batches=3",
        ("batch_size (8) must be a multiple of micro_batches (3)",),
    ),
    "warmup_steps": Bad(
        "--warmup_steps=2 --num_steps=2",
        ("warmup_steps (2) must be below num_steps (2)",),
    ),
    "model": Bad(
        "--model=biggan",
        ("model (biggan) must be dcgan, ", "package.module:make"),
    ),
    "batch_norm": Bad(
        "--model=a:b --batch_norm", ("batch_norm", "--model=dcgan", "a:b")
    ),
    "augmentation of none": Bad(
        "--augment_target=0.5",
        ("augment_target (0.5) is an option of --augment=ada; give that",),
    ),
    "augmentation of another": Bad(
        "--augment=diff --augment_probability=0.3",
        ("augment_probability (0.3) is an option of --augment=ada",),
    ),
    "augmentation both ways": Bad(
        "--augment=ada --augment_probability=0.3 --augment_target=0.5",
        ("augment_target (0.5) is of a probability that follows", "leave out"),
    ),
    "gradient_penalty": Bad(
        "--gradient_penalty=5",
        ("gradient_penalty (5.0)", "--loss=wgan_gp", "use r1_gamma"),
    ),
    "init_map": Bad(
        "--init_map=gen=generator",
        ("init_map (gen=generator) is an option of --init_from; name a",),
    ),
    "init_parts": Bad(
        "--init_parts=all", ("init_parts (all) is an option of --init_from",)
    ),
    "num_devices": Bad(
        "--num_devices=2", ("num_devices (2) needs --strategy=mirrored",)
    ),
    "devices of a worker": Bad(
        "--strategy=multi_worker --num_devices=2",
        ("num_devices (2) must be 1", "start more workers"),
    ),
}

TWO_WORKERS = '"cluster": {"worker": ["a:1", "b:1"]}'
CLUSTERS = {
    "not JSON": Bad("", ("TF_CONFIG is not JSON",), tf_config="{worker: 1}"),
    "no object": Bad("", ("TF_CONFIG must hold",), tf_config="[1]"),
    "no cluster": Bad("", ("TF_CONFIG must hold",), tf_config="{}"),
    "no list": Bad(
        "", ("TF_CONFIG must hold",), tf_config='{"cluster": {"worker": 5}}'
    ),
    "no worker": Bad("", ("names no worker",), tf_config='{"cluster": {}}'),
    "no port": Bad(
        "",
        ("'a' must be host:port",),
        tf_config='{"cluster": {"worker": ["a"]}}',
    ),
    "twice": Bad(
        "",
        ("names a worker twice", "a:1"),
        tf_config='{"cluster": {"worker": ["a:1", "a:1"]}}',
    ),
    "no task": Bad(
        "",
        ("which worker this is", '"index": 0'),
        tf_config="{" + TWO_WORKERS + "}",
    ),
    "evaluator": Bad(
        "",
        ("'evaluator'", "must be a worker or the chief"),
        tf_config="{"
        + TWO_WORKERS
        + ', "task": {"type": "evaluator", "index": 0}}',
    ),
    "parameter server": Bad(
        "--strategy=multi_worker --start_timeout_secs=5",
        ("tasks of type 'ps'", "only chief and worker", "unset TF_CONFIG"),
        tf_config='{"cluster": {"ps": ["a:1"], "worker": ["b:1"]}, "task": '
        '{"type": "worker", "index": 0}}',
    ),
    "index": Bad(
        "",
        ("index (2) must be below the number of workers (2)",),
        tf_config="{"
        + TWO_WORKERS
        + ', "task": {"type": "worker", "index": 2}}',
    ),
    "strategy": Bad(
        "",
        ("TF_CONFIG names 2 workers", "--strategy=multi_worker or unset it"),
        tf_config="{"
        + TWO_WORKERS
        + ', "task": {"type": "worker", "index": 0}}',
    ),
}

DATA = {
    "folder missing": Bad(
        "--dataset=folder:{place}/none",
        ("must name a folder; {place}/none is not one",),
    ),
    "folder empty": Bad(
        "--dataset=folder:{place}/empty",
        ("{place}/empty holds no images (.png, .jpg, ",),
    ),
    "no path": Bad("--dataset=folder:", ("(folder:) names no path",)),
    "first image unreadable": Bad(
        "--dataset=folder:{place}/unreadable_first",
        ("0.png cannot be decoded", "repair or remove it"),
    ),
    "image unreadable": Bad(
        "--dataset=folder:{place}/unreadable",
        ("1.png cannot be decoded", "repair or remove it"),
    ),
    "mixed sizes": Bad(
        "--dataset=folder:{place}/mixed_sizes",
        ("8x8x1", "9x9x1", "give --image_size"),
    ),
    "mixed channels": Bad(
        "--dataset=folder:{place}/mixed_channels",
        ("has 1 channels", "give --channels=1 or --channels=3"),
    ),
    "several damaged": Bad(
        "--dataset=folder:{place}/damaged",
        (
            "2 of 3 pictures of folder:{place}/damaged are damaged, the first",
            "0.png cannot be decoded",
            "python -m dtrain.check_data --dataset=folder:{place}/damaged",
            "--move_to=DIR",
            "--skip_damaged",
            "  {place}/damaged/2.png cannot be decoded",
        ),
    ),
    "width alone": Bad(
        "--image_width=8", ("image_width (8) needs --image_size",)
    ),
    "fit alone": Bad(
        "--image_fit=pad", ("image_fit (pad) needs --image_size",)
    ),
    "option of another kind": Bad(
        "--labels=none",
        ("labels (none) is an option of --dataset=folder:/path or zip:/path",),
    ),
    "option of arrays": Bad(
        "--dataset=folder:{place}/mixed_sizes --array_layout=chw",
        ("array_layout (chw) is an option of --dataset=npz:/path",),
    ),
    "no colour": Bad(
        "--background=white",
        ("background (white) must be a colour as RRGGBB, such as ffffff",),
    ),
    "images beside classes": Bad(
        "--dataset=folder:{place}/beside",
        ("holds both images", "and folders of images", "move one"),
    ),
    "splits": Bad(
        "--dataset=folder:{place}/splits",
        ("split (train) of", "must be test, val", "folders of splits"),
    ),
    "split of a folder": Bad(
        "--dataset=folder:{place}/splits/val --split=test",
        ("split (test) does not apply to", "name the folder of the split"),
    ),
    "IDX missing": Bad(
        "--dataset=idx:{place}/empty", ("holds no train-images-idx3-ubyte",)
    ),
    "IDX truncated": Bad(
        "--dataset=idx:{place}/idx_truncated",
        ("is truncated: 207 bytes", "3x8x8", "asks for 208"),
    ),
    "IDX of another type": Bad(
        "--dataset=idx:{place}/idx_magic",
        ("starts with 00 00 0d 03", "starts with 00 00 08 03"),
    ),
    "IDX of two sets": Bad(
        "--dataset=idx:{place}/idx_mismatch",
        ("3 images", "2 labels", "must be of one set"),
    ),
    "IDX gzip cut": Bad(
        "--dataset=idx:{place}/idx_gzip", ("idx3-ubyte.gz cannot be read",)
    ),
    "IDX split": Bad(
        "--dataset=idx:{place}/idx_mismatch --split=dev",
        ("split (dev)", "must be train or test"),
    ),
    "npz missing": Bad(
        "--dataset=npz:{place}/none.npz", ("must name an npz file",)
    ),
    "npz of something else": Bad(
        "--dataset=npz:{place}/file", ("is not an npz file", "numpy.savez")
    ),
    "npz of objects": Bad(
        "--dataset=npz:{place}/objects.npz", ("cannot be read", "pickle")
    ),
    "npz of a wrong rank": Bad(
        "--dataset=npz:{place}/rank.npz",
        ("x in {place}/rank.npz is 64", "must be [n, height, width]"),
    ),
    "npz of too few labels": Bad(
        "--dataset=npz:{place}/labels.npz",
        ("y in {place}/labels.npz is 2", "each of the 3 images"),
    ),
    "npz of 0 to 255": Bad(
        "--dataset=npz:{place}/range.npz", ("[0, 255]", "as uint8")
    ),
    "npz without images": Bad(
        "--dataset=npz:{place}/names.npz", ("holds a, b", "x or images")
    ),
    "TFDS knows no such set": Bad(
        "--dataset=mnits", ("(mnits)", "did you mean mnist?", "digits")
    ),
    "TFDS set not prepared": Bad(
        "--dataset=mnist",
        ("mnist is not prepared in {place}/data", "--download", "idx:/path"),
    ),
    "no such kind": Bad(
        "--dataset=tar:/x.tar", ("tar:/x.tar", "must be folder:/path")
    ),
    "zip of something else": Bad(
        "--dataset=zip:{place}/file", ("must name a zip archive",)
    ),
    "no such table": Bad(
        "--dataset=folder:{place}/mixed_sizes --labels=none.csv",
        ("labels (none.csv) must be auto, folders, none, or a CSV or JSON",),
    ),
    "a place that TFDS takes for a pattern": Bad(
        "--data_dir={place}/a[b]",
        ("{place}/a[b]): TFDS takes '[' for a pattern", "name another"),
    ),
    "no such split": Bad(
        "--split=dev", ("split (dev) of digits must be train", "[:80%]")
    ),
    "store without a name": Bad(
        "--dataset=digits", ("no name; usage",), program="store"
    ),
    "store without a place": Bad(
        "digits8 --dataset=digits", ("data_dir is empty",), program="store"
    ),
}

MODELS = {
    "no such size of dcgan": Bad(
        "--image_size=9",
        ("dcgan makes no images of 9 pixels", "try --image_size=8 or 10"),
    ),
    "not square": Bad(
        "--dataset=npz:{place}/wide.npz",
        ("8x9 pixels are not square", "try --image_size=8"),
    ),
    "more than the memory holds": Bad(
        "--batch_size=10000000",
        ("batch_size (10000000) takes about", "GiB; try", "--micro_batches="),
    ),
    "networks that no memory holds": Bad(
        "--latent_size=2147483647 --base_channels=1024",
        ("needs more memory than the device has; lower --base_channels",),
    ),
    "no labels": Bad(
        "--dataset=npz:{place}/wide.npz --image_size=8 --conditional",
        ("conditional needs labels",),
    ),
    "no module": Bad(
        "--model=none_such:make",
        ("model (none_such:make): there is no module none_such",),
    ),
    "a file": Bad(
        "--model={place}/bad_models.py:make",
        ("must name a module, not a file",),
    ),
    "no attribute": Bad(
        "--model=bad_models:none", ("module bad_models has no 'none'",)
    ),
    "not callable": Bad(
        "--model=bad_models:NUMBER", ("of type int", "must be a function")
    ),
    "raises on import": Bad(
        "--model=bad_import:make",
        ("importing bad_import raised ZeroDivisionError", "bad_import.py:1"),
    ),
    "raises": Bad(
        "--model=bad_models:raises",
        ("raised KeyError: 'size'", "bad_models.py:"),
    ),
    "nothing": Bad(
        "--model=bad_models:nothing",
        ("returned None", "tuple (generator, discriminator)"),
    ),
    "functions": Bad(
        "--model=bad_models:functions", ("it must be a keras.Model",)
    ),
    "generator's shape": Bad(
        "--model=bad_models:small_images",
        ("the generator turned", "[2, 4, 4, 1]", "must be [2, 8, 8, 1]"),
    ),
    "generator's input": Bad(
        "--model=bad_models:long_latents",
        ("the generator takes float32 [None, ", "it is given float32 [2, 4]"),
    ),
    "discriminator's shape": Bad(
        "--model=bad_models:two_logits",
        ("the discriminator turned", "[2, 2]", "must be [2] or [2, 1]"),
    ),
    "discriminator without weights": Bad(
        "--model=bad_models:no_weights", ("has no variable to train",)
    ),
    "a variable that Keras does not know": Bad(
        "--model=bad_models:raw_variable",
        ("the generator has a tf.Variable of its own, gain:0", "add_weight"),
    ),
}

BAD_MODELS = """
import keras
import tensorflow as tf
from keras import layers

NUMBER = 3


def networks(size=8, latents=4, judge=None):
    generator = keras.Sequential(
        [
            keras.Input((latents,)),
            layers.Dense(size * size),
            layers.Reshape((size, size, 1)),
        ]
    )
    discriminator = keras.Sequential([layers.Flatten()])
    if judge is not None:
        discriminator.add(judge)
    return generator, discriminator


def raises(config, image_shape, num_classes):
    return {}["size"]


def nothing(config, image_shape, num_classes):
    networks()


def functions(config, image_shape, num_classes):
    return (lambda latents: latents), (lambda images: images)


def small_images(config, image_shape, num_classes):
    return networks(size=4, judge=layers.Dense(1))


def long_latents(config, image_shape, num_classes):
    return networks(latents=5, judge=layers.Dense(1))


def two_logits(config, image_shape, num_classes):
    return networks(judge=layers.Dense(2))


def fits(config, image_shape, num_classes):
    return networks(judge=layers.Dense(1))


class Gain(layers.Layer):
    def __init__(self):
        super().__init__()
        self.gain = tf.Variable(1.0, name="gain")

    def call(self, inputs):
        return self.gain * inputs


def raw_variable(config, image_shape, num_classes):
    generator, discriminator = networks(judge=layers.Dense(1))
    generator.add(Gain())
    return generator, discriminator


def no_weights(config, image_shape, num_classes):
    return networks(judge=layers.Lambda(lambda x: x[:, 0]))
"""

# Those of {place}/run: a run of two steps, with a checkpoint at each.
RUN_DIRECTORIES = {
    "a file": Bad(
        "--run_dir={place}/file", ("{place}/file) is a file; name a directory",)
    ),
    "below a file": Bad(
        "--run_dir={place}/file/run",
        ("run_dir ({place}/file/run) cannot be made", "name another one"),
    ),
    "backups in a file": Bad(
        "--backup_dir={place}/file",
        ("backup_dir ({place}/file) is a file; name a directory",),
    ),
    "backups below a file": Bad(
        "--backup_dir={place}/file/backups",
        ("backup_dir ({place}/file/backups) cannot be made", "name another"),
    ),
    "checkpoints in a file": Bad(
        "--checkpoint_dir={place}/file",
        ("checkpoint_dir ({place}/file) is a file; name a directory",),
    ),
    "one slash": Bad(
        "--run_dir=gs:/bucket/run",
        ("run_dir (gs:/bucket/run) must be of the form gs://BUCKET/DIR",),
    ),
    "no bucket": Bad(
        "--run_dir=gs:///run",
        ("run_dir (gs:///run) must be of the form gs://BUCKET/DIR",),
    ),
    "the address of a file": Bad(
        "--run_dir=file://{place}/x",
        ("(file://{place}/x) must be a path alone; write {place}/x",),
    ),
    "one slash for the drawing": Bad(
        "--run_dir={place}/run --output_dir=gs:/bucket",
        ("output_dir (gs:/bucket) must be of the form gs://BUCKET/DIR",),
        program="sample",
    ),
    "another store for the drawing": Bad(
        "--run_dir={place}/run --output_dir=s3://bucket",
        ("output_dir (s3://bucket) must be on a disk or gs://",),
        program="sample",
    ),
    "no place for config.json": Bad(
        "--run_dir={place}/unwritable",
        ("run_dir ({place}/unwritable) cannot be written to", "name another"),
    ),
    "something else": Bad(
        "--run_dir={place}/occupied",
        ("is not empty and holds no run: thesis.tex", "name another"),
    ),
    "other settings": Bad(
        "--run_dir={place}/run --seed=7 --loss=hinge",
        ("belongs to another run", "seed was 0 and is now 7", "loss was"),
    ),
    "other data": Bad(
        "--run_dir={place}/run --dataset=npz:{place}/few.npz",
        ("dataset was digits", "num_images was 1797 and is now 3"),
    ),
    "config.json damaged": Bad(
        "--run_dir={place}/damaged_config",
        ("config.json is damaged", "name another run_dir"),
    ),
    "config.json of another version": Bad(
        "--run_dir={place}/newer_config",
        ("newer_config/config.json", "later_flag"),
    ),
    "nothing to resume": Bad(
        "--run_dir={place}/none --resume=must",
        ("resume (must): {place}/none holds no run",),
    ),
    "no checkpoint to resume": Bad(
        "--run_dir={place}/no_checkpoint --resume=must",
        ("{place}/no_checkpoint was saved to", "nothing of it is there"),
    ),
    "a run already": Bad(
        "--run_dir={place}/run --resume=never --max_to_keep=7",
        ("resume (never): {place}/run holds checkpoints up to step 2",),
    ),
    "checkpoint truncated": Bad(
        "--run_dir={place}/truncated --num_steps=3",
        ("truncated/checkpoints/ckpt-2 does not verify: its data",),
    ),
    "index damaged": Bad(
        "--run_dir={place}/damaged_index --num_steps=3",
        ("damaged_index/checkpoints/ckpt-2 does not verify: its index",),
    ),
    "damaged checkpoint to draw": Bad(
        "--run_dir={place}/truncated --checkpoint=1",
        ("truncated/checkpoints/ckpt-1 does not verify", "another step"),
        program="sample",
    ),
    "another model's checkpoint": Bad(
        "--run_dir={place}/changed --num_steps=3 --base_channels=4",
        ("does not fit the networks of --model=dcgan", "as it was"),
    ),
    "another structure's checkpoint": Bad(
        "--run_dir={place}/swapped --num_steps=3 --model=bad_models:fits",
        ("does not fit the networks of --model=bad_models:fits", "as it was"),
    ),
    "config.json of another kind": Bad(
        "--run_dir={place}/list_config", ("config.json is damaged",)
    ),
    "config.json of bytes": Bad(
        "--run_dir={place}/bytes_config", ("config.json is damaged",)
    ),
    "no run to draw": Bad(
        "--run_dir={place}/empty",
        ("{place}/empty holds no run",),
        program="sample",
    ),
    "no run_dir to draw": Bad(
        "", ("run_dir is missing; use --run_dir=DIR",), program="sample"
    ),
    "no such step to draw": Bad(
        "--run_dir={place}/run --checkpoint=5",
        ("no checkpoint of step 5; there: 0, 1, 2",),
        program="sample",
    ),
    "a negative step to draw": Bad(
        "--run_dir={place}/run --checkpoint=-7",
        ("checkpoint (-7) must be",),
        program="sample",
    ),
    "seeds that are no numbers": Bad(
        "--run_dir={place}/run --seeds=3,all",
        ("seeds (3,all) must be numbers and ranges", "'all' is neither"),
        program="sample",
    ),
    "seeds backwards": Bad(
        "--run_dir={place}/run --seeds=9-3",
        ("seeds (9-3) must be numbers and ranges", "'9-3' is neither"),
        program="sample",
    ),
    "too many seeds": Bad(
        "--run_dir={place}/run --seeds=0-2147483647",
        ("seeds (0-2147483647) must be at most 100,000 numbers",),
        program="sample",
    ),
    "a huge seed": Bad(
        "--run_dir={place}/run --seeds=2147483648",
        ("seeds (2147483648) must lie below 2147483648",),
        program="sample",
    ),
    "classes of a model without": Bad(
        "--run_dir={place}/run --classes=1",
        ("classes (1) are of a conditional model, and", "leave out --classes"),
        program="sample",
    ),
    "a walk through no classes": Bad(
        "--run_dir={place}/run --interpolation_through=classes",
        ("interpolation_through (classes) needs a conditional model",),
        program="sample",
    ),
    "a walk through something": Bad(
        "--run_dir={place}/run --interpolation_through=all",
        ("interpolation_through (all) must be one of seeds, classes",),
        program="sample",
    ),
    "truncated below 0": Bad(
        "--run_dir={place}/run --truncation=-1",
        ("truncation (-1.0) must be at least 0",),
        program="sample",
    ),
    "a word for a number": Bad(
        "--run_dir={place}/run --interpolation_frames=all",
        ("interpolation_frames (all) must be a whole number", "--help"),
        program="sample",
    ),
    "a film of one picture": Bad(
        "--run_dir={place}/run --film --interpolation_frames=0",
        ("film needs two grids, and {place}/run/samples has",),
        program="sample",
    ),
    "no place for the drawing": Bad(
        "--run_dir={place}/run --output_dir={place}/file",
        ("output_dir ({place}/file) cannot be made", "name another one"),
        program="sample",
    ),
    "unknown command": Bad(
        "diges {place}/run",
        ("invalid choice: 'diges' (choose from", "; see python -m dtrain."),
        program="checkpoint_tool",
    ),
    "no checkpoint": Bad(
        "digest {place}/run/checkpoints/ckpt-9",
        ("there is no checkpoint {place}/run/checkpoints/ckpt-9; name it by",),
        program="checkpoint_tool",
    ),
    "digest of a damaged one": Bad(
        "digest {place}/truncated/checkpoints/ckpt-2",
        ("ckpt-2 is no readable checkpoint",),
        program="checkpoint_tool",
    ),
}

ALL = {
    f"{kind}: {name}": bad
    for kind, table in (
        ("flags", FLAGS),
        ("contradictions", CONTRADICTIONS),
        ("clusters", CLUSTERS),
        ("data", DATA),
        ("models", MODELS),
        ("run directories", RUN_DIRECTORIES),
    )
    for name, bad in table.items()
}


def test_there_are_enough() -> None:
    assert len(ALL) >= 45


# The bad files.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Makes a directory of everything that the tables name."""
    place = tmp_path_factory.mktemp("bad")
    (place / "file").write_text("a file, and no directory\n")
    (place / "empty").mkdir()
    (place / "occupied").mkdir()
    (place / "unwritable/config.json.tmp").mkdir(parents=True)
    (place / "occupied/thesis.tex").write_text("three years of work\n")
    (place / "bad_models.py").write_text(BAD_MODELS)
    (place / "bad_import.py").write_text("1 / 0\n")
    write_folders(place)
    write_idx(place)
    write_npz(place)
    write_runs(place)
    return place


def write_folders(place: pathlib.Path) -> None:
    def grey(path: str, side: int = 8, channels: int = 1) -> None:
        image = np.zeros((side, side, channels), np.uint8)
        images.write_png(str(place / path), image)

    for path in ("unreadable/0.png", "mixed_sizes/0.png"):
        grey(path)
    for path in ("mixed_channels/0.png", "beside/0.png", "beside/cats/0.png"):
        grey(path)
    for path in ("splits/val/0.png", "splits/test/0.png", "damaged/1.png"):
        grey(path)
    grey("mixed_sizes/1.png", side=9)
    grey("mixed_channels/1.png", channels=3)
    (place / "unreadable/1.png").write_bytes(b"no picture")
    for name in ("0.png", "2.png"):
        (place / "damaged" / name).write_bytes(b"no picture")
    (place / "unreadable_first").mkdir()
    (place / "unreadable_first/0.png").write_bytes(b"no picture")


def write_idx(place: pathlib.Path) -> None:
    pixels = bytes((0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 8, 0, 0, 0, 8))
    pixels += bytes(3 * 64)
    labels = bytes((0, 0, 8, 1, 0, 0, 0, 2, 0, 1))
    name = "train-images-idx3-ubyte"
    contents = {
        f"idx_truncated/{name}": pixels[:-1],
        f"idx_magic/{name}": b"\0\0\x0d" + pixels[3:],
        f"idx_mismatch/{name}": pixels,
        "idx_mismatch/train-labels-idx1-ubyte": labels,
        f"idx_gzip/{name}.gz": gzip.compress(pixels)[:-9],
    }
    for path, content in contents.items():
        (place / path).parent.mkdir(exist_ok=True)
        (place / path).write_bytes(content)


def write_npz(place: pathlib.Path) -> None:
    pixels = np.zeros((3, 8, 8), np.uint8)
    np.savez(place / "objects.npz", x=np.array([pixels, None], object))
    np.savez(place / "rank.npz", x=np.zeros(64, np.uint8))
    np.savez(place / "labels.npz", x=pixels, y=np.zeros(2, np.int64))
    np.savez(
        place / "range.npz", x=np.linspace(0.0, 255.0, 64).reshape(1, 8, 8)
    )
    np.savez(place / "names.npz", a=pixels, b=pixels)
    np.savez(place / "wide.npz", x=np.zeros((3, 8, 9), np.uint8))
    np.savez(place / "few.npz", x=pixels)


def write_runs(place: pathlib.Path) -> None:
    run_dir = place / "run"
    arguments = [*runs.SMALL, f"--run_dir={run_dir}", "--num_steps=2"]
    code = PROGRAMS["main"]([*arguments, "--checkpoint_every_steps=1"])
    assert code == errors.FINISHED
    names = (
        "damaged_config list_config bytes_config newer_config no_checkpoint "
        "truncated damaged_index changed swapped"
    )
    for name in names.split():
        shutil.copytree(run_dir, place / name)
    for name in ("damaged_config", "list_config", "bytes_config"):
        # Or it is taken from there.
        shutil.rmtree(place / name / "checkpoints")
    (place / "damaged_config/config.json").write_text('{"config": {')
    (place / "list_config/config.json").write_text('{"config": []}')
    (place / "bytes_config/config.json").write_bytes(b"\xff\xfe{")
    edit(place / "newer_config/config.json", later_flag=1)
    shutil.rmtree(place / "no_checkpoint/checkpoints")
    for data in place.glob("truncated/checkpoints/ckpt-*.data*"):
        data.write_bytes(data.read_bytes()[:-2000])
    for index in place.glob("damaged_index/checkpoints/ckpt-*.index"):
        index.write_bytes(index.read_bytes()[:-8])
    # As if dcgan had changed between two versions of dtrain.
    edit(place / "changed/config.json", base_channels=4)
    edit(place / "swapped/config.json", model="bad_models:fits")


def edit(path: pathlib.Path, **changes: object) -> None:
    """Changes settings in a config.json."""
    values = json.loads(path.read_text())
    values["config"].update(changes)
    path.write_bytes(sealed.dumps(values))


def is_claim(path: pathlib.Path) -> bool:
    """Tells what a claim leaves, which a later start does not mind."""
    if path.name == "checkpoints":
        return {each.name for each in path.iterdir()} <= {".lock"}
    return path.name == ".lock"


def snapshot(place: pathlib.Path) -> dict[str, bytes | None]:
    """Reads all that a directory holds; None is a directory."""
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(place.rglob("*"))
        # TFDS asks whether a set is prepared, and data_dir is its own.
        if place / "data" not in (path, *path.parents) and not is_claim(path)
    }


@pytest.fixture
def surroundings(
    place: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pathlib.Path]:
    """Lets models be imported from the bad files, and checks those after."""
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = snapshot(place)
    yield place
    keras.config.set_dtype_policy("float32")
    assert snapshot(place) == before


@pytest.mark.parametrize("name", list(ALL))
def test_one_line(
    name: str,
    surroundings: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = ALL[name]
    monkeypatch.setenv("TF_CONFIG", bad.tf_config)
    arguments = command_line(bad, surroundings)
    with pytest.raises(SystemExit) as caught:
        errors.exit_with(lambda: PROGRAMS[bad.program](arguments))
    printed = capsys.readouterr()
    assert printed.out == ""
    check_line(bad, surroundings, caught.value.code, printed.err)


def command_line(bad: Bad, place: pathlib.Path) -> list[str]:
    """Makes the arguments; those of main are a small run that would end."""
    arguments = shlex.split(bad.arguments.replace("{place}", str(place)))
    if bad.program != "main":
        return arguments
    small = [*runs.SMALL, "--num_steps=2", f"--run_dir={place}/fresh"]
    if any("mni" in argument for argument in arguments):
        small.append(f"--data_dir={place}/data")
    return [*small, *arguments]


def check_line(
    bad: Bad, place: pathlib.Path, code: object, printed: str
) -> None:
    assert code == errors.USER_ERROR
    # Each second that it takes to read the data has a line of its own.
    printed = re.sub(r"(?m)^reading \w+ into memory: .*\n", "", printed)
    assert printed.startswith("error: ")
    assert printed.endswith("\n")
    first, *details = printed.splitlines()
    # What a checkpoint does not fit in is told below.
    assert all(each.startswith(("  ", "this would")) for each in details)
    assert len(details) < 25
    assert len(first) < 800
    for part in bad.said:
        assert part.replace("{place}", str(place)) in printed


LATE = {
    "image unreadable": Bad(
        "--dataset=folder:{place}/unreadable",
        ("1.png cannot be decoded", "repair or remove it"),
    ),
    "mixed sizes": Bad(
        "--dataset=folder:{place}/mixed_sizes",
        ("8x8x1", "9x9x1", "give --image_size"),
    ),
}


@pytest.mark.parametrize("name", list(LATE))
def test_image_that_is_read_when_it_is_needed(
    name: str,
    surroundings: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = LATE[name]
    arguments = command_line(bad, surroundings)
    arguments += ["--cache_gib=0", f"--run_dir={tmp_path}/run"]
    with pytest.raises(SystemExit) as caught:
        errors.exit_with(lambda: PROGRAMS["main"](arguments))
    check_line(bad, surroundings, caught.value.code, capsys.readouterr().err)
    # Nothing but the start: the run goes on when the image is mended.
    assert not list(tmp_path.glob("run/checkpoints/ckpt-[1-9]*"))


# What only a process of its own shows: several replicas, and the exit.
TWO_REPLICAS = "--strategy=mirrored --num_devices=2 "
IN_A_PROCESS = {
    "batch_size": Bad(
        TWO_REPLICAS + "--batch_size=7",
        ("batch_size (7) must be a multiple of the 2 replicas; try 6 or 8",),
    ),
    "micro_batches": Bad(
        TWO_REPLICAS + "--batch_size=6 --micro_batches=3",
        ("micro_batches (3) must be a multiple of the 2 replicas; try 0",),
    ),
    "a tree that is cut": Bad(
        TWO_REPLICAS + "--batch_size=6 --micro_batches=6 --reduction=ordered",
        ("2 replicas cannot share 6 micro_batches", "use 1 or 3 or 6"),
    ),
    "compiled BatchNorm": Bad(
        TWO_REPLICAS + "--batch_norm --jit_compile=on",
        ("jit_compile (on)", "use auto or off"),
    ),
    # TensorFlow would say more of these at the end of the process.
    "another model": RUN_DIRECTORIES["another model's checkpoint"],
    "another structure": RUN_DIRECTORIES["another structure's checkpoint"],
    "model": Bad("--model=bad_import:make", ("raised ZeroDivisionError",)),
    "flag": Bad("--seed=-1", ("seed (-1) must be at least 0",)),
}


def test_exit_code_and_output_of_a_process(surroundings: pathlib.Path) -> None:
    path = f"{runs.ROOT}{os.pathsep}{surroundings}"
    processes = {
        name: runs.start(
            "dtrain.main",
            *command_line(bad, surroundings),
            PYTHONPATH=path,
            PYTHONDONTWRITEBYTECODE="1",
        )
        for name, bad in IN_A_PROCESS.items()
    }
    for name, process in processes.items():
        code, output = runs.finish(process)
        check_line(IN_A_PROCESS[name], surroundings, code, output)
