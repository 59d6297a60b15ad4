"""Pythons with the client libraries of services, which are optional.

Each library is large, and wants other versions of what TensorFlow wants, too:
it has an environment of its own, which `make clients` installs.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from tests import requirement, runs


def run(client: str, program: str, given: Any, home: pathlib.Path) -> Any:
    """Runs a program by the Python of a client library.

    Args:
        client: `vertex` or `skypilot`. DTRAIN_VERTEX_PYTHON names another
            interpreter for the first.
        program: its text; it reads JSON, and prints JSON on the last line.
        given: what it reads.
        home: of a user without credentials and settings.

    Returns:
        What it prints.
    """
    default = os.path.join(sys.prefix, "clients", client, "bin", "python")
    python = os.environ.get(f"DTRAIN_{client.upper()}_PYTHON", default)
    if not os.path.exists(python):
        requirement.missing(f"no client library of {client}; make clients")
    done = subprocess.run(
        [python, "-c", program],
        input=json.dumps(given),
        env={
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(runs.ROOT),
            "NO_GCE_CHECK": "true",
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
