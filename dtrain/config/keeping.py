"""Settings of what is saved, and of what is done about a run that fails."""

from __future__ import annotations

import dataclasses

from dtrain import flags

SAVING = "Saving and resuming"
DIVERGENCE = "Divergence"


@dataclasses.dataclass(frozen=True)
class SavingSettings:
    """What is saved when and where, and what ends a process."""

    checkpoint_every_steps: int = flags.field(
        1000,
        SAVING,
        "Steps between two checkpoints; 0 saves by the clock alone.",
        minimum=0,
        may_change=True,
    )
    checkpoint_every_secs: float = flags.field(
        0.0,
        SAVING,
        "Seconds between two checkpoints; 0 saves by the steps alone.",
        minimum=0.0,
        may_change=True,
    )
    max_to_keep: int = flags.field(
        3,
        SAVING,
        "Newest checkpoints that are kept.",
        minimum=1,
        may_change=True,
    )
    keep_every_n_steps: int = flags.field(
        0,
        SAVING,
        "Also keeps, for ever, each checkpoint whose step is a multiple of "
        "this; 0 keeps none.",
        minimum=0,
        may_change=True,
    )
    keep_doubling_steps: int = flags.field(
        0,
        SAVING,
        "Also keeps, for ever, the checkpoints at this step and at 2, 4, 8 and "
        "so on times as many; 0 keeps none.",
        minimum=0,
        may_change=True,
    )
    keep_every_hours: float = flags.field(
        0.0,
        SAVING,
        "Also keeps, for ever, checkpoints at least this many hours apart; 0 "
        "keeps none.",
        minimum=0.0,
        may_change=True,
    )
    keep_best: int = flags.field(
        0,
        SAVING,
        "Also keeps this many checkpoints with the best --best_metric; 0 keeps "
        "none.",
        minimum=0,
        may_change=True,
    )
    best_metric: str = flags.field(
        "generator_loss",
        SAVING,
        "Metric that --keep_best goes by, as it is called in metrics.jsonl.",
        may_change=True,
    )
    best_mode: str = flags.field(
        "min",
        SAVING,
        "Whether the smallest or the largest --best_metric is the best.",
        choices=("min", "max"),
        may_change=True,
    )
    checkpoint_dir: str = flags.field(
        "",
        SAVING,
        "Where the checkpoints are kept, on a disk or gs://; empty is "
        "run_dir/checkpoints. The chief writes there.",
        may_change=True,
    )
    backup_every_secs: float = flags.field(
        60.0,
        SAVING,
        "Seconds between two backups, from which a killed run goes on; they "
        "are removed when the run is finished. 0 makes none.",
        minimum=0.0,
        may_change=True,
    )
    backup_dir: str = flags.field(
        "",
        SAVING,
        "Fast local directory of each host, where every worker backs up: a "
        "host that is replaced receives the state from another. Empty is "
        "run_dir/backup, by the chief alone.",
        may_change=True,
    )
    verify: str = flags.field(
        "full",
        SAVING,
        "How a checkpoint is checked before it is restored, or an older one "
        "is removed: full sums every tensor, sizes only counts bytes.",
        choices=("full", "sizes"),
        may_change=True,
    )
    on_save_error: str = flags.field(
        "continue",
        SAVING,
        "What to do when a save fails, as on a full disk: continue says so, "
        "trains on and tries again; stop exits with 74. The last save of a "
        "run must succeed.",
        choices=("continue", "stop"),
        may_change=True,
    )
    stop_after_secs: float = flags.field(
        0.0,
        SAVING,
        "Saves and exits with 75 this many seconds after the process was "
        "started; 0 is no limit. The end of a Slurm allocation is known "
        "without it.",
        minimum=0.0,
        may_change=True,
    )
    grace_secs: float = flags.field(
        0.0,
        SAVING,
        "Seconds between a notice, such as SIGTERM, and the kill that follows "
        "it: what is not saved by then is left, and the process exits with "
        "75. 0 takes as long as a save takes.",
        minimum=0.0,
        may_change=True,
    )
    hang_timeout_secs: float = flags.field(
        0.0,
        SAVING,
        "Seconds without progress after which the process writes the stacks "
        "of all threads to run_dir/stacks and exits with 70; to count from "
        "the end of the first loop of steps on, as 1800 do before. 0 learns "
        "them from the loops after it: ten times the longest pause, and at "
        "least 60.",
        minimum=0.0,
        may_change=True,
    )


@dataclasses.dataclass(frozen=True)
class DivergenceSettings:
    """When a run goes back, and what it leaves out then."""

    max_rollbacks: int = flags.field(
        10,
        DIVERGENCE,
        "How often a run that diverges goes back to its last good checkpoint "
        "and skips the data that led there; then it stops. A loss or gradient "
        "that is not finite counts, and what the next two say.",
        minimum=0,
        may_change=True,
    )
    spike_factor: float = flags.field(
        100.0,
        DIVERGENCE,
        "A loss this many times over its moving average, and over this "
        "number, has diverged; 0 is never.",
        minimum=0.0,
        may_change=True,
    )
    collapse_steps: int = flags.field(
        1000,
        DIVERGENCE,
        "A network that had no gradient (a norm below 1e-7) for this many "
        "steps in a row has collapsed; 0 is never.",
        minimum=0,
        may_change=True,
    )
    rollback_learning_rate_factor: float = flags.field(
        1.0,
        DIVERGENCE,
        "What both learning rates are multiplied by each time the run goes "
        "back.",
        minimum=0.0,
        may_change=True,
    )
