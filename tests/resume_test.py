"""A run that was killed ends with the bits of one that was not."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import subprocess
import time

import pytest

from dtrain import checkpoint_reader, errors
from launch import local
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
    # Not at 1, whose backup is written after its metrics: there may be nothing
    # to resume from. Not later, or on a busy machine the run ends first.
    kill_at = random.randint(2, NUM_STEPS // 2)
    print(f"killed when step {kill_at} was written")
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
    """One run, killed at each of its steps; the long form kills 40 times.

    And its loops are of another length at the end.
    """
    num_kills = int(os.environ.get("DTRAIN_NUM_KILLS", "5"))
    num_steps = num_kills + 1
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    module, *arguments = STRATEGIES["mirrored"]
    code, output = runs.run(module, *arguments, *flags(whole, num_steps))
    assert code == errors.FINISHED, output
    for step in range(1, num_steps):
        phase = ("metrics", "written", "renamed", "backup")[step % 4]
        code, output = runs.run(
            "tests.killed",
            str(step),
            phase,
            *arguments,
            *flags(cut, num_steps),
        )
        assert code == KILLED, output
        assert runs.metrics(cut)[-1]["step"] == step
    code, output = runs.run(
        module, *arguments, *flags(cut, num_steps), "--steps_per_loop=3"
    )
    assert code == errors.FINISHED, output
    assert digest(cut, num_steps) == digest(whole, num_steps)
    steps = [line["step"] for line in runs.metrics(cut)]
    assert steps == list(range(1, num_steps + 1))


# Builds slowly, as a large model does, and says when it begins to.
SLOW_MODEL = """
import pathlib, time
from dtrain.models import dcgan

def make(config, image_shape, num_classes):
    pathlib.Path(__file__).with_name("building").touch()
    time.sleep(3)
    return dcgan.make(config, image_shape, num_classes)
"""


def start_slow_run(
    directory: pathlib.Path, module: str, *arguments: str
) -> subprocess.Popen[str]:
    """Starts a run and waits until it builds its networks."""
    (directory / "slow.py").write_text(SLOW_MODEL)
    process = runs.start(
        module,
        *arguments,
        *flags(directory / "run", 100_000),
        "--model=slow:make",
        PYTHONPATH=f"{directory}:{runs.ROOT}",
    )
    while not (directory / "building").exists():
        assert process.poll() is None, runs.finish(process)
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("strategy", ["default", "multi_worker"])
def test_signal_while_the_networks_are_built(
    strategy: str, tmp_path: pathlib.Path
) -> None:
    process = start_slow_run(tmp_path, *STRATEGIES[strategy])
    # To each process of the group, and so to a worker twice.
    for pid in (*children_of(process.pid), process.pid):
        os.kill(pid, signal.SIGTERM)
    code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    assert (tmp_path / "run/checkpoints/ckpt-0.index").exists()


def test_worker_lost_while_the_networks_are_built(
    tmp_path: pathlib.Path,
) -> None:
    process = start_slow_run(tmp_path, *STRATEGIES["multi_worker"])
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    code, output = runs.finish(process)
    # 78 would say that no other try can help.
    assert code == 128 + signal.SIGKILL, output
    assert "[worker 0] lost another worker" in output


def test_workers_that_do_not_share_the_run_are_refused(
    tmp_path: pathlib.Path,
) -> None:
    """Each with a disk of its own; only the chief's has the run."""
    ports = local.free_ports(2)
    run_dirs = [tmp_path / "0", tmp_path / "1"]
    code, output = runs.run("dtrain.main", *flags(run_dirs[0], 2))
    assert code == errors.FINISHED, output
    workers = [
        runs.start(
            "dtrain.main",
            "--strategy=multi_worker",
            *flags(run_dir, 4),
            **process.environment,
        )
        for run_dir, process in zip(
            run_dirs, local.plan(ports, []), strict=True
        )
    ]
    for worker in workers:
        code, output = runs.finish(worker)
        assert code == errors.USER_ERROR, output
        assert "restored steps 0, 2: run_dir" in output


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
