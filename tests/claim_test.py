"""One process trains in a run directory, on a disk or on an object store."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from dtrain.errors import StorageError, UserError
from dtrain.storage import access, claim, files, lease
from dtrain.storage import holder as holder_lib
from dtrain.storage.holder import Holder
from dtrain.storage.lease import Lease
from tests import object_store, runs

RUN_DIR = "gs://bucket/run"
PATH = f"{RUN_DIR}/lease.json"
ANOTHER = Holder("elsewhere", 7, "k", "another machine", "1")


def test_a_claim_keeps_a_second_process_out(tmp_path: pathlib.Path) -> None:
    with claim.claim(str(tmp_path)) as mine:
        mine.raise_if_lost()
        with (
            pytest.raises(UserError, match=r"this process saves in .* already"),
            claim.claim(str(tmp_path)),
        ):
            raise AssertionError("claimed twice")
    with claim.claim(str(tmp_path)):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_claim_makes_the_directory(tmp_path: pathlib.Path) -> None:
    with claim.claim(f"{tmp_path}/a/b"):
        assert (tmp_path / "a/b").is_dir()


# The lease, on a store and a clock of the test's own.


class Store:
    """Objects in a dict, in place of what `files` does with a store."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.num_failures = 0

    def _fail(self) -> None:
        if self.num_failures > 0:
            self.num_failures -= 1
            raise files.StoreError("injected", "UnavailableError")

    def read_part(self, path: str, start: int, length: int) -> bytes:
        self._fail()
        if path not in self.objects:
            raise files.MissingError("no such object", "NotFoundError")
        return self.objects[path][start : start + length]

    def write(self, path: str, data: bytes) -> None:
        self._fail()
        self.objects[path] = data

    def remove(self, path: str) -> None:
        self._fail()
        self.objects.pop(path, None)

    def hold(self, holder: Holder, term: int, renewal: int = 0) -> None:
        """Writes the lease of another process."""
        lease = {
            "holder": holder._asdict(),
            "term": term,
            "lease_secs": 30,
            "num_renewals": renewal,
        }
        self.objects[PATH] = json.dumps(lease).encode()

    @property
    def lease(self) -> dict:
        return json.loads(self.objects[PATH])


class Clock(lease.Clock):
    """Seconds that pass while somebody sleeps; events happen on the way."""

    def __init__(self) -> None:
        self.secs = 1000.0
        self.events: list[tuple[float, Callable[[], None]]] = []

    def after(self, secs: float, event: Callable[[], None]) -> None:
        self.events.append((self.secs + secs, event))

    def now(self) -> float:
        return self.secs

    def sleep(self, secs: float) -> None:
        self.secs += secs
        due = [each for each in self.events if each[0] <= self.secs]
        self.events = [each for each in self.events if each not in due]
        for _, event in due:
            event()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    for name in ("read_part", "write", "remove"):
        monkeypatch.setattr(files, name, getattr(made, name))
    return made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextlib.contextmanager
def claimed(
    clock: Clock, said: list[str] | None = None, **more: float
) -> Iterator[Lease]:
    report = [].append if said is None else said.append
    with claim.claim(RUN_DIR, clock=clock, report=report, **more) as made:
        yield cast("Lease", made)


def test_a_free_run_is_taken_at_once(store: Store, clock: Clock) -> None:
    began = clock.now()
    with claimed(clock) as mine:
        assert clock.now() - began <= 1
        mine.raise_if_lost()
        assert store.lease["holder"]["pid"] == os.getpid()
        assert store.lease["term"] == 1
    assert not store.objects


def test_a_dead_lease_is_taken_over(store: Store, clock: Clock) -> None:
    store.hold(ANOTHER, term=4)
    began, said = clock.now(), []
    with claimed(clock, said):
        assert 30 <= clock.now() - began < 33
        assert store.lease["term"] == 5
        assert store.lease["holder"]["pid"] == os.getpid()
    assert said == [
        f"waiting up to 30 s for the lease of elsewhere:7 on {RUN_DIR}"
    ]


@pytest.mark.parametrize("secs", [0.5, 12, 29.5])
def test_a_lease_that_is_renewed_is_held(
    secs: float, store: Store, clock: Clock
) -> None:
    store.hold(ANOTHER, term=4)
    clock.after(secs, lambda: store.hold(ANOTHER, term=4, renewal=1))
    began = clock.now()
    with (
        pytest.raises(UserError, match="elsewhere:7 holds its lease"),
        claimed(clock),
    ):
        raise AssertionError("claimed twice")
    assert clock.now() - began < secs + 2
    assert store.lease["holder"]["host"] == "elsewhere"


def test_a_lease_that_is_released_is_taken_at_once(
    store: Store, clock: Clock
) -> None:
    store.hold(ANOTHER, term=4)
    clock.after(3, lambda: store.remove(PATH))
    began = clock.now()
    with claimed(clock):
        assert clock.now() - began < 6


def test_a_process_of_this_machine_that_has_ended_is_not_waited_for(
    store: Store, clock: Clock
) -> None:
    process = subprocess.Popen(["sleep", "60"])
    holder = Holder.this()._replace(
        key="k", pid=process.pid, started=holder_lib.started(process.pid)
    )
    assert not holder.is_gone()
    assert not Holder.this().is_gone()
    process.kill()
    process.wait()
    assert holder.is_gone()
    # Nor is what has its number now.
    assert Holder.this()._replace(started="1").is_gone()
    assert not holder._replace(machine="").is_gone()
    store.hold(holder, term=1)
    began, said = clock.now(), []
    with claimed(clock, said):
        assert clock.now() - began <= 1
    assert said == []


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b'{"holder": 3}', b"\xff", b"[" * 10_000),
        *(
            b'{"holder": {"host": "a", "pid": %b, "key": "", "machine": "", '
            b'"started": ""}, "term": %b, "lease_secs": %b}' % odd
            for odd in [
                *((b'"7"', b"1", b"30"), (b"0", b"1", b"30")),
                *((b"7", b"1e999", b"30"), (b"7", b"1", b"NaN")),
                *((b"7", b"true", b"30"), (b"7", b"1", b"1e999")),
            ]
        ),
    ],
)
def test_a_lease_that_says_nothing_is_waited_for(
    data: bytes, store: Store, clock: Clock
) -> None:
    store.objects[PATH] = data
    began, said = clock.now(), []
    with claimed(clock, said):
        assert clock.now() - began >= 30
    assert "of an unknown process" in said[0]


def test_the_last_of_two_that_claim_at_once_has_it(
    store: Store, clock: Clock
) -> None:
    # Between the write and the second look.
    clock.after(0.1, lambda: store.hold(ANOTHER, term=1))
    with (
        pytest.raises(UserError, match="elsewhere:7 holds its lease"),
        claimed(clock),
    ):
        raise AssertionError("claimed twice")
    assert store.lease["holder"]["host"] == "elsewhere"


def test_an_error_is_no_free_run(store: Store, clock: Clock) -> None:
    store.hold(ANOTHER, term=4)
    store.num_failures = 2
    clock.after(20, lambda: setattr(store, "num_failures", 2))
    began = clock.now()
    with claimed(clock):
        assert clock.now() - began >= 30


def test_a_store_that_never_answers(store: Store, clock: Clock) -> None:
    store.num_failures = 1000
    with pytest.raises(StorageError, match=re.escape(RUN_DIR)), claimed(clock):
        raise AssertionError("claimed nothing")


def test_a_lease_that_cannot_be_looked_at_is_not_taken_over(
    store: Store, clock: Clock
) -> None:
    store.hold(ANOTHER, term=4)
    clock.after(25, lambda: setattr(store, "num_failures", 1000))
    with pytest.raises(StorageError), claimed(clock):
        raise AssertionError("claimed blindly")


def test_a_run_that_was_taken_over(store: Store, clock: Clock) -> None:
    with claimed(clock) as mine:
        store.hold(ANOTHER, term=2)
        mine.renew()
        with pytest.raises(UserError, match="elsewhere:7 took its lease"):
            mine.raise_if_lost()
    # It is not this one's to release.
    assert store.lease["holder"]["host"] == "elsewhere"


def test_an_earlier_holder_that_writes_late_has_lost_it(
    store: Store, clock: Clock
) -> None:
    store.hold(ANOTHER, term=3)
    with claimed(clock) as mine:
        store.hold(ANOTHER, term=3, renewal=9)
        mine.renew()
        mine.raise_if_lost()
        assert store.lease["term"] == 4
        assert store.lease["holder"]["pid"] == os.getpid()


def test_a_lease_that_somebody_removed_is_written_again(
    store: Store, clock: Clock
) -> None:
    with claimed(clock) as mine:
        store.objects.clear()
        mine.renew()
        mine.raise_if_lost()
        assert store.lease["term"] == 1


def test_a_lease_that_cannot_be_renewed(store: Store, clock: Clock) -> None:
    # The thread renews every 0.1 s, of which the clock knows nothing.
    with claimed(clock, lease_secs=0.3) as mine:
        store.num_failures = 1_000_000
        mine.raise_if_lost()
        clock.secs += 0.4
        with pytest.raises(StorageError, match="could not be renewed"):
            mine.raise_if_lost()
        store.num_failures = 0
        mine.raise_if_lost()


def test_a_process_that_was_stopped_for_a_while(
    store: Store, clock: Clock
) -> None:
    with claimed(clock, lease_secs=0.3) as mine:
        clock.secs += 3600
        mine.raise_if_lost()
        assert store.lease["num_renewals"] > 1


# On the emulator, by processes that are killed.

HOLDER = """
import sys
from dtrain.storage import claim
with claim.claim(sys.argv[1], lease_secs=float(sys.argv[2])) as mine:
    print("claimed", flush=True)
    for line in sys.stdin:
        mine.raise_if_lost()
        print("mine", flush=True)
"""


@contextlib.contextmanager
def start_holder(
    store: object_store.ObjectStore, lease_secs: float
) -> Iterator[subprocess.Popen[str]]:
    """Starts a process that claims the run until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, RUN_DIR, str(lease_secs)],
        env=runs.environment(**store.environment()),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def claim_and_release(lease_secs: float) -> list[str]:
    said = []
    with claim.claim(RUN_DIR, lease_secs=lease_secs, report=said.append):
        return said


def forget_machine() -> None:
    """Makes this process one of another machine."""
    holder_lib.machine = lambda: "another machine"


def test_a_run_whose_process_is_killed() -> None:
    with (
        object_store.ObjectStore() as store,
        object_store.Client(runs.environment(**store.environment())) as client,
    ):
        with start_holder(store, 3) as holder:
            assert holder.stdout.readline() == "claimed\n"
            with pytest.raises(object_store.Raised) as caught:
                client.call(claim_and_release, 3)
            assert caught.value.kind == "UserError"
            assert f":{holder.pid} holds its lease" in caught.value.text
            # Size and bytes are not those of a while ago.
            assert "?fields=size" not in store.requests[-1].line
            holder.send_signal(signal.SIGKILL)
            holder.wait()
        assert store.names("run") == ["run/lease.json"]
        assert client.call(claim_and_release, 3) == []
        assert store.names("run") == []


def test_a_run_whose_machine_is_gone() -> None:
    with (
        object_store.ObjectStore(rate=0.1, seed=3) as store,
        object_store.Client(runs.environment(**store.environment())) as client,
    ):
        with start_holder(store, 6) as holder:
            assert holder.stdout.readline() == "claimed\n"
            holder.send_signal(signal.SIGKILL)
            holder.wait()
        client.call(forget_machine)
        [said] = client.call(claim_and_release, 6)
        assert said.startswith("waiting up to 6 s for the lease of ")
        assert store.names("run") == []


def test_a_process_that_lost_its_lease_stops() -> None:
    with object_store.ObjectStore() as store, start_holder(store, 3) as holder:
        assert holder.stdout.readline() == "claimed\n"
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "mine\n"
        lease = json.loads(store.read("run/lease.json"))
        lease["holder"]["key"] = "another"
        store.write("run/lease.json", json.dumps(lease).encode())
        holder.stdin.write("\n")
        holder.stdin.flush()
        # It looks every second.
        deadline = time.monotonic() + 60
        while holder.stdout.readline() == "mine\n":
            assert time.monotonic() < deadline
            time.sleep(0.05)
            holder.stdin.write("\n")
            holder.stdin.flush()
        assert holder.wait(timeout=60) == 1


# The first call.


def check(path: str) -> None:
    access.check("run_dir", path)


@pytest.mark.parametrize(
    ("path", "status", "kind", "said"),
    [
        ("gs://bucket/run", "", "", ""),
        ("gs://bucket/run", "401", "UserError", "application-default login"),
        ("gs://bucket/run", "403", "UserError", "Storage Object Admin"),
        ("gs://other/run", "", "UserError", "there is no gs://other"),
        ("s3://bucket/run", "", "UserError", "s3:// is not read here"),
        ("gs://bucket/run", "503", "StorageError", "injected"),
    ],
)
def test_first_call(
    path: str,
    status: str,
    kind: str,
    said: str,
    reached: tuple[object_store.ObjectStore, object_store.Client],
) -> None:
    store, client = reached
    store.calm()
    if status:
        store.inject(status, count=10_000)
    if not kind:
        client.call(check, path)
        return
    with pytest.raises(object_store.Raised) as caught:
        client.call(check, path)
    assert caught.value.kind == kind
    assert said in caught.value.text
    assert "\n" not in caught.value.text
    assert "token" not in caught.value.text


@pytest.fixture(scope="module")
def reached() -> Iterator[tuple[object_store.ObjectStore, object_store.Client]]:
    with (
        object_store.ObjectStore() as store,
        object_store.Client(
            runs.environment(
                **store.environment(), GCS_RETRY_CONFIG_MAX_RETRIES="2"
            )
        ) as client,
    ):
        yield store, client


def test_virtual_machine_whose_credentials_do_not_come() -> None:
    with (
        object_store.ObjectStore() as store,
        object_store.Client(
            runs.environment(
                **store.environment("metadata"),
                GCS_RETRY_CONFIG_MAX_RETRIES="2",
            )
        ) as client,
    ):
        store.inject("503", "computeMetadata", count=1000)
        with pytest.raises(object_store.Raised, match="did not come") as caught:
            client.call(check, RUN_DIR)
        assert caught.value.kind == "StorageError"


def test_a_disk_needs_no_call(tmp_path: pathlib.Path) -> None:
    access.check("run_dir", str(tmp_path / "nothing"))


def test_a_supervised_worker_waits_for_one_that_is_leaving(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor was killed and started again; 78 would end the run."""
    monkeypatch.setenv("DTRAIN_SUPERVISOR_PID", "1")
    said: list[str] = []
    orphan = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(orphan, fcntl.LOCK_EX)

    def leave(line: str) -> None:
        said.append(line)
        os.close(orphan)

    with claim.claim(str(tmp_path), report=leave):
        assert len(said) == 1
        assert "waiting 120 s for it to end" in said[0]


# On a disk.


@pytest.mark.parametrize("how", ["moved", "removed", "made anew"])
def test_a_directory_that_is_another_one_now(
    how: str, tmp_path: pathlib.Path
) -> None:
    run_dir = tmp_path / "run"
    with claim.claim(str(run_dir)) as mine:
        mine.raise_if_lost()
        run_dir.rename(tmp_path / "elsewhere")
        if how != "moved":
            shutil.rmtree(tmp_path / "elsewhere")
        if how == "made anew":
            with claim.claim(str(run_dir)) as another:
                another.raise_if_lost()
        with pytest.raises(UserError, match="was moved or removed"):
            mine.raise_if_lost()


def test_a_disk_without_locks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre without `-o flock`: the lease does it there, and it is said."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    with claim.claim(str(tmp_path), lease_secs=0.5, report=said.append) as mine:
        assert "is on a disk without locks; a lease" in said[0]
        mine.raise_if_lost()
        assert claim.is_held(str(tmp_path)) is None
        with (
            pytest.raises(UserError, match="this process saves in"),
            claim.claim(str(tmp_path), lease_secs=0.5, report=said.append),
        ):
            raise AssertionError("claimed twice")
    assert claim.is_held(str(tmp_path)) is False


FORKS = """
import multiprocessing, os, sys, time
from dtrain.storage import claim

def run():
    # It has begun, and so has let go.
    print(os.getpid(), flush=True)
    time.sleep(60)

with claim.claim(sys.argv[1]):
    multiprocessing.get_context("fork").Process(target=run).start()
    time.sleep(60)
"""


def test_a_forked_child_has_no_claim(tmp_path: pathlib.Path) -> None:
    """It may outlive a run that was killed, as a data loader does."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKS, str(tmp_path)],
        env=runs.environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            with claim.claim(str(tmp_path)) as mine:
                mine.raise_if_lost()
        finally:
            os.kill(child, signal.SIGKILL)


ORPHAN = """
import os, sys, time
from dtrain.storage import claim
with claim.claim(sys.argv[1]):
    print("claimed", flush=True)
    while os.getppid() == int(os.environ["DTRAIN_SUPERVISOR_PID"]):
        time.sleep(0.05)
    time.sleep(float(sys.argv[2]))
"""
SUPERVISOR = """
import os, subprocess, sys
environment = {**os.environ, "DTRAIN_SUPERVISOR_PID": str(os.getpid())}
program = [sys.executable, "-c", *sys.argv[1:]]
child = subprocess.Popen(program, env=environment)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("saves_for_secs", [0.5, 60.0])
def test_an_orphan_that_was_stopped(
    saves_for_secs: float,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It goes on, saves and ends; one that does not is ended."""
    monkeypatch.setattr(claim, "_ORPHAN_SECS", 3.0)
    command = [sys.executable, "-c", SUPERVISOR, ORPHAN, str(tmp_path)]
    with subprocess.Popen(
        [*command, str(saves_for_secs)],
        env=runs.environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as supervisor:
        orphan = int(supervisor.stdout.readline())
        assert supervisor.stdout.readline() == "claimed\n"
        # While it has its supervisor, it is none.
        with (
            pytest.raises(UserError, match=rf":{orphan} holds its lock"),
            claim.claim(str(tmp_path)),
        ):
            raise AssertionError("claimed twice")
        os.kill(orphan, signal.SIGSTOP)
        supervisor.kill()
        supervisor.wait()
        said: list[str] = []
        began = time.monotonic()
        with claim.claim(str(tmp_path), report=said.append):
            waited = time.monotonic() - began
    assert (waited > 3.0) == (saves_for_secs > 3.0)
    assert len(said) == 1
    assert f"waiting 3 s for {socket.gethostname()}:{orphan} to end" in said[0]


def test_a_process_that_proc_does_not_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With hidepid it shows nobody else's."""
    mine = Holder.this()
    with subprocess.Popen(["sleep", "60"]) as another:
        theirs = mine._replace(
            pid=another.pid, started=holder_lib.started(another.pid)
        )
        monkeypatch.setattr(holder_lib, "started", lambda _: "")
        assert not theirs.is_gone()
        another.kill()
    assert theirs.is_gone()


# Two starts at once.

NUM_RACES = int(os.environ.get("DTRAIN_NUM_RACES", "5"))
RACER = """
import random, sys, threading, time
from dtrain.errors import StorageError, UserError
from dtrain.storage import claim, files, lease

chance, lock = random.Random(int(sys.argv[3])), threading.Lock()
lease._SETTLE_SECS = 0.1
real = {name: getattr(files, name) for name in ("read_part", "write")}

def slow(name):
    def act(*arguments):
        # Now and then a request is tried again.
        with lock:
            before, after = (
                chance.choice((0, 0, 0.02, 0.1, 0.3)) for _ in range(2)
            )
        time.sleep(before)
        try:
            return real[name](*arguments)
        finally:
            time.sleep(after)
    return act

for name in real:
    setattr(files, name, slow(name))
for line in sys.stdin:
    try:
        with claim.claim(line.strip(), lease_secs=1.2, report=str) as mine:
            began = time.monotonic()
            try:
                while time.monotonic() < began + 0.3:
                    mine.raise_if_lost()
                    time.sleep(0.01)
                    held_until = time.monotonic()
            except (UserError, StorageError):
                pass
            print(began, held_until, flush=True)
    except (UserError, StorageError):
        print("refused", flush=True)
"""


@pytest.fixture
def place_of_races(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> Iterator[tuple[str, dict[str, str]]]:
    """Where starts race, and what their environment has for that."""
    if request.param != "gs":
        scheme = "" if request.param == "disk" else "file://"
        yield f"{scheme}{tmp_path}", {}
        return
    with object_store.ObjectStore() as store:
        yield "gs://bucket", store.environment()


@pytest.mark.parametrize(
    "place_of_races",
    ["disk", "store", *(["gs"] if NUM_RACES > 100 else [])],
    indirect=True,
)
def test_two_starts_at_once(
    place_of_races: tuple[str, dict[str, str]],
    tmp_path: pathlib.Path,
    chance: random.Random,
) -> None:
    """Never two holders, however long their requests take."""
    place, variables = place_of_races
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, "", "", str(chance.random())[2:]],
            env=runs.environment(TF_CPP_MIN_LOG_LEVEL="3", **variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        num_held = 0
        for number in range(NUM_RACES):
            (tmp_path / str(number)).mkdir()
            for racer in chance.sample(racers, 2):
                racer.stdin.write(f"{place}/{number}\n")
                racer.stdin.flush()
                time.sleep(chance.choice((0.0, 0.01, 0.1)))
            said = [racer.stdout.readline() for racer in racers]
            spans = [
                [float(word) for word in line.split()]
                for line in said
                if line != "refused\n"
            ]
            num_held += len(spans)
            if len(spans) == 2:
                first, second = sorted(spans)
                assert first[1] < second[0], said
        # That nobody has it, time and again, would be no answer.
        assert num_held >= NUM_RACES / 2
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
