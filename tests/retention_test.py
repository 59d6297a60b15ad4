"""Which checkpoints stay."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dtrain import retention

steps = st.sets(st.integers(0, 10_000), min_size=1)


@given(steps, st.integers(1, 20), st.integers(0, 500))
def test_keeps_the_newest_and_the_multiples(
    present: set[int], max_to_keep: int, every: int
) -> None:
    kept = retention.kept(present, max_to_keep, every)
    assert kept <= present
    assert max(present) in kept
    for step in present - kept:
        assert sum(other > step for other in present) >= max_to_keep
        assert not every or step % every


def test_example() -> None:
    assert retention.kept(range(100, 1001, 100), 2, 300) == {
        300,
        600,
        900,
        1000,
    }
