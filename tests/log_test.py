"""Of a file of lines none is lost, torn or twice, whatever the disk does."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.record import log
from dtrain.storage import files
from tests import object_store, runs


def lines(first: int, last: int) -> bytes:
    return b"".join(
        json.dumps({"step": step, "loss": step / 7}).encode() + b"\n"
        for step in range(first, last + 1)
    )


def state(content: bytes) -> dict:
    return {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


# What is found at the start.


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 30))
def test_lines_up_to_a_step(step: int, more: int, torn: int) -> None:
    written = lines(1, step)
    data = written + lines(step + 1, step + more) + lines(9, 9)[:torn]
    for expected in (None, {}, state(written)):
        assert log.find([data], step, expected) == (written, True)


def test_one_of_several_files_has_all_lines() -> None:
    candidates = [lines(1, 3), lines(1, 5), lines(1, 2)]
    assert log.find(candidates, 5, state(lines(1, 5))) == (lines(1, 5), True)
    assert log.find(candidates, 5, None) == (lines(1, 5), True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-40],
        lambda data: data[:0],
        lambda data: data.replace(b'"step": 4', b'"step" 4'),
        lambda data: data.replace(b'"step": 4', b'"step": 3'),
        lambda data: data.replace(b"\n", b"\n\n", 3),
        lambda data: data.replace(b"\n", b"\0", 1),
        lambda data: b"\xff" + data,
        lambda data: data + data,
        lambda data: data[:20] + data,
        lambda data: b"[]\n3\nnull\n" + data,
        lambda data: b'{"step": true}\n{"step": 1e999}\n' + data,
        lambda data: b"[" * 100_000 + b"\n" + data,
    ],
)
def test_lines_of_a_damaged_file(damage: Callable[[bytes], bytes]) -> None:
    damaged = damage(lines(1, 9))
    # What is beyond the checksum is nobody's.
    expected = state(lines(1, 9))
    content, is_whole = log.find([damaged], 9, expected)
    if damaged.startswith(lines(1, 9)):
        assert (content, is_whole) == (lines(1, 9), True)
        return
    assert not is_whole
    steps = [json.loads(line)["step"] for line in content.splitlines()]
    assert steps == sorted(set(steps))
    assert set(content.splitlines()) <= set(lines(1, 9).splitlines()) | {
        line for line in damaged.splitlines() if line.startswith(b'{"step": 3')
    }


def test_a_flipped_bit_is_always_found() -> None:
    content, chance = lines(1, 20), random.Random(1)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        found = log.find([bytes(damaged)], 20, state(content))
        assert not found.is_whole
        assert found.lines.count(b"\n") >= 17


def test_a_damaged_line_is_found_without_a_checksum() -> None:
    damaged = lines(1, 4).replace(b'"step": 2', b'"step" 2')
    assert log.find([damaged], 4, None) == (
        lines(1, 1) + lines(3, 4),
        False,
    )


def test_files_that_are_put_aside_keep_apart(tmp_path: pathlib.Path) -> None:
    names = []
    for number in range(3):
        path = tmp_path / "metrics.jsonl"
        path.write_text(str(number))
        target = log.put_aside(str(path), str(tmp_path / "quarantine"))
        assert pathlib.Path(target).read_text() == str(number)
        names.append(os.path.basename(target))
    assert names == ["metrics.jsonl", "metrics-2.jsonl", "metrics-3.jsonl"]


# A disk that fails.


class Disk:
    """Stands for `files.append`: writes a part, and then there is no room."""

    def __init__(self) -> None:
        self.room: int | None = None
        self._append = files.append

    def append(self, path: str, data: bytes) -> None:
        if self.room is None or len(data) <= self.room:
            self._append(path, data)
            return
        self._append(path, data[: self.room])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(files, "append", made.append)
    return made


def test_lines_wait_for_room(tmp_path: pathlib.Path, disk: Disk) -> None:
    path = tmp_path / "log"
    written = log.Log(str(path), b"")
    written.write(lines(1, 2))
    disk.room = 10
    for step in (3, 4):
        written.write(lines(step, step))
        assert written.failure == "No space left on device"
        with pytest.raises(OSError, match="No space left"):
            written.sync()
        # What is there can be read, but for the end.
        assert path.read_bytes()[:-10] == lines(1, 2)
    assert written.state == state(lines(1, 4))
    disk.room = None
    written.write(lines(5, 5))
    assert written.failure == ""
    assert path.read_bytes() == lines(1, 5)
    written.sync()
    assert written.state == state(lines(1, 5))


@settings(max_examples=50)
@given(st.lists(st.none() | st.integers(0, 99), min_size=1, max_size=12))
def test_any_failures_lose_no_line(rooms: list[int | None]) -> None:
    disk = Disk()
    with (
        tempfile.TemporaryDirectory() as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(files, "append", disk.append)
        path = pathlib.Path(directory, "log")
        written = log.Log(str(path), b"")
        for step, room in enumerate(rooms, 1):
            disk.room = room
            written.write(lines(step, step))
        disk.room = None
        written.sync()
        assert path.read_bytes() == lines(1, len(rooms))


def test_file_whose_permission_is_taken(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log"
    written = log.Log(str(path), b"")
    written.write(lines(1, 1))
    # A directory stands for it, for root may write anything.
    path.rename(tmp_path / "moved")
    path.mkdir()
    written.write(lines(2, 2))
    assert written.failure
    path.rmdir()
    (tmp_path / "moved").rename(path)
    written.write(b"")
    assert path.read_bytes() == lines(1, 2)


def test_directory_that_vanishes(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run/log"
    path.parent.mkdir()
    written = log.Log(str(path), b"", is_temporary=True)
    written.write(lines(1, 3))
    path.unlink()
    path.parent.rmdir()
    written.sync()
    written.write(lines(4, 4))
    # The checksum says what is missing.
    assert path.read_bytes() == lines(4, 4)
    assert written.state == state(lines(1, 4))
    found = log.find([path.read_bytes()], 4, written.state)
    assert found == (lines(4, 4), False)


def test_log_goes_on(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(lines(1, 9))
    written = log.Log(str(path), lines(1, 5))
    assert path.read_bytes() == lines(1, 5)
    written.write(lines(6, 6))
    assert path.read_bytes() == lines(1, 6)
    assert written.state == state(lines(1, 6))
    log.Log(str(path), b"other\n")
    assert path.read_bytes() == b"other\n"


def test_log_without_a_line_makes_no_file(tmp_path: pathlib.Path) -> None:
    written = log.Log(str(tmp_path / "log"), b"")
    written.write(b"")
    written.sync()
    assert not list(tmp_path.iterdir())


def test_two_threads(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log"
    written = log.Log(str(path), b"")
    is_over = threading.Event()

    def sync() -> None:
        while not is_over.is_set():
            written.sync()

    thread = threading.Thread(target=sync)
    thread.start()
    for step in range(1, 301):
        written.write(lines(step, step))
    is_over.set()
    thread.join()
    assert path.read_bytes() == lines(1, 300)


# Copies to a store: here a directory, but for the last tests.


@pytest.fixture
def temporary(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
    made = tmp_path / "temporary"
    made.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    return made


def wait_for(path: pathlib.Path, content: bytes) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes() != content:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_spool_sends_whole_lines(
    tmp_path: pathlib.Path, temporary: pathlib.Path
) -> None:
    remote = tmp_path / "remote"
    (remote / "events").mkdir(parents=True)
    spool = log.Spool(str(remote))
    local = pathlib.Path(spool.path)
    (local / "events").mkdir()
    (local / "events/e").write_bytes(b"any\nbytes")
    (local / "a.jsonl").write_bytes(lines(1, 2) + b"{")
    spool.send()
    assert (remote / "a.jsonl").read_bytes() == lines(1, 2)
    assert (remote / "events/e").read_bytes() == b"any\nbytes"
    (local / "a.jsonl").write_bytes(lines(1, 4))
    spool.send_soon()
    wait_for(remote / "a.jsonl", lines(1, 4))
    (local / "a.jsonl").write_bytes(lines(1, 5))
    spool.close()
    assert (remote / "a.jsonl").read_bytes() == lines(1, 5)
    assert not list(temporary.iterdir())


def test_spool_sends_what_is_new_alone(
    tmp_path: pathlib.Path,
    temporary: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del temporary
    sent = []
    monkeypatch.setattr(
        files, "write", lambda path, data: sent.append((path, data))
    )
    spool = log.Spool(str(tmp_path))
    for name, data in (("a", b""), ("b", b"1"), ("c", b"1")):
        pathlib.Path(spool.path, name).write_bytes(data)
    spool.send()
    pathlib.Path(spool.path, "c").write_bytes(b"12")
    spool.send()
    spool.send()
    assert [os.path.basename(path) for path, _ in sent] == ["a", "b", "c", "c"]
    spool.close()


def test_spool_that_could_not_be_sent_is_found_again(
    tmp_path: pathlib.Path,
    temporary: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "a.jsonl").write_bytes(lines(1, 2))

    def fail(path: str, data: bytes) -> None:
        raise files.StoreError(f"{path} {len(data)}", "UnavailableError")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", fail)
        spool = log.Spool(str(remote))
        pathlib.Path(spool.path, "a.jsonl").write_bytes(lines(1, 4))
        with pytest.raises(files.StoreError):
            spool.send()
        spool.close()
        assert spool.failure
    log.Spool(str(tmp_path / "another")).close()
    again = log.Spool(str(remote))
    assert again.candidates("a.jsonl") == [lines(1, 4), lines(1, 2)]
    again.forget()
    assert [path.name for path in temporary.iterdir()] == [
        os.path.basename(again.path)
    ]
    again.close()


def fill(remote: str, num_steps: int) -> str:
    """Writes a line after another; each is wanted in the store."""
    spool = log.Spool(remote)
    written = log.Log(f"{spool.path}/a.jsonl", b"")
    for step in range(1, num_steps + 1):
        written.write(lines(step, step))
        spool.send_soon()
    written.sync()
    if num_steps < 50:
        spool.close()
    return spool.path


def collect(remote: str, num_steps: int) -> list:
    spool = log.Spool(remote)
    candidates = spool.candidates("a.jsonl")
    found = log.find(candidates, num_steps, state(lines(1, num_steps)))
    spool.forget()
    spool.close()
    return [len(candidates), found.is_whole]


def test_spool_to_the_emulator(temporary: pathlib.Path) -> None:
    with object_store.ObjectStore(rate=0.1, seed=5) as store:
        environment = runs.environment(
            **store.environment(), TMPDIR=str(temporary)
        )
        with object_store.Client(environment) as client:
            client.call(fill, "gs://bucket/run", 40)
            assert not list(temporary.glob("dtrain-*"))
            assert store.read("run/a.jsonl") == lines(1, 40)
            path = client.call(fill, "gs://bucket/run", 60)
        # The client is killed, and has written to its disk alone.
        assert os.path.exists(path)
        store.write("run/a.jsonl", lines(1, 7))
        with object_store.Client(environment) as client:
            found = client.call(collect, "gs://bucket/run", 60)
        assert found == [2, True]
        assert not list(temporary.glob("dtrain-*"))


def test_no_room_on_a_real_disk(tmp_path: pathlib.Path) -> None:
    """A limit on the size of a file stands for the disk: no root needed."""
    program = (
        "import sys\n"
        "from dtrain.record import log\n"
        "from tests.log_test import lines\n"
        "written = log.Log(sys.argv[1], b'')\n"
        "for step in range(1, 201):\n"
        "    written.write(lines(step, step))\n"
        "print(written.failure)\n"
    )
    (tmp_path / "program.py").write_text(program)
    process = subprocess.run(
        [
            "bash",
            "-c",
            f"ulimit -f 4; exec {sys.executable} {tmp_path}/program.py "
            f"{tmp_path}/log",
        ],
        env=runs.environment(TF_CPP_MIN_LOG_LEVEL="3"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == "File too large\n"
    held = (tmp_path / "log").read_bytes()
    whole = held[: held.rfind(b"\n") + 1]
    assert lines(1, 200).startswith(held)
    written = log.Log(str(tmp_path / "log"), whole)
    first = whole.count(b"\n") + 1
    written.write(lines(first, 200))
    assert (tmp_path / "log").read_bytes() == lines(1, 200)


def test_what_others_leave_in_tmpdir(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the name that a killed process would have left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    remote = f"file://{tmp_path}/remote"
    spool = log.Spool(remote)
    spool.close()
    start = f"{spool.path[:-8]}"
    os.symlink("/nowhere", f"{start}00000000")
    pathlib.Path(f"{start}11111111").touch()
    spool = log.Spool(remote)
    assert spool.candidates("metrics.jsonl") == []
    spool.forget()
    spool.close()
    assert os.path.lexists(f"{start}00000000")
