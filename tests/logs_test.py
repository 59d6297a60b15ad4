"""Log files of workers, as one sees them."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from launch import logs
from tests import runs


def test_each_line_once_with_the_name_of_its_worker(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "worker-0.log", tmp_path / "worker-1.log"
    first.write_bytes(b"[worker 0] step 1\nit was killed\nno en")
    turns = [
        lambda: second.write_text("late\n"),
        lambda: first.open("ab").write(b"d\n\xff \n"),
        lambda: second.open("ab").write(b"the last, without an end"),
    ]

    def is_over() -> bool:
        # Something is written between two looks.
        if turns:
            turns.pop(0)()
        return not turns

    found = logs.show([f"{tmp_path}/*.log"], True, is_over)
    assert found == 2
    assert capsys.readouterr().out.splitlines() == [
        "[worker 0] step 1",
        "[worker-0] it was killed",
        "[worker-1] late",
        "[worker-0] no end",
        "[worker-0] \N{REPLACEMENT CHARACTER} ",
        "[worker-1] the last, without an end",
    ]


def test_a_line_without_end_and_no_file(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert logs.show([f"{tmp_path}/*.log"], False, lambda: True) == 0
    (tmp_path / "worker-0.log").write_bytes(b"x" * (5 << 20))
    assert logs.show([f"{tmp_path}/*.log"], False, lambda: True) == 1
    assert capsys.readouterr().out.count("x") == 5 << 20


def test_nobody_listens(tmp_path: pathlib.Path) -> None:
    """As behind `| head`: it ends before the job does, without a word."""
    (tmp_path / "worker-0.log").write_text("a line\n" * 100_000)
    program = (
        "from dtrain import streams\n"
        "from launch import logs\n"
        "streams.protect()\n"
        f"logs.show([{str(tmp_path / '*.log')!r}], True, lambda: False)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    assert child.wait(60) == 0
    child.stderr.close()
