"""Jobs of Vertex AI: a CustomJob, by way of its client library.

When the service starts a job again, and when it does not, is in docs/vertex.md.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from dtrain.errors import UserError
from launch import job as job_lib
from launch.job import (
    CANCELLED,
    FINISHED,
    QUEUED,
    RUNNING,
    UNKNOWN,
    Job,
    Plan,
    State,
)
from launch.options import variables
from launch.submission import Submission, show

# Behind JOB_STATE_.
_PHASES = {
    QUEUED: ("QUEUED", "PENDING", "PAUSED"),
    RUNNING: ("RUNNING", "UPDATING", "CANCELLING"),
    FINISHED: ("SUCCEEDED", "PARTIALLY_SUCCEEDED"),
    CANCELLED: ("CANCELLED",),
    UNKNOWN: ("UNSPECIFIED",),
}

# The code of SIGABRT: one of two that the service's page on errors calls
# transient, after which it starts the job again, up to three times. Another
# part of that page has it do so after 75, too; this one does not.
_AGAIN = 134

# Printable ASCII but $ and %, so that most flags are left as they were typed.
_PLAIN = "".join(chr(code) for code in range(32, 127) if chr(code) not in "$%")

_TIMEOUT_SECS = 60.0
_MAX_WORDS = 500


def plan(job: Job) -> Plan:
    """Makes the description of a job; see `job`.

    The command of the plan stands for a call of the client library.

    Raises:
        UserError: a flag is missing or malformed, or the run is on a disk.
    """
    job.require("project", "region", "machine_type")
    job.require_image()
    job.require_store()
    job.require_gpu_type()
    region, gpu_type = job.options.region, job.options.gpu_type
    # It becomes part of the host name that the credentials are sent to.
    if not re.fullmatch(r"[a-z0-9-]+", region):
        raise UserError(f"region ({region!r}) must be as in europe-west4")
    # Of another name the library would not say which flag it is from.
    if not re.fullmatch(r"[A-Z0-9_]*", gpu_type):
        raise UserError(
            f"gpu_type ({gpu_type}) must be as in NVIDIA_TESLA_A100"
        )
    return Plan(
        files={"job.json": json.dumps(_custom_job(job), indent=2) + "\n"},
        run_dirs=(job.parsed.run_dir,),
        submit=(
            "aiplatform_v1.JobServiceClient.create_custom_job",
            f"parent={_parent(job)}",
            f"custom_job={os.path.join(job.directory, 'job.json')}",
        ),
    )


def _custom_job(job: Job) -> dict[str, Any]:
    options = job.options
    scheduling: dict[str, Any] = {
        "strategy": "SPOT" if options.spot else "STANDARD",
        # After internal errors of the service.
        "disableRetries": False,
        # A worker that is replaced finds the others waiting for it.
        "restartJobOnWorkerRestart": False,
    }
    if options.max_hours:
        # Of 0 it would make a week.
        secs = max(1, round(3600 * options.max_hours))
        scheduling["timeout"] = f"{secs}s"
    others = options.num_nodes - 1
    spec = {
        # The first pool is the chief, with which the job ends.
        "workerPoolSpecs": [_pool(job, size) for size in (1, others) if size],
        "scheduling": scheduling,
    }
    if options.service_account:
        spec["serviceAccount"] = options.service_account
    return {"displayName": job.name, "jobSpec": spec}


def _pool(job: Job, size: int) -> dict[str, Any]:
    options = job.options
    machine: dict[str, Any] = {"machineType": options.machine_type}
    if options.gpus_per_node:
        machine["acceleratorType"] = options.gpu_type
        machine["acceleratorCount"] = options.gpus_per_node
    # The service does not tell whether it replaces $(VARIABLE) here, as it does
    # in the environment and as Kubernetes does.
    arguments = [
        urllib.parse.quote(argument, safe=_PLAIN, errors="surrogateescape")
        for argument in job.worker_arguments
    ]
    return {
        "machineSpec": machine,
        "replicaCount": size,
        "containerSpec": {
            "imageUri": options.image,
            "command": ["python", "-m", "launch.node"],
            "args": [
                *job.supervisor_arguments,
                f"--again_code={_AGAIN}",
                "--is_encoded",
                "--",
                *arguments,
            ],
            "env": [
                {"name": name, "value": value}
                for name, value in _environment(job).items()
            ],
        },
    }


def _environment(job: Job) -> dict[str, str]:
    added = variables(job.options)
    for name, value in added.items():
        if "$" in value:
            raise UserError(
                f"env ({name}={value}) must have no $ on Vertex AI, which "
                "replaces $(VARIABLE) there"
            )
    return {"DTRAIN_SUBMITTED_SECS": str(job.submitted_secs), **added}


def _parent(job: Job) -> str:
    return f"projects/{job.options.project}/locations/{job.options.region}"


def check(plan: Plan) -> None:
    """Reads the job as the client library does; see `job`."""
    parse(plan.files["job.json"])


def submit(job: Job, plan: Plan) -> str:
    """Creates a job; returns its name, which has project and region in it."""
    custom_job = parse(plan.files["job.json"])
    return _call(
        job.options.region,
        lambda client: client.create_custom_job(
            parent=_parent(job), custom_job=custom_job, timeout=_TIMEOUT_SECS
        ),
    ).name


def parse(text: str) -> Any:
    """Returns the CustomJob of a `job.json`.

    Args:
        text: its content.

    Raises:
        UserError: it is none, or the library is missing.
    """
    aiplatform = _library("google.cloud.aiplatform_v1")
    json_format = _library("google.protobuf.json_format")
    try:
        return aiplatform.CustomJob.from_json(text)
    except json_format.ParseError as error:
        # It names the path to the field last, and once for each on the way.
        raise UserError(f"Vertex AI knows no such job: {error}") from error


def states(submission: Submission) -> list[State]:
    """Asks Vertex AI how a job is; see `job`."""
    name = submission.job_id
    resource = _call(
        _parts(name)["locations"],
        lambda client: client.get_custom_job(name=name, timeout=_TIMEOUT_SECS),
        allow_missing=True,
    )
    if resource is None:
        return job_lib.forgotten("Vertex AI", name)
    state = resource.state.name
    details = [f"job {_parts(name)['customJobs']}", state]
    if resource.error.message:
        details.append(" ".join(resource.error.message.split())[:_MAX_WORDS])
    word = state.removeprefix("JOB_STATE_")
    return [job_lib.read_state(word, _PHASES, details)]


def cancel(submission: Submission) -> None:
    """Ends a job; see `job`."""
    name = submission.job_id
    _call(
        _parts(name)["locations"],
        lambda client: client.cancel_custom_job(
            name=name, timeout=_TIMEOUT_SECS
        ),
    )


def show_logs(
    submission: Submission, follow: bool, is_over: Callable[[], bool]
) -> None:
    """Prints the logs of all workers; see `job`.

    They are in Cloud Logging; gcloud reads them, and sees the end itself.
    """
    del is_over
    parts = _parts(submission.job_id)
    job = parts["customJobs"]
    # The name has the project's number, which gcloud does not take.
    project = f"--project={submission.options['project']}"
    if follow:
        region = f"--region={parts['locations']}"
        command = ("ai", "custom-jobs", "stream-logs", job, project, region)
    else:
        command = (
            *("logging", "read", project, "--order=asc", "--freshness=30d"),
            "--format=value(resource.labels.task_name, jsonPayload.message, "
            "textPayload)",
            f'resource.type="ml_job" AND resource.labels.job_id="{job}"',
        )
    remedy = "it comes with the Google Cloud CLI"
    show(("gcloud", *command), remedy, is_endless=follow)


def _parts(name: str) -> Mapping[str, str]:
    """Reads `projects/P/locations/R/customJobs/N`."""
    words = name.split("/")
    return dict(zip(words[::2], words[1::2], strict=True))


def _call(
    region: str, ask: Callable[[Any], Any], *, allow_missing: bool = False
) -> Any:
    """Asks the service; if `allow_missing`, a job that is not there is None.

    Raises:
        UserError: it refuses, or cannot be reached.
    """
    aiplatform = _library("google.cloud.aiplatform_v1")
    exceptions = _library("google.api_core.exceptions")
    auth = _library("google.auth.exceptions")
    endpoint = f"{region}-aiplatform.googleapis.com"
    try:
        client = aiplatform.JobServiceClient(
            client_options={"api_endpoint": endpoint}
        )
        return ask(client)
    except (exceptions.GoogleAPIError, auth.GoogleAuthError) as error:
        if allow_missing and isinstance(error, exceptions.NotFound):
            return None
        words = " ".join(str(error).split())[:_MAX_WORDS]
        raise UserError(f"Vertex AI at {endpoint}: {words}") from error


def _library(name: str) -> ModuleType:
    try:
        # Takes seconds, and `--dry_run` does without.
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"--backend=vertex needs the client library of Vertex AI ({error});"
            " pip install google-cloud-aiplatform"
        ) from error
