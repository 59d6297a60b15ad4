"""TensorFlow's noise is dropped, and nothing else is."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from dtrain import errors
from dtrain.storage import startup
from tests import runs
from tests.requirement import missing

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


FLAGS = (*runs.SMALL, "--num_steps=2")


def train(
    run_dir: pathlib.Path,
    *prefix: str,
    flags: tuple[str, ...] = FLAGS,
    **more: str | None,
) -> tuple[int, str]:
    """Trains in a process that imports all anew; None takes a variable away."""
    place = run_dir.parent / "here"
    place.mkdir(exist_ok=True)
    given = {**runs.environment(), **more}
    finished = subprocess.run(
        [
            *(*prefix, sys.executable, "-m", "dtrain.main"),
            *(f"--run_dir={run_dir}", *flags),
        ],
        cwd=place,
        env={name: value for name, value in given.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    # As a directory named ~ would be.
    assert not list(place.iterdir())
    return finished.returncode, finished.stdout


def check_same(run_dir: pathlib.Path, whole: runs.Whole) -> None:
    undisturbed = whole("dtrain.main", *FLAGS)
    assert runs.metrics(run_dir) == runs.metrics(undisturbed)


@pytest.mark.parametrize(
    ("settings", "variables"),
    [
        ('{"image_data_format": "channels_first", "epsilon": 0.1}', {}),
        ('{"floatx": "float16", "backend": "jax"}', {}),
        ("{", {"KERAS_BACKEND": "torch", "KERAS_MAX_EPOCHS": "many"}),
    ],
)
def test_what_is_set_for_other_programs_of_keras_changes_no_run(
    settings: str,
    variables: dict[str, str],
    tmp_path: pathlib.Path,
    whole: runs.Whole,
) -> None:
    (tmp_path / "keras.json").write_text(settings)
    run_dir = tmp_path / "run"
    code, output = train(run_dir, KERAS_HOME=str(tmp_path), **variables)
    assert code == errors.FINISHED, output
    check_same(run_dir, whole)


@pytest.mark.parametrize("settings", ["[1]", '{"floatx": "int8"}'])
def test_settings_with_which_keras_does_not_start_are_named(
    settings: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "keras.json").write_text(settings)
    code, output = train(tmp_path / "run", KERAS_HOME=str(tmp_path))
    assert code == errors.USER_ERROR
    [line] = output.splitlines()
    assert line.startswith("error: Keras does not start (")
    assert f"remove what it reads, {tmp_path}/keras.json, or name" in line


# A user id that no file knows, as in many a container.
NOBODY = ("unshare", "--user", "--map-user=54321")


@pytest.fixture
def unknown_user() -> dict[str, None]:
    """Skips where there can be none; returns the variables of one."""
    tool = shutil.which(NOBODY[0])
    if not tool or subprocess.run([*NOBODY, "true"], check=False).returncode:
        missing("a user without an entry needs user namespaces, and unshare")
    return {"HOME": None, "USER": None, "LOGNAME": None, "KERAS_HOME": None}


def test_a_user_without_entry_and_home_trains(
    unknown_user: dict[str, None], tmp_path: pathlib.Path, whole: runs.Whole
) -> None:
    code, output = train(tmp_path / "run", *NOBODY, **unknown_user)
    assert code == errors.FINISHED, output
    check_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--run_dir=~/run", "'~/run' begins with ~, and user 54321 has"),
        (
            "--dataset=npz:~/x.npz",
            "dataset (npz:~/x.npz) must name an npz file; /nonexistent/x.npz ",
        ),
        ("--dataset=mnist", "mnist is not prepared in /nonexistent/"),
    ],
)
def test_a_user_without_a_home_is_told(
    flag: str,
    said: str,
    unknown_user: dict[str, None],
    tmp_path: pathlib.Path,
) -> None:
    run_dir = tmp_path / "run"
    code, output = train(run_dir, *NOBODY, flags=(*FLAGS, flag), **unknown_user)
    assert (code, len(output.splitlines())) == (errors.USER_ERROR, 1), output
    assert output.startswith(f"error: {said}")
