"""The environment says who the workers are."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.cluster import environment as environment_lib
from dtrain.cluster.environment import Cluster
from dtrain.errors import UserError

TASK = {"type": "worker", "index": 0}

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
    read = environment_lib.from_environment({"TF_CONFIG": made.to_tf_config()})
    assert read == made
    assert read.is_chief == (made.index == 0)
    assert read.num_workers == num_workers


@given(json_values)
def test_any_json_is_read_or_refused(value: object) -> None:
    with contextlib.suppress(UserError):
        read = environment_lib.from_environment(
            {"TF_CONFIG": json.dumps(value)}
        )
        assert 0 <= read.index < read.num_workers


def test_no_tf_config_is_a_worker_alone() -> None:
    assert environment_lib.from_environment({}) == environment_lib.ALONE
    assert environment_lib.ALONE.is_chief


def test_a_chief_job_comes_first() -> None:
    jobs = {"chief": ["a:1"], "worker": ["b:2", "c:3"]}
    read = environment_lib.from_environment(
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
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        ("[]", "must hold"),
        ('{"cluster": {"worker": []}}', "names no worker"),
        ('{"cluster": {"worker": ["a"]}}', "host:port"),
        ('{"cluster": {"worker": [":1"]}}', "host:port"),
        ('{"cluster": {"worker": ["a b:1"]}}', "host:port"),
        ('{"cluster": {"worker": ["a:00655369"]}}', "host:port"),
        ('{"cluster": {"worker": ["a..b:1"]}}', "host:port"),
        ('{"cluster": {"worker": ["a\\u0000b:1"]}}', "host:port"),
        (json.dumps({"cluster": {"worker": ["a" * 64 + ":1"]}}), "host:port"),
        ('{"cluster": {"worker": ["a:\u0661"]}}', "host:port"),
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
        (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": '
            '"worker", "index": true}}',
            "its index a number",
        ),
        *(
            (json.dumps({"cluster": jobs, "task": TASK}), message)
            for jobs, message in [
                ({"worker": ["a:1"], "ps": ["b:1"]}, "tasks of type 'ps'"),
                ({"worker": ["a:1"], "ps": []}, "tasks of type 'ps'"),
                ({"ps": ["b:1"]}, "tasks of type 'ps'"),
                ({"chief": ["a:1"], "evaluator": ["b:1"]}, "'evaluator'"),
                ({"worker": ["a:1", "b:1"], "master": ["c:1"]}, "'master'"),
                ({"worker": ["a:1"], "x\ny": ["c:1"]}, r"'x\ny'"),
                ({"worker": {"0": "a:1"}}, "'0' must be host:port"),
            ]
        ),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        environment_lib.from_environment({"TF_CONFIG": text})
    assert message in str(caught.value)


LIST = {"DTRAIN_WORKERS": "a:1,b:2,c:3"}
VERTEX = {
    "cluster": {
        "workerpool0": ["chief:2222"],
        "workerpool1": ["worker-0:2222", "worker-1:2222"],
    },
    "environment": "cloud",
    "task": {"type": "workerpool1", "index": 1, "trial": ""},
}
SKYPILOT = {
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_TASK_ID": "sky-managed-2026-11-23-08-00-00-000000_faces_1-0",
}
SLURM = {
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
}


def spec(**changes: object) -> dict[str, str]:
    """What Vertex AI sets, but for some of it."""
    return {"CLUSTER_SPEC": json.dumps({**VERTEX, **changes})}


def test_a_list_and_an_index() -> None:
    workers = ("a:1", "b:2", "c:3")
    kubernetes = {**LIST, "JOB_COMPLETION_INDEX": "1"}
    assert environment_lib.from_environment(kubernetes) == Cluster(workers, 1)
    both = {**kubernetes, "DTRAIN_WORKER_INDEX": "2"}
    assert environment_lib.from_environment(both) == Cluster(workers, 2)


def test_the_pools_of_vertex() -> None:
    workers = ("chief:2222", "worker-0:2222", "worker-1:2222")
    assert environment_lib.from_environment(spec()) == Cluster(workers, 2)
    chief = {"type": "workerpool0", "index": 0}
    assert environment_lib.from_environment(spec(task=chief)) == Cluster(
        workers, 0
    )
    alone = spec(cluster={"workerpool0": ["chief:2222"]}, task=chief)
    assert environment_lib.from_environment(alone) == environment_lib.ALONE


def test_the_nodes_of_skypilot() -> None:
    read = environment_lib.from_environment(SKYPILOT)
    assert read.index == 1
    hosts, ports = zip(*(each.split(":") for each in read.workers), strict=True)
    assert hosts == ("10.0.0.1", "10.0.0.2")
    assert len(set(ports)) == 1
    alone = {**SKYPILOT, "SKYPILOT_NODE_IPS": "10.0.0.1"}
    assert environment_lib.from_environment(alone) == environment_lib.ALONE


@given(
    tasks=st.lists(st.integers(1, 4), min_size=2, max_size=6), data=st.data()
)
def test_the_tasks_of_slurm(tasks: list[int], data: st.DataObject) -> None:
    node = data.draw(st.integers(0, len(tasks) - 1))
    index = sum(tasks[:node]) + data.draw(st.integers(0, tasks[node] - 1))
    read = environment_lib.from_environment(
        {
            **SLURM,
            "SLURM_STEP_NODELIST": f"n[01-{len(tasks)}]",
            "SLURM_STEP_NUM_TASKS": str(sum(tasks)),
            "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, tasks)),
            "SLURM_PROCID": str(index),
            "SLURM_NODEID": str(node),
        }
    )
    assert read.index == index
    assert read.num_workers == len(set(read.workers)) == sum(tasks)
    hosts = [worker.partition(":")[0] for worker in read.workers]
    assert [hosts.count(f"n{n:02}") for n in range(1, len(tasks) + 1)] == tasks
    assert hosts[index] == f"n{node + 1:02}"


@given(st.integers(1, 10**9), st.integers(0, 50), st.integers(1, 16))
def test_jobs_in_a_row_have_ports_of_their_own(
    job: int, later: int, num_tasks: int
) -> None:
    def ports(job: int) -> set[str]:
        step = {
            **SLURM,
            "SLURM_JOB_ID": str(job),
            "SLURM_STEP_TASKS_PER_NODE": f"{num_tasks}(x2)",
            "SLURM_STEP_NUM_TASKS": str(2 * num_tasks),
            "SLURM_PROCID": str(num_tasks),
        }
        workers = environment_lib.from_environment(step).workers
        return {worker.partition(":")[2] for worker in workers}

    assert all(10000 <= int(port) < 32768 for port in ports(job))
    assert not later or not ports(job) & ports(job + later)


@pytest.mark.parametrize(
    ("environment", "other"),
    [
        ({**LIST, "DTRAIN_WORKER_INDEX": "1"}, {"DTRAIN_SUBMITTED_SECS": "2"}),
        (spec(), {"DTRAIN_SUBMITTED_SECS": "2"}),
        (SKYPILOT, {"SKYPILOT_TASK_ID": "sky-2"}),
        (SLURM, {"SLURM_JOB_ID": "18"}),
        (SLURM, {"DTRAIN_CODE_DIR": "/runs/launch/k3vq"}),
        (SLURM, {"DTRAIN_SECRET": "given"}),
    ],
)
def test_the_workers_of_a_job_share_what_others_do_not(
    environment: dict[str, str], other: dict[str, str]
) -> None:
    def secret(**more: str) -> str:
        given = {"DTRAIN_SUBMITTED_SECS": "1", **environment, **more}
        return environment_lib.from_environment(given).secret

    assert secret() == secret(HOSTNAME="n2", SLURM_RESTART_COUNT="0")
    assert secret() != secret(**other)


def test_the_first_that_is_there_decides() -> None:
    everything = {**SLURM, **SKYPILOT, **spec(), "DTRAIN_WORKER_INDEX": "0"}
    assert environment_lib.from_environment(everything).source == "CLUSTER_SPEC"
    named = {**everything, **LIST}
    assert environment_lib.from_environment(named).source == "DTRAIN_WORKERS"
    # As where a batch script unsets one by `VARIABLE=`.
    assert environment_lib.from_environment(
        {**named, "DTRAIN_WORKERS": ""}
    ) == (environment_lib.from_environment(everything))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (LIST, "JOB_COMPLETION_INDEX ('')"),
        ({**LIST, "JOB_COMPLETION_INDEX": "3"}, "below 3"),
        ({**LIST, "DTRAIN_WORKER_INDEX": "-1"}, "below 3"),
        ({"DTRAIN_WORKERS": "a:1,,b:2"}, "worker '' must be host:port"),
        ({"DTRAIN_WORKERS": "a:1, b:2"}, "' b:2' must be host:port"),
        ({"DTRAIN_WORKERS": "a:1,a:1"}, "twice"),
        ({"CLUSTER_SPEC": "{"}, "not JSON"),
        ({"CLUSTER_SPEC": "[]"}, "not what Vertex AI sets"),
        (spec(task={"type": "workerpool1", "index": 2}), "not what Vertex"),
        (spec(task={"type": "workerpool1", "index": -1}), "not what Vertex"),
        (spec(task={"type": "workerpool2", "index": 0}), "not what Vertex"),
        (spec(task={"type": ["a"], "index": 0}), "not what Vertex"),
        (spec(cluster={"worker": ["a:1", "b:1"]}), "not what Vertex"),
        (
            spec(cluster={"workerpool0": ["a"], "workerpool1": ["b", "c"]}),
            "host:port",
        ),
        ({**SKYPILOT, "SKYPILOT_NODE_RANK": "2"}, "below 2"),
        ({**SKYPILOT, "SKYPILOT_NODE_IPS": "a a"}, "twice"),
        ({**SKYPILOT, "DTRAIN_PORT": "65536"}, "DTRAIN_PORT ('65536')"),
        ({**SLURM, "SLURM_STEP_NODELIST": "n["}, "node list ('n[')"),
        ({**SLURM, "SLURM_STEP_NODELIST": "n[1-3]"}, "names 3 nodes"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": ""}, "tasks per node ('')"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "4"}, "for 4 tasks"),
        ({**SLURM, "SLURM_PROCID": "3"}, "SLURM_PROCID ('3')"),
        ({**SLURM, "SLURM_PROCID": "1"}, "use srun --distribution=block"),
        ({**SLURM, "DTRAIN_PORT": "65535"}, "each of 2 tasks"),
        ({**SLURM, "DTRAIN_PORT": "http"}, "DTRAIN_PORT ('http')"),
    ],
)
def test_mistakes_of_others(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        environment_lib.from_environment(environment)
    assert message in str(caught.value)


# Near enough to what is right that each reader gets past its first check.
near = (
    st.text(max_size=12)
    | st.text("0123a[]-,():x\n", max_size=12)
    | st.sampled_from(
        sorted({*LIST.values(), *SKYPILOT.values(), *SLURM.values()})
    )
    | json_values.map(json.dumps)
    | st.dictionaries(
        st.sampled_from(["cluster", "task"]),
        st.dictionaries(
            st.sampled_from(["workerpool0", "workerpool1", "type", "index"]),
            json_values | st.sampled_from(["workerpool0", ["a:1", "b:1"]]),
        ),
    ).map(json.dumps)
)
variables = st.sampled_from(
    [
        *("TF_CONFIG", "DTRAIN_WORKERS", "DTRAIN_WORKER_INDEX", "DTRAIN_PORT"),
        *("JOB_COMPLETION_INDEX", "CLUSTER_SPEC", "SLURM_RESTART_COUNT"),
        *(*SKYPILOT, *SLURM),
    ]
)


@settings(max_examples=300)
@given(
    base=st.sampled_from([{}, LIST, spec(), SKYPILOT, SLURM]),
    changes=st.dictionaries(variables, near, max_size=4),
)
def test_any_environment_is_read_or_refused(
    base: dict[str, str], changes: dict[str, str]
) -> None:
    said = ""
    try:
        read = environment_lib.from_environment({**base, **changes})
        assert 0 <= read.index < read.num_workers == len(set(read.workers))
    except UserError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1
