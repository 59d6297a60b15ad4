"""Who the workers are and which of them this process is.

Read from the environment that a scheduler or launcher sets; holds no
TensorFlow, so that launchers can use it too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from dtrain.errors import UserError


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run, in the order that all of them agree on.

    Attributes:
        workers: `host:port` of each worker; the first is the chief.
        index: which of `workers` this process is.
    """

    workers: tuple[str, ...]
    index: int

    @property
    def is_chief(self) -> bool:
        """Whether this process is the one that writes."""
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
    """Reads the cluster from TF_CONFIG.

    Args:
        environment: the environment variables of the process.

    Returns:
        The cluster; `ALONE` if TF_CONFIG is not set.

    Raises:
        UserError: TF_CONFIG is malformed.
    """
    text = environment.get("TF_CONFIG", "")
    if not text:
        return ALONE
    try:
        tf_config = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"TF_CONFIG is not JSON: {error}; unset it to train alone"
        ) from error
    workers = _workers(tf_config)
    return Cluster(workers=workers, index=_index(tf_config, workers))


def _workers(tf_config: Any) -> tuple[str, ...]:
    try:
        jobs = tf_config["cluster"]
        addresses = (*jobs.get("chief", []), *jobs.get("worker", []))
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            'TF_CONFIG must hold {"cluster": {"worker": ["host:port", ...]}, '
            '"task": {"type": "worker", "index": 0}}'
        ) from error
    for address in addresses:
        if (
            not isinstance(address, str)
            or not address.rpartition(":")[2].isdigit()
        ):
            raise UserError(f"TF_CONFIG: worker {address!r} must be host:port")
    if not addresses:
        raise UserError("TF_CONFIG names no worker in its cluster")
    if len(set(addresses)) < len(addresses):
        raise UserError(f"TF_CONFIG names a worker twice: {list(addresses)}")
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
    if task_type not in ("chief", "worker") or not isinstance(index, int):
        raise UserError(
            f"TF_CONFIG: task {task_type!r} {index!r} must be a worker or the "
            "chief, and its index a number"
        )
    place = index + (num_chiefs if task_type == "worker" else 0)
    if not 0 <= place < len(workers):
        raise UserError(
            f"TF_CONFIG: index ({index}) must be below the number of workers "
            f"({len(workers)})"
        )
    return place
