"""Which checkpoint of a run is the best: `best`, wherever one is named.

It is that with the best value of `--best_metric`, where the run was told one,
and else of the Fréchet distance. Figures are compared where they were measured
in the same way: in that of the newest line of `figures.jsonl`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from dtrain.checkpoint import listing
from dtrain.config import Config
from dtrain.config import figures as table
from dtrain.errors import UserError
from dtrain.quality import figure_log
from dtrain.record.periodic import Periodic
from dtrain.run import identity
from dtrain.storage import files

NAME = "best"
_USUAL = "frechet_distance"
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}


def step_of(run_dir: str) -> int:
    """Finds the step of the best checkpoint that is there.

    Args:
        run_dir: of the run, on a disk or gs://.

    Raises:
        UserError: there is no run, or none of its checkpoints was measured.
        StorageError: the disk or the store failed.
    """
    return _best(run_dir).step or 0


def prefix_of(path: str) -> str:
    """Returns the checkpoint that RUN_DIR/best means, and any other path as is.

    Args:
        path: of a checkpoint, a directory, or RUN_DIR/best.

    Raises:
        UserError: see `step_of`.
        StorageError: the disk or the store failed.
    """
    run_dir, _, name = path.rstrip("/").rpartition("/")
    is_there = False
    with files.storage_errors(path):
        if name == NAME and not files.exists(path):
            is_there = files.exists(f"{run_dir or '.'}/config.json")
    return _best(run_dir or ".").prefix if is_there else path


def refuse_unknown(
    config: Config, metrics: Iterable[str], figures: Iterable[Periodic]
) -> None:
    """Refuses to look for the best of what is never measured.

    Args:
        config: of the run.
        metrics: of a step, by their names; only a step tells those of a model.
        figures: what is measured beside the steps.

    Raises:
        UserError: `best_metric` is none of them.
    """
    known = {*metrics, *table.FIGURES}
    known.update(*(periodic.names for periodic in figures))
    if config.keep_best and config.best_metric not in known:
        raise UserError(
            f"best_metric ({config.best_metric}) is no metric of this run; "
            f"there are {', '.join(sorted(known))}"
        )


def _best(run_dir: str) -> listing.Row:
    config = identity.read(run_dir).config
    rows = {
        row.step: row
        for row in reversed(listing.find(run_dir))
        if row.state == "whole" and row.step is not None
    }
    metric, mode = config.best_metric, config.best_mode
    if metric == _DEFAULTS["best_metric"]:
        # A loss says little of a GAN.
        metric, mode = _USUAL, "auto"
    if mode == "auto":
        mode = table.best_of(metric)
    if metric in table.FIGURES:
        with files.storage_errors(run_dir):
            values = _measured(run_dir, metric)
    else:
        values = {
            step: value
            for step, row in rows.items()
            if (value := row.metrics.get(metric)) is not None
        }
    known = {step: values[step] for step in rows if step in values}
    if not known:
        raise UserError(
            f"checkpoint (best): no checkpoint of {run_dir} has its {metric} "
            "measured; run python -m dtrain.evaluate "
            f"--run_dir={run_dir} --checkpoint=all, or name a step"
        )
    sign = -1.0 if mode == "max" else 1.0
    # Of two that are as good the later one, as `retention.Best` has it.
    step = min(known, key=lambda step: (sign * known[step], -step))
    return rows[step]


def _measured(run_dir: str, name: str) -> Mapping[int, float]:
    """Returns the values of a figure by their step, all of one protocol."""
    lines = [line for line in figure_log.read(run_dir) if name in line.figures]
    return {
        line.step: value
        for line in lines
        if line.protocol == lines[-1].protocol
        and (value := line.figures[name]) is not None
    }
