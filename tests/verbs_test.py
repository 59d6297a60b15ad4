"""What one does with a job, where its scheduler is a script of three lines."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

from dtrain import config, errors
from dtrain.errors import StorageError, UserError
from dtrain.storage import sealed
from launch import main, submission
from launch.backends import kubernetes, skypilot
from tests import plans, runs

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
    "line", [b'{"step": "x"}', b'{"step": 1e999}', b"[" * 50_000, b"9"]
)
def test_metrics_that_cannot_be_read_are_no_progress(
    line: bytes,
    programs: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_program(programs, "scontrol", "echo JobId=17 JobState=RUNNING")
    write(
        tmp_path / "run",
        json.dumps({**GOOD, "run_dirs": [str(tmp_path)]}).encode(),
    )
    (tmp_path / "metrics.jsonl").write_bytes(line + b"\n")
    assert main.run(["x", "status", f"--run_dir={tmp_path}/run"]) == 0
    assert str(tmp_path) not in capsys.readouterr().out


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
        json.dumps({**GOOD, "more": 1}).encode(),
        json.dumps({**GOOD, "run_dirs": ["-x"]}).encode(),
        json.dumps({**GOOD, "options": {"gpus_per_node": -1}}).encode(),
        json.dumps({**GOOD, "options": {"gang": "jobset"}}).encode(),
        json.dumps({**GOOD, "options": {"backend": "vertex"}}).encode(),
        b"",
    ],
)
def test_a_record_that_is_damaged(
    content: bytes, tmp_path: pathlib.Path
) -> None:
    write(tmp_path, content)
    with pytest.raises(StorageError, match=r"job\.json is"):
        submission.read(str(tmp_path))


ODD = (
    *(None, True, 17, -1, 1.5, 10**30, float("nan"), "", "17 18", "18\n"),
    *("-u1000", "--full", "\x1b[2J\x1b]0;x\x07", "a\0b", "\ud800", "x" * 9999),
    *("/x/\x1b[2J", "../../x", [], [None], ["-u1000"], ["/x/\x1b[2J"]),
    *(["/x", "gs://b/x"], {}, {"\x1b[2J": 1}, {"gang": "\x1b[2J"}),
    {"num_nodes": "\x1b[2J"},
)


@pytest.mark.parametrize("field", GOOD)
def test_a_record_is_not_believed(
    field: str,
    programs: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Any value of any type: a line, nothing raw, and no other option."""
    asked = tmp_path / "asked"
    for name in ("scontrol", "scancel", "sacct"):
        script = f'echo "$@" >> {asked}; echo JobId=17 JobState=PENDING'
        make_program(programs, name, script)
    for index, value in enumerate(ODD):
        run_dir = tmp_path / str(index)
        write(run_dir, json.dumps({**GOOD, field: value}).encode())
        for verb in ("status", "logs", "stop"):
            with contextlib.suppress(StorageError):
                main.run(["x", verb, f"--run_dir={run_dir}"], {})
    assert main.run(["x", "list", f"--run_dir={tmp_path}"], {}) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).replace("\n", "").isprintable()
    words = asked.read_text().split() if asked.exists() else []
    assert set(words) <= {"show", "job", "-o", "--state=PENDING", "17"}


def test_a_record_that_is_damaged_at_random(
    chance: random.Random, tmp_path: pathlib.Path
) -> None:
    good = json.dumps({**GOOD, "options": {"num_nodes": 2}}, indent=1).encode()
    (tmp_path / "launch").mkdir()
    insertions = (b"[", b'{"a":', b"1e999", b"null", b'"\\ud800"', b"\0", b"-")
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(chance.choice([1, 1, 2, 10])):
            place = chance.randrange(len(data))
            if chance.random() < 0.5:
                data[place] = chance.randrange(256)
            else:
                end = place + chance.randrange(20)
                data[place:end] = chance.choice(insertions)
        (tmp_path / "launch" / "job.json").write_bytes(data)
        with contextlib.suppress(StorageError):
            found = submission.read(str(tmp_path))
            assert found
            assert found.job_id.isdecimal()
            assert found.submitted.isprintable()


def test_a_record_that_is_damaged_hides_no_other(
    programs: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_program(programs, "scontrol", "echo JobId=17 JobState=RUNNING")
    for name, content in {
        "a": json.dumps(GOOD).encode(),
        "b\x1b[2J": b"{",
        "c": json.dumps(GOOD).encode(),
    }.items():
        write(tmp_path / name, content)
    assert main.run(["x", "list", f"--run_dir={tmp_path}"]) == 0
    said = capsys.readouterr()
    assert said.out.count("running") == 2
    [line] = said.err.splitlines()
    assert line.isprintable()
    assert "job.json is damaged" in line


def test_a_step_that_is_none(
    programs: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_program(programs, "scontrol", "echo JobId=17 JobState=RUNNING")
    record = {**GOOD, "run_dirs": [str(tmp_path)]}
    write(tmp_path, json.dumps(record).encode())
    for step in ("many", None, [], 1e999):
        line = json.dumps({"step": step})
        (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
        assert main.run(["x", "status", f"--run_dir={tmp_path}"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2


def test_what_a_scheduler_says_is_not_printed_raw(
    programs: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = "JobId=17 JobState=PENDING Reason=\x1b[2J"
    make_program(programs, "scontrol", f"printf '%s' '{said}'")
    write(tmp_path, json.dumps(GOOD).encode())
    assert main.run(["x", "status", f"--run_dir={tmp_path}"]) == 0
    assert "\\x1b[2J" in capsys.readouterr().out


def test_a_number_that_is_none(
    programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """As of a wrapper of sbatch that says more, or nothing."""
    for answer in ("-u1000", "Thank you", ""):
        make_program(
            programs, "sbatch", f'[ $1 = --test-only ] || echo "{answer}"'
        )
        with pytest.raises(StorageError, match="squeue --me tells whether"):
            main.run(["x", "--backend=slurm", "--", f"--run_dir={tmp_path}/r"])
        assert not (tmp_path / "r" / "launch" / "job.json").exists()


RECORDS = {
    "slurm": GOOD,
    "kubernetes": {**GOOD, "backend": "kubernetes", "job_id": "a/digits"},
    "skypilot": {**GOOD, "backend": "skypilot"},
}
SUBMISSIONS = {
    "slurm": "--backend=slurm -- --run_dir={}",
    "kubernetes": "--backend=kubernetes --image=x:1 --record_dir={} -- "
    "--run_dir=gs://b/r",
    "skypilot": "--backend=skypilot --record_dir={} -- --run_dir=gs://b/r",
}
VERTEX = (
    "--backend=vertex --project=p --region=r --machine_type=m --image=x "
    "--record_dir={} -- --run_dir=gs://b/r"
)
# All that asks a scheduler, but for Vertex AI's library.
PROGRAMS = ("sbatch", "scontrol", "sacct", "scancel", "kubectl", "sky")


@pytest.fixture
def silent(programs: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers that never answer, and less patience than one has."""
    for name in PROGRAMS:
        make_program(programs, name, "exec sleep 600")
    for module, name in (
        *((submission, "_TIMEOUT_SECS"), (submission, "LOG_SECS")),
        *((skypilot, "_TIMEOUT_SECS"), (skypilot, "_SUBMIT_SECS")),
        *((kubernetes, "LOG_SECS"), (kubernetes, "_LAST_SECS")),
    ):
        monkeypatch.setattr(module, name, 0.2)


@pytest.mark.parametrize("verb", ["status", "logs", "stop", "list"])
@pytest.mark.parametrize("backend", RECORDS)
def test_a_scheduler_that_never_answers(
    verb: str,
    backend: str,
    silent: None,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del silent
    write(tmp_path, json.dumps(RECORDS[backend]).encode())
    start = time.monotonic()
    if verb == "list" or (verb, backend) == ("logs", "slurm"):
        assert main.run(["x", verb, f"--run_dir={tmp_path}"]) == 0
    else:
        with pytest.raises(StorageError, match="has not answered within"):
            main.run(["x", verb, f"--run_dir={tmp_path}"])
    assert time.monotonic() - start < 30
    if verb == "list":
        assert "has not answered within 0.2 s" in capsys.readouterr().err


def test_a_scheduler_that_never_answers_is_asked_once(
    silent: None, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list of a hundred jobs does not take a hundred minutes."""
    del silent
    for name in "abc":
        write(tmp_path / name, json.dumps(GOOD).encode())
    write(tmp_path / "d", json.dumps(RECORDS["skypilot"]).encode())
    assert main.run(["x", "list", f"--run_dir={tmp_path}"]) == 0
    said = capsys.readouterr()
    assert said.out.count("unknown") == 4
    assert len(said.err.splitlines()) == 2


@pytest.mark.parametrize("backend", SUBMISSIONS)
def test_a_submission_that_is_never_answered(
    backend: str, silent: None, tmp_path: pathlib.Path
) -> None:
    """It may be queued, unless only the check was not answered."""
    del silent
    flags = SUBMISSIONS[backend].format(tmp_path / "run").split()
    with pytest.raises(StorageError, match="has not answered within"):
        main.run(["x", *flags], {})
    has_check = backend != "skypilot"
    assert (tmp_path / "run").exists() != has_check


@pytest.mark.parametrize("answer", ["", "Welcome!", "[]", "\x1b[2J|", "{"])
@pytest.mark.parametrize("backend", RECORDS)
def test_an_answer_that_is_none(
    answer: str,
    backend: str,
    programs: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As of a wrapper that greets, or a version that says it otherwise."""
    for name in PROGRAMS:
        make_program(programs, name, f"printf '%s' '{answer}'")
    write(tmp_path / "run", json.dumps(RECORDS[backend]).encode())
    for verb in ("status", "stop"):
        with contextlib.suppress(UserError):
            main.run(["x", verb, f"--run_dir={tmp_path}/run"], {})
    assert main.run(["x", "list", f"--run_dir={tmp_path}"], {}) == 0
    said = capsys.readouterr()
    assert " unknown " in said.out
    assert (said.out + said.err).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("verb", "backend"),
    [
        *(("submit", "slurm"), ("status", "slurm"), ("stop", "slurm")),
        *(("submit", "kubernetes"), ("status", "kubernetes")),
        *(("logs", "kubernetes"), ("stop", "kubernetes")),
        ("logs --follow", "slurm"),
        *(("submit", "skypilot"), ("submit", "vertex")),
    ],
)
def test_no_scheduler_here(
    verb: str,
    backend: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A line, and nothing else: a cost would not be one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = [f"--run_dir={tmp_path}/run"]
    if verb == "submit":
        line = {**SUBMISSIONS, "vertex": VERTEX}[backend]
        flags = line.format(tmp_path / "run").split()
        monkeypatch.setitem(sys.modules, "google.cloud.aiplatform_v1", None)
    else:
        write(tmp_path / "run", json.dumps(RECORDS[backend]).encode())
    with pytest.raises(SystemExit) as ended:
        errors.exit_with(lambda: main.run(["x", *verb.split(), *flags], {}))
    said = capsys.readouterr()
    assert ended.value.code == errors.USER_ERROR
    assert len(said.err.splitlines()) == 1
    remedies = ("is this a machine from which jobs are submitted?", "; pip ")
    assert any(remedy in said.err for remedy in remedies)
    assert not said.out
    assert (tmp_path / "run").exists() == (verb != "submit")


@pytest.mark.parametrize(
    "name", ["SBATCH_ARRAY_INX", "SBATCH_CLUSTERS", "SBATCH_WAIT"]
)
def test_variables_that_would_make_another_job(
    name: str,
    programs: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_program(programs, "sbatch", "echo 17")
    monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match=f"unset {name}"):
        main.run(["x", "--backend=slurm", "--", f"--run_dir={tmp_path}/r"])
    assert not (tmp_path / "r").exists()


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


@pytest.mark.parametrize("num_runs", [1, 2])
def test_two_submissions_in_one_second(
    num_runs: int,
    programs: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one that is refused takes nothing of the other with it."""
    monkeypatch.setattr(time, "time", lambda: plans.SECS)
    make_program(programs, "scontrol", "echo JobId=17 JobState=COMPLETED")
    # Refused when Slurm was asked already whether it would take it.
    script = f"[ -e {tmp_path}/full ] && exit 1 || echo 17"
    make_program(programs, "sbatch", f"[ $1 = --test-only ] || {{ {script}; }}")
    flags = ["x", "--backend=slurm", f"--record_dir={tmp_path}/jobs", "--"]
    main.run([*flags, f"--run_dir={tmp_path}/1"], {})
    written = sorted((tmp_path / "jobs").rglob("*"))
    (tmp_path / "full").touch()
    with pytest.raises(UserError, match="sbatch failed with 1"):
        main.run([*flags, f"--run_dir={tmp_path}/{num_runs}"], {})
    assert sorted((tmp_path / "jobs").rglob("*")) == written


def test_two_submissions_at_once(
    programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """One is queued, the other sees it: two would train one run."""
    make_program(programs, "scontrol", "echo JobId=17 JobState=PENDING")
    make_program(
        programs,
        "sbatch",
        '[ "$1" = --test-only ] && exit\n'
        f"sleep 0.5; echo x >> {tmp_path}/queued; echo 17",
    )
    flags = ["--backend=slurm", "--", f"--run_dir={tmp_path}/run"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.main", *flags],
            env=runs.environment(),
            cwd=programs,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [each.communicate()[1] for each in started]
    codes = sorted(each.returncode for each in started)
    assert codes == [errors.FINISHED, errors.USER_ERROR], said
    assert "has a job already, 17" in "".join(said)
    assert (tmp_path / "queued").read_text() == "x\n"


def seen_here(
    programs: pathlib.Path, tmp_path: pathlib.Path, *flags: str
) -> list[str]:
    """Submits a job from a directory of its own; returns what is said."""
    make_program(programs, "sbatch", "echo 17")
    make_program(programs, "scontrol", "echo JobId=17 JobState=COMPLETED")
    with pytest.raises(UserError) as caught:
        main.run(["x", "--backend=slurm", *flags], {})
    assert not list(tmp_path.rglob("job.sh"))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset=npz:none.npz",), "dataset (npz:none.npz): there is no"),
        (("--dataset=folder:/none",), "there is no /none on this machine"),
        (
            ("--paired=a=map:npz:/none.npz#b",),
            "dataset (npz:/none.npz#b): there is no /none.npz on this machine",
        ),
        (("--init_from=none/ckpt-1",), "init_from (none/ckpt-1) is not on"),
        (("--dataset=points:no.npz",), "there is no no.npz on this machine"),
        (
            ("--model=mine:make", "--dataset=points:ring"),
            "model (mine:make): there is no module mine",
        ),
        (("--model=broken:make",), "importing broken raised ZeroDivisionError"),
    ],
)
def test_what_the_login_node_sees_is_said_before_it_is_queued(
    flags: tuple[str, ...],
    message: str,
    programs: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    typed = ["--", f"--run_dir={tmp_path}/run", *flags]
    [line] = seen_here(programs, tmp_path, *typed)
    assert message in line
    assert line.endswith("or add --nocheck_here if the nodes have it")
    main.run(["x", "--backend=slurm", "--nocheck_here", *typed], {})
    assert list(tmp_path.rglob("job.sh"))


def test_another_run_is_seen_before_a_job_is_queued(
    programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    place = tmp_path / "sweep" / "seed=2"
    place.mkdir(parents=True)
    parsed = config.parse(["x", "--run_dir=run", "--image_size=16"])
    content = sealed.dumps({"config": parsed.to_dict()})
    (place / "config.json").write_bytes(content)
    typed = ["--sweep=seed=1,2", "--", f"--run_dir={tmp_path}/sweep"]
    [line] = seen_here(programs, tmp_path, *typed)
    assert f"run_dir ({place}) belongs to another run: " in line
    assert "image_size was 16 and is now 0" in line


def test_each_run_of_a_sweep_is_looked_at(
    programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    typed = [f"--sweep=dataset=digits,npz:{tmp_path}/none", "--"]
    [line] = seen_here(programs, tmp_path, *typed, f"--run_dir={tmp_path}/r")
    assert f"there is no {tmp_path}/none on this machine" in line


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
def test_a_place_where_no_job_can_be_written_down(
    place: str, programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    make_program(programs, "sbatch", "echo 17")
    (tmp_path / "file").touch()
    typed = [f"--record_dir={tmp_path / place}", "--", f"--run_dir={tmp_path}"]
    with pytest.raises(UserError, match=r"cannot be made: .*--record_dir"):
        main.run(["x", "--backend=slurm", *typed], {})


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
