"""Reads who the workers are, and which of them this process is.

A scheduler or a launcher says so by environment variables. TensorFlow is not
imported, so that launchers can use this too.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from dtrain.cluster import hostlist
from dtrain.errors import UserError

# Set by a launcher that starts all workers of a run itself.
SECRET = "DTRAIN_SECRET"

# Each job on a node has one of so many ranges of ports; see `_first_port`.
_PORTS_OF_A_JOB = 16
_NUM_SLOTS = 1250
_MOST_TASKS = 65537
_END_OF_PORTS = 65536


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run, in the order that all of them agree on.

    Attributes:
        workers: `host:port` of each worker; the first is the chief.
        index: which of `workers` this process is.
        source: the environment variable that says so; empty for `ALONE`.
        secret: what strangers do not know, as far as there is such a thing.
    """

    workers: tuple[str, ...]
    index: int
    source: str = dataclasses.field(default="", compare=False)
    secret: str = dataclasses.field(default="", compare=False, repr=False)

    @property
    def is_chief(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.index == 0

    @property
    def num_workers(self) -> int:
        """Number of processes that train together."""
        return len(self.workers)

    def to_tf_config(self) -> str:
        """Returns the TF_CONFIG that makes a process this worker."""
        return json.dumps(
            {
                "cluster": {"worker": list(self.workers)},
                "task": {"type": "worker", "index": self.index},
            }
        )


ALONE = Cluster(workers=("localhost",), index=0)


def from_environment(environment: Mapping[str, str]) -> Cluster:
    """Finds out who is who, by the variables of launchers and schedulers.

    The first of these that is set decides; what a person sets comes before what
    a scheduler sets by itself:

    - TF_CONFIG, TensorFlow's own.
    - DTRAIN_WORKERS, `host:port` of each with commas between them, and
      DTRAIN_WORKER_INDEX or, in a Kubernetes Job, JOB_COMPLETION_INDEX.
    - CLUSTER_SPEC of Vertex AI.
    - SKYPILOT_NODE_IPS and SKYPILOT_NODE_RANK.
    - SLURM_STEP_NODELIST and SLURM_PROCID, in a step of several tasks.

    Where the ports are not given, they follow from the scheduler's number of
    the job, so that two jobs on one machine have different ones; or
    DTRAIN_PORT is the first of them.

    Returns:
        The cluster; `ALONE` if nothing says that there are other workers.

    Raises:
        UserError: what is set is malformed, or contradicts itself.
    """
    for name, read in SOURCES.items():
        if environment.get(name):
            cluster = read(environment)
            if cluster:
                secret = _secret(environment, name)
                return dataclasses.replace(cluster, source=name, secret=secret)
            break
    return ALONE


def _from_tf_config(environment: Mapping[str, str]) -> Cluster:
    tf_config = _parse_json(environment, "TF_CONFIG")
    workers = _workers(tf_config)
    return Cluster(workers=workers, index=_index(tf_config, workers))


def _from_list(environment: Mapping[str, str]) -> Cluster:
    workers = tuple(environment["DTRAIN_WORKERS"].split(","))
    _check_workers("DTRAIN_WORKERS", workers)
    name = "DTRAIN_WORKER_INDEX"
    if name not in environment:
        name = "JOB_COMPLETION_INDEX"
    return Cluster(workers, _number(environment, name, below=len(workers)))


def _from_vertex(environment: Mapping[str, str]) -> Cluster | None:
    """Reads the workers of a Vertex job, those of pool 0 first.

    Raises:
        UserError: CLUSTER_SPEC is malformed.
    """
    spec = _parse_json(environment, "CLUSTER_SPEC")
    try:
        pools = {
            _pool(name): addresses
            for name, addresses in spec["cluster"].items()
        }
        tasks = {
            (pool, index): address
            for pool in sorted(pools)
            for index, address in enumerate(pools[pool])
        }
        task = spec["task"]
        index = list(tasks).index((_pool(task["type"]), task["index"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            "CLUSTER_SPEC is not what Vertex AI sets: "
            f"{environment['CLUSTER_SPEC'][:200]!r}"
        ) from error
    workers = tuple(tasks.values())
    _check_workers("CLUSTER_SPEC", workers)
    return Cluster(workers, index) if len(workers) > 1 else None


def _pool(name: str) -> int:
    match = re.fullmatch("workerpool([0-9])", name)
    if not match:
        raise ValueError(name)
    return int(match[1])


def _from_skypilot(environment: Mapping[str, str]) -> Cluster | None:
    addresses = environment["SKYPILOT_NODE_IPS"].split()
    if len(addresses) < 2:
        return None
    name = "SKYPILOT_NODE_RANK"
    index = _number(environment, name, below=len(addresses))
    job = zlib.crc32(environment.get("SKYPILOT_TASK_ID", "").encode())
    port = _first_port(environment, job)
    workers = tuple(f"{address}:{port}" for address in addresses)
    _check_workers("SKYPILOT_NODE_IPS", workers)
    return Cluster(workers, index)


def _from_slurm(environment: Mapping[str, str]) -> Cluster | None:
    """Reads a step of srun, whose tasks fill one node after another.

    Raises:
        UserError: they do not, or a variable is malformed.
    """
    name = "SLURM_STEP_NUM_TASKS"
    num_tasks = _number(environment, name, below=_MOST_TASKS)
    if num_tasks < 2:
        return None
    names = hostlist.hosts(environment["SLURM_STEP_NODELIST"])
    tasks = hostlist.counts(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if len(tasks) != len(names) or sum(tasks) != num_tasks:
        raise UserError(
            f"SLURM_STEP_NODELIST names {len(names)} nodes for {num_tasks} "
            f"tasks, SLURM_STEP_TASKS_PER_NODE {len(tasks)} for {sum(tasks)}; "
            "unset SLURM_STEP_NODELIST to train alone"
        )
    # Another attempt has other ports, in case these are taken.
    job = (
        _number(environment, "SLURM_JOB_ID")
        + 7919 * _number(environment, "SLURM_STEP_ID")
        + 104729 * _number(environment, "SLURM_RESTART_COUNT", default="0")
    )
    port = _first_port(environment, job, max(tasks))
    nodes = [
        (node, local)
        for node, count in enumerate(tasks)
        for local in range(count)
    ]
    index = _number(environment, "SLURM_PROCID", below=num_tasks)
    node = _number(environment, "SLURM_NODEID", below=len(names))
    if nodes[index][0] != node:
        raise UserError(
            f"task {index} of the Slurm step runs on node {node} and not on "
            f"node {nodes[index][0]}; use srun --distribution=block"
        )
    workers = tuple(f"{names[node]}:{port + local}" for node, local in nodes)
    return Cluster(workers, index)


SOURCES: dict[str, Callable[[Mapping[str, str]], Cluster | None]] = {
    "TF_CONFIG": _from_tf_config,
    "DTRAIN_WORKERS": _from_list,
    "CLUSTER_SPEC": _from_vertex,
    "SKYPILOT_NODE_IPS": _from_skypilot,
    "SLURM_STEP_NODELIST": _from_slurm,
}


# What all nodes of a job share. On a scheduler that is little of a secret: it
# keeps out strangers that meet the port by chance, and other jobs.
_OF_A_JOB = {
    "DTRAIN_WORKERS": ("DTRAIN_SUBMITTED_SECS",),
    "CLUSTER_SPEC": ("DTRAIN_SUBMITTED_SECS",),
    "SKYPILOT_NODE_IPS": ("SKYPILOT_TASK_ID", "DTRAIN_SUBMITTED_SECS"),
    "SLURM_STEP_NODELIST": (
        *("SLURM_JOB_ID", "SLURM_STEP_ID"),
        # The directory has a name by chance.
        *("DTRAIN_SUBMITTED_SECS", "DTRAIN_CODE_DIR"),
    ),
}


def _secret(environment: Mapping[str, str], source: str) -> str:
    """Returns what the workers of one start share, and others do not know."""
    given = environment.get(SECRET)
    if given:
        return given
    values = [environment.get(name, "") for name in _OF_A_JOB.get(source, ())]
    return "\n".join(values) if any(values) else ""


def _first_port(
    environment: Mapping[str, str], job: int, tasks_per_node: int = 1
) -> int:
    """Chooses the ports of a job: jobs with near numbers have different ones.

    They are below what Linux gives to outgoing connections (32768 and more).

    Raises:
        UserError: DTRAIN_PORT is no port, or leaves too few.
    """
    default = str(10000 + job % _NUM_SLOTS * _PORTS_OF_A_JOB)
    first = environment.get("DTRAIN_PORT") or default
    if not _is_port(first) or int(first) + tasks_per_node > _END_OF_PORTS:
        raise UserError(
            f"DTRAIN_PORT ({first[:80]!r}) must be at least 1 and leave a port "
            f"below {_END_OF_PORTS} to each of {tasks_per_node} tasks of a node"
        )
    return int(first)


def _is_port(text: str) -> bool:
    is_number = text.isascii() and text.isdigit() and len(text) < 6
    return is_number and 0 < int(text) < _END_OF_PORTS


def _is_host(text: str) -> bool:
    """Tells whether a text can be looked up as a name at all."""
    try:
        # A part of a name has 1 to 63 letters.
        text.encode("idna")
    except UnicodeError:
        return False
    return bool(text) and text.isprintable() and text.split() == [text]


def _parse_json(environment: Mapping[str, str], name: str) -> Any:
    try:
        return json.loads(environment[name])
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{name} is not JSON: {error}; unset it to train alone"
        ) from error


def _number(
    environment: Mapping[str, str],
    name: str,
    *,
    below: int = 10**12,
    default: str = "",
) -> int:
    """Reads a whole number of at least 0 and below `below`.

    Raises:
        UserError: the variable is none.
    """
    text = environment.get(name, default)
    is_number = text.isascii() and text.isdigit() and len(text) < 13
    if not is_number or int(text) >= below:
        raise UserError(
            f"{name} ({text[:80]!r}) must be a whole number below {below}"
        )
    return int(text)


def _check_workers(name: str, workers: tuple[Any, ...]) -> None:
    for address in workers:
        text = address if isinstance(address, str) else ""
        host, _, port = text.rpartition(":")
        if not _is_host(host) or not _is_port(port):
            raise UserError(
                f"{name}: worker {repr(address)[:80]} must be host:port"
            )
    if len(set(workers)) < len(workers):
        raise UserError(f"{name} names a worker twice: {list(workers)}")


def _workers(tf_config: Any) -> tuple[str, ...]:
    try:
        jobs = tf_config["cluster"]
        addresses = (*jobs.get("chief", []), *jobs.get("worker", []))
        strangers = sorted(set(jobs) - {"chief", "worker"})
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            'TF_CONFIG must hold {"cluster": {"worker": ["host:port", ...]}, '
            '"task": {"type": "worker", "index": 0}}'
        ) from error
    if strangers:
        # TensorFlow would wait for them for ever, and hear no signal.
        raise UserError(
            f"TF_CONFIG: its cluster has tasks of type {strangers[0][:80]!r}; "
            "only chief and worker train together here; remove it, or unset "
            "TF_CONFIG to train alone"
        )
    if not addresses:
        raise UserError("TF_CONFIG names no worker in its cluster")
    _check_workers("TF_CONFIG", addresses)
    return addresses


def _index(tf_config: Any, workers: tuple[str, ...]) -> int:
    try:
        task_type = tf_config["task"]["type"]
        index = tf_config["task"]["index"]
        num_chiefs = len(tf_config["cluster"].get("chief", []))
    except (TypeError, KeyError) as error:
        raise UserError(
            'TF_CONFIG must say which worker this is: "task": {"type": '
            '"worker", "index": 0}'
        ) from error
    # JSON's true is an int to Python.
    if task_type not in ("chief", "worker") or type(index) is not int:
        raise UserError(
            f"TF_CONFIG: task {repr((task_type, index))[:80]} must be a worker "
            "or the chief, and its index a number"
        )
    position = index + (num_chiefs if task_type == "worker" else 0)
    if not 0 <= position < len(workers):
        raise UserError(
            f"TF_CONFIG: index ({index}) must be below the number of workers "
            f"({len(workers)})"
        )
    return position
