"""What is printed never decides over a run, or over a tool."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from dtrain import errors
from tests import runs

# Nobody reads of it: more than a pipe holds.
_LINES = 3000
TOOL = f"""
import sys
from dtrain import errors
def main():
    for number in range({_LINES}):
        print(f"line {{number}} gr\\u00f6\\u00dfe \\u2603 \\udcff of a tool")
    print("a note", file=sys.stderr)
    return errors.FINISHED
errors.exit_with(main)
"""
RUN = f"""
import pathlib, sys
from dtrain import errors, streams
def main():
    streams.never_wait()
    for number in range({_LINES}):
        print(f"line {{number}} gr\\u00f6\\u00dfe \\u2603 \\udcff of a run")
        print("a note", file=sys.stderr)
    pathlib.Path(sys.argv[1]).write_text("saved")
    return errors.RUN_AGAIN
errors.exit_with(main, errors.leave)
"""
SUPERVISOR = f"""
import sys
from dtrain import errors, streams
from launch.keep import supervisor, worker as worker_lib
marks = sys.argv[1]
worker = f"open({{marks!r}}, 'a').write('x')\\n"
worker += "for number in range({_LINES}):\\n"
worker += "    print('gr\\u00f6\\u00dfe \\u2603' * 9)\\n"
worker += f"exit(len(open({{marks!r}}).read()) < 2)"
def plan(_):
    command = (sys.executable, "-X", "utf8", "-c", worker)
    return [worker_lib.Process("worker 0", command, {{}})]
def main():
    streams.never_wait()
    return supervisor.run(supervisor.Options(), plan)
errors.exit_with(main)
"""


class Output:
    """Where a program prints to, and what becomes of it."""

    def __init__(self, kind: str) -> None:
        self.reader = -1
        if kind == "a full disk":
            self.writer = os.open("/dev/full", os.O_WRONLY)
        elif kind in ("a terminal that is stopped", "one that does not wait"):
            self.reader, self.writer = pty.openpty()
            if kind == "one that does not wait":
                os.set_blocking(self.writer, False)
            termios.tcflow(self.writer, termios.TCOOFF)
        else:
            self.reader, self.writer = os.pipe()
        if kind == "a pipe without a reader":
            os.close(self.reader)
            self.reader = -1

    def close(self) -> None:
        os.close(self.writer)
        if self.reader >= 0:
            os.close(self.reader)


@pytest.fixture
def output(request: pytest.FixtureRequest) -> Iterator[int]:
    opened = Output(request.param)
    yield opened.writer
    opened.close()


broken = pytest.mark.parametrize(
    "output",
    [
        *("a full disk", "a pipe without a reader", "a pipe that nobody reads"),
        *("a terminal that is stopped", "one that does not wait"),
    ],
    indirect=True,
)


@broken
@pytest.mark.parametrize("program", [RUN, SUPERVISOR], ids=["run", "launcher"])
def test_a_run_goes_on(
    output: int, program: str, tmp_path: pathlib.Path
) -> None:
    child = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "marks")],
        env=runs.environment(),
        stdout=output,
        stderr=output,
        timeout=60,
        check=False,
    )
    text = (tmp_path / "marks").read_text()
    if program is RUN:
        assert (child.returncode, text) == (errors.RUN_AGAIN, "saved")
    else:
        assert (child.returncode, text) == (errors.FINISHED, "xx")


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize("program", [TOOL, RUN], ids=["tool", "run"])
def test_a_closed_stream(
    streams: str, program: str, tmp_path: pathlib.Path
) -> None:
    """Nor does what C++ prints get into a file that was opened later."""
    mark = tmp_path / "mark"
    line = f'"$0" -c "$1" "$2" {streams}'
    child = subprocess.run(
        ["bash", "-c", line, sys.executable, program, str(mark)],
        env=runs.environment(),
        capture_output=True,
        check=False,
    )
    expected = errors.FINISHED if program is TOOL else errors.RUN_AGAIN
    assert child.returncode == expected, child.stderr
    assert b"Traceback" not in child.stderr
    assert program is TOOL or mark.read_text() == "saved"


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=["ascii", "C locale", "latin-1"],
)
@pytest.mark.parametrize("program", [TOOL, RUN], ids=["tool", "run"])
def test_letters_that_are_not_in_the_encoding(
    variables: dict[str, str], program: str, tmp_path: pathlib.Path
) -> None:
    child = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "mark")],
        env=runs.environment(**variables),
        capture_output=True,
        check=False,
    )
    assert child.returncode in (errors.FINISHED, errors.RUN_AGAIN)
    assert b"Traceback" not in child.stderr
    assert child.stdout.count(b"\n") == _LINES
    assert b"\\u2603 \\udcff" in child.stdout


def test_a_tool_whose_output_is_lost_says_so() -> None:
    with open("/dev/full", "w") as full:
        child = subprocess.run(
            [sys.executable, "-c", TOOL],
            env=runs.environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert child.returncode == errors.STORAGE_FAILED
    assert child.stderr.endswith(
        "error: standard output: No space left on device\n"
    )


def test_a_reader_that_has_seen_enough_is_no_failure() -> None:
    line = 'set -o pipefail; "$0" -c "$1" | head -n1'
    child = subprocess.run(
        ["bash", "-c", line, sys.executable, TOOL],
        env=runs.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == errors.FINISHED
    assert child.stdout.startswith("line 0 ")
    assert child.stderr == "a note\n"


def test_a_tool_waits_for_its_reader() -> None:
    """As for `less`, which reads a page and waits for a key."""
    child = subprocess.Popen(
        [sys.executable, "-c", TOOL],
        env=runs.environment(),
        stdout=subprocess.PIPE,
    )
    time.sleep(1.0)
    output, _ = child.communicate()
    assert output.count(b"\n") == _LINES
    assert child.returncode == errors.FINISHED


def test_ctrl_c_ends_what_reads_a_run_as_well(tmp_path: pathlib.Path) -> None:
    """`python -m dtrain.main 2>&1 | tee log`: both hear of it."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    flags = [*runs.SMALL, f"--run_dir={run_dir}", "--num_steps=1000000"]
    line = (
        "trap : INT; log=$1; shift; "
        '"$0" -m dtrain.main "$@" 2>&1 | tee "$log"; exit ${PIPESTATUS[0]}'
    )
    child = subprocess.Popen(
        ["bash", "-c", line, sys.executable, str(log), *flags],
        cwd=runs.ROOT,
        env=runs.environment(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not (log.exists() and "images/s" in log.read_text()):
        assert child.poll() is None
        time.sleep(0.1)
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait(60) == errors.RUN_AGAIN
    last = runs.metrics(run_dir)[-1]["step"]
    saved = [
        json.loads(path.read_bytes())["step"]
        for path in (run_dir / "checkpoints").glob("ckpt-*.json")
    ]
    assert last > 0
    assert max(saved) == last


def test_a_run_on_a_terminal_that_nobody_reads_any_more(
    tmp_path: pathlib.Path,
) -> None:
    """Ctrl-S, or a frozen ssh session; Ctrl-Q shows the rest."""
    run_dir = tmp_path / "run"
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "dtrain.main", *runs.SMALL),
            *(f"--run_dir={run_dir}", "--num_steps=3000"),
        ],
        cwd=runs.ROOT,
        env=runs.environment(),
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    shown = b""
    while b"images/s" not in shown:
        shown += os.read(master, 1 << 16)
    before = len(runs.metrics(run_dir))
    termios.tcflow(slave, termios.TCOOFF)
    while len(runs.metrics(run_dir)) < before + 1000:
        assert child.poll() is None
        time.sleep(0.1)
    termios.tcflow(slave, termios.TCOON)
    os.close(slave)
    # An error is the end of the terminal.
    with contextlib.suppress(OSError):
        while True:
            shown += os.read(master, 1 << 16)
    os.close(master)
    assert child.wait(60) == errors.FINISHED
    assert b"finished" in shown
