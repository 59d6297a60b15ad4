"""A person stops a run, from this machine or another, and goes on later."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dtrain import errors, stop
from dtrain.resilience import stop_file
from tests import object_store, runs


def refusal(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[object, str]:
    """Returns the exit code and the line of a command that fails."""
    with pytest.raises(SystemExit) as caught:
        errors.exit_with(lambda: stop.run(["stop", *arguments]))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return caught.value.code, printed.err


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--run_dir=", "run_dir is missing; use --run_dir=DIR"),
        ("--run_dir={place}/none", "({place}/none) holds no run; name the"),
        ("--run_dir={place}", "({place}) holds no run; name the"),
        ("--run_dir={place}/file", "({place}/file) holds no run; name the"),
        ("--run_dri={place}", "did you mean --run_dir?"),
        ("{place}", "is not a flag"),
        ("--wait=soon", "wait (soon) must be true or false"),
    ],
)
def test_mistake_is_one_line(
    argument: str,
    said: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    place = str(tmp_path)
    code, line = refusal(capsys, argument.replace("{place}", place))
    assert code == errors.USER_ERROR
    assert said.replace("{place}", place) in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_disk_that_fails_is_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "stop").mkdir()
    code, line = refusal(capsys, f"--run_dir={tmp_path}")
    assert code == errors.STORAGE_FAILED
    assert line == f"error: {tmp_path}: Is a directory\n"
    with pytest.raises(errors.StorageError, match="Is a directory"):
        stop_file.remove(
            str(tmp_path), stop_file.look_before(str(tmp_path), {})
        )


@pytest.mark.parametrize("name", ["config.json", ".lock", "checkpoints"])
def test_local_run_needs_no_tensorflow(
    tmp_path: pathlib.Path, name: str
) -> None:
    (tmp_path / name).touch()
    code = (
        "import sys; from dtrain import stop; stop.run(sys.argv); "
        "assert 'tensorflow' not in sys.modules"
    )
    said = subprocess.check_output(
        [sys.executable, "-c", code, f"--run_dir={tmp_path}/"],
        env=runs.environment(),
        text=True,
    )
    assert said.startswith(f"wrote {tmp_path}/stop: no process trains there")
    path = stop_file.path(str(tmp_path))
    assert set(json.loads(pathlib.Path(path).read_text())) == {"time", "host"}
    assert stop_file.exists(path)
    before = stop_file.look_before(str(tmp_path), {})
    stop_file.remove(str(tmp_path), before)
    stop_file.remove(str(tmp_path), before)
    assert not stop_file.exists(path)


def test_wait_is_for_the_process_that_trains(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    codes = []

    def wait() -> None:
        codes.append(stop.run(["stop", "--wait", f"--run_dir={tmp_path}"]))

    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.7)
        assert thread.is_alive()
    thread.join(30)
    said = capsys.readouterr().out
    assert said.startswith(f"wrote {tmp_path}/stop: within 1 s")
    assert said.endswith(f"no process trains in {tmp_path} any more\n")
    # And for nobody where nobody trains.
    wait()
    assert "no process trains there now" in capsys.readouterr().out
    assert codes == [errors.FINISHED] * 2


def test_wait_is_not_for_one_that_has_died(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is a lease, and nobody renews it."""
    where = f"file://{tmp_path}"
    (tmp_path / "config.json").write_text("{}")
    gone = {"host": "elsewhere", "pid": 7, "key": "k", "machine": "m"}
    (tmp_path / "lease.json").write_text(
        json.dumps(
            {"holder": {**gone, "started": "1"}, "term": 1, "lease_secs": 2}
        )
    )
    assert stop.run(["stop", "--wait", f"--run_dir={where}"]) == errors.FINISHED
    assert f"no process trains in {where} any more" in capsys.readouterr().out


@contextlib.contextmanager
def training(run_dir: pathlib.Path, **variables: str) -> Iterator[runs.Process]:
    process = runs.start(
        "dtrain.main",
        *runs.SMALL,
        f"--run_dir={run_dir}",
        "--num_steps=100000",
        NO_GCE_CHECK="true",
        **variables,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool], process: runs.Process) -> None:
    while not condition():
        assert process.poll() is None, runs.finish(process)
        time.sleep(0.01)


def num_lines(run_dir: pathlib.Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return len((run_dir / "metrics.jsonl").read_bytes().splitlines())
    return 0


def test_run_stops_stays_stopped_and_goes_on(tmp_path: pathlib.Path) -> None:
    arguments = ["stop", f"--run_dir={tmp_path}", "--wait"]
    with training(tmp_path) as process:
        wait_for(lambda: num_lines(tmp_path) > 2, process)
        assert stop.run(arguments) == errors.FINISHED
        code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    steps = [line["step"] for line in runs.metrics(tmp_path)]
    said = f"stopped by the stop file and saved at step {steps[-1]:,};"
    assert said in output

    # A supervisor's next start obeys it, and trains nothing.
    with training(tmp_path, DTRAIN_ATTEMPT="1") as process:
        code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    assert "stopped by the stop file" in output
    assert runs.metrics(tmp_path)[-1]["step"] <= steps[-1] + 1

    # A person's does not.
    with training(tmp_path) as process:
        wait_for(lambda: num_lines(tmp_path) > len(steps) + 2, process)
        assert not (tmp_path / "stop").exists()
        process.send_signal(signal.SIGTERM)
        code, output = runs.finish(process)
    assert code == errors.RUN_AGAIN, output
    assert f"ckpt-{steps[-1]}" in output


def exists(path: str) -> bool:
    return stop_file.exists(path)


def remove(run_dir: str) -> None:
    stop_file.remove(run_dir, stop_file.look_before(run_dir, {}))


def test_run_on_a_store() -> None:
    run_dir = "gs://bucket/run"
    with object_store.ObjectStore() as store:
        environment = runs.environment(**store.environment())
        command = [sys.executable, "-m", "dtrain.stop", f"--run_dir={run_dir}"]
        refused = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60
        )
        assert refused.returncode == errors.USER_ERROR
        assert f"({run_dir}) holds no run" in refused.stderr
        store.objects.put("bucket", "run/config.json", b"{}")
        said = subprocess.check_output(
            [*command, "--wait"], env=environment, text=True, timeout=60
        )
        assert "no process trains there now" in said
        with object_store.Client(environment) as client:
            path = stop_file.path(run_dir)
            assert client.call(exists, path)
            client.call(remove, run_dir)
            assert not client.call(exists, path)
        # A store that is away is no reason to stop.
        with object_store.Client(
            {**environment, "GCS_RETRY_CONFIG_MAX_RETRIES": "0"}
        ) as client:
            store.inject("503", "stop", count=1000)
            assert not client.call(exists, path)


def test_a_file_of_a_later_time_stays(tmp_path: pathlib.Path) -> None:
    """Somebody stops a run that is just being started."""
    before = stop_file.look_before(str(tmp_path), {})
    stop_file.write(str(tmp_path))
    stop_file.remove(str(tmp_path), before)
    assert stop_file.exists(stop_file.path(str(tmp_path)), before)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_job_on_a_file_server_with_a_clock_of_its_own(
    hours: int, tmp_path: pathlib.Path
) -> None:
    """What was there before the submission does not count."""
    code_dir, now = tmp_path / "launch/1/code", time.time()
    code_dir.mkdir(parents=True)
    os.utime(code_dir, (now + 3600 * hours,) * 2)
    environment = {
        "DTRAIN_SUBMITTED_SECS": f"{now:.0f}",
        "DTRAIN_CODE_DIR": str(code_dir),
    }
    path = stop_file.path(str(tmp_path))
    stop_file.write(str(tmp_path))
    for secs in (-60, 60):
        os.utime(path, (now + 3600 * hours + secs,) * 2)
        before = stop_file.look_before(str(tmp_path), environment)
        assert stop_file.exists(path, before) == (secs > 0)


@pytest.mark.parametrize("hours", [-2000, -1, 1, 2000])
def test_a_job_that_runs_is_stopped_whatever_the_clocks_say(
    hours: int, tmp_path: pathlib.Path
) -> None:
    """No file of this job is on the file server, as on Kubernetes."""
    submitted = {"DTRAIN_SUBMITTED_SECS": f"{time.time():.0f}"}
    before = stop_file.look_before(str(tmp_path), submitted)
    path = stop_file.path(str(tmp_path))
    stop_file.write(str(tmp_path))
    secs = time.time() + 3600 * hours
    os.utime(path, (secs, secs))
    assert stop_file.exists(path, before)


@pytest.mark.parametrize("hours", [-2000, -1, 1, 2000])
def test_a_file_server_with_a_clock_of_its_own(
    hours: int, tmp_path: pathlib.Path
) -> None:
    """What was there before does not count, and what came later does."""
    path = stop_file.path(str(tmp_path))
    for _ in range(2):
        before = stop_file.look_before(str(tmp_path), {})
        assert not stop_file.exists(path, before)
        stop_file.write(str(tmp_path))
        secs = time.time() + 3600 * hours
        os.utime(path, (secs, secs))
        assert stop_file.exists(path, before)
