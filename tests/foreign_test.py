"""Programs that know nothing of dtrain load what they wrote."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import tensorflow as tf

from tests import foreign, runs

# What training leaves as it is, beside the learning rates.
STILL = {
    "mixed_precision/optimizer/_iterations",
    "mixed_precision/optimizer/dynamic_scale",
    "raw_variables/empty",
    "raw_variables/values/3",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return foreign.corpus(tmp_path_factory)


def graph(prefix: str) -> bytes:
    return tf.train.load_checkpoint(prefix).get_tensor(foreign.GRAPH_KEY)


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert list(a) == list(b)
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], key, strict=True)


@pytest.mark.parametrize("program", foreign.PROGRAMS)
def test_what_is_loaded_is_what_was_written(
    program: str, corpus: dict[str, str], tmp_path: pathlib.Path
) -> None:
    written = foreign.saved(corpus[program])
    assert_same(foreign.loaded(program, corpus[program]), written)
    # And the program did not have it from the start.
    made = foreign.fresh(program).write(
        str(tmp_path), is_managed=program in foreign.MANAGED
    )
    same = {
        f"{program}/{key.partition('/.ATTRIBUTES')[0]}"
        for key, value in foreign.saved(made).items()
        if np.array_equal(value, written[key])
        and not key.startswith("save_counter")
    }
    assert {name for name in same if not name.endswith("learning_rate")} <= (
        STILL
    )


@pytest.mark.parametrize("program", foreign.PROGRAMS)
def test_the_second_time_is_as_the_first(
    program: str, corpus: dict[str, str], tmp_path: pathlib.Path
) -> None:
    again = foreign.write(program, str(tmp_path))
    assert graph(again) == graph(corpus[program])
    # One worker alone has other gradients than two.
    if program != "multi_worker":
        assert_same(foreign.saved(again), foreign.saved(corpus[program]))


def test_another_process_writes_the_same(
    corpus: dict[str, str], tmp_path: pathlib.Path
) -> None:
    code, output = runs.finish(
        runs.start("tests.foreign", "two_and_two", str(tmp_path))
    )
    assert code == 0, output
    other = f"{tmp_path}/ckpt-{foreign.NUM_STEPS}"
    assert graph(other) == graph(corpus["two_and_two"])
    assert_same(foreign.saved(other), foreign.saved(corpus["two_and_two"]))
