"""Real signals to real processes, a server in the place of GCE's, real time.

A child watches, and its main thread sits in a call of C that returns for no
signal, as inside TensorFlow: only the watcher's thread can see anything.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from dtrain import errors
from dtrain.resilience import signals, sources
from dtrain.resilience import watcher as watcher_lib
from tests import runs

# A mutex that is locked twice is never had, and unlike sleep(3) the call goes
# on after a signal. A child that nobody ends does so by itself.
CHILD = """
import ctypes, os, sys, threading
from dtrain.resilience import watcher as watcher_lib

def stuck():
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

timer = threading.Timer(60, os._exit, (99,))
timer.daemon = True
timer.start()
def begin():
    watcher.begin(lambda: say("told by", watcher.notice, watcher.is_over))

watcher = watcher_lib.Watcher(**eval(sys.argv[1]))
watcher.start()
exec(sys.argv[2])
say("ready")
stuck()
"""

BEGUN = "watcher.arm(); begin()"
SECOND = watcher_lib._SAME_NOTICE_SECS


class Child:
    """A process that watches."""

    def __init__(
        self,
        settings: str = "{}",
        then: str = BEGUN,
        by: Sequence[str] = (),
        **variables: str,
    ) -> None:
        environment = runs.environment(
            NO_GCE_CHECK="true", PYTHONUNBUFFERED="", **variables
        )
        self.process = subprocess.Popen(
            [*by, sys.executable, "-c", CHILD, settings, then],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        """Waits for a line of the standard output."""
        return self.process.stdout.readline().rstrip("\n")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Waits for the end; returns the code and the standard error."""
        _, printed = self.process.communicate(timeout=60)
        return self.process.returncode, printed

    def is_alive_after(self, secs: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(secs)
        return self.process.poll() is None


Start = Callable[..., Child]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts children that are ready, and leaves none."""
    children: list[Child] = []

    def start(*args: Any, **variables: str) -> Child:
        children.append(Child(*args, **variables))
        assert children[-1].line() == "ready"
        return children[-1]

    yield start
    for child in children:
        with child.process:
            child.process.kill()


# Signals.


@pytest.mark.parametrize("number", signals.NUMBERS)
def test_signal_is_seen_inside_a_call_of_c(
    start: Start, number: signal.Signals
) -> None:
    child = start()
    child.send(number)
    assert child.line() == f"told by {number.name} False"
    assert child.is_alive_after(0.2)


def test_a_closed_terminal_is_no_notice_under_nohup(start: Start) -> None:
    child = start("{}", BEGUN, ("nohup",))
    child.send(signal.SIGHUP)
    assert child.is_alive_after(0.2)
    child.send(signal.SIGTERM)
    assert child.line() == "told by SIGTERM False"


def test_second_interrupt_ends_however_fast(start: Start) -> None:
    child = start()
    child.send(signal.SIGINT)
    assert child.line() == "told by SIGINT False"
    child.send(signal.SIGINT)
    assert child.end()[0] == -signal.SIGINT


def test_terminate_may_come_twice_and_ends_later(start: Start) -> None:
    child = start()
    child.send(signal.SIGTERM)
    assert child.line() == "told by SIGTERM False"
    child.send(signal.SIGTERM)
    assert child.is_alive_after(SECOND + 0.2)
    child.send(signal.SIGTERM)
    assert child.end()[0] == -signal.SIGTERM


def test_another_signal_later_ends(start: Start) -> None:
    child = start()
    child.send(signal.SIGUSR1)
    assert child.line() == "told by SIGUSR1 False"
    assert child.is_alive_after(SECOND + 0.2)
    child.send(signal.SIGTERM)
    assert child.end()[0] == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_there_is_anything_to_save_it_ends_at_once(
    start: Start, number: signal.Signals
) -> None:
    child = start("{}", "watcher.arm(); print('half a line', end='')")
    child.send(number)
    output, printed = child.process.communicate(timeout=60)
    assert child.process.returncode == errors.RUN_AGAIN
    assert printed.count("\n") == 1
    assert printed.startswith(f"stopped by {number.name} before the first")
    assert output == "half a line"


def test_words_come_out_while_tensorflow_is_imported(start: Start) -> None:
    """Its noise is caught meanwhile, and with it what goes to 2."""
    quiet = """
from dtrain.storage import startup
catch = startup.quiet()
catch.__enter__()
"""
    child = start("{}", quiet)
    child.send(signal.SIGTERM)
    code, printed = child.end()
    assert code == errors.RUN_AGAIN
    assert "before the first steps" in printed


def test_end_waits_for_no_lock_of_the_main_thread(start: Start) -> None:
    """Which holds that of the standard output, in a full pipe."""
    full = "say('ready'); sys.stdout.write('x' * 10**6); sys.stdout.flush()"
    child = start("{}", full)
    child.send(signal.SIGTERM)
    assert child.process.wait(30) == errors.RUN_AGAIN


def test_handler_of_another_is_overwritten_until_armed_again(
    start: Start,
) -> None:
    """As by TensorFlow's, in C++, when it builds a strategy."""
    overwrite = (
        "import ctypes, signal; f = ctypes.CDLL(None).signal; "
        "f.argtypes = (ctypes.c_int, ctypes.c_void_p); f.restype = None; "
        "f(15, 1)"
    )
    child = start("{}", f"{BEGUN}; {overwrite}")
    child.send(signal.SIGTERM)
    child.send(signal.SIGUSR1)
    assert child.line() == "told by SIGUSR1 False"
    child = start("{}", f"{overwrite}; {BEGUN}")
    child.send(signal.SIGTERM)
    assert child.line() == "told by SIGTERM False"


@contextlib.contextmanager
def watching(**settings: object) -> Iterator[watcher_lib.Watcher]:
    watcher = watcher_lib.Watcher(environment={"NO_GCE_CHECK": "1"}, **settings)
    watcher.start()
    watcher.arm()
    watcher.begin()
    try:
        yield watcher
    finally:
        watcher.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_previous_handler_is_called_and_comes_back() -> None:
    called = []
    # A shell has it ignored by what it runs in the background.
    interrupt = signal.getsignal(signal.SIGINT)
    before = signal.signal(signal.SIGTERM, lambda *_: called.append("previous"))
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    try:
        with watching() as watcher:
            os.kill(os.getpid(), signal.SIGTERM)
            assert watcher.requested
            assert watcher.notice == "SIGTERM"
            assert called == ["previous"]
        watcher.close()
        os.kill(os.getpid(), signal.SIGTERM)
        assert called == ["previous", "previous"]
        assert signal.set_wakeup_fd(wakeup) == wakeup
        assert signal.getsignal(signal.SIGINT) == interrupt
        assert not [
            thread
            for thread in threading.enumerate()
            if thread.name.startswith("dtrain-notices")
        ]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_fork_keeps_its_signals_to_itself() -> None:
    with watching() as watcher:
        pid = os.fork()
        if not pid:
            time.sleep(60)
            os._exit(1)
        time.sleep(0.1)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -15
        assert not watcher.requested


# Files, times, parents.


def test_stop_file(tmp_path: pathlib.Path, start: Start) -> None:
    path = tmp_path / "stop"
    look = f"watcher.look_for({str(path)!r}, 0.1, os.path.exists)"
    child = start("{}", f"{BEGUN}; {look}")
    path.write_text("")
    assert child.line() == "told by the stop file True"


def test_stop_file_of_a_store() -> None:
    looks = []

    def exists(path: str) -> bool:
        looks.append(path)
        return len(looks) == 3

    with watching() as watcher:
        watcher.look_for("gs://a/stop", 0.01, exists)
        wait_for(lambda: watcher.requested)
    assert looks == ["gs://a/stop"] * 3


@pytest.mark.parametrize(
    ("is_there", "notice"),
    [(True, "the stop file"), (False, "another worker's notice")],
)
def test_another_worker_was_told_first(is_there: bool, notice: str) -> None:
    has_looked = threading.Event()
    written = False

    def exists(path: str) -> bool:
        try:
            return written and path == "/stop"
        finally:
            has_looked.set()

    with watching() as watcher:
        watcher.look_for("/stop", 60.0, exists)
        assert has_looked.wait(60)
        written = is_there
        watcher.hear(is_over=True)
        assert watcher.notice == notice


def test_file_system_that_hangs_delays_no_signal(start: Start) -> None:
    look = "watcher.look_for('/x', 1.0, lambda path: stuck())"
    child = start("{}", f"{look}; {BEGUN}")
    child.send(signal.SIGTERM)
    assert child.line() == "told by SIGTERM False"


def test_time_limit(start: Start) -> None:
    child = start("{'stop_after_secs': 1.0}")
    assert child.line() == "told by the time limit (--stop_after_secs) True"


def test_end_of_the_allocation(start: Start) -> None:
    # Half of what there is, where that is less than the lead.
    end = str(int(time.time() + 6))
    child = start(SLURM_JOB_END_TIME=end)
    assert child.line() == "told by the end of the Slurm allocation True"


@pytest.mark.parametrize(
    ("left", "grace_secs", "secs"),
    [(3600, 30.0, 3540), (3600, 60.0, 3480), (300, 300.0, 150), (60, 30.0, 30)],
)
def test_how_long_before_the_end_of_the_allocation(
    left: int, grace_secs: float, secs: float
) -> None:
    end = str(int(time.time()) + left)
    [limit] = sources._slurm({"SLURM_JOB_END_TIME": end}, grace_secs)
    assert isinstance(limit, sources.TimeLimit)
    assert limit.secs == pytest.approx(secs, abs=2)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SLURM_JOB_END_TIME", "tomorrow", "a whole number"),
        ("SLURM_JOB_END_TIME", "1" * 5000, "a whole number"),
        ("SLURM_JOB_END_TIME", "1500000000", "a time to come"),
        ("DTRAIN_SUPERVISOR_PID", "-1", "a whole number"),
    ],
)
def test_garbage_is_ignored_with_a_line(
    name: str, value: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = {"NO_GCE_CHECK": "true", name: value}
    watcher = watcher_lib.Watcher(environment=environment)
    watcher.start()
    watcher.begin()
    try:
        time.sleep(2 * watcher_lib._TICK_SECS)
        assert not watcher.requested
    finally:
        watcher.close()
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith(f"{name} ({value[:50]!r}"[:40])
    assert said in printed
    assert len(printed) < 200


def test_launcher_that_is_gone() -> None:
    """A parent starts a child, says so, and is killed."""
    parent = """
import os, subprocess, sys
os.environ["DTRAIN_SUPERVISOR_PID"] = str(os.getpid())
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""
    arguments = [sys.executable, "-c", parent, CHILD, "{}", BEGUN]
    with subprocess.Popen(
        arguments,
        env=runs.environment(NO_GCE_CHECK="true"),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(2 * watcher_lib._TICK_SECS)
            process.kill()
            line = process.stdout.readline()
            assert line == "told by the launcher is gone False\n"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_notice_that_is_the_end_counts_beside_one_that_is_not() -> None:
    with watching(stop_after_secs=0.5, grace_secs=900.0) as watcher:
        assert watcher.secs_left == float("inf")
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not watcher.is_over
        assert 0 < watcher.secs_left <= 900
        wait_for(lambda: watcher.is_over)
        assert watcher.notice == "SIGUSR1"


# Grace.


def test_grace_ends_what_takes_longer(start: Start) -> None:
    child = start("{'grace_secs': 0.5}")
    child.send(signal.SIGTERM)
    code, printed = child.end()
    assert code == errors.RUN_AGAIN
    assert printed.count("\n") == 1
    assert "SIGTERM and not saved within grace_secs (0.5)" in printed


def test_person_has_no_deadline(start: Start) -> None:
    child = start("{'grace_secs': 0.1, 'stop_after_secs': 0.1}")
    child.send(signal.SIGINT)
    assert child.is_alive_after(1.5)
    child.send(signal.SIGTERM)
    # Which is not the first signal, but has a deadline.
    assert child.is_alive_after(0.05)
    assert child.end()[0] == errors.RUN_AGAIN


# GCE.


class Metadata(http.server.ThreadingHTTPServer):
    """Answers as GCE's does, or as a broken one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.values = {
            "instance/preempted": "FALSE",
            "instance/maintenance-event": "NONE",
        }
        self.status = 200
        self.is_silent = False
        self.asked: list[str] = []

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Metadata)
        key = self.path.removeprefix("/computeMetadata/v1/")
        # Before the status, which a test changes first.
        value = server.values.get(key, "")
        server.asked.append(key)
        if server.is_silent:
            time.sleep(20)
        # The real one refuses who does not say this.
        known = self.headers["Metadata-Flavor"] == "Google"
        # Who asked may have left, and another test may be running.
        with contextlib.suppress(ConnectionError):
            self.send_response(server.status if known else 403)
            self.end_headers()
            self.wfile.write(value.encode())

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Says nothing."""


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def on_gce(server: Metadata, **more: str) -> Iterator[watcher_lib.Watcher]:
    watcher = watcher_lib.Watcher(
        environment={"GCE_METADATA_HOST": server.host, **more}
    )
    watcher.start()
    watcher.begin()
    try:
        yield watcher
    finally:
        watcher.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("instance/preempted", "TRUE"),
        ("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"),
    ],
)
def test_gce_is_noticed_within_two_seconds(
    metadata: Metadata,
    key: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Nobody is there, and nobody should be asked.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with on_gce(metadata) as watcher:
        wait_for(lambda: len(metadata.asked) >= 4)
        assert not watcher.requested
        metadata.values[key] = value
        since = metadata.asked.count(key)
        wait_for(lambda: watcher.requested)
        # One may have been answered before; a slow machine shows no seconds.
        assert metadata.asked.count(key) - since <= 2
        assert sources._GCE_EVERY_SECS <= 1.0
        assert watcher.notice == f"GCE: {key}"
        assert watcher.is_over


def test_live_migration_is_no_notice(metadata: Metadata) -> None:
    key = "instance/maintenance-event"
    metadata.values[key] = "MIGRATE_ON_HOST_MAINTENANCE"
    with on_gce(metadata) as watcher:
        wait_for(lambda: metadata.asked.count(key) >= 3)
        assert not watcher.requested


def test_broken_server_is_survived_without_a_word(
    metadata: Metadata, capfd: pytest.CaptureFixture[str]
) -> None:
    metadata.values = {"instance/preempted": "TRUE" * 1000}
    with on_gce(metadata) as watcher:
        wait_for(lambda: len(metadata.asked) >= 4)
        metadata.status = 503
        metadata.values = {"instance/preempted": "TRUE"}
        wait_for(lambda: len(metadata.asked) >= 8)
        assert not watcher.requested
        metadata.status = 200
        wait_for(lambda: watcher.requested)
    assert capfd.readouterr().err == ""


def test_silent_server_delays_nothing(metadata: Metadata) -> None:
    metadata.is_silent = True
    with on_gce(metadata) as watcher:
        wait_for(lambda: bool(metadata.asked))
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: watcher._was_announced)
        # It is asked again, although it never answers.
        wait_for(lambda: len(metadata.asked) >= 4)
        metadata.is_silent = False
        metadata.values["instance/preempted"] = "TRUE"
        wait_for(lambda: watcher.is_over)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "a b", "x:y", "[::1", "\n"])
def test_no_server_is_survived_without_a_word(
    host: str, capfd: pytest.CaptureFixture[str]
) -> None:
    watcher = watcher_lib.Watcher(environment={"GCE_METADATA_HOST": host})
    watcher.start()
    watcher.begin()
    time.sleep(0.2)
    watcher.close()
    assert not watcher.requested
    assert capfd.readouterr().err == ""


def test_nobody_is_asked_who_is_not_there(
    metadata: Metadata,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    with on_gce(metadata, NO_GCE_CHECK="True"):
        time.sleep(0.3)
    assert not metadata.asked
    # Without a variable, the machine's maker tells.
    product = tmp_path / "product_name"
    monkeypatch.setattr(sources, "_GCE_PRODUCT", product)
    assert sources._gce({}, 0.0) == []
    product.write_text("Some Laptop\n")
    assert sources._gce({}, 0.0) == []
    product.write_text("Google Compute Engine\n")
    assert len(sources._gce({}, 0.0)) == 2


# An EC2 spot instance.


class SpotMetadata(http.server.ThreadingHTTPServer):
    """Answers as the metadata server of EC2 does, version 2."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _SpotAnswer)
        self.action = ""
        self.token = "first"
        self.asked = 0


class _SpotAnswer(http.server.BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        server = self.server
        assert isinstance(server, SpotMetadata)
        is_known = "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        is_token = is_known and self.path == "/latest/api/token"
        self._answer(200 if is_token else 400, server.token)

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, SpotMetadata)
        server.asked += 1
        if self.headers["X-aws-ec2-metadata-token"] != server.token:
            self._answer(401, "")
        elif self.path != "/latest/meta-data/spot/instance-action":
            self._answer(404, "")
        else:
            self._answer(200 if server.action else 404, server.action)

    def _answer(self, status: int, text: str) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Says nothing."""


def test_the_end_of_a_spot_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.Ec2Spot, "every_secs", 0.05)
    # Nobody is there, and nobody should be asked.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with SpotMetadata() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        watcher = watcher_lib.Watcher(
            environment={
                "NO_GCE_CHECK": "true",
                "AWS_EC2_METADATA_SERVICE_ENDPOINT": url,
            }
        )
        watcher.start()
        watcher.begin()
        with contextlib.closing(watcher):
            wait_for(lambda: server.asked >= 3)
            # A token that has run out is fetched again.
            server.token = "second"
            asked = server.asked
            wait_for(lambda: server.asked >= asked + 3)
            assert not watcher.requested
            server.action = '{"action": "terminate", "time": "2026-01-01"}'
            wait_for(lambda: watcher.requested)
            assert watcher.notice == "EC2: spot/instance-action"
            assert watcher.is_over
        server.shutdown()


def test_a_machine_that_is_no_spot_instance_is_not_asked(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vendor = tmp_path / "sys_vendor"
    monkeypatch.setattr(sources, "_VENDOR", vendor)
    assert sources._ec2({}, 0.0) == []
    vendor.write_text("Somebody\n")
    assert sources._ec2({}, 0.0) == []
    vendor.write_text("Amazon EC2\n")
    assert len(sources._ec2({}, 0.0)) == 1
    assert sources._ec2({"AWS_EC2_METADATA_DISABLED": "true"}, 0.0) == []
    # A server that is not there is no notice.
    assert sources.Ec2Spot("http://127.0.0.1:9").look() is None
