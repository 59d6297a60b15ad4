"""A run directory belongs to one run, and says which."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Iterator

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from dtrain import config as config_lib
from dtrain import errors
from dtrain.bundle import tensors
from dtrain.checkpoint import snapshot
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.cluster import environment
from dtrain.cluster.workers import Workers
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.gan import loading
from dtrain.models import dcgan
from dtrain.run import identity, looking, places
from dtrain.storage import sealed
from tests import odd_values, replicas, runs

MASKS = identity.Input((8, 8), "int32", 1797, 0, "")


def describe(run_dir: pathlib.Path, **settings: object) -> identity.Description:
    return identity.Description(
        config=Config(run_dir=str(run_dir), base_channels=2, **settings),
        image_shape=(8, 8, 1),
        num_classes=10,
        num_images=1797,
        inputs={"mask": MASKS},
    )


def make_networks(config: Config) -> dict[str, keras.Model]:
    return dict(loading.build(dcgan.make, config, (8, 8, 1), 10).networks)


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="module")
def networks() -> dict[str, keras.Model]:
    return make_networks(Config(base_channels=2))


def test_what_is_written_is_read(
    tmp_path: pathlib.Path, networks: dict[str, keras.Model]
) -> None:
    written = describe(tmp_path / "deep/run", seed=3, cache_gib=0.5)
    identity.write(written, networks)
    assert identity.read(written.config.run_dir) == written
    assert {path.name for path in (tmp_path / "deep/run").iterdir()} == {
        "config.json",
        "generator.json",
        "discriminator.json",
    }
    saved = json.loads((tmp_path / "deep/run/config.json").read_text())
    assert saved["versions"]["tensorflow"] == tf.__version__
    assert saved["config"]["seed"] == 3


def test_check_writes_nothing(tmp_path: pathlib.Path) -> None:
    for run_dir in (tmp_path / "none/yet", tmp_path):
        identity.check(describe(run_dir), is_chief=True)
    assert not list(tmp_path.iterdir())


def test_a_run_may_go_on_with_other_conveniences(
    tmp_path: pathlib.Path, networks: dict[str, keras.Model]
) -> None:
    identity.write(describe(tmp_path), networks)
    now = describe(tmp_path, num_steps=9, strategy="mirrored", resume="must")
    identity.check(now, is_chief=True)
    identity.write(now, networks)
    assert identity.read(str(tmp_path)) == now


def test_a_run_may_move(
    tmp_path: pathlib.Path, networks: dict[str, keras.Model]
) -> None:
    identity.write(describe(tmp_path / "here"), networks)
    (tmp_path / "here").rename(tmp_path / "there")
    identity.check(describe(tmp_path / "there", resume="must"), is_chief=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_images": 5}, "num_images was 1797 and is now 5"),
        ({"num_classes": 0}, "num_classes was 10 and is now 0"),
        (
            {"image_shape": (8, 8, 3)},
            "image_shape was (8, 8, 1) and is now (8, 8, 3)",
        ),
        (
            {"inputs": {"mask": MASKS._replace(num_examples=5)}},
            "mask was 1,797 of 8x8 int32 and is now 5 of 8x8 int32; use",
        ),
        (
            {"inputs": {"mask": MASKS._replace(files="5f")}},
            "is now 1,797 of 8x8 int32 (a digest of 5f); use",
        ),
    ],
)
def test_other_data_under_the_same_name(
    changes: dict,
    said: str,
    tmp_path: pathlib.Path,
    networks: dict[str, keras.Model],
) -> None:
    description = describe(tmp_path)
    identity.write(description, networks)
    now = dataclasses.replace(description, **changes)
    with pytest.raises(UserError) as caught:
        identity.check(now, is_chief=True)
    assert said in str(caught.value)


def test_another_worker_may_come_while_the_chief_writes(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "generator.json").write_text("{")
    identity.check(describe(tmp_path), is_chief=False)
    with pytest.raises(UserError, match="holds no run"):
        identity.check(describe(tmp_path), is_chief=True)


def test_a_run_killed_at_its_very_start_may_start_again(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "config.json.tmp").write_text('{"config": {')
    identity.check(describe(tmp_path), is_chief=True)


def test_what_auto_has_decided_stays_on_other_devices(
    tmp_path: pathlib.Path, networks: dict[str, keras.Model]
) -> None:
    told = ["main", "--preset=auto", "--image_size=32", "--beta_2=0.9"]
    told.append(f"--run_dir={tmp_path}")

    def looked(num_devices: int, *more: str) -> identity.Description:
        workers = Workers(replicas.mirrored(num_devices), environment.ALONE)
        settings = config_lib.parse([*told, *more])
        _, description, _ = looking.look(settings, workers)
        return description

    one, two = looked(1), looked(2)
    assert (one.config.batch_size, two.config.batch_size) == (32, 64)
    assert one.config.r1_gamma == 2 * two.config.r1_gamma
    assert looked(2, "--batch_size=8").config.batch_size == 8
    identity.write(one, networks)
    assert looked(2).config == one.config
    with pytest.raises(UserError, match="batch_size was 32 and is now 8"):
        looked(2, "--batch_size=8")


# The networks as Keras reads them.


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("conditional", [False, True])
def test_keras_rebuilds_the_networks(
    precision: str, conditional: bool, tmp_path: pathlib.Path
) -> None:
    description = describe(
        tmp_path, precision=precision, conditional=conditional
    )
    keras.config.set_dtype_policy(precision)
    made = make_networks(description.config)
    identity.write(description, made)
    # Whoever reads them knows nothing of the run's precision.
    keras.config.set_dtype_policy("float32")
    latents = tf.random.stateless_normal([3, 64], (1, 2))
    inputs = [latents, tf.constant([0, 5, 9])] if conditional else latents
    text = (tmp_path / "generator.json").read_text()
    rebuilt = keras.models.model_from_json(text)
    rebuilt.set_weights(made["generator"].get_weights())
    np.testing.assert_array_equal(rebuilt(inputs), made["generator"](inputs))
    text = (tmp_path / "discriminator.json").read_text()
    rebuilt = keras.models.model_from_json(text)
    rebuilt.set_weights(made["discriminator"].get_weights())


class Closed(keras.Model):
    """A model whose arguments are not JSON's, and that says no others."""

    def __init__(self, core: object) -> None:
        super().__init__()
        self.core = core


def test_a_network_that_is_only_code_is_not_described(
    tmp_path: pathlib.Path, networks: dict[str, keras.Model]
) -> None:
    closed = {**networks, "generator": Closed(object())}
    identity.write(describe(tmp_path), closed)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "discriminator.json"]


def test_a_damaged_config_is_taken_from_a_checkpoint(
    tmp_path: pathlib.Path, networks: dict[str, keras.Model]
) -> None:
    described = describe(tmp_path)
    identity.write(described, networks)
    state = tf.train.Checkpoint(weights=tf.Variable([0.0]))
    checkpoints = CheckpointDirectory(f"{tmp_path}/checkpoints")
    facts = {"run": identity.to_dict(described)}
    checkpoints.commit(4, snapshot.SnapshotTaker(state).take(4), facts)
    path = tmp_path / "config.json"
    whole = path.read_bytes()
    assert identity.check(described, is_chief=True) == (described, "")
    for damaged in (
        whole[:-20],
        b"",
        whole.replace(b'"seed": 0', b'"seed": 8'),
    ):
        assert damaged != whole
        path.write_bytes(damaged)
        assert identity.read(str(tmp_path)) == described
        _, note = identity.check(described, is_chief=True)
        assert note.startswith(f"{path} is damaged")
        assert note.endswith(f"taken from {tmp_path}/checkpoints/ckpt-4.json")
        identity.write(described, networks)
        assert path.read_bytes() == whole
    path.unlink()
    _, note = identity.check(described, is_chief=True)
    assert note.startswith(f"{path} is missing")


def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: pathlib.Path,
) -> None:
    described = describe(tmp_path)
    values = identity.to_dict(described)
    identity.check_restored(described, values, "backup/ckpt-4")
    identity.check_restored(described, {}, "backup/ckpt-4")
    values["config"]["seed"] = 8
    with pytest.raises(
        UserError, match=r"ckpt-4 belongs to another run: seed was 8 and is now"
    ):
        identity.check_restored(described, values, "backup/ckpt-4")


def test_what_a_run_that_was_killed_at_its_start_leaves(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "lease.json").touch()
    (tmp_path / "history").mkdir()
    (tmp_path / "history/.lock").touch()
    described = describe(tmp_path)
    assert identity.check(described, is_chief=True) == (described, "")
    (tmp_path / "history/thesis.tex").touch()
    with pytest.raises(UserError, match="not empty and holds no run: history"):
        identity.check(describe(tmp_path), is_chief=True)


@pytest.fixture(scope="module")
def described(
    tmp_path_factory: pytest.TempPathFactory, networks: dict[str, keras.Model]
) -> pathlib.Path:
    run_dir = tmp_path_factory.mktemp("described")
    identity.write(describe(run_dir), networks)
    return run_dir


@hypothesis.given(st.data())
def test_no_value_of_a_sealed_config_surprises_its_readers(
    described: pathlib.Path, data: st.DataObject
) -> None:
    path = described / "config.json"
    whole = path.read_bytes()
    changed = data.draw(odd_values.mutations(json.loads(whole)))
    path.write_bytes(sealed.dumps(changed))
    with contextlib.suppress(UserError):
        read = identity.read(str(described))
        assert len(read.image_shape) == 3
        places.find(read.config, environment.ALONE, read.run_id)
    path.write_bytes(whole)


def test_a_config_of_odd_types_is_taken_from_a_checkpoint(
    tmp_path: pathlib.Path, networks: dict[str, keras.Model]
) -> None:
    written = describe(tmp_path)
    identity.write(written, networks)
    state = tf.train.Checkpoint(weight=tf.Variable(1.0))
    directory = CheckpointDirectory(str(tmp_path / "checkpoints"))
    for step, run in ((1, identity.to_dict(written)), (2, {"config": [1]})):
        taken = snapshot.SnapshotTaker(state).take(step)
        directory.commit(step, taken, {"run": run})
    path = tmp_path / "config.json"
    body = json.loads(path.read_text())
    path.write_bytes(sealed.dumps({**body, "data": {"image_shape": 5}}))
    _, note = identity.check(written, is_chief=True)
    assert note == (
        f"{path} is damaged (its image_shape is not what dtrain writes); taken "
        f"from {directory.prefix(1)}.json"
    )
    with pytest.raises(
        UserError, match=r"ckpt-2 is of no run that can be told"
    ):
        identity.check_restored(written, {"config": [1]}, directory.prefix(2))


@pytest.mark.parametrize("name", ["a[b]", "*?\\"])
def test_a_directory_may_have_any_name(
    name: str, tmp_path: pathlib.Path, whole: runs.Whole
) -> None:
    """TensorFlow looks for a checkpoint as for a pattern."""
    place = tmp_path / name
    (place / "images").mkdir(parents=True)
    archive = place / "images/x.npz"
    np.savez(archive, x=np.zeros((8, 8, 8), np.uint8))
    # What the pattern fits is another run's.
    for other in ("ab", "a"):
        (tmp_path / other / "run/checkpoints").mkdir(parents=True)

    def train(directory: str, *flags: str) -> None:
        small = (*runs.SMALL, "--checkpoint_every_steps=1")
        run_dir = f"--run_dir={place}/{directory}"
        code, output = runs.run("dtrain.main", run_dir, *small, *flags)
        assert code == errors.FINISHED, output

    kept = (f"--backup_dir={place}/b", f"--checkpoint_dir={place}/c")
    train("run", "--num_steps=2", *kept)
    train("run", "--num_steps=3", *kept)
    small = (*runs.SMALL, "--num_steps=3")
    undisturbed = whole("dtrain.main", *small, "--checkpoint_every_steps=1")
    assert runs.metrics(place / "run") == runs.metrics(undisturbed)
    train(
        *("taken", "--num_steps=1", f"--init_from={place}/c/ckpt-3"),
        f"--dataset=npz:{archive}",
    )


@pytest.mark.parametrize("character", ["[", "]", "*", "?", "\\"])
def test_a_checkpoint_whose_files_have_such_a_name_is_refused(
    character: str, tmp_path: pathlib.Path
) -> None:
    name = f"{tmp_path}/a{character}"
    pathlib.Path(f"{name}.index").touch()
    with pytest.raises(UserError) as caught:
        dict(tensors.variables(name))
    assert f"takes {character!r} in the name of a" in str(caught.value)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(
    tmp_path: pathlib.Path, whole: runs.Whole
) -> None:
    small = (*runs.SMALL, "--num_steps=3")
    trained = whole("dtrain.main", *small, "--checkpoint_every_steps=1")
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    before = _contents(tmp_path)
    flags = (*runs.SMALL, "--num_steps=5", "--dry_run")
    for name, start in (
        ("run", f"resumed from {run_dir}/checkpoints/ckpt-3"),
        ("new", "a fresh start"),
    ):
        code, output = runs.run(
            "dtrain.main", f"--run_dir={tmp_path}/{name}", *flags
        )
        assert code == errors.FINISHED, output
        assert f"{name}: {start}, 5 steps in all" in output
        assert "batch 8, float32, about " in output
        assert re.search("^given     num_steps 5, batch_size 8, ", output, re.M)
        assert re.search(r"to_image \(Conv2D\) .* \(None, 8, 8, 1\) ", output)
        steps = 2 if name == "run" else 5
        assert re.search(
            r"speed     [\d,]+ images/s, \S+ ms a step, over 10 steps; "
            rf"0:00:0\d for the {steps} steps that are left",
            output,
        )
        assert f"saves     to {tmp_path}/{name}/checkpoints, " in output
        assert "nothing was written" in output
    assert _contents(tmp_path) == before


def _contents(place: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() if path.is_file() else b""
        for path in sorted(place.rglob("*"))
    }
