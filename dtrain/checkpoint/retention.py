"""Which checkpoints are kept: the union of what small policies keep.

A policy is a value with one method, `kept`, that is given all checkpoints,
oldest first, and returns the steps of those that stay. What a policy once left
out it never wants later, when newer ones are added. So to remove the rest after
every save ends with what would stay of the whole history.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

from dtrain.config import figures
from dtrain.errors import UserError


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a policy knows of a checkpoint.

    Attributes:
        step: the steps that were done.
        saved_at: when it was saved, in seconds since 1970.
        metrics: value by name, as of the save.
    """

    step: int
    saved_at: float
    metrics: Mapping[str, float | None]


class Policy(Protocol):
    """Chooses among checkpoints."""

    def kept(self, saved: Sequence[Saved]) -> set[int]:
        """Returns the steps that stay; `saved` is sorted by step."""
        ...


@dataclasses.dataclass(frozen=True)
class Last:
    """Keeps the newest.

    Attributes:
        num: how many, at least 1.
        of_steps: only those at a multiple of this count, at least 1.
    """

    num: int
    of_steps: int = 1

    def __post_init__(self) -> None:
        _check_whole("Last.num", self.num, at_least=1)
        _check_whole("Last.of_steps", self.of_steps, at_least=1)

    def kept(self, saved: Sequence[Saved]) -> set[int]:
        """Returns the steps that stay."""
        steps = [
            checkpoint.step
            for checkpoint in saved
            if not checkpoint.step % self.of_steps
        ]
        return set(steps[-self.num :])


@dataclasses.dataclass(frozen=True)
class EverySteps:
    """Keeps those at a multiple of `steps`.

    Attributes:
        steps: at least 1.
    """

    steps: int

    def __post_init__(self) -> None:
        _check_whole("EverySteps.steps", self.steps, at_least=1)

    def kept(self, saved: Sequence[Saved]) -> set[int]:
        """Returns the steps that stay."""
        return {
            checkpoint.step
            for checkpoint in saved
            if checkpoint.step % self.steps == 0
        }


@dataclasses.dataclass(frozen=True)
class NearSteps:
    """Keeps, for each multiple of `steps`, the one that comes nearest to it.

    For saves by the clock, whose steps are uneven: what is nearer to the next
    multiple is counted to that. Of two as near the later stays.

    Attributes:
        steps: at least 1.
    """

    steps: int

    def __post_init__(self) -> None:
        _check_whole("NearSteps.steps", self.steps, at_least=1)

    def kept(self, saved: Sequence[Saved]) -> set[int]:
        """Returns the steps that stay."""
        nearest: dict[int, int] = {}
        for checkpoint in saved:
            step = checkpoint.step
            multiple = (step + self.steps // 2) // self.steps * self.steps
            other = nearest.get(multiple, step)
            if abs(step - multiple) <= abs(other - multiple):
                nearest[multiple] = step
        return set(nearest.values())


@dataclasses.dataclass(frozen=True)
class Doubling:
    """Keeps those at `steps`, twice, four times, eight times as many.

    A long run keeps few, and its early hours, where most happens, are there.

    Attributes:
        steps: of the first, at least 1.
    """

    steps: int

    def __post_init__(self) -> None:
        _check_whole("Doubling.steps", self.steps, at_least=1)

    def kept(self, saved: Sequence[Saved]) -> set[int]:
        """Returns the steps that stay."""
        # A power of two has one bit.
        return {
            checkpoint.step
            for checkpoint in saved
            if checkpoint.step % self.steps == 0
            and (checkpoint.step // self.steps).bit_count() == 1
        }


@dataclasses.dataclass(frozen=True)
class Within:
    """Keeps those that were saved at most `hours` before the newest.

    What a clock that was ahead has saved stays the longer.

    Attributes:
        hours: more than 0.
    """

    hours: float

    def __post_init__(self) -> None:
        _check_hours("Within.hours", self.hours)

    def kept(self, saved: Sequence[Saved]) -> set[int]:
        """Returns the steps that stay."""
        return {
            checkpoint.step
            for checkpoint in saved
            if saved[-1].saved_at - checkpoint.saved_at <= self.hours * 3600
        }


@dataclasses.dataclass(frozen=True)
class EveryHours:
    """Keeps the first, then each that is `hours` later than the last kept.

    Later by its step: one whose time lies as far before shows that a clock was
    wrong, and the hours count anew from there.

    Attributes:
        hours: more than 0.
    """

    hours: float

    def __post_init__(self) -> None:
        _check_hours("EveryHours.hours", self.hours)

    def kept(self, saved: Sequence[Saved]) -> set[int]:
        """Returns the steps that stay."""
        chosen: list[Saved] = []
        for checkpoint in saved:
            if (
                not chosen
                or abs(checkpoint.saved_at - chosen[-1].saved_at)
                >= self.hours * 3600
            ):
                chosen.append(checkpoint)
        return {checkpoint.step for checkpoint in chosen}


@dataclasses.dataclass(frozen=True)
class Best:
    """Keeps those with the best values of a metric.

    One whose value is NaN or not known is not among them. Of two with the
    same value the newer is the better one.

    Attributes:
        num: how many, at least 1.
        metric: the name of the metric.
        mode: min if a smaller value is better, max if a larger one is.
    """

    num: int
    metric: str
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        _check_whole("Best.num", self.num, at_least=1)
        if not isinstance(self.metric, str) or not self.metric:
            raise UserError(
                f"Best.metric ({self.metric!r}) must be the name of a metric; "
                "try 'generator_loss'"
            )
        if self.mode not in ("min", "max"):
            raise UserError(
                f"Best.mode ({self.mode!r}) must be min or max; try 'min' for "
                "a loss"
            )

    def kept(self, saved: Sequence[Saved]) -> set[int]:
        """Returns the steps that stay."""
        sign = 1.0 if self.mode == "max" else -1.0
        rated = [
            (sign * value, checkpoint.step)
            for checkpoint in saved
            if (value := checkpoint.metrics.get(self.metric)) is not None
            and not math.isnan(value)
        ]
        return {step for _, step in sorted(rated)[-self.num :]}


@dataclasses.dataclass(frozen=True)
class Pinned:
    """Keeps those of the given steps.

    Attributes:
        steps: at least 0 each.
    """

    steps: Collection[int]

    def __post_init__(self) -> None:
        for step in self.steps:
            _check_whole("Pinned.steps", step, at_least=0)

    def kept(self, saved: Sequence[Saved]) -> set[int]:
        """Returns the steps that stay."""
        return {
            checkpoint.step
            for checkpoint in saved
            if checkpoint.step in self.steps
        }


def kept(saved: Sequence[Saved], policies: Sequence[Policy]) -> set[int]:
    """Chooses the checkpoints that stay.

    Args:
        saved: the checkpoints that are there, sorted by step.
        policies: a checkpoint stays if any of them keeps it.

    Returns:
        The steps that stay, the newest always among them.
    """
    steps = [checkpoint.step for checkpoint in saved]
    assert all(a < b for a, b in itertools.pairwise(steps)), steps
    return set(steps[-1:]).union(*(policy.kept(saved) for policy in policies))


def _check_whole(name: str, value: int, *, at_least: int) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < at_least:
        raise UserError(
            f"{name} ({value!r}) must be a whole number of at least "
            f"{at_least}; try {max(at_least, 5)}"
        )


def _check_hours(name: str, value: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise UserError(f"{name} ({value!r}) must be a number above 0; try 1")


# What makes the policy that a flag asks for, by the name of the flag.
_BY_FLAG: Mapping[str, Callable[[Any], Policy]] = {
    "max_to_keep": lambda flags: Last(flags.max_to_keep),
    "keep_every_n_steps": lambda flags: EverySteps(flags.keep_every_n_steps),
    "keep_near_steps": lambda flags: NearSteps(flags.keep_near_steps),
    "keep_doubling_steps": lambda flags: Doubling(flags.keep_doubling_steps),
    "keep_every_hours": lambda flags: EveryHours(flags.keep_every_hours),
    "keep_within_hours": lambda flags: Within(flags.keep_within_hours),
    "keep_best": lambda flags: Best(
        flags.keep_best,
        flags.best_metric,
        figures.best_of(flags.best_metric)
        if flags.best_mode == "auto"
        else flags.best_mode,
    ),
}
# All that a policy may be told by.
FLAGS = (*_BY_FLAG, "best_metric", "best_mode")


def of_flags(flags: Any) -> list[Policy]:
    """Makes the policies that flags ask for.

    Args:
        flags: has the values as attributes, as `Config` and the arguments of
            `checkpoint_tool prune` do; 0 asks for nothing.
    """
    return [
        make(flags) for name, make in _BY_FLAG.items() if getattr(flags, name)
    ]
