"""Where the checkpoints of a run are, by its flags and those of earlier starts.

`run_dir/saved.json` names the directories that the run has saved to. So a flag
that is forgotten, or a disk that is not mounted, is no reason to start over.
"""

from __future__ import annotations

import hashlib
import os

from dtrain.checkpoint import listing
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.going_on import Place
from dtrain.cluster.environment import Cluster
from dtrain.config import Config
from dtrain.storage import files, sealed


def checkpoint_dir(config: Config) -> str:
    """Returns where the history of a run is kept."""
    return config.checkpoint_dir or f"{config.run_dir}/checkpoints"


def backup_root(config: Config) -> str:
    """Returns where a host keeps the backups of a run, of all its workers."""
    run_dir = _absolute(config.run_dir)
    key = hashlib.sha256(run_dir.encode()).hexdigest()[:8]
    return f"{config.backup_dir}/{os.path.basename(run_dir)}-{key}"


def backup(config: Config, cluster: Cluster) -> str | None:
    """Returns where a worker keeps its backups; None if it makes none."""
    if config.backup_dir:
        return f"{backup_root(config)}/worker-{cluster.index}"
    return f"{config.run_dir}/backup" if cluster.is_chief else None


def find(config: Config, cluster: Cluster, run_id: str) -> list[Place]:
    """Lists where a state of the run may be, in order of preference.

    Args:
        config: the run's settings.
        cluster: the workers, and which of them this is.
        run_id: of the run; empty if it is not known.

    Raises:
        OSError: a directory cannot be listed.
    """
    own = backup(config, cluster)
    paths = [checkpoint_dir(config)]
    if config.backup_dir:
        # On a host that was another worker before, they bear that number.
        root = backup_root(config)
        paths += [f"{root}/{name}" for name in files.names(root)]
    paths.append(f"{config.run_dir}/backup")
    paths += listing.recorded(config.run_dir) or []
    chiefs = {paths[0], f"{config.run_dir}/backup"}
    distinct = {_absolute(path): path for path in reversed(paths)}
    return [
        Place(
            CheckpointDirectory(path),
            is_mine=path == own or (cluster.is_chief and path in chiefs),
            run_id=run_id,
        )
        for path in reversed(distinct.values())
    ]


def _absolute(path: str) -> str:
    return path if files.is_remote(path) else os.path.abspath(path)


def record(config: Config, cluster: Cluster) -> None:
    """Notes where a run has saved to; the chief calls this after a commit.

    Raises:
        OSError: the directory cannot be written to.
    """
    before = listing.recorded(config.run_dir) or []
    now = [checkpoint_dir(config), backup(config, cluster) or ""]
    # What is in the run's directory is named from there: it may be moved.
    start = f"{_absolute(config.run_dir)}/"
    directories = {
        _absolute(path).removeprefix(start) for path in (*before, *now)
    }
    path = f"{config.run_dir}/saved.json"
    data = sealed.dumps({"directories": sorted(directories)})
    if files.read(path) != data:
        files.write(path, data)
