"""What a run does every N steps beside training: figures and pictures.

Each is an object of its own class, made by a row in `run.opening`. The training
loop stops at the steps where one is due, calls it on all workers, and counts
its time in the ledger. Its figures are written into the step's line of
metrics.jsonl, where `--best_metric` finds them.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping


class UnfinishedError(Exception):
    """A notice has ended what is done every N steps before it was done.

    All workers raise it, at the same step. The step's line of metrics.jsonl
    waits for its figures: the next start does all of the step again.
    """


class Periodic(abc.ABC):
    """Something that a run does every N steps.

    Attributes:
        every_steps: steps between two times; 0 is never.
        at_end: whether it is done after the last step, too. Figures are not:
            metrics.jsonl would not be that of a longer run.
        names: of the figures that it returns, as metrics.jsonl has them.
        spends: what the ledger counts its time as, of `goodput.KINDS`.
    """

    at_end = False
    names: Collection[str] = ()
    spends = "draw"

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps

    @abc.abstractmethod
    def run(self, step: int) -> Mapping[str, float]:
        """Does it. Every worker calls this, at the same step.

        It may take long, and wait for the other workers. What it returns must
        follow from the state of the run alone: a run that was killed has to
        have the figures of one that was not.

        Args:
            step: the steps that are done.

        Returns:
            Figures by name, for the metrics of the step; those of the chief
            are written.

        Raises:
            UnfinishedError: it takes long, and a worker was told to end.
        """

    def is_due(self, step: int, num_steps: int) -> bool:
        """Tells whether it is to be done.

        Args:
            step: the steps that are done.
            num_steps: of the whole run.
        """
        if self.at_end and step >= num_steps:
            return True
        return self.every_steps > 0 and step % self.every_steps == 0
