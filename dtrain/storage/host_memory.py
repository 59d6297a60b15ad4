"""How much memory this process may still take, as far as can be told."""

from __future__ import annotations

import os
import pathlib
import resource

from dtrain import wording

_PROC = pathlib.Path("/proc")
_CGROUP = pathlib.Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Returns what the machine, the container and the limits leave, in bytes.

    What cannot be read sets no limit.
    """
    limits = [_of_machine(), *_of_cgroups(), *_of_limits()]
    return max(0, min(limits, default=2**63 - 1))


def gib(num_bytes: float) -> str:
    """Says how much memory that is."""
    return f"{wording.three_figures(num_bytes / 2**30)} GiB"


def _of_machine() -> int:
    for line in _text(_PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_cgroups() -> list[int]:
    """Returns what the cgroups of this process leave, version 2 or 1."""
    rooms = []
    for line in _text(_PROC / "self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if not kinds:
            root, most, used = _CGROUP, "memory.max", "memory.current"
            cache = "inactive_file"
        elif "memory" in kinds.split(","):
            root, most = _CGROUP / "memory", "memory.limit_in_bytes"
            used, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        own = root / path.lstrip("/")
        # In a container the path may be the host's, and only the root there.
        for place in {own, *own.parents, root}:
            if place != root and root not in place.parents:
                continue
            limit, taken = _text(place / most), _text(place / used)
            if limit.strip().isdigit() and taken.strip().isdigit():
                free = _number(place / "memory.stat", cache)
                rooms.append(int(limit) - int(taken) + free)
    return rooms


def _of_limits() -> list[int]:
    """Returns what `ulimit` leaves."""
    pages = _text(_PROC / "self/statm").split()
    if not pages:
        return []
    size = os.sysconf("SC_PAGE_SIZE")
    rooms = []
    for kind, taken in (
        (resource.RLIMIT_AS, int(pages[0])),
        (resource.RLIMIT_DATA, int(pages[5])),
    ):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            rooms.append(limit - taken * size)
    return rooms


def _number(path: pathlib.Path, name: str) -> int:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
