"""Files and locks of a disk, and what an object store's errors become."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import stat
import subprocess
import sys
import tempfile

import pytest
import tensorflow as tf

from dtrain.cluster import workers
from dtrain.errors import StorageError, UserError
from dtrain.storage import files, locks, temporary
from tests import runs

ERRORS = {
    "UnavailableError": tf.errors.UnavailableError,
    "DeadlineExceededError": tf.errors.DeadlineExceededError,
    "AbortedError": tf.errors.AbortedError,
    "CancelledError": tf.errors.CancelledError,
    "NotFoundError": tf.errors.NotFoundError,
    "PermissionDeniedError": tf.errors.PermissionDeniedError,
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_store_fails_with_an_os_error(kind: str) -> None:
    text = "{{node a}} the store\nis away [Op:ReadFile]"
    error = ERRORS[kind](None, None, text)
    with pytest.raises(files.StoreError) as raised, files.os_errors():
        raise error
    assert isinstance(raised.value, OSError)
    assert raised.value.kind == kind
    assert raised.value.__cause__ is error
    assert files.reason(raised.value) == files.reason(error) == "the store"
    is_missing = isinstance(raised.value, FileNotFoundError)
    assert is_missing == (kind == "NotFoundError")
    # It has the kind of error that a lost worker causes.
    assert not workers.is_lost_worker(raised.value)


def test_what_says_nothing_is_told_by_its_kind() -> None:
    error = tf.errors.UnavailableError(None, None, "")
    assert files.reason(files.store_error(error)) == "UnavailableError"


@pytest.mark.parametrize(
    "error", [OSError("no\nspace"), files.StoreError("no", "UnknownError")]
)
def test_what_fails_is_said(error: Exception) -> None:
    with (
        pytest.raises(StorageError, match="gs://bucket/a: no"),
        files.storage_errors("gs://bucket/a"),
    ):
        raise error


def test_what_is_a_mistake_of_ours_stays_one() -> None:
    with pytest.raises(KeyError), files.storage_errors("gs://bucket/a"):
        raise KeyError("a")


def test_a_directory_is_made_of_many(tmp_path: pathlib.Path) -> None:
    files.make_directory(str(tmp_path / "a" / "b"))
    files.write(str(tmp_path / "c" / "d" / "e"), b"1", make_parents=True)
    assert (tmp_path / "a" / "b").is_dir()
    assert (tmp_path / "c" / "d" / "e").read_bytes() == b"1"


def test_a_file_is_in_the_way_of_a_directory(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").write_text("")
    for path in ("a", "a/b"):
        with pytest.raises(NotADirectoryError, match=r"/a is no directory"):
            files.make_directory(str(tmp_path / path))


@pytest.mark.parametrize("is_durable", [False, True])
def test_a_write_is_whole_or_leaves_nothing(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    is_durable: bool,
) -> None:
    path = str(tmp_path / "a")
    for data in (b"one", b"two"):
        files.write(path, data, is_durable=is_durable)
        assert files.read(path) == data

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="gone"):
        files.write(path, b"three", is_durable=is_durable)
    assert files.read(path) == b"two"
    assert files.names(str(tmp_path)) == ["a"]


def test_a_device_stays_one() -> None:
    files.write("/dev/null", b"nothing")
    assert pathlib.Path("/dev/null").is_char_device()


def test_what_is_not_there(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("none", "file/none"):
        path = str(tmp_path / name)
        assert files.names(path) == []
        assert files.stat(path) is files.size(path) is files.read(path) is None
        assert not files.exists(path)
        assert not files.is_directory(path)
    files.remove(str(tmp_path / "none"))
    files.remove_tree(str(tmp_path / "none"))


def test_a_lock_keeps_others_out(tmp_path: pathlib.Path) -> None:
    path, flags = str(tmp_path / "lock"), os.O_RDWR | os.O_CREAT
    with locks.held(path, flags) as is_locked:
        assert is_locked
        for shared in (False, True):
            with (
                pytest.raises(BlockingIOError),
                locks.held(path, flags, shared=shared),
            ):
                pass
    with (
        locks.held(path, flags, shared=True),
        locks.held(path, os.O_RDONLY, shared=True) as is_locked,
    ):
        assert is_locked


def test_a_disk_without_locks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    with locks.held(str(tmp_path), os.O_RDONLY) as is_locked:
        assert not is_locked


# Temporary directories.


@pytest.fixture
def place(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
    """Is TMPDIR, and nobody has swept it yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(temporary, "_SWEPT", set())
    return tmp_path


def test_what_a_killed_process_left_is_swept_and_nothing_else(
    place: pathlib.Path,
) -> None:
    source = (
        "import os, sys, time\n"
        "from dtrain.storage import temporary\n"
        "with temporary.directory('a') as path:\n"
        "    open(f'{path}/file', 'w').close()\n"
        "    print(path, flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = runs.environment(TMPDIR=str(place))
    start = [sys.executable, "-c", source]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(start, env=environment, stdout=pipe) as alive,
        subprocess.Popen(start, env=environment, stdout=pipe) as killed,
    ):
        left, kept = (
            pathlib.Path(process.stdout.readline().decode().strip())
            for process in (killed, alive)
        )
        killed.kill()
        killed.wait()
        name = left.name.rpartition("-")[0]
        precious = place / "precious"
        precious.mkdir()
        (precious / "thesis").touch()
        (place / f"{name}-link").symlink_to(precious)
        (place / f"{name}-dangling").symlink_to("/nonexistent/x")
        (place / f"{name}-file").touch()
        (place / "dtrain-of-somebody").mkdir()
        before = {path.name for path in place.iterdir()}
        with temporary.directory("b") as made:
            assert stat.S_IMODE(os.stat(made).st_mode) == 0o700
            after = {path.name for path in place.iterdir()}
        assert after == before - {left.name} | {os.path.basename(made)}
        assert (kept / "file").exists()
        assert (precious / "thesis").exists()
        alive.kill()
    assert not os.path.exists(made)


def test_what_is_swept_while_it_is_made_is_made_anew(
    place: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has swept before there was a lock."""
    made: list[str] = []
    make = tempfile.mkdtemp

    def make_and_sweep(**options: str) -> str:
        made.append(make(**options))
        if len(made) == 1:
            temporary.sweep()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_sweep)
    with temporary.directory("a") as path:
        assert [path] == made[1:]
        assert [each.name for each in place.iterdir()] == [
            os.path.basename(path)
        ]


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_strangers_directory_is_in_nobodys_way(place: pathlib.Path) -> None:
    theirs = place / f"dtrain-{os.getuid()}-a-x"
    theirs.mkdir(0o700)
    os.chown(theirs, 33, 33)
    with temporary.directory("a") as made:
        assert os.path.isdir(made)
    assert theirs.exists()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_new_name_is_given_to_one_alone(
    kind: str, tmp_path: pathlib.Path
) -> None:
    """The other was there first, or came while this one was written."""
    target = tmp_path / "deep" / "new"

    def write(written: str, text: str) -> None:
        path = pathlib.Path(written)
        if kind == "directory":
            path.mkdir()
            path = path / "inside"
        path.write_text(text)

    def write_both() -> None:
        with temporary.becoming(str(target)) as late:
            write(late, "late")
            with temporary.becoming(str(target)) as first:
                write(first, "first")

    for _ in range(2):
        with pytest.raises(UserError, match="new is there already, and"):
            write_both()
    [left] = (tmp_path / "deep").iterdir()
    inside = left / "inside" if kind == "directory" else left
    assert inside.read_text() == "first"


def test_a_disk_without_links_has_new_files_too(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    for text in ("first", "late"):
        with (
            contextlib.suppress(UserError),
            temporary.becoming(f"{tmp_path}/new") as written,
        ):
            pathlib.Path(written).write_text(text)
            (tmp_path / "new").touch() if text == "late" else None
    assert (tmp_path / "new").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_import_needs_no_room_on_a_disk() -> None:
    """Not even a TMPDIR in which anybody may write."""
    source = (
        "import tempfile\n"
        "tempfile.gettempdir = lambda: 1 / 0\n"
        "from dtrain.storage import startup\n"
        "with startup.quiet():\n"
        "    pass\n"
    )
    subprocess.run(
        [sys.executable, "-c", source], check=True, env=runs.environment()
    )
