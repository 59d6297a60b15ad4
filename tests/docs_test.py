"""What the documentation shows, runs."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest

from dtrain import checkpoint_tool, errors
from tests import doors_test, presets_page, runs

PAGES = (runs.ROOT / "README.md", *sorted((runs.ROOT / "docs").glob("*.md")))

# How a block says what it is: `# my_model.py, used by --model=my_model:make`.
HEADER = re.compile(r"# (\w+\.py), used by (--model=.*)\n")


# Flags of the benchmarks in tests, of launch's verbs, and of programs
# that are not ours. One with a hyphen in it is never ours.
SMALLER = {"write", "follow", "help", "output"}
SMALLER |= {"faults", "flush_denormals", "gpu", "move_to", "num_kills"}
SMALLER |= {"again_code", "is_encoded", "log_dir", "rounds", "secs"}
TOOL = {"dry_run", "edits", "filter", "into", "map", "network", "no_values"}
TOOL |= {"partial"}
OTHERS = {"file", "location", "logdir", "reservation", "signal", "tag"}
# Of TensorFlow, in TF_XLA_FLAGS; see `resume_test`.
OTHERS |= {
    f"tf_xla_persistent_cache_{name}" for name in ("directory", "device_types")
}


# Whole programs: two are run in `readme_test`, fit.py in a test below.
PROGRAMS = ("# weights.py\n", "# draw.py\n", "# fit.py\n")


def python_blocks(page: pathlib.Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def code_blocks() -> list[str]:
    """Returns the Python blocks of all pages that are no programs."""
    blocks = [
        block
        for page in PAGES
        # Which has a test module of its own.
        if page.name != "checkpoints.md"
        for block in python_blocks(page)
    ]
    return [block for block in blocks if not block.startswith(PROGRAMS)]


def header(block: str) -> tuple[str, str]:
    """Returns the file name of a block and the flags that use it."""
    match = HEADER.match(block)
    assert match, f"a block must begin with {HEADER.pattern}:\n{block}"
    return match[1], match[2]


@pytest.mark.parametrize("flags", [header(block)[1] for block in code_blocks()])
def test_model_of_the_documentation(flags: str, tmp_path: pathlib.Path) -> None:
    for block in code_blocks():
        (tmp_path / header(block)[0]).write_text(block)
    process = subprocess.run(
        [
            *(sys.executable, "-m", "dtrain.main"),
            *runs.SMALL,
            *shlex.split(flags),
            *("--run_dir=run", "--num_steps=3"),
        ],
        # The folder that python is started in is where a module is found.
        cwd=tmp_path,
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == errors.FINISHED, process.stdout
    metrics = runs.metrics(tmp_path / "run")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert {"generator_loss", "discriminator_loss"} <= metrics[-1].keys()


def test_fit_of_the_documentation(tmp_path: pathlib.Path) -> None:
    """It is killed, goes on, and keeps what it says it keeps."""
    [block] = python_blocks(runs.ROOT / "docs/callbacks.md")
    (tmp_path / "fit.py").write_text(block)

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "fit.py"],
            cwd=tmp_path,
            env=runs.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    process = start()
    while not list(tmp_path.glob("backup/ckpt-*.json")):
        assert process.poll() is None, runs.finish(process)
        time.sleep(0.01)
    process.kill()
    runs.finish(process)
    code, output = runs.finish(start())
    assert code == 0, output
    assert "fit goes on from " in output
    assert not (tmp_path / "backup").exists()
    steps = sorted(
        int(path.stem.removeprefix("ckpt-"))
        for path in tmp_path.glob("history/ckpt-*.json")
    )
    # 32 batches an epoch; the last two of 60, and the best if it is another.
    assert steps[-2:] == [59 * 32, 60 * 32]
    assert len(steps) in (2, 3)


def test_links_of_the_documentation_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (page.parent / target).exists(), (page.name, target)


def test_flags_of_the_documentation_are_flags() -> None:
    fields = [
        each
        for door in doors_test.DOORS.values()
        if door.kind
        for each in dataclasses.fields(door.kind)
    ]
    known = {each.name for each in fields} | SMALLER | OTHERS
    # The tool's own page for each command lists its flags.
    known |= set(checkpoint_tool.EDITS) | TOOL
    known |= {f"no{each.name}" for each in fields if each.type == "bool"}
    for page in PAGES:
        for name in re.findall(r"(?<![\w-])--(\w+)(?![\w-])", page.read_text()):
            assert name in known, (page.name, name)


def test_the_page_of_presets_is_what_they_say() -> None:
    page = presets_page.PAGE.read_text()
    assert page == presets_page.render(page)
