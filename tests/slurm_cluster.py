"""A real Slurm of several nodes on one machine, for as long as a test needs it.

Each node is a slurmd in a network namespace of its own; the controller and the
login node, from which jobs are submitted, are in one more. Needs root and
Debian's packages slurm-wlm and iproute2. It starts in about a second.

    python -m tests.slurm_cluster
    python -m tests.slurm_cluster sbatch --test-only job.sh

gives a shell on the login node, or runs a command there, and ends with it.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

import pytest

from tests import network
from tests.requirement import missing

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel")

# No munge: authentication is not what is tested. No accounting, as on many
# clusters. The two partitions are a site's usual ones, of which the second
# takes nodes away from the first. cred_expire is half of the time that a
# requeued job waits, 120 s where nobody has set it.
_CONFIG = """\
ClusterName=dtrain
SlurmctldHost={controller}({address})
SlurmctldPort=6817
SlurmdPort=6818
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool.%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=\\
    sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PriorityType=priority/basic
KillWait=5
OverTimeLimit=0
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=20
InactiveLimit=0
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES \\
    PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_secs} State=UP
PartitionName=high Nodes=ALL \\
    PriorityTier=10 PreemptMode=OFF State=UP
{more}
"""
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr={address} CPUs=8 "
    "CoresPerSocket=8 Sockets=1 ThreadsPerCore=1 RealMemory=64000 Gres=gpu:2"
)


def check() -> None:
    """Skips the running test where there is no Slurm; fails it in CI."""
    network.check()
    absent = [name for name in _PROGRAMS if not shutil.which(name)]
    if absent:
        missing(f"{absent[0]} is in Debian's package slurm-wlm")


class SlurmCluster:
    """A Slurm that runs within a block.

    Args:
        place: an empty directory for all that it writes.
        num_nodes: node1, node2, ...
        grace_secs: between the notice of a preemption and the kill.
        more: further lines of slurm.conf.
    """

    def __init__(
        self,
        place: pathlib.Path,
        num_nodes: int = 2,
        *,
        grace_secs: int = 60,
        more: str = "",
        subnet: str = "10.78.34",
    ) -> None:
        self._place = place
        self._nodes = [f"node{index + 1}" for index in range(num_nodes)]
        # The last host is the controller, and where jobs are submitted.
        self._login = num_nodes
        self.network = network.Network(
            [*self._nodes, socket.gethostname()], subnet
        )
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._config = place / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self._config)}
        nodes = "\n".join(
            _NODE.format(
                name=name,
                host=socket.gethostname(),
                address=self.network.address(host),
            )
            for host, name in enumerate(self._nodes)
        )
        place.mkdir(parents=True, exist_ok=True)
        self._config.write_text(
            _CONFIG.format(
                controller=socket.gethostname(),
                address=self.network.address(self._login),
                place=place,
                nodes=nodes,
                grace_secs=grace_secs,
                more=more,
            )
        )
        # Two devices that every machine has, in place of two GPUs.
        (place / "gres.conf").write_text(
            "Name=gpu File=/dev/tty[10-11] AutoDetect=off\n"
        )
        (place / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def __enter__(self) -> SlurmCluster:
        try:
            self.network.__enter__()
            (self._place / "state").mkdir()
            self._start("slurmctld", self._login)
            for host in range(len(self._nodes)):
                self.start_node(host)
            self._wait_until_idle()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if "slurmctld" in self._daemons:
                self.run(["scancel", "--full", "--user=root"], check=False)
                self.run(
                    ["scancel", "--signal=KILL", "--user=root"], check=False
                )
                self._wait_until_empty()
        finally:
            for daemon in reversed(self._daemons.values()):
                daemon.terminate()
            for daemon in self._daemons.values():
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            self.network.__exit__(kind, error, traceback)

    def run(
        self,
        command: Sequence[str],
        *,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
        cwd: pathlib.Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the login node."""
        done = subprocess.run(
            [*self.network.on(self._login), *command],
            env={
                **(environment if environment is not None else os.environ),
                **self.environment,
            },
            cwd=cwd,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    @property
    def version(self) -> float:
        """The year and month of its release, as in 22.05."""
        # As in `slurm 22.05.8`.
        return float(self.run(["sinfo", "--version"]).stdout.split()[1][:5])

    def show(self, command: Sequence[str]) -> int:
        """Runs a command of a person on the login node; returns its code."""
        return subprocess.run(
            [*self.network.on(self._login), *command],
            env={**os.environ, **self.environment},
        ).returncode

    def submit(self, script: str, *arguments: str) -> str:
        """Submits a batch script by its text; returns the job's number."""
        path = self._place / f"script-{time.monotonic_ns()}.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        output = f"--output={self._place}/job-%j.log"
        command = ["sbatch", "--parsable", output, *arguments, str(path)]
        return self.run(command).stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """Returns what Slurm knows of a job."""
        text = self.run(["scontrol", "show", "job", "-o", job_id]).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(
        self, job_id: str, states: Sequence[str], timeout_secs: float = 120
    ) -> str:
        """Waits until a job is in one of some states; returns which."""
        deadline = time.monotonic() + timeout_secs
        while True:
            found = self.job(job_id)
            if found["JobState"] in states:
                return found["JobState"]
            assert time.monotonic() < deadline, found
            time.sleep(0.2)

    def hosts_of(self, job_id: str) -> list[int]:
        """Returns on which hosts of the network a job runs."""
        nodes = self.job(job_id)["NodeList"]
        found = self.run(["scontrol", "show", "hostnames", nodes]).stdout
        return [self._nodes.index(name) for name in found.split()]

    def start_node(self, host: int) -> None:
        """Starts the daemon of a node; again, after `kill_node`."""
        name = self._nodes[host]
        (self._place / f"spool.{name}").mkdir(exist_ok=True)
        self._start("slurmd", host, "-N", name)

    def kill_node(self, host: int) -> None:
        """Ends all that runs on a node, as when the power goes."""
        self.network.cut(host)
        namespace = self.network.on(host)[-1]
        # In the namespace of the node, not of the machine: Slurm's daemons, the
        # steps that they have started, and what these have.
        pids = subprocess.run(
            ["ip", "netns", "pids", namespace],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for pid in map(int, pids):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        self._daemons[f"slurmd-{self._nodes[host]}"].wait()
        self.network.mend(host)

    def _start(self, program: str, host: int, *arguments: str) -> None:
        name = program if not arguments else f"{program}-{arguments[-1]}"
        with (self._place / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [
                    *self.network.on(host),
                    *(program, "-D", "-f", str(self._config), *arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + 60
        command = ["sinfo", "-h", "-N", "-p", "low", "-o", "%T"]
        while True:
            done = self.run(command, check=False)
            if done.stdout.split() == ["idle"] * len(self._nodes):
                return
            for name, daemon in self._daemons.items():
                said = (self._place / f"{name}.out").read_text()[-2000:]
                assert daemon.poll() is None, f"{name} has ended: {said}"
            assert time.monotonic() < deadline, done.stdout + done.stderr
            time.sleep(0.05)

    def _wait_until_empty(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if not self.run(["squeue", "-h"], check=False).stdout.strip():
                return
            time.sleep(0.1)


def main() -> int:
    """Starts a Slurm of two nodes, and ends it with what is run there."""
    try:
        check()
    except pytest.skip.Exception as absent:
        sys.exit(f"error: {absent}")
    command = sys.argv[1:] or [os.environ.get("SHELL", "/bin/bash")]
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as place,
        SlurmCluster(pathlib.Path(place)) as cluster,
    ):
        return cluster.show(command)


if __name__ == "__main__":
    sys.exit(main())
