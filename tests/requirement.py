"""What a test does where a tool that it needs is not installed."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """Skips the running test, or fails it where CI=true.

    CI installs every tool, so that a skip there would hide a broken install.

    Args:
        reason: what is missing and how to get it, on one line.
    """
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI lacks what the test needs: {reason}", pytrace=False)
    pytest.skip(reason)
