"""The learning rates of a run, as figures."""

from __future__ import annotations

from collections.abc import Mapping

import keras

from dtrain.config import RunSettings
from dtrain.record.periodic import Periodic


class LearningRates(Periodic):
    """Reads them from the optimizers: a program may have brought its own."""

    def __init__(
        self,
        config: RunSettings,
        optimizers: Mapping[str, keras.Optimizer],
        *,
        is_chief: bool,
    ) -> None:
        """Reads nothing yet.

        Args:
            config: `sample_every_steps` counts.
            optimizers: by the name of the first network that each trains.
            is_chief: whether this worker reads them.
        """
        super().__init__(config.sample_every_steps)
        self.names = [f"{name}_learning_rate" for name in optimizers]
        self._optimizers = optimizers
        self._is_chief = is_chief

    def run(self, step: int) -> Mapping[str, float]:
        """Reads those that the step had; see `Periodic.run`."""
        del step
        if not self._is_chief:
            return {}
        return {
            name: float(keras.ops.convert_to_numpy(optimizer.learning_rate))
            for name, optimizer in zip(
                self.names, self._optimizers.values(), strict=True
            )
        }
