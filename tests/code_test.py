"""The code of a job, as it is copied."""

from __future__ import annotations

import pathlib
import subprocess

import pytest

from launch import code


def test_a_job_takes_its_code_and_the_lock_along(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.py").write_text("SIZE = 1\n")
    code.write(code.find(str(tmp_path)), str(tmp_path / "copy"))
    names = (
        "mine/model.py",
        "dtrain/errors.py",
        "dtrain/data/digits/digits.npz",
        "dtrain/page/page.css",
        "launch/submit.py",
        code.RUNNER,
    )
    for name in names:
        assert (tmp_path / "copy" / name).is_file()
    assert not (tmp_path / "copy" / "dtrain" / "BUILD").exists()
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
        place = tmp_path / f"{run_dir}launch/20261123-081500-5ca1ab/code"
        code.write(first, str(place))
        assert (place / "run.py").read_text() == "SIZE = 1\n"
    assert code.find(str(tmp_path)) == first
    assert "launch/code/mine.py" in first
