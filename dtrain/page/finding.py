"""Which runs a page is of: directories of runs, or of a sweep of them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from dtrain.errors import UserError
from dtrain.storage import access, files

# More curves than that nobody tells apart, and a page of all has a limit.
MOST_RUNS = 64

_OF_A_RUN = {"config.json", "ledger", "metrics.jsonl"}


class Place(NamedTuple):
    """Where a run is.

    Attributes:
        directory: of the run.
        name: what it is called on the page; that of no other run there.
    """

    directory: str
    name: str


def find(named: Sequence[str]) -> list[Place]:
    """Finds the runs that a command line names.

    Args:
        named: directories of runs, or of nothing but runs, as a sweep makes
            them; several of them with commas between, where no directory has
            that name, as one of a sweep has.

    Raises:
        UserError: one is not there or no run, or there are too many.
        StorageError: the disk or the store failed.
    """
    paths = [path for text in named for path in _split(text)]
    # Whoever names a run twice, in whatever way, means one.
    found = {
        tuple(_absolute(run)): run for path in paths for run in _runs_of(path)
    }
    if len(found) > MOST_RUNS:
        raise UserError(
            f"run_dir ({', '.join(named)}) names {len(found):,} runs, and a "
            f"page shows at most {MOST_RUNS}; name some of them"
        )
    return _named(list(found.values()))


def _split(text: str) -> list[str]:
    with files.storage_errors(text):
        if "," not in text or files.is_directory(text):
            return [_tidy(text)]
    return [_tidy(part) for part in text.split(",") if part]


def _tidy(path: str) -> str:
    return path.rstrip("/") or "/"


def _runs_of(path: str) -> list[str]:
    """Returns a run, or the runs in a directory.

    Raises:
        UserError: there are none.
    """
    access.check("run_dir", path)
    with files.storage_errors(path):
        names = files.names(path)
        if _OF_A_RUN & set(names):
            return [path]
        runs = [
            f"{path}/{name}"
            for name in sorted(names, key=_natural)
            if _OF_A_RUN & set(files.names(f"{path}/{name}"))
        ]
        if runs:
            return runs
        is_there = files.is_directory(path)
    if not is_there:
        raise UserError(
            f"run_dir ({path}) is not there; name the directory that a run "
            "was started with"
        )
    raise UserError(
        f"run_dir ({path}) holds no run; name the directory that it was "
        "started with"
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts seed=10 behind seed=9."""
    parts = re.split(r"(\d+)", name)
    return [(len(part) * part.isdecimal(), part) for part in parts]


def _named(directories: Sequence[str]) -> list[Place]:
    """Names runs by the parts of their paths in which they differ."""
    whole = [_absolute(directory) for directory in directories]
    if len(whole) == 1:
        return [Place(directories[0], whole[0][-1])]
    parents = zip(*(parts[:-1] for parts in whole), strict=False)
    shared = len(
        list(itertools.takewhile(lambda names: len(set(names)) == 1, parents))
    )
    return [
        Place(directory, "/".join(parts[shared:]))
        for directory, parts in zip(directories, whole, strict=True)
    ]


def _absolute(directory: str) -> list[str]:
    """Returns the parts of a path."""
    if not files.is_remote(directory):
        directory = os.path.abspath(directory)
    return directory.split("/")
