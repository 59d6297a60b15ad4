"""Which checkpoints stay."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from dtrain import errors
from dtrain.checkpoint import retention
from dtrain.checkpoint.retention import (
    Best,
    Doubling,
    EveryHours,
    EverySteps,
    Last,
    NearSteps,
    Pinned,
    Policy,
    Saved,
    Within,
)


def saves(*steps: int, loss: dict[int, Any] | None = None) -> list[Saved]:
    """Saves an hour apart for each hundred steps."""
    losses = loss or {}
    return [
        Saved(
            step, 36.0 * step, {"loss": losses[step]} if step in losses else {}
        )
        for step in steps
    ]


HUNDREDS = saves(*range(100, 1001, 100))
RATED = saves(
    *range(1, 8), loss={1: 0.5, 2: 0.1, 3: math.nan, 4: None, 5: 0.1, 6: 0.9}
)


@pytest.mark.parametrize(
    ("policy", "history", "steps"),
    [
        (Last(3), HUNDREDS, {800, 900, 1000}),
        (Last(30), HUNDREDS, set(range(100, 1001, 100))),
        (Last(3), [], set()),
        (Last(2, of_steps=300), HUNDREDS, {600, 900}),
        (Last(2, of_steps=300), saves(0, 301, 302, 303), {0}),
        (EverySteps(300), HUNDREDS, {300, 600, 900}),
        (EverySteps(7), saves(0, 3, 7), {0, 7}),
        (NearSteps(300), HUNDREDS, {100, 300, 600, 900}),
        # Each is counted to the multiple that it is nearest to.
        (
            NearSteps(100),
            saves(0, 49, 50, 70, 95, 105, 149, 250, 380, 399),
            {0, 105, 250, 399},
        ),
        (NearSteps(7), saves(3, 4, 9, 11, 17, 30), {3, 9, 17, 30}),
        (Doubling(100), HUNDREDS, {100, 200, 400, 800}),
        (Doubling(3), saves(0, 3, 6, 7, 9, 12), {3, 6, 12}),
        (EveryHours(4), HUNDREDS, {100, 500, 900}),
        (EveryHours(3.5), HUNDREDS, {100, 500, 900}),
        (EveryHours(0.5), HUNDREDS, set(range(100, 1001, 100))),
        (EveryHours(4), [], set()),
        (Within(3), HUNDREDS, {700, 800, 900, 1000}),
        (Within(2.5), HUNDREDS, {800, 900, 1000}),
        (Within(99), HUNDREDS, set(range(100, 1001, 100))),
        (Within(1), [], set()),
        # The clock of one was 30 days ahead, and that of another behind.
        (
            Within(2),
            [
                Saved(step, (step + days * 24) * 3600.0, {})
                for step, days in enumerate([0, 0, 30, 0, 0, -30, 0])
            ],
            {2, 4, 6},
        ),
        # One was saved by a clock that was 30 days ahead.
        (
            EveryHours(1),
            [
                Saved(step, (step + 720 * (step == 3)) * 3600.0, {})
                for step in range(1, 7)
            ],
            {1, 2, 3, 4, 5, 6},
        ),
        (Best(1, "loss"), RATED, {5}),
        (Best(3, "loss"), RATED, {1, 2, 5}),
        (Best(9, "loss"), RATED, {1, 2, 5, 6}),
        (Best(1, "loss", "max"), RATED, {6}),
        (Best(1, "accuracy"), RATED, set()),
        (Pinned([2, 700, 701]), HUNDREDS, {700}),
    ],
    ids=str,
)
def test_policy(policy: Policy, history: list[Saved], steps: set[int]) -> None:
    assert policy.kept(history) == steps


def test_union_with_the_newest() -> None:
    policies = [EverySteps(300), Pinned([100])]
    assert retention.kept(HUNDREDS, policies) == {100, 300, 600, 900, 1000}
    assert retention.kept(HUNDREDS, []) == {1000}
    assert retention.kept([], policies) == set()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Last(0),
        lambda: Last(2.5),
        lambda: Last(True),
        lambda: EverySteps(0),
        lambda: EverySteps("5"),
        lambda: NearSteps(0),
        lambda: Doubling(0),
        lambda: Within(-1),
        lambda: EveryHours(0),
        lambda: EveryHours(math.nan),
        lambda: EveryHours(math.inf),
        lambda: EveryHours("1"),
        lambda: Best(0, "loss"),
        lambda: Best(1, ""),
        lambda: Best(1, None),
        lambda: Best(1, "loss", "least"),
        lambda: Pinned([3, -1]),
    ],
)
def test_what_is_no_policy_is_refused_in_one_line(make: Any) -> None:
    with pytest.raises(errors.UserError) as raised:
        make()
    assert "\n" not in str(raised.value)
    assert "try" in str(raised.value)


def reference(history: list[Saved], policies: list[Policy]) -> set[int]:
    """Judges each checkpoint by itself, by what else there is."""
    return {
        one.step
        for one in history
        if not any(other.step > one.step for other in history)
        or any(stays(one, history, policy) for policy in policies)
    }


def stays(one: Saved, history: list[Saved], policy: Any) -> bool:
    older = [other for other in history if other.step < one.step]
    newer = [other for other in history if other.step > one.step]
    match policy:
        case Last(num):
            return len(newer) < num
        case EverySteps(steps):
            return one.step in range(0, one.step + 1, steps)
        case NearSteps(steps):
            distance = {
                other.step: abs(other.step - nearest(other.step, steps))
                for other in history
                if nearest(other.step, steps) == nearest(one.step, steps)
            }
            best = min(distance.values())
            return one.step == max(s for s in distance if distance[s] == best)
        case Within(hours):
            # Without a difference, which may not be exact.
            return history[-1].saved_at <= one.saved_at + hours * 3600
        case Doubling(steps):
            return one.step in {steps * 2**power for power in range(20)}
        case EveryHours(hours):
            # By induction over what is older: no list of what was chosen.
            stayed = (o for o in reversed(older) if stays(o, older, policy))
            last = next(stayed, None)
            return not last or abs(one.saved_at - last.saved_at) / 3600 >= hours
        case Best(num, metric, mode):
            better = 0
            for other in older + newer:
                better += beats(other, one, metric, mode)
            return beats(one, None, metric, mode) and better < num
        case Pinned(steps):
            return any(one.step == step for step in steps)
    raise AssertionError(policy)


def nearest(step: int, steps: int) -> int:
    """Half-way between two multiples it is nearer to the larger."""
    below = step - step % steps
    return below + steps if 2 * (step % steps) >= steps else below


def beats(a: Saved, b: Saved | None, metric: str, mode: str) -> bool:
    """Tells whether `a` is better than `b`, or counts at all."""
    x = a.metrics.get(metric)
    if x is None or x != x:
        return False
    y = b.metrics.get(metric) if b else None
    if b is None or y is None or y != y:
        return True
    if x == y:
        return a.step > b.step
    return x < y if mode == "min" else x > y


# Few values, so that ties and exact distances are common.
NUMBERS = (None, -math.inf, -1.5, -0.0, 0.0, 1e-9, 1.0, 2.0, math.inf, math.nan)
NUM_MOMENTS = 45
POLICIES = st.one_of(
    st.builds(Last, st.integers(1, 8)),
    st.builds(EverySteps, st.integers(1, 12)),
    st.builds(NearSteps, st.integers(1, 12)),
    st.builds(Doubling, st.integers(1, 12)),
    st.builds(Within, st.integers(1, 16).map(lambda n: n / 4)),
    st.builds(EveryHours, st.integers(1, 16).map(lambda n: n / 4)),
    st.builds(
        Best,
        st.integers(1, 4),
        st.sampled_from(["loss", "fid", "other"]),
        st.sampled_from(["min", "max"]),
    ),
    st.builds(Pinned, st.lists(st.integers(0, 30), max_size=4)),
)


def history_of(codes: list[int]) -> list[Saved]:
    """Decodes numbers, each of which hypothesis draws at once: that is fast."""
    history = []
    step = 0
    for code in codes:
        code, gap = divmod(code, 4)
        code, quarter = divmod(code, NUM_MOMENTS)
        fid, loss = divmod(code, len(NUMBERS))
        metrics = {"loss": NUMBERS[loss]}
        if fid < len(NUMBERS):
            metrics["fid"] = NUMBERS[fid]
        # In quarters of an hour, which a float holds; clocks go back, too.
        history.append(Saved(step + gap, (quarter - 4) * 900.0, metrics))
        step += gap + 1
    return history


NUM_CODES = 4 * NUM_MOMENTS * len(NUMBERS) * (len(NUMBERS) + 1)
HISTORIES = st.lists(st.integers(0, NUM_CODES - 1), max_size=10).map(history_of)


@hypothesis.settings(
    max_examples=int(os.environ.get("DTRAIN_NUM_FUZZ", "2000")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(HISTORIES, st.lists(POLICIES, max_size=4))
def test_random_policies_and_histories(
    history: list[Saved], policies: list[Policy]
) -> None:
    """One sweep, and a sweep after every save, agree with the reference."""
    if any(isinstance(policy, Within) for policy in policies):
        # What a clock that was ahead has swept away cannot come back.
        times = sorted(saved.saved_at for saved in history)
        history = [
            dataclasses.replace(saved, saved_at=at)
            for saved, at in zip(history, times, strict=True)
        ]
    expected = reference(history, policies)
    assert retention.kept(history, policies) == expected

    there: list[Saved] = []
    for index, newest in enumerate(history):
        there.append(newest)
        stay = retention.kept(there, policies)
        # What was swept away before is missed by no policy.
        assert stay == reference(history[: index + 1], policies)
        there = [saved for saved in there if saved.step in stay]
    assert {saved.step for saved in there} == expected
