"""Programs that measure; docs/speed.md begins with how to run them."""

import importlib.util
import sys

if not importlib.util.find_spec("pytest"):
    print(
        "error: benchmarks need what the tests need: `make .venv/tests.stamp`, "
        "and .venv/bin/python",
        file=sys.stderr,
    )
    sys.exit(2)
