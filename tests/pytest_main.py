"""Runs pytest on the files named: the program of every py_test.

Bazel gives the path of an XML report in XML_OUTPUT_FILE.
"""

from __future__ import annotations

import os
import sys

import pytest

if __name__ == "__main__":
    report = os.environ.get("XML_OUTPUT_FILE")
    options = [f"--junitxml={report}"] if report else []
    sys.exit(pytest.main(["-p", "no:cacheprovider", *options, *sys.argv[1:]]))
