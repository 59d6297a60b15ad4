"""The page of runs: what is on it, what is left out, and what is a mistake."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import random
import re
import tempfile
import threading
import time
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dtrain import errors, gallery
from dtrain.page import curves, document, figures, finding, pictures
from dtrain.quality import figure_log
from dtrain.record import images
from dtrain.record.reading import Curve
from dtrain.storage import sealed
from tests import odd_values, runs, shown_runs
from tests.ledger_test import make as make_attempt

# Of uPlot 1.6.32 as npm has it; a newer one is taken whole, with its licence.
UPLOT = {
    "uPlot.iife.min.js": (
        "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
    ),
    "uPlot.min.css": (
        "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"
    ),
    "uPlot.LICENSE": (
        "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd"
    ),
}


def make(*flags: object) -> int:
    return gallery.run(["gallery", *map(str, flags)])


def page_of(*run_dirs: pathlib.Path, output: pathlib.Path) -> str:
    make(*(f"--run_dir={each}" for each in run_dirs), f"--output={output}")
    return output.read_text()


def data_of(page: str) -> dict[str, Any]:
    """Returns what the script of a page reads."""
    [text] = re.findall(r'<script id="data"[^>]*>(.*?)</script>', page)
    return json.loads(text)


def lines_of(page: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the curves of a page by chart and name."""
    return {
        (chart["title"], line["name"]): line
        for chart in data_of(page)["charts"]
        for line in chart["lines"]
    }


def test_the_library_in_the_page_is_the_one_of_its_authors() -> None:
    here = pathlib.Path(document.__file__).parent
    for name, digest in UPLOT.items():
        content = (here / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, name


def test_a_page_has_all_of_a_run(tmp_path: pathlib.Path) -> None:
    run_dir = shown_runs.write(
        tmp_path / "run",
        settings={"batch_size": 128, "seed": 0},
        grids=[50, 100],
        figures={50: 20.0, 100: 30.0},
    )
    (run_dir / "nearest").mkdir()
    for name in ("reals.png", "init.png", "nearest/step-000100.png"):
        (run_dir / name).write_bytes(shown_runs.grid(0))
    page = page_of(run_dir, output=tmp_path / "page.html")
    assert page.startswith(document.BEGINNING)
    for words in (
        "dcgan on digits (1,797 images 8x8x1); 100 steps; finished; ",
        "of which 90% went into useful steps",
        "0:01:30 (90.0%)",
        "best samples by frechet distance: 20 at step 50",
        "samples of step 100",
        "real images",
        "samples before training",
        "step 100: a sample, then its nearest training images",
        "dtrain 0.1.0",
        "distance of mean and covariance; pixels abababababab, 64 samples",
    ):
        assert words in page, words
    # The default of the one is 64, the other is the default.
    assert "<code>batch_size</code></th><td>128</td><td>64</td>" in page
    assert "<code>seed</code>" not in page
    lines = lines_of(page)
    assert lines["losses", "discriminator loss"]["y"] == [-1] * 100
    assert lines["losses", "generator loss"]["y"][3] == 1.25
    assert lines["images/s", "images/s"]["y"] == [pytest.approx(8.89, abs=0.01)]
    distance = lines["frechet distance", "run"]
    assert distance["x"] == [50, 100]
    assert distance["floor"] == 0.5
    assert [frame["step"] for frame in data_of(page)["films"][0]] == [50, 100]


def test_nothing_in_a_page_is_from_elsewhere(tmp_path: pathlib.Path) -> None:
    run_dir = shown_runs.write(tmp_path / "run", grids=[100])
    page = page_of(run_dir, output=tmp_path / "page.html")
    assert "default-src 'none'; img-src data:; " in page
    sources = re.findall(r'\b(?:src|href|srcset)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "@import" not in page
    assert "url(" not in page


SPIKE = 14_321


def test_a_long_run_is_thinned_and_its_extremes_are_kept(
    tmp_path: pathlib.Path,
) -> None:
    spikes = {SPIKE: 777.0, SPIKE + 2_000: -55.5}
    run_dir = shown_runs.write(
        tmp_path / "run",
        20_000,
        spikes=spikes,
        grids=range(200, 20_001, 200),
    )
    page = page_of(run_dir, output=tmp_path / "page.html")
    line = lines_of(page)["losses", "generator loss"]
    assert len(line["x"]) == 2000
    assert line["each"] == 10
    at = line["high"].index(777)
    assert abs(line["x"][at] - SPIKE) <= 5
    assert max(line["high"]) == 777
    assert min(line["low"]) == -55.5
    frames = [frame["step"] for frame in data_of(page)["films"][0]]
    assert len(frames) == 60
    assert (frames[0], frames[-1]) == (200, 20_000)
    assert "a point stands for up to 10 values" in page
    assert "the film has 60 of 100 grids" in page


@pytest.mark.parametrize("number", [1, 9, 10, 11, 1000, 1999])
@pytest.mark.parametrize("most", [1, 7, 10])
def test_thinning(number: int, most: int) -> None:
    values = np.random.default_rng(number).normal(size=number)
    values[number // 2] = np.nan
    curve = Curve(np.arange(number, dtype=float), values)
    thinned = curves.thin(curve, most)
    if number <= most:
        assert thinned.num_per_point == 1
        np.testing.assert_array_equal(thinned.values, values)
        return
    assert len(thinned.steps) == most
    assert (np.diff(thinned.steps) > 0).all()
    np.testing.assert_equal(np.nanmin(thinned.low), np.nanmin(values))
    np.testing.assert_equal(np.nanmax(thinned.high), np.nanmax(values))
    finite = np.isfinite(thinned.values)
    assert (thinned.low[finite] <= thinned.values[finite] + 1e-12).all()
    assert (thinned.values[finite] <= thinned.high[finite] + 1e-12).all()


def test_a_bucket_of_great_values_has_a_mean() -> None:
    values = np.full(100, 1.7e308)
    thinned = curves.thin(Curve(np.arange(100.0), values), 3)
    np.testing.assert_allclose(thinned.values, 1.7e308)


ODD = "</script><b>\N{SNOWMAN}&'\""


def test_what_comes_from_files_is_text(tmp_path: pathlib.Path) -> None:
    run_dir = shown_runs.write(
        tmp_path / ODD.replace("/", "\N{FRACTION SLASH}"),
        settings={ODD: ODD, "model": ODD},
        figures={1: 1.0},
    )
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": 101, "{ODD[:-1]}": 1.0, "a_loss": NaN}}\n')
        file.write('{"step": 102, "a_loss": -Infinity, "b": 1e999}\n')
        file.write('{"step": 103, "a_loss": 3.0, "\\ud800": 1}\n')
    (run_dir / "figures.jsonl").write_text(
        shown_runs.line(1, 2.0, extractor=ODD)
    )
    output = tmp_path / "page.html"
    page = page_of(run_dir, output=output)
    ends = len(re.findall("</script>", page))
    assert ends == len(re.findall("<script", page)) == 3
    assert "<b>" not in page
    assert data_of(page)["runs"] == [run_dir.name]
    line = lines_of(page)["losses", "a loss"]
    assert line["y"] == [None, None, 3]
    output.read_bytes().decode()


def test_a_name_that_is_no_text(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / os.fsdecode(b"model\xe9\x1b[31m")
    shown_runs.write(run_dir, 3)
    make(f"--run_dir={run_dir}")
    (run_dir / "page.html").read_bytes().decode()
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "model" in told


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The runs of a sweep over two flags, the best of which is the third."""
    top = tmp_path_factory.mktemp("sweep")
    for number, (seed, gamma) in enumerate([(9, 0.1), (9, 1.0), (10, 0.1)]):
        shown_runs.write(
            top / f"seed={seed},r1_gamma={gamma}",
            10,
            settings={"seed": seed, "r1_gamma": gamma, "batch_size": 8},
            figures={5: 30.0 - number, 10: 40.0},
        )
    return top


@pytest.mark.parametrize("form", ["sweep", "several", "commas"])
def test_a_sweep_is_opened_as_one(
    form: str,
    sweep: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ["seed=9,r1_gamma=0.1", "seed=9,r1_gamma=1.0"]
    names += ["seed=10,r1_gamma=0.1"]
    flags = [f"--run_dir={sweep}"]
    if form == "several":
        flags = [f"--run_dir={sweep / name}" for name in names]
    if form == "commas":
        for number, name in enumerate(names):
            (tmp_path / f"run{number}").symlink_to(sweep / name)
        paths = [tmp_path / f"run{number}" for number in range(3)]
        flags = [f"--run_dir={','.join(map(str, paths))}"]
        names = [path.name for path in paths]
    output = tmp_path / "page.html"
    make(*flags, f"--output={output}")
    page = output.read_text()
    assert data_of(page)["runs"] == names
    lines = lines_of(page)
    assert {name for chart, name in lines if chart == "generator loss"} == {
        *names
    }
    # What differs is a column, and what does not is none.
    heads = re.findall(r'<button type="button">(.*?)</button></th>', page)
    assert {"seed", "r1_gamma"} <= set(heads)
    assert "batch_size" not in heads
    assert (
        f"best      {names[2]}: frechet distance 28 at step 5\n"
        in capsys.readouterr().out
    )


def test_figures_of_unlike_protocols_share_nothing(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dirs = [shown_runs.write(tmp_path / name, 10) for name in "ab"]
    (run_dirs[0] / "figures.jsonl").write_text(
        shown_runs.line(5, 3.0)
        # Measured again: the newer line counts.
        + shown_runs.line(5, 2.0)
        + shown_runs.line(10, 4.0, num_generated=128)
    )
    (run_dirs[1] / "figures.jsonl").write_text(shown_runs.line(5, 1.0))
    for run_dir in run_dirs:
        # Whatever their protocols are, metrics.jsonl does not say.
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write('{"step": 11, "frechet_distance": 7.0, "recall": 1}\n')
            file.write('{"step": 12, "kernel_distance_error": 7.0}\n')
    page = page_of(*run_dirs, output=tmp_path / "page.html")
    charts = [
        [(line["name"], line["x"], line["y"]) for line in chart["lines"]]
        for chart in data_of(page)["charts"]
        if chart["title"] == "frechet distance"
    ]
    assert charts == [
        [("a", [5], [2]), ("b", [5], [1])],
        [("a", [10], [4])],
    ]
    heads = re.findall(r'<button type="button">(.*?)</button></th>', page)
    distances = [head for head in heads if head.startswith("frechet")]
    assert [head[-2] for head in distances] == ["1", "2"]
    assert "recall" not in heads
    told = capsys.readouterr().out
    assert "b: frechet distance 1 at step 5 by protocol 1\n" in told
    assert "a: frechet distance 4 at step 10 by protocol 2\n" in told
    assert "protocol 2: " in told
    # An error is that of its figure, and none by itself.
    assert not any("error" in head for head in heads)


def test_restarts_and_notices_are_marked(tmp_path: pathlib.Path) -> None:
    attempts = [
        make_attempt(0, {"train": 9}, [(0, 0, 0), (9, 40, 9)]),
        make_attempt(
            20,
            {"train": 9},
            [(0, 30, 0), (5, 60, 5), (6, 50, 5), (9, 70, 9)],
            exit_code=75,
            notice="SIGTERM",
        ),
        make_attempt(40, {"train": 9}, [(0, 70, 0), (9, 99, 9)], exit_code=1),
    ]
    run_dir = shown_runs.write(tmp_path / "run", attempts=attempts)
    page = page_of(run_dir, output=tmp_path / "page.html")
    marks = [(m["step"], m["kind"]) for m in data_of(page)["marks"]]
    assert marks == [(30, "restart"), (50, "back"), (70, "notice")]
    for words in (
        "started again at step 30; before that: killed, no end written",
        "went back from step 60 to 50",
        "started again at step 70; before that: saved and stopped (75): SIG",
        "2 restarts",
    ):
        assert words in page, words


def test_what_is_damaged_is_left_out_and_told(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shown_runs.write(tmp_path / "run", 10, grids=[5, 10])
    (run_dir / "config.json").write_text("{}")
    (run_dir / "samples" / "step-000005.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (run_dir / "ledger" / "20990101T000000Z-1.json").write_text("{")
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    # The last is on its way to the disk, which is no damage.
    lines[4] = "[" * 9999 + "\n"
    metrics.write_text("".join(lines) + "{")
    (run_dir / "figures.jsonl").write_text('{"step": 1}\n7\n')
    page = page_of(run_dir, output=tmp_path / "page.html")
    told = capsys.readouterr().err.splitlines()
    names = ["config.json is", "20990101T000000Z-1.json is left out"]
    names += ["metrics.jsonl: line 5 is damaged, and left out"]
    names += ["figures.jsonl: 2 of 2 lines are damaged, and left out"]
    names += ["step-000005.png is left out: it is no picture"]
    assert len(told) == len(names), told
    for line, name in zip(told, names, strict=True):
        assert name in line
        assert name in page
    assert lines_of(page)["losses", "generator loss"]["x"][-1] == 10


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "run_dir is missing; use --run_dir=DIR"),
        (("--run_dir=",), "run_dir is missing"),
        (("--run_dir=TOP/none",), "run_dir .*none. is not there; name the"),
        (("--run_dir=TOP/run,TOP/none",), "run_dir .*none. is not there"),
        (("--run_dir=TOP/empty",), "run_dir .*empty. holds no run; name"),
        (("--run_dir=TOP/file",), "run_dir .*file. is a file; name a dir"),
        (("--run_dir=TOP/fresh",), "run_dir .*fresh. holds no metrics yet"),
        (("--run_dir=TOP/many",), "names 65 runs, and a page shows at most 64"),
        (("--run_dir=TOP/future",), "it is of schema 99, and . is known; use"),
        (("--run_dir=gs:x/y",), "must be of the form gs://BUCKET/DIR"),
        (("RUN", "--output=TOP"), "output .* is a directory; name a file"),
        (("RUN", "--output=TOP/file"), "is there, and no page of dtrain.gall"),
        (("RUN", "--output=TOP/run/metrics.jsonl"), "and no page of dtrain"),
        (
            ("RUN", "--output=TOP/file/page.html"),
            "made: .*file is no directory",
        ),
        (("RUN", "--every_secs=0"), "every_secs .0.0. must be at least 1"),
        (("RUN", "--every_secs=nan"), "every_secs .nan. must be a finite"),
        (("RUN", "--every_secs=5"), "every_secs .5. is an option of --watch"),
        (("RUN", "--watch=maybe"), "watch .maybe. must be true or false"),
        (("RUN", "page.html"), "'page.html' is not a flag"),
        (("--run_dirs=TOP/run",), "did you mean --run_dir?"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    flags: tuple[str, ...], words: str, tmp_path: pathlib.Path
) -> None:
    shown_runs.write(tmp_path / "run", 3)
    for name in ("empty", "fresh"):
        (tmp_path / name).mkdir()
    (tmp_path / "fresh" / "config.json").touch()
    (tmp_path / "file").write_text("mine")
    for number in range(65):
        (tmp_path / "many" / str(number) / "ledger").mkdir(parents=True)
    future = shown_runs.write(tmp_path / "future", 3)
    [ledger] = future.glob("ledger/*")
    newer = re.sub(rb'schema":\d+', b'schema":99', ledger.read_bytes())
    ledger.write_bytes(newer)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    given = [flag.replace("RUN", "--run_dir=TOP/run") for flag in flags]
    with pytest.raises(errors.UserError, match=words) as caught:
        make(*(flag.replace("TOP", str(tmp_path)) for flag in given))
    assert "\n" not in str(caught.value)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_page_is_written_over_a_page_and_beside_its_run(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shown_runs.write(tmp_path / "runs" / "a", 3)
    for _ in range(2):
        make(f"--run_dir={run_dir}")
    shown_runs.write(tmp_path / "runs" / "b", 3)
    make(f"--run_dir={tmp_path}/runs/")
    assert (tmp_path / "runs" / "page.html").exists()
    # Which is the better one cannot be told yet.
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.endswith(f"evaluate --run_dir={run_dir} --checkpoint=all")
    assert len(list(run_dir.iterdir())) == 5
    assert (run_dir / "page.html").exists()
    # Named twice it is one.
    again = f"{tmp_path}/runs/../runs/a"
    assert len(finding.find([str(run_dir), f"{run_dir}/", again])) == 1
    # Neither is taken for a run.
    assert len(finding.find([str(tmp_path / "runs")])) == 2


def test_a_picture_keeps_its_pixels_or_fits_its_share() -> None:
    chance = np.random.default_rng(0)
    small = chance.integers(0, 256, (9, 13, 3), np.uint8)
    enlarged = small.repeat(7, axis=0).repeat(7, axis=1)
    kept = pictures._encoded(
        pictures._opened(images.encode_png(enlarged)), 10_000
    )
    assert (kept.width, kept.height, kept.is_small) == (13, 9, True)
    assert kept.source.startswith("data:image/png;base64,")
    large = chance.integers(0, 256, (700, 500, 1), np.uint8)
    shrunk = pictures._encoded(
        pictures._opened(images.encode_png(large)), 10_000
    )
    assert len(shrunk.source) < 10_000 * 4 / 3 + 100
    assert shrunk.width / shrunk.height == pytest.approx(5 / 7, rel=0.05)


@pytest.mark.parametrize("most", [1, 2, 3, 10, 60])
@pytest.mark.parametrize("number", [1, 2, 9, 61, 1000])
def test_frames_are_evenly_chosen(number: int, most: int) -> None:
    steps = list(range(7, 7 * number + 1, 7))
    chosen = pictures.evenly(steps, most)
    assert len(chosen) == min(number, most)
    assert chosen[-1] == steps[-1]
    assert most == 1 or chosen[0] == steps[0]
    assert sorted(set(chosen)) == chosen
    if len(chosen) > 2:
        gaps = np.diff(chosen)
        assert gaps.max() - gaps.min() <= 7


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("frechet_distance", [3.0, 1.0, math.nan, 2.0], 1.0),
        ("precision", [0.1, 0.7, 0.3], 0.7),
        ("of_my_own", [5.0, 1.0, 3.0], 3.0),
        ("frechet_distance", [math.nan], None),
    ],
)
def test_the_best_figure(
    name: str, values: list[float], best: float | None
) -> None:
    measured = [
        figures.Figure(step, value, math.nan, math.nan)
        for step, value in enumerate(values)
    ]
    protocol = figure_log.Protocol("pixels", "", 0, 0, "", "", 0, "", "")
    found = figures.best(figures.Kind(name, protocol), measured)
    assert (found and found.value) == best


def test_a_page_is_watched_until_the_run_has_finished(
    tmp_path: pathlib.Path,
) -> None:
    """Whoever reads the file meanwhile finds a whole page."""
    running = make_attempt(0, {"train": 9}, [(0, 0, 0), (9, 5, 9)])
    run_dir = shown_runs.write(tmp_path / "run", 5, attempts=[running])
    output = run_dir / "page.html"
    watcher = threading.Thread(
        target=make,
        args=(f"--run_dir={run_dir}", "--watch", "--every_secs=1"),
        daemon=True,
    )
    watcher.start()

    def read() -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if output.exists():
                return data_of(output.read_text())
            time.sleep(0.01)
        raise AssertionError("there is no page")

    assert read()["reload_secs"] == 1
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "generator_loss": 6.0}\n')
    [ledger] = run_dir.glob("ledger/*")
    ended = shown_runs.goodput.dumps(shown_runs.whole(6))
    ledger.write_bytes(ended)
    watcher.join(60)
    assert not watcher.is_alive()
    assert read()["reload_secs"] == 0
    line = lines_of(output.read_text())["losses", "generator loss"]
    assert line["x"][-1] == 6


def test_ctrl_c_leaves_a_page_that_does_not_wait_for_more(
    tmp_path: pathlib.Path,
) -> None:
    running = make_attempt(0, {"train": 9}, [(0, 0, 0), (9, 5, 9)])
    run_dir = shown_runs.write(tmp_path / "run", 5, attempts=[running])
    output = tmp_path / "page.html"
    process = runs.start(
        "dtrain.gallery",
        f"--run_dir={run_dir}",
        "--watch",
        f"--output={output}",
    )
    while not output.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(2)
    code, printed = runs.finish(process)
    assert code == errors.FINISHED, printed
    assert printed.splitlines()[-1].endswith("written for the last time")
    assert data_of(output.read_text())["reload_secs"] == 0


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=40)
def test_no_value_in_a_file_surprises_the_page(data: st.DataObject) -> None:
    """Whatever a file says, there is a page, or a line on what is wrong."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = shown_runs.write(
            pathlib.Path(directory, "run"), 3, figures={2: 1.0}
        )
        name = data.draw(
            st.sampled_from(["config.json", "metrics.jsonl", "figures.jsonl"])
        )
        path = run_dir / name
        sound = path.read_text()
        first = sound if name == "config.json" else sound.partition("\n")[0]
        body = json.loads(first)
        changed = data.draw(odd_values.mutations(body))
        if name == "config.json" and isinstance(changed, dict):
            path.write_bytes(sealed.dumps(changed))
        else:
            path.write_text(json.dumps(changed) + "\n" + sound)
        page = page_of(run_dir, output=pathlib.Path(directory, "page.html"))
        assert data_of(page)["runs"] == ["run"]


NUM_FUZZ = int(os.environ.get("DTRAIN_NUM_FUZZ", "150"))


def test_a_damaged_picture_is_shown_or_left_out(
    chance: random.Random, tmp_path: pathlib.Path
) -> None:
    sound = shown_runs.grid(9)
    path = tmp_path / "picture.png"
    for _ in range(NUM_FUZZ):
        data = bytearray(sound)
        for _ in range(chance.choice((1, 1, 2, 8))):
            # Most of what may go wrong stands at the beginning.
            where = chance.randrange(min(len(data), chance.choice((40, 9999))))
            data[where : where + chance.choice((1, 4))] = chance.choice(
                (b"", b"\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff")
            )
        path.write_bytes(bytes(data))
        reader = pictures.Pictures()
        shown = reader.still(str(path))
        assert (shown is None) == bool(reader.notes)
