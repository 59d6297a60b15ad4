"""The checkpoint tool on what programs of other ages and kinds have saved."""

from __future__ import annotations

import json
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain.errors import UserError
from dtrain.toolbox import commands
from tests import foreign_formats
from tests.checkpoint_tool_test import (
    Tool,
    assert_nothing_is_kept,
    runner,
    values,
)


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    return runner(capsys)


@pytest.mark.parametrize("kind", foreign_formats.FORMATS)
def test_every_command_on_what_others_have_saved(
    kind: str, tool: Tool, tmp_path: pathlib.Path
) -> None:
    """TensorFlow 1, Keras 2, SavedModels, and state that is no variable."""
    source = str(tmp_path / "source")
    prefix, expected = foreign_formats.FORMATS[kind](source)
    tool, used = noted(tool)
    if kind == "saved_model":
        with pytest.raises(UserError, match="source holds no checkpoints"):
            tool("list", source)
    else:
        assert len(tool("list", source).splitlines()) == 2
    told = json.loads(tool("inspect", prefix, "--json"))
    names = {each["name"] for each in told["tensors"]}
    assert set(expected) <= names
    assert tool("verify", prefix).startswith("ok       ")
    assert len(tool("digest", prefix).split()[0]) == 64
    for name, value in expected.items():
        assert_printed(tool("cat", prefix, name), value)
    # A copy, of which only the state of an iterator is not one.
    edits = ["--drop=data"] if kind == "iterator" else []
    copy = f"{tmp_path}/copy/ckpt-{1000 if 'global_step' in names else 0}"
    tool("edit", prefix, f"--output={copy}", *edits)
    dropped = {name for name in names if name.partition("/")[0] == "data"}
    assert set(values(copy)) == names - dropped
    for name, value in expected.items():
        np.testing.assert_array_equal(values(copy)[name], value)
    told = tool("diff", prefix, copy, code=int(bool(edits))).splitlines()
    assert told[-1].startswith(f"{len(dropped)} differ")
    output = f"{tmp_path}/out.npz"
    name = min(expected)
    tool("export", prefix, f"--output={output}", f"--filter={name}")
    with np.load(output) as file:
        np.testing.assert_array_equal(file[name], expected[name])
    assert tool("verify", output).endswith(" tensors, by reading all\n")
    # What comes out of one command goes into any other.
    step = copy.rpartition("-")[2]
    made = {
        "mean": ("average", copy, copy),
        "parts": ("merge", f"{name.partition('/')[0]}={copy}"),
        "back": ("import", output, f"--into={copy}", "--partial"),
    }
    for place, (command, *arguments) in made.items():
        result = f"{tmp_path}/{place}/ckpt-{step}"
        tool(command, *arguments, f"--output={result}")
        assert tool("diff", copy, result).startswith("0 differ")
    # What another program has saved stays as it is; a copy is dtrain's.
    assert_nothing_is_kept(prefix, tool, tmp_path)
    assert_copies_are_kept(copy, names, tool)
    assert used == {*commands.COMMANDS, "list"}


def assert_printed(told: str, value: np.ndarray) -> None:
    told = told.replace("[", "").replace("]", "")
    read = np.array([float(each) for each in told.split()])
    np.testing.assert_array_equal(read.astype(value.dtype), value.ravel())


def assert_copies_are_kept(copy: str, names: set[str], tool: Tool) -> None:
    copies, _, step = copy.rpartition("/ckpt-")
    later = int(step) + 1
    counts = [f"--set_step={later}"] if "global_step" in names else []
    tool("edit", copy, f"--output={copies}/ckpt-{later}", *counts)
    tool("pin", copy, "kept")
    assert "kept" in tool("list", copies)
    tool("prune", copies, "--max_to_keep=1")
    assert len(tool("list", copies).splitlines()) == 3
    tool("unpin", copies, "kept")
    tool("prune", copies, "--max_to_keep=1")
    assert len(tool("list", copies).splitlines()) == 2


def noted(tool: Tool) -> tuple[Tool, set[str]]:
    """Returns what runs a command, and which have been run by it."""
    used: set[str] = set()

    def run(*arguments: str, **options: int) -> str:
        used.add(arguments[0])
        return tool(*arguments, **options)

    return run, used


def test_a_name_with_others_below_it(
    tool: Tool, tmp_path: pathlib.Path
) -> None:
    prefix, expected = foreign_formats.tensorflow_1(str(tmp_path))
    name = "generator/dense/kernel"
    read = tool("cat", prefix, name, "--slice=0,1")
    assert float(read) == expected[name][0, 1]


def test_a_model_that_is_the_root_keeps_its_names(
    tool: Tool, tmp_path: pathlib.Path
) -> None:
    prefix, _ = foreign_formats.keras_2(str(tmp_path))
    output = f"{tmp_path}/edited/ckpt-0"
    before = dict(tf.train.list_variables(prefix))
    tool(
        "edit",
        prefix,
        f"--output={output}",
        "--scale=layer_with_weights-0/kernel=2",
    )
    assert dict(tf.train.list_variables(output)) == before
    assert tool("diff", prefix, output, code=1).startswith("changed layer_w")


@pytest.mark.parametrize("save", ["x.weights.h5", "x.keras", "x.weights.json"])
@pytest.mark.parametrize("parts", [("generator",), ("generator", "ema")])
def test_weights_of_keras_find_their_layers(
    save: str, parts: tuple[str, ...], tool: Tool, tmp_path: pathlib.Path
) -> None:
    """Where the model is the same, nobody writes a map by hand."""

    def network() -> keras.Model:
        return keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(4, name="first"),
                keras.layers.BatchNormalization(name="norm"),
                keras.layers.Dense(4, name="last"),
            ]
        )

    trained, other = network(), keras.Sequential([keras.layers.Dense(4)])
    other.build((None, 3))
    if save.endswith(".keras"):
        trained.save(tmp_path / save)
    else:
        trained.save_weights(
            tmp_path / save,
            **({"max_shard_size": 1e-7} if save.endswith(".json") else {}),
        )
    state = tf.train.Checkpoint(
        discriminator=other, **{part: network() for part in parts}
    )
    prefix = state.write(f"{tmp_path}/ckpt-0")
    flags = [str(tmp_path / save), f"--into={prefix}", "--partial"]
    output = f"{tmp_path}/new/ckpt-0"
    part = parts[0]
    if len(parts) > 1:
        part = "ema"
        with pytest.raises(UserError, match=r"fits ema and generator; say"):
            tool("import", *flags, f"--output={output}")
        (tmp_path / "map.yaml").write_text("layers: ema\n")
        flags += [f"--map={tmp_path}/map.yaml"]
    tool("import", *flags, f"--output={output}")
    state.read(output).assert_existing_objects_matched()
    for one, two in zip(
        getattr(state, part).variables, trained.variables, strict=True
    ):
        np.testing.assert_array_equal(one, two)
