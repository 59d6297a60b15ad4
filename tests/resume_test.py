"""A run that was killed ends with the bits of one that was not."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import time

import pytest

from dtrain import checkpoint_reader, errors
from tests import runs

NUM_STEPS = 12
KILLED = -signal.SIGKILL

STRATEGIES = {
    "default": ("dtrain.main", "--strategy=default"),
    "mirrored": ("dtrain.main", "--strategy=mirrored", "--num_devices=2"),
    "multi_worker": ("launch.main", "--num_workers=2", "--"),
}

# Everything that a run can hold: labels, two discriminator updates, BatchNorm,
# a penalty of second order.
RICH = (
    "--conditional",
    "--batch_norm",
    "--discriminator_steps=2",
    "--r1_gamma=1",
    "--learning_rate_schedule=cosine",
    "--warmup_steps=3",
)


def flags(run_dir: pathlib.Path, num_steps: int = NUM_STEPS) -> list[str]:
    """The flags of a small run that backs up after every step."""
    return [
        *runs.SMALL,
        f"--run_dir={run_dir}",
        f"--num_steps={num_steps}",
        "--checkpoint_every_steps=0",
        "--backup_every_secs=0.001",
    ]


def digest(run_dir: pathlib.Path, step: int) -> str:
    """Returns the SHA-256 over all state of a run at a step."""
    return checkpoint_reader.digest(f"{run_dir}/checkpoints/ckpt-{step}")


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_run_killed_at_a_random_moment(
    strategy: str, tmp_path: pathlib.Path
) -> None:
    module, *arguments = STRATEGIES[strategy]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, output = runs.run(module, *arguments, *flags(whole), *RICH)
    assert code == errors.FINISHED, output

    process = runs.start(module, *arguments, *flags(cut), *RICH)
    kill_at = random.randint(1, NUM_STEPS - 1)
    wait_for_step(cut, kill_at)
    kill_with_children(process.pid)
    runs.finish(process)
    assert not (cut / f"checkpoints/ckpt-{NUM_STEPS}.index").exists()

    code, output = runs.run(module, *arguments, *flags(cut), *RICH)
    assert code == errors.FINISHED, output
    assert "resumed from" in output
    assert digest(cut, NUM_STEPS) == digest(whole, NUM_STEPS)
    assert (cut / "metrics.jsonl").read_bytes() == (
        whole / "metrics.jsonl"
    ).read_bytes()
    assert not (cut / "backup").exists()


def test_two_replicas_and_two_workers_are_the_same(
    tmp_path: pathlib.Path,
) -> None:
    """And a run may go from one to the other."""
    one, two = tmp_path / "one", tmp_path / "two"
    for run_dir, strategy in ((one, "mirrored"), (two, "multi_worker")):
        module, *arguments = STRATEGIES[strategy]
        code, output = runs.run(module, *arguments, *flags(run_dir, 4), *RICH)
        assert code == errors.FINISHED, output
    assert digest(one, 4) == digest(two, 4)


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, in their order."""
    listed = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def kill_with_children(pid: int) -> None:
    """Kills a launcher, before it can tell its workers, and then them."""
    for each in (pid, *children_of(pid)):
        os.kill(each, signal.SIGKILL)


def wait_for_step(run_dir: pathlib.Path, step: int) -> None:
    """Waits until a run has written the metrics of a step."""
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"{path} has no line {step}")


def test_run_killed_again_and_again(tmp_path: pathlib.Path) -> None:
    """One run, killed at each of its steps; the long form kills 40 times."""
    num_kills = int(os.environ.get("DTRAIN_NUM_KILLS", "4"))
    num_steps = num_kills + 1
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    module, *arguments = STRATEGIES["mirrored"]
    code, output = runs.run(module, *arguments, *flags(whole, num_steps))
    assert code == errors.FINISHED, output
    for step in range(1, num_steps):
        phase = ("metrics", "backup")[step % 2]
        code, output = runs.run(
            "tests.killed",
            str(step),
            phase,
            *arguments,
            *flags(cut, num_steps),
        )
        assert code == KILLED, output
        assert runs.metrics(cut)[-1]["step"] == step
    code, output = runs.run(module, *arguments, *flags(cut, num_steps))
    assert code == errors.FINISHED, output
    assert digest(cut, num_steps) == digest(whole, num_steps)
    steps = [line["step"] for line in runs.metrics(cut)]
    assert steps == list(range(1, num_steps + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_exits(number: int, tmp_path: pathlib.Path) -> None:
    arguments = [
        *runs.SMALL,
        f"--run_dir={tmp_path}/run",
        "--num_steps=100000",
        "--checkpoint_every_steps=0",
        "--backup_every_secs=0",
    ]
    process = runs.start("dtrain.main", *arguments)
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(number)
    code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    assert signal.Signals(number).name in output
    assert "the same command goes on from there" in output
    [index] = (tmp_path / "run/checkpoints").glob("ckpt-*.index")
    step = int(index.stem.removeprefix("ckpt-"))
    assert runs.metrics(tmp_path / "run")[-1]["step"] == step


def test_signal_reaches_all_workers(tmp_path: pathlib.Path) -> None:
    process = runs.start(
        "launch.main",
        "--num_workers=2",
        "--",
        *runs.SMALL,
        f"--run_dir={tmp_path}/run",
        "--num_steps=100000",
        "--checkpoint_every_steps=0",
    )
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    assert "[worker 0] stopped by SIGTERM and saved at step" in output


def test_lost_worker_ends_the_other_one(tmp_path: pathlib.Path) -> None:
    process = runs.start(
        "launch.main",
        "--num_workers=2",
        "--",
        *flags(tmp_path / "run", 100_000),
    )
    wait_for_step(tmp_path / "run", 3)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    code, output = runs.finish(process)
    assert code == 128 + signal.SIGKILL, output
    assert "[worker 0] lost another worker" in output
    assert "Traceback" not in output
