"""The files of a job, wherever they go."""

from __future__ import annotations

import pathlib
import subprocess

import pytest
from etils import epath

from dtrain.errors import StorageError
from launch import code, storage


class NotFoundError(Exception):
    __module__ = "tensorflow.python.framework.errors_impl"


@pytest.mark.parametrize("error", [OSError("no\nspace"), NotFoundError("no")])
def test_what_fails_is_said(error: Exception) -> None:
    with (
        pytest.raises(StorageError, match="gs://bucket/a: no"),
        storage.access("gs://bucket/a"),
    ):
        raise error


def test_what_is_a_mistake_of_ours_stays_one() -> None:
    with pytest.raises(KeyError), storage.access("gs://bucket/a"):
        raise KeyError("a")


def test_a_store_has_no_directories(tmp_path: pathlib.Path) -> None:
    # That would need TensorFlow, and a bucket.
    storage.make_directory(epath.Path("gs://bucket/a"))
    storage.make_directory(epath.Path(tmp_path) / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_job_takes_its_code_and_the_lock_along(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.py").write_text("SIZE = 1\n")
    code.write(code.find(str(tmp_path)), str(tmp_path / "copy"))
    names = (
        "mine/model.py",
        "dtrain/errors.py",
        "launch/storage.py",
        code.RUNNER,
    )
    for name in names:
        assert (tmp_path / "copy" / name).is_file()
    lock = pathlib.Path(code.__file__).parent.parent / code.LOCK
    copy = tmp_path / "copy" / code.LOCK
    assert not lock.exists() or copy.read_bytes() == lock.read_bytes()


@pytest.mark.parametrize("has_git", [False, True])
def test_a_job_takes_no_copy_of_another_along(
    has_git: bool, tmp_path: pathlib.Path
) -> None:
    """Each would be twice as large as the one before it."""
    if has_git:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "run.py").write_text("SIZE = 1\n")
    (tmp_path / "launch" / "code").mkdir(parents=True)
    (tmp_path / "launch" / "code" / "mine.py").write_text("SIZE = 2\n")
    first = code.find(str(tmp_path))
    for run_dir in ("", "runs/a/"):
        place = tmp_path / f"{run_dir}launch/20261123-081500/code"
        code.write(first, str(place))
        assert (place / "run.py").read_text() == "SIZE = 1\n"
    assert code.find(str(tmp_path)) == first
    assert "launch/code/mine.py" in first
