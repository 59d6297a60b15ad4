"""What a page says of a run, read from its directory in one go.

The run may be training: what is not there yet, or is on its way, is left out.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dtrain import errors
from dtrain.checkpoint import listing, manifest
from dtrain.page import figures
from dtrain.page.finding import Place
from dtrain.quality.figure_log import Protocol
from dtrain.record import goodput, reading
from dtrain.storage import files, sealed


class Mark(NamedTuple):
    """Something that happened to a run, to be marked on its curves.

    Attributes:
        step: at which.
        kind: `restart`, `notice` or `back`.
        words: what it was.
    """

    step: int
    kind: str
    words: str


class Run(NamedTuple):
    """A run.

    Attributes:
        directory: of the run.
        name: on the page.
        settings: by name, as config.json has them; empty if it cannot be read.
        data: what config.json says of the images; likewise.
        versions: of the programs that wrote it; likewise.
        metrics: of all steps, but for what is in `figures`.
        figures: of each kind, by step.
        account: of its time; None if there is no ledger.
        grids: paths of the grids of samples, by step, ascending.
        nearest: likewise, of samples beside their nearest training images.
        newest: prefix of the newest checkpoint; empty if there is none.
        state: of that, the same where all variables are; likewise.
        notes: what is left out, in lines.
    """

    directory: str
    name: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    versions: Mapping[str, str]
    metrics: reading.Metrics
    figures: Mapping[figures.Kind, Sequence[figures.Figure]]
    account: goodput.Account | None
    grids: Mapping[int, str]
    nearest: Mapping[int, str]
    newest: str
    state: str
    notes: Sequence[str]

    @property
    def last(self) -> goodput.Attempt | None:
        """The newest attempt; None if there is no ledger."""
        return self.account.placed[-1].attempt if self.account else None

    @property
    def is_finished(self) -> bool:
        """Whether nothing will change any more."""
        last = self.last
        return last is not None and last.exit_code == errors.FINISHED

    @property
    def best_grid(self) -> tuple[figures.Kind, figures.Figure] | None:
        """The figure at which it was best, of the grids; None if unknown.

        The Fréchet distance decides where there is one, or else the first.
        """
        known = [kind for kind in self.figures if kind.best]
        known.sort(key=lambda kind: kind.name != "frechet_distance")
        for kind in known:
            drawn = [
                each for each in self.figures[kind] if each.step in self.grids
            ]
            found = figures.best(kind, drawn)
            if found:
                return kind, found
        return None


def read(place: Place) -> Run:
    """Reads a run.

    Args:
        place: where it is.

    Raises:
        UserError: a newer version of dtrain wrote its ledger.
        StorageError: the disk or the store failed.
    """
    directory = place.directory
    config, notes = _config(directory)
    attempts, of_ledgers = reading.attempts(directory)
    metrics = reading.metrics(directory)
    measured, of_figures = figures.read(directory)
    newest, state = _newest_checkpoint(directory)
    return Run(
        *place,
        settings=_mapping(config.get("config")),
        data=_mapping(config.get("data")),
        versions=_mapping(config.get("versions")),
        metrics=metrics._replace(
            curves={
                name: curve
                for name, curve in metrics.curves.items()
                # There they stand without the protocol that they are of.
                if not figures.is_measured(name)
            }
        ),
        figures=measured,
        account=goodput.account(attempts) if attempts else None,
        grids=_pictures(f"{directory}/samples"),
        nearest=_pictures(f"{directory}/nearest"),
        newest=newest,
        state=state,
        notes=[*notes, *of_ledgers, *metrics.notes, *of_figures],
    )


def _config(directory: str) -> tuple[Mapping[str, Any], list[str]]:
    path = f"{directory}/config.json"
    content = reading.content(path)
    if not content:
        return {}, [f"{path} is not there: the settings are not known"]
    try:
        return sealed.loads(content), []
    except sealed.DamagedError as error:
        return {}, [f"{path} is left out: {error}"]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _pictures(directory: str) -> dict[int, str]:
    """Returns the paths of pictures by the step in their names."""
    with files.storage_errors(directory):
        names = files.names(directory)
    found = {
        int(match[1]): f"{directory}/{name}"
        for name in names
        if (match := re.fullmatch(r"step-(\d{1,15})\.png", name, re.ASCII))
    }
    return dict(sorted(found.items()))


def _newest_checkpoint(directory: str) -> tuple[str, str]:
    newest = listing.newest(directory)
    if not newest:
        return "", ""
    try:
        return newest, manifest.decode(reading.content(f"{newest}.json")).state
    except sealed.DamagedError:
        return newest, ""


def marks(run: Run) -> list[Mark]:
    """Lists what happened to a run: notices, new starts, where it went back."""
    return list(_marks(run.account)) if run.account else []


def _marks(account: goodput.Account) -> Iterator[Mark]:
    for before, this in itertools.zip_longest(
        [None, *account.placed], account.placed
    ):
        if before:
            yield from _after(before, this)
        if this:
            for left, taken in itertools.pairwise(this.stretches):
                from_step = left.points[-1].step
                step = taken.points[0].step
                yield Mark(
                    step,
                    "back",
                    f"went back from step {from_step:,} to {step:,}, as after "
                    "a divergence",
                )


def _after(
    before: goodput.Placed, this: goodput.Placed | None
) -> Iterator[Mark]:
    """Yields what follows from how an attempt ended."""
    attempt = before.attempt
    ended = goodput.ending(attempt)
    if this is None:
        if attempt.notice and attempt.points:
            yield Mark(attempt.points[-1].step, "notice", ended)
        return
    if this.attempt.points:
        step = this.attempt.points[0].step
        if attempt.exit_code is None:
            # There is another attempt: it is not running any more.
            ended = "killed, no end written"
        yield Mark(
            step,
            "notice" if attempt.notice else "restart",
            f"started again at step {step:,}; before that: {ended}",
        )


def in_a_line(run: Run) -> str:
    """Says of a run what one asks first."""
    settings = run.settings
    parts = []
    if settings:
        parts.append(f"{settings.get('model')} on {_data(run)}")
    wanted = settings.get("num_steps")
    steps = f"{run.metrics.num_steps:,}"
    if isinstance(wanted, int) and wanted != run.metrics.num_steps:
        steps += f" of {wanted:,}"
    parts.append(f"{steps} steps")
    if run.account and run.last:
        account = run.account
        parts.append(goodput.ending(run.last))
        restarts = len(account.placed) - 1
        if restarts:
            parts.append(f"{restarts:,} restart{'s' * (restarts > 1)}")
        parts += [
            f"{images_per_sec(account):,.0f} images/s",
            f"{goodput.clock(account.wall_secs)} h, of which "
            f"{account.goodput:.0%} went into useful steps",
        ]
    return "; ".join(parts)


def best_by_figure(runs: Sequence[Run]) -> list[str]:
    """Says which run is the best, by each figure of which that is known.

    Where figures were measured in several ways, it says in which.

    Args:
        runs: any number.
    """
    lines = []
    kinds = dict.fromkeys(kind for run in runs for kind in run.figures)
    ways = protocols(runs)
    for kind in filter(lambda kind: kind.best, kinds):
        by = f" by protocol {ways.index(kind.protocol) + 1}"
        found = [
            (best, run.name)
            for run in runs
            if (best := figures.best(kind, run.figures.get(kind, ())))
        ]
        first = figures.best(kind, [best for best, _ in found])
        lines += [
            f"{name}: {figures.title(kind.name)} {best.value:.4g} at step "
            f"{best.step:,}{by if len(ways) > 1 else ''}"
            for best, name in found
            if best is first
        ]
    return lines


def protocols(runs: Sequence[Run]) -> list[Protocol]:
    """Lists the ways in which figures of runs were measured.

    Args:
        runs: any number.
    """
    kinds = (kind for run in runs for kind in run.figures)
    return list(dict.fromkeys(kind.protocol for kind in kinds))


def images_per_sec(account: goodput.Account) -> float:
    """Returns the throughput of the steps that were done for good."""
    return account.num_images / max(account.seconds["useful"], 1e-9)


def _data(run: Run) -> str:
    dataset = str(run.settings.get("dataset"))
    shape, number = run.data.get("image_shape"), run.data.get("num_images")
    if not isinstance(shape, list) or not isinstance(number, int):
        return dataset
    sides = "x".join(map(str, shape))
    return f"{os.path.basename(dataset)} ({number:,} images {sides})"
