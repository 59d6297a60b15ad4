"""`--track`, against a server of MLflow, and without one."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from dtrain import config as config_lib
from dtrain import errors
from dtrain.config import Config
from dtrain.record import tracking
from tests import runs

ENVIRONMENT = runs.ROOT / ".venv" / "clients" / "mlflow"


def packages() -> str:
    """Returns where MLflow is installed, beside what else its server needs."""
    found = list(ENVIRONMENT.glob("lib/python*/site-packages"))
    if not found:
        pytest.skip("no MLflow; make .venv/clients/mlflow.stamp installs it")
    return str(found[0])


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the client importable, behind all that is installed here."""
    monkeypatch.setattr(sys, "path", [*sys.path, packages()])


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Server:
    """A server that is not there before `start`."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.uri = f"http://127.0.0.1:{free_port()}"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                *(ENVIRONMENT / "bin" / "python", "-m", "mlflow", "server"),
                *("--workers", "1", "--host", "127.0.0.1"),
                *("--port", self.uri.rpartition(":")[2]),
                *("--backend-store-uri", self._directory / "store"),
                *("--default-artifact-root", self._directory / "artifacts"),
            ],
            env=runs.environment(MLFLOW_ALLOW_FILE_STORE="true"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while True:
            assert self._process.poll() is None
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).read()
                return
            except OSError:
                time.sleep(0.1)

    def stop(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()

    def call(self, path: str, **body: Any) -> dict[str, Any]:
        """Asks the server itself, and not the client that is tested."""
        request = urllib.request.Request(
            f"{self.uri}/api/2.0/mlflow/{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def runs(self) -> list[dict[str, Any]]:
        found = self.call("experiments/search", max_results=10)["experiments"]
        ids = [each["experiment_id"] for each in found]
        return self.call("runs/search", experiment_ids=ids).get("runs", [])

    def history(self, run_id: str, name: str) -> list[tuple[int, float]]:
        url = f"{self.uri}/api/2.0/mlflow/metrics/get-history"
        url += f"?run_id={run_id}&metric_key={name}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            metrics = json.loads(answer.read()).get("metrics", [])
        return [(int(each["step"]), each["value"]) for each in metrics]


@pytest.fixture
def server(tmp_path: pathlib.Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.stop()


def until(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("client")
def test_a_server_that_comes_later_has_all_and_a_run_is_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for it: not the start, not a write, not the end."""
    monkeypatch.setattr(tracking, "_RETRY_SECS", 0.2)
    config = Config(run_dir="runs/a", track=f"mlflow:{server.uri}", num_steps=9)
    killed = tracking.make(config, "0123abcd")
    for step in (1, 2, 3):
        started = time.monotonic()
        killed.write(step, {"losses/a b(c)": step / 2, "d": float("nan")})
        assert time.monotonic() - started < 0.1
    assert isinstance(killed, tracking.MlflowTracker)
    until(lambda: killed._failure)
    assert "does not answer" in killed.news()
    assert killed.news() == ""
    server.start()
    until(lambda: not killed._rows and not killed._failure)
    assert "answers again" in killed.news()
    # It is not closed, as when it is killed; another goes on.
    again = tracking.make(
        dataclasses.replace(config, max_to_keep=9), "0123abcd"
    )
    again.write(9, {"losses/a b(c)": 4.5})
    again.close(9)
    [run] = server.runs()
    assert run["info"]["run_name"] == "a"
    assert run["info"]["status"] == "FINISHED"
    assert server.history(run["info"]["run_id"], "losses/a%20b_c_") == [
        *((1, 0.5), (2, 1.0), (3, 1.5), (9, 4.5)),
    ]
    parameters = {each["key"]: each["value"] for each in run["data"]["params"]}
    assert parameters["num_steps"] == "9"
    assert {each["key"] for each in run["data"]["metrics"]} == {"losses/a b_c_"}


def test_a_run_that_is_killed_is_one_run_there(
    server: Server, tmp_path: pathlib.Path
) -> None:
    # Behind all other packages of the trainer.
    line = f"import sys; sys.path.append({packages()!r})"
    (tmp_path / "sitecustomize.py").write_text(line)
    server.start()

    def start() -> runs.Process:
        return runs.start_anew(
            "dtrain.main",
            *(*runs.SMALL, "--num_steps=4000", "--steps_per_loop=5"),
            *(f"--run_dir={tmp_path}/run", f"--track=mlflow:{server.uri}"),
            PYTHONPATH=f"{runs.ROOT}:{tmp_path}",
        )

    name = "losses/generator_loss"
    killed = start()
    until(lambda: killed.poll() is not None or server.runs())
    [run] = server.runs()
    until(lambda: server.history(run["info"]["run_id"], name))
    killed.kill()
    runs.finish(killed)
    code, printed = runs.finish(start())
    assert code == errors.FINISHED, printed
    assert "tracking" not in printed
    [run] = server.runs()
    assert run["info"]["status"] == "FINISHED"
    values = dict(server.history(run["info"]["run_id"], name))
    last = list(runs.metrics(tmp_path / "run"))[-1]
    assert values[4000] == pytest.approx(last["generator_loss"])


@pytest.mark.usefixtures("client")
def test_an_end_without_a_server_is_an_end(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(track=f"mlflow:{server.uri}")
    tracker = tracking.make(config, "0123abcd")
    tracker.write(1, {"a": 1.0})
    started = time.monotonic()
    tracker.close(1)
    assert time.monotonic() - started < tracking._LAST_SECS + 1
    assert f"{server.uri} does not have all: " in capsys.readouterr().err


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.MlflowTracker, "_work", lambda _: None)
    tracker = tracking.MlflowTracker("http://127.0.0.1:1", {}, "0123abcd")
    for step in range(tracking._MOST_ROWS + 5):
        tracker.write(step, {})
    assert tracker._rows[0].step == 5


@pytest.mark.parametrize("track", ["wandb:x", "mlflow", "mlflow:", "mlflow: x"])
def test_a_wrong_server_is_a_line(track: str) -> None:
    with pytest.raises(errors.UserError, match="must be mlflow:URI, such as"):
        config_lib.parse(["dtrain.main", f"--track={track}"])


def test_without_the_client_it_is_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(errors.UserError, match="pip install mlflow-skinny"):
        tracking.make(Config(track="mlflow:http://localhost:5000"), "a")
