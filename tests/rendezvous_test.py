"""All workers come together, or each says who is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dtrain import errors
from dtrain.cluster import rendezvous
from dtrain.cluster.environment import ALONE, Cluster
from dtrain.errors import LostWorkerError
from launch.keep import worker as worker_lib
from tests import runs

WAIT_SECS = 20.0


class Meeting(threading.Thread):
    """A worker, as a thread."""

    def __init__(
        self,
        cluster: Cluster,
        index: int,
        secs: float = WAIT_SECS,
        requested: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(daemon=True)
        self.cluster = dataclasses.replace(cluster, index=index)
        self.secs, self.requested = secs, requested
        self.outcome: bool | str | None = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = rendezvous.meet(
                self.cluster, self.secs, self.requested
            )
        except LostWorkerError as error:
            self.outcome = str(error)

    def wait(self) -> bool | str | None:
        self.join(WAIT_SECS + 10)
        return self.outcome


def make_cluster(num_workers: int) -> Cluster:
    ports = worker_lib.free_ports(num_workers)
    return Cluster(tuple(f"127.0.0.1:{port}" for port in ports), 0)


def port_of(cluster: Cluster) -> int:
    return int(cluster.workers[0].rpartition(":")[2])


def connect(cluster: Cluster) -> socket.socket:
    """Connects to the chief, as soon as it listens."""
    end = time.monotonic() + WAIT_SECS
    while True:
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port_of(cluster)), 5)
        assert time.monotonic() < end
        time.sleep(0.01)


def greeting(cluster: Cluster, index: int | str) -> bytes:
    shown = f"{rendezvous.digest(cluster)} "
    shown += rendezvous.proof(cluster, str(index))
    return f"hello dtrain 2 {shown} {index}\n".encode()


def test_a_worker_that_is_alone_waits_for_nobody() -> None:
    assert rendezvous.meet(ALONE, 0.0, lambda: False)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 2, 0)])
def test_all_meet(order: tuple[int, ...]) -> None:
    cluster = make_cluster(4)
    workers = []
    for index in order:
        workers.append(Meeting(cluster, index))
        time.sleep(0.3)
    assert [worker.wait() for worker in workers] == [True] * 4
    # TensorFlow binds it next.
    with socket.create_server(("127.0.0.1", port_of(cluster))):
        pass


def test_nobody_leaves_before_the_last_is_there() -> None:
    cluster = make_cluster(3)
    workers = [Meeting(cluster, index) for index in (0, 1)]
    time.sleep(2)
    assert [worker.outcome for worker in workers] == [None, None]
    workers.append(Meeting(cluster, 2))
    assert [worker.wait() for worker in workers] == [True] * 3


def test_those_that_do_not_come_are_named() -> None:
    cluster = make_cluster(4)
    chief, other = (Meeting(cluster, index, 2.0) for index in (0, 2))
    assert chief.wait() == (
        f"workers 1 ({cluster.workers[1]}), 3 ({cluster.workers[3]}) did not "
        "come within 2 s (--start_timeout_secs); see whether they were "
        "started, and why they ended"
    )
    outcome = other.wait()
    assert isinstance(outcome, str)
    assert outcome.startswith("worker 2 waited 2 s (--start_timeout_secs)")
    assert f"the chief ({cluster.workers[0]})" in outcome


def test_a_chief_that_does_not_come_is_named() -> None:
    cluster = make_cluster(2)
    outcome = Meeting(cluster, 1, 1.0).wait()
    assert isinstance(outcome, str)
    assert f"chief ({cluster.workers[0]}): it cannot be reached" in outcome


@pytest.mark.parametrize("index", [0, 1])
def test_names_that_cannot_be_resolved_are_told_once_while_they_wait(
    index: int, capfd: pytest.CaptureFixture[str]
) -> None:
    known = make_cluster(2).workers
    names = [f"no-{number}.invalid:1" for number in range(4)]
    workers = (*known, *names) if index == 0 else (*names, *known)
    told = threading.Event()
    waiting = Meeting(Cluster(workers, 0), index, requested=told.is_set)
    time.sleep(7)
    assert waiting.outcome is None
    [line] = capfd.readouterr().err.splitlines()
    told.set()
    assert waiting.wait() is False
    assert line.startswith("this machine cannot resolve no-0.invalid (")
    assert ", no-2.invalid (" in line
    assert "and 1 more; every worker must resolve the name of every" in line


def test_a_chief_whose_port_is_taken_says_so() -> None:
    cluster = make_cluster(2)
    with socket.create_server(("127.0.0.1", port_of(cluster))):
        outcome = Meeting(cluster, 0, 1.0).wait()
    assert isinstance(outcome, str)
    assert f"cannot listen on port {port_of(cluster)}: Address" in outcome


def test_a_chief_takes_the_port_when_it_is_free() -> None:
    cluster = make_cluster(2)
    with socket.create_server(("127.0.0.1", port_of(cluster))):
        workers = [Meeting(cluster, index) for index in (0, 1)]
        time.sleep(1)
    assert [worker.wait() for worker in workers] == [True, True]


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\0" * 5000,
    b"\n" * 5000,
    b"hello dtrain 2\n",
    b"hello dtrain 1 x y\n",
    b"hello dtrain 2 x y z\n",
    b"here\nhere\n",
    b"",
]


@pytest.mark.parametrize("text", GARBAGE)
def test_a_stranger_disturbs_nobody(text: bytes) -> None:
    cluster = make_cluster(2)
    chief = Meeting(cluster, 0)
    with connect(cluster) as stranger:
        stranger.sendall(text)
        other = Meeting(cluster, 1)
        assert [chief.wait(), other.wait()] == [True, True]


@pytest.mark.parametrize("index", ["0", "2", "-1", "x", "9" * 30, "¹"])
def test_no_such_worker(index: str) -> None:
    cluster = make_cluster(2)
    chief = Meeting(cluster, 0, 3.0)
    with connect(cluster) as stranger:
        stranger.sendall(greeting(cluster, index))
        answer = stranger.makefile().readline()
    assert answer == f"refused there is no worker {index} beside the chief\n"
    assert Meeting(cluster, 1).wait()
    assert chief.wait() is True


def test_a_worker_of_another_cluster_is_refused_and_may_come_back(
    capfd: pytest.CaptureFixture[str],
) -> None:
    cluster = make_cluster(2)
    stale = Cluster((*cluster.workers, "127.0.0.1:1"), 1)
    chief = Meeting(cluster, 0)
    refused = Meeting(stale, 1, 3.0)
    outcome = refused.wait()
    assert isinstance(outcome, str)
    assert "refused this worker: its TF_CONFIG names other workers" in outcome
    assert chief.outcome is None
    assert Meeting(cluster, 1).wait() is True
    assert chief.wait() is True
    lines = capfd.readouterr().err.splitlines()
    # One of each side, however often it has tried.
    assert len(lines) == 2
    assert lines[0].startswith("refused 127.0.0.1:")


def test_one_without_the_secret_is_told_once_and_ends_nobody(
    capfd: pytest.CaptureFixture[str],
) -> None:
    cluster = dataclasses.replace(make_cluster(2), secret="of this start")
    assert cluster.secret not in repr(cluster)
    chief = Meeting(cluster, 0)
    for guess in ("", "of another", "\udce4"):
        stranger = dataclasses.replace(cluster, secret=guess)
        with connect(cluster) as line:
            line.sendall(greeting(stranger, 1))
            said = line.makefile().readline()
        assert said == "refused it does not know the secret of this start\n"
    assert chief.outcome is None
    assert Meeting(cluster, 1).wait() is True
    assert chief.wait() is True
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("refused 127.0.0.1:")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.3", "::1"])
def test_workers_of_one_machine_listen_on_its_loopback_alone(host: str) -> None:
    name = f"[{host}]" if ":" in host else host
    ports = worker_lib.free_ports(2)
    cluster = Cluster(tuple(f"{name}:{port}" for port in ports), 0)
    workers = [Meeting(cluster, 0)]
    end = time.monotonic() + WAIT_SECS
    while not listening(ports[0]):
        assert time.monotonic() < end
        time.sleep(0.01)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", ports[0]), 5)
    workers.append(Meeting(cluster, 1))
    assert [worker.wait() for worker in workers] == [True, True]


def listening(port: int) -> bool:
    """Tells whether somebody listens on a port, on whatever address."""
    lines = [
        line.split()
        for kind in ("tcp", "tcp6")
        for line in pathlib.Path("/proc/net", kind).read_text().splitlines()
    ]
    return any(
        words[3] == "0A" and words[1].endswith(f":{port:04X}")
        for words in lines
    )


def test_a_worker_that_leaves_while_it_waits_is_not_there() -> None:
    cluster = make_cluster(3)
    chief = Meeting(cluster, 0)
    with connect(cluster) as left:
        left.sendall(greeting(cluster, 1))
        assert left.makefile().readline() == "wait\n"
    time.sleep(0.3)
    other = Meeting(cluster, 2)
    time.sleep(1.5)
    assert chief.outcome is None
    assert other.outcome is None
    again = Meeting(cluster, 1)
    assert [each.wait() for each in (chief, other, again)] == [True] * 3


def test_a_worker_behind_a_cut_link_is_not_there() -> None:
    """It said that it is there, and then nothing any more."""
    cluster = make_cluster(3)
    chief = Meeting(cluster, 0)
    with connect(cluster) as cut:
        cut.sendall(greeting(cluster, 1))
        other = Meeting(cluster, 2)
        time.sleep(2.5)
        assert chief.outcome is None
        # It is back, by a connection of its own.
        again = Meeting(cluster, 1)
        assert [each.wait() for each in (chief, other, again)] == [True] * 3


def test_the_newest_connection_of_a_worker_counts() -> None:
    cluster = make_cluster(2)
    with connected_twice(cluster) as chief:
        assert Meeting(cluster, 1).wait() is True
        assert chief.wait() is True


@contextlib.contextmanager
def connected_twice(cluster: Cluster) -> Iterator[Meeting]:
    chief = Meeting(cluster, 0)
    with connect(cluster) as first, connect(cluster) as second:
        for each in (first, second):
            each.sendall(greeting(cluster, 1))
            each.makefile().readline()
        assert first.recv(100) == b""
        yield chief


def test_a_notice_ends_the_wait() -> None:
    cluster = make_cluster(3)
    told = threading.Event()
    workers = [
        Meeting(cluster, index, requested=told.is_set) for index in (0, 1)
    ]
    time.sleep(0.5)
    start = time.monotonic()
    told.set()
    assert [worker.wait() for worker in workers] == [False, False]
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    ("index", "missing"),
    [
        (0, "error: worker 1 ({workers[1]}) did not come within 2 s"),
        (1, "error: worker 1 waited 2 s (--start_timeout_secs) for the chief "),
    ],
)
def test_a_run_says_who_is_missing(
    index: int, missing: str, tmp_path: pathlib.Path
) -> None:
    cluster = dataclasses.replace(make_cluster(2), index=index)
    code, output = runs.run(
        "dtrain.main",
        "--strategy=multi_worker",
        "--start_timeout_secs=2",
        f"--run_dir={tmp_path}/run",
        TF_CONFIG=cluster.to_tf_config(),
    )
    assert code == errors.LOST_WORKER, output
    assert missing.format(workers=cluster.workers) in output.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_that_dies_before_it_connects_keeps_nobody_waiting(
    index: int, tmp_path: pathlib.Path
) -> None:
    """TensorFlow waits for it for ever, and lets no Python run meanwhile."""
    cluster = dataclasses.replace(make_cluster(2), index=index)
    other = Meeting(cluster, 1 - index)
    process = runs.start(
        "dtrain.main",
        "--strategy=multi_worker",
        "--start_timeout_secs=6",
        f"--run_dir={tmp_path}/run",
        TF_CONFIG=cluster.to_tf_config(),
    )
    try:
        assert other.wait() is True
        code, output = runs.finish(process, timeout=60)
    finally:
        process.kill()
    assert code == errors.LOST_WORKER, output
    assert output.splitlines()[-1].startswith(
        "error: the workers met, and did not all connect within 6 s ("
    )
    assert not (tmp_path / "run").exists()


def test_the_chief_is_killed_and_comes_back() -> None:
    """Real processes: a SIGKILL tells the others by its connection alone."""
    cluster = make_cluster(2)
    script = (
        "import os\n"
        "from dtrain.cluster import environment, rendezvous\n"
        "here = environment.from_environment(os.environ)\n"
        "print(rendezvous.meet(here, 20, lambda: False), flush=True)\n"
    )

    def start(index: int) -> subprocess.Popen[str]:
        worker = dataclasses.replace(cluster, index=index)
        return subprocess.Popen(
            [sys.executable, "-c", script],
            env=runs.environment(TF_CONFIG=worker.to_tf_config()),
            stdout=subprocess.PIPE,
            text=True,
        )

    chief = start(0)
    connect(cluster).close()
    other = start(1)
    os.kill(chief.pid, signal.SIGSTOP)
    time.sleep(1)
    chief.kill()
    chief.communicate()
    again = start(0)
    for process in (other, again):
        assert process.communicate(timeout=30)[0] == "True\n"
        assert process.returncode == 0
