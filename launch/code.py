"""The code of a job, as it was when the job was submitted.

A job may be queued again days later, when the code has been changed, and would
end with other bits. So it runs a copy.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import dtrain
import launch
from dtrain.errors import UserError
from dtrain.storage import files

# What dtrain imports, in versions and hashes.
LOCK = "requirements.lock"
# Starts a module of the copy, where `python -m` would take the one of the
# submission's directory. People give this name to no file of theirs.
RUNNER = "dtrain_runner.py"
_RUNNER = """\
import os, runpy, sys

# What is imported and no Python file, from the directory of the submission.
sys.path.append(os.getcwd())
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

_OF_TENSORFLOW = ("CUDA_", "NCCL_", "OMP_", "TF_", "XLA_")
_SECRET = re.compile("TOKEN|KEY|SECRET|PASS|CRED|CONFIG")

# The copies of earlier jobs, if runs are beside the code: each would hold all
# copies before it.
_COPY = re.compile(r"(^|/)launch/[0-9]{8}-[0-9]{6}(-[0-9a-f]{6})?/code(/|$)")

# Code is small; a directory with more has data in it, or is a home.
_MOST_DIRECTORIES = 20_000
_MOST_FILES = 5000
_MOST_BYTES = 64 << 20


def find(workdir: str) -> dict[str, pathlib.Path]:
    """Finds the code that a run may import, by its path in the copy.

    It is the packages of dtrain, the lock of its requirements, and all Python
    files in and below a directory, but for copies of earlier jobs: those that
    git does not ignore or, without git, those in no hidden directory and no
    virtual environment.

    Args:
        workdir: the directory, in which a user's own model may be.

    Raises:
        UserError: there is too much of it.
    """
    sources: dict[str, pathlib.Path] = {}
    size = 0
    for root, path in _files(pathlib.Path(workdir)):
        size += path.stat().st_size
        sources[str(path.relative_to(root))] = path
        if len(sources) > _MOST_FILES or size > _MOST_BYTES:
            _refuse(workdir)
    return sources


def write(sources: Mapping[str, pathlib.Path], directory: str) -> None:
    """Copies what `find` has found, and writes what starts it.

    Args:
        sources: each file by its path in the copy.
        directory: of the copy, on a disk or gs://; it is made.

    Raises:
        OSError: a file cannot be read or written.
    """
    contents = {name: path.read_bytes() for name, path in sources.items()}
    for name, content in {**contents, RUNNER: _RUNNER.encode()}.items():
        # If a power cut leaves it incomplete, no job is queued yet.
        files.write(
            f"{directory}/{name}", content, is_durable=False, make_parents=True
        )


def versions(workdir: str) -> dict[str, Any]:
    """Describes what a job is submitted with: versions, and the commit.

    Of the environment it has only what changes how TensorFlow computes: any
    other variable may be a secret.

    Args:
        workdir: the directory of the submission.
    """
    packages = {
        package.metadata["Name"]: package.version
        for package in importlib.metadata.distributions()
        if package.metadata["Name"]
    }
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_OF_TENSORFLOW) and not _SECRET.search(name)
        },
        "packages": dict(sorted(packages.items())),
        "commit": _git(workdir, "rev-parse", "HEAD").strip(),
        "changes": _git(workdir, "status", "--short").splitlines(),
    }


def _files(
    workdir: pathlib.Path,
) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Yields the root and path of each file; dtrain's last, for they win."""
    listed = _git(
        str(workdir),
        *("ls-files", "-z", "--cached", "--others", "--exclude-standard"),
        *("--", "*.py"),
    )
    if listed:
        paths = [workdir / name for name in listed.split("\0") if name]
    else:
        paths = list(_walk(workdir))
    for path in sorted(paths):
        is_copy = _COPY.search(path.relative_to(workdir).as_posix())
        if path.is_file() and not is_copy:
            yield workdir, path
    for package in (dtrain, launch):
        directory = pathlib.Path(package.__path__[0])
        for path in sorted(directory.rglob("*")):
            # The digits belong to it, and what a page is made of.
            is_code = path.is_file() and path.suffix not in ("", ".md")
            if is_code and "__pycache__" not in path.parts:
                yield directory.parent, path
    root = pathlib.Path(dtrain.__path__[0]).parent
    lock = root / LOCK
    if lock.is_file():
        yield root, lock


def _walk(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    for count, (directory, names, file_names) in enumerate(os.walk(workdir)):
        if count > _MOST_DIRECTORIES:
            _refuse(workdir)
        names[:] = [
            name
            for name in names
            if not name.startswith(".")
            and name != "__pycache__"
            and not _COPY.search(
                os.path.relpath(os.path.join(directory, name), workdir)
            )
            and not os.path.exists(os.path.join(directory, name, "pyvenv.cfg"))
        ]
        for name in file_names:
            if name.endswith(".py"):
                yield pathlib.Path(directory, name)


def _refuse(workdir: str | pathlib.Path) -> NoReturn:
    raise UserError(
        f"{workdir} holds more than {_MOST_DIRECTORIES:,} directories, "
        f"{_MOST_FILES:,} Python files or {_MOST_BYTES >> 20} MiB of them; "
        "submit from the directory of your code"
    )


def _git(workdir: str, *arguments: str) -> str:
    """Returns what git prints; nothing without git or a repository."""
    try:
        return subprocess.run(
            ["git", "-C", workdir, *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
