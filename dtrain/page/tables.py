"""The tables of a page: runs beside each other, time, settings, origins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dtrain.page import figures, run, settings
from dtrain.page.markup import number, scrolling, section, swatch, table, text
from dtrain.page.run import Run
from dtrain.quality.figure_log import Protocol
from dtrain.record import goodput

# Numbers of the colours.
_COLORS_OF_TIME = {
    **{"useful": 2, "redone": 1, "save": 6, "draw": 5, "restore": 4},
    **{"start": 8, "compile": 3, "other": 7, "idle": 11, "evaluate": 0},
}
_ARROWS = {"min": " \N{DOWNWARDS ARROW}", "max": " \N{UPWARDS ARROW}", "": ""}
# A program may have any number of metrics.
_MOST_METRICS = 24


class _Cell(NamedTuple):
    """What is shown, as HTML, and what is sorted by."""

    shown: str = ""
    value: str = ""


class _Column(NamedTuple):
    title: str
    cells: Sequence[_Cell]
    is_number: bool = True


def of_runs(runs: Sequence[Run]) -> str:
    """Puts runs beside each other, to be sorted by any column.

    Args:
        runs: at least one.
    """
    kinds = list(dict.fromkeys(kind for each in runs for kind in each.figures))
    protocols = run.protocols(runs)
    columns = [
        _names(runs),
        *(_of_figure(kind, protocols, runs) for kind in kinds),
        *_settings(runs),
        *_facts(runs),
        *_of_metrics(runs),
    ]
    heads = "".join(
        '<th scope="col" aria-sort="none"><button type="button">'
        f"{column.title}</button></th>"
        for column in columns
    )
    rows = "".join(
        f"<tr>{''.join(_cell(column, index) for column in columns)}</tr>"
        for index in range(len(runs))
    )
    notes = [
        f"protocol {index}: {text(protocol)}"
        for index, protocol in enumerate(protocols, 1)
    ]
    notes.append(
        "A figure is the best of all steps where an arrow says which is the "
        "best; all else is the newest. The head of a column sorts by it."
    )
    return section(
        "Numbers",
        scrolling(
            f'<table class="sortable"><thead><tr>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table>",
            "numbers of the runs",
        )
        + "".join(f'<p class="soft">{note}</p>' for note in notes),
        "numbers",
    )


def _cell(column: _Column, index: int) -> str:
    shown, value = column.cells[index]
    kind = ' class="number"' if column.is_number else ""
    return f'<td{kind} data-value="{value}">{shown}</td>'


def _texts(title: str, values: Sequence[str]) -> _Column:
    cells = [_Cell(text(value), text(value)) for value in values]
    return _Column(text(title), cells, is_number=False)


def _numbers(title: str, values: Sequence[float | None]) -> _Column:
    return _Column(title, [_number(value) for value in values])


def _number(value: float | None, more: str = "") -> _Cell:
    if value is None or not math.isfinite(value):
        return _Cell()
    return _Cell(f"{number(value)}{more}", repr(float(value)))


def _names(runs: Sequence[Run]) -> _Column:
    cells = [
        _Cell(f"{swatch(index)}{text(each.name)}", text(each.name))
        for index, each in enumerate(runs)
    ]
    return _Column("run", cells, is_number=False)


def _facts(runs: Sequence[Run]) -> list[_Column]:
    accounts = [each.account for each in runs]
    return [
        _texts("state", [_state(each) for each in runs]),
        _numbers("steps", [each.metrics.num_steps for each in runs]),
        _numbers("images/s", [a and run.images_per_sec(a) for a in accounts]),
        _Column(
            "time",
            [
                _Cell(goodput.clock(a.wall_secs), repr(a.wall_secs))
                if a
                else _Cell()
                for a in accounts
            ],
        ),
        _Column(
            "goodput",
            [
                _Cell(f"{a.goodput:.0%}", repr(a.goodput)) if a else _Cell()
                for a in accounts
            ],
        ),
    ]


def _state(each: Run) -> str:
    return goodput.ending(each.last) if each.last else ""


def _settings(runs: Sequence[Run]) -> list[_Column]:
    names = settings.differing([each.settings for each in runs])
    return [
        _texts(name, [settings.value(each.settings, name) for each in runs])
        for name in names
    ]


def _of_figure(
    kind: figures.Kind, protocols: Sequence[Protocol], runs: Sequence[Run]
) -> _Column:
    cells = []
    for each in runs:
        best = figures.best(kind, each.figures.get(kind, ()))
        if not best:
            cells.append(_Cell())
            continue
        error = f" ± {number(best.error)}" if number(best.error) else ""
        more = f'{error} <span class="soft">at {best.step:,}</span>'
        cells.append(_number(best.value, more))
    title = f"{text(figures.title(kind.name))}{_ARROWS[kind.best]}"
    if len(protocols) > 1:
        title += f" (protocol {protocols.index(kind.protocol) + 1})"
    return _Column(title, cells)


def _of_metrics(runs: Sequence[Run]) -> list[_Column]:
    names = list(
        dict.fromkeys(name for each in runs for name in each.metrics.curves)
    )
    return [
        _numbers(text(figures.title(name)), [_newest(r, name) for r in runs])
        for name in names[:_MOST_METRICS]
    ]


def _newest(each: Run, name: str) -> float | None:
    if name not in each.metrics.curves:
        return None
    values = each.metrics.curves[name].finite().values
    return float(values[-1]) if len(values) else None


def of_time(runs: Sequence[Run]) -> str:
    """Says where every second went.

    Args:
        runs: at least one.
    """
    accounts = [(each, each.account) for each in runs if each.account]
    if not accounts:
        return ""
    bars = "".join(
        (f"<h3>{text(each.name)}</h3>" if len(runs) > 1 else "") + _bar(account)
        for each, account in accounts
    )
    rows = [
        [
            swatch(_color(kind)) + label,
            *(_share(account, kind) for _, account in accounts),
        ]
        for kind, label in goodput.LABELS.items()
    ]
    rows.append(["all", *(goodput.clock(a.wall_secs) for _, a in accounts)])
    names = [text(each.name) for each, _ in accounts]
    return section(
        "Where every second went",
        bars + table(["", *names], rows, "h:mm:ss of wall time, and its share"),
        "time",
    )


def _bar(account: goodput.Account) -> str:
    parts = "".join(
        f'<span data-kind="{kind}" style="--c:var(--c{_color(kind)});'
        f'flex-grow:{account.seconds[kind]:.6g}"></span>'
        for kind in goodput.LABELS
    )
    return f'<div class="bar" aria-hidden="true">{parts}</div>'


def _color(kind: str) -> int:
    return _COLORS_OF_TIME.get(kind, 0)


def _share(account: goodput.Account, kind: str) -> str:
    secs = account.seconds[kind]
    share = secs / max(account.wall_secs, 1e-9)
    return f"{goodput.clock(secs)} ({share:.1%})"


def of_settings(runs: Sequence[Run]) -> str:
    """Lists the settings of each run that are not the defaults.

    Args:
        runs: at least one.
    """
    parts = []
    for index, each in enumerate(runs):
        if not each.settings:
            continue
        rows = [
            [f"<code>{text(name)}</code>", text(value), text(default)]
            for name, (value, default) in settings.unusual(
                each.settings
            ).items()
        ]
        content = "<p>all are the defaults</p>"
        if rows:
            content = table(["setting", "value", "default"], rows)
        parts.append(_folded(runs, index, content))
    return section("Settings that differ from defaults", "".join(parts))


def _folded(runs: Sequence[Run], index: int, content: str) -> str:
    """Folds what is said of one run, where there are several."""
    if len(runs) == 1:
        return content
    name = swatch(index) + text(runs[index].name)
    return f"<details><summary>{name}</summary>{content}</details>"


def of_origins(runs: Sequence[Run]) -> str:
    """Says which versions wrote each run, and what tells states apart.

    Args:
        runs: at least one.
    """
    rows = []
    for index, each in enumerate(runs):
        versions = ", ".join(
            f"{name} {version}" for name, version in each.versions.items()
        )
        rows.append(
            [
                swatch(index) + text(each.name),
                text(each.directory),
                text(versions),
                text(each.newest),
                f"<code>{text(each.state)}</code>" if each.state else "",
            ]
        )
    heads = ["run", "directory", "versions", "newest checkpoint", "state"]
    return section("Versions and states", table(heads, rows))
