"""The generator of a run, in programs that know nothing of dtrain."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import dtrain
from dtrain import checkpoint_tool, errors, sample
from dtrain import main as dtrain_main
from dtrain.gan.pictures import Pictures
from dtrain.record import drawing
from dtrain.run import export
from dtrain.storage import sealed
from tests import object_store, programs_test, runs

BATCHES = (1, 7)
# Of the runs whose model is not built in: a draw of two networks, and noise.
MODELS = {"styles": "--model=tests.programs.stylegan:make"}

# Loads what is named, draws each batch and writes the images.
STRANGER = """
import importlib.util
import sys

import keras
import numpy as np
import tensorflow as tf

assert importlib.util.find_spec("dtrain") is None
path, place = sys.argv[1:]
for size in (1, 7):
    given = dict(np.load(f"{place}/given-{size}.npz"))
    if path.endswith(".keras"):
        model = keras.models.load_model(path)
        inputs = list(given.values())
        made = model(inputs if len(inputs) > 1 else inputs[0], training=False)
    else:
        signature = tf.saved_model.load(path).signatures["serving_default"]
        tensors = {name: tf.constant(given[name]) for name in given}
        made = signature(**tensors)["images"]
    np.save(f"{place}/made-{size}.npy", made)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Makes a run without classes, one with them, and one of two networks."""
    place = tmp_path_factory.mktemp("export")
    programs_test.write_data(place)
    for name, more in {
        "plain": [],
        "classes": ["--conditional", "--batch_norm"],
        "points": ["--preset=mlp", "--dataset=points:grid"],
        "styles": [
            *(MODELS["styles"], f"--dataset=npz:{place}/shapes.npz"),
            "--backup_every_secs=0",
        ],
    }.items():
        code = dtrain_main.run(
            [
                "main",
                *runs.SMALL,
                f"--run_dir={place}/{name}",
                "--num_steps=4",
                "--checkpoint_every_steps=2",
                *more,
            ]
        )
        assert code == errors.FINISHED
    (place / "stranger.py").write_text(STRANGER)
    return place


def exported(restored: export.Trained, place: pathlib.Path) -> Any:
    """Returns the SavedModel of a run, as it is loaded again."""
    export.save(restored, f"{place}/saved/")
    return tf.saved_model.load(f"{place}/saved")


def restore(place: pathlib.Path, run: str) -> export.Trained:
    _, _, model = MODELS.get(run, "").partition("=")
    return export.restore(f"{place}/{run}", model=model)


def given(restored: export.Trained, size: int) -> dict[str, np.ndarray]:
    """Returns what the generator is given for a batch."""
    config = restored.config
    made = {"latents": drawing.latents(config, 3, size).numpy()}
    labels = drawing.class_columns(config, restored.num_classes, size)
    return made if labels is None else {**made, "labels": labels}


def expected(restored: export.Trained, size: int) -> np.ndarray:
    values = given(restored, size)
    latents = tf.constant(values["latents"])
    return drawing.draw(Pictures(restored.gan), latents, values.get("labels"))


@pytest.mark.parametrize(
    ("run", "name"),
    [
        *(("plain", "saved"), ("plain", "gan.keras"), ("classes", "saved")),
        ("styles", "saved"),
    ],
)
def test_a_stranger_draws_the_same(
    place: pathlib.Path, tmp_path: pathlib.Path, run: str, name: str
) -> None:
    restored = restore(place, run)
    path = tmp_path / "new" / name
    export.save(restored, str(path))
    assert [each.name for each in path.parent.iterdir()] == [name]
    for size in BATCHES:
        np.savez(tmp_path / f"given-{size}.npz", **given(restored, size))
    environment = runs.environment()
    del environment["PYTHONPATH"]
    done = subprocess.run(
        [sys.executable, f"{place}/stranger.py", str(path), str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for size in BATCHES:
        made = np.load(tmp_path / f"made-{size}.npy")
        assert made.dtype == np.float32
        drawn = expected(restored, size)
        if run in MODELS:
            # Several networks in one graph are fused, and rounded otherwise.
            np.testing.assert_allclose(made, drawn, atol=1e-5)
        else:
            assert made.tobytes() == drawn.tobytes()


def test_the_signature_is_named_and_typed(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    restored = export.restore(f"{place}/classes")
    loaded = exported(restored, tmp_path)
    signature = loaded.signatures["serving_default"]
    _, inputs = signature.structured_input_signature
    assert inputs == {
        "latents": tf.TensorSpec([None, 4], tf.float32, name="latents"),
        "labels": tf.TensorSpec([None], tf.int32, name="labels"),
    }
    images = signature.structured_outputs["images"]
    assert images.dtype == tf.float32
    assert images.shape.as_list() == [None, *restored.gan.image_shape]
    batch = given(restored, 7)
    made = loaded.serve(batch["latents"], batch["labels"])["images"]
    np.testing.assert_array_equal(made, expected(restored, 7))
    for label in (-1, restored.num_classes):
        batch["labels"][3] = label
        with pytest.raises(
            tf.errors.InvalidArgumentError, match="labels must be from 0 to 9"
        ):
            loaded.serve(batch["latents"], batch["labels"])


def test_points_may_lie_anywhere(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    restored = export.restore(f"{place}/points")
    loaded = exported(restored, tmp_path)
    latents = 1e3 * drawing.latents(restored.config, 0, 8)
    made = loaded.serve(latents)["images"]
    assert made.shape == (8, 1, 1, 2)
    assert np.abs(made).max() > 1
    np.testing.assert_array_equal(made, Pictures(restored.gan)(latents, None))


def test_keras_knows_the_layers_of_dtrain_where_they_are_imported(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    restored = export.restore(f"{place}/classes")
    export.save(restored, f"{tmp_path}/gan.keras")
    loaded: Any = keras.models.load_model(f"{tmp_path}/gan.keras")
    drawn = expected(restored, 7).tobytes()
    restored.gan.averages["generator"] = loaded
    assert expected(restored, 7).tobytes() == drawn


def test_each_step_has_its_generator(place: pathlib.Path) -> None:
    drawn = {
        step: expected(export.restore(f"{place}/plain", step), 1).tobytes()
        for step in (None, 2, 4)
    }
    assert drawn[None] == drawn[4] != drawn[2]


@pytest.mark.parametrize("name", ["gan.keras", "saved"])
def test_nothing_is_overwritten(
    place: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    restored = export.restore(f"{place}/plain")
    (tmp_path / name).write_text("mine")
    with pytest.raises(errors.UserError, match="nothing is overwritten"):
        export.save(restored, f"{tmp_path}/{name}")
    assert (tmp_path / name).read_text() == "mine"


def test_a_generator_that_keras_cannot_write(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    class Own(keras.Model):
        def __init__(self, generator: keras.Model) -> None:
            super().__init__()
            self.generator = generator

        def call(self, inputs: tf.Tensor) -> tf.Tensor:
            return 30.0 * self.generator(inputs)

    restored = export.restore(f"{place}/plain")
    averages = restored.gan.averages
    averages["generator"] = Own(averages["generator"])
    drawn = expected(restored, 1)
    with pytest.raises(errors.UserError, match="name a directory"):
        export.save(restored, f"{tmp_path}/gan.keras")
    assert list(tmp_path.iterdir()) == []
    # And its images are in the range of images.
    loaded = exported(restored, tmp_path)
    made = loaded.serve(given(restored, 1)["latents"])["images"].numpy()
    assert made.max() == 1.0
    np.testing.assert_array_equal(made, drawn)


@pytest.mark.parametrize(
    ("run", "name", "more", "said"),
    [
        ("plain", "generator.keras", [], "the EMA generator"),
        ("plain", "saved", [], "the EMA generator"),
        ("plain", "saved", ["--network=discriminator"], "the discriminator"),
        ("styles", "saved", [], "the EMA mapping, EMA synthesis"),
        ("styles", "map.keras", ["--network=mapping"], "the EMA mapping"),
    ],
)
def test_the_command(
    run: str,
    name: str,
    more: list[str],
    said: str,
    place: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if run in MODELS:
        more = [*more, MODELS[run]]
    words = ("export", f"{place}/{run}", f"--output={tmp_path}/{name}", *more)
    assert checkpoint_tool.run(words) == errors.FINISHED
    wrote, *_ = capsys.readouterr().out.splitlines()
    newest = f"{place}/{run}/checkpoints/ckpt-4"
    assert wrote == f"wrote {tmp_path}/{name}: {said} of {newest}"
    assert (tmp_path / name).exists()
    with pytest.raises(errors.UserError, match="nothing is overwritten"):
        checkpoint_tool.run(words)


def test_a_draw_that_knows_its_batch_as_it_is_written(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    def draw(networks: Any, example: dtrain.Example) -> tf.Tensor:
        flat = [example.latents.shape[0], -1]
        return networks.generator(tf.reshape(example.latents, flat))

    restored = export.restore(f"{place}/plain")
    gan = restored.gan
    gan.program = dataclasses.replace(gan.program, draw=draw)
    with pytest.raises(errors.UserError) as caught:
        export.save(restored, f"{tmp_path}/saved")
    assert "batches of any size" in caught.value.text
    assert list(tmp_path.iterdir()) == []


def test_of_two_networks_none_is_the_file(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    output = f"--output={tmp_path}/gan.keras"
    words = ("export", f"{place}/styles", MODELS["styles"], output)
    with pytest.raises(errors.UserError) as caught:
        checkpoint_tool.run(words)
    assert caught.value.text == (
        "the run averages mapping, synthesis; say by --network which is "
        "exported, or name a directory for a SavedModel of what they draw"
    )


@pytest.mark.parametrize(
    ("run", "said"),
    [("plain", ""), ("classes", "needs import dtrain.models.batch_norm bef")],
)
def test_what_keras_has_to_import_is_said(
    run: str,
    said: str,
    place: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("export", f"{place}/{run}", f"--output={tmp_path}/gan.keras")
    assert checkpoint_tool.run(words) == errors.FINISHED
    output = capsys.readouterr().out
    assert said in output
    assert said or "load_model" not in output


def save_on_store(run_dir: str, path: str) -> list[str]:
    """Saves a generator on a store; returns the images that it draws there."""
    restored = export.restore(run_dir)
    export.save(restored, path)
    loaded: Any = tf.saved_model.load(path)
    latents = given(restored, 1)["latents"]
    made = loaded.serve(latents)["images"].numpy()
    return [made.tobytes().hex(), expected(restored, 1).tobytes().hex()]


def test_a_store(place: pathlib.Path) -> None:
    with (
        object_store.ObjectStore() as store,
        object_store.Client(runs.environment(**store.environment())) as client,
    ):
        arguments = (f"{place}/plain", "gs://bucket/saved")
        drawn, wanted = client.call(save_on_store, *arguments)
        assert drawn == wanted
        with pytest.raises(object_store.Raised, match="overwritten"):
            client.call(save_on_store, *arguments)


@pytest.mark.parametrize("door", ["sample", "export"])
def test_code_that_a_directory_names_runs_if_its_user_names_it(
    door: str,
    place: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir = tmp_path / "copied"
    shutil.copytree(place / "plain", run_dir)
    config = run_dir / "config.json"
    body = json.loads(config.read_text())
    body["config"]["model"] = f"helper_of_{door}:make"
    config.write_bytes(sealed.dumps(body))
    (tmp_path / f"helper_of_{door}.py").write_text(
        "import pathlib\n"
        "from dtrain.models.dcgan import make\n"
        "pathlib.Path('it_ran').touch()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def use(*more: str) -> int:
        if door == "sample":
            words = ("--run_dir=copied", "--seeds=0", *more)
            return sample.run(["sample", *words])
        words = ("export", "copied", "--output=made", *more)
        return checkpoint_tool.run(words)

    with pytest.raises(errors.UserError) as caught:
        use()
    assert caught.value.text == (
        f"model (helper_of_{door}:make) of copied/config.json would be "
        f"imported, from {tmp_path} or PYTHONPATH, and its code run; if you "
        f"trust it, name it: --model=helper_of_{door}:make"
    ).replace("copied/", "copied/" if door == "sample" else f"{run_dir}/")
    assert not (tmp_path / "it_ran").exists()
    assert use(f"--model=helper_of_{door}:make") == errors.FINISHED
    assert (tmp_path / "it_ran").exists()
