"""What is submitted to Slurm: the plan, and what bash makes of it."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings

from dtrain import config
from dtrain.errors import UserError
from launch.backends import slurm
from launch.job import Job, Plan
from launch.options import Options
from tests import plans, typed

# In place of srun: says what it was called with, and ends with a given code.
SRUN = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["SAID"], "w") as file:
    json.dump([sys.argv[1:], os.environ.get("TYPED")], file)
sys.exit(int(os.environ["CODE"]))
"""
SCONTROL = '#!/bin/sh\necho "$@" >> "$SAID.scontrol"\n'
MODULE = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["SAID"] + ".module", "w") as file:
    json.dump(sys.argv[1:], file)
"""
# Of directories, which a file system has and a shell would run.
AWKWARD = "a 'b' \"$(touch canary)\" `touch canary` $HOME größe\n"
PROGRAMS = {"srun": SRUN, "scontrol": SCONTROL, "module": MODULE}


def job(arguments: tuple[str, ...] = (), **options: object) -> Job:
    arguments = arguments or ("--run_dir=/runs/faces", "--num_steps=100")
    return Job(
        options=Options(backend="slurm", **options),
        arguments=arguments,
        parsed=config.parse(["dtrain.main", *arguments]),
        directory="/runs/faces/launch/1",
        workdir="/home/me/code",
        python="/home/me/venv/bin/python",
        submitted_secs=plans.SECS,
        mark=plans.MARK,
    )


def run_script(
    plan: Plan, place: pathlib.Path, code: int = 0, **variables: str
) -> tuple[list[str], int, str]:
    """Runs a batch script; returns what srun got, the code, and scontrol's."""
    place.mkdir(exist_ok=True)
    for name, text in PROGRAMS.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    script = place / "job.sh"
    script.write_bytes(os.fsencode(plan.files["job.sh"]))
    said = place / "said"
    done = subprocess.run(
        ["bash", str(script)],
        env={
            "PATH": f"{place}:/usr/bin:/bin",
            "SAID": str(said),
            "CODE": str(code),
            "SLURM_JOB_ID": "17",
            **variables,
        },
        cwd=place,
        capture_output=True,
        text=True,
    )
    arguments, _ = json.loads(said.read_text())
    asked = pathlib.Path(f"{said}.scontrol")
    return (
        arguments,
        done.returncode,
        asked.read_text() if asked.exists() else "",
    )


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(run_dir=typed.words, model=typed.words, other=typed.words)
@example(run_dir=typed.ALL, model=typed.ALL, other=typed.ALL)
def test_what_bash_reads_is_what_was_typed(
    run_dir: str, model: str, other: str, tmp_path: pathlib.Path
) -> None:
    arguments = (f"--run_dir=/r{run_dir}", f"--data_dir={model}")
    place = tmp_path / "place"
    workdir = tmp_path / AWKWARD
    workdir.mkdir(exist_ok=True)
    plan = slurm.plan(
        dataclasses.replace(
            job(
                arguments,
                sbatch_arg=(f"--comment={other}",),
                module=(f"m{other}",),
                env=(f"TYPED={other}",),
            ),
            directory=str(tmp_path / "job" / AWKWARD),
            workdir=str(workdir),
        )
    )
    said, code, _ = run_script(plan, place)
    assert code == 0
    assert said[said.index("--") + 1 :] == list(arguments)
    loaded = json.loads((place / "said.module").read_text())
    assert loaded == ["load", f"m{other}"]
    assert json.loads((place / "said").read_text())[1] == other
    assert f"--comment={other}" in plan.submit
    assert (tmp_path / "job" / AWKWARD / "logs" / "0").is_dir()
    assert not list(tmp_path.rglob("canary"))


def test_a_canary_would_be_seen(tmp_path: pathlib.Path) -> None:
    arguments = ("--run_dir=/r", "--data_dir=$(touch canary)")
    made = dataclasses.replace(
        job(arguments), directory=str(tmp_path), workdir=str(tmp_path)
    )
    plan = slurm.plan(made)
    text = plan.files["job.sh"].replace(f"'{arguments[1]}'", arguments[1])
    broken = dataclasses.replace(plan, files={"job.sh": text})
    said, _, _ = run_script(broken, tmp_path)
    assert said[-1] == "--data_dir="
    assert (tmp_path / "canary").exists()


def test_a_module_may_read_what_is_not_set(tmp_path: pathlib.Path) -> None:
    """`module` is a function of the shell, on most clusters."""
    plan = slurm.plan(
        dataclasses.replace(
            job(module=("cuda",)),
            directory=str(tmp_path / "job"),
            workdir=str(tmp_path),
        )
    )
    module = {"BASH_FUNC_module%%": '() { echo "$LOADED_MODULES_OF_NOBODY"; }'}
    _, code, _ = run_script(plan, tmp_path / "place", **module)
    assert code == 0


@pytest.mark.parametrize(
    ("code", "is_requeued"),
    [
        (0, False),
        (75, True),
        (76, True),
        (78, False),
        (70, False),
        (137, False),
    ],
)
def test_what_is_queued_again(
    code: int, is_requeued: bool, tmp_path: pathlib.Path
) -> None:
    plan = slurm.plan(
        dataclasses.replace(
            job(), directory=str(tmp_path / "a b"), workdir=str(tmp_path)
        )
    )
    _, found, asked = run_script(plan, tmp_path / "place", code)
    assert found == code
    assert asked == ("requeue 17\n" if is_requeued else "")


def test_a_job_that_loses_nodes_is_queued_again_so_often(
    tmp_path: pathlib.Path,
) -> None:
    plan = slurm.plan(
        dataclasses.replace(
            job(max_requeues=2),
            directory=str(tmp_path / "job"),
            workdir=str(tmp_path),
        )
    )
    for _ in range(3):
        _, code, asked = run_script(plan, tmp_path / "place", 76)
        assert code == 76
    assert asked == "requeue 17\n" * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_hours": 0.03}, "must be at least 0.067"),
        ({"max_hours": 1.0, "grace_secs": 1800.0}, "must be at least 2:"),
        ({"sweep": ("seed=1,2,1",)}, "seed=1,2,1) has a value twice"),
        ({"sweep": ("seed=1", "seed=2")}, "must be over different flags"),
        ({"sweep": ("run_dir=a,b",)}, "not over run_dir"),
    ],
)
def test_what_would_be_another_job(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        slurm.plan(job(**options))


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ("--nodes=1", "use --num_nodes"),
        ("-N1", "use --num_nodes"),
        # Letters of one word, and the beginning of a name.
        ("-HvN1", "use --num_nodes"),
        ("--node=1", "use --num_nodes"),
        ("--ntasks=2", "each node has one worker"),
        ("--array=0-3", "use --sweep"),
        ("--job-name=JobState=COMPLETED", "use --name"),
        ("--time=1", "use --max_hours"),
        ("-t1", "use --max_hours"),
        ("--tim=1", "use --max_hours"),
        ("--mem=1G", "use --memory_gib"),
        ("--mem-per-cpu=1G", "use --memory_gib"),
        ("-c4", "use --cpus_per_node"),
        ("--gres=gpu:1", "use --gpus_per_node"),
        ("--gpus=1", "use --gpus_per_node"),
        ("--partition=a", "use --partition"),
        ("-pa", "use --partition"),
        ("--account=a", "use --account"),
        ("--qos=a", "use --qos"),
        ("--constraint=a", "use --constraint"),
        ("--error=/tmp/a", "launch.main logs"),
        ("--open-mode=truncate", "launch.main logs"),
        ("--signal=USR1@5", "--max_hours and --grace_secs"),
        ("--no-requeue", "when it is queued again"),
        ("--wrap=true", "a script of its own"),
        ("--chdir=/tmp", "where it is submitted"),
        ("--wait", "logs --follow"),
        ("-W", "logs --follow"),
        ("--test-only", "use --dry_run"),
        ("--parsable", "use --dry_run"),
        ("--version", "use --dry_run"),
        ("--clusters=a", "submit on that cluster"),
        ("word", "must be a flag of sbatch"),
        ("--", "must be a flag of sbatch"),
        # sbatch would take the script for its value.
        ("--reservation", "--sbatch_arg=--reservation=VALUE"),
        ("-w", "--sbatch_arg=-wVALUE"),
        ("-Hw", "--sbatch_arg=-HwVALUE"),
    ],
)
def test_what_is_not_for_sbatch(argument: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        slurm.plan(job(sbatch_arg=(argument,)))
    assert str(caught.value).startswith(f"sbatch_arg ({argument}) ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    "argument",
    [
        *("--reservation=night", "--exclusive", "--exclusive=user", "--hold"),
        *("-H", "-wnode1", "-Hwnode1", "--nodelist=node1", "--mem-bind=local"),
        *("--time-min=1", "--wait-all-nodes=1", "--comment=-N 2", "-xnode1"),
    ],
)
def test_what_is_for_sbatch(argument: str) -> None:
    plan = slurm.plan(job(sbatch_arg=(argument,)))
    assert argument in plan.submit[:-1]
