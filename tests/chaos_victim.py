"""The run that `tests.chaos` breaks, its supervisors and what they stand on."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from dtrain import errors
from dtrain.cluster.environment import Cluster
from tests import network, runs

AGENT = pathlib.Path(__file__).parent / "chaos_agent"
NUM_WORKERS = 2
# Enough to be started, found stuck, and started again.
PATIENCE_SECS = 240.0
# What takes longer is a hang.
HANG_SECS = 15


class Victim:
    """A run that is supervised, and started again when its supervisor ends.

    Attributes:
        disk: where the run's directory is.
        tmp: TMPDIR of all its processes.
        run_dir: of the run, which may move.
        orders: where the agents and the layer below them find what to do.
        hosts: how many there are.
        network: that connects them.
        launchers: the supervisors, one on each host.
        readers: of what each of them prints.
        ends: of the supervisors, by exit code.
    """

    def __init__(self, place: pathlib.Path, hosts: int) -> None:
        self.place = place
        self.disk, self.tmp = place / "disk", place / "tmp"
        self.run_dir = self.disk / "run"
        self.orders = place / "orders"
        for directory in (self.disk, self.tmp, self.orders):
            directory.mkdir(parents=True, exist_ok=True)
        self.hosts = hosts
        self.network = network.Network(_names(hosts))
        self.launchers: list[subprocess.Popen[bytes]] = []
        self.readers: list[subprocess.Popen[bytes]] = []
        self.ends: collections.Counter[int] = collections.Counter()
        self._layer = _compile(place / "failing_read.so")

    @property
    def can_fail_reads(self) -> bool:
        """Whether there is a layer below the run that makes a read fail."""
        return self._layer is not None

    def flags(self) -> list[str]:
        return [
            "--batch_size=8",
            "--base_channels=2",
            "--latent_size=4",
            "--sample_every_steps=0",
            "--steps_per_loop=20",
            "--reduction=ordered",
            "--micro_batches=4",
            f"--run_dir={self.run_dir}",
            "--num_steps=10000000",
            "--checkpoint_every_steps=500",
            "--backup_every_secs=1",
            f"--hang_timeout_secs={HANG_SECS}",
        ]

    def start(self) -> None:
        """Starts a supervisor on each host."""
        started = [self._start(host) for host in range(self.hosts)]
        self.launchers = [launcher for launcher, _ in started]
        self.readers = [reader for _, reader in started]

    def _start(
        self, host: int
    ) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
        workers = NUM_WORKERS if self.hosts == 1 else 1
        environment = runs.environment(
            PYTHONPATH=f"{AGENT}:{runs.ROOT}",
            DTRAIN_CHAOS_DIR=str(self.orders),
            TMPDIR=str(self.tmp),
        )
        if self._layer:
            environment["LD_PRELOAD"] = str(self._layer)
        command = [
            *(sys.executable, "-m", "launch.main"),
            *(f"--num_workers={workers}", "--max_restarts=1000000", "--"),
            *self.flags(),
        ]
        if self.hosts > 1:
            names = [f"{name}:9000" for name in _names(self.hosts)]
            cluster = Cluster(tuple(names), host)
            environment["TF_CONFIG"] = cluster.to_tf_config()
            command.append("--strategy=multi_worker")
        reader = subprocess.Popen(
            ["tee", "-a", str(self.place / "output.txt")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        assert reader.stdin
        with reader.stdin:
            launcher = subprocess.Popen(
                [*self.on(host), *command],
                cwd=runs.ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=reader.stdin,
                stderr=subprocess.STDOUT,
            )
        return launcher, reader

    def on(self, host: int) -> list[str]:
        """Returns what runs the command behind it on a host."""
        return self.network.on(host) if self.hosts > 1 else []

    def revive(self) -> None:
        """Starts the supervisors that have ended, as a scheduler would."""
        for host, launcher in enumerate(self.launchers):
            if launcher.poll() is not None:
                self.ends[launcher.returncode] += 1
                assert launcher.returncode not in (
                    errors.FINISHED,
                    errors.USER_ERROR,
                ), self.tail()
                # It ends with what it reads, or is dead already.
                self.readers[host].wait()
                self.launchers[host], self.readers[host] = self._start(host)

    def workers(self) -> list[int]:
        """Returns the processes that train."""
        return [
            worker
            for launcher in self.launchers
            for worker in children(launcher.pid)
        ]

    def order(self, command: str, worker: int) -> None:
        """Has the agent in a worker do something."""
        path = self.orders / f"{worker}.new"
        path.write_text(command)
        path.rename(self.orders / str(worker))

    def step(self) -> int:
        """Returns the step of the newest line of metrics.jsonl."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            lines = (self.run_dir / "metrics.jsonl").read_bytes().splitlines()
            return json.loads(lines[-1])["step"]
        return 0

    def saves(self) -> list[pathlib.Path]:
        """Returns the data of all saves, the newest last."""
        found = [
            path
            for tier in ("backup", "checkpoints")
            for path in self.run_dir.glob(f"{tier}/ckpt-*.data*")
        ]
        return sorted(found, key=lambda path: int(path.stem[len("ckpt-") :]))

    def stop(self) -> int:
        """Has the run save and end; returns the step."""
        self.revive()
        deadline = time.monotonic() + PATIENCE_SECS
        while any(each.poll() is None for each in self.launchers):
            assert time.monotonic() < deadline, self.tail()
            # Again, for a supervisor that was starting has removed it.
            finish("dtrain.stop", f"--run_dir={self.run_dir}")
            time.sleep(3)
        for launcher in self.launchers:
            assert launcher.returncode == errors.RUN_AGAIN, self.tail()
        [*_, newest] = sorted(
            int(path.name[len("ckpt-") : -len(".index")])
            for path in self.run_dir.glob("checkpoints/ckpt-*.index")
        )
        return newest

    def end(self) -> None:
        """Kills what is left, after a failure."""
        for launcher in self.launchers:
            kill(launcher)
        for reader in self.readers:
            reader.kill()
            reader.wait()

    def tail(self) -> str:
        """Returns the end of what was printed."""
        text = (self.place / "output.txt").read_text(errors="replace")
        lines = [line for line in text.splitlines() if line]
        return "\n".join(["", *lines[-60:]])


def _names(num_hosts: int) -> list[str]:
    return [f"host{index}" for index in range(num_hosts)]


def _compile(path: pathlib.Path) -> pathlib.Path | None:
    """Compiles the layer that makes a read fail, where there is a compiler."""
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(path)]
    with contextlib.suppress(FileNotFoundError):
        source = str(AGENT / "failing_read.c")
        compiled = subprocess.run(
            [*command, source, "-ldl"], capture_output=True
        )
        return None if compiled.returncode else path
    return None


def children(pid: int) -> list[int]:
    """Returns the processes that a process has started."""
    try:
        path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
        return [int(child) for child in path.read_text().split()]
    except OSError:
        return []


def kill(launcher: subprocess.Popen[bytes]) -> None:
    """Ends a supervisor and its workers, which save nothing."""
    for pid in (*children(launcher.pid), launcher.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()


def finish(module: str, *arguments: str) -> None:
    """Runs a program, for as long as it takes."""
    # As many steps as were done in all the minutes.
    code, output = runs.finish(runs.start(module, *arguments), timeout=None)
    assert code == errors.FINISHED, output


@contextlib.contextmanager
def small_disk(place: pathlib.Path) -> Iterator[bool]:
    """Puts a disk of 64 MB below a directory, if this is root."""
    place.mkdir(parents=True, exist_ok=True)
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)],
            capture_output=True,
        ).returncode
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
