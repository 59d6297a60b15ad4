"""The documents of a Kubernetes job: a Job or a JobSet, a Service, the pods.

Why they are as they are is in docs/kubernetes.md.
"""

from __future__ import annotations

import dataclasses
import math
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dtrain import errors
from dtrain.errors import UserError
from launch.job import Job
from launch.options import variables

# Name of the container, and of the one Job of a JobSet.
_WORKER = "worker"
_PORT = 2222
INSTANCE = "app.kubernetes.io/instance"

# A label of DNS has 63 characters. The name of a pod of a JobSet needs 20 of
# them for -worker-0-9999-abcde, and the time and the mark of the submission 18.
_MAX_NAME = 25
_MAX_INT = (1 << 31) - 1

GRACE_SECS = 60.0
# Between the end of a worker and that of its supervisor.
_MARGIN_SECS = 10
# How long a job can be looked at that is over.
_KEPT_SECS = 7 * 24 * 3600

# As in the Dockerfile.
_USER = 1000

_GPU = "nvidia.com/gpu"
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_SPOT_TAINTS = (
    ("cloud.google.com/gke-spot", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)


def object_name(job: Job) -> str:
    """Returns a name that no other submission of this or another run has."""
    name = job.name[:_MAX_NAME].rstrip("-")
    return f"{name}-{job.submitted_secs}-{job.mark}"


def documents(job: Job) -> list[dict[str, Any]]:
    """Returns what is created for a job: its own object comes last.

    Args:
        job: the job; its flags fit each other.

    Raises:
        UserError: a flag is malformed.
    """
    options = job.options
    metadata: dict[str, Any] = {"name": object_name(job)}
    if options.namespace:
        metadata["namespace"] = options.namespace
    metadata["labels"] = _labels(job)
    metadata.update(_annotations(job))
    if options.gang == "jobset":
        return [_job_set(job, metadata)]
    spec = {
        "ttlSecondsAfterFinished": _KEPT_SECS,
        # When one pod fails, each of the others does, too.
        "backoffLimit": min(options.max_requeues * options.num_nodes, _MAX_INT),
        **_job_spec(job),
    }
    document = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": spec,
    }
    if options.num_nodes == 1:
        return [document]
    return [_service(job, metadata), document]


def _labels(job: Job) -> dict[str, str]:
    ours = {"app.kubernetes.io/name": "dtrain", INSTANCE: object_name(job)}
    theirs = _pairs("label", job.options.label)
    for key in ours:
        if key in theirs:
            raise UserError(f"label ({key}) is set by dtrain; leave it out")
    return {**ours, **theirs}


def _annotations(job: Job) -> dict[str, Any]:
    found = _pairs("annotation", job.options.annotation)
    return {"annotations": found} if found else {}


def _pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """Reads `key=value` of a flag that is given several times.

    Raises:
        UserError: one is malformed, or its key is there twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UserError(f"{flag} ({text}) must be of the form key=value")
        if key in found:
            raise UserError(f"{flag} ({key}) is given twice; leave one out")
        found[key] = value
    return found


def _service(job: Job, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the pods their names."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {INSTANCE: object_name(job)},
            "ports": [{"name": "tensorflow", "port": _PORT}],
        },
    }


def _job_set(job: Job, metadata: Mapping[str, Any]) -> dict[str, Any]:
    # A failure that counts fails the Job, and the JobSet starts all pods again.
    inner = {"backoffLimit": 0, **_job_spec(job)}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "ttlSecondsAfterFinished": _KEPT_SECS,
            "network": {
                "enableDNSHostnames": True,
                "subdomain": object_name(job),
                "publishNotReadyAddresses": True,
            },
            "failurePolicy": {
                "maxRestarts": min(job.options.max_requeues, _MAX_INT),
                "rules": [
                    {
                        "name": "mistake",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {"name": _WORKER, "replicas": 1, "template": {"spec": inner}}
            ],
        },
    }


def _job_spec(job: Job) -> dict[str, Any]:
    count = job.options.num_nodes
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": count,
        # Two pods with one index would be two workers with one name.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                _on_exit("FailJob", errors.USER_ERROR),
                {
                    "action": "Ignore",
                    "onPodConditions": [
                        {"type": "DisruptionTarget", "status": "True"}
                    ],
                },
                _on_exit("Ignore", errors.RUN_AGAIN),
            ]
        },
    }
    if count > 1:
        # The chief ends after the last save: a worker that is lost then, before
        # it has ended, would be replaced and find nobody to train with.
        spec["successPolicy"] = {"rules": [{"succeededIndexes": "0"}]}
    spec["template"] = {
        "metadata": {"labels": _labels(job), **_annotations(job)},
        "spec": _pod(job),
    }
    return spec


def _on_exit(action: str, code: int) -> dict[str, Any]:
    return {
        "action": action,
        "onExitCodes": {
            "containerName": _WORKER,
            "operator": "In",
            "values": [code],
        },
    }


def _pod(job: Job) -> dict[str, Any]:
    options = job.options
    volumes, mounts = _volumes(job)
    optional = {
        "serviceAccountName": options.service_account,
        "subdomain": (
            object_name(job)
            if options.num_nodes > 1 and options.gang == "job"
            else ""
        ),
        "nodeSelector": _node_selector(job),
        "tolerations": _tolerations(job),
        "imagePullSecrets": [{"name": n} for n in options.image_pull_secret],
        "priorityClassName": options.priority_class,
        "hostNetwork": options.host_network,
        # Or the pods would not find each other by the names of the cluster.
        "dnsPolicy": (
            "ClusterFirstWithHostNet" if options.host_network else ""
        ),
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": (
            math.ceil(grace_secs(job)) + _MARGIN_SECS
        ),
        # Or a Service called dtrain in the namespace would set DTRAIN_PORT.
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            # Or each start changes the group of all files of a claim.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **{name: value for name, value in optional.items() if value},
        "containers": [{**_container(job), "volumeMounts": mounts}],
        "volumes": volumes,
    }


def _volumes(job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns what a pod may write to, and where it is mounted."""
    volumes: list[tuple[str, str, dict[str, Any]]] = [
        ("tmp", "/tmp", {"emptyDir": {}}),
        # The 64 MiB that a container has are too little for NCCL.
        ("shm", "/dev/shm", {"emptyDir": {"medium": "Memory"}}),
    ]
    read_only = set()
    for index, claim in enumerate(claims(job)):
        name = f"claim-{index}"
        source: dict[str, Any] = {"claimName": claim.name}
        if claim.is_read_only:
            source["readOnly"] = True
            read_only.add(name)
        volume = {"persistentVolumeClaim": source}
        volumes.append((name, claim.path, volume))
    return (
        [{"name": name, **volume} for name, _, volume in volumes],
        [
            {"name": name, "mountPath": path}
            | ({"readOnly": True} if name in read_only else {})
            for name, path, _ in volumes
        ],
    )


def _container(job: Job) -> dict[str, Any]:
    secs = grace_secs(job)
    options = dataclasses.replace(job.options, grace_secs=secs)
    supervisor = dataclasses.replace(job, options=options).supervisor_arguments
    arguments = [*supervisor, "--", *job.worker_arguments]
    if not job.parsed.grace_secs:
        arguments.append(f"--grace_secs={secs:g}")
    if job.options.max_hours:
        # A deadline of Kubernetes would fail the job.
        limit_secs = max(1, round(3600 * job.options.max_hours))
        arguments.append(f"--stop_after_secs={limit_secs}")
    secrets = [{"secretRef": {"name": n}} for n in job.options.env_secret]
    optional = {
        "envFrom": secrets,
        # The scheduler puts no two that want it on one node.
        "ports": (
            [{"containerPort": _PORT}] if job.options.host_network else []
        ),
    }
    return {
        "name": _WORKER,
        "image": job.options.image,
        "command": ["python", "-m", "launch.node"],
        # Kubernetes takes $(NAME) for a variable, and $$ for a dollar, here and
        # in the environment.
        "args": [argument.replace("$", "$$") for argument in arguments],
        "env": [
            {"name": name, "value": value.replace("$", "$$")}
            for name, value in _environment(job).items()
        ],
        **{name: value for name, value in optional.items() if value},
        "resources": _resources(job),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }


def _environment(job: Job) -> dict[str, str]:
    environment = {
        "DTRAIN_SUBMITTED_SECS": str(job.submitted_secs),
        # The user's home, if there is one, is on the read-only file system.
        "HOME": "/tmp",
        **variables(job.options),
    }
    if job.options.num_nodes > 1:
        name = host = object_name(job)
        if job.options.gang == "jobset":
            host = f"{name}-{_WORKER}-0"
        environment["DTRAIN_WORKERS"] = ",".join(
            f"{host}-{index}.{name}:{_PORT}"
            for index in range(job.options.num_nodes)
        )
    return environment


def _resources(job: Job) -> dict[str, Any]:
    options = job.options
    limits: dict[str, Any] = {}
    requests: dict[str, Any] = {}
    if options.gpus_per_node:
        limits[_GPU] = options.gpus_per_node
    for name, count in _pairs("extra_resource", options.extra_resource).items():
        if "/" not in name or name == _GPU or not count.isdecimal():
            raise UserError(
                f"extra_resource ({name}={count}) must be of the form "
                "domain/name=count, as rdma/hca=1; --gpus_per_node, "
                "--cpus_per_node and --memory_gib are flags of their own"
            )
        limits[name] = int(count)
    if options.memory_gib:
        limits["memory"] = f"{options.memory_gib}Gi"
    if job.memory_gib:
        # A default is no limit, at which a pod would be killed.
        requests["memory"] = f"{job.memory_gib}Gi"
    if job.cpus_per_node:
        requests["cpu"] = job.cpus_per_node
    both = {"requests": requests, "limits": limits}
    return {name: value for name, value in both.items() if value}


def _node_selector(job: Job) -> dict[str, str]:
    labels = {}
    if job.options.gpu_type:
        labels["cloud.google.com/gke-accelerator"] = job.options.gpu_type
    return {**labels, **_pairs("node_selector", job.options.node_selector)}


def _tolerations(job: Job) -> list[dict[str, str]]:
    taints = []
    if job.options.gpus_per_node:
        taints.append({"key": _GPU, "operator": "Exists"})
    if job.options.spot:
        taints += [
            {"key": key, "operator": "Equal", "value": value}
            for key, value in _SPOT_TAINTS
        ]
    return [
        *({**taint, "effect": "NoSchedule"} for taint in taints),
        *map(_toleration, job.options.toleration),
    ]


def _toleration(text: str) -> dict[str, str]:
    """Reads key, key=value, key:effect or key=value:effect.

    Raises:
        UserError: it is malformed.
    """
    taint, colon, effect = text.partition(":")
    key, equals, value = taint.partition("=")
    if not key or (colon and effect not in _EFFECTS):
        raise UserError(
            f"toleration ({text}) must be of the form key=value:effect, with "
            f"an effect of {', '.join(_EFFECTS)}"
        )
    found = {"key": key, "operator": "Equal" if equals else "Exists"}
    optional = {"value": value, "effect": effect}
    return {**found, **{name: text for name, text in optional.items() if text}}


class Claim(NamedTuple):
    """A volume claim that is mounted.

    Attributes:
        name: of the PersistentVolumeClaim.
        path: where the pods see it.
        is_read_only: whether it holds data that is only read.
    """

    name: str
    path: str
    is_read_only: bool


def claims(job: Job) -> list[Claim]:
    """Returns each volume claim and where it is mounted.

    Args:
        job: the job.

    Raises:
        UserError: one is malformed.
    """
    mounts = []
    for text in job.options.volume_claim:
        claim, colon, path = text.partition(":")
        is_read_only = path.endswith(":ro")
        path = path.removesuffix(":ro")
        if not claim or not colon or not path.startswith("/"):
            raise UserError(
                f"volume_claim ({text}) must be of the form CLAIM:/PATH, or "
                "CLAIM:/PATH:ro"
            )
        mounts.append(Claim(claim, posixpath.normpath(path), is_read_only))
    return mounts


def grace_secs(job: Job) -> float:
    """Returns how long the workers may take to save."""
    return job.options.grace_secs or job.parsed.grace_secs or GRACE_SECS
