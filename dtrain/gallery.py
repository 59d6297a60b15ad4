"""Makes one HTML page of a run, or of several beside each other.

python -m dtrain.gallery --run_dir=runs/default --output=page.html
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from dtrain import errors, flags
from dtrain.storage import access, files

if TYPE_CHECKING:
    from dtrain.page.finding import Place
    from dtrain.page.pictures import Pictures
    from dtrain.page.run import Run

# While it watches, it works for at most this share of the time.
_MOST_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says."""

    run_dir: tuple[str, ...] = flags.field(
        (),
        flags.FLAGS,
        "Directory of a run, on a disk or gs://, which may be training; or "
        "one that holds runs, as of a sweep. Several with commas between.",
    )
    output: str = flags.field(
        "",
        flags.FLAGS,
        "HTML file that the page is written to. Only a page is overwritten.",
        shown="page.html in the first run_dir",
    )
    watch: bool = flags.field(
        False,
        flags.FLAGS,
        "Writes the page again and again, until all runs have finished, or "
        "until Ctrl-C.",
    )
    every_secs: float = flags.field(
        10.0, flags.FLAGS, "Seconds between two pages with --watch.", minimum=1
    )

    def __post_init__(self) -> None:
        flags.check(self)


_PAGE = flags.Page(
    "python -m dtrain.gallery",
    """\
Makes one page of runs: their numbers, samples, curves, restarts, time and
settings. A browser opens it without a network. See docs/gallery.md.""",
    Options,
    usage="--run_dir=DIR [--output=FILE] [--watch]",
)


def parse(arguments: Sequence[str]) -> Options:
    """Parses a command line, whose first word is the program's name.

    Raises:
        UserError: a flag is unknown, malformed, missing or out of its range.
    """
    options = Options(**flags.parse(Options, arguments))
    run_dirs = tuple(map(flags.expand_home, filter(None, options.run_dir)))
    if not run_dirs:
        raise errors.UserError("run_dir is missing; use --run_dir=DIR")
    if options.every_secs != 10.0 and not options.watch:
        raise errors.UserError(
            f"every_secs ({options.every_secs:g}) is an option of --watch; "
            "leave it out"
        )
    output = flags.expand_home(options.output)
    return dataclasses.replace(options, run_dir=run_dirs, output=output)


def check_output(path: str) -> None:
    """Checks that a page may be written there.

    Args:
        path: of the page.

    Raises:
        UserError: something else is there, or the directory cannot be made.
        StorageError: the disk or the store failed.
    """
    from dtrain.page import document

    with files.storage_errors(path):
        if files.is_directory(path):
            raise errors.UserError(
                f"output ({path}) is a directory; name a file in it"
            )
    access.make("output", os.path.dirname(path) or ".")
    if path.startswith("/dev/"):
        return
    beginning = document.BEGINNING.encode()
    with files.storage_errors(path):
        is_there = files.size(path) is not None
        if is_there and files.read_part(path, 0, len(beginning)) != beginning:
            raise errors.UserError(
                f"output ({path}) is there, and no page of dtrain.gallery; "
                "name another file, or remove it"
            )


def make(options: Options) -> None:
    """Makes a page, and with `watch` the next ones until the runs have ended.

    Args:
        options: what the command line says.

    Raises:
        UserError: there is no run, nothing to show of it yet, or the page
            cannot be written where it is to be.
        StorageError: the disk or the store failed.
    """
    from dtrain.page import finding, pictures

    places = finding.find(options.run_dir)
    output = options.output or _usual_output(options, places)
    check_output(output)
    page = Page(output, pictures.Pictures())
    if not options.watch:
        runs = _read(places)
        _check_any(runs)
        page.write(runs)
        _say(*_summary(output, runs))
        return
    _say(f"page      {output}: open it; Ctrl-C ends this")
    try:
        _watch(options, page)
    except KeyboardInterrupt:
        # Without it the browser would read it again for ever.
        page.write(_read(finding.find(options.run_dir)))
        _say(f"page      {output}: written for the last time")


def _usual_output(options: Options, places: Sequence[Place]) -> str:
    first = options.run_dir[0].rstrip("/")
    with files.storage_errors(first):
        # Or it names several, with commas between.
        is_one = files.is_directory(first)
    return f"{first if is_one else places[0].directory}/page.html"


def _watch(options: Options, page: Page) -> None:
    """Writes pages until all runs have finished."""
    from dtrain.page import finding

    is_last = False
    while not is_last:
        began = time.monotonic()
        try:
            # A sweep may have more runs by now.
            runs = _read(finding.find(options.run_dir))
            is_last = all(run.is_finished for run in runs)
            secs = 0 if is_last else math.ceil(options.every_secs)
            page.write(runs, secs)
        except errors.StorageError as error:
            _say(f"{error}; it is tried again", stream=sys.stderr)
            is_last = False
        else:
            if is_last:
                _say(*_summary(page.path, runs))
                return
        spent = time.monotonic() - began
        time.sleep(max(options.every_secs, spent / _MOST_SHARE - spent))


def _read(places: Sequence[Place]) -> list[Run]:
    from dtrain.page import run

    return [run.read(place) for place in places]


class Page:
    """The file of a page, which is written again and again.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: str, pictures: Pictures) -> None:
        """Writes nothing yet.

        Args:
            path: of the file.
            pictures: reads those of the runs.
        """
        self.path = path
        self._pictures = pictures
        self._told: set[str] = set()

    def write(self, runs: Sequence[Run], reload_secs: int = 0) -> None:
        """Writes it, whole or not at all, and tells what is left out, once.

        Args:
            runs: at least one.
            reload_secs: after which a browser reads it again; 0 is never.

        Raises:
            UserError: it cannot be written there at all.
            StorageError: the disk or the store failed.
        """
        from dtrain.page import document

        made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        page = document.render(runs, self._pictures, made, reload_secs)
        try:
            files.write(self.path, page)
        except OSError as error:
            failure = access.refusal("output", self.path, "written", error)
            raise failure from error
        notes = [note for run in runs for note in run.notes]
        for note in [*notes, *self._pictures.notes]:
            if note not in self._told:
                _say(note, stream=sys.stderr)
                self._told.add(note)


def _say(*lines: str, stream: TextIO | None = None) -> None:
    """Prints lines, which may hold names of files."""
    for line in lines:
        print(errors.printable(line), file=stream, flush=True)


def _check_any(runs: Sequence[Run]) -> None:
    """Checks that there is something to show.

    Raises:
        UserError: no run has metrics or pictures yet.
    """
    if not any(run.metrics.num_steps or run.grids for run in runs):
        names = ", ".join(run.directory for run in runs)
        raise errors.UserError(
            f"run_dir ({names}) holds no metrics yet; wait for its first "
            "steps, or use --watch"
        )


def _summary(path: str, runs: Sequence[Run]) -> list[str]:
    """Says what was written, and which run is the best by each figure."""
    from dtrain.page import run

    number = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    lines = [f"page      {path}: {number}"]
    lines += [f"best      {line}" for line in run.best_by_figure(runs)]
    ways = run.protocols(runs)
    if len(ways) > 1:
        lines += [f"protocol {n}: {way}" for n, way in enumerate(ways, 1)]
    bare = [each.directory for each in runs if not each.figures]
    if bare:
        lines.append(
            f"figures   none yet of {len(bare)}; to measure: python -m "
            f"dtrain.evaluate --run_dir={bare[0]} --checkpoint=all"
        )
    return lines


def run(arguments: Sequence[str]) -> int:
    """Makes a page as a command line says; returns the exit code.

    Raises:
        UserError: the command line is wrong, or there is nothing to show.
        StorageError: the disk or the store failed.
    """
    if flags.answer(arguments[1:], _PAGE.render):
        return errors.FINISHED
    make(parse(arguments))
    return errors.FINISHED


def main() -> None:
    """Runs the program."""
    errors.exit_with(lambda: run(sys.argv))


if __name__ == "__main__":
    main()
