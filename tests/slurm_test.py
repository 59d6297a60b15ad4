"""Jobs on a real Slurm, with real training on its nodes."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from dtrain import errors
from dtrain.bundle import tensors
from tests import runs, slurm_cluster
from tests.slurm_cluster import SlurmCluster

FLAGS = (
    *runs.SMALL,
    "--checkpoint_every_steps=50",
    "--start_timeout_secs=60",
)
FOR_EVER = "--num_steps=1000000"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    slurm_cluster.check()
    place = tmp_path_factory.mktemp("slurm")
    with SlurmCluster(place, num_nodes=3) as cluster:
        yield cluster


@pytest.fixture
def user(slurm: SlurmCluster, tmp_path: pathlib.Path) -> Iterator[User]:
    yield User(slurm, tmp_path / "code")
    # Or the job of a test that has failed would be in the way of others.
    slurm.run(["scancel", "--me"])
    deadline = time.monotonic() + 60
    while slurm.run(["squeue", "-h"]).stdout:
        assert time.monotonic() < deadline, "a job does not end"
        time.sleep(0.2)


class User:
    """Somebody on the login node, in a directory of code."""

    def __init__(self, slurm: SlurmCluster, home: pathlib.Path) -> None:
        self.slurm = slurm
        self.home = home
        home.mkdir()

    def types(self, *arguments: str, code: int = errors.FINISHED) -> str:
        """Runs launch.main; returns what it prints, its errors behind."""
        done = self.slurm.run(
            [sys.executable, "-m", "launch.main", *arguments],
            check=False,
            # As in a notebook of a cluster, which is of no concern to the job.
            environment=runs.environment(
                TF_CONFIG='{"cluster": {"worker": ["a:1", "b:1"]}}'
            ),
            cwd=self.home,
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert "Traceback" not in said
        return said

    def submits(self, *arguments: str) -> str:
        """Submits a job of Slurm; returns its number."""
        said = self.types("--backend=slurm", *arguments)
        found = re.search(r"as job (\d+);", said)
        assert found, said
        return found[1]


def log(run_dir: pathlib.Path) -> str:
    """All that was said in a job of a run."""
    return "\n".join(
        f"{path}:\n{path.read_text()}"
        for path in sorted(run_dir.glob("launch/**/*.log"))
    )


def wait_for_log(run_dir: pathlib.Path, words: str, count: int = 1) -> None:
    """Waits until something was said so often."""
    deadline = time.monotonic() + 180
    while log(run_dir).count(words) < count:
        assert time.monotonic() < deadline, f"{words!r} in {log(run_dir)}"
        time.sleep(0.2)


def last_step(run_dir: pathlib.Path) -> int:
    """The newest step; 0 before the first."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return len(lines)


def wait_for_step(run_dir: pathlib.Path, step: int) -> None:
    """Waits until a run has done a step."""
    deadline = time.monotonic() + 180
    while last_step(run_dir) < step:
        assert time.monotonic() < deadline, log(run_dir)
        time.sleep(0.1)


def check_bits(run_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Compares a run with one of as many steps that nothing happened to."""
    step = last_step(run_dir)
    whole = tmp_path / "whole"
    code, output = runs.run(
        "launch.main",
        *("--num_workers=2", "--", *FLAGS),
        *(f"--run_dir={whole}", f"--num_steps={step}"),
    )
    assert code == errors.FINISHED, output
    digests = {
        tensors.digest(f"{run}/checkpoints/ckpt-{step}")
        for run in (run_dir, whole)
    }
    assert len(digests) == 1
    assert runs.metrics(run_dir) == runs.metrics(whole)


def test_from_submission_to_the_end(user: User, tmp_path: pathlib.Path) -> None:
    run_dir = tmp_path / "run"
    job = user.submits(
        *("--num_nodes=2", "--gpus_per_node=2", "--max_hours=1", "--"),
        *(*FLAGS, f"--run_dir={run_dir}", "--num_steps=40"),
    )
    assert user.slurm.wait(job, ["COMPLETED", "FAILED"]) == "COMPLETED", log(
        run_dir
    )
    status = user.types("status", f"--run_dir={run_dir}")
    assert f"finished  job {job}, COMPLETED" in status
    assert "step 40" in status
    logs = user.types("logs", f"--run_dir={run_dir}")
    assert "[worker 0] finished: step 40" in logs
    listed = user.types("list", f"--run_dir={tmp_path}")
    assert re.search(rf"{job} +slurm +run +finished ", listed), listed
    check_bits(run_dir, tmp_path)


def test_preempted_killed_cut_off_and_stopped(
    user: User, tmp_path: pathlib.Path
) -> None:
    """The bits of a run that nothing happened to."""
    slurm, run_dir = user.slurm, tmp_path / "run"
    job = user.submits(
        *("--num_nodes=2", "--sbatch_arg=--exclusive", "--"),
        *(*FLAGS, f"--run_dir={run_dir}", FOR_EVER),
    )
    wait_for_step(run_dir, 20)
    assert "running  job" in user.types("status", f"--run_dir={run_dir}")

    # All nodes are taken by somebody of a higher partition.
    high = slurm.submit("sleep 1", "-N3", "--exclusive", "--partition=high")
    assert slurm.wait(high, ["RUNNING", "COMPLETED"], 60)
    said = log(run_dir)
    [saved] = set(re.findall(r"saved at step ([\d,]+);", said))
    assert "worker-1.log" in said
    wait_for_log(run_dir, "resumed from")
    assert slurm.job(job)["Restarts"] == "1"
    step = last_step(run_dir)
    assert step >= int(saved.replace(",", ""))
    wait_for_step(run_dir, step + 20)

    # The power of a node goes. Another one takes its place.
    nodes = slurm.job(job)["NodeList"]
    host = slurm.hosts_of(job)[1]
    slurm.kill_node(host)
    wait_for_log(run_dir, "resumed from", 2)
    slurm.start_node(host)
    assert slurm.job(job)["NodeList"] != nodes
    wait_for_step(run_dir, last_step(run_dir) + 20)

    # A cable is pulled, and put back before Slurm gives the node up.
    host = slurm.hosts_of(job)[1]
    lost = log(run_dir).count("lost another worker")
    slurm.network.cut(host)
    wait_for_log(run_dir, "lost another worker", lost + 1)
    slurm.network.mend(host)
    wait_for_log(run_dir, "resumed from", 3)
    wait_for_step(run_dir, last_step(run_dir) + 20)

    said = user.types("stop", f"--run_dir={run_dir}")
    assert "saves and ends" in said
    state = slurm.job(job)
    # That of Debian 13 queues a job once more that was ever preempted, after
    # exit code 0 too, and `stop` takes it out.
    states = (
        ("COMPLETED", "CANCELLED") if slurm.version > 24 else ("COMPLETED",)
    )
    assert state["JobState"] in states, (state, log(run_dir))
    assert log(run_dir).count("ends: the stop file is there") == 2
    check_bits(run_dir, tmp_path)


def test_time_limit(user: User, tmp_path: pathlib.Path) -> None:
    """The job is queued again, and goes on."""
    slurm, run_dir = user.slurm, tmp_path / "run"
    job = user.submits(
        *("--num_nodes=2", "--max_hours=0.3", "--"),
        *(*FLAGS, f"--run_dir={run_dir}", FOR_EVER),
    )
    wait_for_step(run_dir, 20)
    # Nobody would wait so long for a test. The notice is due at once then,
    # however long the machine has taken to come here; and Slurm, which looks
    # twice a minute, does so before it ends the job.
    hours, minutes, _ = map(int, slurm.job(job)["RunTime"].split(":"))
    limit = 60 * hours + minutes + 2
    slurm.run(["scontrol", "update", f"JobId={job}", f"TimeLimit={limit}"])
    wait_for_log(run_dir, "saved at step")
    slurm.wait(job, ["PENDING"], 60)
    assert "queued  job" in user.types("status", f"--run_dir={run_dir}")
    # A slow machine needs more than a minute from here to the stop.
    slurm.run(["scontrol", "update", f"JobId={job}", "TimeLimit=20"])
    wait_for_log(run_dir, "resumed from")
    wait_for_step(run_dir, last_step(run_dir) + 20)
    user.types("stop", f"--run_dir={run_dir}")
    assert slurm.job(job)["JobState"] == "COMPLETED"
    check_bits(run_dir, tmp_path)


def test_a_mistake_is_not_tried_again(
    user: User, tmp_path: pathlib.Path
) -> None:
    """One that only the nodes can see."""
    run_dir = tmp_path / "run"
    job = user.submits(
        *("--num_nodes=2", "--nocheck_here", "--", *FLAGS),
        *(f"--run_dir={run_dir}", f"--dataset=npz:{tmp_path}/none.npz"),
    )
    assert user.slurm.wait(job, ["FAILED", "COMPLETED"]) == "FAILED"
    found = user.slurm.job(job)
    assert (found["ExitCode"], found["Restarts"]) == ("78:0", "0")
    assert f"{tmp_path}/none.npz" in log(run_dir)
    assert "failed  job" in user.types("status", f"--run_dir={run_dir}")


def test_one_that_waits_is_taken_out(
    user: User, tmp_path: pathlib.Path
) -> None:
    run_dir = tmp_path / "run"
    job = user.submits(
        *("--sbatch_arg=--hold", "--", *FLAGS, f"--run_dir={run_dir}"),
    )
    assert "queued  job" in user.types("status", f"--run_dir={run_dir}")
    said = user.types(
        *("--backend=slurm", "--", *FLAGS, f"--run_dir={run_dir}"),
        code=errors.USER_ERROR,
    )
    assert f"has a job already, {job}" in said
    user.types("stop", f"--run_dir={run_dir}")
    assert user.slurm.job(job)["JobState"] == "CANCELLED"
    assert "cancelled  job" in user.types("status", f"--run_dir={run_dir}")


def test_variables_of_the_submission_change_nothing(
    user: User, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not who is who, nor that sites let sbatch export nothing."""
    task = '"task": {"type": "worker", "index": 0}'
    tf_config = '{"cluster": {"worker": ["localhost:7001"]}, ' + task + "}"
    monkeypatch.setenv("TF_CONFIG", tf_config)
    for name, value in (("one", "ALL"), ("two", "NONE")):
        monkeypatch.setenv("SBATCH_EXPORT", value)
        run_dir = tmp_path / name
        job = user.submits(
            *("--num_nodes=2", "--", *FLAGS),
            *(f"--run_dir={run_dir}", "--num_steps=3"),
        )
        state = user.slurm.wait(job, ["COMPLETED", "FAILED"])
        assert state == "COMPLETED", log(run_dir)
        assert "2 replicas" in log(run_dir)


def test_a_module_that_is_not_there(user: User, tmp_path: pathlib.Path) -> None:
    job = user.submits(
        *("--module=none/1", "--", *FLAGS, f"--run_dir={tmp_path}/run"),
    )
    assert user.slurm.wait(job, ["COMPLETED", "FAILED"]) == "FAILED"
    assert user.slurm.job(job)["ExitCode"] == "78:0"
    assert "module" in log(tmp_path / "run")


def test_sweep(user: User, tmp_path: pathlib.Path) -> None:
    job = user.submits(
        *("--sweep=seed=1,2", "--sweep=latent_size=4,5", "--max_parallel=2"),
        *("--", *FLAGS, f"--run_dir={tmp_path}/runs", "--num_steps=3"),
    )
    done = user.slurm.wait(job, ["COMPLETED", "FAILED"], 180)
    while user.slurm.run(["squeue", "-h", "-j", job], check=False).stdout:
        time.sleep(0.5)
    assert done == "COMPLETED", log(tmp_path / "runs")
    found = sorted(each.name for each in (tmp_path / "runs").iterdir())
    assert found == [
        "launch",
        "seed=1,latent_size=4",
        "seed=1,latent_size=5",
        "seed=2,latent_size=4",
        "seed=2,latent_size=5",
    ]
    status = user.types("status", f"--run_dir={tmp_path}/runs")
    assert status.count("finished  job") == 4
    assert status.count(": step 3,") == 4


def test_a_sweep_is_stopped(user: User, tmp_path: pathlib.Path) -> None:
    """Those that wait do not start when another one ends."""
    run_dir = tmp_path / "runs"
    job = user.submits(
        *("--sweep=seed=1,2,3", "--max_parallel=1", "--"),
        *(*FLAGS, f"--run_dir={run_dir}", FOR_EVER),
    )
    wait_for_step(run_dir / "seed=1", 5)
    assert "saves and ends" in user.types("stop", f"--run_dir={run_dir}")
    assert not user.slurm.run(["squeue", "-h", "-j", job]).stdout
    names = {each.name for each in run_dir.iterdir()}
    assert names == {"launch", "seed=1"}


@pytest.mark.parametrize(
    "name",
    [
        "a  b $(touch canary)`touch canary` %j %A * ~ größe-画像",
        "'; touch canary; '",
        '"; touch canary; "\ntouch canary\n',
    ],
)
def test_what_arrives_is_what_was_typed(
    name: str, user: User, tmp_path: pathlib.Path
) -> None:
    run_dir = tmp_path / name
    job = user.submits("--", *FLAGS, f"--run_dir={run_dir}", "--num_steps=2")
    state = user.slurm.wait(job, ["COMPLETED", "FAILED"])
    assert state == "COMPLETED", log(run_dir)
    assert last_step(run_dir) == 2
    assert not list(tmp_path.rglob("canary"))
    assert "[worker 0]" in user.types("logs", f"--run_dir={run_dir}")


def test_backslash(user: User, tmp_path: pathlib.Path) -> None:
    """In the directory of a log Slurm would take it out."""
    run_dir = tmp_path / "a\\b"
    said = user.types(
        *("--backend=slurm", "--", *FLAGS, f"--run_dir={run_dir}"),
        code=errors.USER_ERROR,
    )
    assert "must have no backslash" in said
    job = user.submits(
        *(f"--record_dir={tmp_path}/record", "--", *FLAGS),
        *(f"--run_dir={run_dir}", "--num_steps=2"),
    )
    state = user.slurm.wait(job, ["COMPLETED", "FAILED"])
    assert state == "COMPLETED", log(tmp_path / "record")
    assert last_step(run_dir) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_nodes=9",), "sbatch failed with 1"),
        (("--gpus_per_node=9",), "sbatch failed with 1"),
        (("--partition=none",), "invalid partition"),
        (("--image=x",), "image is a flag of --backend=kubernetes"),
        (("--max_parallel=2",), "is for the runs of a sweep"),
        (("--sweep=seed",), "must be of the form flag=value,value"),
        (("--sweep=seeed=1",), "did you mean --seed?"),
        (("--name=A",), "name (A) must be"),
    ],
)
def test_what_cannot_be_is_not_queued(
    flags: tuple[str, ...], message: str, user: User, tmp_path: pathlib.Path
) -> None:
    said = user.types(
        *("--backend=slurm", *flags, "--", f"--run_dir={tmp_path}/run"),
        code=errors.USER_ERROR,
    )
    assert message in said
    assert len(said.strip().splitlines()[-1]) < 700
    # Nothing is left of it.
    assert not (tmp_path / "run").exists()
    assert not user.slurm.run(["squeue", "-h"]).stdout


def test_a_cluster_by_hand() -> None:
    slurm_cluster.check()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.slurm_cluster"),
            *("bash", "-c", "srun --nodes=2 echo hello; exit 3"),
        ],
        cwd=runs.ROOT,
        env=runs.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == "hello\nhello\n"
