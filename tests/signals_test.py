"""Whatever a run is doing when it is told to end, it ends well, and goes on.

The long form sends DTRAIN_NUM_SIGNALS signals to each number of workers.
"""

from __future__ import annotations

import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from dtrain import errors
from dtrain.checkpoint.directory import CheckpointDirectory
from tests import preemption_test, runs

NUM_SIGNALS = int(os.environ.get("DTRAIN_NUM_SIGNALS", "2"))
SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2),
)
PROGRAMS = {
    "one worker": ("dtrain.main",),
    "two workers": ("launch.main", "--num_workers=2", "--"),
}


def flags(run_dir: pathlib.Path) -> list[str]:
    """Loops of steps that take seconds, pictures and saves in between."""
    return [
        *runs.SMALL,
        f"--run_dir={run_dir}",
        "--num_steps=10000000",
        "--steps_per_loop=100000",
        "--sample_every_steps=300",
        "--checkpoint_every_steps=500",
        "--backup_every_secs=0.5",
    ]


@pytest.mark.parametrize("workers", list(PROGRAMS))
def test_a_signal_at_any_moment(
    workers: str, tmp_path: pathlib.Path, chance: random.Random
) -> None:
    """One run, told to end again and again, in whichever phase it is."""
    run_dir = tmp_path / "run"
    saved = 0
    for number in range(NUM_SIGNALS):
        process = runs.start_anew(*PROGRAMS[workers], *flags(run_dir))
        # Import, building, compiling, training: all of it is in here.
        if number % 3:
            _wait_for_new_step(run_dir, saved)
            time.sleep(chance.uniform(0.0, 2.0))
        else:
            time.sleep(chance.uniform(1.0, 10.0))
        chosen = chance.choice(SIGNALS)
        process.send_signal(chosen)
        start = time.monotonic()
        code, output = runs.finish(process)
        print(f"{chosen.name}: {time.monotonic() - start:.1f} s")
        assert code == errors.RUN_AGAIN, output
        assert "Traceback" not in output, output
        found = re.search(r"and saved at step ([\d,]+)", output)
        if not found:
            # The first step was not done: there is nothing new to save.
            assert "before the first steps were done" in output, output
            continue
        saved = int(found[1].replace(",", ""))
        directory = CheckpointDirectory(str(run_dir / "checkpoints"))
        assert directory.steps()[-1] == saved
        directory.verify(saved)
        assert runs.metrics(run_dir)[-1]["step"] == saved
    steps = [line["step"] for line in runs.metrics(run_dir)]
    assert steps == list(range(1, len(steps) + 1))


def _wait_for_new_step(run_dir: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 120
    path = run_dir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") <= step:
        assert time.monotonic() < deadline, f"no step after {step}"
        time.sleep(0.01)


def test_the_second_signal_ends_it_at_once(tmp_path: pathlib.Path) -> None:
    """Without harm to the save that was the last."""
    run_dir = tmp_path / "run"
    process = runs.start("dtrain.main", *flags(run_dir))
    _wait_for_new_step(run_dir, 400)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    code, output = runs.finish(process)
    # Either it was ready before the second one came, or it ended by it.
    assert code in (errors.RUN_AGAIN, -signal.SIGINT), output
    directory = CheckpointDirectory(str(run_dir / "checkpoints"))
    directory.verify(directory.steps()[-1])
    code, output = runs.run(
        "dtrain.main", *flags(run_dir), "--stop_after_secs=5"
    )
    assert code == errors.RUN_AGAIN, output
    assert "resumed from" in output or "before the first steps" in output


def test_stop_program_and_the_next_start(tmp_path: pathlib.Path) -> None:
    """A supervisor that starts again would be what nobody asked for."""
    run_dir = tmp_path / "run"
    process = runs.start(*PROGRAMS["two workers"], *flags(run_dir))
    _wait_for_new_step(run_dir, 100)
    code, output = runs.run("dtrain.stop", f"--run_dir={run_dir}")
    assert code == errors.FINISHED, output
    code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    assert "stopped by the stop file and saved at step" in output
    # And the next start by a person goes on.
    step = runs.metrics(run_dir)[-1]["step"]
    process = runs.start(*PROGRAMS["one worker"], *flags(run_dir))
    _wait_for_new_step(run_dir, step)
    process.send_signal(signal.SIGTERM)
    code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    assert "stopped by SIGTERM and saved" in output


SLOW_END = """
import sys, time
from dtrain import errors, main
end = errors.end
def late(*arguments):
    # Any other thread may run first; this one may be the last to go on.
    time.sleep(3)
    end(*arguments)
errors.end = late
main.main()
"""


def test_told_while_it_waits_for_the_others(tmp_path: pathlib.Path) -> None:
    """Without them TensorFlow would hold the interpreter until they come."""
    with socket.create_server(("127.0.0.1", 0)) as chief:
        workers = f"127.0.0.1:{chief.getsockname()[1]},127.0.0.1:1"
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", SLOW_END, "--strategy=multi_worker"),
                *flags(tmp_path / "run"),
            ],
            env=runs.environment(
                DTRAIN_WORKERS=workers, DTRAIN_WORKER_INDEX="1"
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        chief.settimeout(120)
        # A chief that takes the call, and says nothing.
        with chief.accept()[0]:
            process.send_signal(signal.SIGTERM)
            try:
                code, output = runs.finish(process, 60)
            finally:
                process.kill()
    assert code == errors.RUN_AGAIN, output
    assert "before the first steps were done: nothing to save" in output


def test_one_worker_alone_is_told(tmp_path: pathlib.Path) -> None:
    """It says by what, and all of them start again."""
    run_dir = tmp_path / "run"
    process = runs.start(*PROGRAMS["two workers"], *flags(run_dir))
    _wait_for_new_step(run_dir, 20)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    second = int(pathlib.Path(children).read_text().split()[1])
    os.kill(second, signal.SIGTERM)
    deadline = time.monotonic() + 120
    while len(list((run_dir / "ledger").glob("*.json"))) < 2:
        assert time.monotonic() < deadline, "no second start"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    assert "[worker 1] told to end by SIGTERM at step" in output
    assert "[worker 0] stopped by another worker's notice and saved" in output
    assert "\nworker 1 was told to end by SIGTERM; start 2 goes on" in output


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("instance/preempted", "TRUE"),
        ("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"),
    ],
)
def test_a_machine_that_is_taken_away(
    key: str, value: str, tmp_path: pathlib.Path
) -> None:
    """Both workers save, and the supervisor starts nothing there again."""
    run_dir = tmp_path / "run"
    with preemption_test.Metadata() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        process = runs.start(
            *PROGRAMS["two workers"],
            *flags(run_dir),
            GCE_METADATA_HOST=server.host,
        )
        _wait_for_new_step(run_dir, 20)
        server.values[key] = value
        code, output = runs.finish(process)
        server.shutdown()
        thread.join()
    assert code == errors.RUN_AGAIN, output
    # By the chief, or by the other one if that one saw it first.
    assert re.search(
        rf"(stopped by GCE: {key} and saved|told to end by GCE: {key}) at step",
        output,
    ), output
    assert "and saved at step" in output
    assert f"told to end by GCE: {key}; it is not started again" in output
    directory = CheckpointDirectory(str(run_dir / "checkpoints"))
    assert directory.steps()[-1] == runs.metrics(run_dir)[-1]["step"]
