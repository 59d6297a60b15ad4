"""TF_CONFIG says who the workers are."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain import cluster
from dtrain.cluster import Cluster
from dtrain.errors import UserError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["cluster", "task", "worker", "chief", "type", "index"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.integers(1, 40), st.data())
def test_round_trip(num_workers: int, data: st.DataObject) -> None:
    workers = tuple(
        f"host{number}:{2000 + number}" for number in range(num_workers)
    )
    made = Cluster(workers, data.draw(st.integers(0, num_workers - 1)))
    read = cluster.from_environment({"TF_CONFIG": made.to_tf_config()})
    assert read == made
    assert read.is_chief == (made.index == 0)
    assert read.num_workers == num_workers


@given(json_values)
def test_any_json_is_read_or_refused(value: object) -> None:
    with contextlib.suppress(UserError):
        read = cluster.from_environment({"TF_CONFIG": json.dumps(value)})
        assert 0 <= read.index < read.num_workers


def test_no_tf_config_is_a_worker_alone() -> None:
    assert cluster.from_environment({}) == cluster.ALONE
    assert cluster.ALONE.is_chief


def test_a_chief_job_comes_first() -> None:
    jobs = {"chief": ["a:1"], "worker": ["b:2", "c:3"]}
    read = cluster.from_environment(
        {
            "TF_CONFIG": json.dumps(
                {"cluster": jobs, "task": {"type": "worker", "index": 1}}
            )
        }
    )
    assert read == Cluster(("a:1", "b:2", "c:3"), 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must hold"),
        ('{"cluster": {"worker": []}}', "names no worker"),
        ('{"cluster": {"worker": ["a"]}}', "host:port"),
        ('{"cluster": {"worker": ["a:1", "a:1"]}}', "twice"),
        ('{"cluster": {"worker": ["a:1"]}}', "which worker this is"),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", '
            '"index": 1}}',
            "index (1) must be below",
        ),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "ps", '
            '"index": 0}}',
            "must be a worker",
        ),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        cluster.from_environment({"TF_CONFIG": text})
    assert message in str(caught.value)
