"""Jobs of a Slurm cluster: one batch script, which queues itself again.

What Slurm really does, and why the script is as it is, is in docs/slurm.md.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence

from dtrain import config
from dtrain.cluster import environment
from dtrain.errors import StorageError, UserError
from dtrain.storage import files
from launch import code, logs
from launch import job as job_lib
from launch.backends import sbatch, sweep
from launch.job import CANCELLED, FINISHED, QUEUED, RUNNING, Job, Plan, State
from launch.options import Options, variables
from launch.submission import Submission, ask

# Slurm looks at the clock about every 30 s.
_LEAST_LEAD_SECS = 120

_HELD = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SUSPENDED")
_BUSY = ("CONFIGURING", "RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT")
_PHASES = {
    QUEUED: _HELD,
    RUNNING: _BUSY,
    FINISHED: ("COMPLETED",),
    CANCELLED: ("CANCELLED",),
}

_SCRIPT = """\
#!/bin/bash
# Written by `python -m launch.main`; docs/slurm.md explains it.
# What the shell of the submission has set of a cluster is none of this job.
unset {foreign}
export DTRAIN_SUBMITTED_SECS={submitted_secs}
export DTRAIN_CODE_DIR={code_dir}
logs={logs}/${{SLURM_ARRAY_TASK_ID:-0}}
mkdir -p "$logs"
cd {workdir} || exit 78
{modules}
# Behind the modules, whose scripts read what is not set.
set -u
{exports}{arguments}
# A worker that ends lets the others save: it neither kills them nor hurries.
# All that is exported above arrives, also where sbatch is to export nothing.
srun --export=ALL \\
    --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 {srun_arguments} \\
    {command} --log_dir="$logs" -- "${{arguments[@]}}"
code=$?

# 75 is "run me again": a preemption, or the time limit. 76 is a node that does
# not answer, which another allocation may leave out.
if ((code == 76)); then
    echo "$SLURM_JOB_ID" >> "$logs/requeues"
    (($(wc -l < "$logs/requeues") <= {max_requeues})) || exit 76
fi
if ((code == 75 || code == 76)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def plan(job: Job) -> Plan:
    """Makes the batch script of a job, and the commands that submit it.

    All that was typed is an argument, or quoted for bash. See `job`.

    Raises:
        UserError: a flag is malformed, or names what not all nodes see.
    """
    if files.is_remote(job.directory):
        raise UserError(
            f"record_dir ({job.record_dir}) must be on a disk that all nodes "
            "see; name one with --record_dir"
        )
    if "\\" in job.directory:
        # Behind one, %j is no longer the job's number in the log's name.
        raise UserError(
            f"record_dir ({job.record_dir}) must have no backslash, which "
            "Slurm takes for its own; name another with --record_dir"
        )
    for argument in job.options.sbatch_arg:
        sbatch.check(argument)
    for mount in job.options.container_mount:
        if not job.options.container_image:
            raise UserError(
                f"container_mount ({mount}) is of a container; add "
                "--container_image, or leave it out"
            )
        if not re.fullmatch("/[^:,]*:/[^:,]*(:[^:,]+)?", mount, re.DOTALL):
            raise UserError(
                f"container_mount ({mount}) must be of the form /FROM:/TO"
            )
    script = os.path.join(job.directory, "job.sh")
    arguments = (*_sbatch_arguments(job), script)
    return Plan(
        files={"job.sh": _script(job)},
        run_dirs=tuple(
            config.parse(["dtrain.main", *arguments]).run_dir
            for arguments in sweep.runs(job)
        ),
        check=("sbatch", "--test-only", *arguments),
        has_code=True,
        submit=("sbatch", "--parsable", *arguments),
    )


def _script(job: Job) -> str:
    code_dir = os.path.join(job.directory, "code")
    command = [
        # The Python of the submission may link to what no image has.
        "python3" if job.options.container_image else job.python,
        os.path.join(code_dir, code.RUNNER),
        "launch.node",
        *job.supervisor_arguments,
    ]
    return _SCRIPT.format(
        foreign=" ".join(
            name
            for name in environment.SOURCES
            if not name.startswith("SLURM_")
        ),
        submitted_secs=job.submitted_secs,
        code_dir=shlex.quote(code_dir),
        workdir=shlex.quote(job.workdir),
        modules="".join(
            f"module load {shlex.quote(module)} || exit 78\n"
            for module in job.options.module
        ),
        exports="".join(
            f"export {name}={shlex.quote(value)}\n"
            for name, value in variables(job.options).items()
        ),
        arguments=_arguments(sweep.runs(job)),
        srun_arguments=shlex.join(_srun_arguments(job)),
        command=shlex.join(command),
        logs=shlex.quote(os.path.join(job.directory, "logs")),
        max_requeues=job.options.max_requeues,
    )


def _arguments(runs: Sequence[Sequence[str]]) -> str:
    if len(runs) == 1:
        return f"arguments=({shlex.join(runs[0])})"
    cases = "".join(
        f"    {index}) arguments=({shlex.join(run)}) ;;\n"
        for index, run in enumerate(runs)
    )
    return f"case $SLURM_ARRAY_TASK_ID in\n{cases}esac"


def _lead_secs(options: Options) -> int:
    # How long before the time limit the notice comes.
    lead_secs = max(_LEAST_LEAD_SECS, int(2 * options.grace_secs))
    if 0 < 3600 * options.max_hours < 2 * lead_secs:
        raise UserError(
            f"max_hours ({options.max_hours:g}) must be at least "
            f"{2 * lead_secs / 3600:.2g}: its notice is {lead_secs} s before "
            "the end, and too little is left; raise it, or lower --grace_secs"
        )
    return lead_secs


def _sbatch_arguments(job: Job) -> tuple[str, ...]:
    """Returns the flags of sbatch; neither a shell nor the script has them."""
    options = job.options
    lead_secs = _lead_secs(options)
    num_runs = len(sweep.runs(job))
    name = f"slurm-{'%A_%a' if num_runs > 1 else '%j'}.log"
    # Slurm replaces what a percent sign begins, anywhere in the path.
    log = os.path.join(job.directory.replace("%", "%%"), name)
    arguments = [
        f"--job-name={job.name}",
        f"--output={log}",
        # Or a requeued job begins its log anew.
        "--open-mode=append",
        "--requeue",
        f"--signal=USR1@{lead_secs}",
        f"--nodes={options.num_nodes}",
        "--ntasks-per-node=1",
    ]
    if num_runs > 1:
        limit = f"%{options.max_parallel}" if options.max_parallel else ""
        arguments.append(f"--array=0-{num_runs - 1}{limit}")
    if options.gpus_per_node:
        kind = f"{options.gpu_type}:" if options.gpu_type else ""
        arguments.append(f"--gres=gpu:{kind}{options.gpus_per_node}")
    if job.cpus_per_node:
        arguments.append(f"--cpus-per-task={job.cpus_per_node}")
    if job.memory_gib:
        arguments.append(f"--mem={job.memory_gib}G")
    if options.max_hours:
        arguments.append(f"--time={max(1, round(60 * options.max_hours))}")
    arguments += [
        f"--{name}={getattr(options, name)}"
        for name in ("partition", "account", "qos", "constraint")
        if getattr(options, name)
    ]
    return (*arguments, *options.sbatch_arg)


def _srun_arguments(job: Job) -> tuple[str, ...]:
    options = job.options
    # Since 22.05 a step does not inherit what sbatch was told.
    cpus = job.cpus_per_node
    arguments = [f"--cpus-per-task={cpus}"] if cpus else []
    if not options.container_image:
        return tuple(arguments)
    run_dir = os.path.abspath(job.parsed.run_dir)
    mounts = []
    for directory in (job.directory, job.workdir, run_dir):
        if {",", ":"} & set(directory):
            raise UserError(
                f"container_image mounts {directory}, which must have no , "
                "and no :, as these separate mounts; take another directory"
            )
        mounts.append(f"{directory}:{directory}")
    return (
        *arguments,
        f"--container-image={options.container_image}",
        f"--container-mounts={','.join((*mounts, *options.container_mount))}",
        f"--container-workdir={job.workdir}",
    )


def check(plan: Plan) -> None:
    """Asks Slurm whether it would take a job; see `job`."""
    sbatch.check_variables()
    ask(plan.check)


def submit(job: Job, plan: Plan) -> str:
    """Queues a job; returns its number. See `job`.

    Raises:
        UserError: Slurm does not take it.
        StorageError: Slurm does not say whether it has taken it.
    """
    del job
    try:
        output = ask(plan.submit)
    except (UserError, StorageError) as error:
        if isinstance(error, UserError) and "timed out" not in str(error):
            raise
        raise StorageError(
            f"{error}; squeue --me tells whether the job is queued"
        ) from error
    # As in `17;cluster`.
    job_id = (output.split() or [""])[-1].split(";")[0]
    if not job_id.isdecimal():
        raise StorageError(
            f"sbatch did not say the number of the job ({output.strip()!r}); "
            "squeue --me tells whether it is queued"
        )
    return job_id


def states(submission: Submission) -> list[State]:
    """Asks Slurm how a job is; see `job`.

    Raises:
        UserError: Slurm cannot be asked.
    """
    try:
        text = ask(("scontrol", "show", "job", "-o", submission.job_id))
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        return _accounted(submission.job_id)
    # The name of a directory may have several lines.
    lines = [line for line in text.splitlines() if line.startswith("JobId=")]
    if not lines:
        return _accounted(submission.job_id)
    return [_read_state(line) for line in lines]


def cancel(submission: Submission) -> None:
    """Takes a job out of the queue, or ends it; see `job`."""
    ask(("scancel", submission.job_id))


def cancel_queued(submission: Submission) -> None:
    """Takes those runs of a sweep out of the queue that do not run.

    Args:
        submission: the job.

    Raises:
        UserError: Slurm cannot be asked.
    """
    ask(("scancel", "--state=PENDING", submission.job_id))


def show_logs(
    submission: Submission, follow: bool, is_over: Callable[[], bool]
) -> None:
    """Prints the logs of all workers and of the batch script; see `job`."""
    directory = glob.escape(submission.directory)
    patterns = [
        os.path.join(directory, "slurm-*.log"),
        os.path.join(directory, "logs", "*", "worker-*.log"),
    ]
    if not logs.show(patterns, follow, is_over):
        print(f"{submission.name} has not said anything yet", file=sys.stderr)


def _read_state(line: str) -> State:
    """Reads a line of scontrol, in which what a user chose comes last."""
    words = {
        name: (re.search(rf"\b{name}=(\S*)", line) or ["", ""])[1]
        for name in ("JobId", "JobState", "Reason", "Restarts", "NodeList")
    }
    state = words["JobState"]
    details = [f"job {words['JobId']}", state]
    if words["Reason"] not in ("None", ""):
        details.append(words["Reason"])
    if words["NodeList"] not in ("(null)", ""):
        details.append(f"on {words['NodeList']}")
    if words["Restarts"] not in ("0", ""):
        details.append(f"queued again {words['Restarts']} times")
    return job_lib.read_state(state, _PHASES, details)


def _accounted(job_id: str) -> list[State]:
    """Asks the accounting for a job that the controller has forgotten."""
    columns = "JobID,State,NodeList"
    command = ("sacct", "-n", "-P", "-X", "-j", job_id, "-o", columns)
    try:
        lines = ask(command).splitlines()
    except (UserError, StorageError):
        lines = []
    runs = []
    for line in lines:
        if line.count("|") < 2:
            continue
        number, state, nodes = line.split("|")[:3]
        # As in `CANCELLED by 1000`.
        word = state.partition(" ")[0]
        details = (f"job {number}", state, f"on {nodes}")
        runs.append(job_lib.read_state(word, _PHASES, details))
    return runs or job_lib.forgotten("Slurm", f"job {job_id}")
