"""What every program answers: its help page, its version, a wrong flag."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from dtrain import (
    check_data,
    checkpoint_tool,
    config,
    errors,
    evaluate,
    gallery,
    main,
    report,
    sample,
    stop,
    store,
)
from launch import main as launcher
from launch import node, options
from tests import runs


class Door(NamedTuple):
    """A program.

    Attributes:
        run: takes a command line, the program's name first.
        kind: the dataclass of its flags; None if it has commands instead.
    """

    run: Callable[[list[str]], int]
    kind: type | None


DOORS = {
    "dtrain.main": Door(main.run, config.Config),
    "dtrain.sample": Door(sample.run, sample.Request),
    "dtrain.evaluate": Door(evaluate.run, evaluate.Options),
    "dtrain.report": Door(report.run, report.Options),
    "dtrain.gallery": Door(gallery.run, gallery.Options),
    "dtrain.stop": Door(stop.run, stop.Options),
    "dtrain.store": Door(store.run, config.DataSettings),
    "dtrain.check_data": Door(check_data.run, check_data.Options),
    "dtrain.checkpoint_tool": Door(
        lambda arguments: checkpoint_tool.run(arguments[1:]), None
    ),
    "launch.main": Door(launcher.run, options.Options),
    "launch.node": Door(node.run, node.Options),
}
# By the command, one of its flags and what is shown of its default.
COMMANDS = {
    **dict.fromkeys(
        ("inspect", "cat", "verify", "digest", "edit", "average", "merge"), ""
    ),
    **dict.fromkeys(("list", "export", "import", "pin", "unpin"), ""),
    "diff": "(default: 0, bit for bit)",
    "prune": "(default: generator_loss)",
}
ALL = pytest.mark.parametrize("name", DOORS)


def head(flag: dataclasses.Field[Any]) -> str:
    """Returns a pattern of how a page shows a flag and its default."""
    default = flag.metadata.get("shown") or flag.default
    if flag.metadata.get("is_required"):
        shown = r"\(must be given\)"
    elif isinstance(default, tuple):
        shown = r"\(may be given several times\)"
    else:
        text = str(default).lower() if isinstance(default, bool) else default
        text = re.escape(str(text) or '""')
        shown = rf"\(default:\s+{text}\)"
    no = r"\[no\]" if isinstance(flag.default, bool) else ""
    return rf"\n  --{no}{flag.name}(=\S+)?\s+{shown}"


@ALL
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_a_help_page_has_every_flag(
    name: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    door = DOORS[name]
    assert door.run([name, word]) == errors.FINISHED
    page = capsys.readouterr().out
    assert page.startswith(f"usage: python -m {name} ")
    assert max(map(len, page.splitlines())) <= 80
    for flag in dataclasses.fields(door.kind) if door.kind else ():
        assert re.search(head(flag), page), flag.name
        first = flag.metadata["help"].split()[:3]
        assert " ".join(first) in " ".join(page.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_a_page(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        checkpoint_tool.run([command, "--help"])
    assert ended.value.code == errors.FINISHED
    page = capsys.readouterr().out
    assert page.startswith(f"usage: python -m dtrain.checkpoint_tool {command}")
    assert max(map(len, page.splitlines())) <= 80
    assert COMMANDS[command] in " ".join(page.split())


def test_the_commands_are_those_of_the_tool() -> None:
    from dtrain.toolbox import commands

    assert set(COMMANDS) == {*commands.COMMANDS, "list"}


@ALL
def test_a_wrong_flag_is_a_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["list"] if DOORS[name].kind is None else []
    command = ["name"] if name == "dtrain.store" else command
    run = functools.partial(DOORS[name].run, [name, *command, "--no_such=1"])
    with pytest.raises(SystemExit) as ended:
        errors.exit_with(run)
    assert ended.value.code == errors.USER_ERROR
    output = capsys.readouterr()
    assert not output.out
    [line] = output.err.splitlines()
    assert line.startswith("error: ")
    assert "--help" in line


@pytest.mark.parametrize(
    "name", ["dtrain.sample", "dtrain.stop", "dtrain.gallery"]
)
def test_a_directory_must_be_given(name: str) -> None:
    with pytest.raises(errors.UserError, match="run_dir is missing"):
        DOORS[name].run([name])


def test_every_program_tells_its_version_without_tensorflow() -> None:
    program = (
        "import runpy, sys\n"
        "sys.modules['tensorflow'] = sys.modules['keras'] = None\n"
        "for name in sys.argv[1:]:\n"
        "    sys.argv = [name, '--version']\n"
        "    try:\n"
        "        runpy.run_module(name, run_name='__main__')\n"
        "    except SystemExit as ended:\n"
        "        print(name, ended.code, flush=True)\n"
    )
    # That of the trainer ends its process by itself.
    names = [name for name in DOORS if name != "dtrain.main"]
    done = subprocess.run(
        [sys.executable, "-c", program, *names, "dtrain.main"],
        capture_output=True,
        text=True,
    )
    lines = [line for name in names for line in ("dtrain 0.1.0", f"{name} 0")]
    assert done.stdout.splitlines() == [*lines, "dtrain 0.1.0"], done.stderr
    assert done.returncode == 0


def test_every_exit_code_has_its_row() -> None:
    named = {
        value
        for name, value in vars(errors).items()
        if name.isupper() and isinstance(value, int)
    }
    assert {row.code for row in errors.EXITS} == named
    assert all(str(code) in errors.exit_codes() for code in named)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UserError("a"), 78),
        (errors.StorageError("a"), 74),
        (errors.LostWorkerError("a"), 76),
        (KeyboardInterrupt(), 130),
        (ValueError("a"), 1),
    ],
)
def test_an_error_has_its_code(error: BaseException, code: int) -> None:
    assert errors.code_of(error) == code


def catches_interrupts(pid: int) -> bool:
    """Tells whether a process has a handler for SIGINT."""
    try:
        text = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    [mask] = re.findall(r"SigCgt:\s*(\S+)", text) or ["0"]
    return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)


# What runs before Ctrl-C is dealt with: a few lines each.
FIRST = {
    "dtrain/__init__.py",
    "dtrain/interrupts.py",
    "dtrain/version.py",
    "launch/__init__.py",
}


@ALL
def test_ctrl_c_at_any_moment_of_the_start(
    name: str, chance: random.Random
) -> None:
    """Also in the first tenth of a second, while modules are imported."""
    for _ in range(5):
        child = subprocess.Popen(
            [sys.executable, "-m", name, "--help"],
            cwd=runs.ROOT,
            env=runs.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Before that it is Python itself that starts.
        while not catches_interrupts(child.pid) and child.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.08))
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        # Nothing is sooner than what the first line of a package imports;
        # Python itself, and the .venv beside the packages, are not ours.
        ours = rf'File "{runs.ROOT}/((?:dtrain|launch)/.*?)", line'
        frames = re.findall(ours, said)
        assert {*frames} <= FIRST, said
