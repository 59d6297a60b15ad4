"""docs/checkpoints.md: what it shows works, and what it calls wrong is."""

from __future__ import annotations

import pathlib
import re
import shlex
import signal
import subprocess
import sys

import pytest

from dtrain import errors
from dtrain.bundle import tensors
from dtrain.checkpoint.directory import CheckpointDirectory
from tests import runs

PAGE = (runs.ROOT / "docs/checkpoints.md").read_text()
PROGRAMS = {
    block.partition("\n")[0].removeprefix("# "): block
    for block in re.findall(r"```python\n(# \w+\.py\n.*?)```", PAGE, re.S)
}
WRONG = re.findall(
    r"```python\n(# Wrong: .*?)```\n\n```\n(.*?)\n```", PAGE, re.S
)
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    for line in block.splitlines()
]


def start(
    name: str, *arguments: str, directory: pathlib.Path
) -> subprocess.Popen[str]:
    (directory / name).write_text(PROGRAMS[name])
    return subprocess.Popen(
        [sys.executable, name, *arguments],
        cwd=directory,
        env=runs.environment(TF_CPP_MIN_LOG_LEVEL="3"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(name: str, *arguments: str, directory: pathlib.Path) -> str:
    process = start(name, *arguments, directory=directory)
    output, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return output


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What loop.py saved, which was killed, and was started again."""
    for _ in range(5):
        directory = tmp_path_factory.mktemp("page")
        process = start("loop.py", "checkpoints", "300", directory=directory)
        assert process.stdout
        assert process.stdout.readline() == "saved 100\n"
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        there = CheckpointDirectory(f"{directory}/checkpoints").steps()
        # Or it was at its end before it could be killed.
        if 300 not in there:
            run("loop.py", "checkpoints", "300", directory=directory)
            return directory
    raise AssertionError("it was never killed")


def test_a_loop_that_was_killed_ends_with_the_bits_of_one_that_was_not(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run("loop.py", "checkpoints", "300", directory=tmp_path)
    killed, whole = (
        tensors.digest(f"{directory}/checkpoints/ckpt-300")
        for directory in (checkpoints, tmp_path)
    )
    assert killed == whole


def test_the_commands_and_what_reads_their_files(
    checkpoints: pathlib.Path,
) -> None:
    outputs = {}
    for command in COMMANDS:
        words = shlex.split(command)
        assert words[:2] == ["python", "-m"]
        process = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=checkpoints,
            env=runs.environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        expected = 1 if words[3] == "diff" else errors.FINISHED
        assert process.returncode == expected, process.stderr
        outputs[words[3]] = process.stdout
    assert outputs["cat"] == "300\n"
    assert "renamed" not in outputs["diff"]
    assert "dtype   discriminator/dense_1/kernel" in outputs["diff"]
    told = run("optimizer.py", directory=checkpoints).splitlines()
    assert told[0] == "300"
    assert len(told) == 3


def test_a_class_of_ones_own(tmp_path: pathlib.Path) -> None:
    assert run("own.py", directory=tmp_path) == "[1. 2. 3.]\n"


def test_stock_tensorflow_loads_a_part(checkpoints: pathlib.Path) -> None:
    told = run("load.py", "checkpoints", directory=checkpoints)
    assert told == "(1, 64)\n"


def test_every_program_and_wrong_answer_is_here() -> None:
    blocks = re.findall(r"```python\n", PAGE)
    assert len(blocks) == len(PROGRAMS) + len(WRONG)
    assert len(WRONG) >= 7


@pytest.mark.parametrize(
    ("snippet", "outcome"),
    WRONG,
    ids=[snippet.splitlines()[0][9:40] for snippet, _ in WRONG],
)
def test_a_wrong_answer_does_what_is_said(
    snippet: str,
    outcome: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(PROGRAMS["begin.py"] + snippet, "page", "exec"), {})
        told = capsys.readouterr().out
    except Exception as error:  # noqa: BLE001
        told = f"{type(error).__name__}: {error}"
    # Keras ends some of its errors by an empty line.
    assert " ".join(told.split()) == " ".join(outcome.split())
