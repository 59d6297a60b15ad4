"""What XLA has compiled, kept on a disk of this machine from start to start.

TensorFlow 2.21 keeps it where TF_XLA_FLAGS says, and takes on trust what lies
there: an entry that is cut short lets every start fail, with `Read less bytes
than requested`. It gives an entry its name once all is written, but syncs
nothing, so that a killed process leaves entries whole, and a crashed machine
may not. Before TensorFlow is let at them, those stay whose digest is on the
disk, or that are of no earlier boot; all else is removed, and compiled again.

    DIR/KEY/0/xla_compile_cache__*.pb    of the first process of a machine
    DIR/KEY/0/sound.json                 their digests
    DIR/KEY/1/                           of one that runs at the same time
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
from collections.abc import Iterator

from dtrain.config import Config
from dtrain.errors import StorageError, UserError
from dtrain.storage import files, locks

_SOUND = "sound.json"
_FLAGS = "TF_XLA_FLAGS"
_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def used(config: Config) -> Iterator[None]:
    """Has XLA keep what it compiles, where `xla_cache_dir` says so.

    Every worker calls this, before it finds its devices: TensorFlow reads
    TF_XLA_FLAGS then, and once. A dry run keeps nothing.

    Args:
        config: of the run.

    Raises:
        UserError: nothing can be kept there.
        StorageError: the disk failed.
    """
    directory = config.xla_cache_dir
    if not directory or config.dry_run:
        yield
        return
    _check(directory)
    given = os.environ.get(_FLAGS, "")
    with contextlib.ExitStack() as stack:
        with files.storage_errors(f"xla_cache_dir ({directory})"):
            key = _key(deterministic=config.deterministic)
            place = _take_place(os.path.join(directory, key), stack)
            _remove_unsound(place)
        os.environ[_FLAGS] = f"{given} {_told(place)}".strip()
        try:
            yield
        finally:
            # Whatever this program starts sees what it was given.
            os.environ[_FLAGS] = given


def fault(config: Config, text: str) -> StorageError | None:
    """Says so where a step has failed because of what is kept.

    Args:
        config: of the run.
        text: of the error; it names the file.

    Returns:
        None if it failed for something else.
    """
    directory = config.xla_cache_dir
    # The place of a process: the directory alone may be any word.
    place = rf"{re.escape(directory.rstrip('/'))}/[0-9a-f]{{16}}/\d+"
    found = re.search(rf"{place}[^;\n]*;\s*([^\n\[]*)", text)
    if not directory or not found:
        return None
    return StorageError(
        f"xla_cache_dir ({directory}): {found[1].strip()}; make room, or leave "
        "it out"
    )


def _check(directory: str) -> None:
    if files.is_remote(directory):
        raise UserError(
            f"xla_cache_dir ({directory}) must be on a disk of each machine; "
            "name a local directory"
        )
    given = os.environ.get(_FLAGS, "").strip()
    if "persistent_cache" in given or (given and not given.startswith("-")):
        raise UserError(
            f"xla_cache_dir ({directory}) is added to {_FLAGS} ({given}), "
            "which names a cache or a file; leave out one of them"
        )


def _key(*, deterministic: bool) -> str:
    """Names what changes the programs, beside what TensorFlow compares."""
    names = importlib.metadata.packages_distributions().get("tensorflow", [])
    described = [
        [
            (name, importlib.metadata.version(name))
            for name in sorted(set(names))
        ],
        [os.environ.get(name, "") for name in (_FLAGS, "XLA_FLAGS")],
        deterministic,
        _lines("/proc/cpuinfo", "model name", "flags", "Features"),
        _lines("/proc/driver/nvidia/version", "NVRM"),
        _lines("/proc/driver/nvidia/gpus/*/information", "Model"),
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _lines(pattern: str, *starts: str) -> list[str]:
    """Returns the different lines of files that start so."""
    found = {
        line
        for path in glob.glob(pattern)
        for line in pathlib.Path(path).read_text("utf-8", "replace").split("\n")
        if line.startswith(starts)
    }
    return sorted(found)


def _take_place(base: str, stack: contextlib.ExitStack) -> str:
    """Locks the first directory that no other process of this machine has.

    Raises:
        UserError: the disk has no locks.
    """
    number = 0
    while True:
        place = os.path.join(base, str(number))
        files.make_directory(place)
        opened = locks.held(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            is_locked = stack.enter_context(opened)
        except BlockingIOError:
            number += 1
            continue
        if is_locked:
            return place
        raise UserError(
            f"xla_cache_dir ({base}) is on a disk without locks, so that two "
            "processes could write there; name a disk of each machine"
        )


def _remove_unsound(place: str) -> None:
    """Removes what may be damaged, and notes the digests of the rest."""
    boot = _BOOT.read_text().strip()
    known, is_same_boot = _noted(place, boot)
    sound = {}
    for name in files.names(place):
        path = os.path.join(place, name)
        if name == _SOUND:
            continue
        if name.endswith(".pb"):
            digest = hashlib.sha256(files.read(path) or b"").hexdigest()
            if name not in known and is_same_boot:
                files.sync(path)
                known[name] = digest
            if known.get(name) == digest:
                sound[name] = digest
                continue
        files.remove(path)
    noted = json.dumps({"boot": boot, "sha256": sound}, indent=1)
    files.write(os.path.join(place, _SOUND), noted.encode())


def _noted(place: str, boot: str) -> tuple[dict[str, str], bool]:
    """Returns the digests that are noted, and whether since this boot."""
    try:
        noted = json.loads(files.read(os.path.join(place, _SOUND)) or b"")
        return dict(noted["sha256"]), noted["boot"] == boot
    except (ValueError, TypeError, KeyError):
        return {}, False


def _told(place: str) -> str:
    """Writes TensorFlow's flags; a path may hold spaces and quotes."""
    quoted = place.replace("\\", r"\\").replace('"', r"\"")
    return (
        f'--tf_xla_persistent_cache_directory="{quoted}" '
        "--tf_xla_persistent_cache_device_types=CPU,GPU"
    )
