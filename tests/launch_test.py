"""The workers of one machine."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dtrain import errors
from dtrain.cluster import environment as environment_lib
from launch import main
from launch.keep import cycle
from launch.keep import worker as worker_lib
from tests import runs, typed


def process(code: str, name: str = "worker 0") -> worker_lib.Process:
    """A worker that runs a line of Python."""
    return worker_lib.Process(name, (sys.executable, "-c", code), {})


def run(*processes: worker_lib.Process, **options: float) -> int:
    """Runs some workers once; returns the exit code for all of them."""
    with cycle.Notices() as notices:
        return cycle.run(processes, notices, **options).code


# In place of python: says what it was called with.
PYTHON = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([sys.argv[1:], json.loads(os.environ["TF_CONFIG"])]))
"""


def run_lines(lines: str, place: pathlib.Path) -> list[list[Any]]:
    """Runs what a dry run prints; returns what each worker is started with."""
    done = subprocess.run(
        ["bash"],
        # A name of a file that is no UTF-8 is handed on as it is.
        input=os.fsencode(lines),
        cwd=place,
        env={"PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(arguments=st.lists(typed.words, max_size=4))
@example(arguments=[typed.ALL])
def test_what_bash_reads_is_what_was_typed(
    arguments: list[str], tmp_path: pathlib.Path
) -> None:
    python = tmp_path / "a 'b' $(touch canary)"
    python.write_text(PYTHON)
    python.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        planned = worker_lib.plan((2000, 2001), arguments)
    lines = "\n".join(each.to_shell() for each in planned)
    first, second = run_lines(lines, tmp_path)
    for index, (said, config) in enumerate([first, second]):
        strategy = "--strategy=multi_worker"
        assert said == ["-m", "dtrain.main", *arguments, strategy]
        assert config["task"]["index"] == index
    assert not list(tmp_path.rglob("canary"))


def test_a_canary_would_be_seen(tmp_path: pathlib.Path) -> None:
    assert run_lines("echo [$(touch canary)]", tmp_path) == [[]]
    assert (tmp_path / "canary").exists()


def test_one_worker_gets_no_cluster() -> None:
    [worker] = worker_lib.plan([2000], ["--strategy=mirrored"])
    assert worker.environment == {}
    assert worker.command[-1] == "--strategy=mirrored"


@pytest.mark.parametrize(
    ("visible", "seen"),
    [("", ["0,1", "2,3"]), ("3,1,GPU-5ab,0,2", ["3,1", "GPU-5ab,0"])],
)
def test_workers_share_the_gpus(
    visible: str, seen: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--num_workers=2", "--devices_per_worker=2", "--dry_run", "--"]
    environment = {"CUDA_VISIBLE_DEVICES": visible}
    assert main.run(["main", *flags], environment) == errors.FINISHED
    lines = capsys.readouterr().out.splitlines()
    for line, gpus in zip(lines, seen, strict=True):
        assert f" CUDA_VISIBLE_DEVICES={gpus} " in line
        assert " --num_devices=2 " in line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--num_workers=2 --", "devices_per_worker (2) must be at most 1"),
        ("--num_workers=4 --", "names 3 for 4 workers"),
        ("-- --strategy=mirrored --num_devices=2", "is set by devices_per"),
        ("--", "num_devices (2) needs --strategy=mirrored"),
    ],
)
def test_gpus_that_cannot_be_shared(line: str, message: str) -> None:
    ours = ["main", "--devices_per_worker=2", *line.split()]
    with pytest.raises(errors.UserError, match=re.escape(message)):
        main.run(ours, {"CUDA_VISIBLE_DEVICES": "0,1,2"})


def test_ports_are_free_and_distinct() -> None:
    assert len(set(worker_lib.free_ports(20))) == 20


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([0, 75], 75),
        ([75, 1], 1),
        ([1, 78], 78),
        ([75, -9], 137),
        ([76, -9], 137),
        ([76, 75], 76),
        ([-15, 0], 143),
    ],
)
def test_one_code_for_all(codes: list[int], expected: int) -> None:
    assert errors.combine(codes) == expected


def test_lines_carry_the_worker(capfd: pytest.CaptureFixture[str]) -> None:
    code = run(process("print('a\\nb')"), process("print('c')", "worker 1"))
    assert code == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    assert lines == ["[worker 0] a", "[worker 0] b", "[worker 1] c"]


def test_a_worker_that_fails_ends_the_others() -> None:
    start = time.monotonic()
    code = run(
        process("raise SystemExit(78)"),
        process("import time; time.sleep(60)"),
    )
    assert code == errors.USER_ERROR
    assert time.monotonic() - start < 30


def test_a_worker_that_does_not_listen_is_killed() -> None:
    deaf = (
        "import signal, time; signal.signal(15, lambda *_: 0); time.sleep(60)"
    )
    failing = process("raise SystemExit(3)")
    assert run(failing, process(deaf), leave_secs=1.0) == 3


def test_signal_is_handed_on_once(tmp_path: pathlib.Path) -> None:
    worker = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: sys.exit(75))\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "time.sleep(60)"
    )

    def interrupt() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert run(process(worker)) == errors.RUN_AGAIN


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ((), ""),
        (("a", "b", " "), "b"),
        (("ValueError: no", "the end"), "ValueError: no"),
        (("error: no disk", "KeyError: 1", "x"), "KeyError: 1"),
        (
            ("tensorflow.python.errors_impl.InternalError: no", "x"),
            "tensorflow.python.errors_impl.InternalError: no",
        ),
        (
            ("MemoryError", "  raise ValueError(1)"),
            "MemoryError",
        ),
        (
            (
                "x.InternalError: Graph:",
                "",
                "Detected:",
                "  File x",
                "it",
                " y",
            ),
            "x.InternalError: Graph: it",
        ),
        (("KeyError:",), "KeyError:"),
        (("lost another worker (x)", "y"), "lost another worker (x)"),
        (("an error: in prose", "y"), "y"),
    ],
)
def test_the_line_that_names_the_error(
    lines: tuple[str, ...], found: str
) -> None:
    worker = worker_lib.Worker(process(f"print({chr(10).join(lines)!r})"))
    while worker.code is None:
        time.sleep(0.01)
    worker.close()
    assert worker.last_error() == found


def test_dry_run_prints_and_runs_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["main", "--num_workers=2", "--dry_run", "--", "--run_dir=a b"]
    assert main.run(arguments) == errors.FINISHED
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "'--run_dir=a b'" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_workers=0"], "num_workers (0) must be at least 1"),
        (["--num_workers=x"], "num_workers"),
        (["--num_workers=2", "--min_workers=3"], "must be between 0 and 2"),
        (["--min_workers=-1"], "min_workers (-1) must be at least 0"),
        (["--max_restarts=-1"], "max_restarts (-1) must be at least 0"),
        (["--grace_secs=nan"], "grace_secs (nan) must be a finite number"),
        (["--backend=slurmm"], "backend (slurmm) must be one of local, slurm"),
        (
            ["--partition=a"],
            "partition is a flag of --backend=slurm; with local",
        ),
        (["--nonsense"], "nonsense"),
        (["--nodry_run=1"], "--nodry_run=1 does not take an argument"),
        (
            ["--", "--num_workers=2"],
            "num_workers is a flag of launch.main; write it in front of the --",
        ),
        (["train"], "'train' is none of submit, status"),
        (["status"], "run_dir is missing"),
        (["status", "--run_dir=none"], "run_dir (none) has no job"),
        (["--num_workers=2", "--", "--strategy=mirrored"], "leave it out"),
        (["--", "--batch_size=0"], "batch_size (0) must be at least 1"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(errors.UserError) as caught:
        main.run(["main", *arguments])
    assert message in str(caught.value)


def test_a_worker_of_a_larger_cluster_is_started_alone() -> None:
    workers = ("a:1", "b:2")
    environment = {
        "TF_CONFIG": environment_lib.Cluster(workers, 1).to_tf_config()
    }
    with pytest.raises(errors.UserError, match="worker 1 of 2"):
        main.run(["main", "--num_workers=2"], environment)
    assert main.run(["main", "--dry_run"], environment) == errors.FINISHED
    with pytest.raises(errors.UserError, match="TF_CONFIG is not JSON"):
        main.run(["main", "--dry_run"], {"TF_CONFIG": "{"})


def test_nothing_heavy_is_imported_before_the_start() -> None:
    script = (
        "import sys\n"
        "from dtrain import main as trainer\n"
        "from launch import main as launcher\n"
        "launcher.run(['main', '--help'])\n"
        "launcher.run(['main', '--num_workers=8', '--dry_run'])\n"
        "trainer.run(['main', '--help'])\n"
        "assert not {'tensorflow', 'keras', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env=runs.environment(),
        stdout=subprocess.DEVNULL,
    )
