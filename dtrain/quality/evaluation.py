"""Evaluates a generator: draws samples, and measures them against the data.

A sample is a function of the seed and of its index alone, whoever draws it with
which others. What has been seen of samples can be kept, and gone on with: a run
that is told to end in an evaluation takes it up again where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dtrain.cluster.workers import Workers
from dtrain.config import Config
from dtrain.config import figures as table
from dtrain.data.sources import Data
from dtrain.errors import UserError
from dtrain.gan.state import GAN
from dtrain.quality import background, figures, kept, neighbours
from dtrain.quality.extraction import Extraction
from dtrain.quality.extractors import Extractor
from dtrain.quality.figure_log import Line, Protocol
from dtrain.quality.real_images import Real, RealImages, fingerprint
from dtrain.quality.sample import Sample
from dtrain.quality.samples import AVERAGE, Samples
from dtrain.quality.saying import Slowly
from dtrain.storage import files

# Samples that can be shown beside images of the data, and how many of those.
_MOST_SHOWN, _NUM_NEAREST = 64, 5

# Images of the data, by sample; None where no figure compares pairs.
Nearest = npt.NDArray[np.int64] | None


class Wanted(NamedTuple):
    """What is to be measured.

    Attributes:
        names: of the figures; none are all that can be measured.
        num_images: samples.
        num_real: real images at most; 0 is as many as samples.
        seed: of latents and of the choice of real images.
        weights: of `samples.WEIGHTS`.
    """

    names: tuple[str, ...] = ()
    num_images: int = 2048
    num_real: int = 0
    seed: int = 0
    weights: str = AVERAGE


class Result(NamedTuple):
    """What an evaluation has found.

    Attributes:
        line: for `figures.jsonl`.
        nearest: int64 [n, k], images of the data that are nearest to each of
            the first samples; None where no figure compares pairs.
    """

    line: Line
    nearest: Nearest


class Evaluation:
    """Measures the states of one GAN.

    Attributes:
        names: of the figures that are measured.
        protocol: how.
        samples: draws what is measured.
        keeps_rows: whether a figure compares single images, so that it is
            known which are the nearest.
    """

    _real: Real | None

    def __init__(
        self,
        gan: GAN,
        data: Data,
        extractor: Extractor,
        workers: Workers,
        wanted: Wanted,
        cache_dir: str,
        say: Slowly,
    ) -> None:
        """Measures nothing yet. Every worker calls this.

        Args:
            gan: whose state is measured, whatever it is then.
            data: all that the run reads.
            extractor: makes the features.
            workers: whose replicas share the work.
            wanted: what is measured.
            cache_dir: where what real images say is kept; empty keeps nothing.
            say: shows lines of progress.

        Raises:
            UserError: a figure cannot be measured here, or of so few images.
        """
        self._extractor, self._workers = extractor, workers
        self._wanted, self._say = wanted, say
        config = gan.config
        self.names = _names(wanted.names, config, extractor)
        _check_numbers(wanted, data.source.num_images)
        self.protocol = _protocol(extractor, data, config, wanted, workers)
        self.keeps_rows = any(
            table.FIGURES[name].of_pairs for name in self.names
        )
        self._real_images = RealImages(
            data.source, extractor, workers, cache_dir, say
        )
        self._real, self._is_prepared = None, False
        self.samples = Samples(gan, data, wanted.seed, wanted.weights)
        self._extraction = Extraction(
            extractor,
            workers,
            make=self.samples.make,
        )

    def measure(
        self,
        step: int,
        checkpoint: str | None,
        is_stopped: Callable[[], bool],
        half_path: str = "",
    ) -> Result | None:
        """Measures the present state. Every worker calls this.

        Args:
            step: of the state.
            checkpoint: its name; None if it is in none.
            is_stopped: asked now and then; one worker's word ends it.
            half_path: of a file where what was seen so far is kept if it is
                stopped, and found; empty keeps nothing.

        Returns:
            What was found; None if it was stopped, and to other workers.

        Raises:
            UserError: a sample is not finite, or a real image cannot be read.
        """
        began = time.monotonic()
        if not self._prepare(is_stopped):
            return None
        state = self.samples.state()
        key = {"step": step, "state": state, **self.protocol._asdict()}
        key["rows"] = self.keeps_rows
        sample = self._sample()
        if not self._draw(sample, key, step, is_stopped, half_path):
            return None
        measured = self._compare(sample, step, is_stopped)
        if measured is None:
            self._keep_half(half_path, key, sample)
            return None
        found, floor, nearest = measured
        line = Line(
            step,
            checkpoint,
            self.protocol,
            found,
            floor,
            time.monotonic() - began,
            state,
        )
        return Result(line, nearest)

    def _prepare(self, is_stopped: Callable[[], bool]) -> bool:
        """Looks at the real images, once; False if it was stopped."""
        if self._is_prepared:
            return True
        self._real = self._real_images.measure(
            self.protocol,
            self.names,
            is_stopped,
            keeps_rows=self.keeps_rows,
        )
        self.samples.prepare()
        # The chief alone has it.
        [self._is_prepared] = self._workers.agree(self._real is not None)
        return self._is_prepared

    def _compare(
        self, sample: Sample, step: int, is_stopped: Callable[[], bool]
    ) -> tuple[dict[str, float], dict[str, float], Nearest] | None:
        """Measures samples on the chief; None elsewhere, or if stopped."""

        def is_to_end() -> bool:
            total = f"{sample.total:,} samples"
            self._say(f"evaluating step {step:,}: comparing {total}")
            return is_stopped()

        return background.compute(
            self._workers, lambda: self._compute(sample), is_to_end
        )

    def _compute(
        self, sample: Sample
    ) -> tuple[dict[str, float], dict[str, float], Nearest]:
        """Measures samples; returns figures, their floor, and what is near."""
        real = self._real
        assert real, "the chief has it"
        found = figures.measure(
            self.names, real.reference, sample, self._wanted.seed
        )
        return found, real.floor, self._nearest(real, sample)

    def _nearest(self, real: Real, sample: Sample) -> Nearest:
        """Finds images of the data that are near to the first samples."""
        if not real.reference.rows:
            return None
        places = neighbours.nearest(
            sample.rows.features[:_MOST_SHOWN],
            real.reference.rows.features,
            _NUM_NEAREST,
        )
        return self._real_images.indices(self.protocol)[places]

    def _sample(self) -> Sample:
        extractor = self._extractor
        return Sample(
            self._wanted.num_images,
            extractor.num_features,
            extractor.num_classes,
            keeps_rows=self.keeps_rows,
        )

    def _draw(
        self,
        sample: Sample,
        key: Mapping[str, Any],
        step: int,
        is_stopped: Callable[[], bool],
        half_path: str,
    ) -> bool:
        """Adds all samples; False if it was stopped."""
        workers, total = self._workers, sample.total
        seen = workers.share(lambda: self._take_half(half_path, key, sample))
        for rows in self._extraction.rows(seen, total, is_stopped):
            seen = min(seen + len(rows.labels), total)
            if workers.is_chief:
                sample.add(rows)
            self._say(
                f"evaluating step {step:,}: {seen:,} of {total:,} samples"
            )
        if seen < total:
            self._keep_half(half_path, key, sample)
        return seen == total

    def _keep_half(
        self, path: str, key: Mapping[str, Any], sample: Sample
    ) -> None:
        if not (path and self._workers.is_chief):
            return
        try:
            kept.write(path, key, sample.to_arrays())
        except OSError as error:
            self._say.now(f"{path} is not written: {files.reason(error)}")

    def _take_half(
        self, path: str, key: Mapping[str, Any], sample: Sample
    ) -> int:
        """Takes what was seen before; returns of how many samples that is."""
        if not path:
            return 0
        try:
            sample.take(kept.read(path, key) or {})
        except (OSError, KeyError, ValueError):
            # UserError is one: of another step, or of other figures.
            return 0
        return sample.num_seen


def _protocol(
    extractor: Extractor,
    data: Data,
    config: Config,
    wanted: Wanted,
    workers: Workers,
) -> Protocol:
    source = data.source
    num_real = wanted.num_real or wanted.num_images
    return Protocol(
        extractor=extractor.name,
        digest=extractor.digest,
        num_real=min(num_real, source.num_images),
        num_generated=wanted.num_images,
        split=config.split,
        resize=extractor.resize,
        seed=wanted.seed,
        weights=wanted.weights,
        data=workers.share(lambda: fingerprint(source, config)),
    )


def _names(
    wanted: Sequence[str], config: Config, extractor: Extractor
) -> tuple[str, ...]:
    """Returns the figures that are measured.

    Raises:
        UserError: one that is wanted needs what is not there.
    """
    has = []
    if extractor.num_classes:
        has.append(table.CLASSES)
    if extractor.knows_labels:
        has.append(table.LABELS)
    if config.conditional:
        has.append(table.CONDITIONAL)
    for name in wanted:
        for need in table.lacking(name, has):
            raise UserError(f"figures ({name}) {_WHY[need]}")
    every = [name for name in table.FIGURES if not table.lacking(name, has)]
    return tuple(wanted) or tuple(every)


_WHY = {
    table.CLASSES: "needs an extractor that tells classes apart; use "
    "classifier or inception:FILE",
    table.LABELS: "needs an extractor that knows the labels of the data; use "
    "classifier, on data that has labels",
    table.CONDITIONAL: "needs a conditional model; train with --conditional",
}


def _check_numbers(wanted: Wanted, num_images: int) -> None:
    """Checks that there are images enough.

    Raises:
        UserError: there are not.
    """
    for name, number in (
        ("num_images", wanted.num_images),
        ("num_real", wanted.num_real or figures.LEAST),
    ):
        if number < figures.LEAST:
            raise UserError(
                f"{name} ({number}) must be at least {figures.LEAST}: figures "
                "of fewer images say nothing; 10000 are usual"
            )
    if num_images < figures.LEAST:
        raise UserError(
            f"the data has {num_images} images, and figures need at least "
            f"{figures.LEAST}"
        )
