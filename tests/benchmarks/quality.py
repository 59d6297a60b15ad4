"""What figures say of generators that one knows, and what they cost.

    python -m tests.benchmarks.quality [--write]
    python -m tests.benchmarks.quality --dataset=idx:/path --num_images=50000

The first trains a DCGAN on the digits and measures it at several steps, beside
real images and generators that are broken, all against the same half of the
data; `--write` puts the table into docs/quality.md. The second measures an
untrained DCGAN on a data set, and prints seconds, memory and images/s, these
beside a plain `predict` of Keras by the same network, taking turns.
"""

from __future__ import annotations

import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from dtrain import config as config_lib
from dtrain.cluster import environment
from dtrain.cluster import strategy as strategy_lib
from dtrain.cluster.workers import Workers
from dtrain.config import figures as names
from dtrain.data import pipeline, sources
from dtrain.gan import state
from dtrain.quality import choosing, figures
from dtrain.quality.evaluation import Evaluation, Wanted
from dtrain.quality.extraction import Extraction, Make
from dtrain.quality.extractors import Extractor
from dtrain.quality.sample import Rows, Sample
from dtrain.quality.samples import Samples
from dtrain.quality.saying import Slowly
from dtrain.run import export, resuming
from tests import runs
from tests.benchmarks import command

STEPS = (0, 250, 1000, 6000)
PAGE = runs.ROOT / "docs/quality.md"
# Between which the table stands.
MARKS = ("<!-- by tests.benchmarks.quality -->\n", "<!-- end -->\n")
_BETTER = {"min": "small", "max": "large"}
WORKERS = Workers(tf.distribute.get_strategy(), environment.ALONE)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _sample(extractor: Extractor, total: int, **how: Make) -> Sample:
    """Adds up what is made, or read, of the indices from 0 on."""
    sample = Sample(
        total,
        extractor.num_features,
        extractor.num_classes,
        keeps_rows=True,
    )
    extraction = Extraction(extractor, WORKERS, **how)
    for rows in extraction.rows(0, total, lambda: False):
        sample.add(rows)
    return sample


def _of(images: np.ndarray, labels: np.ndarray) -> Make:
    """Makes what reads arrays in the place of a generator."""

    def read(indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        chosen = indices % len(images)
        return (
            tf.constant(images[chosen.numpy()], tf.float32),
            tf.constant(labels[chosen.numpy()], tf.int32),
        )

    return read


def _broken(
    images: np.ndarray, labels: np.ndarray, size: int
) -> dict[str, Make]:
    """Makes generators that are broken, of the first half of the data."""
    chance = np.random.default_rng(1)
    asked = np.arange(size) % 10
    own = images[:size]
    # New images, all of one class: of the other half.
    zeros = images[size:][labels[size:] == 0]
    return {
        "one class": _of(zeros[chance.integers(0, len(zeros), size)], asked),
        "constant": _of(np.repeat(own.mean(0)[None], size, axis=0), asked),
        "noise": _of(chance.uniform(-1, 1, own.shape), asked),
        "copies": _of(own[chance.integers(0, size, size)], asked),
    }


def _trained(directory: str) -> tuple[export.Trained, str]:
    """Trains the DCGAN of `make train`, and keeps its checkpoints."""
    run_dir = f"{directory}/run"
    every_steps = "--checkpoint_every_steps=250"
    flags = ("--conditional", every_steps, "--max_to_keep=99")
    runs.run("dtrain.main", f"--run_dir={run_dir}", *flags)
    return export.build(run_dir)


def table() -> list[str]:
    """Returns the lines of the table, as Markdown."""
    with tempfile.TemporaryDirectory() as directory:
        trained, run_id = _trained(directory)
        data = sources.open_data(trained.config)
        source = data.source
        order = np.random.default_rng(0).permutation(source.num_images)
        stored, labels = pipeline.read(source, tf.constant(order))
        images, labels = source.seen(stored, None).numpy(), labels.numpy()
        size = source.num_images // 2
        extractor = choosing.make(
            "classifier", source, trained.config, WORKERS, "", Slowly(_say)
        )
        real = _of(images[:size], labels[:size])
        reference = figures.reference(_sample(extractor, size, read=real))
        other = _of(images[size:], labels[size:])
        found = {"real images": _sample(extractor, size, read=other)}
        make = Samples(trained.gan, data, 0, "average").make
        for step in STEPS[::-1]:
            resuming.restore_step(
                trained.gan.checkpoint, trained.config, step, run_id
            )
            name = f"DCGAN, step {step:,}"
            found[name] = _sample(extractor, size, make=make)
        for name, read in _broken(images, labels, size).items():
            found[name] = _sample(extractor, size, read=read)
    rows = list(names.FIGURES)
    measured = [
        figures.measure(rows, reference, sample, 0) for sample in found.values()
    ]
    return [
        f"| figure | better | {' | '.join(found)} |",
        "|---" * (2 + len(found)) + "|",
        *(
            f"| `{name}` | {_BETTER[names.best_of(name)]} | "
            + " | ".join(f"{values[name]:.3g}" for values in measured)
            + " |"
            for name in rows
        ),
    ]


def _write(lines: list[str]) -> None:
    begin, end = MARKS
    before, _, rest = PAGE.read_text().partition(begin)
    _, _, after = rest.partition(end)
    text = "".join(f"{line}\n" for line in lines)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def _resident_gb() -> float:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1e6


def _timed(action: Callable[[], Any]) -> tuple[float, Any]:
    began = time.monotonic()
    result = action()
    return time.monotonic() - began, result


def cost(arguments: list[str]) -> None:
    """Prints what it costs to measure an untrained DCGAN on a data set."""
    own, rest = command.own_flags(
        arguments, {"num_images": 50_000, "rounds": 15}
    )
    config = config_lib.parse([sys.argv[0], *rest])
    strategy_lib.make(config, environment.ALONE)
    data = sources.open_data(config)
    source = data.source
    gan = state.GAN(
        config, WORKERS.strategy, source.image_shape, source.num_classes
    )
    say = Slowly(_say)
    secs, extractor = _timed(
        lambda: choosing.make("auto", source, config, WORKERS, "", say)
    )
    print(f"extractor  {extractor.name}, made in {secs:.0f} s")
    before = _resident_gb()
    wanted = Wanted(num_images=own["num_images"], num_real=source.num_images)
    with tempfile.TemporaryDirectory() as cache:
        evaluation = Evaluation(
            gan, data, extractor, WORKERS, wanted, cache, say
        )
        for state_of_cache in ("first", "again"):
            secs, result = _timed(
                lambda: evaluation.measure(0, None, lambda: False)
            )
            assert result
            print(f"{state_of_cache:<10} {secs:.0f} s for all figures")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"memory     {peak - before:.2f} GB at most, beyond the model")
    _compare(source, extractor, own["rounds"])


def _compare(source: sources.Source, extractor: Any, rounds: int) -> None:
    """Prints images/s beside those of `predict`, taking turns."""
    count = min(source.num_images, 5_000)
    stored, labels = pipeline.read(source, tf.range(count, dtype=tf.int64))
    images = source.seen(stored, None).numpy()

    def read(indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        chosen = indices % count
        return source.seen(tf.gather(stored, chosen), None), tf.gather(
            labels, chosen
        )

    extraction = Extraction(extractor, WORKERS, read=read)

    def by_dtrain() -> int:
        rows: list[Rows] = list(extraction.rows(0, count, lambda: False))
        return len(rows)

    def by_keras() -> Any:
        return extractor.network.predict(images, batch_size=256, verbose=0)

    by_dtrain()
    by_keras()
    ratios = []
    print("images/s\n  dtrain   predict  ratio")
    for _ in range(rounds):
        ours, _ = _timed(by_dtrain)
        theirs, _ = _timed(by_keras)
        ratios.append(theirs / ours)
        print(
            f"  {count / ours:7,.0f}  {count / theirs:7,.0f}  {ratios[-1]:.3f}"
        )
    print(f"median of the ratios {statistics.median(ratios):.3f}")


def main() -> None:
    """Prints a table."""
    arguments = sys.argv[1:]
    if any(each.startswith("--dataset") for each in arguments):
        cost(arguments)
        return
    lines = table()
    print("\n".join(lines))
    if "--write" in arguments:
        _write(lines)


if __name__ == "__main__":
    main()
