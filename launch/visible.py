"""What this machine can see of a job that would fail on its nodes.

It shares disks with the nodes of Slurm, and code with those that get a copy. A
job may wait for days before its nodes see the same.
"""

from __future__ import annotations

import glob
import os
import subprocess
import sys
from collections.abc import Callable

from dtrain import config as config_lib
from dtrain import errors, flags
from dtrain.config import Config, further
from dtrain.config.learning import MODELS
from dtrain.errors import UserError
from dtrain.storage import files, sealed
from launch.backends import sweep
from launch.job import Job

# TensorFlow takes seconds to import, on a busy disk many.
_IMPORT_SECS = 180.0
_LOAD = """\
import sys
from dtrain import errors, flags
from dtrain.gan import loading
errors.exit_with(lambda: loading.load(sys.argv[1]) and 0)
"""
_ERROR = "error: "
_REMEDY = "or add --nocheck_here if the nodes have it"


def check(job: Job) -> None:
    """Looks at the directories, the data and the model of each run of a job.

    Args:
        job: the job; its flags fit each other.

    Raises:
        UserError: its nodes would refuse what is there, or is not there.
        StorageError: a directory cannot be read.
    """
    configs = [
        config_lib.parse(["dtrain.main", *arguments])
        for arguments in sweep.runs(job)
    ]
    options = job.options
    if options.backend == "slurm":
        _each(configs, _check_run_dir, "run_dir")
        if options.check_here:
            names = ("dataset", "paired", "unpaired", "init_from")
            _each(configs, _check_data, *names)
    has_copy = options.backend in ("slurm", "skypilot")
    is_bare = not options.image and not options.container_image
    if options.check_here and has_copy and is_bare:
        _each(configs, lambda config: _check_model(job, config), "model")


def _each(
    configs: list[Config], look: Callable[[Config], None], *names: str
) -> None:
    """Looks once at what has the same values of some flags."""
    by_values = {
        tuple(getattr(config, name) for name in names): config
        for config in configs
    }
    for config in by_values.values():
        look(config)


def settings_before(config: Config) -> Config | None:
    """Reads the settings that a run has begun with, where this can be done.

    What is damaged is in the checkpoints, too, and the run reads those.

    Args:
        config: what it is told now; run_dir counts.

    Returns:
        None where they are not, or cannot be read from here.

    Raises:
        StorageError: the disk does not answer.
    """
    if files.is_remote(config.run_dir):
        return None
    path = os.path.join(config.run_dir, "config.json")
    with files.storage_errors(path):
        data = files.read(path)
    try:
        return config_lib.from_dict(sealed.loads(data or b"")["config"])
    except (sealed.DamagedError, UserError, KeyError, AttributeError):
        return None


def _check_run_dir(config: Config) -> None:
    before = settings_before(config)
    differences = before.differences(config) if before else None
    if differences:
        listed = config_lib.describe(differences)
        raise UserError(
            f"run_dir ({config.run_dir}) belongs to another run: {listed}; use "
            "the same settings, or name another run_dir"
        )


def _check_data(config: Config) -> None:
    for dataset in further.datasets(config):
        kind, colon, path = further.part_of(dataset).dataset.partition(":")
        path = flags.expand_home(path)
        is_path = (
            f"{kind}{colon}" in further.PATHS
            and dataset not in further.POINT_SETS
        )
        if is_path and not files.is_remote(path) and not os.path.exists(path):
            raise UserError(
                f"dataset ({dataset}): there is no {path} on this machine; "
                f"correct it, {_REMEDY}"
            )
    path = flags.expand_home(config.init_from)
    # A checkpoint is named by what its files begin with.
    is_there = os.path.exists(path) or glob.glob(f"{glob.escape(path)}*")
    if path and not files.is_remote(path) and not is_there:
        raise UserError(
            f"init_from ({config.init_from}) is not on this machine; correct "
            f"it, {_REMEDY}"
        )


def _check_model(job: Job, config: Config) -> None:
    if config.model in MODELS:
        return
    command = [job.python, "-c", _LOAD, config.model]
    try:
        done = subprocess.run(
            command,
            cwd=job.workdir,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_search_path())},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_IMPORT_SECS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    else:
        words = [
            line.removeprefix(_ERROR)
            for line in done.stderr.splitlines()
            if line.startswith(_ERROR)
        ]
        if done.returncode == errors.USER_ERROR and words:
            raise UserError(f"{words[-1]}; correct it, {_REMEDY}")
        if not done.returncode:
            return
        # Such as a login node without TensorFlow.
        why = (done.stderr.splitlines() or ["no word"])[-1]
    text = f"model ({config.model}) was not looked at: {why}"
    print(errors.printable(text), file=sys.stderr)


def _search_path() -> list[str]:
    """Returns where Python looks for modules, this dtrain last."""
    before = os.environ.get("PYTHONPATH")
    package = os.path.dirname(os.path.dirname(config_lib.__file__))
    return [*([before] if before else []), os.path.dirname(package)]
