"""A worker that lives and does nothing is found, in a run of two.

A link that is cut needs hosts of its own: see `chaos_test`.
"""

from __future__ import annotations

import os
import pathlib
import random
import re
import signal
import time

import pytest

from dtrain import errors
from tests import chaos_victim, resume_test, runs

HANG_SECS = 10


def start(run_dir: pathlib.Path, *more: str) -> runs.Process:
    """Starts two workers that `chaos_agent` can break from the inside."""
    orders = run_dir.parent / "orders"
    orders.mkdir()
    return runs.start(
        *("launch.main", "--num_workers=2", *more, "--"),
        *runs.SMALL,
        f"--run_dir={run_dir}",
        "--num_steps=10000000",
        "--checkpoint_every_steps=50",
        f"--hang_timeout_secs={HANG_SECS}",
        PYTHONPATH=f"{chaos_victim.AGENT}:{runs.ROOT}",
        DTRAIN_CHAOS_DIR=str(orders),
    )


@pytest.mark.parametrize("fault", ["stuck", "stuck_data", "gil", "SIGSTOP"])
def test_one_that_stands_still(
    fault: str, tmp_path: pathlib.Path, chance: random.Random
) -> None:
    """Its stacks are told, and all start again by themselves."""
    run_dir = tmp_path / "run"
    process = start(run_dir)
    resume_test.wait_for_step(run_dir, 60)
    victim = resume_test.children_of(process.pid)[chance.randrange(2)]
    found = time.monotonic()
    if fault == "SIGSTOP":
        os.kill(victim, signal.SIGSTOP)
    else:
        (tmp_path / "orders" / "new").write_text(fault)
        (tmp_path / "orders" / "new").rename(tmp_path / "orders" / str(victim))
    while os.path.exists(f"/proc/{victim}"):
        # Twice, for a loop may have begun just before.
        assert time.monotonic() < found + 2 * HANG_SECS + 20
        time.sleep(0.1)
    step = len(runs.metrics(run_dir))
    resume_test.wait_for_step(run_dir, step + 20)
    process.send_signal(signal.SIGTERM)
    code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    assert "start 2 goes on from step" in output
    stacks = "".join(
        path.read_text() for path in run_dir.glob("stacks/worker-*.txt")
    )
    if fault == "SIGSTOP":
        # Its peer finds it by its heartbeats, or the supervisor by its status.
        assert re.search("lost another worker|no sign of life", output), output
    else:
        assert "sitecustomize.py" in stacks, output
    if fault == "stuck":
        assert "no progress for" in output
        assert "in run" in stacks
