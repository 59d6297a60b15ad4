"""Jobs of SkyPilot: a managed job, which finds machines again and again.

What SkyPilot does when, and why the task is as it is, is in docs/skypilot.md.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import string
from collections.abc import Callable, Sequence
from typing import Any

from dtrain.errors import RUN_AGAIN, UserError
from dtrain.storage import temporary
from launch import code as code_lib
from launch import job as job_lib
from launch.job import CANCELLED, FINISHED, QUEUED, RUNNING, Job, Plan, State
from launch.options import variables
from launch.submission import NoProgramError, Submission, ask, show

_PHASES = {
    QUEUED: ("PENDING", "SUBMITTED", "STARTING", "RECOVERING"),
    RUNNING: ("RUNNING", "WINDING_DOWN", "CANCELLING"),
    FINISHED: ("SUCCEEDED",),
    CANCELLED: ("CANCELLED",),
}

# The time for a save, if --grace_secs says no other.
_SAVE_SECS = 30

_REMEDY = "pip install 'skypilot[gcp]', in a virtual environment of its own"

# It asks its clouds; and makes a machine for its controller if there is none.
_TIMEOUT_SECS = 180.0
_SUBMIT_SECS = 1800.0

# Characters that mean themselves inside of $''.
_PLAIN = frozenset(string.ascii_letters + string.digits + " _-+=/.:,@")

# YAML whose values are JSON, which is YAML too.
_TASK = """\
# Written by `python -m launch.main`; docs/skypilot.md explains it.
name: {name}
num_nodes: {num_nodes}
resources: {resources}
file_mounts: {file_mounts}
{setup}run: |
  cd ~/dtrain || exit 1
  export DTRAIN_SUBMITTED_SECS={submitted_secs}
{exports}  {command}
  code=$?
{wait}  exit $code
"""

_SETUP = """\
setup: |
  cd ~/dtrain &&
  {commands}
"""

_WAIT = """\
  # When one node fails SkyPilot kills the others, which may still be saving.
  ((code == 0)) || sleep {secs}
"""


def plan(job: Job) -> Plan:
    """Makes the task of a job, and the command that submits it; see `job`.

    All that was typed is quoted for bash.
    """
    job.require_store()
    job.require_gpu_type()
    return Plan(
        files={"task.yaml": _task(job)},
        run_dirs=(job.parsed.run_dir,),
        submit=(
            *("sky", "jobs", "launch", "--yes", "--detach-run"),
            f"--name={job.name}",
            os.path.join(job.directory, "task.yaml"),
        ),
        has_code=True,
    )


def _task(job: Job) -> str:
    options = job.options
    command = [
        *("python", "-m", "launch.node", *job.supervisor_arguments, "--"),
        *job.worker_arguments,
    ]
    secs = max(_SAVE_SECS, math.ceil(options.grace_secs))
    code = os.path.join(job.directory, "code")
    return _TASK.format(
        name=_json(job.name),
        num_nodes=options.num_nodes,
        resources=_json(_resources(job)),
        file_mounts=_json({"~/dtrain": code}),
        setup="" if options.image else _setup(bool(options.gpus_per_node)),
        submitted_secs=job.submitted_secs,
        exports="".join(
            f"  export {name}={_quote(value)}\n"
            for name, value in variables(options).items()
        ),
        command=" ".join(map(_quote, command)),
        wait=_WAIT.format(secs=secs) if options.num_nodes > 1 else "",
    )


def _resources(job: Job) -> dict[str, Any]:
    options = job.options
    resources: dict[str, Any] = {}
    if options.cloud or options.region:
        places = (options.cloud or "*", options.region)
        resources["infra"] = "/".join(filter(None, places))
    if options.machine_type:
        resources["instance_type"] = options.machine_type
    if options.gpus_per_node:
        resources["accelerators"] = {options.gpu_type: options.gpus_per_node}
    if options.cpus_per_node:
        resources["cpus"] = f"{options.cpus_per_node}+"
    if options.memory_gib:
        resources["memory"] = f"{options.memory_gib}+"
    if options.image:
        image = options.image.removeprefix("docker:")
        resources["image_id"] = f"docker:{image}"
    resources["use_spot"] = options.spot
    resources["job_recovery"] = {
        "strategy": "EAGER_NEXT_REGION",
        # One can name codes after which SkyPilot always starts again, but none
        # after which it does not. With 0 a mistake would not be tried again,
        # but the run would end where SkyPilot has not yet seen that a node is
        # lost, and takes the end of the others for a failure.
        "max_restarts_on_errors": options.max_requeues,
        "recover_on_exit_codes": [RUN_AGAIN],
    }
    return resources


def _setup(has_gpus: bool) -> str:
    install = "python -m pip install --quiet"
    commands = [f"{install} --no-deps --require-hashes -r {code_lib.LOCK}"]
    if has_gpus:
        # TensorFlow is there by now: this adds CUDA.
        commands.append(f"{install} 'tensorflow[and-cuda]'")
    return _SETUP.format(commands=" &&\n  ".join(commands))


def _json(value: Any) -> str:
    # YAML does not read a pair of \\u escapes as one character.
    return json.dumps(value, ensure_ascii=False)


def _quote(text: str) -> str:
    """Quotes an argument for bash, on one line of what YAML can hold."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = "".join(
        chr(byte) if chr(byte) in _PLAIN else f"\\x{byte:02x}"
        for byte in os.fsencode(text)
    )
    return f"$'{escaped}'"


def check(plan: Plan) -> None:
    """Looks for SkyPilot, which cannot be asked before; see `job`.

    Raises:
        NoProgramError: it is not here.
    """
    program = plan.submit[0]
    if not shutil.which(program):
        raise NoProgramError(f"{program} is not on PATH; {_REMEDY}")


def submit(job: Job, plan: Plan) -> str:
    """Submits a managed job; returns its number. See `job`.

    Raises:
        UserError: SkyPilot does not take it, or is missing.
    """
    del job
    *command, path = plan.submit
    with temporary.directory("task") as directory:
        # The plan's own may be on a store, where SkyPilot reads no task.
        copy = os.path.join(directory, os.path.basename(path))
        with open(copy, "wb") as file:
            file.write(os.fsencode(plan.files["task.yaml"]))
        text = _ask((*command, copy), _SUBMIT_SECS)
    match = re.search(r"Managed Job ID: (\d+)", text)
    if not match:
        raise UserError(
            "SkyPilot did not say which job it made; `sky jobs queue` lists "
            f"them, `sky jobs cancel` ends one: {' '.join(text.split())[-300:]}"
        )
    return match[1]


def states(submission: Submission) -> list[State]:
    """Asks SkyPilot how a job is; see `job`.

    Raises:
        UserError: it cannot be asked.
    """
    text = _ask(("sky", "jobs", "queue", "--all", "--refresh", "--output=json"))
    # Behind what it prints while it asks its servers.
    begin = re.search(r"^\[", text, re.MULTILINE)
    try:
        jobs = json.loads(text[begin.start() :] if begin else "")
        ours = [job for job in jobs if str(job["job_id"]) == submission.job_id]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"sky jobs queue is not understood: {text[-200:]!r}; dtrain knows "
            "that of SkyPilot 0.14"
        ) from error
    if not ours:
        return job_lib.forgotten("SkyPilot", f"job {submission.job_id}")
    job = ours[0]
    status = str(job.get("status"))
    details = [f"job {job['job_id']}", status]
    if job.get("infra"):
        details.append(f"on {job['infra']}")
    if job.get("recovery_count"):
        details.append(f"recovered {job['recovery_count']} times")
    if job.get("failure_reason"):
        details.append(" ".join(str(job["failure_reason"]).split()))
    return [job_lib.read_state(status, _PHASES, details)]


def cancel(submission: Submission) -> None:
    """Ends a job, and gives its machines back; see `job`."""
    _ask(("sky", "jobs", "cancel", "--yes", submission.job_id))


def show_logs(
    submission: Submission, follow: bool, is_over: Callable[[], bool]
) -> None:
    """Prints the logs of all workers; see `job`. SkyPilot knows the end."""
    del is_over
    mode = "--follow" if follow else "--no-follow"
    # Without --tail it prints the end of the log alone.
    command = ("sky", "jobs", "logs", mode, "--tail=0", submission.job_id)
    show(command, _REMEDY, is_endless=follow)


def _ask(command: Sequence[str], timeout_secs: float | None = None) -> str:
    return ask(
        command, remedy=_REMEDY, timeout_secs=timeout_secs or _TIMEOUT_SECS
    )
