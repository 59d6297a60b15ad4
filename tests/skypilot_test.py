"""What is submitted to SkyPilot: the task, and what bash makes of it."""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, example, given, settings

from dtrain import config
from dtrain.errors import UserError
from launch import job as jobs
from launch import submission
from launch.backends import skypilot
from launch.job import Job
from launch.options import Options
from tests import clients, plans, typed


def job(*arguments: str, **options: object) -> Job:
    arguments = ("--run_dir=gs://bucket/faces", *arguments)
    return Job(
        options=Options(backend="skypilot", **options),
        arguments=arguments,
        parsed=config.parse(["dtrain.main", *arguments]),
        directory="gs://bucket/faces/launch/1",
        workdir="/home/me/code",
        python="/home/me/venv/bin/python",
        submitted_secs=plans.SECS,
        mark=plans.MARK,
    )


JOBS = plans.make_jobs("skypilot")


def run_of(made: Job) -> str:
    """The script that each node runs."""
    task = skypilot.plan(made).files["task.yaml"]
    return textwrap.dedent(task.partition("\nrun: |\n")[2])


def write_program(path: pathlib.Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)


def run_node(
    script: str, home: pathlib.Path, code: int = 0
) -> tuple[int, list[str], list[str]]:
    """Runs the script of a node, with a python and a sleep of our own.

    Returns its exit code, what python was called with, and what sleep was.
    """
    (home / "dtrain").mkdir(exist_ok=True)
    for name in ("python", "sleep"):
        (home / f"{name}.said").unlink(missing_ok=True)
        write_program(
            home / name,
            "import json, os, sys\n"
            f"with open({str(home / name)!r} + '.said', 'w') as file:\n"
            "    json.dump([os.getcwd(), *sys.argv[1:],\n"
            "               os.environ.get('TYPED', ''),\n"
            "               os.environ['DTRAIN_SUBMITTED_SECS']], file)\n"
            f"sys.exit({code if name == 'python' else 0})\n",
        )
    # As SkyPilot writes it.
    (home / "script.sh").write_text(script, encoding="utf-8")
    done = subprocess.run(
        ["bash", str(home / "script.sh")],
        env={"HOME": str(home), "PATH": f"{home}:/usr/bin:/bin"},
        cwd=home,
        stdin=subprocess.DEVNULL,
    )
    python, sleep = (
        json.loads(path.read_text()) if path.exists() else []
        for path in (home / "python.said", home / "sleep.said")
    )
    return done.returncode, python, sleep


@settings(
    max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data_dir=typed.words, model=typed.words)
@example(data_dir=typed.ALL, model=typed.ALL)
def test_what_bash_reads_is_what_was_typed(
    data_dir: str, model: str, tmp_path: pathlib.Path
) -> None:
    arguments = (f"--data_dir={data_dir}", f"--backup_dir={model}")
    script = run_of(job(*arguments, env=(f"TYPED={model}",)))
    # Nothing that YAML would take for something else.
    assert all(line.isprintable() for line in script.split("\n"))
    code, [directory, *python, variable, secs], _ = run_node(script, tmp_path)
    assert code == 0
    assert directory == str(tmp_path / "dtrain")
    assert python[:3] == ["-m", "launch.node", "--max_restarts=100"]
    run_dir = "--run_dir=gs://bucket/faces"
    assert python[3:] == ["--", run_dir, *arguments]
    assert variable == model
    assert secs == str(plans.SECS)
    assert not list(tmp_path.rglob("canary"))


def test_a_canary_would_be_seen(tmp_path: pathlib.Path) -> None:
    word = "--data_dir=$(touch canary)"
    script = run_of(job(word)).replace(f"'{word}'", word)
    _, [_, *python, _, _], _ = run_node(script, tmp_path)
    assert python[-1] == "--data_dir="
    assert (tmp_path / "dtrain" / "canary").exists()


@pytest.mark.parametrize("code", [0, 75, 76, 78, 137])
@pytest.mark.parametrize("grace_secs", [0.0, 45.5])
def test_others_have_time_to_save(
    code: int, grace_secs: float, tmp_path: pathlib.Path
) -> None:
    script = run_of(job(num_nodes=2, grace_secs=grace_secs))
    found, _, sleep = run_node(script, tmp_path, code)
    assert found == code
    secs = max(30, math.ceil(grace_secs))
    assert sleep[1:-2] == ([str(secs)] if code else [])
    alone = run_of(job(grace_secs=grace_secs))
    assert run_node(alone, tmp_path, code)[::2] == (code, [])


LOADER = """
import json, sys, tempfile
import sky

def load(text):
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        try:
            task = sky.Task.from_yaml(file.name)
        except Exception as error:
            return str(error)
    return {"config": task.to_yaml_config(), "run": task.run}

print(json.dumps([load(text) for text in json.load(sys.stdin)], default=str))
"""


def test_skypilot_takes_every_plan_and_no_other(
    tmp_path: pathlib.Path,
) -> None:
    plans = [skypilot.plan(made).files["task.yaml"] for made in JOBS.values()]
    broken = [
        plans[0].replace("num_nodes", "num_node"),
        plans[0].replace("use_spot", "spot"),
        plans[0].replace("[75]", '["75"]'),
        skypilot.plan(job(cloud="nimbus")).files["task.yaml"],
    ]
    *read, a, b, c, d = clients.run(
        "skypilot", LOADER, [*plans, *broken], tmp_path
    )
    for made, found in zip(JOBS.values(), read, strict=True):
        assert found["run"] == run_of(made)
        loaded = found["config"]
        assert loaded["name"] == made.name
        assert loaded.get("num_nodes", 1) == made.options.num_nodes
        assert loaded["file_mounts"] == {"~/dtrain": f"{made.directory}/code"}
        assert loaded["resources"]["use_spot"] == made.options.spot
        assert loaded["resources"]["job_recovery"] == {
            "strategy": "EAGER_NEXT_REGION",
            "max_restarts_on_errors": made.options.max_requeues,
            "recover_on_exit_codes": [75],
        }
    assert "did you mean 'num_nodes'" in a
    assert "did you mean 'use_spot'" in b
    assert "Invalid resources YAML" in c
    assert "'nimbus' does not match" in d


# Answers as the sky of SkyPilot 0.14 does.
SKY = """
import json, os, pathlib, sys
home = pathlib.Path(os.environ["SKY_HOME"])
with open(home / "asked", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
verb = sys.argv[2]
if verb == "launch":
    (home / "task.yaml").write_bytes(pathlib.Path(sys.argv[-1]).read_bytes())
print((home / verb).read_text() if (home / verb).exists() else "")
sys.exit(1 if os.environ.get("SKY_FAILS") else 0)
"""
HINTS = """\
Managed job 'faces' will be launched
\u26a0 Job submitted, ID: 9
\U0001f4cb Useful Commands
Managed Job ID: 17
\u251c\u2500\u2500 To cancel the job:\t\t\x1b[1msky jobs cancel 17\x1b[0m
"""


class Sky:
    """A sky on PATH.

    Attributes:
        home: where it finds what it answers, and writes what it was asked.
    """

    def __init__(self, home: pathlib.Path) -> None:
        self.home = home

    def answers(self, verb: str, text: str) -> None:
        (self.home / verb).write_text(text)

    def asked(self) -> list[list[str]]:
        text = (self.home / "asked").read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def sky(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Sky:
    write_program(tmp_path / "sky", SKY)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SKY_HOME", str(tmp_path))
    return Sky(tmp_path)


def submitted() -> submission.Submission:
    return submission.make(job(), skypilot.plan(job()), "17", {})


def test_submission(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = skypilot.plan(JOBS["awkward"])
    sky.answers("launch", HINTS)
    assert skypilot.submit(JOBS["awkward"], plan) == "17"
    [asked] = sky.asked()
    assert asked[:-1] == list(plan.submit[1:-1])
    assert "/" not in plan.submit[-2]
    written = (sky.home / "task.yaml").read_text(encoding="utf-8")
    assert written == plan.files["task.yaml"]
    sky.answers("launch", "Launched.")
    with pytest.raises(UserError, match=r"did not say which job .* Launched"):
        skypilot.submit(JOBS["awkward"], plan)
    monkeypatch.setenv("SKY_FAILS", "1")
    with pytest.raises(UserError, match="sky failed with 1: Launched"):
        skypilot.submit(JOBS["awkward"], plan)


@pytest.mark.parametrize(
    ("status", "phase"),
    [
        ("PENDING", jobs.QUEUED),
        ("RECOVERING", jobs.QUEUED),
        ("RUNNING", jobs.RUNNING),
        ("SUCCEEDED", jobs.FINISHED),
        ("FAILED_NO_RESOURCE", jobs.FAILED),
        ("CANCELLED", jobs.CANCELLED),
    ],
)
def test_states(status: str, phase: str, sky: Sky) -> None:
    row = {"job_id": 17, "status": status, "infra": "GCP (us-central1-a)"}
    more = {"recovery_count": 2, "failure_reason": "no\n GPUs"}
    rows = [{"job_id": 18, "status": "FAILED"}, {**row, **more}]
    sky.answers("queue", f"Fetching [jobs]...\n{json.dumps(rows, indent=2)}")
    details = f"job 17, {status}, on GCP (us-central1-a), recovered 2 times"
    assert skypilot.states(submitted()) == [(phase, f"{details}, no GPUs")]
    sky.answers("queue", "[]")
    forgotten = (jobs.UNKNOWN, "SkyPilot has forgotten job 17")
    assert skypilot.states(submitted()) == [forgotten]


@pytest.mark.parametrize("said", ["", "ID  NAME\n17  faces", "[1]", "[{}]"])
def test_a_queue_that_is_no_list_of_jobs(said: str, sky: Sky) -> None:
    sky.answers("queue", said)
    with pytest.raises(UserError, match="sky jobs queue is not understood"):
        skypilot.states(submitted())


def test_cancel_and_logs(sky: Sky, capfd: pytest.CaptureFixture[str]) -> None:
    skypilot.cancel(submitted())
    sky.answers("logs", "(head, rank=0) [worker 0] finished: step 100")
    skypilot.show_logs(submitted(), False, lambda: True)
    skypilot.show_logs(submitted(), True, lambda: True)
    assert capfd.readouterr().out.count("[worker 0] finished") == 2
    assert sky.asked() == [
        ["jobs", "cancel", "--yes", "17"],
        ["jobs", "logs", "--no-follow", "--tail=0", "17"],
        ["jobs", "logs", "--follow", "--tail=0", "17"],
    ]


def test_without_skypilot(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (
        lambda: skypilot.submit(job(), skypilot.plan(job())),
        lambda: skypilot.states(submitted()),
        lambda: skypilot.show_logs(submitted(), False, lambda: True),
    ):
        with pytest.raises(UserError, match=r"sky cannot be run .*pip install"):
            call()
