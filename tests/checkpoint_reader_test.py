"""What is read from checkpoints of any TensorFlow 2 program."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain import checkpoint_tool, errors
from dtrain.bundle import tensors
from tests import runs


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable of a state, as hypothesis makes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    seed: int

    def value(self) -> np.ndarray:
        size = int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        content = np.random.default_rng(self.seed).bytes(size)
        return np.frombuffer(content, self.dtype).reshape(self.shape)


VARIABLES = st.builds(
    Variable,
    name=st.sampled_from(["a", "b", "kernel", "kernel_1"]),
    dtype=st.sampled_from(["float32", "int32", "int64", "float16"]),
    shape=st.lists(st.integers(1, 4), max_size=3).map(tuple),
    seed=st.integers(0, 9),
)
STATES = st.lists(
    VARIABLES, min_size=1, max_size=3, unique_by=lambda variable: variable.name
)


def digest_of(state: list[Variable]) -> str:
    values = {each.name: tf.Variable(each.value()) for each in state}
    with tempfile.TemporaryDirectory() as directory:
        prefix = tf.train.Checkpoint(**values).write(f"{directory}/ckpt")
        return tensors.digest(prefix)


@settings(max_examples=20)
@given(STATES)
def test_equal_states_have_equal_digests(state: list[Variable]) -> None:
    assert digest_of(state) == digest_of(state[::-1])


OTHER_DTYPES = {
    "float32": "int32",
    "int32": "float32",
    "int64": "uint64",
    "float16": "uint16",
}


def another(changed: Variable, part: str) -> Variable:
    """Changes one thing; the bytes stay, but for the part `seed`."""
    changes = {
        "name": changed.name + "x",
        "dtype": OTHER_DTYPES[changed.dtype],
        "shape": (*changed.shape, 1),
        "seed": changed.seed + 100,
    }
    return dataclasses.replace(changed, **{part: changes[part]})


@settings(max_examples=40)
@given(STATES, st.sampled_from(["name", "dtype", "shape", "seed"]), st.data())
def test_another_state_has_another_digest(
    state: list[Variable], part: str, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(state) - 1))
    changed = list(state)
    changed[place] = another(state[place], part)
    assert digest_of(changed) != digest_of(state)


def test_one_bit_changes_the_digest(tmp_path: pathlib.Path) -> None:
    one = np.float32(1.0)
    digests = set()
    for value in (one, np.nextafter(one, np.float32(2.0)), -0.0, 0.0):
        weight = tf.Variable(np.array([value], np.float32))
        state = tf.train.Checkpoint(weight=weight)
        prefix = state.write(str(tmp_path / "ckpt"))
        digests.add(tensors.digest(prefix))
    assert len(digests) == 4


WRITE = """
import sys
import tensorflow as tf

state = tf.train.Checkpoint(
    step=tf.Variable(3, dtype=tf.int64),
    weights=tf.Variable(tf.reshape(tf.range(60.0), [3, 20])),
    names=tf.Variable([b"zero", b"one"]),
)
print(state.write(sys.argv[1]))
"""


def test_digest_is_the_same_for_two_processes(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, f"{tmp_path}/{name}/ckpt-3"],
            env=runs.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name in ("one", "two")
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    for name in ("one/ckpt-3", "two/ckpt-3.index", "two"):
        code = checkpoint_tool.run(["digest", f"{tmp_path}/{name}"])
        assert code == errors.FINISHED
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len({digest for digest, _ in lines}) == 1
    assert [path for _, path in lines] == [
        f"{tmp_path}/{name}/ckpt-3" for name in ("one", "two", "two")
    ]
    assert len(lines[0][0]) == 64


def test_the_tools_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint_tool.run(["--help"]) == errors.FINISHED
    assert "digest CKPT" in capsys.readouterr().out
