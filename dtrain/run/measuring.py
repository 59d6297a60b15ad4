"""Measures checkpoints of a run, as `python -m dtrain.evaluate` is asked to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dtrain.checkpoint import listing
from dtrain.cluster.environment import ALONE
from dtrain.cluster.workers import Workers
from dtrain.config import figures as table
from dtrain.data import sources
from dtrain.errors import UserError
from dtrain.quality import choosing, figure_log
from dtrain.quality.evaluation import Evaluation, Wanted
from dtrain.quality.figure_log import Line
from dtrain.quality.real_images import default_cache_dir
from dtrain.quality.saying import Slowly
from dtrain.record import images
from dtrain.run import best, export, places, resuming
from dtrain.storage import files

# Steps in one table: more are wider than a terminal.
_COLUMNS = 6
_BETTER = {"min": "small", "max": "large"}


class Request(NamedTuple):
    """What is to be measured.

    Attributes:
        run_dir: of the run.
        checkpoint: newest, best, all or a step.
        wanted: what is measured of each.
        extractor: see `choosing.make`.
        nearest: samples that are shown beside training images.
        model: that the user names; empty for a built-in one.
        cache_dir: empty is the default.
        settings: of the run, where they are others now, as where its data is.
    """

    run_dir: str
    checkpoint: str
    wanted: Wanted
    extractor: str = "auto"
    nearest: int = 0
    model: str = ""
    cache_dir: str = ""
    settings: Mapping[str, str | int] = {}


def measure(
    request: Request,
    show: Callable[[str], object],
    say: Callable[[str], object],
) -> list[Line]:
    """Measures checkpoints, and adds what was found to the run's figures.

    Args:
        request: which, and how.
        show: called with the lines of the tables.
        say: called with lines of progress.

    Returns:
        What was found, or was known before, in the order of the steps.

    Raises:
        UserError: there is no such run or checkpoint, or it cannot be
            measured in this way.
        StorageError: a disk or a store failed.
    """
    run_dir = request.run_dir
    _check_writable(run_dir)
    trained, run_id = export.build(run_dir, request.model, **request.settings)
    steps = _steps(request, trained, run_id)
    evaluation = _evaluation(request, trained, Slowly(say))
    show(f"protocol  {evaluation.protocol}")
    found = []
    for step in steps:
        try:
            resuming.restore_step(
                trained.gan.checkpoint, trained.config, step, run_id
            )
        except UserError as error:
            # A run that goes on removes some meanwhile.
            if len(steps) == 1:
                raise
            say(f"step {step:,} is left out: {error.text}")
            continue
        line, is_new = _line(evaluation, step, request)
        found.append(line)
        how = f"in {line.secs:.1f} s" if is_new else "before"
        say(f"step {step:,} was measured {how}")
    if not found:
        raise UserError(f"{run_dir}: none of its checkpoints could be read")
    for each in tables(found):
        show(each)
    return found


def _check_writable(run_dir: str) -> None:
    """Refuses, before the work is done, a directory that cannot hold it.

    Raises:
        UserError: it is on a disk, and cannot be written to.
    """
    if os.path.isdir(run_dir) and not os.access(run_dir, os.W_OK):
        raise UserError(
            f"run_dir ({run_dir}) cannot be written to, and the figures go "
            "there; measure a copy of it"
        )


def _evaluation(
    request: Request, trained: export.Trained, say: Slowly
) -> Evaluation:
    """Opens the data, and makes the extractor."""
    gan, config, _ = trained
    data = sources.open_data(config)
    _check_data(data, trained, config.dataset)
    workers = Workers(gan.strategy, ALONE)
    cache_dir = request.cache_dir or default_cache_dir()
    extractor = choosing.make(
        request.extractor, data.source, config, workers, cache_dir, say
    )
    return Evaluation(
        gan, data, extractor, workers, request.wanted, cache_dir, say
    )


def _steps(
    request: Request, trained: export.Trained, run_id: str
) -> Sequence[int]:
    """Finds the steps that are meant, in their order.

    Raises:
        UserError: there is no checkpoint.
        StorageError: the disk or the store failed.
    """
    if request.checkpoint == best.NAME:
        return [best.step_of(request.run_dir)]
    if request.checkpoint.isdecimal():
        return [int(request.checkpoint)]
    with files.storage_errors(request.run_dir):
        found = {
            step
            for place in places.find(trained.config, ALONE, run_id)
            for step in place.directory.steps()
        }
    if not found:
        raise UserError(
            f"run_dir ({request.run_dir}) holds no checkpoint yet; wait until "
            "the run has saved one"
        )
    steps = sorted(found)
    return steps if request.checkpoint == "all" else steps[-1:]


def _check_data(
    data: sources.Data, trained: export.Trained, dataset: str
) -> None:
    """Checks that the data is of the form that the run was trained on.

    Raises:
        UserError: it has another size, or other classes.
    """
    source, wanted = data.source, trained.gan.image_shape
    if source.image_shape != wanted:
        raise UserError(
            f"dataset ({dataset}) has {source.said()}, and those of "
            f"the run are {'x'.join(map(str, wanted))}; name the data that it "
            "was trained on"
        )
    if source.num_classes != trained.num_classes:
        raise UserError(
            f"dataset ({dataset}) has {source.num_classes} classes, and that "
            f"of the run had {trained.num_classes}; name the data that it was "
            "trained on"
        )


def _line(
    evaluation: Evaluation, step: int, request: Request
) -> tuple[Line, bool]:
    """Measures the state that was restored, unless it was before.

    Raises:
        StorageError: the figures cannot be written.
    """
    run_dir = request.run_dir
    with files.storage_errors(figure_log.path(run_dir)):
        lines = figure_log.read(run_dir)
        known = figure_log.find(
            lines,
            step,
            evaluation.protocol,
            evaluation.samples.state(),
            evaluation.names,
        )
        path = figure_log.nearest_path(run_dir, step)
        has_nearest = request.nearest and evaluation.keeps_rows
        is_shown = not has_nearest or files.exists(path)
        if known and is_shown:
            return known, False
        result = evaluation.measure(step, f"ckpt-{step}", lambda: False)
        assert result, "nothing stops it"
        if not known:
            figure_log.append(run_dir, result.line)
        if request.nearest and result.nearest is not None:
            picture = evaluation.samples.beside(
                result.nearest[: request.nearest]
            )
            images.write_png(path, picture)
    return result.line, True


def tables(lines: Sequence[Line]) -> list[str]:
    """Writes figures as tables: a row for each, a column for each step.

    The best of several steps has a star.

    Args:
        lines: of one protocol, by step; at least one.

    Returns:
        The lines of the tables, six steps in each.
    """
    names = list(dict.fromkeys(name for line in lines for name in line.figures))
    best_steps = {name: _best_step(lines, name) for name in names}
    written = []
    for start in range(0, len(lines), _COLUMNS):
        some = lines[start : start + _COLUMNS]
        head = ("figure", "better", *(f"step {line.step:,}" for line in some))
        rows: list[tuple[str, ...]] = [(*head, "floor")]
        for name in names:
            cells = [
                _cell(line.figures.get(name))
                + ("*" if line.step == best_steps[name] else " ")
                for line in some
            ]
            better = ""
            if name in table.FIGURES:
                better = _BETTER[table.best_of(name)]
            floor = _cell(lines[-1].floor.get(name))
            rows.append((name, better, *cells, floor))
        written += ["", *listing.columns(rows)]
    return written


def _best_step(lines: Sequence[Line], name: str) -> int | None:
    """Finds the step with the best value of a figure; None where one is all."""
    known = {
        line.step: value
        for line in lines
        if (value := line.figures.get(name)) is not None
    }
    if name not in table.FIGURES or len(set(known.values())) < 2:
        return None
    sign = -1.0 if table.best_of(name) == "max" else 1.0
    return min(known, key=lambda step: (sign * known[step], -step))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
