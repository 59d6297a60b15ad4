"""Which metrics belong together, by the endings of their names."""

from __future__ import annotations

_BY_ENDING = {
    "_loss": "losses",
    "_gradient_norm": "gradients",
    "_penalty": "penalties",
    "_learning_rate": "learning_rates",
}
ALL = tuple(_BY_ENDING.values())


def of(name: str) -> str:
    """Returns the group of a metric; empty for one of none.

    Args:
        name: as metrics.jsonl has it.
    """
    for ending, group in _BY_ENDING.items():
        if name.endswith(ending):
            return group
    return ""
