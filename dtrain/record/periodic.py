"""What a run does every N steps beside training: figures and pictures.

Each is a value of its own class, and one row in `run.opening`. The loop ends
its steps where one is due, calls it on all workers, counts its time in the
ledger, and writes its figures into the line that metrics.jsonl has of the
step, where `--best_metric` finds them.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping


class Periodic(abc.ABC):
    """Something that a run does every N steps.

    Attributes:
        every_steps: steps between two times; 0 is never.
        at_end: whether it is done after the last step, too. A figure is not:
            a run that is made longer later would have another line there.
        spends: the kind of time that the ledger counts it as.
    """

    at_end = False
    spends = "draw"

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps

    @abc.abstractmethod
    def run(self, step: int) -> Mapping[str, float]:
        """Does it. Every worker calls this, at the same step.

        It may take as long as it needs, and meet the other workers. What it
        returns must follow from the state of the run alone, or a run that was
        killed would have other figures than one that was not.

        Args:
            step: the steps that are done.

        Returns:
            Figures by name, for the metrics of the step; those of the chief
            are written.
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
