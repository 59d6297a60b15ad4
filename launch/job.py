"""What is submitted, and what becomes of it: a job, and the plan of a backend.

A backend is a module with a pure function, `plan(job) -> Plan`, which
`--dry_run` prints, that the tests compare, and that is handed to
`submit(job, plan)`, which returns the id by which the scheduler knows the job.
Of a job that was submitted, `states(submission)` tells how it is,
`cancel(submission)` ends it, and `show_logs(submission, follow, is_over)`
prints what its workers say.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from dtrain import config, flags
from dtrain.errors import UserError

JOB = "Job"
NODES = "Nodes"
ALIVE = "Keeping it alive"
SLURM = "Slurm"
KUBERNETES = "Kubernetes"
VERTEX = "Vertex AI"
SKYPILOT = "SkyPilot"
# Flags of one backend.
TITLES = {
    SLURM: "slurm",
    KUBERNETES: "kubernetes",
    VERTEX: "vertex",
    SKYPILOT: "skypilot",
}
GROUPS = (JOB, NODES, ALIVE, *TITLES)

BACKENDS = ("local", "slurm", "kubernetes", "vertex", "skypilot")
_IMAGES = ("kubernetes", "vertex", "skypilot")
_CLUSTERS = BACKENDS[1:]

# A label of DNS, which is what the strictest backend takes for a name.
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_MAX_NAME = 50


def _field(
    default: Any, group: str, help_text: str, *backends: str, **more: Any
) -> Any:
    return flags.field(
        default, group, help_text, backends=backends or BACKENDS, **more
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags in front of the --."""

    backend: str = _field(
        "local",
        JOB,
        "Where it runs: local, processes of this machine; or a cluster's "
        "scheduler.",
        choices=BACKENDS,
    )
    name: str = _field(
        "",
        JOB,
        "Name of the job: a-z, 0-9 and -. Empty takes the last part of the "
        "run directory.",
        *_CLUSTERS,
    )
    record_dir: str = _field(
        "",
        JOB,
        "Where the job is written down for status, logs, stop and list; empty "
        "is run_dir. Needed where this machine cannot write to run_dir.",
        *_CLUSTERS,
    )
    dry_run: bool = _field(
        False, JOB, "Prints what would be done, and does nothing."
    )

    num_workers: int = _field(
        1,
        NODES,
        "Processes of this machine. More than one sets TF_CONFIG and "
        "--strategy=multi_worker. With the cluster in the environment it stays "
        "1: the other workers have supervisors of their own.",
        "local",
        minimum=1,
        below=1001,
    )
    devices_per_worker: int = _field(
        0,
        NODES,
        "GPUs of each worker, which sees no others; without GPUs, logical CPUs "
        "of one worker. 0 lets each use all that there are.",
        "local",
        minimum=0,
        below=65,
    )
    num_nodes: int = _field(
        1,
        NODES,
        "Machines, with one worker each. More than one sets "
        "--strategy=multi_worker.",
        *_CLUSTERS,
        minimum=1,
        below=10001,
    )
    gpus_per_node: int = _field(
        0, NODES, "GPUs of each.", *_CLUSTERS, minimum=0, below=65
    )
    gpu_type: str = _field(
        "",
        NODES,
        "Their type, as the backend calls it: a100 (Slurm's gres), "
        "nvidia-tesla-a100 (GKE's label), NVIDIA_TESLA_A100 (Vertex), A100 "
        "(SkyPilot).",
        *_CLUSTERS,
    )
    cpus_per_node: int = _field(
        0,
        NODES,
        "CPU cores of each; 0 is the backend's default.",
        "slurm",
        "kubernetes",
        "skypilot",
        minimum=0,
        below=10001,
    )
    memory_gib: int = _field(
        0,
        NODES,
        "Memory of each; 0 is the backend's default.",
        "slurm",
        "kubernetes",
        "skypilot",
        minimum=0,
        below=100001,
    )
    max_hours: float = _field(
        0.0,
        NODES,
        "Time limit of one allocation, after which the job is queued again; "
        "on Vertex it ends the job. 0 is the backend's default.",
        *("slurm", "kubernetes", "vertex"),
        minimum=0.0,
        below=10001.0,
    )
    spot: bool = _field(
        True,
        NODES,
        "Takes machines that may be taken away: cheaper, and the run goes on.",
        *_IMAGES,
    )

    min_workers: int = _field(
        0,
        ALIVE,
        "With how many the run may go on when a worker fails at two starts in "
        "a row that saved nothing new; 0 is all. The next restart tries all "
        "again.",
        "local",
        minimum=0,
    )
    max_restarts: int = _field(
        100,
        ALIVE,
        "Restarts after a crash; those after a notice do not count. Three "
        "crashes in a row without a new save end the run in any case. 0 starts "
        "once.",
        minimum=0,
    )
    max_requeues: int = _field(
        20,
        ALIVE,
        "How often the job is queued again because a node was lost, with "
        "SkyPilot after any failure; preemptions and time limits do not count.",
        *("slurm", "kubernetes", "skypilot"),
        minimum=0,
    )
    grace_secs: float = _field(
        0.0,
        ALIVE,
        "How long the workers may take to save after a notice before they are "
        "killed; 0 is as long as they need, and 60 on Kubernetes.",
        minimum=0.0,
        below=1e9,
    )

    partition: str = _field("", SLURM, "Partition.", "slurm")
    account: str = _field("", SLURM, "Account that is charged.", "slurm")
    qos: str = _field("", SLURM, "Quality of service.", "slurm")
    constraint: str = _field("", SLURM, "Features of the nodes.", "slurm")
    sbatch_arg: tuple[str, ...] = _field(
        (), SLURM, "Any further argument of sbatch.", "slurm"
    )
    module: tuple[str, ...] = _field(
        (), SLURM, "Module to load before the workers start.", "slurm"
    )
    container_image: str = _field(
        "", SLURM, "Image for srun's pyxis plugin.", "slurm"
    )
    container_mount: tuple[str, ...] = _field(
        (),
        SLURM,
        "Further mounts of the container, as /from:/to. The run directory and "
        "the directory of the submission are mounted.",
        "slurm",
    )
    sweep: tuple[str, ...] = _field(
        (),
        SLURM,
        "flag=value,value,...: one run for each combination, in "
        "run_dir/flag=value, as a job array.",
        "slurm",
    )
    max_parallel: int = _field(
        0,
        SLURM,
        "Runs of a sweep at the same time; 0 is all.",
        "slurm",
        minimum=0,
    )

    image: str = _field(
        "",
        KUBERNETES,
        "Container image, with dtrain in its working directory. SkyPilot can "
        "do without one, and brings dtrain itself.",
        *_IMAGES,
    )
    namespace: str = _field("", KUBERNETES, "Namespace.", "kubernetes")
    gang: str = _field(
        "job",
        KUBERNETES,
        "job: an Indexed Job, which any cluster runs. jobset: a JobSet, which "
        "restarts all pods together and needs its operator.",
        "kubernetes",
        choices=("job", "jobset"),
    )
    volume_claim: tuple[str, ...] = _field(
        (),
        KUBERNETES,
        "claim:/path, a PersistentVolumeClaim and where it is mounted.",
        "kubernetes",
    )
    service_account: str = _field(
        "",
        KUBERNETES,
        "Service account of the pods, or of the Vertex job.",
        "kubernetes",
        "vertex",
    )
    node_selector: tuple[str, ...] = _field(
        (), KUBERNETES, "label=value that the nodes must have.", "kubernetes"
    )

    project: str = _field("", VERTEX, "Google Cloud project.", "vertex")
    region: str = _field("", VERTEX, "Region of the job.", "vertex", "skypilot")
    machine_type: str = _field(
        "", VERTEX, "As in a2-highgpu-8g.", "vertex", "skypilot"
    )

    cloud: str = _field(
        "", SKYPILOT, "Cloud; empty takes the cheapest.", "skypilot"
    )

    def __post_init__(self) -> None:
        flags.check(self)
        for each in dataclasses.fields(self):
            backends = each.metadata["backends"]
            is_set = getattr(self, each.name) != each.default
            if is_set and self.backend not in backends:
                raise UserError(
                    f"{each.name} is a flag of --backend="
                    f"{' or '.join(backends)}; with {self.backend} leave it out"
                )
        if self.name and not _is_name(self.name):
            raise UserError(
                f"name ({self.name}) must be of a-z, 0-9 and -, begin with a "
                f"letter, end with no -, and have at most {_MAX_NAME} of them"
            )
        if re.search(r"\s", self.image):
            raise UserError(
                f"image ({self.image!r}) must be as in registry/name:tag"
            )
        if self.gpu_type and not self.gpus_per_node:
            raise UserError(
                f"gpu_type ({self.gpu_type}) needs --gpus_per_node, how many"
            )


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a plan is a function of.

    Attributes:
        options: the flags in front of the --.
        arguments: those behind it, as they were typed.
        parsed: what they mean.
        directory: where the files of the plan go, absolute or `gs://`.
        workdir: the directory that the job was submitted from.
        python: the Python of the submission.
        submitted_secs: when, in seconds since 1970.
    """

    options: Options
    arguments: tuple[str, ...]
    parsed: config.Config
    directory: str
    workdir: str
    python: str
    submitted_secs: int

    @property
    def name(self) -> str:
        """Name of the job; a label of DNS."""
        return self.options.name or _make_name(self.parsed.run_dir)

    @property
    def record_dir(self) -> str:
        """Where the job is written down."""
        # No shell does it behind an equals sign.
        named = os.path.expanduser(self.options.record_dir)
        return named or self.parsed.run_dir

    @property
    def worker_arguments(self) -> tuple[str, ...]:
        """The flags of each worker."""
        if self.options.num_nodes == 1:
            return self.arguments
        return (*self.arguments, "--strategy=multi_worker")

    @property
    def supervisor_arguments(self) -> tuple[str, ...]:
        """The flags of `launch.node`, without where it logs."""
        options = self.options
        arguments = [f"--max_restarts={options.max_restarts}"]
        if options.grace_secs:
            arguments.append(f"--grace_secs={options.grace_secs:g}")
        return tuple(arguments)

    def require(self, *names: str) -> None:
        """Checks that flags are given.

        Args:
            names: of the flags.

        Raises:
            UserError: one is missing.
        """
        for name in names:
            if not getattr(self.options, name):
                raise UserError(
                    f"{name} is missing; --backend={self.options.backend} "
                    f"needs --{name}"
                )

    def require_image(self) -> None:
        """Checks that there is an image, where nothing else has the code.

        Raises:
            UserError: there is none.
        """
        if not self.options.image:
            raise UserError(
                "image is missing; build one with launch/Dockerfile and use "
                "--image=REGISTRY/NAME:TAG"
            )

    def require_store(self) -> None:
        """Checks that the run is where machines that come and go find it.

        Raises:
            UserError: it is on a disk.
        """
        for name in ("run_dir", "checkpoint_dir"):
            path = getattr(self.parsed, name)
            if path and not path.startswith("gs://"):
                raise UserError(
                    f"{name} ({path}) must be on gs://, where the next "
                    f"machines find it; use --{name}=gs://BUCKET/DIRECTORY"
                )

    def require_gpu_type(self) -> None:
        """Checks that GPUs have a type, where the backend has no default.

        Raises:
            UserError: they have none.
        """
        options = self.options
        if options.gpus_per_node and not options.gpu_type:
            raise UserError(
                f"gpus_per_node ({options.gpus_per_node}) needs --gpu_type, "
                f"which {options.backend} has no default for"
            )

    def estimate(self) -> str:
        """Says what one allocation costs at most."""
        options = self.options
        gpus = options.num_nodes * options.gpus_per_node
        what = f"{options.num_nodes} node{'s' * (options.num_nodes > 1)}"
        if gpus:
            what += f" x {options.gpus_per_node} GPUs"
        if not options.max_hours:
            return f"{what}, without a time limit of its own"
        total = (gpus or options.num_nodes) * options.max_hours
        unit = "GPU hours" if gpus else "node hours"
        return f"{what} x {options.max_hours:g} h = {total:,.0f} {unit} at most"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a backend does to submit a job.

    Attributes:
        files: text by name, relative to the job's directory; written there
            before the commands run.
        run_dirs: directories of the runs, more than one of a sweep.
        submit: the command that submits it, or what stands for the call of a
            client library.
        check: a command that asks the scheduler whether it would take the job;
            empty where there is none.
        stdin: name of the file that both commands read; empty if none.
        has_code: whether a copy of the code is written beside the files; not
            where it comes in an image.
    """

    files: Mapping[str, str]
    run_dirs: tuple[str, ...]
    submit: tuple[str, ...]
    check: tuple[str, ...] = ()
    stdin: str = ""
    has_code: bool = False

    def describe(self, directory: str) -> str:
        """Returns what `--dry_run` prints.

        Args:
            directory: the job's.
        """
        parts = [
            f"# {os.path.join(directory, name)}\n{text.rstrip()}\n"
            for name, text in self.files.items()
        ]
        name = shlex.quote(os.path.join(directory, self.stdin))
        end = f" < {name}" if self.stdin else ""
        for command in filter(None, (self.check, self.submit)):
            parts.append(f"$ {shlex.join(command)}{end}")
        return "\n".join(parts)


# How a job can be, whatever its scheduler calls it.
QUEUED, RUNNING = "queued", "running"
FINISHED, FAILED, CANCELLED = "finished", "failed", "cancelled"
UNKNOWN = "unknown"


class State(NamedTuple):
    """How a job is.

    Attributes:
        phase: one of the above.
        details: what its scheduler says, for people.
    """

    phase: str
    details: str


def _is_name(name: str) -> bool:
    return len(name) <= _MAX_NAME and bool(_NAME.fullmatch(name))


def _make_name(run_dir: str) -> str:
    """Makes a name of a path, whatever is in it."""
    last = run_dir.rstrip("/").rpartition("/")[2].lower()
    words = re.sub(r"[^a-z0-9]+", "-", last)[:_MAX_NAME].strip("-")
    return words if _is_name(words) else f"run-{words}".rstrip("-")
