"""How numbers are said to people."""

from __future__ import annotations


def three_figures(value: float) -> str:
    """Says a number in three figures, and a larger one in all of its own.

    Args:
        value: at least 0.
    """
    # A person reads 3,770 and not 3.77e+03.
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
