"""Breaks a real run, again and again, and compares its bits with a whole one.

    python -m tests.chaos --minutes=10 --mean_secs=60
    python -m tests.chaos --faults=kill,stuck,link --hosts=2 --minutes=5

The run is started by `launch.main`, as a user would; two workers on this
machine, or one on each of two hosts, which are network namespaces. A fault is
drawn at random, and the next one as many seconds later as an exponential
distribution says; with --several, up to three come at once. When the time is
over the run is told to stop, and another one, that nothing happens to, trains
as many steps: both must end with the same SHA-256 of all state, and with the
same metrics.jsonl.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from dtrain import errors, flags, report
from dtrain.cluster.environment import Cluster
from dtrain.record import goodput
from dtrain.storage import startup
from tests import network, runs
from tests.benchmarks import goodput as benchmark

_HELP = """usage: python -m tests.chaos [--flag=value ...]

  --minutes      (default: 3)     how long the run is broken
  --mean_secs    (default: 20)    seconds between two faults, on average
  --faults       (default: all)   kinds, as in kill,stuck; see below
  --[no]several  (default: false) up to three faults at once
  --hosts        (default: 1)     2: each worker on a host of its own (root)
  --seed         (default: 0)     of all that is random here
  --keep         (default: "")    directory to keep the runs in

Kinds of fault:
"""

AGENT = pathlib.Path(__file__).parent / "chaos_agent"
_NUM_WORKERS = 2
_HANG_SECS = 15
# Enough to be started, found stuck, and started again.
_PATIENCE_SECS = 240.0


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says; see `_HELP`."""

    minutes: float = 3.0
    mean_secs: float = 20.0
    faults: str = "all"
    several: bool = False
    hosts: int = 1
    seed: int = 0
    keep: str = ""


class Victim:
    """A run that is supervised, and started again when its supervisor ends."""

    def __init__(self, place: pathlib.Path, options: Options) -> None:
        self.place = place
        self.run_dir = place / "disk" / "run"
        self.orders = place / "orders"
        self.orders.mkdir(parents=True)
        self.hosts = options.hosts
        self.network = network.Network(_names(options.hosts))
        self.launchers: list[subprocess.Popen[bytes]] = []
        self.output = (place / "output.txt").open("wb")
        # Of the supervisors, by exit code.
        self.ends: collections.Counter[int] = collections.Counter()

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
            f"--hang_timeout_secs={_HANG_SECS}",
        ]

    def start(self) -> None:
        """Starts a supervisor on each host."""
        self.launchers = [self._start(host) for host in range(self.hosts)]

    def _start(self, host: int) -> subprocess.Popen[bytes]:
        workers = _NUM_WORKERS if self.hosts == 1 else 1
        environment = runs.environment(
            PYTHONPATH=f"{AGENT}:{runs.ROOT}",
            DTRAIN_CHAOS_DIR=str(self.orders),
        )
        command = [
            *(sys.executable, "-m", "launch.main"),
            *(f"--num_workers={workers}", "--max_restarts=1000000", "--"),
            *self.flags(),
        ]
        if self.hosts > 1:
            names = [f"{name}:9000" for name in _names(self.hosts)]
            cluster = Cluster(tuple(names), host)
            environment["TF_CONFIG"] = cluster.to_tf_config()
            command = [*self.network.on(host), *command]
            command.append("--strategy=multi_worker")
        return subprocess.Popen(
            command,
            cwd=runs.ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def revive(self) -> None:
        """Starts the supervisors that have ended, as a scheduler would."""
        for host, launcher in enumerate(self.launchers):
            if launcher.poll() is not None:
                self.ends[launcher.returncode] += 1
                assert launcher.returncode not in (
                    errors.FINISHED,
                    errors.USER_ERROR,
                ), self.tail()
                self.launchers[host] = self._start(host)

    def workers(self) -> list[int]:
        """Returns the processes that train."""
        return [
            worker
            for launcher in self.launchers
            for worker in _children(launcher.pid)
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
        deadline = time.monotonic() + _PATIENCE_SECS
        while any(each.poll() is None for each in self.launchers):
            assert time.monotonic() < deadline, self.tail()
            # Again, for a supervisor that was starting has removed it.
            _run("dtrain.stop", f"--run_dir={self.run_dir}")
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
            for pid in (*_children(launcher.pid), launcher.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            launcher.wait()
        self.output.close()

    def tail(self) -> str:
        """Returns the end of what was printed."""
        lines = (self.place / "output.txt").read_text(errors="replace")
        return "\n".join(["", *lines.splitlines()[-60:]])


def _names(num_hosts: int) -> list[str]:
    return [f"host{index}" for index in range(num_hosts)]


def _children(pid: int) -> list[int]:
    try:
        path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
        return [int(child) for child in path.read_text().split()]
    except OSError:
        return []


def _run(module: str, *arguments: str) -> None:
    # As many steps as were done in all the minutes.
    code, output = runs.finish(runs.start(module, *arguments), timeout=None)
    assert code == errors.FINISHED, output


# Faults. Each is done to a worker, a supervisor or the run's directory.

Fault = Callable[[Victim, random.Random], None]


def _kill(number: int) -> Fault:
    def fault(victim: Victim, rng: random.Random) -> None:
        workers = victim.workers()
        if workers:
            os.kill(rng.choice(workers), number)

    return fault


def _agent(command: str) -> Fault:
    def fault(victim: Victim, rng: random.Random) -> None:
        workers = victim.workers()
        if workers:
            victim.order(command, rng.choice(workers))

    return fault


def _supervisor(number: int) -> Fault:
    def fault(victim: Victim, rng: random.Random) -> None:
        launcher = rng.choice(victim.launchers)
        workers = _children(launcher.pid)
        launcher.send_signal(number)
        launcher.wait()
        # A scheduler does not start a job on a machine that still runs it.
        deadline = time.monotonic() + 90
        while any(os.path.exists(f"/proc/{pid}") for pid in workers):
            assert time.monotonic() < deadline, "a worker outlives its launcher"
            time.sleep(0.1)

    return fault


def _stopped_for_a_while(victim: Victim, rng: random.Random) -> None:
    workers = victim.workers()
    if workers:
        worker = rng.choice(workers)
        os.kill(worker, signal.SIGSTOP)
        time.sleep(rng.uniform(1, 6))
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)


def _short_notice(victim: Victim, rng: random.Random) -> None:
    """A notice to all, and a second later the end."""
    workers = victim.workers()
    for number in (signal.SIGTERM, signal.SIGKILL):
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, number)
        time.sleep(rng.uniform(0.1, 1.0))


def _out_of_memory(victim: Victim, rng: random.Random) -> None:
    """No more memory than a worker has now."""
    workers = victim.workers()
    if workers:
        worker = rng.choice(workers)
        with contextlib.suppress(ProcessLookupError, OSError):
            size = pathlib.Path(f"/proc/{worker}/statm").read_text().split()[0]
            limit = int(size) * resource.getpagesize() + rng.randrange(2**20)
            resource.prlimit(worker, resource.RLIMIT_AS, (limit, limit))


def _full_disk(victim: Victim, rng: random.Random) -> None:
    filler = victim.place / "disk" / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(2**16))
            file.flush()
    time.sleep(rng.uniform(2, 8))
    filler.unlink()


def _damaged(spoil: Callable[[pathlib.Path, random.Random], None]) -> Fault:
    """Spoils a file of the newest save, while nobody can write it anew."""

    def fault(victim: Victim, rng: random.Random) -> None:
        for worker in victim.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        saves = victim.saves()
        # With one save left there would be nothing to fall back on.
        if len(saves) > 1:
            with contextlib.suppress(FileNotFoundError):
                spoil(saves[-1], rng)

    return fault


def _flip_bits(path: pathlib.Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _truncate(path: pathlib.Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _remove_manifest(path: pathlib.Path, rng: random.Random) -> None:
    del rng
    path.with_suffix(".json").unlink()


def _remove_pointer(path: pathlib.Path, rng: random.Random) -> None:
    del rng
    (path.parent / "checkpoint").unlink(missing_ok=True)


def _stop_file(victim: Victim, rng: random.Random) -> None:
    """A person stops the run, and a minute later goes on with it."""
    del rng
    if victim.step():
        _run("dtrain.stop", f"--run_dir={victim.run_dir}")


def _link(victim: Victim, rng: random.Random) -> None:
    """The cable between two hosts is pulled, and put back."""
    host = rng.randrange(victim.hosts)
    victim.network.cut(host)
    time.sleep(rng.choice([2.0, 15.0]))
    victim.network.mend(host)


FAULTS: dict[str, tuple[str, Fault]] = {
    "kill": ("SIGKILL of a worker", _kill(signal.SIGKILL)),
    "term": ("SIGTERM to a worker", _kill(signal.SIGTERM)),
    "usr1": ("SIGUSR1 to a worker, as from Slurm", _kill(signal.SIGUSR1)),
    "segv": ("a worker crashes in C++", _kill(signal.SIGSEGV)),
    "short": ("SIGTERM, and SIGKILL within a second", _short_notice),
    "stop": ("SIGSTOP of a worker, for good", _kill(signal.SIGSTOP)),
    "pause": ("SIGSTOP, and SIGCONT soon after", _stopped_for_a_while),
    "stuck": ("a worker stuck in Python", _agent("stuck")),
    "stuck_data": ("a worker that gets no images", _agent("stuck_data")),
    "gil": ("a worker stuck in C, with Python's lock", _agent("gil")),
    "exception": ("a worker raises an exception", _agent("exception")),
    "abort": ("a worker aborts", _agent("abort")),
    "memory": ("a worker gets no more memory", _out_of_memory),
    "full_disk": ("the disk is full for a while (root)", _full_disk),
    "slow_disk": ("each sync takes a second", _agent("slow_disk")),
    "clock": ("the clock of a worker jumps a day", _agent("clock")),
    "flip": ("a bit of the newest save flips", _damaged(_flip_bits)),
    "truncate": ("the newest save is cut short", _damaged(_truncate)),
    "manifest": ("a manifest is gone", _damaged(_remove_manifest)),
    "pointer": ("the pointer file is gone", _damaged(_remove_pointer)),
    "launcher": ("SIGKILL of a supervisor", _supervisor(signal.SIGKILL)),
    "preempt": ("SIGTERM to a supervisor", _supervisor(signal.SIGTERM)),
    "stop_file": ("dtrain.stop, and a new start", _stop_file),
    "link": ("a network link is cut (--hosts=2)", _link),
}


# The disk.


@contextlib.contextmanager
def small_disk(place: pathlib.Path) -> Iterator[bool]:
    """Puts a disk of 64 MB below a directory, if this is root."""
    place.mkdir(parents=True)
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


# The run.


@dataclasses.dataclass
class Record:
    """What was done to a run, and how long it took to go on.

    Attributes:
        pauses: the longest time without a new step between each fault and the
            next one, in seconds, by kind.
        step: at which it was stopped.
        ends: of its supervisors, by exit code.
    """

    pauses: dict[str, list[float]]
    step: int
    ends: dict[int, int]


def torment(victim: Victim, options: Options, kinds: Sequence[str]) -> Record:
    """Breaks a run until the time is over, and stops it."""
    rng = random.Random(options.seed)
    pauses: dict[str, list[float]] = {kind: [] for kind in kinds}
    victim.start()
    _pause(victim, 0.0, at_least=1)
    end = time.monotonic() + 60 * options.minutes
    while True:
        secs = rng.expovariate(1 / options.mean_secs)
        if time.monotonic() + secs > end:
            break
        chosen = rng.sample(kinds, rng.randint(1, 3) if options.several else 1)
        before = victim.step()
        print(f"{', '.join(chosen)} at step {before:,}", flush=True)
        for kind in chosen:
            FAULTS[kind][1](victim, rng)
        pause = _pause(victim, secs, at_least=before + 1)
        for kind in chosen:
            pauses[kind].append(pause)
    return Record(pauses, victim.stop(), dict(victim.ends))


def _pause(victim: Victim, secs: float, at_least: int) -> float:
    """Lets a run train for a while, and until a step is done.

    Returns:
        The longest time without a new step.
    """
    start = newest = time.monotonic()
    step, longest = victim.step(), 0.0
    while newest < start + secs or step < at_least:
        victim.revive()
        time.sleep(0.1)
        now, seen = time.monotonic(), victim.step()
        longest = max(longest, now - newest)
        # A run that is resumed has lines taken away, too.
        if seen > step:
            newest = now
        step = seen
        assert now - newest < _PATIENCE_SECS, victim.tail()
    return longest


def compare(victim: Victim, step: int) -> None:
    """Trains as many steps without any fault, and compares the bits."""
    startup.import_tensorflow()
    from dtrain.bundle import tensors

    whole = victim.place / "whole"
    _run(
        "dtrain.main",
        *victim.flags(),
        "--strategy=mirrored",
        f"--num_devices={_NUM_WORKERS}",
        f"--run_dir={whole}",
        f"--num_steps={step}",
        "--steps_per_loop=50",
    )
    prefixes = [
        f"{run}/checkpoints/ckpt-{step}" for run in (victim.run_dir, whole)
    ]
    broken, expected = map(tensors.digest, prefixes)
    print(f"step {step:,}\n  broken again and again  {broken}")
    print(f"  nothing happened        {expected}")
    assert broken == expected, "the bits differ"
    logs = [run / "metrics.jsonl" for run in (victim.run_dir, whole)]
    assert logs[0].read_bytes() == logs[1].read_bytes(), "metrics.jsonl differs"


def _table(record: Record) -> str:
    lines = [f"{'fault':<12} {'times':>5} {'longest pause':>13}"]
    for kind, secs in record.pauses.items():
        slowest = f"{max(secs):.1f} s" if secs else "-"
        lines.append(f"{kind:<12} {len(secs):>5} {slowest:>13}")
    return "\n".join(lines)


def _goodput(victim: Victim) -> str:
    """Says how much of the time was of use, and how much could have been."""
    account = goodput.account(report.read(str(victim.run_dir)))
    restarts = len(account.placed) - 1
    found = benchmark.compare(account, restarts)
    return (
        f"{report.table(account, str(victim.run_dir))}\n"
        f"goodput {found.measured:.1%} of {found.wall_secs:.0f} s with "
        f"{restarts} restarts of {found.restart_secs:.1f} s each; these and "
        f"the saves allow {found.allowed:.1%}: {found.ratio:.1%} of that"
    )


def run(options: Options) -> None:
    """Does all of it, and prints what came of it.

    Raises:
        AssertionError: the run did not survive, or its bits differ.
    """
    kinds = [*FAULTS] if options.faults == "all" else options.faults.split(",")
    unknown = set(kinds) - set(FAULTS)
    if unknown:
        raise errors.UserError(
            f"faults ({', '.join(sorted(unknown))}) must be of: "
            f"{', '.join(FAULTS)}"
        )
    place = pathlib.Path(options.keep or tempfile.mkdtemp(prefix="chaos-"))
    victim = Victim(place, options)
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(small_disk(place / "disk")):
            kinds = [kind for kind in kinds if kind != "full_disk"]
        if options.hosts > 1:
            stack.enter_context(victim.network)
        else:
            kinds = [kind for kind in kinds if kind != "link"]
        stack.callback(victim.end)
        record = torment(victim, options, kinds)
        print(_table(record))
        ends = ", ".join(f"{code}: {n}" for code, n in record.ends.items())
        print(f"supervisors that ended, by exit code: {ends or 'none'}")
        compare(victim, record.step)
        print(_goodput(victim))
    if not options.keep:
        shutil.rmtree(place)


def parse(arguments: Sequence[str]) -> Options:
    """Reads the command line.

    Raises:
        UserError: it is wrong.
    """
    known = {
        name: (default, "")
        for name, default in dataclasses.asdict(Options()).items()
    }
    return Options(**flags.parse_flags(arguments, known))


def main() -> int:
    """Runs the program."""
    if {"--help", "-h"} & set(sys.argv):
        kinds = [f"  {kind:<12} {words}" for kind, (words, _) in FAULTS.items()]
        print(_HELP + "\n".join(kinds))
        return errors.FINISHED
    # What was mounted and started is then taken down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run(parse(sys.argv))
    return errors.FINISHED


if __name__ == "__main__":
    errors.exit_with(main)
