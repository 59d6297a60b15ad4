"""A run goes on when its disk is full, read-only, forbidden or gone."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import tensorflow as tf

from dtrain import errors
from dtrain.checkpoint import manager as checkpoint_lib
from dtrain.checkpoint import retention
from dtrain.checkpoint.directory import INDEX, MANIFEST, CheckpointDirectory
from dtrain.errors import StorageError
from tests import faults, requirement, runs

FAILED = re.compile(r"the save failed: .*; training goes on from what was ")


# Real disks.


class Disk:
    """A small file system of its own."""

    def __init__(self, path: pathlib.Path, size: str) -> None:
        self.path = path
        path.mkdir()
        options = f"size={size},mode=755"
        try:
            _mount("-t", "tmpfs", "-o", options, "none", str(path))
        except (OSError, subprocess.CalledProcessError):
            requirement.missing("mount, and the right to use it: be root")

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        path = self.path / "full"
        with path.open("wb", buffering=0) as file:
            # Others free a page now and then.
            stop = threading.Event()

            def fill() -> None:
                while not stop.is_set():
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        stop.wait(0.001)

            thread = threading.Thread(target=fill)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
                path.unlink()

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        # Refused while a file is being written.
        for _ in range(200):
            with contextlib.suppress(subprocess.CalledProcessError):
                _mount("-o", "remount,ro", str(self.path))
                break
            time.sleep(0.01)
        else:
            raise AssertionError(_open_files(self.path))
        try:
            yield
        finally:
            _mount("-o", "remount,rw", str(self.path))

    @contextlib.contextmanager
    def forbidden(self) -> Iterator[None]:
        self.path.chmod(0)
        try:
            yield
        finally:
            self.path.chmod(0o755)

    @contextlib.contextmanager
    def gone(self) -> Iterator[None]:
        """Only a file is where the directory was."""
        aside = self.path / "aside"
        aside.mkdir()
        moved = [each for each in self.path.iterdir() if each != aside]
        for each in moved:
            each.rename(aside / each.name)
            each.touch()
        try:
            yield
        finally:
            for each in moved:
                each.unlink()
                (aside / each.name).rename(each)
            aside.rmdir()


def _open_files(path: pathlib.Path) -> list[str]:
    """Lists the files of a disk that any process has open."""
    found = []
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target.startswith(f"{path}/"):
                found.append(f"{link} {target}")
    return sorted(found)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, stderr=subprocess.PIPE)


@contextlib.contextmanager
def mounted(path: pathlib.Path, size: str = "6m") -> Iterator[Disk]:
    disk = Disk(path, size)
    try:
        yield disk
    finally:
        disk.close()


# Real runs.


class Run:
    """A run that saves all the time."""

    def __init__(
        self, run_dir: pathlib.Path, flags: Sequence[str], backups: str
    ) -> None:
        self.run_dir = run_dir
        self._pattern = backups
        self.lines: list[str] = []
        # Root without the powers that let it write anywhere.
        powerless = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
        self._process = subprocess.Popen(
            [
                *powerless,
                *(sys.executable, "-m", "dtrain.main"),
                *runs.SMALL,
                f"--run_dir={run_dir}",
                "--num_steps=100000000",
                "--checkpoint_every_steps=0",
                "--backup_every_secs=0.05",
                *flags,
            ],
            cwd=runs.ROOT,
            env=runs.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.lines.append(line.rstrip())

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self._process.poll() is None, self.finish()
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.01)

    def finish(self) -> tuple[int, list[str]]:
        """Waits for its end; returns its code and its last lines."""
        self._process.wait(timeout=120)
        self._reader.join()
        return self._process.returncode, self.lines

    def stop(self) -> tuple[int, list[str]]:
        self._process.send_signal(signal.SIGTERM)
        return self.finish()

    def kill(self) -> None:
        self._process.kill()
        self.finish()

    @property
    def num_failures(self) -> int:
        return sum(bool(FAILED.match(line)) for line in list(self.lines))

    @property
    def num_lines(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for_failures(self, number: int) -> None:
        before = self.num_failures
        self.wait_for(lambda: self.num_failures >= before + number)

    @property
    def backups(self) -> CheckpointDirectory:
        found = glob.glob(self._pattern)
        return CheckpointDirectory(found[0] if found else self._pattern)

    @property
    def newest(self) -> int:
        return max(self.backups.steps(), default=0)

    def wait_for_saves(self, number: int = 2) -> None:
        """Waits for states that are newer than all so far."""
        for _ in range(number):
            before = self.newest
            self.wait_for(lambda before=before: self.newest > before)

    def check_backups(self) -> None:
        """Checks that there are some, all of them good."""
        assert self.backups.steps()
        for step in self.backups.steps():
            self.backups.verify(step)


@contextlib.contextmanager
def started(
    run_dir: pathlib.Path, *flags: str, backups: str = ""
) -> Iterator[Run]:
    if shutil.which("setpriv") is None:
        requirement.missing("setpriv, which is in Debian's util-linux")
    run = Run(run_dir, flags, backups or f"{run_dir}/backup")
    try:
        yield run
    finally:
        run.kill()


def names(path: pathlib.Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


def expected_names(directory: CheckpointDirectory) -> set[str]:
    """What is in a directory between two saves, beside the lock of a claim."""
    return {"checkpoint"} | {
        f"ckpt-{step}.{suffix}"
        for step in directory.steps()
        for suffix in ("data-00000-of-00001", INDEX, MANIFEST)
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    with mounted(tmp_path_factory.mktemp("home") / "mounted") as made:
        yield made


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    with mounted(tmp_path_factory.mktemp("disk") / "mounted") as made:
        yield made


@pytest.fixture(scope="module")
def run(home: Disk, disk: Disk) -> Iterator[Run]:
    """A run with its directory on one disk, and its backups on another one.

    In its own directory it has files open, so that one cannot be read-only.
    """
    with started(
        home.path / "run",
        f"--backup_dir={disk.path}/ssd",
        backups=f"{disk.path}/ssd/run-*/worker-0",
    ) as made:
        made.wait_for_saves(3)
        yield made


@pytest.mark.parametrize("fault", ["full", "read_only", "forbidden", "gone"])
def test_a_run_goes_on(fault: str, home: Disk, disk: Disk, run: Run) -> None:
    run.wait_for_saves()
    aside = run.backups.quarantined()
    counts = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(getattr(disk, fault)())
        if fault == "full":
            stack.enter_context(home.full())
        run.wait_for_failures(2)
        num_lines = run.num_lines
        for _ in range(3):
            run.wait_for_failures(2)
            counts.append(len(names(disk.path)) + len(names(home.path)))
        # They wait for room.
        assert fault == "full" or run.num_lines > num_lines
        # Nothing more with each try.
        assert max(counts) <= counts[0] + 3
        if fault != "gone":
            run.check_backups()
            assert run.backups.quarantined() == aside
    run.wait_for_saves()
    run.wait_for(
        lambda: {*os.listdir(run.backups.path)} == expected_names(run.backups)
    )


def test_backups_that_somebody_removed(disk: Disk, run: Run) -> None:
    run.wait_for_saves()
    failures = run.num_failures
    # At once: the run goes on.
    aside = disk.path / "aside"
    os.rename(run.backups.path, aside)
    shutil.rmtree(aside)
    run.wait_for_saves(4)
    # Of those that were in the middle of it.
    assert run.num_failures <= failures + 2
    before = run.num_failures
    run.wait_for_saves(4)
    assert run.num_failures == before


# Ends the run, so it is the last of its tests.
def test_the_last_save_of_a_run_fails(home: Disk, disk: Disk, run: Run) -> None:
    run.wait_for_saves()
    with home.full(), disk.full():
        run.wait_for_failures(2)
        code, lines = run.stop()
        check_end(code, lines)
        assert lines[-1].startswith(f"error: {run.run_dir}/checkpoints: ")
        run.check_backups()
    # Whatever happened to their disk before.
    *whole, _ = (run.run_dir / "metrics.jsonl").read_bytes().split(b"\n")
    steps = [json.loads(line)["step"] for line in whole]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= run.newest


def check_end(code: int, lines: list[str]) -> None:
    """Checks that a run has told, in one line, why it had to end."""
    assert code == errors.STORAGE_FAILED, lines
    assert "No space left on device" in lines[-1]
    assert [line for line in lines if line.startswith("error")] == lines[-1:]
    assert not any("Traceback" in line for line in lines)


def test_a_run_that_is_to_stop(tmp_path: pathlib.Path) -> None:
    """And all of it is on the disk, its metrics too."""
    with (
        mounted(tmp_path / "mounted") as disk,
        started(disk.path / "run", "--on_save_error=stop") as run,
    ):
        run.wait_for_saves()
        with disk.full():
            code, lines = run.finish()
        check_end(code, lines)
        assert not any(FAILED.match(line) for line in lines)
        run.check_backups()
        # What is not there is not expected.
        assert run.num_lines >= run.newest


# Disks that fail at one point.


def make_state(step: int) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(
        step=tf.Variable(step, dtype=tf.int64),
        weights=tf.Variable(tf.fill([99], float(step))),
    )


class Saver:
    """Saves states by their step, and reads them back."""

    def __init__(self, path: pathlib.Path) -> None:
        self.state = make_state(0)
        self.path = path
        self.manager = checkpoint_lib.CheckpointManager(
            self.state, str(path), (retention.Last(2),)
        )

    def save(self, step: int) -> None:
        self.state.step.assign(step)
        self.state.weights.assign(tf.fill([99], float(step)))
        self.manager.save(step, wait=True)

    def check(self) -> list[int]:
        directory = self.manager.directory
        for step in directory.steps():
            made = directory.verify(step)
            assert made.step == step
            read = make_state(-1)
            read.restore(directory.prefix(step)).assert_consumed()
            assert int(read.step) == step
            assert set(read.weights.numpy()) == {step}
        assert not directory.quarantined()
        return directory.steps()


NUMBERS = [errno.ENOSPC, errno.EIO]


@pytest.mark.parametrize("number", NUMBERS, ids=["ENOSPC", "EIO"])
def test_a_save_fails_at_every_point(
    number: int, tmp_path: pathlib.Path
) -> None:
    """At one point only; and the next save has what it needs."""
    saver = Saver(tmp_path / "whole")
    saver.save(1)
    saver.save(2)
    with faults.Faults().injected() as layer:
        saver.save(3)
    for at, point in enumerate(layer.points):
        saver = Saver(tmp_path / str(at))
        saver.save(1)
        saver.save(2)
        failure = ""
        try:
            with faults.Faults(at, faults.fail(number)).injected():
                saver.save(3)
        except StorageError as error:
            failure = str(error)
        # One that is there may be reported as failed, not the reverse.
        assert os.strerror(number) in failure or 3 in saver.check(), point
        assert {2, 3} & {*saver.check()}, point
        saver.save(4)
        assert saver.check() in ([2, 4], [3, 4]), point
        assert {*os.listdir(saver.path)} - {".lock"} == expected_names(
            saver.manager.directory
        ), point
        saver.manager.close()


@pytest.mark.parametrize("number", NUMBERS, ids=["ENOSPC", "EIO"])
def test_a_disk_that_stays_broken(number: int, tmp_path: pathlib.Path) -> None:
    saver = Saver(tmp_path / "whole")
    for step in (1, 2):
        saver.save(step)
    with faults.Faults().injected() as layer:
        saver.save(3)
    for at, point in enumerate(layer.points):
        saver = Saver(tmp_path / str(at))
        for step in (1, 2):
            saver.save(step)
        with contextlib.ExitStack() as stack:

            def breaks(stack: contextlib.ExitStack = stack) -> None:
                stack.enter_context(faults.broken(number))
                faults.fail(number)()

            stack.enter_context(faults.Faults(at, breaks).injected())
            for step in (3, 4):
                with contextlib.suppress(StorageError):
                    saver.save(step)
            assert {2, 3} & {*saver.check()}, point
        saver.save(5)
        assert saver.check() in ([2, 5], [3, 5]), point
        assert {*os.listdir(saver.path)} - {".lock"} == expected_names(
            saver.manager.directory
        ), point
        saver.manager.close()


def test_a_checkpoint_that_somebody_removed(tmp_path: pathlib.Path) -> None:
    saver = Saver(tmp_path)
    saver.save(1)
    saver.save(2)
    for path in tmp_path.glob("ckpt-1.*"):
        path.unlink()
    saver.save(3)
    saver.save(4)
    assert saver.check() == [3, 4]
    saver.manager.close()
