"""What an operator may add to the command of sbatch, and what is there already.

sbatch takes any beginning of a long name for it, and several short flags in one
word, as getopt does.
"""

from __future__ import annotations

import os

from dtrain.errors import UserError

_SELF = "leave it out"
# Arguments that are given already or would undo the plan, and what to do.
_OURS = {
    ("--nodes", "-N"): "use --num_nodes",
    (
        *("--ntasks", "-n", "--ntasks-per-node", "--tasks-per-node"),
        *("--ntasks-per-core", "--ntasks-per-gpu", "--ntasks-per-socket"),
    ): f"{_SELF}: each node has one worker",
    ("--array", "-a"): "use --sweep",
    ("--job-name", "-J"): "use --name",
    ("--time", "-t"): "use --max_hours",
    ("--mem", "--mem-per-cpu", "--mem-per-gpu"): "use --memory_gib",
    ("--cpus-per-task", "-c", "--cpus-per-gpu"): "use --cpus_per_node",
    (
        *("--gres", "--gpus", "-G", "--gpus-per-node", "--gpus-per-socket"),
        *("--gpus-per-task", "--tres-per-task"),
    ): "use --gpus_per_node and --gpu_type",
    ("--partition", "-p"): "use --partition",
    ("--account", "-A"): "use --account",
    ("--qos", "-q"): "use --qos",
    ("--constraint", "-C"): "use --constraint",
    (
        *("--output", "-o", "--error", "-e", "--input", "-i", "--open-mode"),
    ): f"{_SELF}: launch.main logs reads what the job says",
    ("--signal",): f"{_SELF}: --max_hours and --grace_secs say when the "
    "workers are told",
    ("--requeue", "--no-requeue"): f"{_SELF}: a job that is preempted goes on "
    "when it is queued again",
    ("--wrap",): f"{_SELF}: the job has a script of its own",
    ("--chdir", "-D"): f"{_SELF}: the job works where it is submitted",
    ("--wait", "-W"): "use launch.main logs --follow",
    (
        *("--test-only", "--parsable", "--help", "-h", "--usage"),
        *("--version", "-V"),
    ): "use --dry_run to see the job alone",
    ("--clusters", "--cluster", "-M"): "submit on that cluster, which alone "
    "knows the number of the job",
}
# Variables of sbatch with the same effect.
_VARIABLES = ("SBATCH_ARRAY_INX", "SBATCH_CLUSTERS", "SBATCH_WAIT")

# Those of the rest that need no value.
_ALONE = {
    *("--contiguous", "--exclusive", "--get-user-env", "--hold"),
    *("--ignore-pbs", "--nice", "--no-kill", "--overcommit", "--oversubscribe"),
    *("--propagate", "--quiet", "--reboot", "--share", "--spread-job"),
    *("--use-min-nodes", "--verbose"),
}
_ALONE_SHORT = "HIkOQsv"


def check(argument: str) -> None:
    """Checks an argument that is added to those of the plan.

    Args:
        argument: as it was typed.

    Raises:
        UserError: it is none, or not for the operator to say.
    """
    if not argument.startswith("-") or argument in ("-", "--"):
        raise UserError(
            f"sbatch_arg ({argument}) must be a flag of sbatch with its value, "
            "as in --sbatch_arg=--reservation=night"
        )
    check_name = _check_long if argument.startswith("--") else _check_short
    check_name(argument)


def check_variables() -> None:
    """Checks what the environment says to sbatch.

    Raises:
        UserError: it would be another job.
    """
    for name in _VARIABLES:
        if name in os.environ:
            raise UserError(
                f"{name} ({os.environ[name]}) is set, and sbatch would obey "
                f"it; unset {name}"
            )


def _check_long(argument: str) -> None:
    name, equals, _ = argument.partition("=")
    for names, remedy in _OURS.items():
        # A beginning stands for the whole.
        if any(ours.startswith(name) for ours in names) and name not in _ALONE:
            _refuse(argument, remedy)
    if not equals and name not in _ALONE:
        _refuse_without_value(argument, f"{name}=VALUE")


def _check_short(argument: str) -> None:
    for index, letter in enumerate(argument[1:], start=2):
        for names, remedy in _OURS.items():
            if f"-{letter}" in names:
                _refuse(argument, remedy)
        if letter not in _ALONE_SHORT:
            # The rest is its value.
            if not argument[index:]:
                _refuse_without_value(argument, f"{argument}VALUE")
            return


def _refuse(argument: str, remedy: str) -> None:
    raise UserError(f"sbatch_arg ({argument}) is not for sbatch; {remedy}")


def _refuse_without_value(argument: str, form: str) -> None:
    # sbatch would take the script for it.
    raise UserError(
        f"sbatch_arg ({argument}) has no value; if sbatch knows it write "
        f"--sbatch_arg={form}"
    )
