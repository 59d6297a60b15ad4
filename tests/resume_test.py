"""A run that was killed ends with the bits of one that was not."""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import signal
import time

import pytest

from dtrain import errors
from dtrain.bundle import tensors
from dtrain.checkpoint.directory import CheckpointDirectory
from launch.keep import worker as worker_lib
from tests import killed, runs

NUM_STEPS = 120
IS_LONG = "DTRAIN_NUM_KILLS" in os.environ
KILLED = -signal.SIGKILL

STRATEGIES = {
    "default": ("dtrain.main", "--strategy=default"),
    "mirrored": ("dtrain.main", "--strategy=mirrored", "--num_devices=2"),
    "multi_worker": ("launch.main", "--num_workers=2", "--"),
}

# For a supervisor that does not start the workers again.
ONCE = "--max_restarts=0"

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


def settings(num_steps: int) -> list[str]:
    """What a small run that backs up after every step is told, but where."""
    return [
        *runs.SMALL,
        f"--num_steps={num_steps}",
        "--checkpoint_every_steps=0",
        "--backup_every_secs=0.001",
    ]


def flags(run_dir: pathlib.Path, num_steps: int = NUM_STEPS) -> list[str]:
    """The flags of such a run."""
    return [*settings(num_steps), f"--run_dir={run_dir}"]


def digest(run_dir: pathlib.Path, step: int) -> str:
    """Returns the SHA-256 over all state of a run at a step."""
    return tensors.digest(f"{run_dir}/checkpoints/ckpt-{step}")


def test_first_run_of_a_machine_is_as_any_other(tmp_path: pathlib.Path) -> None:
    """It prepares the data set, for which TFDS draws a random name."""
    digests = []
    for name in ("first", "second"):
        process = runs.start_anew(
            "dtrain.main",
            *flags(tmp_path / name, num_steps=2),
            f"--data_dir={tmp_path / 'data'}",
        )
        code, output = runs.finish(process)
        assert code == errors.FINISHED, output
        digests.append(digest(tmp_path / name, 2))
    assert digests[0] == digests[1]


# The mirrored one is killed in each phase of a save below.
@pytest.mark.parametrize(
    "strategy", STRATEGIES if IS_LONG else ["default", "multi_worker"]
)
def test_run_killed_at_a_random_moment(
    strategy: str,
    whole: runs.Whole,
    tmp_path: pathlib.Path,
    chance: random.Random,
) -> None:
    module, *arguments = STRATEGIES[strategy]
    expected = whole(module, *arguments, *settings(NUM_STEPS), *RICH)
    cut = tmp_path / "cut"
    # Anew, so that strings hash otherwise than in the forks of one server.
    process = runs.start_anew(module, *arguments, *flags(cut), *RICH)
    wait_for_backup(cut)
    delay_secs = chance.uniform(0.0, 0.3)
    print(f"killed {delay_secs} s after its first backup")
    time.sleep(delay_secs)
    kill_with_children(process.pid)
    runs.finish(process)
    assert not (cut / f"checkpoints/ckpt-{NUM_STEPS}.index").exists()

    process = runs.start_anew(module, *arguments, *flags(cut), *RICH)
    code, output = runs.finish(process)
    assert code == errors.FINISHED, output
    assert "resumed from" in output
    assert digest(cut, NUM_STEPS) == digest(expected, NUM_STEPS)
    assert (cut / "metrics.jsonl").read_bytes() == (
        expected / "metrics.jsonl"
    ).read_bytes()
    assert not (cut / "backup").exists()


def test_two_replicas_and_two_workers_are_the_same(whole: runs.Whole) -> None:
    """And a run may go from one to the other."""
    digests = {
        digest(
            whole(*STRATEGIES[strategy], *settings(NUM_STEPS), *RICH), NUM_STEPS
        )
        for strategy in ("mirrored", "multi_worker")
    }
    assert len(digests) == 1


ELASTIC = ("--reduction=ordered", "--micro_batches=4")
WITH_NORM = (
    "--batch_norm",
    "--conditional",
    "--discriminator_steps=2",
    "--r1_gamma=0",
)


def replicas(count: int) -> tuple[str, ...]:
    return "--strategy=mirrored", f"--num_devices={count}"


# The long form takes the whole way, and one without BatchNorm.
WAYS = {"norm": (WITH_NORM, (1, 2, 4) if IS_LONG else (4,), 2)}
if IS_LONG:
    WAYS["default"] = ((), (1, 2, 4), 4)


@pytest.mark.parametrize(
    ("more", "counts", "num_workers"), WAYS.values(), ids=WAYS
)
def test_replicas_that_come_and_go(
    more: tuple[str, ...],
    counts: tuple[int, ...],
    num_workers: int,
    tmp_path: pathlib.Path,
) -> None:
    """1 -> 2 -> 4 -> 1 by kills, four throughout, and workers: one digest.

    A worker without GPUs is one replica: TensorFlow gives it one device.
    """
    num_steps = 12
    changing, four, workers = (tmp_path / name for name in ("c", "f", "w"))
    for number, count in enumerate(counts):
        code, output = runs.run(
            "tests.killed",
            str(3 * (number + 1)),
            killed.PHASES[number],
            *replicas(count),
            *flags(changing, num_steps),
            *ELASTIC,
            *more,
        )
        assert code == KILLED, output
    for run_dir, module, *arguments in (
        (changing, "dtrain.main", *replicas(1)),
        (four, "dtrain.main", *replicas(4)),
        (workers, "launch.main", f"--num_workers={num_workers}", "--"),
    ):
        code, output = runs.run(
            module, *arguments, *flags(run_dir, num_steps), *ELASTIC, *more
        )
        assert code == errors.FINISHED, output
        assert ("resumed from" in output) == (run_dir == changing)
        assert digest(run_dir, num_steps) == digest(changing, num_steps)
        assert (run_dir / "metrics.jsonl").read_bytes() == (
            changing / "metrics.jsonl"
        ).read_bytes()


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


def wait_for_backup(run_dir: pathlib.Path) -> None:
    """Waits until there is something to resume from."""
    deadline = time.monotonic() + 240
    while not list(run_dir.glob("backup/ckpt-*.json")):
        assert time.monotonic() < deadline, f"{run_dir} has no backup"
        time.sleep(0.002)


def test_run_killed_again_and_again(
    whole: runs.Whole, tmp_path: pathlib.Path
) -> None:
    """One run, killed in each phase of a save; the long form kills 40 times.

    And its loops are of another length at the end.
    """
    num_kills = int(os.environ.get("DTRAIN_NUM_KILLS", "5"))
    num_steps = 8 * num_kills
    cut = tmp_path / "cut"
    module, *arguments = STRATEGIES["mirrored"]
    expected = whole(module, *arguments, *settings(num_steps))
    for number in range(num_kills):
        code, output = runs.run(
            "tests.killed",
            str(3 * (number + 1)),
            killed.PHASES[number % len(killed.PHASES)],
            *arguments,
            *flags(cut, num_steps),
        )
        assert code == KILLED, output
        # A kill is no damage: nothing is put aside, nothing reported.
        assert "verify" not in output
        assert not list(cut.glob("*/quarantine"))
    code, output = runs.run(
        module, *arguments, *flags(cut, num_steps), "--steps_per_loop=3"
    )
    assert code == errors.FINISHED, output
    assert digest(cut, num_steps) == digest(expected, num_steps)
    steps = [line["step"] for line in runs.metrics(cut)]
    assert steps == list(range(1, num_steps + 1))
    assert (cut / "metrics.jsonl").read_bytes() == (
        expected / "metrics.jsonl"
    ).read_bytes()


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
) -> runs.Process:
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
    # At once: a scheduler's grace is short, and there is nothing to lose.
    assert "stopped by SIGTERM before the first steps were done" in output
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_worker_lost_while_the_networks_are_built(
    tmp_path: pathlib.Path,
) -> None:
    module, *arguments = STRATEGIES["multi_worker"]
    process = start_slow_run(tmp_path, module, ONCE, *arguments)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    code, output = runs.finish(process)
    # 78 would say that no other try can help.
    assert code == 128 + signal.SIGKILL, output
    assert "worker 1 was killed by SIGKILL" in output
    # The other one is told, and has nothing to save yet.
    assert "Traceback" not in output


def start_hosts(
    hosts: list[pathlib.Path], num_steps: int
) -> list[runs.Process]:
    """Starts a worker on each of some hosts, which share no disk."""
    ports = worker_lib.free_ports(len(hosts))
    return [
        runs.start(
            "dtrain.main",
            "--strategy=multi_worker",
            *flags(host / "run", num_steps),
            f"--backup_dir={host}/ssd",
            **process.environment,
        )
        for host, process in zip(hosts, worker_lib.plan(ports, []), strict=True)
    ]


def newest_backup(host: pathlib.Path) -> int:
    """Returns the step of the newest backup that a host has."""
    [directory] = host.glob("ssd/run-*/worker-*")
    return CheckpointDirectory(str(directory)).steps()[-1]


@pytest.mark.parametrize("lost", [0, 1], ids=["chief", "other"])
def test_a_lost_host_gets_the_state_from_the_other(
    lost: int, whole: runs.Whole, tmp_path: pathlib.Path
) -> None:
    """Its disk is gone with it, and with the chief's the durable tier."""
    num_steps = 40
    hosts = [tmp_path / "0", tmp_path / "1"]
    for host in hosts:
        host.mkdir()
    workers = start_hosts(hosts, num_steps)
    wait_for_step(hosts[0] / "run", 8)
    for worker in workers:
        worker.kill()
        runs.finish(worker)
    kept = newest_backup(hosts[1 - lost])
    shutil.rmtree(hosts[lost])
    hosts[lost].mkdir()

    outputs = []
    for worker in start_hosts(hosts, num_steps):
        code, output = runs.finish(worker)
        assert code == errors.FINISHED, output
        outputs.append(output)
    assert f"/ckpt-{kept}, {num_steps} steps in all" in outputs[0]
    assert not list(tmp_path.glob("*/ssd/*"))

    expected = whole(*STRATEGIES["mirrored"], *settings(num_steps))
    assert digest(hosts[0] / "run", num_steps) == digest(expected, num_steps)


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


def test_second_run_in_one_directory_is_refused(tmp_path: pathlib.Path) -> None:
    process = runs.start("dtrain.main", *flags(tmp_path / "run", 100_000))
    wait_for_step(tmp_path / "run", 3)
    code, output = runs.run("dtrain.main", *flags(tmp_path / "run", 100_000))
    assert code == errors.USER_ERROR, output
    assert "another process trains in run_dir" in output
    process.send_signal(signal.SIGTERM)
    code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    steps = [line["step"] for line in runs.metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


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
        ONCE,
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


def test_run_directory_that_is_removed_under_a_run(
    tmp_path: pathlib.Path,
) -> None:
    """It writes nothing more there, and leaves the place to the next."""
    run_dir = tmp_path / "run"
    first = runs.start("dtrain.main", *flags(run_dir, 100_000))
    wait_for_step(run_dir, 3)
    run_dir.rename(tmp_path / "moved")
    second = runs.start("dtrain.main", *flags(run_dir, 30))
    code, output = runs.finish(first)
    assert code == errors.USER_ERROR, output
    assert f"run_dir ({run_dir}) was moved or removed while" in output
    code, output = runs.finish(second)
    assert code == errors.FINISHED, output
    assert "a fresh start" in output
    steps = [line["step"] for line in runs.metrics(run_dir)]
    assert steps == list(range(1, 31))
