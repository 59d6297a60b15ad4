"""A simulated week: what can be computed of it by hand, and what it ends by."""

from __future__ import annotations

import math

import pytest

from dtrain import errors
from launch.keep import cycle
from tests.benchmarks import machines, week
from tests.benchmarks.machines import Inputs, Save

SAVE = Save(stall=0.5, write=4.0, cost=0.5 + 4.0 / 3)
INPUTS = Inputs(inflation=1.5, restart_secs=100.0, spare_share=0.4)


def run(
    interval: float,
    num_nodes: int = 1,
    drawn: list[week.Loss] | None = None,
    inputs: Inputs = INPUTS,
    **more: object,
) -> week.Outcome:
    plan = week.Plan(inputs, SAVE, interval, num_nodes, **more)
    if drawn is None:
        drawn = week.losses(inputs, num_nodes, 0, plan.secs)
    return week.Job(plan, drawn).run()


def crash(secs: float) -> week.Loss:
    return week.Loss(secs, is_notice=False)


@pytest.mark.parametrize("interval", [20, 60, 1000])
def test_without_losses_it_is_what_saves_leave(interval: float) -> None:
    found = run(interval, drawn=[])
    left = week.WEEK_SECS - 100
    # A loop is not cut: saves are the next multiple of its seconds apart.
    apart = math.ceil(interval / week.LOOP_SECS) * week.LOOP_SECS + SAVE.stall
    lost = left / apart * SAVE.cost
    by_hand = (left - lost) / week.WEEK_SECS
    assert found.goodput == pytest.approx(by_hand, abs=2e-5)
    assert (found.code, found.ended_secs) == (None, week.WEEK_SECS)
    # What is slower than it could be is a useful step to the ledger.
    assert found.account.goodput > found.goodput
    assert found.account.num_redone == 0


def test_a_crash_loses_what_is_not_written_yet() -> None:
    # 100 s to start; saves at 100 s and 160.5 s, the second not written.
    found = run(60, drawn=[crash(162.0)], secs=400.0)
    trained = 162 - 100 - 2 * SAVE.stall
    steps = (trained - 5.0) / 0.1 + (4.0 + 1.0) / 0.15
    assert found.account.num_redone == pytest.approx(steps, abs=2)
    assert found.account.seconds["redone"] == pytest.approx(trained, abs=0.2)
    # Until all have left, and 1 s for there is no new save.
    idle = cycle.LEAVE_SECS + 1.0
    assert found.account.seconds["idle"] == pytest.approx(idle)
    assert found.account.seconds["start"] == pytest.approx(200.0)


def test_a_spare_comes_up_in_its_share_of_the_time() -> None:
    found = run(60, drawn=[crash(300.0)], secs=600.0, has_spare=True)
    assert found.account.seconds["start"] == pytest.approx(140.0)


def test_a_notice_loses_no_step_and_takes_the_queue() -> None:
    told = [week.Loss(300.0, is_notice=True)]
    found = run(60, 8, told, secs=1000.0, has_spare=True)
    assert found.account.num_redone == 0
    assert found.account.seconds["idle"] == pytest.approx(300.0)
    # Another node has no spare.
    assert found.account.seconds["start"] == pytest.approx(200.0)
    late = Inputs(inflation=1.5, restart_secs=100.0, grace_secs=3.0)
    found = run(60, 8, told, late, secs=1000.0)
    assert found.account.num_redone > 0


def test_three_crashes_without_a_save_end_the_job() -> None:
    # One each ten minutes, and a save each twenty: docs/supervisor.md.
    drawn = [crash(600.0 * number) for number in range(1, 1000)]
    found = run(1200, 8, drawn)
    assert found.code not in (None, errors.RUN_AGAIN, errors.LOST_WORKER)
    assert found.ended_secs == 1800
    assert len(found.account.placed) == 3
    # It gets on when it saves.
    assert run(300, 8, drawn[:50]).code is None


def test_a_hundred_restarts_end_it_too() -> None:
    drawn = [crash(600.0 * number) for number in range(1, 1000)]
    found = run(60, drawn=drawn)
    assert found.code is not None
    assert len(found.account.placed) == 101


def test_the_best_interval_is_near_that_of_young() -> None:
    inputs = Inputs(notice_share=0.0, restart_secs=30.0, node_days=66.0)
    mean_secs = inputs.mean_secs(1000)
    young = machines.young(SAVE.cost, mean_secs)
    found = {
        factor: sum(
            week.Job(
                week.Plan(inputs, SAVE, factor * young, 1000, secs=5 * 86_400),
                week.losses(inputs, 1000, seed, 5 * 86_400),
            )
            .run()
            .goodput
            for seed in range(2)
        )
        for factor in (1 / 8, 1 / 2, 1, 2, 8)
    }
    best = max(found, key=found.get)
    assert 1 / 4 < best < 4
    assert found[1] > found[1 / 8]
    assert found[1] > found[8]


def test_a_seed_says_all() -> None:
    drawn = week.losses(INPUTS, 64, 3)
    assert drawn == week.losses(INPUTS, 64, 3)
    assert drawn != week.losses(INPUTS, 64, 4)
    assert run(60, 64, drawn).goodput == run(60, 64, drawn).goodput
