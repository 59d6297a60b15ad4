"""TensorFlow's noise is dropped, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dtrain.storage import startup
from tests import runs

NOISE = """\
WARNING: All log messages before absl::InitializeLog() is called are written
I0000 00:00:1795376708.832208   14213 port.cc:153] oneDNN custom operations are
E0000 00:00:1795376708.832570   14213 cuda_platform.cc:52] failed call to cuInit
I0000 00:00:1795376708.881147   14213 cpu_feature_guard.cc:227] This TensorFlow
To enable the following instructions: AVX2 AVX512F AVX512_VNNI
"""
NEWS = """\
W0000 00:00:1795376708.881147   14213 gpu_device.cc:2431] Cannot dlopen some GPU
Traceback (most recent call last):
a line in an unknown encoding: \ufffd
no end of line"""


def test_quiet_drops_the_noise_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with startup.quiet():
        # As C++ does, past Python's buffers.
        os.write(2, NOISE.encode())
        os.write(2, NEWS.replace("\ufffd", "\xff").encode("latin-1"))
    print("\nafter", file=sys.stderr)
    assert capfd.readouterr().err == f"{NEWS}\nafter\n"


def fail_quietly() -> float:
    with startup.quiet():
        os.write(2, f"{NOISE}why it broke\n".encode())
        return 1 / 0


def test_quiet_hides_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_quietly()
    assert capfd.readouterr().err == "why it broke\n"


IMPORT = """
import sys
from dtrain.storage import startup

startup.import_tensorflow()
assert "tensorflow" in sys.modules
assert "keras" in sys.modules
assert "matplotlib" not in sys.modules
import matplotlib.pyplot
import tensorflow as tf

print(int(tf.reduce_sum(tf.ones([2, 2]))))
"""


def test_tensorflow_is_imported_in_silence() -> None:
    environment = runs.environment()
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
    finished = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.stdout == "4\n"
    assert finished.returncode == 0
