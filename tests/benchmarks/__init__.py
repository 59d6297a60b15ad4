"""Programs that measure; docs/speed.md begins with how to run them."""

import importlib.util

from tests.benchmarks import command

if not importlib.util.find_spec("pytest"):
    command.refuse(
        "benchmarks need what the tests need: `make .venv/tests.stamp`, and "
        ".venv/bin/python"
    )
