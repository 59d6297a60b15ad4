"""Writes the page: one HTML file that needs neither a network nor a server.

The curves are drawn by uPlot 1.6.32 (https://github.com/leeoniya/uPlot, MIT),
whose one file of 51 kB stands in the page. Curves of our own in SVG would need
its parts again: axes, scales, the cursor that all charts share, and speed for
thousands of points on a phone; no larger library is needed for that.

Whatever comes from a file is escaped. A policy in the page lets the browser run
our two scripts alone, known by their digests, and fetch nothing at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain import errors
from dtrain.page import curves, figures, tables
from dtrain.page import run as run_lib
from dtrain.page.markup import NUM_COLORS, section, swatch, text
from dtrain.page.pictures import Picture, Pictures
from dtrain.page.run import Run

# How a page begins; what begins otherwise is no page of ours.
BEGINNING = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="generator" content="dtrain.gallery">'
)
_HERE = pathlib.Path(__file__).parent
# The newest, where there are more.
_MOST_MARKS = 300


def render(
    runs: Sequence[Run], pictures: Pictures, made: str, reload_secs: int = 0
) -> bytes:
    """Returns the page.

    Args:
        runs: at least one.
        pictures: reads those of the runs.
        made: when the page was made, in words.
        reload_secs: after which the browser reads the page again; 0 is never.

    Raises:
        StorageError: the disk or the store failed.
    """
    pictures.begin(len(runs))
    films = [_film(run, pictures) for run in runs]
    charts = curves.charts(runs)
    shown = _of_pictures(runs, films, pictures)
    notes = [*(note for run in runs for note in run.notes), *pictures.notes]
    body = "".join(
        (
            _header(runs, made, reload_secs),
            "<main>\n",
            tables.of_runs(runs),
            shown,
            _of_curves(charts, len(runs)),
            _of_events(runs),
            tables.of_time(runs),
            tables.of_settings(runs),
            tables.of_origins(runs),
            _of_notes(runs, films, charts, notes),
            "</main>\n",
        )
    )
    data = {
        "runs": [_plain(run.name) for run in runs],
        "charts": charts,
        "marks": [
            {"run": number, **mark._asdict()}
            for number, run in enumerate(runs)
            for mark in run_lib.marks(run)[-_MOST_MARKS:]
        ],
        "films": [_frames(film) for film in films],
        "film_steps": sorted({step for film in films for step in film}),
        "reload_secs": reload_secs,
    }
    return _whole(_title(runs), body, data).encode()


def _plain(name: str) -> str:
    return errors.printable(name)


def _title(runs: Sequence[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"


def _whole(title: str, body: str, data: Mapping[str, Any]) -> str:
    own = map(_file, ("base.js", "curves.js", "film.js"))
    scripts = [_file("uPlot.iife.min.js"), "".join(own)]
    allowed = " ".join(f"'{_digest(script)}'" for script in scripts)
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src {allowed}; base-uri 'none'; form-action 'none'"
    )
    # A name with </script> in it would end the element.
    values = json.dumps(data, separators=(",", ":"), allow_nan=False)
    values = values.replace("<", "\\u003c")
    return "".join(
        (
            BEGINNING,
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, '
            'initial-scale=1"><link rel="icon" href="data:,">',
            f"<title>{text(title)}</title>\n",
            f"<style>{_file('uPlot.min.css')}\n{_file('page.css')}</style>",
            f"</head>\n<body>\n{body}",
            f"<!-- uPlot: {_file('uPlot.LICENSE')} -->\n",
            f'<script id="data" type="application/json">{values}</script>\n',
            *(f"<script>{script}</script>\n" for script in scripts),
            "</body></html>\n",
        )
    )


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _header(runs: Sequence[Run], made: str, reload_secs: int) -> str:
    lines = "".join(
        f"<p>{swatch(index)}<strong>{text(run.name)}</strong>: "
        f"{text(run_lib.in_a_line(run))}</p>"
        for index, run in enumerate(runs)
    )
    if len(runs) == 1:
        lines = f"<p>{text(run_lib.in_a_line(runs[0]))}</p>"
    else:
        lines = (
            f"<details><summary>each in a line</summary>{lines}</details>"
            + "".join(
                f"<p>best: {text(line)}</p>"
                for line in run_lib.best_by_figure(runs)
            )
        )
    follow = (
        f'<label class="row"><input type="checkbox" id="follow" checked> '
        f"reads itself again every {reload_secs} s, while training goes on"
        "</label>"
        if reload_secs
        else ""
    )
    return (
        f"<header><h1>{text(_title(runs))}</h1>{lines}"
        f'<p class="soft">made {text(made)} by dtrain.gallery</p>{follow}'
        "<noscript><p>Without scripts this page shows no curves, and of the "
        "film the last frame.</p></noscript></header>\n"
    )


def _film(run: Run, pictures: Pictures) -> dict[int, Picture]:
    """Returns the frames of a run; the newest is a still, for it is large."""
    film = pictures.film(run.grids)
    if film:
        newest = max(film)
        film[newest] = pictures.still(run.grids[newest]) or film[newest]
    return film


def _frames(film: Mapping[int, Picture]) -> list[dict[str, Any]]:
    """Returns the frames for the script; the last stands in the page itself."""
    frames: list[dict[str, Any]] = [
        {"step": step, "source": picture.source}
        for step, picture in sorted(film.items())
    ]
    if frames:
        frames[-1]["source"] = None
    return frames


def _of_pictures(
    runs: Sequence[Run],
    films: Sequence[Mapping[int, Picture]],
    pictures: Pictures,
) -> str:
    slider = ""
    num_steps = len({step for film in films for step in film})
    if num_steps > 1:
        slider = (
            '<div class="row"><button type="button" id="play">play</button>'
            f'<input type="range" id="step" min="0" max="{num_steps - 1}" '
            f'value="{num_steps - 1}" aria-label="step of the samples">'
            '<output id="film-step"></output></div>'
        )
    cards = []
    for number, (run, film) in enumerate(zip(runs, films, strict=True)):
        content = _frame(number, film) + _stills(run, pictures)
        if not content:
            content = '<p class="soft">no picture yet</p>'
        name = f"<h3>{swatch(number)}{text(run.name)}</h3>"
        title = name if len(runs) > 1 else ""
        cards.append(f'<div class="card">{title}{content}</div>')
    kind = "cards one" if len(runs) == 1 else "cards"
    return section(
        "Samples",
        f'{slider}<div class="{kind}">{"".join(cards)}</div>',
        "samples",
    )


def _frame(number: int, film: Mapping[int, Picture]) -> str:
    if not film:
        return ""
    step = max(film)
    words = f"samples of step {step:,}"
    return _figure(film[step], words, f' data-run="{number}"')


def _figure(picture: Picture, words: str, more: str = "") -> str:
    kind = ' class="small"' if picture.is_small else ""
    return (
        f'<figure><img{kind} src="{picture.source}" width="{picture.width}" '
        f'height="{picture.height}" alt="{text(words)}"{more}>'
        f"<figcaption>{text(words)}</figcaption></figure>"
    )


def _stills(run: Run, pictures: Pictures) -> str:
    wanted = []
    if run.best_grid:
        kind, figure = run.best_grid
        wanted.append(
            (
                run.grids[figure.step],
                f"best samples by {figures.title(kind.name)}: "
                f"{figure.value:.4g} at step {figure.step:,}",
            )
        )
    wanted.append((f"{run.directory}/reals.png", "real images"))
    wanted.append((f"{run.directory}/init.png", "samples before training"))
    if run.nearest:
        step = max(run.nearest)
        words = f"step {step:,}: a sample, then its nearest training images"
        wanted.append((run.nearest[step], words))
    found = [(pictures.still(path), words) for path, words in wanted]
    stills = "".join(
        _figure(picture, words) for picture, words in found if picture
    )
    return f'<div class="stills">{stills}</div>' if stills else ""


_ZOOM = "".join(
    f'<button type="button" data-zoom="{name}" aria-label="{label}">{sign}'
    "</button>"
    for name, sign, label in (
        ("in", "+", "zoom in"),
        ("out", "\N{MINUS SIGN}", "zoom out"),
        ("left", "\N{LEFTWARDS ARROW}", "earlier steps"),
        ("right", "\N{RIGHTWARDS ARROW}", "later steps"),
        ("whole", "whole", "all steps"),
    )
)


def _of_curves(charts: Sequence[Mapping[str, Any]], num_runs: int) -> str:
    if not charts:
        return ""
    tools = (
        f'<div class="row">{_ZOOM}<label class="row"><input type="checkbox" '
        'id="log"> logarithmic</label><label class="row">smooth <input '
        'type="range" id="smooth" min="0" max="0.99" step="0.01" value="0">'
        '</label><output id="range"></output></div>'
        '<p class="soft">Drag over a part of a chart to zoom, or use two '
        "fingers; a double click shows all again. On a chart that has the "
        "focus: \N{LEFTWARDS ARROW} \N{RIGHTWARDS ARROW} move the cursor, "
        "+ and - zoom, PageUp and PageDown go on, 0 shows all.</p>"
    )
    parts = "".join(_chart(chart, num_runs) for chart in charts)
    return section("Curves", f'{tools}<div class="charts">{parts}</div>')


def _chart(chart: Mapping[str, Any], num_runs: int) -> str:
    title, note = text(chart["title"]), text(chart["note"])
    buttons = []
    for number, line in enumerate(chart["lines"]):
        key = f"run {line['run']}" if num_runs > 1 else f"curve {line['name']}"
        color = line["run"] if num_runs > 1 else number
        buttons.append(
            f'<button type="button" class="curve" aria-pressed="true" '
            f'data-key="{text(key)}">{swatch(color % NUM_COLORS)}'
            f"{text(line['name'])} <output></output></button>"
        )
    under = f'<p class="soft">{note}</p>' if note else ""
    return (
        f'<div class="chart"><div class="row"><h3>{title}</h3>'
        f'<span class="soft at"></span></div>{under}'
        f'<div class="plot" tabindex="0" role="application" '
        f'aria-label="curves of {title}"></div>'
        f'<div class="row">{"".join(buttons)}</div></div>'
    )


def _of_events(runs: Sequence[Run]) -> str:
    parts = []
    for number, run in enumerate(runs):
        marks = run_lib.marks(run)
        if not marks:
            continue
        lines = "".join(f"<li>{text(mark.words)}</li>" for mark in marks)
        title = f"{len(marks):,} in all"
        if len(runs) > 1:
            title = f"{swatch(number)}{text(run.name)}: {title}"
        is_open = " open" if len(runs) == 1 and len(marks) < 10 else ""
        parts.append(
            f"<details{is_open}><summary>{title}</summary><ul>{lines}</ul>"
            "</details>"
        )
    return section("Restarts and notices", "".join(parts))


def _of_notes(
    runs: Sequence[Run],
    films: Sequence[Mapping[int, Picture]],
    charts: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> str:
    """Says what is left out, and by which rule."""
    lines = list(notes)
    longest = max(
        (line["each"] for chart in charts for line in chart["lines"]),
        default=1,
    )
    if longest > 1:
        lines.append(
            f"Of long curves a point stands for up to {longest:,} values: the "
            "line is their mean, and the shade reaches from the least to the "
            "greatest of them."
        )
    lines += [
        f"{run.name}: the film has {len(film):,} of {len(run.grids):,} grids, "
        "evenly chosen, the first and the last among them."
        for run, film in zip(runs, films, strict=True)
        if len(film) < len(run.grids)
    ]
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return section("Left out", f"<ul>{items}</ul>" if items else "")
