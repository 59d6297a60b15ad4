"""The page in a real browser: it opens, answers, and asks for nothing."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator

import numpy as np
import pytest

from dtrain import gallery
from dtrain.page import finding, pictures, run
from tests import browser as browser_lib
from tests import requirement, shown_runs
from tests.browser import Browser
from tests.ledger_test import make as make_attempt


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = browser_lib.find()
    if not program:
        requirement.missing("there is no browser; apt-get install chromium")
    with browser_lib.opened(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The page of one run, of which all there is is shown."""
    top = tmp_path_factory.mktemp("one")
    attempts = [
        make_attempt(0, {"start": 10, "train": 40}, [(10, 0, 0), (50, 60, 40)]),
        make_attempt(
            50, {"train": 50}, [(0, 50, 0), (50, 100, 50)], exit_code=0
        ),
    ]
    run_dir = shown_runs.write(
        top / "run",
        grids=[25, 50, 75, 100],
        attempts=attempts,
        figures={50: 20.0, 100: 30.0},
    )
    (run_dir / "reals.png").write_bytes(shown_runs.grid(0))
    return made(run_dir, top)


@pytest.fixture(scope="module")
def of_twelve(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    top = tmp_path_factory.mktemp("twelve")
    for number in range(12):
        shown_runs.write(
            top / f"seed={number}",
            20 + number,
            settings={"seed": number},
            grids=[10, 20],
            figures={10: 30.0 - number, 20: 40.0},
        )
    return made(top, top)


def made(run_dir: pathlib.Path, top: pathlib.Path) -> pathlib.Path:
    page = top / "page.html"
    gallery.run(["gallery", f"--run_dir={run_dir}", f"--output={page}"])
    return page


def check_quiet(browser: Browser, page: pathlib.Path) -> None:
    """Checks that a page had no trouble, and asked for nothing but itself."""
    assert browser.trouble == []
    asked = [each for each in browser.requests if not each.startswith("data:")]
    assert asked == [page.as_uri()]


def colors(browser: Browser, selector: str) -> np.ndarray:
    """Returns the pixels of an element, float32 [height, width, 3]."""
    return np.asarray(browser.screenshot(selector), np.float32)


def has_color(
    pixels: np.ndarray, color: tuple[int, int, int], tolerance: int = 24
) -> np.ndarray:
    return (np.abs(pixels - color).max(axis=-1) < tolerance).nonzero()


LOSSES = ".chart:nth-child(1) "
BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def test_it_looks_as_it_should(browser: Browser, of_one: pathlib.Path) -> None:
    browser.open(of_one)
    check_quiet(browser, of_one)
    # The newest grid, whose first pixel is white.
    grid = colors(browser, "#samples img[data-run]")
    np.testing.assert_allclose(grid[-5, -5], (40, 255, 40), atol=2)
    np.testing.assert_allclose(grid[5, 5], 255, atol=2)
    reals = colors(browser, '#samples img[alt="real images"]')
    np.testing.assert_allclose(reals[-5, -5], (40, 0, 40), atol=2)
    # Of two losses the one above falls from 2 to 1, the other stays at -1.
    assert browser.value(f"document.querySelector('{LOSSES}h3').innerText") == (
        "losses"
    )
    chart = colors(browser, f"{LOSSES}.u-over")
    height, width, _ = chart.shape
    rows, columns = has_color(chart, BLUE)
    early, late = rows[columns < width // 50], rows[columns > width * 0.9]
    assert early.min() < late.min() < height * 0.5
    rows, columns = has_color(chart, ORANGE)
    assert rows.min() > height * 0.7
    assert columns.max() - columns.min() > 0.9 * width
    # The bar of the time: 50 steps of 40 s per 60, and 50 s, of 100 are green.
    bar = colors(browser, "#time .bar")
    _, columns = has_color(bar, (0, 158, 115))
    assert np.unique(columns).size > 0.75 * bar.shape[1]


def test_the_curves_answer(browser: Browser, of_one: pathlib.Path) -> None:
    browser.open(of_one)
    chart = f"document.querySelector('{LOSSES}"
    left, top, width, height = browser.box(f"{LOSSES}.u-over")
    browser.mouse("Moved", left + width / 2, top + height / 2)
    at = browser.value(f"{chart}.at').innerText")
    assert at in ("step 50", "step 51")
    step = int(at.split()[1])
    values = browser.value(f"{chart}output').innerText")
    assert float(values) == pytest.approx(1 + 1 / step, rel=1e-4)
    # The cursor is on all charts, and so is a zoom.
    assert browser.value("document.querySelectorAll('.at')[1].innerText") == at
    browser.drag(f"{LOSSES}.u-over", 0.25, 0.75)
    low, high = zoom(browser)
    assert (low, high) == (pytest.approx(26, abs=2), pytest.approx(75, abs=2))
    browser.click("[data-zoom=out]")
    assert zoom(browser) == (1, 100)
    # By the keyboard alone.
    browser.value(f"{chart}.plot').focus()")
    browser.press("+", "+")
    low, high = zoom(browser)
    assert high - low == pytest.approx(50, abs=2)
    browser.press("ArrowRight")
    moved = browser.value(f"{chart}.at').innerText")
    browser.press("ArrowRight")
    after = browser.value(f"{chart}.at').innerText")
    assert int(after.split()[1]) == int(moved.split()[1]) + 1
    browser.press("0", "0")
    assert zoom(browser) == (1, 100)
    # A curve that is switched off is not drawn.
    browser.click(f"{LOSSES}.curve")
    assert not has_color(colors(browser, f"{LOSSES}.u-over"), BLUE)[0].size
    browser.click("#log")
    browser.value("document.querySelector('#smooth').focus()")
    browser.press("End")
    assert browser.value("document.querySelector('#smooth').value") == "0.99"
    check_quiet(browser, of_one)


def test_two_fingers_zoom(browser: Browser, of_one: pathlib.Path) -> None:
    browser.open(of_one)
    left, top, width, height = browser.box(f"{LOSSES}.u-over")
    y = top + height / 2
    for kind, share in (("Start", 0.1), ("Move", 0.2), ("Move", 0.4)):
        # Around the middle, from a fifth of the chart to four fifths.
        places = [left + (0.5 - share) * width, left + (0.5 + share) * width]
        fingers = [{"x": x, "y": y, "id": i} for i, x in enumerate(places)]
        browser.call(
            "Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=fingers
        )
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    low, high = zoom(browser)
    assert high - low == pytest.approx(25, abs=2)
    assert (high + low) / 2 == pytest.approx(50.5, abs=2)
    check_quiet(browser, of_one)


def test_a_page_that_is_watched_reads_itself_again(
    browser: Browser, tmp_path: pathlib.Path
) -> None:
    """And zoom and slider stay where they were."""
    run_dir = shown_runs.write(tmp_path / "run", 40, grids=[10, 20, 40])
    path = tmp_path / "page.html"
    page = gallery.Page(str(path), pictures.Pictures())
    place = finding.Place(str(run_dir), "run")
    page.write([run.read(place)], reload_secs=2)
    browser.open(path)
    browser.value("document.querySelector('#step').focus()")
    browser.press("Home")
    browser.click("[data-zoom=in]")
    before = zoom(browser)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "generator_loss": 1.0}\n')
    # The last of all, which reads itself no more.
    page.write([run.read(place)])
    while browser.value("!!document.querySelector('#follow')"):
        browser.wait_for_reload()
    assert zoom(browser) == before
    shown = "document.querySelector('#film-step').innerText"
    assert browser.value(shown) == "step 10"
    assert browser.trouble == []
    # Opened anew it shows all that there is by now.
    browser.open(path)
    assert zoom(browser) == (1, 50)
    assert browser.value(shown) == "step 40"


def zoom(browser: Browser) -> tuple[int, int]:
    words = browser.value("document.querySelector('#range').innerText")
    _, low, _, high = words.replace(",", "").split()
    return int(low), int(high)


def test_the_slider_shows_the_film(
    browser: Browser, of_one: pathlib.Path
) -> None:
    browser.open(of_one)
    shown = "document.querySelector('#film-step').innerText"
    assert browser.value(shown) == "step 100"
    browser.value("document.querySelector('#step').focus()")
    for key, step in (("ArrowLeft", 75), ("Home", 25), ("ArrowRight", 50)):
        browser.press(key)
        assert browser.value(shown) == f"step {step}"
        picture = colors(browser, "#samples img[data-run]")
        green = round(255 * step / 100)
        np.testing.assert_allclose(picture[-5, -5], (40, green, 40), atol=3)
    left, top, width, height = browser.box("#step")
    held = {"button": "left", "clickCount": 1}
    for kind in ("Pressed", "Released"):
        browser.mouse(kind, left + width - 3, top + height / 2, **held)
    assert browser.value(shown) == "step 100"
    browser.value(
        "seen = []; out = document.querySelector('#film-step');"
        "new MutationObserver(() => seen.push(out.innerText))"
        ".observe(out, {childList: true}); 0"
    )
    browser.click("#play")
    deadline = time.monotonic() + 60
    while browser.value("document.querySelector('#play').innerText") != "play":
        assert time.monotonic() < deadline
    played = [f"step {step}" for step in (25, 50, 75, 100)]
    assert browser.value("seen") == played
    check_quiet(browser, of_one)


def test_twelve_runs_are_told_apart(
    browser: Browser, of_twelve: pathlib.Path
) -> None:
    browser.open(of_twelve)
    check_quiet(browser, of_twelve)
    names = "[...document.querySelectorAll('tbody tr')].slice(0, 12).map("
    names += "row => row.children[0].innerText)"
    assert browser.value(names) == [f"seed={each}" for each in range(12)]
    # The last has the smallest distance; the other way round, the first.
    head = "[...document.querySelectorAll('thead button')].find("
    head += "button => button.innerText.startsWith('frechet'))"
    for order in (range(11, -1, -1), range(12)):
        browser.value(f"{head}.click()")
        assert browser.value(names) == [f"seed={each}" for each in order]
    number = "document.querySelectorAll('#samples img[data-run]').length"
    assert browser.value(number) == 12
    # The distance: as many lines as there are runs, of as many colours.
    chart = colors(browser, ".chart:nth-child(4) .u-over")
    seen = np.unique(chart.reshape(-1, 3).round(-1), axis=0)
    assert len(seen) >= 12


@pytest.mark.parametrize("kind", ["phone", "dark"])
def test_it_is_readable(
    kind: str, browser: Browser, of_twelve: pathlib.Path
) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    phone = {"width": 360, "height": 640, "deviceScaleFactor": 1}
    try:
        if kind == "dark":
            browser.call("Emulation.setEmulatedMedia", features=[scheme])
        else:
            browser.call(
                "Emulation.setDeviceMetricsOverride", **phone, mobile=True
            )
        browser.open(of_twelve)
        check_quiet(browser, of_twelve)
        # Nothing but tables is wider than the screen, and those scroll.
        wide = "document.documentElement.scrollWidth - innerWidth"
        assert browser.value(wide) <= 0
        pixels = colors(browser, "header")
        contrast = abs(np.median(pixels) - pixels[..., 1]).max()
        assert contrast > 150
        assert (np.median(pixels) < 60) == (kind == "dark")
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")
        browser.call("Emulation.setEmulatedMedia", features=[])


@pytest.mark.parametrize("num_steps", [1, 100_000])
def test_it_opens_with_one_step_and_with_many(
    num_steps: int, browser: Browser, tmp_path: pathlib.Path
) -> None:
    page = made(shown_runs.write(tmp_path / "run", num_steps), tmp_path)
    assert page.stat().st_size < 10_000_000
    browser.open(page)
    check_quiet(browser, page)
    chart = colors(browser, ".chart:nth-child(1) .u-over")
    assert has_color(chart, BLUE)[0].size
