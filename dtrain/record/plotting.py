"""Draws a run on one time line: losses, throughput, and the attempts.

Nothing here reads a file or imports TensorFlow.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib import patches
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dtrain.record.goodput import Account, Placed, Stretch

Floats = npt.NDArray[np.float64]

# Readable to those who tell few colors apart (Okabe and Ito).
_COLORS = {"starting": "#e69f00", "useful": "#009e73", "redone": "#d55e00"}
# More dots than the picture has columns tell nothing.
_MAX_DOTS = 1500


class _Bar(NamedTuple):
    """A part of an attempt, in seconds of the time line."""

    kind: str
    start: float
    end: float


def draw(
    account: Account,
    losses: Mapping[str, tuple[Floats, Floats]],
    title: str,
) -> bytes:
    """Returns the picture as the bytes of a PNG file.

    Args:
        account: of the run.
        losses: by name, two arrays [n]: the steps, ascending, and the values.
        title: of the picture.
    """
    figure = Figure(figsize=(12, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, rate_axes, band_axes = figure.subplots(
        3, 1, sharex=True, height_ratios=(5, 3, 1)
    )
    unit, unit_name = _unit(account.wall_secs)
    figure.suptitle(title)
    _draw_losses(loss_axes, account, losses, unit)
    _draw_rate(rate_axes, account, unit)
    _draw_band(band_axes, account, unit)
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.25)
        _mark_restarts(axes, account, unit)
    band_axes.set_xlim(0, max(account.wall_secs, 1e-3) / unit)
    band_axes.set_xlabel(f"wall time since the first start ({unit_name})")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _unit(secs: float) -> tuple[float, str]:
    """Returns the seconds of a unit of the time axis, and its name."""
    if secs < 300:
        return 1.0, "seconds"
    if secs < 3 * 3600:
        return 60.0, "minutes"
    return (3600.0, "hours") if secs < 96 * 3600 else (86400.0, "days")


def _draw_losses(
    axes: Axes,
    account: Account,
    losses: Mapping[str, tuple[Floats, Floats]],
    unit: float,
) -> None:
    lows, highs = [], []
    for index, (name, (steps, values)) in enumerate(losses.items()):
        label: str | None = name.replace("_", " ")
        for times, part in _on_time_line(account, steps, values):
            axes.plot(
                times / unit, part, color=f"C{index}", label=label, lw=0.9
            )
            label = None
        finite = values[np.isfinite(values)]
        if finite.size:
            lows.append(float(finite.min()))
            highs.append(float(np.percentile(finite, 99.9)))
    if lows and min(lows) > 0 and max(highs) > 50 * min(lows):
        axes.set_yscale("log")
    elif lows and min(lows) <= 0 and max(highs) - min(lows) > 1e3:
        axes.set_yscale("symlog")
    axes.set_ylabel("loss")
    if lows:
        # Above, where it hides no curve.
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=len(losses),
            frameon=False,
        )


def _on_time_line(
    account: Account, steps: Floats, values: Floats
) -> Iterable[tuple[Floats, Floats]]:
    """Yields the times and the means of a curve, one part for each stretch."""
    block = math.ceil(max(len(steps), 1) / _MAX_DOTS)
    for placed in account.placed:
        for stretch in placed.stretches:
            known_times, known_steps = _useful_points(placed, stretch)
            inside = (steps > known_steps[0]) & (steps <= known_steps[-1])
            if inside.any():
                times = np.interp(steps[inside], known_steps, known_times)
                yield _means(times, block), _means(values[inside], block)


def _useful_points(
    placed: Placed, stretch: Stretch
) -> tuple[list[float], list[float]]:
    """Returns times, and the useful steps that a stretch was at then."""
    useful = [point for point in stretch.points if point.step <= stretch.bound]
    # It may have begun above what a later attempt went back to.
    useful = useful or [stretch.points[0]]
    times = [point.secs for point in useful]
    steps = [float(point.step) for point in useful]
    if stretch.points[-1].step > stretch.bound > steps[-1]:
        times.append(stretch.secs_at(stretch.bound))
        steps.append(stretch.bound)
    elif placed.unwritten_steps and stretch is placed.stretches[-1]:
        times.append(times[-1] + placed.unwritten_secs)
        steps.append(steps[-1] + placed.unwritten_steps)
    return times, steps


def _means(values: Floats, block: int) -> Floats:
    """Returns the mean of each block of values; the last may be shorter."""
    if block == 1:
        return values
    starts = np.arange(0, len(values), block)
    lengths = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(values, starts) / lengths


def _draw_rate(axes: Axes, account: Account, unit: float) -> None:
    """Draws how many images a second were trained on, again or not."""
    times, images = [0.0], [0.0]
    for placed in account.placed:
        for stretch in placed.stretches:
            first = images[-1]
            for point in stretch.points:
                steps = point.step - stretch.points[0].step
                times.append(max(point.secs, times[-1]))
                images.append(first + steps * placed.attempt.batch_size)
        if placed.unwritten_steps:
            times.append(times[-1] + placed.unwritten_secs)
            more = placed.unwritten_steps * placed.attempt.batch_size
            images.append(images[-1] + more)
    # Where the records are coarse, the bins are.
    num_bins = max(20, min(400, len(times) // 2))
    edges = np.linspace(0, max(account.wall_secs, 1e-3), num_bins + 1)
    rate = np.diff(np.interp(edges, times, images)) / np.diff(edges)
    axes.stairs(rate, edges / unit, fill=True, alpha=0.6, color="C7")
    axes.set_ylabel("images/s")
    axes.set_ylim(bottom=0)


def _draw_band(axes: Axes, account: Account, unit: float) -> None:
    bars = [bar for placed in account.placed for bar in _bars(placed)]
    for kind, color in _COLORS.items():
        spans = [
            (bar.start / unit, (bar.end - bar.start) / unit)
            for bar in bars
            if bar.kind == kind
        ]
        axes.broken_barh(spans, (0, 1), color=color, linewidth=0)
    secs = {
        kind: account.seconds[kind] for kind in ("useful", "redone", "idle")
    }
    starts = ("start", "restore", "compile")
    secs = {"starting": sum(account.seconds[kind] for kind in starts), **secs}
    wall = max(account.wall_secs, 1e-9)
    axes.legend(
        handles=[
            patches.Patch(
                facecolor=_COLORS.get(kind, "white"),
                edgecolor="0.6",
                label=f"{kind} {spent / wall:.1%}",
            )
            for kind, spent in secs.items()
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.75),
        ncols=len(secs),
        frameon=False,
    )
    axes.set_ylabel("attempts", rotation=0, ha="right", va="center")
    axes.set_yticks([0.5], [f"{len(account.placed):,}"])
    axes.set_ylim(0, 1)
    _mark_restarts(axes, account, unit)


def _bars(placed: Placed) -> Sequence[_Bar]:
    """Splits an attempt, roughly: starting, useful steps, redone steps."""
    if not placed.stretches:
        return [_Bar("starting", placed.start, placed.end)]
    bars = []
    start = placed.start
    for index, stretch in enumerate(placed.stretches):
        points = stretch.points
        # In its first loop an attempt compiles the step.
        first = points[min(1, len(points) - 1)] if not index else points[0]
        bars.append(_Bar("starting", start, first.secs))
        last = max(first.secs, points[-1].secs)
        if index == len(placed.stretches) - 1:
            last = placed.end + placed.unwritten_secs
        turn = last
        if points[-1].step > stretch.bound:
            turn = max(first.secs, stretch.secs_at(stretch.bound))
        bars += [_Bar("useful", first.secs, turn), _Bar("redone", turn, last)]
        start = last
    return bars


def _mark_restarts(axes: Axes, account: Account, unit: float) -> None:
    is_sparse = len(account.placed) <= 30
    for placed in account.placed[1:]:
        axes.axvline(
            placed.start / unit,
            color="0.3",
            lw=0.8 if is_sparse else 0.4,
            alpha=0.7 if is_sparse else 0.4,
            ls="--",
        )
