"""Looks at the data and at the directory of a run, before all else."""

from __future__ import annotations

import dataclasses
from typing import Any

from dtrain import config as config_lib
from dtrain.cluster import strategy as strategy_lib
from dtrain.cluster.workers import Workers
from dtrain.config import Config, presets
from dtrain.data import sources
from dtrain.run import alike, identity
from dtrain.storage import access


def look(
    config: Config, workers: Workers
) -> tuple[sources.Data, identity.Description, str]:
    """Opens the data and looks at the run's directory; changes nothing.

    Every worker calls this.

    Args:
        config: the run's settings.
        workers: all of them, with the strategy of the run.

    Returns:
        The data; what the run is, with all that its preset has left open; and
        a note if the directory is damaged, otherwise empty.

    Raises:
        UserError: the settings do not fit data, devices or directory.
        StorageError: the directory cannot be read.
    """
    alike.check_flags(config, workers)
    data = workers.together(lambda: _open_data(config))
    alike.check_images(data, workers)
    config = _decided(config, data.source, workers)
    strategy_lib.check_batch(config, workers.strategy)
    source = data.source
    description = identity.Description(
        config,
        source.image_shape,
        source.num_classes,
        source.num_images,
        files=source.digest,
        inputs={
            name: identity.describe_input(each)
            for name, each in data.further.items()
        },
    )
    description, note = workers.together(
        lambda: identity.check(
            description,
            is_chief=workers.is_chief,
            is_alone=not workers.are_several and not config.backup_dir,
        )
    )
    return data, description, note


def _open_data(config: Config) -> sources.Data:
    for name in ("run_dir", "checkpoint_dir", "backup_dir"):
        access.check(name, getattr(config, name))
    return sources.open_data(config)


def _decided(
    config: Config, source: sources.Source, workers: Workers
) -> Config:
    """Decides on the chief what a preset leaves open. Every worker calls this.

    What a run has begun with stays, whatever devices there are now.
    """
    names = config_lib.undecided(config)
    if not names:
        return config

    def decide() -> dict[str, Any]:
        before = identity.settings(config)
        if before is None:
            num_devices = workers.strategy.num_replicas_in_sync
            return presets.decide(max(source.image_shape[:2]), num_devices)
        return before.to_dict()

    values = workers.share(decide)
    return dataclasses.replace(config, **{name: values[name] for name in names})
