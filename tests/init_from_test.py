"""Runs that start with the weights of another checkpoint."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain import checkpoint_tool, errors
from dtrain.bundle import fit, reader, tensors
from dtrain.checkpoint import writing
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.gan import state as gan_lib
from dtrain.run import init_from
from dtrain.toolbox import edits
from tests import foreign_formats, replicas, runs

CONFIG = Config(
    batch_size=8, base_channels=2, latent_size=4, sample_every_steps=0
)
OPTIMIZERS = ("generator_optimizer", "discriminator_optimizer")
NETWORKS = ("generator", "ema_generator", "discriminator")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of ten steps."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    code, output = runs.run(
        "dtrain.main", *runs.SMALL, f"--run_dir={run_dir}", "--num_steps=10"
    )
    assert code == errors.FINISHED, output
    return run_dir


@pytest.fixture(params=["default", "mirrored"])
def gan(request: pytest.FixtureRequest) -> gan_lib.GAN:
    strategy = (
        replicas.mirrored(2)
        if request.param == "mirrored"
        else tf.distribute.get_strategy()
    )
    return gan_lib.GAN(
        dataclasses.replace(CONFIG, strategy=request.param, seed=5),
        strategy,
        (8, 8, 1),
        10,
    )


def state(gan: gan_lib.GAN) -> dict[str, np.ndarray]:
    live = fit.of_objects(gan.checkpoint)
    return {name: live[name].read() for name in live}


def saved(prefix: str) -> dict[str, np.ndarray]:
    tree = reader.read(prefix)
    return {name: tree[name].read() for name in tree}


@pytest.mark.parametrize(
    ("parts", "taken"),
    [
        ("generator", ("generator", "ema_generator")),
        ("networks", NETWORKS),
        ("all", (*NETWORKS, *OPTIMIZERS)),
    ],
)
def test_what_is_taken_and_what_stays(
    parts: str, taken: tuple[str, ...], gan: gan_lib.GAN, source: pathlib.Path
) -> None:
    before, there = state(gan), saved(f"{source}/checkpoints/ckpt-10")
    config = dataclasses.replace(
        CONFIG, init_from=str(source), init_parts=parts
    )
    told = init_from.take(gan.checkpoint, config, init_from.find(config))
    assert (told.step, told.parts) == (10, taken)
    wholes = {"step", "divergence", *NETWORKS, *OPTIMIZERS}
    assert set(told.left) == wholes - set(taken)
    assert f"; not taken: {', '.join(sorted(told.left))}" in str(told)
    after = state(gan)
    for name, value in after.items():
        expected = there if name.partition("/")[0] in taken else before
        if name != "save_counter":
            np.testing.assert_array_equal(value, expected[name], name)
    assert after["step"] == 0


def test_from_a_generator_alone_that_is_called_otherwise(
    gan: gan_lib.GAN, source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The average begins as the generator, as that of any new run does."""
    tree = reader.read(f"{source}/checkpoints/ckpt-10")
    other = edits.keep(["gen"])(edits.rename({"generator": "gen"})(tree))
    writing.commit(other, f"{tmp_path}/other/ckpt-0")
    config = dataclasses.replace(
        CONFIG,
        init_from=f"{tmp_path}/other",
        init_parts="generator",
        init_map="gen=generator",
    )
    init_from.take(gan.checkpoint, config, init_from.find(config))
    after = state(gan)
    for name in tree.below("generator"):
        value = tree[name].read()
        np.testing.assert_array_equal(after[name], value)
        np.testing.assert_array_equal(after[f"ema_{name}"], value)


def network(size: int) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((size,)),
            keras.layers.Dense(4, name="first"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(2, name="last"),
        ]
    )


@pytest.mark.parametrize("parts", ["networks", "all"])
def test_from_a_program_of_keras_2(parts: str, tmp_path: pathlib.Path) -> None:
    prefix, expected = foreign_formats.keras_2_gan(str(tmp_path))
    networks = {"generator": network(3), "discriminator": network(2)}
    optimizers = {}
    for name, model in networks.items():
        optimizers[f"{name}_optimizer"] = keras.optimizers.Adam()
        optimizers[f"{name}_optimizer"].build(model.trainable_variables)
    checkpoint = tf.train.Checkpoint(
        ema_generator=network(3), **networks, **optimizers
    )
    config = dataclasses.replace(CONFIG, init_from=prefix, init_parts=parts)
    init_from.take(checkpoint, config, init_from.find(config))
    for part in ("generator", "discriminator"):
        for layer in networks[part].layers:
            for variable in layer.variables:
                number = foreign_formats.KERAS_2_LAYERS[layer.name]
                edge = f"layer_with_weights-{number}"
                name = f"{part}/{edge}/{variable.name}"
                np.testing.assert_array_equal(variable, expected[name], name)
        optimizer = optimizers[f"{part}_optimizer"]
        assert int(optimizer.iterations) == (parts == "all")
        moved = any(np.any(slot) for slot in optimizer.variables[2:])
        assert moved == (parts == "all")
    for one, two in zip(
        *(checkpoint.ema_generator.weights, networks["generator"].weights),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


def test_from_a_program_of_tensorflow_1(tmp_path: pathlib.Path) -> None:
    prefix, expected = foreign_formats.tensorflow_1(str(tmp_path))
    dense = keras.layers.Dense(3, use_bias=False, name="dense")
    generator = keras.Sequential([keras.Input((4,)), dense])
    checkpoint = tf.train.Checkpoint(
        generator=generator, ema_generator=keras.models.clone_model(generator)
    )
    config = dataclasses.replace(
        CONFIG, init_from=prefix, init_parts="generator"
    )
    told = init_from.take(checkpoint, config, init_from.find(config))
    assert told.step == 1000
    kernel = expected["generator/dense/kernel"]
    np.testing.assert_array_equal(dense.kernel, kernel)


@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5", "m.npz"])
def test_a_file_of_tensors_is_imported_first(
    name: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / name
    path.touch()
    config = dataclasses.replace(CONFIG, init_from=str(path))
    with pytest.raises(
        UserError, match=f"checkpoint_tool import {path} --into"
    ):
        init_from.find(config)


@pytest.mark.parametrize("has_average", [True, False])
def test_layers_that_a_model_holds_in_a_list(
    has_average: bool, tmp_path: pathlib.Path
) -> None:
    """TensorFlow does not reach them, and all are taken."""
    first, second = (
        gan_lib.GAN(
            dataclasses.replace(
                CONFIG, seed=seed, model="tests.gan_test:make_stateful"
            ),
            tf.distribute.get_strategy(),
            (8, 8, 1),
            0,
        )
        for seed in (1, 2)
    )
    for average in first.averages["generator"].weights:
        average.assign(tf.ones_like(average))
    prefix = first.checkpoint.write(f"{tmp_path}/ckpt-0")
    if not has_average:
        tree = reader.read(prefix)
        lost = [name for name in tree if "ema_generator" in name]
        prefix = f"{tmp_path}/other/ckpt-0"
        writing.commit(tree.without(lost), prefix)
    config = dataclasses.replace(CONFIG, init_from=prefix)
    init_from.take(second.checkpoint, config, init_from.find(config))
    averages = (
        first.averages["generator"] if has_average else first.networks.generator
    )
    for source, target in (
        (first.networks.generator, second.networks.generator),
        (first.networks.discriminator, second.networks.discriminator),
        (averages, second.averages["generator"]),
    ):
        for one, two in zip(source.variables, target.variables, strict=True):
            if "seed" not in one.path:
                np.testing.assert_array_equal(one, two, one.path)


def test_from_a_checkpoint_with_an_iterator(tmp_path: pathlib.Path) -> None:
    prefix, expected = foreign_formats.iterator(str(tmp_path))
    checkpoint = tf.train.Checkpoint(
        generator=network(3), ema_generator=network(3)
    )
    config = dataclasses.replace(
        CONFIG, init_from=prefix, init_parts="generator"
    )
    told = init_from.take(checkpoint, config, init_from.find(config))
    assert len(told.digest) == 64
    kernel = checkpoint.generator.layers[0].kernel
    np.testing.assert_array_equal(kernel, expected["generator/first/kernel"])


def test_one_that_does_not_fit_changes_nothing(
    gan: gan_lib.GAN, tmp_path: pathlib.Path
) -> None:
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    tf.train.Checkpoint(generator=network).write(f"{tmp_path}/ckpt-1")
    before = state(gan)
    config = dataclasses.replace(
        CONFIG, init_from=f"{tmp_path}/ckpt-1", init_parts="generator"
    )
    with pytest.raises(UserError, match="does not fit this run") as caught:
        init_from.take(gan.checkpoint, config, init_from.find(config))
    assert "generator/" in "\n".join(caught.value.details)
    after = state(gan)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], name)


def test_a_run_that_goes_on_does_not_look_again(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    command = (
        *("dtrain.main", *runs.SMALL, f"--run_dir={tmp_path}/run"),
        *(f"--init_from={copy}", "--init_parts=all", "--seed=3"),
    )
    code, output = runs.run(*command, "--num_steps=2")
    assert code == errors.FINISHED, output
    assert "init      generator, ema_generator, discriminator, " in output
    noted = json.loads((tmp_path / "run/init_from.json").read_text())
    assert noted["checkpoint"] == f"{copy}/checkpoints/ckpt-10"
    assert noted["step"] == 10
    shutil.rmtree(copy)
    code, output = runs.run(*command, "--num_steps=4")
    assert code == errors.FINISHED, output
    assert "resumed from" in output
    assert "init " not in output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--init_from=NOWHERE",), "error: there is no checkpoint NOWHERE; "),
        (("--init_from=SOURCE", "--init_map=x"), "error: init_map (x) must be"),
        (
            ("--init_from=SOURCE", "--init_map=gen=g"),
            "error: rename (gen): the checkpoint holds nothing of this name",
        ),
        (
            ("--init_from=SOURCE", "--base_channels=3"),
            "does not fit this run: ",
        ),
    ],
)
def test_mistakes_leave_no_run(
    flags: tuple[str, ...],
    words: str,
    source: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    named = [flag.replace("SOURCE", str(source)) for flag in flags]
    code, output = runs.run(
        *("dtrain.main", *runs.SMALL, f"--run_dir={tmp_path}/run", *named)
    )
    assert code == errors.USER_ERROR, output
    assert words in output
    assert "Traceback" not in output
    assert not (tmp_path / "run/config.json").exists()
    assert not (tmp_path / "run/init_from.json").exists()


def test_what_the_tool_edited_is_where_a_run_starts(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """And the other way round: a run in whose place it is put goes on."""
    output = f"{tmp_path}/run/checkpoints/ckpt-7"
    arguments = (
        *("edit", str(source), f"--output={output}", "--set_step=7"),
        "--zero_slots=*",
    )
    assert checkpoint_tool.run(arguments) == errors.FINISHED
    code, told = runs.run(
        *("dtrain.main", *runs.SMALL, f"--init_from={output}"),
        *(f"--run_dir={tmp_path}/new", "--num_steps=1"),
    )
    assert code == errors.FINISHED, told
    code, told = runs.run(
        *("dtrain.main", *runs.SMALL, f"--run_dir={tmp_path}/run"),
        "--num_steps=9",
    )
    assert code == errors.FINISHED, told
    assert f"resumed from {output}" in told


def test_a_start_that_is_killed_before_it_has_saved(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Meanwhile the run that it begins from has gone on."""
    moving, run_dir = tmp_path / "moving", tmp_path / "run"
    shutil.copytree(source, moving)
    begins = [*runs.SMALL, f"--init_from={moving}", "--num_steps=3"]
    code, output = runs.run("dtrain.main", *begins, f"--run_dir={run_dir}")
    assert code == errors.FINISHED, output
    ends_with = tensors.digest(f"{run_dir}/checkpoints/ckpt-3")
    # As if nothing had been saved.
    for name in ("checkpoints", "backup", "saved.json", "metrics.jsonl"):
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    code, output = runs.run(
        "dtrain.main", *runs.SMALL, f"--run_dir={moving}", "--num_steps=12"
    )
    assert code == errors.FINISHED, output
    code, output = runs.run("dtrain.main", *begins, f"--run_dir={run_dir}")
    assert code == errors.FINISHED, output
    assert f"of {moving}/checkpoints/ckpt-10" in output
    assert tensors.digest(f"{run_dir}/checkpoints/ckpt-3") == ends_with


def test_what_is_not_what_the_run_has_begun_from(
    source: pathlib.Path, gan: gan_lib.GAN
) -> None:
    config = dataclasses.replace(CONFIG, init_from=str(source))
    begun = init_from.find(config)._replace(digest="0" * 64)
    with pytest.raises(UserError, match="is not what the run has begun from"):
        init_from.take(gan.checkpoint, config, begun)


# Growth.


def grown(blocks: int) -> keras.Model:
    """A network of blocks; the head is of the last one's width."""
    return keras.Sequential(
        [
            keras.Input((4,)),
            *(
                keras.layers.Dense(3, name=f"block_{number}")
                for number in range(blocks)
            ),
            keras.layers.Dense(2 + blocks, name=f"head_{blocks}"),
        ]
    )


def of_blocks(blocks: int) -> tf.train.Checkpoint:
    parts = {name: grown(blocks) for name in NETWORKS}
    optimizers = {}
    for name in ("generator", "discriminator"):
        optimizer = keras.optimizers.Adam(name=f"{name}_optimizer")
        optimizer.build(parts[name].trainable_variables)
        optimizers[optimizer.name] = optimizer
    return tf.train.Checkpoint(**parts, **optimizers)


@pytest.mark.parametrize("parts", ["generator", "networks", "all"])
def test_a_run_grows_from_a_smaller_one(
    parts: str, tmp_path: pathlib.Path
) -> None:
    of_blocks(1).write(f"{tmp_path}/small/ckpt-1")
    small = saved(f"{tmp_path}/small/ckpt-1")
    large = of_blocks(2)
    live = fit.of_objects(large)
    before = {name: live[name].read() for name in live}
    config = dataclasses.replace(
        CONFIG,
        init_from=f"{tmp_path}/small/ckpt-1",
        init_parts=parts,
        init_new="generator/block_1,generator/head_*,discriminator/block_1,"
        "discriminator/head_2",
    )
    if parts == "generator":
        config = dataclasses.replace(
            config, init_new="generator/block_1,head_2"
        )
    told = init_from.take(large, config, init_from.find(config))
    taken = 0
    for name in live:
        top = name.partition("/")[0]
        is_old = top in told.parts and name in small and "head" not in name
        expected = small[name] if is_old else before[name]
        np.testing.assert_array_equal(live[name].read(), expected, name)
        taken += is_old
    assert "generator/head_1" in told.left
    assert "new: generator/block_1" in str(told)
    assert taken >= {"generator": 4, "networks": 6, "all": 14}[parts]


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ("", "does not fit this run"),
        ("generator/block_1", "does not have discriminator/block_1/bias and"),
        ("block_7", r"init_new (block_7) names nothing that is taken; that"),
    ],
)
def test_what_is_new_must_be_named(
    new: str, said: str, tmp_path: pathlib.Path
) -> None:
    of_blocks(1).write(f"{tmp_path}/small/ckpt-1")
    config = dataclasses.replace(
        CONFIG, init_from=f"{tmp_path}/small/ckpt-1", init_new=new
    )
    with pytest.raises(UserError, match=re.escape(said)):
        init_from.take(of_blocks(2), config, init_from.find(config))


def test_frozen_layers_stay_as_they_were_found(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """FreezeD, on two replicas, with other layers of both networks trained."""
    frozen = "discriminator/from_image*"
    code, output = runs.run(
        *("dtrain.main", *runs.SMALL, f"--run_dir={tmp_path}/run"),
        *("--strategy=mirrored", "--num_devices=2", "--num_steps=3"),
        *(f"--init_from={source}", f"--frozen_layers={frozen}"),
    )
    assert code == errors.FINISHED, output
    before = saved(f"{source}/checkpoints/ckpt-10")
    after = saved(f"{tmp_path}/run/checkpoints/ckpt-3")
    stay = {
        name
        for name, value in after.items()
        if name in before
        and name.startswith("discriminator/")
        and np.array_equal(value, before[name])
    }
    networks = [each for each in before if each.startswith("discriminator/")]
    assert len(stay) == 2
    assert len(networks) > len(stay)
    # A kernel and a bias less, with two slots each.
    slots = [
        len([each for each in names if each.startswith("discriminator_opt")])
        for names in (before, after)
    ]
    assert slots[0] - slots[1] == 4


@pytest.mark.parametrize(
    ("frozen", "line"),
    [
        ("discriminator/from_imge*", "there are generator/project_4x4, "),
        ("*", "leaves nothing of generator to train"),
    ],
)
def test_what_cannot_be_frozen(frozen: str, line: str) -> None:
    config = dataclasses.replace(CONFIG, frozen_layers=frozen)
    with pytest.raises(UserError, match=re.escape(line)):
        gan_lib.GAN(config, tf.distribute.get_strategy(), (8, 8, 1), 10)
