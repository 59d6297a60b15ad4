"""A warm spare takes a worker's place, and nobody can tell it from a start.

Most workers are small programs that know what a spare is, as `dtrain.main`
does, and import nothing that takes long; the last are runs of dtrain.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from dtrain import errors
from dtrain.bundle import tensors
from dtrain.resilience import standby
from launch import main as launcher
from launch.keep import spares, supervisor, worker
from tests import requirement, runs

# What the programs begin with. A spare tells by a file that it prepares.
PRELUDE = """
import json, os, pathlib, signal, sys, time
from dtrain.resilience import standby, status
place = pathlib.Path(PLACE)
def prepare():
    (place / f"prepared-{os.getpid()}").touch()
    PREPARE
standby.stand_by(prepare)
attempt = int(os.environ["DTRAIN_ATTEMPT"])
def tell(step=-1, saved=-1):
    path = os.environ["DTRAIN_STATUS_FILE"]
    status.write(path, status.Status(os.getpid(), step, saved))
def make_steps():
    # Several: a supervisor that waits for a core sees not all of them.
    tell(0)
    for step in range(1, 5):
        time.sleep(0.1)
        tell(step, attempt)
def wait_for_spares(count):
    end = time.monotonic() + 120
    while len(list(place.glob("prepared-*"))) < count:
        time.sleep(0.01)
        if time.monotonic() > end:
            sys.exit("error: no spare has come")
    time.sleep(0.3)
"""


def prelude(place: pathlib.Path, prepare: str = "pass") -> str:
    text = PRELUDE.replace("PLACE", repr(str(place)))
    return text.replace("PREPARE", prepare)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "SETTLED_SECS", 0.0)


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Callable[..., int]:
    """Keeps a worker alive that runs a program."""

    def keep(program: str, prepare: str = "pass", **options: object) -> int:
        command = (sys.executable, "-c", prelude(tmp_path, prepare) + program)
        process = worker.Process(
            "worker 0", command, {"PYTHONPATH": str(runs.ROOT)}
        )
        return supervisor.run(
            supervisor.Options(**{"warm_spare": True, **options}),
            lambda _: [process],
        )

    return keep


def prepared(place: pathlib.Path) -> list[int]:
    """The processes that were spares."""
    return [int(path.name.split("-")[1]) for path in place.glob("prepared-*")]


# What a process can know of itself; `end` is how the first start ends.
FACTS = """
def facts():
    ours = pathlib.Path("/proc/self")
    return {
        "arguments": [sys.argv, sys.orig_argv],
        "variables": dict(os.environ),
        "files": {
            fd: os.readlink(ours / "fd" / str(fd)).partition(":")[0]
            for fd in range(9) if (ours / "fd" / str(fd)).exists()
        },
        "leads": os.getsid(0) == os.getpgid(0) == os.getpid(),
        "parent": os.getppid(),
        "nice": {
            os.getpriority(os.PRIO_PROCESS, pid): os.sched_getscheduler(pid)
            for pid in map(int, os.listdir(ours / "task"))
        },
        "oom": (ours / "oom_score_adj").read_text(),
        "signals": [str(signal.getsignal(n)) for n in range(1, 32)],
        "directory": os.getcwd(),
    }
(place / f"facts-{attempt}").write_text(json.dumps(facts()))
(place / f"pid-{attempt}").write_text(str(os.getpid()))
print("I am start", attempt, flush=True)
if attempt == 0:
    make_steps()
    wait_for_spares(1)
"""


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("tell(1, 1); sys.exit(75)", "was told to end by a notice"),
    ],
)
def test_it_takes_the_place_and_is_as_a_start(
    end: str,
    said: str,
    run: Callable[..., int],
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(f"{FACTS}    {end}\nsys.exit(0)") == errors.FINISHED
    out, err = capfd.readouterr()
    assert out.splitlines() == [f"[worker 0] I am start {n}" for n in (0, 1)]
    told, restarted = err.splitlines()
    assert told.startswith("worker 0 has a warm spare: 0.0")
    assert f"worker 0 {said}; start 2" in restarted
    assert prepared(tmp_path) == [int((tmp_path / "pid-1").read_text())]
    cold, warm = (
        json.loads((tmp_path / f"facts-{attempt}").read_text())
        for attempt in (0, 1)
    )
    assert cold["variables"].pop(worker.ATTEMPT) == "0"
    assert warm["variables"].pop(worker.ATTEMPT) == "1"
    assert warm == cold


def test_one_that_is_not_warm_is_no_spare(
    run: Callable[..., int], tmp_path: pathlib.Path
) -> None:
    program = """
(place / f"pid-{attempt}").write_text(str(os.getpid()))
make_steps()
if not attempt:
    wait_for_spares(1)
sys.exit(not attempt)
"""
    assert run(program, prepare="time.sleep(60)") == errors.FINISHED
    assert int((tmp_path / "pid-1").read_text()) not in prepared(tmp_path)
    assert not any(map(is_alive, prepared(tmp_path)))


def test_one_that_dies_is_replaced_for_some_time(
    run: Callable[..., int],
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = """
make_steps()
for count in (1, 2, 3):
    wait_for_spares(count)
    for path in place.glob("prepared-*"):
        try:
            os.kill(int(path.name.split("-")[1]), signal.SIGTERM)
        except ProcessLookupError:
            pass
time.sleep(0.5)
"""
    assert run(program) == errors.FINISHED
    assert len(prepared(tmp_path)) == 3
    told, *lines = capfd.readouterr().err.splitlines()
    assert "has a warm spare" in told
    ended = "the warm spare of worker 0 ended with -15; another"
    assert lines == [
        *[f"{ended} is kept"] * 2,
        f"{ended} is not tried again",
    ]


@pytest.mark.parametrize("why", ["off", "memory", "no step"])
def test_none_is_kept(
    why: str,
    run: Callable[..., int],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if why == "memory":
        monkeypatch.setattr(spares, "_LEAST_FREE_BYTES", 1 << 60)
    steps = "tell(0)" if why == "no step" else "make_steps()"
    program = f"{steps}\ntime.sleep(0.5)"
    assert run(program, warm_spare=why != "off") == errors.FINISHED
    assert not prepared(tmp_path)
    said = "worker 0 has no warm spare: " if why == "memory" else ""
    assert capfd.readouterr().err.startswith(said)


def test_it_ends_with_its_supervisor(tmp_path: pathlib.Path) -> None:
    program = prelude(tmp_path) + "make_steps(); time.sleep(60)"
    script = f"""
import sys
from launch.keep import spares, supervisor, worker
spares.SETTLED_SECS = 0.0
process = worker.Process("worker 0", (sys.executable, "-c", {program!r}), {{}})
supervisor.run(supervisor.Options(warm_spare=True), lambda _: [process])
"""
    keeper = subprocess.Popen(
        [sys.executable, "-c", script],
        env=runs.environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert keeper.stderr
    assert "has a warm spare" in keeper.stderr.readline()
    children = pathlib.Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children")
    others = [int(pid) for pid in children.read_text().split()]
    keeper.kill()
    keeper.wait()
    keeper.stderr.close()
    [spare] = prepared(tmp_path)
    end = time.monotonic() + 10
    while is_alive(spare) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_alive(spare)
    # The worker of this test knows nothing of its supervisor.
    for pid in {*others} - {spare}:
        os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


# What it must not have imported too early.

CALLED = """
import os, sys
from dtrain.resilience import standby
import imported
standby.stand_by(lambda: None)
is_warm = bool(standby.called_ns())
print(is_warm, imported.VALUE, os.environ.get("TF_CONFIG"), sys.stdin.read())
"""


@pytest.mark.parametrize(
    ("changes", "is_warm"),
    [
        ({"TF_CONFIG": "{}", "DTRAIN_ATTEMPT": "7"}, True),
        ({"TF_CONFIG": None}, True),
        ({"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}, False),
        ({"CUDA_VISIBLE_DEVICES": None}, False),
        ({"file": "VALUE = 22"}, False),
        ({"command": "pass"}, False),
    ],
    ids=str,
)
def test_what_differs_makes_it_a_new_process_in_place(
    changes: dict[str, str | None], is_warm: bool, tmp_path: pathlib.Path
) -> None:
    module = tmp_path / "imported.py"
    module.write_text("VALUE = 1")
    variables = {
        **{"PYTHONPATH": f"{runs.ROOT}:{tmp_path}", "TF_CONFIG": "[]"},
        **{"CUDA_VISIBLE_DEVICES": "0", standby.VARIABLE: "1"},
    }
    process = worker.Process("x", (sys.executable, "-c", CALLED), variables)
    ours, theirs = socket.socketpair()
    with theirs:
        child = worker.start(process, theirs.fileno())
    with ours:
        assert ours.recv(100) == standby.WARM
        command = process.command
        new = {**os.environ, **variables}
        del new[standby.VARIABLE]
        value, tf_config = 1, changes.get("TF_CONFIG", "[]")
        for name, change in changes.items():
            if name == "file":
                module.write_text("VALUE = 22")
                value = 22
            elif name == "command":
                command = (*command, "--another_flag")
            elif change is None:
                del new[name]
            else:
                new[name] = change
        ours.sendall(standby.to_call(command, new))
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert output.decode() == f"{is_warm} {value} {tf_config} \n"


# Runs of dtrain.


def test_a_killed_run_ends_with_the_same_bits(
    whole: runs.Whole,
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # At once, for the run is soon over.
    monkeypatch.setattr(spares, "SETTLED_SECS", -math.inf)
    flags = (*runs.SMALL, "--num_steps=600", "--checkpoint_every_steps=0")
    expected = whole("dtrain.main", *flags)
    run_dir = tmp_path / "run"
    children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children")
    known = set(children.read_text().split())

    def kill() -> None:
        while not list(run_dir.glob("backup/*.json")):
            time.sleep(0.01)
        victim = min(map(int, {*children.read_text().split()} - known))
        # Else it would be finished before its spare is warm.
        os.kill(victim, signal.SIGSTOP)
        said = ""
        while "has a warm spare" not in said:
            time.sleep(0.01)
            said += capfd.readouterr().err
        os.kill(victim, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    code = launcher.run(
        [
            *("launch.main", "--", *flags, f"--run_dir={run_dir}"),
            "--backup_every_secs=0.1",
        ]
    )
    assert code == errors.FINISHED
    told = capfd.readouterr()
    assert "was killed by SIGKILL; start 2" in told.err
    assert "resumed from" in told.out
    digests = {
        tensors.digest(f"{each}/checkpoints/ckpt-600")
        for each in (expected, run_dir)
    }
    assert len(digests) == 1
    assert runs.metrics(run_dir) == runs.metrics(expected)


# Stands in for the driver of a GPU, and tells when it is asked for anything.
DRIVER = """
#include <fcntl.h>
#include <stdlib.h>
int cuInit(unsigned flags) {
    open(getenv("DTRAIN_TEST_DRIVER"), O_CREAT | O_WRONLY, 0600);
    return 999;
}
"""


def test_no_device_is_touched_before_the_call(tmp_path: pathlib.Path) -> None:
    if not shutil.which("cc"):
        requirement.missing("a C compiler; apt-get install gcc")
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c"],
        cwd=tmp_path,
        check=True,
    )
    asked = tmp_path / "asked"
    variables = {
        **{"PYTHONPATH": str(runs.ROOT), "LD_LIBRARY_PATH": str(tmp_path)},
        **{"DTRAIN_TEST_DRIVER": str(asked), standby.VARIABLE: "1"},
    }
    flags = ("--dry_run", f"--run_dir={tmp_path / 'run'}", *runs.SMALL)
    command = (sys.executable, "-m", "dtrain.main", *flags)
    process = worker.Process("x", command, variables)
    ours, theirs = socket.socketpair()
    with theirs:
        child = worker.start(process, theirs.fileno())
    with ours:
        assert ours.recv(100) == standby.WARM
        assert not asked.exists()
        assert not (tmp_path / "run").exists()
        new = {**os.environ, **variables}
        del new[standby.VARIABLE]
        ours.sendall(standby.to_call(command, new))
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0, output
    assert asked.exists()
