"""The two tiers of a run, where they are, and what stays in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dtrain.checkpoint import retention
from dtrain.checkpoint.tier import Backup, Tier
from dtrain.cluster.environment import Cluster
from dtrain.config import Config
from dtrain.run import places


class Tiers(NamedTuple):
    """Where the states of a run are written, by one of its workers.

    Attributes:
        config: the run's settings.
        cluster: the workers, and which of them this is.
        history: what is kept; the chief writes there.
        backup: this worker's newest state; None if it makes no backups.
    """

    config: Config
    cluster: Cluster
    history: Tier
    backup: Backup | None

    @property
    def run_id(self) -> str:
        """Of the run, as config.json says; empty if it does not."""
        return self.history.run.get("id", "")

    def describe(self, run: Mapping[str, Any]) -> None:
        """Says what is written into each manifest from here on.

        Args:
            run: what config.json holds.
        """
        for tier in filter(None, (self.history, self.backup)):
            tier.run = run

    def guard(self, check: Callable[[], None]) -> None:
        """Says what is called before anything is written into a directory."""
        for tier in filter(None, (self.history, self.backup)):
            tier.directory.guard = check

    def clean(self) -> None:
        """Removes what killed saves left behind.

        Raises:
            OSError: a directory cannot be written to.
        """
        if self.cluster.is_chief:
            self.history.directory.clean()
        if self.backup:
            self.backup.directory.clean()

    def forget_after(self, step: int) -> None:
        """Forgets what is newer than a step; see `Tier.forget_after`."""
        self.history.forget_after(step)
        if self.backup:
            self.backup.forget_after(step)


def open_tiers(
    config: Config, cluster: Cluster, run: Mapping[str, Any] | None = None
) -> Tiers:
    """Makes the tiers of a worker; their directories are made by a save."""
    history = Tier(
        places.checkpoint_dir(config),
        policies(config),
        verify=config.verify,
        run=run,
    )
    own = places.backup(config, cluster)
    backup = Backup(own, verify=config.verify, run=run) if own else None
    return Tiers(config, cluster, history, backup)


def policies(config: Config) -> list[retention.Policy]:
    """Returns the policies by which checkpoints of the history stay."""
    chosen = retention.of_flags(config)
    every_steps = config.checkpoint_every_steps
    if every_steps and config.max_rollbacks:
        # A run that diverges goes back to one of these, however often it has
        # saved in between; two, because a collapse is seen late.
        chosen.append(retention.Last(2, of_steps=every_steps))
    return chosen
