"""Measures a run as it goes: `--evaluate_every_steps`.

The figures stand in the step's line of metrics.jsonl, where `--best_metric`
finds them, and with their protocol in figures.jsonl. The training does not
depend on them. One that a notice ends is gone on with after the next start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dtrain import flags
from dtrain.cluster.workers import Workers
from dtrain.config import Config, figures
from dtrain.data.sources import Data
from dtrain.errors import UserError
from dtrain.gan.state import GAN
from dtrain.quality import choosing, figure_log
from dtrain.quality.evaluation import Evaluation, Result, Wanted
from dtrain.quality.figure_log import Line
from dtrain.quality.real_images import default_cache_dir
from dtrain.quality.saying import Slowly
from dtrain.record import images
from dtrain.record.ledger import Ledger
from dtrain.record.periodic import Periodic, UnfinishedError
from dtrain.storage import files

# Samples that are shown beside the images nearest to them.
_NUM_SHOWN = 8


class Around(NamedTuple):
    """What an evaluation in training has to do with.

    Attributes:
        workers: of the run.
        is_told: tells whether this process was told to end.
        say: shows a line; the chief's alone.
        ledger: knows what evaluations have taken.
    """

    workers: Workers
    is_told: Callable[[], bool]
    say: Callable[[str], object]
    ledger: Ledger


def make(gan: GAN, data: Data, workers: Workers) -> Evaluation | None:
    """Makes what measures a run, if it is measured. Every worker calls this.

    The extractor may have to be trained first.

    Args:
        gan: whose state is measured.
        data: all that the run reads.
        workers: of the run.

    Raises:
        UserError: the extractor or a figure does not suit the run.
        StorageError: the extractor cannot be read.
    """
    config = gan.config
    if not config.evaluate_every_steps:
        return None
    slowly = Slowly(print if workers.is_chief else lambda _: None)
    cache_dir = flags.expand_home(config.evaluate_cache_dir)
    cache_dir = cache_dir or default_cache_dir()
    extractor = choosing.make(
        config.evaluate_extractor,
        data.source,
        config,
        workers,
        cache_dir,
        slowly,
    )
    names = figures.chosen("evaluate_figures", config.evaluate_figures)
    wanted = Wanted(names, config.evaluate_num_images)
    made = Evaluation(gan, data, extractor, workers, wanted, cache_dir, slowly)
    metric = config.best_metric
    is_figure = bool(config.keep_best) and metric in figures.FIGURES
    if is_figure and metric not in made.names:
        raise UserError(
            f"best_metric ({metric}) is not measured in this run: "
            f"{', '.join(made.names)} are; see evaluate_figures"
        )
    return made


class Evaluating(Periodic):
    """Measures, every N steps, what the moving averages draw."""

    spends = "evaluate"

    def __init__(
        self, config: Config, evaluation: Evaluation, around: Around
    ) -> None:
        """Measures nothing yet.

        Args:
            config: of the run.
            evaluation: what `make` returned.
            around: what else it has to do with.
        """
        super().__init__(config.evaluate_every_steps)
        self._config, self._evaluation = config, evaluation
        self._around, self._last_secs = around, 0.0
        self._half_path = f"{config.run_dir}/evaluation.safetensors"

    def run(self, step: int) -> Mapping[str, float]:
        """Measures the state; see `Periodic.run`.

        Raises:
            UnfinishedError: a worker was told to end before it was done.
        """
        workers = self._around.workers
        [is_left_out] = workers.agree(
            workers.is_chief and self._is_over_budget()
        )
        if is_left_out:
            return {}
        known = workers.share(lambda: self._known(step))
        if known is not None:
            return known
        try:
            result = self._evaluation.measure(
                step,
                self._checkpoint(step),
                self._around.is_told,
                self._half_path,
            )
        except UserError as error:
            # On all workers alike. The training is worth more than a figure.
            self._around.say(f"step {step:,} is not evaluated: {error.text}")
            return {}
        [is_done] = workers.agree(result is not None)
        if not is_done:
            raise UnfinishedError
        if result is None:
            return {}
        self._write(result)
        self._tell(result.line)
        return _finite(result.line)

    def _known(self, step: int) -> dict[str, float] | None:
        """Finds the figures of a step that is done again after a kill."""
        evaluation, run_dir = self._evaluation, self._config.run_dir
        try:
            line = figure_log.find(
                figure_log.read(run_dir),
                step,
                evaluation.protocol,
                evaluation.samples.state(),
                evaluation.names,
            )
        except OSError:
            return None
        return _finite(line) if line else None

    def _checkpoint(self, step: int) -> str | None:
        """Names the checkpoint that will be saved at a step."""
        every_steps = self._config.checkpoint_every_steps
        is_saved = every_steps and step % every_steps == 0
        is_last = step == self._config.num_steps
        return f"ckpt-{step}" if is_saved or is_last else None

    def _is_over_budget(self) -> bool:
        percent = self._config.evaluate_budget_percent
        if not percent or not self._last_secs:
            return False
        spent, total = self._around.ledger.spent(self.spends)
        share = (spent + self._last_secs) / (total + self._last_secs)
        return 100 * share > percent

    def _write(self, result: Result) -> None:
        """Writes what was found; a disk that fails does not end the run."""
        run_dir, line = self._config.run_dir, result.line
        self._last_secs = line.secs
        try:
            figure_log.append(run_dir, line)
            files.remove(self._half_path)
            if result.nearest is not None:
                picture = self._evaluation.samples.beside(
                    result.nearest[:_NUM_SHOWN]
                )
                path = figure_log.nearest_path(run_dir, line.step)
                files.make_directory(path.rpartition("/")[0], parents=False)
                images.write(path, images.encode_png(picture))
        except OSError as error:
            print(
                f"the figures of step {line.step:,} are not written: "
                f"{files.reason(error)}",
                file=sys.stderr,
                flush=True,
            )

    def _tell(self, line: Line) -> None:
        """Says the first figure with its floor, and what all this costs."""
        spent, total = self._around.ledger.spent(self.spends)
        parts = []
        for name in self._evaluation.names[:3]:
            value, floor = line.figures.get(name), line.floor.get(name)
            if value is not None and floor is not None:
                parts.append(f"{name} {value:.4g} (floor {floor:.4g})")
        self._around.say(
            f"step {line.step:,}: {', '.join(parts)}; {line.secs:.1f} s, "
            f"evaluations are {spent / max(total, 1e-9):.1%} of the time"
        )


def _finite(line: Line) -> dict[str, float]:
    return {
        name: value for name, value in line.figures.items() if value is not None
    }
