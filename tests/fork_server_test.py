"""A program cannot tell a fork of the server from a true start."""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tests import fork_server, itself, runs

VARIABLES = {"DTRAIN_ITSELF": "x", "PYTHONPATH": f"/nowhere:{runs.ROOT}"}


def start_forked(*arguments: str, **more: str) -> fork_server.Process:
    order = fork_server.Order(
        "tests.itself", arguments, str(runs.ROOT), runs.environment(**more)
    )
    assert fork_server.suits(order.variables)
    return fork_server.start(order)


def read(output: str) -> tuple[int, list[float], list[str]]:
    """Returns the process id, what was drawn, and the lines after it."""
    start = output.index("[")
    said, *rest = output[start:].splitlines()
    pid, *drawn = json.loads(said)
    return pid, drawn, rest


def told(process: runs.Process) -> dict[str, Any]:
    """Returns what a process that `tells` has told."""
    code, output = runs.finish(process)
    assert code == 0, output
    [line] = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(line)


def test_all_that_a_program_can_see() -> None:
    process = runs.start_anew("tests.itself", "tells", **VARIABLES)
    assert told(start_forked("tells", **VARIABLES)) == told(process)


@pytest.mark.parametrize("end", [end for end in itself.ENDS if end != "tells"])
def test_an_end_is_as_any_other(end: str) -> None:
    both = [runs.start_anew("tests.itself", end), start_forked(end)]
    codes, outputs = zip(*map(runs.finish, both), strict=True)
    assert codes[0] == codes[1], outputs
    pids, drawn, rests = zip(*map(read, outputs), strict=True)
    assert list(pids) == [process.pid for process in both]
    assert not {*drawn[0]} & {*drawn[1]}
    if end in ("raises", "is interrupted"):
        # Above the frames of the program Python has others.
        rests = [
            [line for line in rest if "itself.py" in line or line[0] != " "]
            for rest in rests
        ]
    assert rests[0] == rests[1]


def test_no_two_draw_the_same() -> None:
    outputs = [runs.finish(start_forked("returns"))[1] for _ in range(2)]
    (_, first, _), (_, second, _) = map(read, outputs)
    assert not {*first} & {*second}


def test_signals_and_timeouts_are_those_of_a_process() -> None:
    with start_forked("has a thread") as process:
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(0.01)
        process.send_signal(signal.SIGSTOP)
        process.kill()
        code, output = runs.finish(process)
    assert code == process.returncode == process.poll() == -signal.SIGKILL
    # Nobody is hit by what comes too late.
    process.kill()
    assert "the thread" not in output


def test_several_at_once() -> None:
    """And none holds on to what another one has open."""
    processes = [start_forked("has a thread") for _ in range(3)]
    for process in reversed(processes):
        code, output = runs.finish(process)
        assert code == 0, output
        assert output.endswith("the thread\nthe end\n")


def test_a_lock_of_the_test_is_not_shared(tmp_path: pathlib.Path) -> None:
    """The server began before, and none of its forks has the file."""
    start_forked("returns").communicate()
    with (tmp_path / "lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        process = start_forked("has a thread")
    with (tmp_path / "lock").open("w") as second:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    runs.finish(process)


@pytest.mark.parametrize(
    ("changed", "is_forked"),
    [
        ({}, True),
        ({"DTRAIN_STATUS_FILE": "x", "TF_CONFIG": "{}"}, True),
        ({"TF_CPP_MIN_LOG_LEVEL": "1"}, False),
        ({"PYTHONHASHSEED": "1"}, False),
        ({"COVERAGE_PROCESS_CONFIG": "1"}, False),
        ({"DTRAIN_FORK_SERVER": "off"}, False),
        ({"PYTHONPATH": f"{runs.ROOT}/tests/chaos_agent:{runs.ROOT}"}, False),
    ],
)
def test_what_an_import_reads_needs_a_true_start(
    changed: dict[str, str], is_forked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COVERAGE_PROCESS_CONFIG", "DTRAIN_FORK_SERVER"):
        monkeypatch.delenv(name, raising=False)
    variables = runs.environment(**changed)
    assert runs.is_forked("dtrain.main", variables) == is_forked
    assert not runs.is_forked("launch.main", variables)


def test_a_variable_that_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_ITSELF", "x")
    environment = told(start_forked("tells"))["environment"]
    assert environment["DTRAIN_ITSELF"] == "x"
    monkeypatch.delenv("DTRAIN_ITSELF")
    assert "DTRAIN_ITSELF" not in told(start_forked("tells"))["environment"]


@pytest.mark.parametrize("last", ["pass", "os._exit(0)"])
def test_the_end_of_the_tests_is_the_end_of_the_server(
    last: str, tmp_path: pathlib.Path
) -> None:
    program = tmp_path / "ends.py"
    program.write_text(
        "import os\n"
        "from tests import fork_server, fork_server_test\n"
        "fork_server_test.start_forked('returns').communicate()\n"
        "print(fork_server._server()._process.pid, flush=True)\n"
        f"{last}\n"
    )
    said = subprocess.check_output(
        [sys.executable, str(program)],
        env=runs.environment(),
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{int(said)}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
