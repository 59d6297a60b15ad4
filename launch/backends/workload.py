"""The documents of a Kubernetes job: a Job or a JobSet, a Service, the pods.

Why they are as they are is in docs/kubernetes.md.
"""

from __future__ import annotations

import dataclasses
import math
import posixpath
from collections.abc import Mapping
from typing import Any

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
    return {"app.kubernetes.io/name": "dtrain", INSTANCE: object_name(job)}


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
        "metadata": {"labels": _labels(job)},
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
    for index, (claim, path) in enumerate(claims(job)):
        volume = {"persistentVolumeClaim": {"claimName": claim}}
        volumes.append((f"claim-{index}", path, volume))
    return (
        [{"name": name, **volume} for name, _, volume in volumes],
        [{"name": name, "mountPath": path} for name, path, _ in volumes],
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
        limits["nvidia.com/gpu"] = options.gpus_per_node
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
    for text in job.options.node_selector:
        label, equals, value = text.partition("=")
        if not label or not equals:
            raise UserError(
                f"node_selector ({text}) must be of the form label=value"
            )
        labels[label] = value
    return labels


def _tolerations(job: Job) -> list[dict[str, str]]:
    taints = []
    if job.options.gpus_per_node:
        taints.append({"key": "nvidia.com/gpu", "operator": "Exists"})
    if job.options.spot:
        taints += [
            {"key": key, "operator": "Equal", "value": value}
            for key, value in _SPOT_TAINTS
        ]
    return [{**taint, "effect": "NoSchedule"} for taint in taints]


def claims(job: Job) -> list[tuple[str, str]]:
    """Returns each volume claim and where it is mounted.

    Args:
        job: the job.

    Raises:
        UserError: one is malformed.
    """
    mounts = []
    for text in job.options.volume_claim:
        claim, colon, path = text.partition(":")
        if not claim or not colon or not path.startswith("/"):
            raise UserError(
                f"volume_claim ({text}) must be of the form CLAIM:/PATH"
            )
        mounts.append((claim, posixpath.normpath(path)))
    return mounts


def grace_secs(job: Job) -> float:
    """Returns how long the workers may take to save."""
    return job.options.grace_secs or job.parsed.grace_secs or GRACE_SECS
