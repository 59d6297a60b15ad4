"""What `tests.chaos` does to a run: to a worker, a supervisor, its directory.

A fault is a function; `FAULTS` has them all, and `lacking` says which of them
cannot be done on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

from dtrain import errors
from tests import chaos_victim
from tests.chaos_victim import Victim, children

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


def _supervisor(number: int, *, with_workers: bool = False) -> Fault:
    def fault(victim: Victim, rng: random.Random) -> None:
        launcher = rng.choice(victim.launchers)
        workers = children(launcher.pid)
        launcher.send_signal(number)
        for worker in workers if with_workers else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, number)
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


def _fill(directory: pathlib.Path, secs: float) -> None:
    """Has a disk be full for a while."""
    filler = directory / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(2**16))
            file.flush()
    time.sleep(secs)
    filler.unlink()


def _full_disk(victim: Victim, rng: random.Random) -> None:
    _fill(victim.disk, rng.uniform(2, 8))


def _full_tmp(victim: Victim, rng: random.Random) -> None:
    """Every second time a worker starts on it."""
    if rng.random() < 0.5:
        _kill(signal.SIGKILL)(victim, rng)
    _fill(victim.tmp, rng.uniform(4, 12))


def _deaf(victim: Victim, rng: random.Random) -> None:
    """As `| head` ends: what a supervisor prints has no reader any more."""
    rng.choice(victim.readers).kill()


def _ctrl_s(victim: Victim, rng: random.Random) -> None:
    """As Ctrl-S: nobody reads, and there is no room for another line."""
    reader = rng.choice(victim.readers)
    if reader.poll() is not None:
        return
    reader.send_signal(signal.SIGSTOP)
    try:
        # Opened anew, for a pipe that does not block would be another's, too.
        flags = os.O_WRONLY | os.O_NONBLOCK
        pipe = os.open(f"/proc/{reader.pid}/fd/0", flags)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(pipe, b"\n")
        os.close(pipe)
        if rng.random() < 0.5:
            _kill(signal.SIGKILL)(victim, rng)
        # Longer than what is a hang.
        time.sleep(rng.uniform(2, 2 * chaos_victim.HANG_SECS))
    finally:
        reader.send_signal(signal.SIGCONT)


def _moved(victim: Victim, rng: random.Random) -> None:
    """The run's directory moves, which ends the run; a person goes on there."""
    if not victim.step():
        return
    place = victim.disk / f"run-{rng.randrange(2**31)}"
    old = victim.run_dir
    old.rename(place)
    deadline = time.monotonic() + chaos_victim.PATIENCE_SECS
    while all(each.poll() is None for each in victim.launchers):
        assert time.monotonic() < deadline, victim.tail()
        if old.exists():
            # A worker that has just been started takes it for a new run.
            break
        time.sleep(0.1)
    for launcher in victim.launchers:
        if launcher.poll() is None:
            chaos_victim.kill(launcher)
        else:
            assert launcher.returncode == errors.USER_ERROR, victim.tail()
            victim.ends[launcher.returncode] += 1
    shutil.rmtree(old, ignore_errors=True)
    if rng.random() < 0.5:
        place.rename(old)
    else:
        victim.run_dir = place
    victim.start()


def _eio(victim: Victim, rng: random.Random) -> None:
    """All start again, and the first read of a save by any of them fails."""
    del rng
    (victim.orders / "eio").touch()
    for worker in victim.workers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


_TALK = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    # How gRPC begins, and what it does not go on with.
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64),
    b"hello dtrain 1 " + b"0" * 32 + b" 0\n",
    b"hello dtrain 1 \xff 99999999999999999999\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"x" * 2**20,
    b"",
)


def _stranger(victim: Victim, rng: random.Random) -> None:
    """A scanner talks to the workers' ports, also while they meet."""
    if rng.random() < 0.5:
        _kill(signal.SIGKILL)(victim, rng)
    end = time.monotonic() + rng.uniform(2, 10)
    while time.monotonic() < end:
        for address in _addresses(victim):
            talk = rng.choice((*_TALK, rng.randbytes(rng.randrange(1, 4096))))
            name, port = address.rsplit(":", 1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [
                        *victim.on(rng.randrange(victim.hosts)),
                        *("bash", "-c", 'exec cat >"/dev/tcp/$0/$1"'),
                        *(name, port),
                    ],
                    input=talk,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=1,
                )
        time.sleep(0.1)


def _addresses(victim: Victim) -> list[str]:
    """Returns where the workers listen."""
    for worker in victim.workers():
        with contextlib.suppress(OSError, ValueError, KeyError):
            text = pathlib.Path(f"/proc/{worker}/environ").read_bytes()
            pairs = (pair.partition(b"=") for pair in text.split(b"\0"))
            variables = {name: value for name, _, value in pairs}
            return json.loads(variables[b"TF_CONFIG"])["cluster"]["worker"]
    return []


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
        chaos_victim.finish("dtrain.stop", f"--run_dir={victim.run_dir}")


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
    "full_tmp": ("TMPDIR is full for a while (root)", _full_tmp),
    "eio": ("a read of a save fails, once (a C compiler)", _eio),
    "moved": ("run_dir moves, and the run goes on there", _moved),
    "deaf": ("nobody reads what is printed any more", _deaf),
    "ctrl_s": ("nobody reads it for a while, and it is full", _ctrl_s),
    "clock": ("the clock of a worker jumps a day", _agent("clock")),
    "clock_back": ("it is set back a day", _agent("clock_back")),
    "flip": ("a bit of the newest save flips", _damaged(_flip_bits)),
    "truncate": ("the newest save is cut short", _damaged(_truncate)),
    "manifest": ("a manifest is gone", _damaged(_remove_manifest)),
    "pointer": ("the pointer file is gone", _damaged(_remove_pointer)),
    "launcher": ("SIGKILL of a supervisor", _supervisor(signal.SIGKILL)),
    "preempt": ("SIGTERM to a supervisor", _supervisor(signal.SIGTERM)),
    "hang_up": (
        "SIGHUP to a supervisor and its workers",
        _supervisor(signal.SIGHUP, with_workers=True),
    ),
    "stranger": ("a scanner talks to the workers' ports (bash)", _stranger),
    "stop_file": ("dtrain.stop, and a new start", _stop_file),
    "link": ("a network link is cut (--hosts=2)", _link),
}


def lacking(victim: Victim, *, has_disk: bool, has_tmp: bool) -> dict[str, str]:
    """Returns the faults that cannot be done here, and what each needs.

    Args:
        victim: the run.
        has_disk: whether its directory is on a small disk.
        has_tmp: whether TMPDIR is.
    """
    needs = {
        "full_disk": (has_disk, "root"),
        "full_tmp": (has_tmp, "root"),
        "link": (victim.hosts > 1, "--hosts=2"),
        "eio": (victim.can_fail_reads, "a C compiler"),
        "stranger": (shutil.which("bash"), "bash"),
        "hang_up": (
            signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN,
            "a start without nohup",
        ),
    }
    return {kind: need for kind, (is_met, need) in needs.items() if not is_met}
