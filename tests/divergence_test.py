"""A run that diverges goes back, leaves the data out, and needs nobody."""

from __future__ import annotations

import json
import pathlib
import signal

import pytest
import tensorflow as tf

from dtrain import config, errors
from dtrain.bundle import tensors
from dtrain.checkpoint import retention
from dtrain.gan import divergence
from dtrain.run import tiers
from tests import runs

STRATEGIES = {
    "default": ("dtrain.main", "--strategy=default"),
    "mirrored": ("dtrain.main", "--strategy=mirrored", "--num_devices=2"),
    "multi_worker": ("launch.main", "--num_workers=2", "--"),
}
NUM_STEPS = 40


def judge(
    judged: divergence.Divergence,
    step: int,
    loss: float = 1.0,
    norm: float = 1.0,
) -> int:
    values = tf.constant([loss, norm])
    return int(
        judged.judge(
            tf.constant(step, tf.int64),
            tf.reduce_all(tf.math.is_finite(values)),
            tf.constant([abs(loss), 1.0]),
            tf.constant([norm, 1.0]),
        ).numpy()
    )


def test_what_is_not_finite() -> None:
    judged = divergence.Divergence(config.Config())
    assert judge(judged, 0) == divergence.FINE
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert judge(judged, 1, loss=bad) == divergence.NOT_FINITE
        assert judge(judged, 1, norm=bad) == divergence.NOT_FINITE


def test_a_spike_is_measured_by_the_average() -> None:
    judged = divergence.Divergence(config.Config(spike_factor=10.0))
    # Early losses are anything.
    assert judge(judged, 0, loss=1e6) == divergence.FINE
    judged = divergence.Divergence(config.Config(spike_factor=10.0))
    for step in range(200):
        assert judge(judged, step, loss=-5.0) == divergence.FINE
    assert judge(judged, 200, loss=49.0) == divergence.FINE
    assert judge(judged, 201, loss=-60.0) == divergence.SPIKE
    # What is below the factor itself is none, however small the average.
    quiet = divergence.Divergence(config.Config(spike_factor=10.0))
    for step in range(200):
        judge(quiet, step, loss=1e-4)
    assert judge(quiet, 200, loss=9.0) == divergence.FINE


def test_a_network_without_gradient_has_collapsed() -> None:
    judged = divergence.Divergence(config.Config(collapse_steps=3))
    assert judge(judged, 0, norm=0.0) == divergence.FINE
    assert judge(judged, 1, norm=0.0) == divergence.FINE
    assert judge(judged, 2, norm=1.0) == divergence.FINE
    assert judge(judged, 3, norm=0.0) == divergence.FINE
    assert judge(judged, 4, norm=0.0) == divergence.FINE
    assert judge(judged, 5, norm=0.0) == divergence.COLLAPSE


def test_rules_can_be_switched_off() -> None:
    off = config.Config(spike_factor=0.0, collapse_steps=0)
    judged = divergence.Divergence(off)
    for step in range(150):
        assert judge(judged, step, norm=0.0) == divergence.FINE
    assert judge(judged, 150, loss=1e30) == divergence.FINE


def flags(run_dir: pathlib.Path, *more: str) -> list[str]:
    return [
        *runs.SMALL,
        f"--run_dir={run_dir}",
        f"--num_steps={NUM_STEPS}",
        "--checkpoint_every_steps=5",
        "--backup_every_secs=0.001",
        "--steps_per_loop=3",
        "--model=tests.diverging:make",
        *more,
    ]


def backs(output: str) -> list[str]:
    return [line for line in output.splitlines() if "diverged at" in line]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_run_that_diverges_finishes(
    strategy: str, tmp_path: pathlib.Path
) -> None:
    """Twice, and once killed in between: with the same bits."""
    module, *arguments = STRATEGIES[strategy]
    spoil = {"DTRAIN_TEST_SPOIL": "8=nan,23=inf"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, output = runs.run(module, *arguments, *flags(whole), **spoil)
    assert code == errors.FINISHED, output
    first, second = backs(output)
    assert "diverged at step 8: a loss or a gradient is not finite" in first
    # Three steps' data were left out, so the 23rd is seen at step 20.
    assert "back to step 5," in first
    assert "diverged at step 20:" in second
    assert "back to step 15, without the data" in second
    assert "(2 of at most 10)" in second
    lines = runs.metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert None not in [value for line in lines for value in line.values()]
    for place in ("checkpoints", "backup"):
        for path in (whole / place).glob("ckpt-*.json"):
            assert "NaN" not in path.read_text()

    if strategy != "default":
        return
    process = runs.start(module, *arguments, *flags(cut), **spoil)
    assert process.stdout
    assert any("diverged at step 8" in line for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    runs.finish(process)
    code, output = runs.run(module, *arguments, *flags(cut), **spoil)
    assert code == errors.FINISHED, output
    digests = [
        tensors.digest(f"{run}/checkpoints/ckpt-{NUM_STEPS}")
        for run in (whole, cut)
    ]
    assert digests[0] == digests[1]
    assert (cut / "metrics.jsonl").read_bytes() == (
        whole / "metrics.jsonl"
    ).read_bytes()


def test_twenty_times(tmp_path: pathlib.Path) -> None:
    steps = range(3, 43, 2)
    spoil = ",".join(f"{step}=nan" for step in steps)
    code, output = runs.run(
        "dtrain.main",
        *flags(tmp_path / "run", "--max_rollbacks=20"),
        DTRAIN_TEST_SPOIL=spoil,
    )
    assert code == errors.FINISHED, output
    assert len(backs(output)) == len(steps)


def test_a_budget_ends_it(tmp_path: pathlib.Path) -> None:
    """With a line that says what was tried, and a code that stays down."""
    code, output = runs.run(
        "dtrain.main",
        *flags(tmp_path / "run", "--max_rollbacks=2"),
        DTRAIN_TEST_SPOIL="7=nan,8=nan,9=nan,30=nan",
    )
    assert code == errors.USER_ERROR, output
    assert len(backs(output)) == 3
    assert "The run has gone back 2 times (max_rollbacks)" in output
    assert "Traceback" not in output
    saved = sorted((tmp_path / "run/checkpoints").glob("ckpt-*.json"))
    assert json.loads(saved[-1].read_text())["step"] <= 7


def test_a_spike_cuts_the_learning_rates(tmp_path: pathlib.Path) -> None:
    code, output = runs.run(
        "dtrain.main",
        *flags(
            tmp_path / "run",
            "--spike_factor=50",
            "--num_steps=150",
            "--rollback_learning_rate_factor=0.5",
        ),
        DTRAIN_TEST_SPOIL="120=1e5",
    )
    assert code == errors.FINISHED, output
    [line] = backs(output)
    assert "diverged at step 120: a loss is over 50 times its average" in line
    reader = tf.train.load_checkpoint(
        str(tmp_path / "run/checkpoints/ckpt-150")
    )
    [name] = [
        name
        for name in reader.get_variable_to_shape_map()
        if name.startswith("generator_optimizer") and "learning_rate/" in name
    ]
    assert reader.get_tensor(name) == pytest.approx(0.5e-3)


def test_where_a_run_may_go_back_to() -> None:
    settings = config.Config(collapse_steps=100)
    counts = divergence.Counts(0, 0, 0, 0)
    below = divergence.healthy_below(divergence.SPIKE, 500, counts, settings)
    assert below == [500]
    # A network that had no gradient from step 401 on was well at step 400.
    below = divergence.healthy_below(divergence.COLLAPSE, 500, counts, settings)
    assert below == [401]
    thrice = divergence.Counts(60, 3, 480, 3)
    below = divergence.healthy_below(
        divergence.NOT_FINITE, 500, thrice, settings
    )
    assert below == [480, 500]


def test_a_collapse_is_left_behind(tmp_path: pathlib.Path) -> None:
    """Every checkpoint since the gradient was lost is as bad as the last."""
    code, output = runs.run(
        "dtrain.main",
        *flags(tmp_path / "run", "--collapse_steps=10", "--r1_gamma=0"),
        DTRAIN_TEST_SPOIL="18=dead",
    )
    assert code == errors.FINISHED, output
    [line] = backs(output)
    assert "a network had no gradient for 10 steps; back to step 15," in line


def test_three_times_from_one_checkpoint_is_enough(
    tmp_path: pathlib.Path,
) -> None:
    spoil = ",".join(f"{step}=nan" for step in (12, 13, 14, 15))
    code, output = runs.run(
        "dtrain.main", *flags(tmp_path / "run"), DTRAIN_TEST_SPOIL=spoil
    )
    assert code == errors.FINISHED, output
    steps = [
        line.split("back to step ")[1].split(",")[0] for line in backs(output)
    ]
    assert steps == ["10", "10", "10", "5"]


def test_notices_leave_the_checkpoint_that_a_rollback_needs() -> None:
    """Each one saves; three of them are all that --max_to_keep keeps."""
    settings = config.Config(checkpoint_every_steps=20, max_to_keep=3)
    saved = [
        retention.Saved(step, float(step), {})
        for step in (0, 20, 40, 41, 43, 45)
    ]
    kept = retention.kept(saved, tiers.policies(settings))
    assert kept == {20, 40, 41, 43, 45}
