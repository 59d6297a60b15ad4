"""The commands of the checkpoint tool, on what other programs saved."""

from __future__ import annotations

import inspect
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
import yaml

from dtrain import checkpoint_tool, errors
from dtrain.bundle import reader
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.errors import UserError
from dtrain.toolbox import commands
from tests import checkpoint_test, foreign, runs

Tool = Callable[..., str]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return foreign.corpus(tmp_path_factory)


@pytest.fixture(params=foreign.PROGRAMS)
def program(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def prefix(program: str, corpus: dict[str, str]) -> str:
    return corpus[program]


def runner(capsys: pytest.CaptureFixture[str]) -> Tool:
    """Runs a command in this process; returns what it printed."""

    def run(*arguments: str, code: int = errors.FINISHED) -> str:
        capsys.readouterr()
        assert checkpoint_tool.run(arguments) == code
        return capsys.readouterr().out

    return run


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    return runner(capsys)


def values(prefix: str) -> dict[str, np.ndarray]:
    found = reader.read(prefix)
    return {name: found[name].read() for name in found}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], name, strict=True)


# Looking.


def test_list(prefix: str, tool: Tool) -> None:
    told = tool("list", str(pathlib.Path(prefix).parent)).splitlines()
    assert len(told) == 2
    assert told[1].split()[:2] == [prefix, "3"]
    assert told[1].endswith("whole")


def test_inspect(prefix: str, tool: Tool) -> None:
    told = json.loads(tool("inspect", prefix, "--json"))
    found = values(prefix)
    assert [each["name"] for each in told["tensors"]] == list(found)
    for each in told["tensors"]:
        value = found[each["name"]]
        assert tuple(each["shape"]) == value.shape
        if value.dtype == np.float32 and value.size:
            summary = each["summary"]
            assert summary["min"] == value.min()
            assert summary["max"] == value.max()
            assert summary["mean"] == pytest.approx(value.mean(), abs=1e-6)
            assert summary["std"] == pytest.approx(value.std(), abs=1e-6)
            assert summary["zero_share"] == np.mean(value == 0)
    assert sum(each["tensors"] for each in told["totals"].values()) == len(
        found
    )
    # The page for people has all of them too.
    page = tool("inspect", prefix)
    parts = [each["name"].partition("/")[0] for each in told["tensors"]]
    assert all(f"\n{part}" in page for part in parts)


def test_cat(prefix: str, tool: Tool) -> None:
    for name, value in values(prefix).items():
        printed = tool("cat", prefix, name)
        if value.dtype == np.float32:
            flat = printed.replace("[", " ").replace("]", " ").split()
            read = np.array([float(each) for each in flat if each != ","])
            if value.size:
                # To the last bit.
                np.testing.assert_array_equal(
                    read.astype(np.float32), value.ravel()
                )


def test_verify(prefix: str, tool: Tool, tmp_path: pathlib.Path) -> None:
    assert tool("verify", prefix).startswith(f"ok       {prefix}")
    copy = tmp_path / "ckpt-3"
    for path in pathlib.Path(prefix).parent.glob("ckpt-3.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = next(tmp_path.glob("ckpt-3.data-00000-*"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert tool("verify", str(copy), code=1).startswith("DAMAGED")


def test_diff(
    program: str, prefix: str, tool: Tool, tmp_path: pathlib.Path
) -> None:
    assert tool("diff", prefix, prefix).startswith("0 differ")
    other = foreign.fresh(program).write(
        str(tmp_path), is_managed="save_counter" in values(prefix)
    )
    told = tool("diff", prefix, other, code=1)
    a, b = values(prefix), values(other)
    differing = [name for name in a if not np.array_equal(a[name], b[name])]
    lines = told.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == differing
    # What trained for three steps is not that far away.
    tool("diff", prefix, other, "--tolerance=1e9")


def test_digest(prefix: str, tool: Tool) -> None:
    total, shown = tool("digest", prefix).split()
    assert (len(total), shown) == (64, prefix)


# Changing.


def test_edit_and_load_with_stock_tensorflow(
    program: str, prefix: str, tool: Tool, tmp_path: pathlib.Path
) -> None:
    """One value is changed, and all others are what they were."""
    before = values(prefix)
    name = next(
        name
        for name, value in before.items()
        if value.dtype == np.float32 and value.size
    )
    output = f"{tmp_path}/ckpt-3"
    tool("edit", prefix, f"--output={output}", f"--fill={name}=0.25")
    after = values(output)
    expected = {**before, name: np.full_like(before[name], 0.25)}
    assert_same(after, expected)
    loaded = foreign.loaded(program, output)
    original = foreign.loaded(program, prefix)
    changed = [
        key
        for key in original
        if not np.array_equal(loaded[key], original[key])
    ]
    assert changed
    for key in changed:
        np.testing.assert_array_equal(loaded[key], 0.25)


def test_rename_and_back_and_load_with_stock_tensorflow(
    program: str, prefix: str, tool: Tool, tmp_path: pathlib.Path
) -> None:
    top = reader.read(prefix).top()[0]
    there, back = f"{tmp_path}/there/ckpt-3", f"{tmp_path}/back/ckpt-3"
    tool("edit", prefix, f"--output={there}", f"--rename={top}=a/b c")
    assert any(name.startswith("a/b c") for name in values(there))
    tool("edit", there, f"--output={back}", f"--rename=a/b c={top}")
    assert_same(values(back), values(prefix))
    loaded, original = (
        foreign.loaded(program, each) for each in (back, prefix)
    )
    assert_same(loaded, original)


def test_all_edits_in_a_file(
    prefix: str, tool: Tool, tmp_path: pathlib.Path
) -> None:
    before = values(prefix)
    wide = [name for name in before if before[name].dtype == np.float32]
    first, last = wide[0], wide[-1]
    top = first.partition("/")[0]
    content = [
        {"scale": {first: 2}},
        {"cast": {first: "float64"}},
        {"copy": {last: f"{prefix}::{last}"}},
        {"rename_all": {f"^{top}": "renamed"}},
        {"keep": ["renamed", last.replace(top, "renamed", 1)]},
    ]
    path = tmp_path / "edits.yaml"
    path.write_text(yaml.safe_dump(content))
    output = f"{tmp_path}/ckpt-3"
    tool("edit", prefix, f"--output={output}", f"--edits={path}")
    after = values(output)
    assert after[f"renamed{first[len(top) :]}"].dtype == np.float64
    np.testing.assert_array_equal(
        after[f"renamed{first[len(top) :]}"], before[first] * np.float32(2)
    )
    assert tool("verify", output).startswith("ok")


def test_dry_run_writes_nothing(prefix: str, tool: Tool) -> None:
    name = next(iter(values(prefix)))
    before = sorted(pathlib.Path(prefix).parent.iterdir())
    told = tool("edit", prefix, "--dry_run", f"--drop={name}")
    assert f"missing {name}" in told
    assert sorted(pathlib.Path(prefix).parent.iterdir()) == before


def test_average(
    program: str, prefix: str, tool: Tool, tmp_path: pathlib.Path
) -> None:
    other = foreign.fresh(program).write(
        str(tmp_path), is_managed="save_counter" in values(prefix)
    )
    output = f"{tmp_path}/mean/ckpt-3"
    tool("average", other, prefix, f"--output={output}", "--weights=1,3")
    a, b, mean = values(other), values(prefix), values(output)
    for name in mean:
        if mean[name].dtype == np.float32:
            one, three = a[name].astype(np.float64), b[name].astype(np.float64)
            wide = one * 0.25 + three * 0.75
            np.testing.assert_array_equal(mean[name], wide.astype(np.float32))
        elif mean[name].dtype.kind in "iObc":
            np.testing.assert_array_equal(mean[name], b[name])
    assert_same(
        foreign.loaded(program, output), foreign.loaded(program, output)
    )


def test_merge(
    program: str, prefix: str, tool: Tool, tmp_path: pathlib.Path
) -> None:
    """One part of what was trained, and the rest of what was not."""
    other = foreign.fresh(program).write(
        str(tmp_path), is_managed="save_counter" in values(prefix)
    )
    trained = reader.read(prefix)
    part = trained.top()[0]
    rest = trained.top()[-1]
    output = f"{tmp_path}/merged/ckpt-3"
    tool("merge", f"{rest}={other}", f"{part}={prefix}", f"--output={output}")
    a, b, merged = values(other), values(prefix), values(output)
    expected = {
        name: b[name] if name.partition("/")[0] == part else a[name]
        for name in b
    }
    assert_same(merged, expected)
    foreign.loaded(program, output)


# Carrying.


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_export_and_import_by_names(
    suffix: str, program: str, prefix: str, tool: Tool, tmp_path: pathlib.Path
) -> None:
    """There and back, into a place and into none: all bits are the same."""
    path = f"{tmp_path}/state.{suffix}"
    tool("export", prefix, f"--output={path}")
    whole, placed = f"{tmp_path}/whole/ckpt-3", f"{tmp_path}/placed/ckpt-3"
    tool("import", path, f"--output={whole}")
    other = foreign.fresh(program).write(
        f"{tmp_path}/other", is_managed="save_counter" in values(prefix)
    )
    tool("import", path, f"--into={other}", f"--output={placed}")
    for output in (whole, placed):
        assert_same(values(output), values(prefix))
        made, original = (tool("digest", each) for each in (output, prefix))
        assert made.split()[0] == original.split()[0]
        loaded, original = (
            foreign.loaded(program, each) for each in (output, prefix)
        )
        assert_same(loaded, original)


def test_import_from_a_checkpoint_with_a_map(
    tool: Tool, corpus: dict[str, str], tmp_path: pathlib.Path
) -> None:
    """The generator of a GAN goes to a program that calls it otherwise."""
    (tmp_path / "map.yaml").write_text("generator: g\ndiscriminator: d\n")
    output = f"{tmp_path}/ckpt-3"
    arguments = (
        *("import", corpus["two_and_two"], f"--into={corpus['two_and_one']}"),
        *(f"--map={tmp_path}/map.yaml", f"--output={output}"),
    )
    with pytest.raises(UserError, match="the file has no optimizer/iterations"):
        tool(*arguments)
    tool(*arguments, "--partial")
    found, source = values(output), values(corpus["two_and_two"])
    np.testing.assert_array_equal(
        found["g/make/kernel"], source["generator/make/kernel"]
    )
    foreign.loaded("two_and_one", output)


def test_import_of_weights_h5(
    tool: Tool, corpus: dict[str, str], tmp_path: pathlib.Path
) -> None:
    """What Keras' save_weights wrote takes the place of what there was."""
    program = foreign.make("sequential")
    program.train()
    network = program.checkpoint.model
    network.save_weights(tmp_path / "model.weights.h5")
    (tmp_path / "map.yaml").write_text(
        "layers/dense/vars/0: model/hidden/kernel\n"
        "layers/dense/vars/1: model/hidden/bias\n"
        "layers/dense_1/vars/0: model/out/kernel\n"
        "layers/dense_1/vars/1: model/out/bias\n"
        "layers/batch_normalization/vars/0: model/norm/gamma\n"
        "layers/batch_normalization/vars/1: model/norm/beta\n"
        "layers/batch_normalization/vars/2: model/norm/moving_mean\n"
        "layers/batch_normalization/vars/3: model/norm/moving_variance\n"
    )
    fresh = foreign.make("sequential").write(
        f"{tmp_path}/fresh", is_managed=True
    )
    output = f"{tmp_path}/ckpt-3"
    tool(
        *("import", f"{tmp_path}/model.weights.h5", f"--into={fresh}"),
        *(f"--map={tmp_path}/map.yaml", "--partial", f"--output={output}"),
    )
    found, trained = values(output), values(corpus["sequential"])
    for name in found:
        if name.startswith("model/"):
            np.testing.assert_array_equal(found[name], trained[name], name)


# Keeping.


def test_the_yaml_of_the_docs(tool: Tool, tmp_path: pathlib.Path) -> None:
    holder = tf.Module()
    holder.dense = tf.Module()
    holder.dense.kernel = tf.Variable([2.0])
    optimizers = {
        f"{name}_optimizer": tf.train.Checkpoint(
            iterations=tf.Variable(1), moments=[tf.Variable(0.0)]
        )
        for name in ("generator", "discriminator")
    }
    state = tf.train.Checkpoint(
        generator=holder, discriminator=tf.Variable(1.0), **optimizers
    )
    prefix = state.write(f"{tmp_path}/ckpt-0")
    page = (runs.ROOT / "docs/checkpoints.md").read_text()
    [edits] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "edits.yaml"
    path.write_text(edits)
    output = f"{tmp_path}/new/ckpt-0"
    tool("edit", prefix, f"--output={output}", f"--edits={path}")
    after = values(output)
    assert set(after) == {"disc", "gen/dense/kernel"}
    assert after["gen/dense/kernel"].tolist() == [1.0]
    # What a pattern stands for is the same wherever there is one.
    told = json.loads(tool("inspect", prefix, "--json", "--filter=*_optimizer"))
    assert len(told["tensors"]) == 4


def test_keep_what_was_edited(
    program: str, prefix: str, tool: Tool, tmp_path: pathlib.Path
) -> None:
    """What the tool wrote is kept and removed as what a run saved."""
    name = next(iter(values(prefix)))
    for step in (3, 4, 5):
        edit = f"--copy={name}={prefix}"
        tool("edit", prefix, f"--output={tmp_path}/ckpt-{step}", edit)
    tool("pin", f"{tmp_path}/ckpt-3", "paper")
    tool("prune", str(tmp_path), "--max_to_keep=1")
    directory = CheckpointDirectory(str(tmp_path))
    assert directory.steps() == [3, 5]
    tool("unpin", str(tmp_path), "paper")
    tool("prune", str(tmp_path), "--max_to_keep=1")
    assert directory.steps() == [5]
    assert_same(values(f"{tmp_path}/ckpt-5"), values(prefix))
    loaded, original = (
        foreign.loaded(program, each) for each in (f"{tmp_path}/ckpt-5", prefix)
    )
    assert_same(loaded, original)


def test_what_another_program_keeps(
    prefix: str, tool: Tool, tmp_path: pathlib.Path
) -> None:
    """Nothing is removed, and no file of dtrain's is put there."""
    assert_nothing_is_kept(prefix, tool, tmp_path)


def assert_nothing_is_kept(
    prefix: str, tool: Tool, tmp_path: pathlib.Path
) -> None:
    directory = pathlib.Path(prefix).parent
    before = sorted(directory.rglob("*"))
    for words, text in (
        (("prune", str(directory), "--max_to_keep=1"), "are not removed"),
        (("pin", prefix, "paper"), "knows of no pins; copy it: edit "),
        (
            ("unpin", str(directory), "paper"),
            "is pinned as paper; pinned: ",
        ),
        (
            ("export", prefix, f"--output={tmp_path}/net.keras"),
            "is of no run of dtrain",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(text)) as why:
            tool(*words)
        assert "\n" not in str(why.value)
    assert sorted(directory.rglob("*")) == before


def test_each_command_is_run_on_each_program() -> None:
    code = "".join(
        inspect.getsource(function)
        for function in globals().values()
        if "prefix" in getattr(function, "__annotations__", ())
    )
    used = {*re.findall(r'(?:tool|words)?\(\s*"([a-z]+)"', code)}
    assert used >= {*commands.COMMANDS, "list"}


# Keeping, of what dtrain saved.


def test_prune_and_pin(tool: Tool, tmp_path: pathlib.Path) -> None:
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 6.0}
    checkpoint_test.save_steps(
        tmp_path,
        list(losses),
        *(checkpoint_test.retention.Last(9),),
        metrics=lambda step: {"generator_loss": losses[step]},
    )
    directory = CheckpointDirectory(str(tmp_path))
    tool("pin", directory.prefix(1), "paper")
    told = tool("list", str(tmp_path), "--metric=generator_loss").splitlines()
    assert told[1].split()[-2:] == ["paper", "whole"]
    flags = ("--keep_best=1", "--max_to_keep=1")
    dry = tool("prune", str(tmp_path), *flags, "--dry_run")
    assert dry.count("would remove") == 2
    assert directory.steps() == [1, 2, 3, 4, 5]
    tool("prune", str(tmp_path), *flags)
    assert directory.steps() == [1, 2, 5]
    newest = tf.train.latest_checkpoint(str(tmp_path))
    assert newest == directory.prefix(5)
    tool("unpin", str(tmp_path), "paper")
    tool("prune", str(tmp_path), *flags)
    assert directory.steps() == [2, 5]


def test_list_of_a_run_with_what_is_damaged(
    tool: Tool, tmp_path: pathlib.Path
) -> None:
    checkpoint_test.save_steps(tmp_path / "checkpoints", [1, 2, 3])
    directory = CheckpointDirectory(f"{tmp_path}/checkpoints")
    directory.quarantine(2, "its index does not have its checksum")
    data = pathlib.Path(f"{directory.prefix(3)}.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:-1])
    states = [
        line.rpartition("  ")[2].strip()
        for line in tool("list", str(tmp_path)).splitlines()
    ]
    assert states[1:] == [
        "whole",
        "damaged: its data-00000-of-00001",
        "quarantined: its index does not have its checksum",
    ]


def test_what_was_edited_is_a_checkpoint_of_its_step(
    tool: Tool, tmp_path: pathlib.Path
) -> None:
    checkpoint_test.save_steps(tmp_path / "a", [5])
    source, output = f"{tmp_path}/a/ckpt-5", f"{tmp_path}/b/ckpt-0"
    with pytest.raises(UserError, match="of step 5; call it ckpt-5, or add"):
        tool("edit", source, f"--output={output}", "--scale=weights=2")
    assert not (tmp_path / "b").exists() or not list(
        (tmp_path / "b").glob("ckpt*")
    )
    tool(
        *("edit", source, f"--output={output}", "--scale=weights=2"),
        "--set_step=0",
    )
    state = checkpoint_test.make_state()
    state.restore(output).assert_consumed()
    assert (int(state.step), float(state.weights[0])) == (0, 10.0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("export CKPT --output=NEW.safetensor", "use .safetensors, or a dir"),
        ("export CKPT --output=NEW.h5", "use .keras, .safetensors, .npz, or"),
        ("export CKPT --output=NEW/v1.2", "with a slash at its end"),
        ("edit CKPT --drop=a", "name the result"),
        ("edit CKPT --output=NEW --drop=scale", "must end with the name of"),
        ("edit CKPT --output=CKPT --drop=scale", "it exists; name another"),
        ("edit CKPT --dry_run --rename=scale", "must be NAME=VALUE"),
        ("edit CKPT --dry_run --set_step=x", "must be a whole number"),
        ("edit CKPT --dry_run --scale=scale=nan", "must be a finite number"),
        ("edit CKPT --dry_run --scale=scale=1e999", "must be a finite number"),
        ("edit CKPT --dry_run --fill=scale=nan", "nan is no number"),
        ("edit CKPT --dry_run --set=scale=NaN", "nan is no number"),
        ("edit CKPT --dry_run --edits=NEW", "there is no file"),
        ("edit CKPT --dry_run --copy=scale=NEW", "there is no checkpoint"),
        ("edit CKPT --dri_run", "see python -m dtrain.checkpoint_tool"),
        ("inspect NEW", "there is no checkpoint"),
        ("inspect CKPT --filter=zz", "nothing of this name; try"),
        ("cat CKPT held", "stands for 5 tensors; name one"),
        ("cat CKPT scale --slice=0", "has the shape []"),
        ("cat CKPT scale --slice=a", "must be as in 0,:5"),
        ("diff CKPT CKPT --tolerance=-1", "must be at least 0"),
        ("average CKPT --output=NEW/ckpt-1 --weights=a", "must be numbers"),
        ("average CKPT --output=NEW/ckpt-1 --weights=0", "sum is not 0"),
        ("merge CKPT --output=NEW/ckpt-1", "must be NAME=CKPT"),
        ("merge zz=CKPT --output=NEW/ckpt-1", "nothing of this name"),
        ("prune DIR", "name what is kept"),
        ("prune DIR --max_to_keep=1", "holds no checkpoints of dtrain"),
        ("prune DIR --max_to_keep=-1", "must be a whole number of at least 1"),
        ("list NEW", "holds no checkpoints"),
        ("pin CKPT x", "was not saved by dtrain"),
        ("unpin DIR x", "nothing in"),
        ("export CKPT --output=NEW.keras", "is of no run of dtrain"),
        ("export CKPT --output=NEW.h5", "cannot be written as .h5; use .keras"),
        ("import NEW.npz --output=NEW/ckpt-1", "NEW.npz is not there"),
        ("fly", "invalid choice"),
    ],
)
def test_mistakes(
    arguments: str,
    text: str,
    tool: Tool,
    corpus: dict[str, str],
    tmp_path: pathlib.Path,
) -> None:
    prefix = corpus["raw_variables"]
    words = (
        arguments.replace("CKPT", prefix)
        .replace("DIR", str(pathlib.Path(prefix).parent))
        .replace("NEW", f"{tmp_path}/new")
        .split()
    )
    with pytest.raises(UserError) as caught:
        tool(*words)
    expected = text.replace("NEW", f"{tmp_path}/new")
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_help_and_list_need_no_tensorflow(tmp_path: pathlib.Path) -> None:
    """What imports it would take seconds."""
    checkpoint_test.save_steps(tmp_path, [1, 2])
    script = (
        "import sys\n"
        "from dtrain import checkpoint_tool\n"
        "sys.modules['tensorflow'] = None\n"
        "for words in (['--help'], ['list', sys.argv[1]]):\n"
        "    assert checkpoint_tool.run(words) == 0\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, process.stdout
    assert "carries them" in process.stdout
    assert f"{tmp_path}/ckpt-2" in process.stdout
