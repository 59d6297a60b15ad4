"""The curves of runs: what stands on which chart, and how it is thinned.

A curve of more points than a page has room for is cut into buckets of as many
lines each. Of a bucket three values are kept: the mean, which is drawn as a
line, and the least and the greatest, between which the chart is shaded: a spike
of one step among 100,000 is seen, however few points there are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dtrain.page import figures
from dtrain.page.run import Run
from dtrain.record import groups
from dtrain.record.goodput import Account
from dtrain.record.reading import Curve

if TYPE_CHECKING:
    from dtrain.record.plotting import Floats

# All curves of a page together, in bytes of its JSON.
_MAX_BYTES = 3_000_000
# Three numbers of five digits, and what stands between them.
_BYTES_PER_POINT = 28
# A screen has no more columns.
_MOST_POINTS = 2000
_FEWEST_POINTS = 40

IMAGES_PER_SEC = "images_per_sec"


class Thinned(NamedTuple):
    """A curve of at most so many points.

    Attributes:
        steps: of the points; of a bucket the middle one.
        values: of the points; of a bucket the mean.
        low: the least of each bucket; None if each point is a value.
        high: the greatest of each bucket; likewise.
        num_per_point: how many values a bucket has, rounded up.
    """

    steps: Floats
    values: Floats
    low: Floats | None
    high: Floats | None
    num_per_point: int


def thin(curve: Curve, most: int) -> Thinned:
    """Thins a curve; see the module.

    Args:
        curve: of any length.
        most: points that it may have afterwards, at least 1.
    """
    number = len(curve.steps)
    if number <= most:
        return Thinned(*curve, None, None, 1)
    edges = np.arange(most + 1) * number // most
    starts = edges[:-1]
    is_finite = np.isfinite(curve.values)
    counts = np.add.reduceat(is_finite, starts, dtype=np.int64)
    with np.errstate(over="ignore", invalid="ignore"):
        # Each divided first: a sum of great values may overflow.
        shares = np.where(is_finite, curve.values, 0.0) / np.repeat(
            np.maximum(counts, 1), np.diff(edges)
        )
        means = np.add.reduceat(shares, starts)
    return Thinned(
        curve.steps[(edges[:-1] + edges[1:] - 1) // 2],
        np.where(counts, means, np.nan),
        # These two take a number rather than a NaN.
        np.fmin.reduceat(curve.values, starts),
        np.fmax.reduceat(curve.values, starts),
        math.ceil(number / most),
    )


def throughput(account: Account) -> Curve:
    """Returns images per second of wall time, by the steps done for good.

    Args:
        account: of a run.
    """
    steps, rates = [], []
    for placed in account.placed:
        for stretch in placed.stretches:
            points = stretch.points
            for before, after in itertools.pairwise(points):
                secs = after.secs - before.secs
                # The ledger has milliseconds.
                if secs >= 0.001 and after.step <= stretch.bound:
                    images = after.step - before.step
                    images *= placed.attempt.batch_size
                    steps.append(float(after.step))
                    rates.append(images / secs)
    return Curve(np.array(steps), np.array(rates))


class _Line(NamedTuple):
    """A curve on a chart.

    Attributes:
        run: number of the run.
        name: beside its colour.
        curve: whole.
        floors: by step, what real images have against real ones.
    """

    run: int
    name: str
    curve: Curve
    floors: Sequence[float] = ()


class _Chart(NamedTuple):
    title: str
    note: str
    lines: Sequence[_Line]


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns what the script of the page draws, of JSON's own types.

    Of one run, losses are on one chart, and so on; of several, each name has a
    chart, with a line for each run. A figure has a chart for each protocol.

    Args:
        runs: at least one.
    """
    all_curves = [_curves(run) for run in runs]
    names = dict.fromkeys(name for curves in all_curves for name in curves)
    # Those of a group first, then the figures, then what is left.
    grouped = sorted(filter(groups.of, names), key=_place)
    others = [name for name in names if not groups.of(name)]
    drawn = [
        *_of_metrics(runs, all_curves, grouped),
        *_of_figures(runs),
        *_of_metrics(runs, all_curves, others),
    ]
    num_lines = sum(len(chart.lines) for chart in drawn)
    room = _MAX_BYTES // (_BYTES_PER_POINT * max(num_lines, 1))
    most = max(_FEWEST_POINTS, min(_MOST_POINTS, room))
    return [_as_json(chart, most) for chart in drawn]


def _of_figures(runs: Sequence[Run]) -> Iterator[_Chart]:
    kinds = dict.fromkeys(kind for run in runs for kind in run.figures)
    for kind in kinds:
        lines = [
            _line_of_figures(number, run.name, run.figures[kind])
            for number, run in enumerate(runs)
            if kind in run.figures
        ]
        yield _Chart(figures.title(kind.name), kind.words, lines)


def _line_of_figures(
    number: int, name: str, measured: Sequence[figures.Figure]
) -> _Line:
    curve = Curve(
        np.array([each.step for each in measured], np.float64),
        np.array([each.value for each in measured], np.float64),
    )
    return _Line(number, name, curve, [each.floor for each in measured])


def _of_metrics(
    runs: Sequence[Run],
    all_curves: Sequence[Mapping[str, Curve]],
    names: Sequence[str],
) -> Iterator[_Chart]:
    shown: dict[str, list[str]] = {}
    for name in names:
        # Of one run, those of a group are on one chart.
        group = groups.of(name) if len(runs) == 1 else ""
        shown.setdefault(figures.title(group or name), []).append(name)
    for group, members in shown.items():
        lines = [
            _Line(
                number,
                runs[number].name if len(runs) > 1 else figures.title(name),
                curves[name],
            )
            for name in members
            for number, curves in enumerate(all_curves)
            if name in curves
        ]
        yield _Chart(group, "", lines)


def _curves(run: Run) -> Mapping[str, Curve]:
    curves = dict(run.metrics.curves)
    rates = throughput(run.account) if run.account else None
    if rates and len(rates.steps):
        curves[IMAGES_PER_SEC] = rates
    return curves


def _place(name: str) -> int:
    return groups.ALL.index(groups.of(name))


def _as_json(chart: _Chart, most: int) -> dict[str, Any]:
    lines = []
    for line in chart.lines:
        thinned = thin(line.curve, most)
        lines.append(
            {
                "run": line.run,
                "name": line.name,
                "x": _numbers(thinned.steps),
                "y": _numbers(thinned.values),
                "low": _numbers(thinned.low),
                "high": _numbers(thinned.high),
                "each": thinned.num_per_point,
                # Of figures of one protocol it is nearly the same at all steps.
                "floor": _middle(line.floors),
            }
        )
    return {"title": chart.title, "note": chart.note, "lines": lines}


def _middle(values: Sequence[float]) -> float | None:
    finite = sorted(value for value in values if math.isfinite(value))
    return _number(finite[len(finite) // 2]) if finite else None


def _numbers(values: Floats | None) -> list[float | None] | None:
    if values is None:
        return None
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | int | None:
    """Writes a value to five digits, and a step to all; None if not finite."""
    if not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 1e15:
        return int(value)
    return float(f"{value:.5g}")
