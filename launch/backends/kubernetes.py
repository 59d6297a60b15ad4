"""Jobs of a Kubernetes cluster: an Indexed Job, or a JobSet.

A pod that is lost is replaced under the same name; why the manifest is as it
is, is in docs/kubernetes.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import posixpath
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dtrain import errors
from dtrain.errors import UserError
from dtrain.storage import files
from launch.backends import yaml_text
from launch.job import (
    FAILED,
    FINISHED,
    QUEUED,
    RUNNING,
    UNKNOWN,
    Job,
    Plan,
    State,
)
from launch.submission import Submission, ask

# By the value of `--gang`, with their groups: other operators have jobs, too.
_RESOURCES = {"job": "jobs.batch", "jobset": "jobsets.jobset.x-k8s.io"}
_FILE = "job.yaml"
_HEADER = (
    "# Written by `python -m launch.main`; docs/kubernetes.md explains it.\n"
)

# Name of the container, and of the one Job of a JobSet.
_WORKER = "worker"
_PORT = 2222
_INSTANCE = "app.kubernetes.io/instance"

# A label of DNS has 63 characters. The name of a pod of a JobSet needs 20 of
# them for -worker-0-9999-abcde, and the time of the submission 11.
_MAX_NAME = 32
_MAX_INT = (1 << 31) - 1

_GRACE_SECS = 60.0
# For the supervisor, between the end of its worker and its own.
_MARGIN_SECS = 10
# How long one can look at what is over.
_KEPT_SECS = 7 * 24 * 3600

# As in the Dockerfile.
_USER = 1000

_SPOT_TAINTS = (
    ("cloud.google.com/gke-spot", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)

_POLL_SECS = 2.0
# For the last lines of a pod.
_LAST_SECS = 10.0


def plan(job: Job) -> Plan:
    """Makes the manifest of a job, and the commands that create it.

    Args:
        job: the job.

    Returns:
        The plan; both of its commands read the manifest.

    Raises:
        UserError: a flag is missing or malformed, or contradicts another.
    """
    _check_flags(job)
    documents = _documents(job)
    yaml_text.check(documents)
    # Not `apply`, which would change a job that has this name already.
    create = ("kubectl", "create", *_namespace(job), "--filename=-")
    return Plan(
        files={_FILE: _HEADER + yaml_text.dump(documents)},
        run_dirs=(job.parsed.run_dir,),
        submit=create,
        check=(*create, "--dry-run=server"),
        stdin=_FILE,
    )


def _check_flags(job: Job) -> None:
    """Checks what the flags say of each other.

    Raises:
        UserError: one is missing, or contradicts another.
    """
    options, parsed = job.options, job.parsed
    job.require_image()
    for name in ("run_dir", "checkpoint_dir"):
        path = getattr(parsed, name)
        if path and not _is_kept(path, [each[1] for each in _claims(job)]):
            raise UserError(
                f"{name} ({path}) would be lost with its pod; use gs://BUCKET/"
                "DIR, or --volume_claim=CLAIM:/PATH and a directory below /PATH"
            )
    if not files.is_remote(parsed.run_dir) and not options.record_dir:
        raise UserError(
            f"run_dir ({parsed.run_dir}) is on a volume claim, which only the "
            "pods see; add --record_dir=DIR, where this machine writes the job "
            "down"
        )
    if options.max_hours and parsed.stop_after_secs:
        raise UserError(
            f"max_hours ({options.max_hours:g}) sets stop_after_secs "
            f"({parsed.stop_after_secs:g}); leave one of them out"
        )
    if parsed.grace_secs > _grace_secs(job):
        raise UserError(
            f"grace_secs ({parsed.grace_secs:g}) of dtrain.main must not be "
            f"more than that of the job ({options.grace_secs:g}), after which "
            "its pods are killed"
        )


def _is_kept(path: str, mounts: Sequence[str]) -> bool:
    """Tells whether a directory is there after its pod is gone."""
    if files.is_remote(path):
        return True
    parts = posixpath.normpath(path).split("/")
    return any(
        parts[: len(mount)] == mount
        for mount in (posixpath.normpath(each).split("/") for each in mounts)
    )


def _claims(job: Job) -> list[tuple[str, str]]:
    """Returns each volume claim and where it is mounted.

    Raises:
        UserError: one is malformed.
    """
    found = []
    for text in job.options.volume_claim:
        claim, colon, path = text.partition(":")
        if not claim or not colon or not path.startswith("/"):
            raise UserError(
                f"volume_claim ({text}) must be of the form CLAIM:/PATH"
            )
        found.append((claim, posixpath.normpath(path)))
    return found


def _grace_secs(job: Job) -> float:
    """Returns how long the workers may take to save."""
    return job.options.grace_secs or job.parsed.grace_secs or _GRACE_SECS


def _namespace(job: Job) -> tuple[str, ...]:
    """Returns the flag of kubectl; empty for the namespace of its context."""
    name = job.options.namespace
    return (f"--namespace={name}",) if name else ()


def _object_name(job: Job) -> str:
    """Returns a name that no other submission of this or another run has."""
    return f"{job.name[:_MAX_NAME].rstrip('-')}-{job.submitted_secs}"


def _documents(job: Job) -> list[dict[str, Any]]:
    options = job.options
    metadata: dict[str, Any] = {"name": _object_name(job)}
    if options.namespace:
        metadata["namespace"] = options.namespace
    metadata["labels"] = _labels(job)
    if options.gang == "jobset":
        return [_job_set(job, metadata)]
    spec = {
        "ttlSecondsAfterFinished": _KEPT_SECS,
        # Each of the other pods fails, too, when one does.
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
    return {"app.kubernetes.io/name": "dtrain", _INSTANCE: _object_name(job)}


def _service(job: Job, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the pods their names."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {_INSTANCE: _object_name(job)},
            "ports": [{"name": "tensorflow", "port": _PORT}],
        },
    }


def _job_set(job: Job, metadata: Mapping[str, Any]) -> dict[str, Any]:
    # One failure that counts fails the Job, at which all pods start again.
    inner = {"backoffLimit": 0, **_job_spec(job)}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "ttlSecondsAfterFinished": _KEPT_SECS,
            "network": {
                "enableDNSHostnames": True,
                "subdomain": _object_name(job),
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
        # Two pods of one index would be two workers of one name.
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
        # The chief ends after the last save: one that is lost after that, and
        # before its own end, has nobody to train with.
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
            _object_name(job)
            if options.num_nodes > 1 and options.gang == "job"
            else ""
        ),
        "nodeSelector": _node_selector(job),
        "tolerations": _tolerations(job),
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": (
            math.ceil(_grace_secs(job)) + _MARGIN_SECS
        ),
        # A Service of the namespace that is called dtrain sets DTRAIN_PORT.
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            # Not all files of a large claim at each start.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **{name: what for name, what in optional.items() if what},
        "containers": [{**_container(job), "volumeMounts": mounts}],
        "volumes": volumes,
    }


def _volumes(job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns what a pod may write to, and where it is mounted."""
    found: list[tuple[str, str, dict[str, Any]]] = [
        ("tmp", "/tmp", {"emptyDir": {}}),
        # The 64 MiB that a container has are too few for NCCL.
        ("shm", "/dev/shm", {"emptyDir": {"medium": "Memory"}}),
    ]
    for index, (claim, path) in enumerate(_claims(job)):
        volume = {"persistentVolumeClaim": {"claimName": claim}}
        found.append((f"claim-{index}", path, volume))
    return (
        [{"name": name, **volume} for name, _, volume in found],
        [{"name": name, "mountPath": path} for name, path, _ in found],
    )


def _container(job: Job) -> dict[str, Any]:
    grace_secs = _grace_secs(job)
    options = dataclasses.replace(job.options, grace_secs=grace_secs)
    supervisor = dataclasses.replace(job, options=options).supervisor_arguments
    arguments = [*supervisor, "--", *job.worker_arguments]
    if not job.parsed.grace_secs:
        arguments.append(f"--grace_secs={grace_secs:g}")
    if job.options.max_hours:
        # A deadline of Kubernetes' own would fail the job.
        secs = max(1, round(3600 * job.options.max_hours))
        arguments.append(f"--stop_after_secs={secs}")
    return {
        "name": _WORKER,
        "image": job.options.image,
        "command": ["python", "-m", "launch.node"],
        # Kubernetes takes $(NAME) for a variable, and $$ for a dollar.
        "args": [each.replace("$", "$$") for each in arguments],
        "env": [
            {"name": name, "value": value}
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
    variables = {
        "DTRAIN_SUBMITTED_SECS": str(job.submitted_secs),
        # The user's own is on the read-only file system, if there is one.
        "HOME": "/tmp",
    }
    if job.options.num_nodes > 1:
        name = host = _object_name(job)
        if job.options.gang == "jobset":
            host = f"{name}-{_WORKER}-0"
        variables["DTRAIN_WORKERS"] = ",".join(
            f"{host}-{index}.{name}:{_PORT}"
            for index in range(job.options.num_nodes)
        )
    return variables


def _resources(job: Job) -> dict[str, Any]:
    options = job.options
    limits: dict[str, Any] = {}
    requests: dict[str, Any] = {}
    if options.gpus_per_node:
        limits["nvidia.com/gpu"] = options.gpus_per_node
    if options.memory_gib:
        limits["memory"] = requests["memory"] = f"{options.memory_gib}Gi"
    if options.cpus_per_node:
        requests["cpu"] = options.cpus_per_node
    both = {"requests": requests, "limits": limits}
    return {name: what for name, what in both.items() if what}


def _node_selector(job: Job) -> dict[str, str]:
    """Returns the labels that a node must have.

    Raises:
        UserError: one is malformed.
    """
    found = {}
    if job.options.gpu_type:
        found["cloud.google.com/gke-accelerator"] = job.options.gpu_type
    for text in job.options.node_selector:
        label, equals, value = text.partition("=")
        if not label or not equals:
            raise UserError(
                f"node_selector ({text}) must be of the form label=value"
            )
        found[label] = value
    return found


def _tolerations(job: Job) -> list[dict[str, str]]:
    taints = []
    if job.options.gpus_per_node:
        taints.append({"key": "nvidia.com/gpu", "operator": "Exists"})
    if job.options.spot:
        taints += [
            {"key": key, "operator": "Equal", "value": value}
            for key, value in _SPOT_TAINTS
        ]
    return [{**each, "effect": "NoSchedule"} for each in taints]


def submit(job: Job, plan: Plan) -> str:
    """Creates a job, if the cluster would take it.

    Args:
        job: the job.
        plan: its plan.

    Returns:
        Its namespace and name, with a slash between them.

    Raises:
        UserError: the cluster does not take it, and has nothing of it.
    """
    text = plan.files[plan.stdin]
    ask(plan.check, text)
    try:
        ask(plan.submit, text)
        return _adopt(job)
    except BaseException:
        delete = ("kubectl", "delete", *_namespace(job), "--ignore-not-found")
        ask((*delete, "--wait=false", "--filename=-"), text)
        raise


def _adopt(job: Job) -> str:
    """Lets the Service go with its Job; returns the job's id."""
    name = _object_name(job)
    which = f"{_RESOURCES[job.options.gang]}/{name}"
    get = ("kubectl", "get", which, *_namespace(job), "--output=json")
    made = json.loads(ask(get))
    metadata = made["metadata"]
    if made["kind"] == "Job" and job.options.num_nodes > 1:
        owner = {
            "apiVersion": made["apiVersion"],
            "kind": made["kind"],
            "name": name,
            "uid": metadata["uid"],
        }
        patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
        ask(
            (
                *("kubectl", "patch", f"services/{name}", *_namespace(job)),
                *("--type=merge", f"--patch={patch}"),
            )
        )
    return f"{metadata['namespace']}/{name}"


def states(submission: Submission) -> list[State]:
    """Asks the cluster how a job is.

    Raises:
        UserError: it cannot be asked.
    """
    items = _get(submission, f"{_resource(submission)},pods")
    jobs = [each for each in items if each["kind"] != "Pod"]
    pods = [each for each in items if each["kind"] == "Pod"]
    if not jobs:
        return [
            State(
                UNKNOWN,
                f"job {submission.job_id} is not in the cluster of kubectl's "
                "context, or not any more",
            )
        ]
    return [_read_state(submission, jobs[0], pods)]


def cancel(submission: Submission) -> None:
    """Deletes a job; its pods are told to save and end.

    Raises:
        UserError: the cluster cannot be asked.
    """
    namespace, _, name = submission.job_id.partition("/")
    which = f"{_resource(submission)}/{name}"
    delete = ("kubectl", "delete", which, f"--namespace={namespace}")
    ask((*delete, "--ignore-not-found", "--cascade=foreground"))


def show_logs(
    submission: Submission, follow: bool, is_over: Callable[[], bool]
) -> None:
    """Prints what the pods say that the cluster still has.

    Args:
        submission: the job.
        follow: whether to go on until the job is over, with the pods that take
            the place of others.
        is_over: tells whether it is.

    Raises:
        UserError: the cluster cannot be asked.
    """
    readers: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while True:
            # Before the last look: a pod that has started by then is seen.
            ends = not follow or is_over()
            for pod in _get(submission, "pods"):
                name = pod["metadata"]["name"]
                has_started = pod["status"]["phase"] != "Pending"
                if has_started and name not in readers:
                    readers[name] = _read_logs(submission, name, follow)
            if ends:
                break
            time.sleep(_POLL_SECS)
        for reader in readers.values():
            # Of a node that is gone, no end is ever told.
            with contextlib.suppress(subprocess.TimeoutExpired):
                reader.wait(_LAST_SECS)
    finally:
        for reader in readers.values():
            reader.terminate()


def _read_logs(
    submission: Submission, pod: str, follow: bool
) -> subprocess.Popen[bytes]:
    namespace = submission.job_id.partition("/")[0]
    command = ["kubectl", "logs", pod, f"--namespace={namespace}", "--prefix"]
    if follow:
        return subprocess.Popen([*command, "--follow"])
    reader = subprocess.Popen(command)
    # One after the other.
    reader.wait()
    return reader


def _resource(submission: Submission) -> str:
    return _RESOURCES[submission.options.get("gang", "job")]


def _get(submission: Submission, resources: str) -> list[dict[str, Any]]:
    namespace, _, name = submission.job_id.partition("/")
    text = ask(
        (
            *("kubectl", "get", resources, f"--namespace={namespace}"),
            *(f"--selector={_INSTANCE}={name}", "--output=json"),
        )
    )
    return json.loads(text)["items"]


_ENDS = {"Complete": FINISHED, "Completed": FINISHED, "Failed": FAILED}


def _read_state(
    submission: Submission,
    job: Mapping[str, Any],
    pods: Sequence[Mapping[str, Any]],
) -> State:
    details = [f"job {submission.job_id}"]
    for each in job.get("status", {}).get("conditions", ()):
        if each["type"] in _ENDS and each["status"] == "True":
            why = [each.get("reason", ""), each.get("message", "")]
            return State(
                _ENDS[each["type"]], ", ".join([*details, *filter(None, why)])
            )
    by_phase: dict[str, list[Mapping[str, Any]]] = {}
    for pod in pods:
        by_phase.setdefault(pod["status"]["phase"], []).append(pod)
    running = by_phase.get("Running", [])
    count = submission.options.get("num_nodes", 1)
    details.append(f"{len(running)} of {count} pods run")
    details += [
        f"{pod['metadata']['name']} waits: {_waits_for(pod)}"
        for pod in by_phase.get("Pending", ())
    ]
    if job["spec"].get("suspend"):
        details.append("suspended")
    if by_phase.get("Failed"):
        details.append(f"{len(by_phase['Failed'])} ended before")
    return State(RUNNING if running else QUEUED, ", ".join(details))


def _waits_for(pod: Mapping[str, Any]) -> str:
    """Says what a pod that does not run yet is in need of."""
    status = pod["status"]
    waiting = [
        each["state"]["waiting"]
        for each in status.get("containerStatuses", ())
        if "waiting" in each["state"]
    ]
    unmet = [
        each
        for each in status.get("conditions", ())
        if each["status"] == "False"
    ]
    for each in (*waiting, *unmet):
        words = [each.get("reason", ""), each.get("message", "")]
        if words[0]:
            return " ".join(filter(None, words))
    return "to be scheduled"
