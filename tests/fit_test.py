"""What a restore says of a checkpoint that does not fit."""

from __future__ import annotations

import pathlib
import random
import re
import shlex
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain import checkpoint_tool, errors
from dtrain.bundle import fit, reader, restore
from dtrain.checkpoint import writing
from dtrain.errors import UserError
from dtrain.toolbox import edits
from tests import foreign

layers = keras.layers
NAMES = ("net", "G", "old_model", "a", "trainer", "x.y", "with space")


def make(
    seed: int = 0, *, units: int = 6, depth: int = 1
) -> tf.train.Checkpoint:
    """Makes the state of a GAN, with attributes to move layers between."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    generator = keras.Sequential(
        [
            keras.Input((4,)),
            *(layers.Dense(units, name=f"hidden_{n}") for n in range(depth)),
            layers.BatchNormalization(name="norm"),
            layers.Dense(3, name="image"),
        ],
        name="generator",
    )
    discriminator = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(units, name="look"),
            layers.Dense(1, name="judge"),
        ],
        name="discriminator",
    )
    ema = keras.models.clone_model(generator)
    of_g = keras.optimizers.Adam(1e-3)
    of_g.build(generator.trainable_variables)
    of_d = keras.optimizers.Adam(1e-3)
    of_d.build(discriminator.trainable_variables)
    parts = tf.Module()
    parts.encoder = foreign.Affine(4, "encoder")
    parts.decoder = foreign.Affine(5, "decoder")
    return tf.train.Checkpoint(
        generator=generator,
        discriminator=discriminator,
        ema_generator=ema,
        generator_optimizer=of_g,
        discriminator_optimizer=of_d,
        parts=parts,
        penalty=tf.Variable([0.5, 0.25]),
        step=tf.Variable(seed, dtype=tf.int64),
    )


def state(checkpoint: tf.train.Checkpoint) -> dict[str, bytes]:
    live = fit.of_objects(checkpoint)
    return {name: live[name].read().tobytes() for name in live}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("saved")
    return make(1).save(f"{directory}/ckpt")


# Each mutation returns the edit, and the names that have to be told of. What
# a rename (or a cast, or a drop) can repair is followed by one; the rest has
# no repair, and none may be claimed.
Mutation = Callable[[random.Random], tuple[edits.Edit, list[str]]]
PARTS = (
    *("generator", "discriminator", "ema_generator", "generator_optimizer"),
    *("discriminator_optimizer", "parts", "penalty", "step"),
)


def rename_a_part(chance: random.Random) -> tuple[edits.Edit, list[str]]:
    old = chance.choice(PARTS)
    return edits.rename({old: chance.choice(NAMES)}), [old]


def rename_two(chance: random.Random) -> tuple[edits.Edit, list[str]]:
    old = chance.sample(PARTS, 2)
    new = chance.sample(NAMES, 2)
    return edits.rename(dict(zip(old, new, strict=True))), old


def move_a_part(chance: random.Random) -> tuple[edits.Edit, list[str]]:
    old = chance.choice(["generator", "discriminator", "ema_generator"])
    return edits.rename({old: f"model/{old}"}), [old]


def rename_inside(chance: random.Random) -> tuple[edits.Edit, list[str]]:
    old = chance.choice(["encoder", "decoder"])
    return edits.rename({f"parts/{old}": f"parts/{old}_1"}), [f"parts/{old}"]


def rename_a_variable(chance: random.Random) -> tuple[edits.Edit, list[str]]:
    owner = chance.choice(["encoder", "decoder"])
    old = f"parts/{owner}/{chance.choice('wb')}"
    return edits.rename({old: f"{old}_0"}), [old]


def swap_optimizers(_: random.Random) -> tuple[edits.Edit, list[str]]:
    one, two = "generator_optimizer", "discriminator_optimizer"
    return edits.rename({one: two, two: one}), [one, two]


def swap_networks(chance: random.Random) -> tuple[edits.Edit, list[str]]:
    one, two = "generator", chance.choice(["discriminator", "ema_generator"])
    return edits.rename({one: two, two: one}), [one]


def swap_inside(_: random.Random) -> tuple[edits.Edit, list[str]]:
    one, two = "parts/encoder", "parts/decoder"
    return edits.rename({one: two, two: one}), [one, two]


def cast_a_part(chance: random.Random) -> tuple[edits.Edit, list[str]]:
    old = chance.choice(["generator", "discriminator", "parts", "penalty"])
    return edits.cast(old, chance.choice(["float16", "float64"])), [old]


RENAMED: tuple[tuple[Mutation, int], ...] = (
    (rename_a_part, 7),
    (rename_two, 4),
    (move_a_part, 3),
    (rename_inside, 3),
    (rename_a_variable, 3),
    (swap_optimizers, 1),
    (swap_networks, 3),
    (swap_inside, 1),
    (cast_a_part, 3),
)


def leave_out(chance: random.Random) -> tuple[edits.Edit, list[str]]:
    old = chance.choice(["discriminator_optimizer", "penalty", "parts"])
    return edits.drop(old), [old]


MUTATIONS = [
    *[(mutate, n) for mutate, count in RENAMED for n in range(count)],
    *[(leave_out, n) for n in range(2)],
]


def test_there_are_thirty() -> None:
    assert len(MUTATIONS) == 30


@pytest.mark.parametrize(
    ("mutate", "number"),
    MUTATIONS,
    ids=[f"{mutate.__name__}-{number}" for mutate, number in MUTATIONS],
)
def test_a_mutation_is_refused_and_repaired(
    mutate: Mutation, number: int, saved: str, tmp_path: pathlib.Path
) -> None:
    tree = reader.read(saved)
    chance = random.Random(f"{mutate.__name__} {number}")
    edit, names = mutate(chance)
    prefix = f"{tmp_path}/mutated/ckpt-1"
    writing.commit(edit(tree), prefix)
    live = make(2)
    before = state(live)
    with pytest.raises(UserError) as caught:
        restore.restore(live, prefix, prefix)
    assert state(live) == before
    details = list(caught.value.details)
    assert len(details) <= 24
    told = "\n".join(details)
    for name in names:
        assert re.search(rf"(^|\s){re.escape(name)}(/|:|$)", told, re.M), told
    if mutate is leave_out:
        assert "would repair" not in told
        return
    # The very command that it names, by the tool.
    assert details[-2] == "this would repair it:", told
    words = shlex.split(details[-1])
    assert words[:3] == ["python", "-m", "dtrain.checkpoint_tool"]
    assert checkpoint_tool.run(words[3:]) == errors.FINISHED
    output = next(word for word in words if word.startswith("--output="))
    repaired = output.removeprefix("--output=")
    restore.restore(live, repaired, repaired)
    original = make(2)
    original.restore(saved).assert_consumed()
    if mutate is not cast_a_part:
        assert state(live) == state(original)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"units": 7}, "[4, 6] in the checkpoint, [4, 7] in the program"),
        ({"depth": 2}, "generator/"),
    ],
)
def test_another_architecture(
    other: dict[str, int], text: str, saved: str
) -> None:
    live = make(2, **other)
    before = state(live)
    with pytest.raises(UserError) as caught:
        restore.restore(live, saved, saved)
    assert state(live) == before
    assert text in "\n".join(caught.value.details)
    assert len(caught.value.details) <= 24


def test_what_is_left_over_can_be_dropped(saved: str) -> None:
    live = make(2)
    del live.penalty
    with pytest.raises(UserError) as caught:
        restore.restore(live, saved, saved)
    assert caught.value.details[-1].endswith("--drop=penalty")


@pytest.mark.parametrize("program", foreign.PROGRAMS)
def test_what_fits_for_tensorflow_fits(
    program: str, tmp_path: pathlib.Path
) -> None:
    made = foreign.make(program)
    made.train()
    prefix = made.write(str(tmp_path), is_managed=True)
    again = foreign.fresh(program).checkpoint
    assert fit.compare(reader.read(prefix), fit.of_objects(again)) is None
    restore.restore(again, prefix, prefix)
    live, trained = fit.of_objects(again), fit.of_objects(made.checkpoint)
    for name in trained:
        np.testing.assert_array_equal(live[name].read(), trained[name].read())


def test_names_of_another_process_do_not_matter(saved: str) -> None:
    """Keras numbers what has no name, from where it stopped before."""
    made = keras.Sequential([keras.Input((2,)), layers.Dense(3)])
    state_of = tf.train.Checkpoint(model=made)
    prefix = state_of.save(f"{saved}-numbered")
    other = keras.Sequential([keras.Input((2,)), layers.Dense(3)])
    assert other.layers[0].name != made.layers[0].name
    live = tf.train.Checkpoint(model=other)
    restore.restore(live, prefix, prefix)
    np.testing.assert_array_equal(other.get_weights()[0], made.get_weights()[0])
