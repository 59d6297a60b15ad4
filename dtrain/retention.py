"""Which checkpoints are kept: a pure function of their steps."""

from __future__ import annotations

from collections.abc import Collection


def kept(
    steps: Collection[int], max_to_keep: int, keep_every_n_steps: int
) -> set[int]:
    """Chooses the checkpoints that stay.

    Args:
        steps: the steps of the checkpoints that exist.
        max_to_keep: how many of the newest stay, at least 1.
        keep_every_n_steps: those whose step is a multiple of this stay too;
            0 means none.

    Returns:
        The steps that stay, a subset of `steps`; the newest is always among
        them.
    """
    newest = set(sorted(steps)[-max_to_keep:])
    if not keep_every_n_steps:
        return newest
    return newest | {step for step in steps if step % keep_every_n_steps == 0}
