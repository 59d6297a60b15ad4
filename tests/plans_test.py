"""What `--dry_run` prints, and what is refused before anything is submitted."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import secrets
import shlex
import sys
import time

import pytest

from dtrain import errors
from launch import cost, main, submission, submit
from launch.keep import worker
from launch.options import Options
from tests import build_files, plans

GOLDEN = build_files.ROOT / "tests" / "golden"


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        (backend, name)
        for backend in plans.COMMANDS
        for name in plans.COMMANDS[backend]
    ],
)
def test_a_dry_run_prints_what_is_in_the_file(
    backend: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """DTRAIN_WRITE_GOLDEN=1 writes the files anew."""
    monkeypatch.setattr(time, "time", lambda: plans.SECS + 0.5)
    monkeypatch.setattr(secrets, "token_hex", lambda _: plans.MARK)
    monkeypatch.setattr(os, "getcwd", lambda: plans.WORKDIR)
    monkeypatch.setattr(sys, "executable", plans.PYTHON)
    monkeypatch.setattr(
        worker, "free_ports", lambda count: list(range(2000, 2000 + count))
    )
    typed = ["main", "--dry_run", *plans.command_line(backend, name)]
    assert main.run(typed, {}) == errors.FINISHED
    text = capsys.readouterr().out
    path = GOLDEN / backend / f"{name}.txt"
    if os.environ.get("DTRAIN_WRITE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--backend=slurm --num_nodes=2 --gpus_per_node=8 --max_hours=4 "
            "--max_requeues=3",
            [
                "2 nodes x 8 GPUs x 4 h = 64 GPU hours at most for one "
                "allocation",
                "it is started again after each preemption and time limit, "
                "however often, until its last step; after the loss of a node "
                "3 times at most, 256 GPU hours",
                "each node has 32 CPUs (4 a GPU) and 128 GiB (16 a GPU) by "
                "default; --cpus_per_node and --memory_gib say otherwise",
            ],
        ),
        (
            "--backend=slurm --sweep=seed=1,2,3 --max_hours=0.5 "
            "--max_requeues=0",
            [
                "3 runs x 1 node x 0.5 h = 1.5 node hours at most for one "
                "allocation of each",
                "each is started again after each preemption and time limit, "
                "however often, until its last step; after the loss of a node "
                "not at all",
            ],
        ),
        (
            "--backend=kubernetes --image=x --gpus_per_node=1 --memory_gib=10",
            [
                "1 node x 1 GPU, without a time limit of its own",
                "it is started again after each preemption, however often, "
                "until its last step; after the loss of a node 20 times at "
                "most",
                "each node has 4 CPUs (4 a GPU) by default; --cpus_per_node "
                "and --memory_gib say otherwise",
            ],
        ),
        (
            "--backend=vertex --project=p --region=r --machine_type=m "
            "--image=x",
            ["1 node x 168 h = 168 node hours at most"],
        ),
    ],
)
def test_what_a_job_takes_is_said(line: str, expected: list[str]) -> None:
    run_dir = "/runs/a" if "slurm" in line else "gs://bucket/a"
    job = plans.make_job(*line.split(), "--", f"--run_dir={run_dir}")
    plan = submit.BACKENDS[job.options.backend].plan(job)
    assert cost.lines(job, len(plan.run_dirs)).splitlines() == expected


JOB_IDS = {
    "slurm": "17",
    "kubernetes": "research/faces-1800000000-5ca1ab",
    "vertex": "projects/12/locations/europe-west4/customJobs/345",
    "skypilot": "17",
}


@pytest.mark.parametrize("backend", JOB_IDS)
def test_what_is_written_down_is_read_back(
    backend: str, tmp_path: pathlib.Path
) -> None:
    """With any flags: what is read is checked, and must not be refused."""
    for name, job in plans.make_jobs(backend).items():
        plan = submit.BACKENDS[backend].plan(job)
        made = submission.make(job, plan, JOB_IDS[backend], {"python": "3"})
        submission.write(made, str(tmp_path / name))
        found = submission.read(str(tmp_path / name))
        assert found
        assert json.dumps(vars(found)) == json.dumps(vars(made))


def test_every_file_is_of_a_command() -> None:
    files = {
        path.relative_to(GOLDEN)
        for backend in plans.COMMANDS
        for path in (GOLDEN / backend).rglob("*.*")
    }
    assert files == {
        pathlib.Path(backend, f"{name}.txt")
        for backend, commands in plans.COMMANDS.items()
        for name in commands
    }


@pytest.mark.parametrize("backend", plans.COMMANDS)
def test_every_flag_is_in_a_file(backend: str) -> None:
    typed = {"dry_run"}
    for name in plans.COMMANDS[backend]:
        flags = plans.command_line(backend, name)
        for flag in flags[: flags.index("--")]:
            typed.add(flag.removeprefix("--").partition("=")[0])
    missing = [
        each.name
        for each in dataclasses.fields(Options)
        if backend in each.metadata["backends"]
        and not {each.name, f"no{each.name}"} & typed
    ]
    assert not missing, (
        f"no plan of --backend={backend} has {', '.join(missing)}; add the "
        "flag to a command of tests/plans.py, and write the file by "
        "DTRAIN_WRITE_GOLDEN=1"
    )


ON_STORE = " -- --run_dir=gs://bucket/a"
ON_DISK = " -- --run_dir=runs/a"
KUBERNETES = "--backend=kubernetes --image=registry/dtrain:1 "
VERTEX = (
    "--backend=vertex --project=p --region=europe-west4 "
    "--machine_type=n1-standard-8 --image=registry/dtrain:1 "
)
SKYPILOT = "--backend=skypilot "
IS_FLAG_OF = "is a flag of --backend="
BROKEN = {
    "--backend=pbs" + ON_DISK: "backend (pbs) must be one of local, slurm, "
    "kubernetes, vertex, skypilot",
    "--num_nodes=2" + ON_DISK: f"num_nodes {IS_FLAG_OF}slurm or kubernetes or "
    "vertex or skypilot; with local leave it out",
    "--num_workers=2 --min_workers=3" + ON_DISK: "min_workers (3) must be "
    "between 0 and 2",
    "--backend=slurm" + ON_STORE: "record_dir (gs://bucket/a) must be on a "
    "disk that all nodes see; name one with --record_dir",
    r"--backend=slurm -- --run_dir='/runs/a\b'": r"record_dir (/runs/a\b) must "
    "have no backslash, which Slurm takes for its own; name another with "
    "--record_dir",
    "--backend=slurm --name=My_Job" + ON_DISK: "name (My_Job) must be of a-z, "
    "0-9 and -, begin with a letter, end with no -, and have at most 50 of "
    "them",
    "--backend=slurm --num_nodes=0" + ON_DISK: "num_nodes (0) must be at least "
    "1",
    "--backend=slurm --max_hours=inf" + ON_DISK: "max_hours (inf) must be a "
    "finite number",
    "--backend=slurm --num_nodes=2" + ON_DISK + " --strategy=mirrored": (
        "strategy (mirrored) runs on one machine; with num_nodes (2) leave it "
        "out"
    ),
    "--backend=slurm --gpu_type=a100" + ON_DISK: "gpu_type (a100) needs "
    "--gpus_per_node, how many",
    "--backend=slurm --sweep=seed" + ON_DISK: "sweep (seed) must be of the "
    "form flag=value,value",
    f"--backend=slurm --sweep=seed={','.join(map(str, range(1001)))}"
    + ON_DISK: (
        "sweep makes 1,001 runs, and must make at most 1,000; submit parts of "
        "it, in other run_dirs"
    ),
    f"--backend=slurm --sweep=dataset={'a' * 250}" + ON_DISK: (
        f"sweep (dataset={'a' * 72}...) makes the name of a directory longer "
        "than 255 bytes; take shorter values"
    ),
    "--backend=slurm --max_parallel=2" + ON_DISK: "max_parallel (2) is for "
    "the runs of a sweep; add --sweep, or leave it out",
    "--backend=slurm --container_image=i --record_dir=/jobs -- "
    "--run_dir=/runs/a,b": "container_image mounts /runs/a,b, which must have "
    "no , and no :, as these separate mounts; take another directory",
    "--backend=slurm --sweep=num_steps=10,0" + ON_DISK: "num_steps (0) must be "
    "at least 1",
    "--backend=slurm --partitoin=gpu" + ON_DISK: "there is no flag "
    "--partitoin; did you mean --partition? --help lists them all; the flags "
    "of dtrain.main go after --",
    "--backend=slurm" + ON_DISK + " --num_step=3": "there is no flag "
    "--num_step; did you mean --num_steps? --help lists them all",
    "--backend=kubernetes" + ON_STORE: "image is missing; build one with "
    "launch/Dockerfile and use --image=REGISTRY/NAME:TAG",
    KUBERNETES + ON_DISK: "run_dir (runs/a) would be lost with its pod; use "
    "gs://BUCKET/DIR, or --volume_claim=CLAIM:/PATH and a directory below "
    "/PATH",
    KUBERNETES + "--volume_claim=c:/d -- --run_dir=/d/a": "run_dir (/d/a) is "
    "on a volume claim, which only the pods see; add --record_dir=DIR, where "
    "this machine writes the job down",
    KUBERNETES + "--volume_claim=c" + ON_STORE: "volume_claim (c) must be of "
    "the form CLAIM:/PATH, or CLAIM:/PATH:ro",
    KUBERNETES + "--node_selector='zone=a b'" + ON_STORE: "node_selector "
    "(zone=a b) must be a label of Kubernetes: letters, digits, -, _ and ., 63 "
    "at most, and a domain with / in front of its name if it has one",
    KUBERNETES + "--namespace=My" + ON_STORE: "namespace (My) must be of a-z, "
    "0-9 and -, with a letter or digit at both ends, and have at most 63 of "
    "them",
    KUBERNETES + "--gpu_type=nvidia-l4" + ON_STORE: "gpu_type (nvidia-l4) "
    "needs --gpus_per_node, how many",
    KUBERNETES + "--max_hours=1" + ON_STORE + " --stop_after_secs=60": (
        "max_hours (1) sets stop_after_secs (60); leave one of them out"
    ),
    KUBERNETES + "--grace_secs=30" + ON_STORE + " --grace_secs=31": (
        "grace_secs (31) of dtrain.main must not be more than that of the job "
        "(30), after which its pods are killed"
    ),
    "--backend=vertex" + ON_STORE: "project is missing; --backend=vertex needs "
    "--project",
    VERTEX + ON_DISK: "run_dir (runs/a) must be on gs://, where the next "
    "machines find it; use --run_dir=gs://BUCKET/DIRECTORY",
    VERTEX + ON_STORE[1:] + " --checkpoint_dir=/tmp/a": "checkpoint_dir "
    "(/tmp/a) must be on gs://, where the next machines find it; use "
    "--checkpoint_dir=gs://BUCKET/DIRECTORY",
    VERTEX + "--gpus_per_node=8" + ON_STORE: "gpus_per_node (8) needs "
    "--gpu_type, which vertex has no default for",
    VERTEX + "--gpus_per_node=8 --gpu_type=a100" + ON_STORE: "gpu_type (a100) "
    "must be as in NVIDIA_TESLA_A100",
    VERTEX + "--region='europe west4'" + ON_STORE: "region ('europe west4') "
    "must be as in europe-west4",
    VERTEX + "--image='a b'" + ON_STORE: "image ('a b') must be as in "
    "registry/name:tag",
    VERTEX + "--max_requeues=3" + ON_STORE: f"max_requeues {IS_FLAG_OF}slurm "
    "or kubernetes or skypilot; with vertex leave it out",
    **{
        f"{backend}{flag}": f"{name} (s3://b/a) must be on gs://, which is the "
        "only store that dtrain knows, or on a disk"
        for backend, flag, name in (
            (SKYPILOT, "-- --run_dir=s3://b/a", "run_dir"),
            (KUBERNETES, "-- --run_dir=s3://b/a", "run_dir"),
            ("--backend=slurm ", "-- --run_dir=s3://b/a", "run_dir"),
            (
                KUBERNETES,
                f"{ON_STORE[1:]} --checkpoint_dir=s3://b/a",
                "checkpoint_dir",
            ),
            (VERTEX, f"{ON_STORE[1:]} --backup_dir=s3://b/a", "backup_dir"),
            (KUBERNETES, f"--record_dir=s3://b/a{ON_STORE}", "record_dir"),
        )
    },
    "--backend=slurm --container_mount=/a:/b" + ON_DISK: "container_mount "
    "(/a:/b) is of a container; add --container_image, or leave it out",
    "--backend=slurm --container_image=i --container_mount=/a" + ON_DISK: (
        "container_mount (/a) must be of the form /FROM:/TO"
    ),
    "--backend=slurm --container_image=i --container_mount=/a:/b,/c:/d"
    + ON_DISK: ("container_mount (/a:/b,/c:/d) must be of the form /FROM:/TO"),
    "--backend=slurm '--partition=a b'" + ON_DISK: "partition (a b) must be a "
    "word without spaces",
    "--backend=slurm --module=" + ON_DISK: "module is given without a value; "
    "leave it out",
    "--env=NCCL_DEBUG" + ON_DISK: "env (NCCL_DEBUG) must be of the form "
    "NAME=VALUE",
    "--env='NCCL DEBUG=1'" + ON_DISK: "env (NCCL DEBUG) must be of the form "
    "NAME=VALUE",
    "--env=TF_CONFIG=x" + ON_DISK: "env (TF_CONFIG) is set by dtrain or by the "
    "scheduler; leave it out",
    "--env=A=1 --env=A=2" + ON_DISK: "env (A) is given twice; leave one out",
    VERTEX + "'--env=A=$(HOME)'" + ON_STORE: "env (A=$(HOME)) must have no $ "
    "on Vertex AI, which replaces $(VARIABLE) there",
    **{
        f"--env={name}=hunter2" + ON_DISK: f"env ({name}) looks like a secret, "
        "which everybody can read in a job; use --env_secret=SECRET on "
        "Kubernetes, elsewhere a file that only you can read"
        for name in ("WANDB_API_KEY", "HF_TOKEN", "db_password", "KEY")
    },
    SKYPILOT + "--gpu_type=A100" + ON_STORE: "gpu_type (A100) needs "
    "--gpus_per_node, how many",
    SKYPILOT + "--max_hours=4" + ON_STORE: f"max_hours {IS_FLAG_OF}slurm or "
    "kubernetes or vertex; with skypilot leave it out",
}


@pytest.mark.parametrize("typed", BROKEN)
def test_a_mistake_is_one_line_and_nothing_is_submitted(
    typed: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """No scheduler is asked: its program would be missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        errors.exit_with(lambda: main.run(["main", *shlex.split(typed)], {}))
    assert ended.value.code == errors.USER_ERROR
    said = capfd.readouterr()
    assert said.err == f"error: {BROKEN[typed]}\n"
    assert not said.out
    assert not list(tmp_path.iterdir())


def commands_of_pages() -> list[str]:
    """Submissions of the documentation, each on one line."""
    root = build_files.ROOT
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    lines = text.replace("\\\n", " ").splitlines()
    begin = "    python -m launch.main --backend="
    return [
        line for line in lines if line.startswith(begin) and "|" not in line
    ]


def test_the_pages_have_commands_of_all() -> None:
    text = "\n".join(commands_of_pages())
    for backend in submit.BACKENDS:
        assert f"--backend={backend} " in text


@pytest.mark.parametrize("line", commands_of_pages())
def test_commands_of_the_pages(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, program, *typed = shlex.split(line)
    assert program == "launch.main"
    assert main.run(["main", "--dry_run", *typed], {}) == errors.FINISHED
    assert capsys.readouterr().out
