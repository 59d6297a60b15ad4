"""`--dry_run`: what a run would do and cost, before anything is written."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import textwrap
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from dtrain import wording
from dtrain.cluster.workers import Workers
from dtrain.config import Config, presets
from dtrain.data import pipeline, sources
from dtrain.errors import FINISHED
from dtrain.gan.state import GAN
from dtrain.gan.step import Step
from dtrain.quality import periodic as evaluations
from dtrain.run import best, identity, introduction, looking, opening, resuming
from dtrain.run.tiers import open_tiers

# Timed after one that is not, in which the step is traced and compiled.
_NUM_TIMED_STEPS = 10
# Of a step, from where one is enough.
_SLOW_SECS = 5.0
_WIDTH = 78
_SHOWN_ELSEWHERE = ("preset", "dry_run", "run_dir")


def rehearse(config: Config, workers: Workers) -> int:
    """Prints what a run would do, and changes nothing. Every worker calls it.

    Some steps are run, to be timed, on a state that nobody keeps.

    Args:
        config: the run's settings.
        workers: all of them, with the strategy of the run.

    Returns:
        The exit code.

    Raises:
        UserError: the settings do not fit data, machine or run directory.
        StorageError: the state could not be read.
    """
    data, description, note = looking.look(config, workers)
    config = description.config
    gan, step, estimate = opening.build(config, data, workers)
    evaluations.make(gan, data, workers)
    tiers = open_tiers(config, workers.cluster, identity.to_dict(description))
    restored = workers.together(lambda: resuming.look(tiers))
    opening.check_belongs(restored, description)
    done = restored.manifest.step if restored.manifest else 0
    if workers.is_chief:
        pixels = max(data.source.image_shape[:2])
        replicas = workers.strategy.num_replicas_in_sync
        print("\n".join(_settings(config, presets.decide(pixels, replicas))))
        for network in gan.program.networks.values():
            print("\n".join(_layers(network)))
        print(
            introduction.text(gan, data, workers, estimate, restored),
            flush=True,
        )
    pace = _pace(gan, step, data, workers)
    draw = opening.make_draw(gan, data)
    figures = opening.make_figures(gan, data, draw, is_chief=workers.is_chief)
    best.refuse_unknown(config, pace.metrics, figures)
    if workers.is_chief:
        backup = "nowhere"
        if tiers.backup and config.backup_every_secs:
            backup = tiers.backup.directory.path
        print(
            f"{_speed(config, pace, config.num_steps - done)}\n"
            f"saves     to {tiers.history.directory.path}, backups to "
            f"{backup}\nnothing was written: this was a dry run"
        )
        opening.say([note, *restored.notes])
    return FINISHED


def _settings(config: Config, rule: Mapping[str, Any]) -> list[str]:
    """Says what the preset is, and which settings are not the defaults.

    `rule` is what it would decide now.
    """
    preset = presets.of(config.preset)
    of_preset, given = [], []
    decided = {name: rule[name] for name in preset.decided}
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if value == field.default or name in _SHOWN_ELSEWHERE:
            continue
        is_set = value == {**preset.settings, **decided}.get(name)
        shown = " ".join(value) if isinstance(value, tuple) else value
        (of_preset if is_set else given).append(f"{name} {shown}")
    texts = []
    if config.preset:
        about = f"{config.preset}: {preset.purpose}. {preset.paper}"
        texts = [("preset", about), ("", f"sets {', '.join(of_preset)}")]
    if decided:
        texts.append(("", f"by the rule: {presets.RULE}"))
    if given:
        texts.append(("given", ", ".join(given)))
    return [
        line
        for title, text in texts
        for line in textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=f"{title:10}",
            subsequent_indent=" " * 10,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def _layers(network: keras.Model) -> list[str]:
    """Lists the layers of a network, as Keras does, with its own title."""
    lines: list[str] = []
    network.summary(
        line_length=_WIDTH, expand_nested=True, print_fn=lines.append
    )
    return list(itertools.chain(*(text.rstrip().split("\n") for text in lines)))


class _Pace(NamedTuple):
    """How fast steps are.

    Attributes:
        secs: of a step.
        num_steps: over which it was measured.
        metrics: of a step, by their names.
    """

    secs: float
    num_steps: int
    metrics: tuple[str, ...]


def _pace(gan: GAN, step: Step, data: sources.Data, workers: Workers) -> _Pace:
    """Runs some steps from the first weights. Every worker calls this."""
    iterator = pipeline.make_iterator(
        data, gan.config, gan.strategy, 0, step.num_draws
    )

    def timed(num_steps: int) -> _Pace:
        began = time.monotonic()
        metrics, _ = step.run(iterator, tf.constant(num_steps))
        # One whose losses are not finite ends the others.
        done = len(next(iter(metrics.values())).numpy())
        secs = (time.monotonic() - began) / done
        return _Pace(secs, done, tuple(metrics))

    timed(1)
    pace = timed(1)
    [is_slow] = workers.agree(pace.secs > _SLOW_SECS)
    return pace if is_slow else timed(_NUM_TIMED_STEPS)


def _speed(config: Config, pace: _Pace, num_steps: int) -> str:
    """Says how fast the steps were, and when the run would end."""
    left = datetime.timedelta(seconds=round(pace.secs * num_steps))
    over = f"{pace.num_steps} steps" if pace.num_steps > 1 else "one step"
    took = f"{wording.three_figures(1e3 * pace.secs)} ms"
    return (
        f"speed     {config.batch_size / pace.secs:,.0f} images/s, "
        f"{took} a step, over {over}; {left} for the "
        f"{num_steps:,} steps that are left"
    )
