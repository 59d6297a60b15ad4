"""JSON with a value that is not what a program writes there.

A seal tells of damage, and not of who made the file: what is read back may have
any JSON in any place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

_ODD = (
    *(None, True, False, -1, 0, 1, 5.5, 7777, 2**31, 2**63, 10**30, 10**400),
    *(1e308, -1e308, float("nan"), float("inf"), "", "x", "60", "nope"),
    *("\0", "../../etc/passwd", "\ud800", "\x1b[31m", [], [1], ["a"], [[]]),
    *([-1], [10**30], [2**40] * 2, [1] * 300, {}, {"a": 1}, {"index": "x"}),
)


def mutations(body: Any) -> st.SearchStrategy[Any]:
    """Draws what `body` is with one value removed, added or of another kind.

    Args:
        body: of JSON's own types; it is not changed.
    """
    places = list(_places(body))
    return st.builds(
        lambda place, action, odd: _mutated(body, place, action, odd),
        st.sampled_from(places),
        st.sampled_from(("replace", "replace", "replace", "remove", "add")),
        st.sampled_from(_ODD),
    )


def _places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple]:
    """Yields the path of each value, of the first two of many alike."""
    if above:
        yield above
    if isinstance(value, dict):
        for key in list(value)[:60]:
            yield from _places(value[key], (*above, key))
    elif isinstance(value, list):
        for number in range(min(2, len(value))):
            yield from _places(value[number], (*above, number))


def _mutated(body: Any, place: tuple, action: str, odd: Any) -> Any:
    changed = copy.deepcopy(body)
    owner = changed
    for key in place[:-1]:
        owner = owner[key]
    if action == "replace":
        owner[place[-1]] = odd
    elif action == "remove":
        del owner[place[-1]]
    elif isinstance(owner, list):
        owner.append(odd)
    else:
        owner[odd if isinstance(odd, str) else "more"] = odd
    return changed
