"""What a scheduler starts on each node, and what it is told at the end."""

from __future__ import annotations

import pathlib
import signal
import time
import zlib

import pytest

from dtrain import errors
from dtrain.resilience import stop_file
from tests import runs

FOR_EVER = "--num_steps=1000000"


def start(tmp_path: pathlib.Path, index: int, *arguments: str) -> runs.Process:
    """Starts one of two tasks of a Slurm step, both on this machine."""
    return runs.start(
        "launch.node",
        *(f"--log_dir={tmp_path}/logs", "--", *runs.SMALL),
        *(f"--run_dir={tmp_path}/run", "--strategy=multi_worker", *arguments),
        SLURM_STEP_NODELIST="localhost",
        SLURM_STEP_NUM_TASKS="2",
        SLURM_STEP_TASKS_PER_NODE="2",
        SLURM_JOB_ID=str(zlib.crc32(str(tmp_path).encode())),
        SLURM_STEP_ID="0",
        SLURM_PROCID=str(index),
        SLURM_NODEID="0",
        DTRAIN_SUBMITTED_SECS=str(int(time.time())),
    )


def log(tmp_path: pathlib.Path, index: int) -> str:
    path = tmp_path / "logs" / f"worker-{index}.log"
    return path.read_text() if path.exists() else ""


def wait_for_step(tmp_path: pathlib.Path, step: int) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        assert time.monotonic() < deadline, log(tmp_path, 0)
        time.sleep(0.05)


def end(nodes: list[runs.Process]) -> list[int]:
    return [runs.finish(node)[0] for node in nodes]


def test_finished(tmp_path: pathlib.Path) -> None:
    nodes = [start(tmp_path, index, "--num_steps=5") for index in range(2)]
    assert end(nodes) == [errors.FINISHED] * 2
    assert "[worker 0] finished: step 5" in log(tmp_path, 0)
    assert log(tmp_path, 1) == ""


@pytest.mark.parametrize(
    ("how", "code"), [("term", errors.RUN_AGAIN), ("stop", errors.FINISHED)]
)
def test_told_to_end(how: str, code: int, tmp_path: pathlib.Path) -> None:
    """A preempted job is to run again, one that a person has ended is not."""
    flags = (FOR_EVER, "--backup_every_secs=0")
    nodes = [start(tmp_path, index, *flags) for index in range(2)]
    wait_for_step(tmp_path, 20)
    if how == "stop":
        runs.run("dtrain.stop", f"--run_dir={tmp_path}/run")
    else:
        for node in nodes:
            node.send_signal(signal.SIGTERM)
    assert end(nodes) == [code] * 2, log(tmp_path, 0) + log(tmp_path, 1)
    assert "and saved at step" in log(tmp_path, 0)
    assert ("the stop file is there" in log(tmp_path, 0)) == (how == "stop")


def test_told_before_the_first_step(tmp_path: pathlib.Path) -> None:
    """One ends, and the other one loses it: neither is run again."""
    nodes = [start(tmp_path, index, FOR_EVER) for index in range(2)]
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "config.json").exists():
        assert time.monotonic() < deadline, log(tmp_path, 0)
        time.sleep(0.01)
    stop_file.write(f"{tmp_path}/run")
    assert end(nodes) == [errors.FINISHED] * 2, log(tmp_path, 1)
    assert "the stop file is there" in log(tmp_path, 1)


def test_alone(tmp_path: pathlib.Path) -> None:
    """Another allocation may have all nodes."""
    code, _ = runs.finish(start(tmp_path, 1, "--start_timeout_secs=3"))
    assert code == errors.LOST_WORKER
    said = log(tmp_path, 1)
    assert "waited 3 s (--start_timeout_secs) for the chief" in said
    assert "another allocation may have all nodes" in said


def test_a_mistake() -> None:
    code, output = runs.run("launch.node", "--", "--num_stepps=1")
    assert code == errors.USER_ERROR
    assert "did you mean --num_steps?" in output
