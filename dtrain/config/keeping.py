"""Settings of what is saved, and of what is done about a run that fails."""

from __future__ import annotations

import dataclasses

from dtrain import flags

# A resumed run may have other values of all of these.
_saving = flags.fields_of("Saving and resuming", may_change=True)
_divergence = flags.fields_of("Divergence", may_change=True)


@dataclasses.dataclass(frozen=True)
class SavingSettings:
    """What is saved when and where, and what ends a process."""

    checkpoint_every_steps: int = _saving(
        1000,
        "Steps between two checkpoints; 0 saves by the clock alone.",
        minimum=0,
    )
    checkpoint_every_secs: float = _saving(
        0.0,
        "Seconds between two checkpoints; 0 saves by the steps alone.",
        minimum=0.0,
    )
    max_to_keep: int = _saving(
        3, "Newest checkpoints that are kept.", minimum=1
    )
    keep_every_n_steps: int = _saving(
        0,
        "Also keeps, for ever, each checkpoint whose step is a multiple of "
        "this; 0 keeps none.",
        minimum=0,
    )
    keep_near_steps: int = _saving(
        0,
        "Also keeps, for ever, the checkpoint that comes nearest to each "
        "multiple of this many steps, for saves by the clock; 0 keeps none.",
        minimum=0,
    )
    keep_doubling_steps: int = _saving(
        0,
        "Also keeps, for ever, the checkpoints at this step and at 2, 4, 8 and "
        "so on times as many; 0 keeps none.",
        minimum=0,
    )
    keep_every_hours: float = _saving(
        0.0,
        "Also keeps, for ever, checkpoints at least this many hours apart; 0 "
        "keeps none.",
        minimum=0.0,
    )
    keep_within_hours: float = _saving(
        0.0,
        "Also keeps the checkpoints of this many hours before the newest; 0 "
        "keeps none.",
        minimum=0.0,
    )
    keep_best: int = _saving(
        0,
        "Also keeps this many checkpoints with the best --best_metric; 0 keeps "
        "none.",
        minimum=0,
    )
    best_metric: str = _saving(
        "generator_loss",
        "Metric that --keep_best goes by, as it is called in metrics.jsonl.",
    )
    best_mode: str = _saving(
        "auto",
        "Whether the smallest or the largest --best_metric is the best; auto "
        "knows it of figures, and takes the smallest of all else.",
        choices=("auto", "min", "max"),
    )
    checkpoint_dir: str = _saving(
        "",
        "Where the checkpoints are kept, on a disk or gs://; empty is "
        "run_dir/checkpoints. The chief writes there.",
    )
    backup_every_secs: float = _saving(
        60.0,
        "Seconds between two backups, from which a killed run goes on; they "
        "are removed when the run is finished. 0 makes none.",
        minimum=0.0,
    )
    backup_dir: str = _saving(
        "",
        "Fast local directory of each host, where every worker backs up: a "
        "host that is replaced receives the state from another. Empty is "
        "run_dir/backup, by the chief alone.",
    )
    verify: str = _saving(
        "full",
        "How a checkpoint is checked before it is restored, or an older one "
        "is removed: full sums every tensor, sizes only counts bytes.",
        choices=("full", "sizes"),
    )
    on_save_error: str = _saving(
        "continue",
        "What to do when a save fails, as on a full disk: continue says so, "
        "trains on and tries again; stop exits with 74. The last save of a "
        "run must succeed.",
        choices=("continue", "stop"),
    )
    stop_after_secs: float = _saving(
        0.0,
        "Saves and exits with 75 this many seconds after the process was "
        "started; 0 is no limit. The end of a Slurm allocation is known "
        "without it.",
        minimum=0.0,
    )
    grace_secs: float = _saving(
        0.0,
        "Seconds between a notice, such as SIGTERM, and the kill that follows "
        "it: what is not saved by then is left, and the process exits with "
        "75. 0 takes as long as a save takes.",
        minimum=0.0,
    )
    hang_timeout_secs: float = _saving(
        0.0,
        "Seconds without progress after which the process writes the stacks "
        "of all threads to run_dir/stacks and exits with 70; to count from "
        "the end of the first loop of steps on, as 1800 do before. 0 learns "
        "them from the loops after it: ten times the longest pause, and at "
        "least 60.",
        minimum=0.0,
    )


@dataclasses.dataclass(frozen=True)
class DivergenceSettings:
    """When a run goes back, and what it leaves out then."""

    max_rollbacks: int = _divergence(
        10,
        "How often a run that diverges goes back to its last good checkpoint "
        "and skips the data that led there; then it stops. A loss or gradient "
        "that is not finite counts, and what the next two say.",
        minimum=0,
    )
    spike_factor: float = _divergence(
        100.0,
        "A loss this many times over its moving average, and over this "
        "number, has diverged; 0 is never.",
        minimum=0.0,
    )
    collapse_steps: int = _divergence(
        1000,
        "A network that had no gradient (a norm below 1e-7) for this many "
        "steps in a row has collapsed; 0 is never.",
        minimum=0,
    )
    rollback_learning_rate_factor: float = _divergence(
        1.0,
        "What both learning rates are multiplied by each time the run goes "
        "back.",
        minimum=0.0,
    )
