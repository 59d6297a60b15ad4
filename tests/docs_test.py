"""What the documentation shows, runs."""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from dtrain import errors
from tests import runs

PAGES = (runs.ROOT / "README.md", *sorted((runs.ROOT / "docs").glob("*.md")))

# How a block says what it is: `# my_model.py, used by --model=my_model:make`.
HEADER = re.compile(r"# (\w+\.py), used by (--model=.*)\n")


def code_blocks() -> list[str]:
    """Returns the Python blocks of all pages but weights.py.

    That one is run in `readme_test`.
    """
    blocks = [
        block
        for page in PAGES
        for block in re.findall(
            r"```python\n(.*?)```", page.read_text(), re.DOTALL
        )
    ]
    return [block for block in blocks if not block.startswith("# weights.py\n")]


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


def test_links_of_the_documentation_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(
            r"\]\((?!https?:)([^)#]+)\)", page.read_text()
        ):
            assert (page.parent / target).exists(), (page.name, target)
