"""What one does with a job, where its scheduler is a script of three lines."""

from __future__ import annotations

import json
import os
import pathlib

import pytest

from dtrain.errors import StorageError, UserError
from launch import main, submission

GOOD = {
    "version": 1,
    "backend": "slurm",
    "job_id": "17",
    "name": "digits",
    "run_dirs": ["/runs/digits"],
    "directory": "/runs/digits/launch/20261123-081500",
    "submitted_secs": 1795421700,
    "options": {},
    "arguments": [],
    "submit": [],
    "versions": {},
}


def write(run_dir: pathlib.Path, content: bytes) -> None:
    (run_dir / "launch").mkdir(parents=True)
    (run_dir / "launch" / "job.json").write_bytes(content)


def make_program(place: pathlib.Path, name: str, script: str) -> None:
    place.mkdir(exist_ok=True)
    (place / name).write_text(f"#!/bin/sh\n{script}\n")
    (place / name).chmod(0o755)


@pytest.fixture
def programs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
    """A directory of the PATH, before all others."""
    place = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"[1]",
        b"[" * 100_000,
        b'{"version": 2}',
        b'{"version": 1}',
        json.dumps({**GOOD, "backend": "pbs"}).encode(),
        json.dumps({**GOOD, "job_id": 17}).encode(),
        json.dumps({**GOOD, "run_dirs": []}).encode(),
        json.dumps({**GOOD, "run_dirs": None}).encode(),
    ],
)
def test_a_record_that_is_damaged(
    content: bytes, tmp_path: pathlib.Path
) -> None:
    write(tmp_path, content)
    with pytest.raises(StorageError, match=r"job\.json is"):
        submission.read(str(tmp_path))


def test_a_scheduler_that_does_not_answer_hides_no_other_job(
    programs: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_program(
        programs,
        "scontrol",
        "[ $4 = 17 ] && echo JobId=17 JobState=RUNNING",
    )
    for name in ("17", "18"):
        content = json.dumps({**GOOD, "job_id": name, "name": f"run-{name}"})
        write(tmp_path / "runs" / name, content.encode())
    assert main.run(["x", "list", f"--run_dir={tmp_path}/runs"]) == 0
    said = capsys.readouterr()
    assert [line.split()[3] for line in said.out.splitlines()] == [
        *("how", "running", "unknown"),
    ]
    assert "run-18: scontrol failed with 1" in said.err


def test_a_directory_with_lines(
    programs: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = "JobId=17 JobState=RUNNING Command=/two\nlines/job.sh WorkDir=/"
    make_program(programs, "scontrol", f"echo '{lines}'")
    write(tmp_path / "run", json.dumps(GOOD).encode())
    assert main.run(["x", "status", f"--run_dir={tmp_path}/run"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "running  job 17, RUNNING"
    ]


def test_home(
    programs: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No shell looks for a ~ behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_program(programs, "sbatch", "echo 17")
    make_program(programs, "scontrol", "echo JobId=17 JobState=RUNNING")
    main.run(
        ["x", "--backend=slurm", "--record_dir=~/a", "--", "--run_dir=runs/a"]
    )
    assert (tmp_path / "home" / "a" / "launch" / "job.json").is_file()
    capsys.readouterr()
    main.run(["x", "list", "--run_dir=~"])
    assert "running" in capsys.readouterr().out


def test_what_was_there_stays(
    programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A mount point, say, that a job was not taken for."""
    make_program(programs, "sbatch", "echo no such partition >&2; exit 1")
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        with pytest.raises(UserError, match="no such partition"):
            main.run(
                ["x", "--backend=slurm", "--", f"--run_dir={tmp_path}/{name}"]
            )
    assert not list((tmp_path / "there").iterdir())
    assert not (tmp_path / "new").exists()


def test_a_directory_that_was_removed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UserError, match="change to that of your code"):
        main.run(["x", "--backend=slurm", "--", f"--run_dir={tmp_path}/run"])


def test_a_submission_that_times_out_keeps_its_files(
    programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Slurm may have taken the job, which will look for them."""
    make_program(
        programs,
        "sbatch",
        'case "$1" in --test-only) exit 0;; esac\n'
        'echo "sbatch: error: Socket timed out on send/recv" >&2\nexit 1',
    )
    flags = ["--backend=slurm", "--", f"--run_dir={tmp_path}/run"]
    with pytest.raises(StorageError, match="squeue --me tells whether"):
        main.run(["main", *flags], {})
    [script] = tmp_path.glob("run/launch/*/job.sh")
    assert script.read_text().startswith("#!/bin/bash")


def test_flags_of_a_file_are_those_of_the_submission(
    programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    make_program(programs, "sbatch", "echo 17")
    flagfile = tmp_path / "flags"
    flagfile.write_text("--num_steps=7\n--seed=3\n")
    run_dir = tmp_path / "run"
    flags = [f"--flagfile={flagfile}", f"--run_dir={run_dir}"]
    main.run(["main", "--backend=slurm", "--", *flags], {})
    found = submission.read(str(run_dir))
    assert found
    assert found.arguments == ["--num_steps=7", "--seed=3", flags[1]]
