"""The flags of `launch.main`, which describe a job, and their backends."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from dtrain import flags
from dtrain.errors import UserError

JOB = "Job"
NODES = "Nodes"
ALIVE = "Keeping it alive"
SLURM = "Slurm"
KUBERNETES = "Kubernetes"
VERTEX = "Vertex AI"
SKYPILOT = "SkyPilot"
# The backend of the flags in a group; one that has others says so.
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
_NOT_VERTEX = ("slurm", "kubernetes", "skypilot")

# Variables that say to workers who they are.
_OURS = re.compile("TF_CONFIG|CLUSTER_SPEC|(DTRAIN|SLURM|SKYPILOT)_.*")
_SECRET = re.compile(
    "TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|API_?KEY|(^|_)KEY(_|$)", re.I
)

# A label of DNS, which is what the strictest backend takes for a name.
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
MAX_NAME = 50


def _field(
    default: Any, group: str, help_text: str, *backends: str, **more: Any
) -> Any:
    own = (TITLES[group],) if group in TITLES else BACKENDS
    return flags.field(
        default, group, help_text, backends=backends or own, **more
    )


@dataclasses.dataclass(frozen=True)
class _Kubernetes:
    """Those of Kubernetes, some of which others have, too."""

    image: str = _field(
        "",
        KUBERNETES,
        "Container image, with dtrain in its working directory. SkyPilot can "
        "do without one, and brings dtrain itself.",
        *_IMAGES,
    )
    namespace: str = _field("", KUBERNETES, "Namespace.")
    gang: str = _field(
        "job",
        KUBERNETES,
        "job: an Indexed Job, which any cluster runs. jobset: a JobSet, which "
        "restarts all pods together and needs its operator.",
        choices=("job", "jobset"),
    )
    volume_claim: tuple[str, ...] = _field(
        (),
        KUBERNETES,
        "claim:/path, a PersistentVolumeClaim and where it is mounted; "
        "claim:/path:ro of data that is only read.",
    )
    service_account: str = _field(
        "",
        KUBERNETES,
        "Service account of the pods, or of the Vertex job.",
        "kubernetes",
        "vertex",
    )
    node_selector: tuple[str, ...] = _field(
        (), KUBERNETES, "label=value that the nodes must have."
    )

    image_pull_secret: tuple[str, ...] = _field(
        (), KUBERNETES, "Secret with which the image is pulled."
    )
    priority_class: str = _field("", KUBERNETES, "Priority class of the pods.")
    toleration: tuple[str, ...] = _field(
        (),
        KUBERNETES,
        "key, key=value or either with :effect, of a taint that the nodes may "
        "have.",
    )
    env_secret: tuple[str, ...] = _field(
        (),
        KUBERNETES,
        "Secret, each key of which becomes a variable of the environment.",
    )
    label: tuple[str, ...] = _field(
        (),
        KUBERNETES,
        "key=value, a label of the job and its pods, as "
        "kueue.x-k8s.io/queue-name=QUEUE.",
    )
    annotation: tuple[str, ...] = _field(
        (), KUBERNETES, "key=value, an annotation of the job and its pods."
    )
    extra_resource: tuple[str, ...] = _field(
        (),
        KUBERNETES,
        "name=count of what each pod needs beside GPUs, as rdma/hca=1.",
    )
    host_network: bool = _field(
        False, KUBERNETES, "The pods use the network of their nodes."
    )
    manifest_patch: str = _field(
        "",
        KUBERNETES,
        "File of YAML or JSON that is merged into the objects; see "
        "docs/kubernetes.md.",
    )


@dataclasses.dataclass(frozen=True)
class Options(_Kubernetes):
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
    env: tuple[str, ...] = _field(
        (),
        JOB,
        "NAME=VALUE, a variable of the workers' environment, as in "
        "--env=NCCL_DEBUG=INFO; docs/nccl.md. Not for secrets, which anybody "
        "could read in the job.",
    )
    check_here: bool = _field(
        True,
        JOB,
        "Looks for the data on this machine, and imports the model, before the "
        "job is queued; --nocheck_here where only the nodes have them.",
        *("slurm", "skypilot"),
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
        "CPU cores of each; 0 is 4 for each GPU on Slurm and Kubernetes, else "
        "the backend's default.",
        *_NOT_VERTEX,
        minimum=0,
        below=10001,
    )
    memory_gib: int = _field(
        0,
        NODES,
        "Memory of each; 0 is 16 for each GPU on Slurm and Kubernetes, else "
        "the backend's default.",
        *_NOT_VERTEX,
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
        *_NOT_VERTEX,
        minimum=0,
    )
    warm_spare: bool = _field(
        True,
        ALIVE,
        "Keeps a process for each worker that has imported TensorFlow and "
        "takes its place at a restart, which saves the import; it takes 0.6 "
        "GiB of memory, 0.2 of it its own alone, and is not kept where 2 GiB "
        "are not free.",
    )
    grace_secs: float = _field(
        0.0,
        ALIVE,
        "How long the workers may take to save after a notice before they are "
        "killed; 0 is as long as they need, and 60 on Kubernetes.",
        minimum=0.0,
        below=1e9,
    )

    partition: str = _field("", SLURM, "Partition.")
    account: str = _field("", SLURM, "Account that is charged.")
    qos: str = _field("", SLURM, "Quality of service.")
    constraint: str = _field("", SLURM, "Features of the nodes.")
    sbatch_arg: tuple[str, ...] = _field(
        (),
        SLURM,
        "Any further flag of sbatch, as in --sbatch_arg=--reservation=night; "
        "what there is a flag for here is refused.",
    )
    module: tuple[str, ...] = _field(
        (), SLURM, "Module to load before the workers start."
    )
    container_image: str = _field("", SLURM, "Image for srun's pyxis plugin.")
    container_mount: tuple[str, ...] = _field(
        (),
        SLURM,
        "Further mounts of the container, as /from:/to. The run directory and "
        "the directory of the submission are mounted.",
    )
    sweep: tuple[str, ...] = _field(
        (),
        SLURM,
        "flag=value,value,...: one run for each combination, in "
        "run_dir/flag=value, as a job array.",
    )
    max_parallel: int = _field(
        0,
        SLURM,
        "Runs of a sweep at the same time; 0 is all.",
        minimum=0,
    )

    project: str = _field("", VERTEX, "Google Cloud project.")
    region: str = _field("", VERTEX, "Region of the job.", "vertex", "skypilot")
    machine_type: str = _field(
        "", VERTEX, "As in a2-highgpu-8g.", "vertex", "skypilot"
    )

    cloud: str = _field("", SKYPILOT, "Cloud; empty takes the cheapest.")

    def __post_init__(self) -> None:
        flags.check(self)
        for flag in dataclasses.fields(self):
            backends = flag.metadata["backends"]
            is_set = getattr(self, flag.name) != flag.default
            if is_set and self.backend not in backends:
                raise UserError(
                    f"{flag.name} is a flag of --backend="
                    f"{' or '.join(backends)}; with {self.backend} leave it out"
                )
            value = getattr(self, flag.name)
            if isinstance(value, tuple) and "" in value:
                raise UserError(
                    f"{flag.name} is given without a value; leave it out"
                )
        if self.name and not is_name(self.name):
            raise UserError(
                f"name ({self.name}) must be of a-z, 0-9 and -, begin with a "
                f"letter, end with no -, and have at most {MAX_NAME} of them"
            )
        for name in ("partition", "account", "qos", "constraint", "gpu_type"):
            value = getattr(self, name)
            if re.search(r"\s", value):
                raise UserError(
                    f"{name} ({value}) must be a word without spaces"
                )
        if re.search(r"\s", self.image):
            raise UserError(
                f"image ({self.image!r}) must be as in registry/name:tag"
            )
        variables(self)
        if self.gpu_type and not self.gpus_per_node:
            raise UserError(
                f"gpu_type ({self.gpu_type}) needs --gpus_per_node, how many"
            )


def variables(options: Options) -> dict[str, str]:
    """Returns what is added to the environment of the workers.

    Args:
        options: the flags; each `env` is as it was typed.

    Raises:
        UserError: one is malformed, there twice, of dtrain, or a secret.
    """
    found: dict[str, str] = {}
    for text in options.env:
        name, equals, value = text.partition("=")
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) or not equals:
            # What is behind the name may be a secret.
            raise UserError(f"env ({name}) must be of the form NAME=VALUE")
        if _OURS.fullmatch(name):
            raise UserError(
                f"env ({name}) is set by dtrain or by the scheduler; leave it "
                "out"
            )
        # The path of a file is none.
        if _SECRET.search(name) and not value.startswith("/"):
            raise UserError(
                f"env ({name}) looks like a secret, which everybody can read "
                "in a job; use --env_secret=SECRET on Kubernetes, elsewhere a "
                "file that only you can read"
            )
        if name in found:
            raise UserError(f"env ({name}) is given twice; leave one out")
        found[name] = value
    return found


def is_name(name: str) -> bool:
    """Tells whether every backend takes a text for the name of a job."""
    return len(name) <= MAX_NAME and bool(_NAME.fullmatch(name))


def make_name(run_dir: str) -> str:
    """Makes the name of a job of a path, whatever is in it."""
    last = run_dir.rstrip("/").rpartition("/")[2].lower()
    words = re.sub(r"[^a-z0-9]+", "-", last)[:MAX_NAME].strip("-")
    if is_name(words):
        return words
    return f"run-{words}"[:MAX_NAME].rstrip("-")
