"""Jobs of a Kubernetes cluster: an Indexed Job, or a JobSet.

A pod that is lost is replaced by another of the same name. What is created is
in `workload`.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dtrain.errors import UserError
from dtrain.storage import files
from launch.backends import manifest_patch, workload, yaml_text
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
from launch.submission import LOG_SECS, Submission, ask

# By the value of `--gang`; with their groups, for others have jobs, too.
_RESOURCES = {"job": "jobs.batch", "jobset": "jobsets.jobset.x-k8s.io"}
_FILE = "job.yaml"
_HEADER = (
    "# Written by `python -m launch.main`; docs/kubernetes.md explains it.\n"
)

_POLL_SECS = 2.0
# For the last lines of a pod.
_LAST_SECS = 10.0
# For the end of pods, beside what they may take to save.
_DELETE_SECS = 120.0


def plan(job: Job) -> Plan:
    """Makes the manifest of a job, and two commands that read it; see `job`."""
    _check_flags(job)
    documents = workload.documents(job)
    yaml_text.check(documents)
    if job.options.manifest_patch:
        documents = manifest_patch.apply(job.options.manifest_patch, documents)
        yaml_text.check_texts(documents)
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
    options, parsed = job.options, job.parsed
    job.require_image()
    mounts = [
        claim.path for claim in workload.claims(job) if not claim.is_read_only
    ]
    for name in ("run_dir", "checkpoint_dir"):
        path = getattr(parsed, name)
        if path and not _is_kept(path, mounts):
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
    if parsed.grace_secs > workload.grace_secs(job):
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
    roots = [posixpath.normpath(mount).split("/") for mount in mounts]
    return any(parts[: len(root)] == root for root in roots)


def _namespace(job: Job) -> tuple[str, ...]:
    """Returns the flag of kubectl; empty for the namespace of its context."""
    name = job.options.namespace
    return (f"--namespace={name}",) if name else ()


def check(plan: Plan) -> None:
    """Asks the API server whether it would take all of a job; see `job`."""
    ask(plan.check, plan.files[plan.stdin])


def submit(job: Job, plan: Plan) -> str:
    """Creates a job; returns NAMESPACE/NAME.

    If the cluster does not take it, nothing of it is left there. See `job`.
    """
    text = plan.files[plan.stdin]
    try:
        ask(plan.submit, text)
        return _adopt(job)
    except BaseException:
        delete = ("kubectl", "delete", *_namespace(job), "--ignore-not-found")
        ask((*delete, "--wait=false", "--filename=-"), text)
        raise


def _adopt(job: Job) -> str:
    """Has the Service deleted with its Job; returns the job's id."""
    name = workload.object_name(job)
    resource = f"{_RESOURCES[job.options.gang]}/{name}"
    get = ("kubectl", "get", resource, *_namespace(job), "--output=json")
    created = _parse(ask(get))
    metadata = created["metadata"]
    if created["kind"] == "Job" and job.options.num_nodes > 1:
        owner = {
            "apiVersion": created["apiVersion"],
            "kind": created["kind"],
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
    """Asks the cluster how a job is; see `job`."""
    items = _get(submission, f"{_resource(submission)},pods")
    jobs = [item for item in items if item["kind"] != "Pod"]
    pods = [item for item in items if item["kind"] == "Pod"]
    if not jobs:
        details = (
            f"job {submission.job_id} is not in the cluster of kubectl's "
            "context, or not any more"
        )
        return [State(UNKNOWN, details)]
    return [_read_state(submission, jobs[0], pods)]


def cancel(submission: Submission) -> None:
    """Deletes a job, whose pods are told to save and end; see `job`."""
    namespace, _, name = submission.job_id.partition("/")
    resource = f"{_resource(submission)}/{name}"
    delete = ("kubectl", "delete", resource, f"--namespace={namespace}")
    # It waits for the pods, which may take their time to save.
    grace_secs = submission.options.get("grace_secs", workload.GRACE_SECS)
    ask(
        (*delete, "--ignore-not-found", "--cascade=foreground"),
        timeout_secs=_DELETE_SECS + grace_secs,
    )


def show_logs(
    submission: Submission, follow: bool, is_over: Callable[[], bool]
) -> None:
    """Prints what the pods say that the cluster still has; see `job`.

    Those that take the place of others are followed, too.
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
            # That of a node that is gone never ends.
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
    # The pods speak one after the other. The reader is ended with the others.
    with contextlib.suppress(subprocess.TimeoutExpired):
        reader.wait(LOG_SECS)
    return reader


def _resource(submission: Submission) -> str:
    return _RESOURCES[submission.options.get("gang", "job")]


def _get(submission: Submission, resources: str) -> list[dict[str, Any]]:
    namespace, _, name = submission.job_id.partition("/")
    text = ask(
        (
            *("kubectl", "get", resources, f"--namespace={namespace}"),
            *(f"--selector={workload.INSTANCE}={name}", "--output=json"),
        )
    )
    return _parse(text)["items"]


def _parse(text: str) -> dict[str, Any]:
    """Reads what kubectl says in JSON.

    Raises:
        UserError: it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        words = " ".join(text.split())[:200]
        raise UserError(
            f"kubectl is not understood, it says no JSON ({words!r}); is it a "
            "wrapper that says more?"
        )
    return found


_ENDS = {"Complete": FINISHED, "Completed": FINISHED, "Failed": FAILED}


def _read_state(
    submission: Submission,
    job: Mapping[str, Any],
    pods: Sequence[Mapping[str, Any]],
) -> State:
    details = [f"job {submission.job_id}"]
    for condition in job.get("status", {}).get("conditions", ()):
        phase = _ENDS.get(condition["type"])
        if phase and condition["status"] == "True":
            return State(phase, ", ".join([*details, *_words(condition)]))
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
    """Says what a pod waits for that does not run yet."""
    status = pod["status"]
    waiting = [
        container["state"]["waiting"]
        for container in status.get("containerStatuses", ())
        if "waiting" in container["state"]
    ]
    unmet = [
        condition
        for condition in status.get("conditions", ())
        if condition["status"] == "False"
    ]
    for obstacle in (*waiting, *unmet):
        if obstacle.get("reason"):
            return " ".join(_words(obstacle))
    return "to be scheduled"


def _words(condition: Mapping[str, Any]) -> list[str]:
    """Returns the reason and the message of a condition that has them."""
    words = (condition.get("reason", ""), condition.get("message", ""))
    return [text for text in words if text]
