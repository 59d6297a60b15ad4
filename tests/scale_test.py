"""What is computed of machines that are not here: closed forms, and bounds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain import errors, flags
from tests.benchmarks import cost, defaults, loopback, machines
from tests.benchmarks.machines import Inputs, Link

LINK = Link(1e9, 1e-5)

link = st.builds(Link, st.floats(1e6, 1e12), st.floats(0.0, 1e-3))
num_bytes = st.floats(0.0, 1e10)
members = st.integers(1, 512)


# All-reduces.


@pytest.mark.parametrize("algorithm", [machines.ring, machines.tree])
def test_one_alone_sends_nothing(algorithm: object) -> None:
    assert algorithm(1e9, 1, LINK) == 0


def test_two_send_each_other_all_in_either_way() -> None:
    # Of a ring of two each sends half, twice; of a tree one sends all, twice.
    assert machines.ring(1e9, 2, LINK) == pytest.approx(1 + 2e-5)
    assert machines.tree(1e9, 2, LINK) == pytest.approx(2 + 2e-5)


def test_eight_by_hand() -> None:
    assert machines.ring(4e9, 8, LINK) == pytest.approx(7 + 14e-5)
    assert machines.tree(4e9, 8, LINK) == pytest.approx(8 + 6e-5)


@given(num_bytes, st.integers(2, 512), link)
def test_no_all_reduce_is_faster_than_its_bytes(
    size: float, count: int, given_link: Link
) -> None:
    # Patarasuk and Yuan 2009: each member sends so much, at least.
    least = 2 * (count - 1) / count * size / given_link.bandwidth
    for algorithm in (machines.ring, machines.tree):
        assert algorithm(size, count, given_link) >= least * (1 - 1e-9)


@given(num_bytes, members, link)
def test_more_members_take_no_less(
    size: float, count: int, given_link: Link
) -> None:
    for algorithm in (machines.ring, machines.tree):
        more = algorithm(size, count + 1, given_link)
        assert more >= algorithm(size, count, given_link) * (1 - 1e-9)


def test_small_messages_want_a_tree_and_large_ones_a_ring() -> None:
    assert machines.tree(100, 256, LINK) < machines.ring(100, 256, LINK)
    assert machines.ring(1e9, 256, LINK) < machines.tree(1e9, 256, LINK)


@given(num_bytes, st.integers(1, 8))
def test_within_a_node_nothing_goes_outside(size: float, gpus: int) -> None:
    slow = Link(1.0, 100.0)
    in_node = machines.ring(size, gpus, LINK)
    for algorithm in (machines.across_nodes, machines.flat_ring):
        assert algorithm(size, gpus, LINK, slow, 8) == in_node


@given(num_bytes, st.integers(2, 32), link)
def test_summing_in_the_node_first_adds_no_more_than_that(
    size: float, nodes: int, given_link: Link
) -> None:
    gpus = 8 * nodes
    found = machines.across_nodes(size, gpus, LINK, given_link, 8)
    flat = machines.flat_ring(size, gpus, LINK, given_link, 8)
    assert found <= flat + machines.ring(size, 8, LINK) + 1e-9


@given(st.floats(0.0, 10.0), st.floats(0.0, 10.0), st.floats(0.0, 1.0))
def test_what_overlaps_is_hidden_and_no_more(
    compute: float, travel: float, overlap: float
) -> None:
    found = machines.step_secs(compute, travel, overlap)
    assert max(compute, travel) * (1 - 1e-9) <= found <= compute + travel
    assert machines.step_secs(compute, travel) == compute + travel


# When to save.

costs = st.floats(1e-3, 100.0)
# At least so many times the cost.
means = st.floats(50.0, 1e5)


def test_young_by_hand() -> None:
    # docs/goodput.md: 0.05 s a save and a fault each hour.
    assert machines.young(0.05, 3600) == pytest.approx(19, abs=0.1)


@given(costs, means)
def test_daly_is_near_young_and_below_it(cost: float, times: float) -> None:
    mean_secs = cost * times
    daly = machines.daly(cost, mean_secs)
    young = machines.young(cost, mean_secs)
    assert young - cost < daly < young
    # Where a save takes longer than there is time.
    assert machines.daly(2 * mean_secs, mean_secs) == mean_secs


@given(costs, means, st.floats(0.0, 1.0))
def test_no_interval_is_much_better_than_daly(
    cost: float, times: float, restart_share: float
) -> None:
    mean_secs = cost * times
    of_job = cost, restart_share * mean_secs, mean_secs
    daly = machines.daly(cost, mean_secs)
    at_daly = machines.goodput(daly, *of_job)
    factors = [2 ** (power / 4) for power in range(-16, 17)]
    best = max(machines.goodput(daly * each, *of_job) for each in factors)
    assert at_daly >= 0.999 * best


def test_goodput_by_hand() -> None:
    # Without losses: 100 s of steps for each 101.
    assert machines.goodput(100, 1, 50, 1e12) == pytest.approx(100 / 101)
    # exp(1) - 1 intervals of the mean, and a restart of it, for each.
    found = machines.goodput(10, 0, 10, 10)
    assert found == pytest.approx(1 / (math.e * (math.e - 1)))
    assert machines.goodput(1e6, 0, 0, 1) == 0


# What it takes for granted.


def test_a_save_by_hand() -> None:
    inputs = Inputs(state_bytes=16, store=160e6, stall_secs=0.25, inflation=2.0)
    assert inputs.save(10e6) == (0.25, 1.0, 0.75)
    assert Inputs(node_days=2.0).mean_secs(4) == 43_200


def test_inputs_are_flags_that_say_where_they_come_from() -> None:
    given_flags = ["scale", "--nvlink=1e11", "--gpus_per_node=4"]
    inputs = Inputs(**flags.parse(Inputs, given_flags))
    assert (inputs.nvlink, inputs.gpus_per_node) == (1e11, 4)
    with pytest.raises(errors.UserError, match="nvlink"):
        Inputs(nvlink=0.0)


# What fits.


def test_room_by_hand() -> None:
    # A tenth of a GPU is not there for tensors.
    room = defaults.Room(0.2 * 2**30, 0.05 * 2**30, 0.019 * 2**30)
    assert room.images(1) == 10
    assert room.micro_batches(10, 1) == 1
    # 20 take 0.4 of the 0.7 that are left, and 6 of 0.05 the rest.
    assert room.micro_batches(20, 1) == 4
    assert room.micro_batches(64, 1) is None


# What is predicted of this machine.


def test_a_machine_that_keeps_to_the_formulas_is_predicted() -> None:
    found = cost.Cost(1_000, 1.0, 500.0, 3.0)
    rate, start = 1e-3, 5e-3
    secs = {
        f"{side} {size}": start + rate * size
        for side, sizes in (
            ("alone", loopback.ALONE),
            ("at once", loopback.AT_ONCE),
        )
        for size in sizes
    }
    link = Link(1e6, 1e-4)
    for size in loopback.VECTORS:
        secs[f"sum {size}"] = machines.ring(4 * size, 2, link)
    secs["one"], secs["two"] = 0.1, 0.2
    secs["two 16"] = start + rate * 8 + 0.05
    one, two, waiting = loopback.predict(secs, found).values()
    assert one == pytest.approx((start + rate * 64, 0.1))
    # 500 gradients are 2,000 bytes; three messages there and back.
    travel = 2e-3 + 3 * 2e-4
    assert two.predicted == pytest.approx(start + rate * 32 + travel, abs=1e-4)
    assert two.measured == 0.2
    # What the small batch took beyond its own steps and sums.
    assert waiting.predicted == pytest.approx(start + rate * 32 + 0.05)
