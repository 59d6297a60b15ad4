"""Command lines whose plans are compared with files, by backend and name.

Those of a backend have each of its flags among them.
"""

from __future__ import annotations

import dataclasses
import pathlib

from dtrain import flags
from launch import submit
from launch.job import Job
from launch.options import Options

# When, where and by which Python they are typed.
SECS = 1_800_000_000
MARK = "5ca1ab"
STAMP = f"20270115-080000-{MARK}"
WORKDIR = "/home/me/code"
PYTHON = "/home/me/venv/bin/python"

STORE = ("--", "--run_dir=gs://bucket/runs/faces")
DISK = ("--", "--run_dir=/runs/faces")
CLAIM = ("--volume_claim=runs:/data", "--record_dir=/runs/faces")
ON_CLAIM = ("--", "--run_dir=/data/runs/faces")
IMAGE = ("--image=registry.example/dtrain:1",)
VERTEX = (
    *("--project=my-project", "--region=europe-west4"),
    "--image=europe-docker.pkg.dev/my-project/images/dtrain:1",
)
A100S = (
    *("--machine_type=a2-highgpu-8g", "--gpus_per_node=8"),
    "--gpu_type=NVIDIA_TESLA_A100",
)
ENV = ("--env=NCCL_DEBUG=INFO", "--env=XLA_FLAGS=--a='b' $(HOME) $$x")
GOLDEN = pathlib.Path(__file__).parent / "golden"
PATCH = f"--manifest_patch={GOLDEN}/manifest_patch.yaml"
AWKWARD = (
    "--model=my model:$(HOME)",
    "--dataset=$$x $",
    '--data_dir=it\'s "so"\n--',
    "--manual_dir=größe \u2028\ufeff☃",
    "--backup_dir=100% `x` \\ !! 😀",
)

LOCAL = {
    "one_worker": ("--", "--run_dir=runs/faces", "--num_steps=100"),
    "two_workers": ("--num_workers=2", *DISK),
    "all_of_it": (
        *("--backend=local", "--num_workers=4", "--min_workers=2"),
        "--devices_per_worker=2",
        *(
            "--max_restarts=5",
            "--nowarm_spare",
            "--grace_secs=45.5",
            *ENV,
            *DISK,
        ),
    ),
    "awkward": ("--num_workers=2", *DISK, *AWKWARD),
}
SLURM = {
    "one_node": (*DISK, "--num_steps=100"),
    "two_nodes": (
        *("--num_nodes=2", "--gpus_per_node=8", "--max_hours=4", *DISK),
    ),
    "all_of_it": (
        *("--num_nodes=2", "--gpus_per_node=4", "--gpu_type=a100"),
        *("--cpus_per_node=16", "--memory_gib=64", "--max_hours=0.5"),
        *("--name=faces-1", "--partition=gpu", "--account=vision"),
        *(
            "--qos=low",
            "--constraint=nvme",
            "--nowarm_spare",
            "--grace_secs=90",
        ),
        *("--max_restarts=5", "--max_requeues=3"),
        *("--sbatch_arg=--reservation=night", "--record_dir=/home/me/jobs"),
        *("--sbatch_arg=--comment=two words", "--nocheck_here", *ENV, *DISK),
    ),
    "modules": ("--module=cuda/12", "--module=a b", *DISK),
    "container": (
        *("--num_nodes=2", "--container_mount=/data:/data"),
        "--container_image=docker://tensorflow/tensorflow:2.21.0-gpu",
        *DISK,
    ),
    "sweep": (
        *("--sweep=seed=1,2", "--sweep=r1_gamma=0.1,1", "--max_parallel=2"),
        *DISK,
    ),
    "awkward": ("--record_dir=/runs/100% of it", *DISK, *AWKWARD),
}
KUBERNETES = {
    "single": (*IMAGE, *STORE),
    "gpus": (
        *(*IMAGE, "--num_nodes=2", "--gpus_per_node=8", "--cpus_per_node=64"),
        *("--memory_gib=500", "--gpu_type=nvidia-tesla-a100", "--nospot"),
        *CLAIM,
        *ON_CLAIM,
    ),
    "jobset": (
        *(*IMAGE, "--gang=jobset", "--num_nodes=4", "--gpus_per_node=1"),
        *("--max_requeues=3", *STORE),
    ),
    "jobset_single": (*IMAGE, "--gang=jobset", *STORE),
    "namespace": (
        *(*IMAGE, "--namespace=research", "--service_account=trainer"),
        *("--node_selector=cloud.google.com/gke-spot=true",),
        *("--node_selector=zone=1e3", "--name=faces-again", "--num_nodes=2"),
        *STORE,
    ),
    "limits": (
        *(
            *IMAGE,
            "--nowarm_spare",
            "--grace_secs=120.5",
            "--max_hours=0.5",
            "--max_restarts=0",
        ),
        *("--max_requeues=0", "--num_nodes=3", *ENV, *STORE),
    ),
    "claims": (
        *(*IMAGE, *CLAIM, "--volume_claim=images.v2:/images/", *ON_CLAIM),
        *("--checkpoint_dir=gs://bucket/faces", "--grace_secs=20"),
    ),
    "flags": (
        *(*IMAGE, "--num_nodes=2", "--gpus_per_node=8", "--host_network"),
        *("--image_pull_secret=registry", "--priority_class=research"),
        *("--toleration=dedicated=research:NoExecute", "--toleration=a/b"),
        *("--env_secret=wandb", "--label=kueue.x-k8s.io/queue-name=team"),
        *("--label=team=vision", "--annotation=example.com/why=a reason"),
        *("--extra_resource=rdma/hca=1", "--volume_claim=images:/images:ro"),
        *(PATCH, *STORE),
    ),
    "flags_of_a_jobset": (
        *(*IMAGE, "--gang=jobset", "--label=kueue.x-k8s.io/queue-name=team"),
        *(PATCH, *STORE),
    ),
    "awkward": (*IMAGE, *STORE, *AWKWARD),
}
VERTEX_AI = {
    "one_node": (
        *(*VERTEX, "--machine_type=n1-standard-8", *STORE),
        "--num_steps=100",
    ),
    "two_nodes": (
        *(*VERTEX, "--machine_type=n1-standard-8", "--num_nodes=2", *STORE),
    ),
    "gpus": (*VERTEX, *A100S, *STORE),
    "on_demand": (
        *(*VERTEX, "--machine_type=n1-standard-8", "--num_nodes=2"),
        *("--nospot", *STORE),
    ),
    "all_of_it": (
        *(*VERTEX, *A100S, "--num_nodes=4", "--name=faces-1"),
        *(
            "--nowarm_spare",
            "--max_hours=36.5",
            "--max_restarts=5",
            "--grace_secs=20",
        ),
        "--service_account=trainer@my-project.iam.gserviceaccount.com",
        *("--env=NCCL_DEBUG=INFO", "--record_dir=/home/me/jobs", *STORE),
    ),
    "awkward": (*VERTEX, "--machine_type=n1-standard-8", *STORE, *AWKWARD),
}
SKYPILOT = {
    "one_node": (*STORE, "--num_steps=100"),
    "two_nodes": (
        *("--num_nodes=2", "--gpus_per_node=8", "--gpu_type=A100"),
        *("--cloud=gcp", *STORE),
    ),
    "on_demand": ("--nospot", "--region=us-central1", *STORE),
    "machine_type": (
        *("--machine_type=n1-standard-8", "--max_requeues=0", *STORE),
    ),
    "image": (
        *("--num_nodes=2", "--image=tensorflow/tensorflow:2.21.0"),
        # Which YAML would not take for text.
        *("--name=null", *STORE),
    ),
    "all_of_it": (
        *("--num_nodes=4", "--gpus_per_node=1", "--gpu_type=L4"),
        *("--cpus_per_node=8", "--memory_gib=32", "--cloud=gcp"),
        *(
            "--region=europe-west4",
            "--nowarm_spare",
            "--name=faces-1",
            "--max_restarts=5",
        ),
        *("--max_requeues=3", "--grace_secs=45.5"),
        *("--record_dir=/home/me/jobs", "--nocheck_here", *ENV, *STORE),
    ),
    "awkward": (*STORE, *AWKWARD),
}
COMMANDS = {
    "local": LOCAL,
    "slurm": SLURM,
    "kubernetes": KUBERNETES,
    "vertex": VERTEX_AI,
    "skypilot": SKYPILOT,
}


def command_line(backend: str, name: str) -> list[str]:
    """What is typed behind `python -m launch.main`, but for `--dry_run`."""
    where = [] if backend == "local" else [f"--backend={backend}"]
    return [*where, *COMMANDS[backend][name]]


def make_job(*typed: str) -> Job:
    """The job of a command line, with the clock and the user of the files."""
    end = typed.index("--")
    options = Options(**flags.parse(Options, ["main", *typed[:end]]))
    job = submit.make_job(options, typed[end + 1 :], SECS, MARK)
    return dataclasses.replace(job, workdir=WORKDIR, python=PYTHON)


def make_jobs(backend: str) -> dict[str, Job]:
    """Those of a cluster, by name."""
    return {
        name: make_job(*command_line(backend, name))
        for name in COMMANDS[backend]
    }
