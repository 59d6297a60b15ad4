"""A checkpoint is there whole or not at all, and verifies or is put aside."""

from __future__ import annotations

import json
import pathlib
import tempfile
from typing import Any

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from dtrain import checkpoint_tool, errors
from dtrain.bundle import fingerprint, index
from dtrain.checkpoint import directory as directory_lib
from dtrain.checkpoint import going_on, listing, manifest, snapshot
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manifest import DamagedError
from dtrain.errors import UserError
from dtrain.storage import files, sealed
from tests import odd_values


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> CheckpointDirectory:
    """Holds steps 1 to 3, with weights of that many ones."""
    made = CheckpointDirectory(str(tmp_path / "checkpoints"))
    weights = tf.Variable([0.0] * 40)
    taker = snapshot.SnapshotTaker(tf.train.Checkpoint(weights=weights))
    for step in (1, 2, 3):
        weights.assign([float(step)] * 40)
        made.commit(step, taker.take(step), {"metrics": {"loss": step / 3}})
    return made


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Is a manifest that has something in each of its fields."""
    made = CheckpointDirectory(str(tmp_path_factory.mktemp("sound")))
    state = tf.train.Checkpoint(
        weights=tf.Variable([[1.0]]), name=tf.Variable("a")
    )
    facts = {
        "metrics": {"loss": 0.5, "none": None},
        "log": {"bytes": 7, "sha256": "0" * 64},
        "run": {"config": {"seed": 3}},
    }
    taken = snapshot.SnapshotTaker(state).take(3)
    return made.commit(3, taken, facts).encode()


def path(directory: CheckpointDirectory, name: str) -> pathlib.Path:
    return pathlib.Path(directory.path) / name


def test_what_a_commit_leaves(directory: CheckpointDirectory) -> None:
    assert directory.steps() == directory.candidates() == [1, 2, 3]
    made = directory.verify(2)
    assert made.metrics == {"loss": 2 / 3}
    assert made == directory.manifest(2)
    weights = made.tensors["weights/.ATTRIBUTES/VARIABLE_VALUE"]
    assert (weights.dtype, weights.shape) == ("float32", (40,))
    assert not path(directory, "pending").exists()


def test_a_step_that_is_there_is_replaced(
    directory: CheckpointDirectory,
) -> None:
    before = directory.verify(3).state
    state = tf.train.Checkpoint(weights=tf.Variable([9.0] * 40))
    directory.commit(3, snapshot.SnapshotTaker(state).take(3))
    assert directory.verify(3).state != before
    assert directory.steps() == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ckpt-3.json", "its manifest is missing"),
        ("ckpt-3.index", "its index is missing"),
        ("ckpt-3.data-00000-of-00001", "its data-00000-of-00001 is missing"),
    ],
)
def test_a_missing_file(
    name: str, reason: str, directory: CheckpointDirectory
) -> None:
    path(directory, name).unlink()
    for how in ("full", "sizes"):
        with pytest.raises(DamagedError, match=reason):
            directory.verify(3, how)
    assert 3 in directory.candidates()


def test_sizes_do_not_read(directory: CheckpointDirectory) -> None:
    data = path(directory, "ckpt-3.data-00000-of-00001")
    content = bytearray(data.read_bytes())
    content[5] ^= 4
    data.write_bytes(content)
    assert directory.verify(3, "sizes")
    with pytest.raises(
        DamagedError, match=r"weights/.* does not have its checksum"
    ):
        directory.verify(3)


def test_a_changed_tensor_that_tensorflow_believes(
    directory: CheckpointDirectory,
) -> None:
    """As a memory error between the checksum and the disk would leave it."""
    state = tf.train.Checkpoint(weights=tf.Variable([3.0] * 39 + [4.0]))
    made = directory.manifest(3)
    directory.commit(3, snapshot.SnapshotTaker(state).take(3))
    other = directory.manifest(3)
    path(directory, "ckpt-3.json").write_bytes(
        type(made)(
            **{
                **vars(made),
                "sizes": other.sizes,
                "index_sha256": other.index_sha256,
            }
        ).encode()
    )
    with pytest.raises(DamagedError, match=r"weights/.* does not have its"):
        directory.verify(3)


def test_a_manifest_of_another_step(directory: CheckpointDirectory) -> None:
    for suffix in ("json", "index", "data-00000-of-00001"):
        path(directory, f"ckpt-9.{suffix}").write_bytes(
            path(directory, f"ckpt-2.{suffix}").read_bytes()
        )
    with pytest.raises(DamagedError, match="its manifest is that of step 2"):
        directory.verify(9)


def damage(
    body: dict[str, Any], key: str = "", tensor: object = None, **values: object
) -> dict[str, Any]:
    """Returns a manifest with other values, `key` in its first tensor."""
    changed = {**body, **values}
    if key:
        name, first = next(iter(body["tensors"].items()))
        changed["tensors"] = {**body["tensors"], name: {**first, key: tensor}}
    return changed


@pytest.mark.parametrize(
    "odd",
    [
        *({"key": "dtype", "tensor": odd} for odd in ("nope", 7777, [1])),
        *({"key": "shape", "tensor": odd} for odd in (["a"], 5, [10**30])),
        *({"sizes": odd} for odd in ({"index": "x"}, ["index"], {}, None)),
        *({"saved_at": odd} for odd in ("x", 1e308, float("nan"), None)),
        *({"metrics": odd} for odd in ([1], {"loss": "x"}, {"loss": 10**400})),
        *({"step": odd} for odd in (3.0, "3", True, -3)),
        *({"tensors": odd} for odd in ({}, [], {"\ud800": 1})),
        *({"versions": odd} for odd in (5, {"keras": 3})),
        *({"run": odd} for odd in (5, [])),
        *({"log": odd} for odd in (5, {"bytes": "x", "sha256": "y"})),
    ],
    ids=str,
)
def test_a_sealed_manifest_of_odd_values_is_damaged(
    odd: dict[str, Any],
    directory: CheckpointDirectory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = path(directory, "ckpt-3.json")
    file.write_bytes(sealed.dumps(damage(json.loads(file.read_bytes()), **odd)))
    assert checkpoint_tool.run(["list", directory.path]) == errors.FINISHED
    assert "damaged: its manifest" in capsys.readouterr().out
    assert checkpoint_tool.run(["verify", directory.prefix(3)])
    assert "its manifest is damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match="ckpt-3: its manifest is damaged"):
        checkpoint_tool.run(["prune", directory.path, "--keep_best=1"])
    place = going_on.Place(directory, is_mine=True)
    seen = going_on.search([place], "full")
    assert seen.newest is not None
    assert seen.newest.manifest.step == 2


@hypothesis.given(st.data())
def test_no_value_in_a_manifest_surprises_its_readers(
    sound: bytes, data: st.DataObject
) -> None:
    body = json.loads(sound)
    changed = data.draw(odd_values.mutations(body))
    try:
        decoded = manifest.decode(sealed.dumps(changed))
    except DamagedError:
        return
    # What may differ is of the right type: it comes back as it is.
    assert manifest.decode(decoded.encode()) == decoded
    row = listing.Row("ckpt-3", 3, decoded.saved_at, 1, "", decoded.metrics)
    assert len(listing.lines([row])) == 2
    for tensor in decoded.tensors.values():
        tf.TensorSpec(tensor.shape, tensor.dtype)
    for name in (*decoded.tensors, *decoded.metrics, *decoded.versions):
        tf.constant(name)


@pytest.mark.parametrize("lost", ["index", "data-00000-of-00001"])
def test_a_copy_that_vanishes_is_no_damage_of_the_original(
    lost: str,
    directory: CheckpointDirectory,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where something cleans TMPDIR while a store's state is verified."""
    remote = CheckpointDirectory(f"file://{directory.path}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    copy = files.copy

    def copy_and_lose(source: str, target: str) -> None:
        copy(source, target)
        if target.endswith(lost):
            pathlib.Path(target).unlink()

    monkeypatch.setattr(files, "copy", copy_and_lose)
    place = going_on.Place(remote, is_mine=True)
    with pytest.raises(FileNotFoundError, match="was removed meanwhile"):
        going_on.search([place], "full")
    monkeypatch.setattr(files, "copy", copy)
    seen = going_on.search([place], "full")
    assert seen.newest is not None
    assert seen.newest.manifest.step == 3
    assert not directory.quarantined()


def test_put_aside_with_the_reason(directory: CheckpointDirectory) -> None:
    for _ in range(2):
        target = directory.quarantine(3, "it is torn")
        files = {each.name for each in pathlib.Path(target).iterdir()}
        assert "reason.txt" in files
        assert (pathlib.Path(target) / "reason.txt").read_text() == (
            "it is torn\n"
        )
        state = tf.train.Checkpoint(weights=tf.Variable([3.0]))
        assert 3 not in directory.candidates()
        directory.commit(3, snapshot.SnapshotTaker(state).take(3))
    assert directory.quarantined() == ["ckpt-3", "ckpt-3-2"]
    assert len(files) == 4


def test_what_is_read_is_not_removed(directory: CheckpointDirectory) -> None:
    with directory.reading(2):
        assert not directory.remove(2)
        assert directory.verify(2)
    assert directory.remove(2)
    assert directory.candidates() == [1, 3]


def test_left_overs_are_swept_and_only_ours(
    directory: CheckpointDirectory,
) -> None:
    """As a kill between the data and the manifest of step 3 leaves it."""
    pending = path(directory, "pending")
    pending.mkdir()
    path(directory, "ckpt-3.json").rename(pending / "ckpt-3.json")
    (pending / "ckpt-4.data-00000-of-00001").write_bytes(b"cut")
    path(directory, "checkpoint.tmp").write_bytes(b"model_ch")
    for name in ("notes.txt", "ckpt-best.tmp", "ckpt-1.index.mine"):
        path(directory, name).write_text("a person's")
    before = {each.name for each in pathlib.Path(directory.path).iterdir()}
    directory.clean()
    after = {each.name for each in pathlib.Path(directory.path).iterdir()}
    assert before - after == {
        "pending",
        "checkpoint.tmp",
        "ckpt-3.index",
        "ckpt-3.data-00000-of-00001",
    }
    assert directory.steps() == directory.candidates() == [1, 2]


def test_a_full_disk_leaves_all_as_it_was(
    directory: CheckpointDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(pathlib.Path(directory.path).iterdir())
    state = tf.train.Checkpoint(weights=tf.Variable([4.0]))
    taken = snapshot.SnapshotTaker(state).take(4)

    def full(path: str) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(directory_lib.files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        directory.commit(4, taken)
    monkeypatch.undo()
    directory.clean()
    assert sorted(pathlib.Path(directory.path).iterdir()) == before


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("float32", 2.5),
        ("bfloat16", [1.0, -3.0]),
        ("bool", [True, False, True]),
        ("complex64", [[1 + 2j]]),
        ("int8", [3]),
        ("string", ["a", "longer than the other"]),
        ("uint64", [2**63]),
    ],
)
def test_each_kind_of_tensor_verifies_until_a_bit_of_it_changes(
    dtype: str, value: Any, tmp_path: pathlib.Path
) -> None:
    directory = CheckpointDirectory(str(tmp_path))
    state = tf.train.Checkpoint(value=tf.Variable(value, dtype=dtype))
    directory.commit(1, snapshot.SnapshotTaker(state).take(1))
    assert directory.verify(1)
    key = f"value{fingerprint.VALUE}"
    extent = index.extents(directory.prefix(1))[key]
    file = pathlib.Path(extent.path)
    content = bytearray(file.read_bytes())
    content[extent.offset + extent.num_bytes - 1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError):
        directory.verify(1)


def test_an_empty_tensor_verifies(tmp_path: pathlib.Path) -> None:
    directory = CheckpointDirectory(str(tmp_path))
    state = tf.train.Checkpoint(value=tf.Variable(tf.zeros([0, 3])))
    directory.commit(1, snapshot.SnapshotTaker(state).take(1))
    assert directory.verify(1)


def test_a_tensor_in_slices_verifies(tmp_path: pathlib.Path) -> None:
    """As TensorFlow writes variables that are partitioned."""
    directory = CheckpointDirectory(str(tmp_path))
    whole = np.arange(12, dtype=np.float32).reshape(4, 3)
    prefix = directory.prefix(1)
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=["w", "w"],
        shape_and_slices=["4 3 0,1:-", "4 3 1,3:-"],
        tensors=[whole[:1], whole[1:]],
    )
    written = {"w": fingerprint.of(whole)}
    directory.recognize(directory_lib.describe(prefix, 1, written, {}))
    assert directory.verify(1)
    written = {"w": fingerprint.of(whole + 1)}
    directory.recognize(directory_lib.describe(prefix, 1, written, {}))
    with pytest.raises(DamagedError, match="w does not have its checksum"):
        directory.verify(1)
