"""What is submitted, and what becomes of it: a job, and the plan of a backend.

A backend is a module with these functions. Each raises a UserError where the
scheduler, or what asks it, is missing or refuses, and a StorageError where it
does not answer.

    plan(job)         the files and commands that submit it: pure, so that
                      --dry_run prints it and the tests compare it; a UserError
                      where a flag is missing, malformed, or fits no other
    check(plan)       asks whether the scheduler would take the job, as far as
                      that can be asked, when the files of the plan are written
    submit(job, plan) submits it, after that; returns the id by which the
                      scheduler knows it
    states(submission)
                      how a job is; a state for each run of a sweep
    cancel(submission)
                      ends it
    show_logs(submission, follow, is_over)
                      prints what its workers say; if `follow`, until the job
                      is over, which is_over() tells
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dtrain import config, flags
from dtrain.errors import UserError
from launch import options as options_lib
from launch.options import Options

# What a node is asked for that has GPUs, or Slurm gives one CPU: the pipeline
# of the images needs more. Any machine with GPUs has that.
CPUS_PER_GPU = 4
MEMORY_GIB_PER_GPU = 16


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a plan is a function of.

    Attributes:
        options: the flags in front of the --.
        arguments: the flags behind it, as they were typed.
        parsed: what those mean.
        directory: where the files of the plan go, absolute or `gs://`.
        workdir: the directory that the job was submitted from.
        python: the Python of the submission.
        submitted_secs: when, in seconds since 1970.
        mark: six characters by chance, for another job of the same second.
    """

    options: Options
    arguments: tuple[str, ...]
    parsed: config.Config
    directory: str
    workdir: str
    python: str
    submitted_secs: int
    mark: str

    @property
    def name(self) -> str:
        """Name of the job; a label of DNS."""
        return self.options.name or options_lib.make_name(self.parsed.run_dir)

    @property
    def record_dir(self) -> str:
        """Where the job is written down."""
        # No shell writes out a ~ behind an equals sign.
        named = flags.expand_home(self.options.record_dir)
        return named or self.parsed.run_dir

    @property
    def cpus_per_node(self) -> int:
        """CPUs of each node; 0 is the backend's default."""
        return self.options.cpus_per_node or CPUS_PER_GPU * self._shared_gpus

    @property
    def memory_gib(self) -> int:
        """Memory of each node; 0 is the backend's default."""
        share = MEMORY_GIB_PER_GPU * self._shared_gpus
        return self.options.memory_gib or share

    @property
    def _shared_gpus(self) -> int:
        # The others take whole machines, which have what fits their GPUs.
        is_shared = self.options.backend in ("slurm", "kubernetes")
        return self.options.gpus_per_node if is_shared else 0

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
        if not options.warm_spare:
            arguments.append("--nowarm_spare")
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
        """Checks that an image is named, which alone has the code.

        Raises:
            UserError: none is.
        """
        if not self.options.image:
            raise UserError(
                "image is missing; build one with launch/Dockerfile and use "
                "--image=REGISTRY/NAME:TAG"
            )

    def require_store(self) -> None:
        """Checks that the run is on a store, where other machines find it.

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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a backend does to submit a job.

    Attributes:
        files: text by name, relative to the job's directory; written there
            before the commands run.
        run_dirs: directories of the runs, more than one of a sweep.
        submit: the command that submits it; with a client library, words that
            stand for the call.
        check: a command that asks the scheduler whether it would take the job;
            empty where there is none.
        stdin: name of the file that both commands read; empty if none.
        has_code: whether a copy of the code is written beside the files; else
            it comes in an image.
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


def read_state(
    word: str, phases: Mapping[str, Sequence[str]], details: Iterable[str]
) -> State:
    """Makes a state of what a scheduler says.

    Args:
        word: what it calls the state.
        phases: such words, by the phase; any other word is a failure.
        details: for people.
    """
    known = (phase for phase, words in phases.items() if word in words)
    return State(next(known, FAILED), ", ".join(details))


def forgotten(scheduler: str, job: str) -> list[State]:
    """Says that a scheduler knows a job no more, for `states`."""
    return [State(UNKNOWN, f"{scheduler} has forgotten {job}")]
