"""Several hosts on one machine: network namespaces on a bridge. Needs root."""

from __future__ import annotations

import itertools
import os
import pathlib
import shutil
import subprocess
from collections.abc import Sequence
from types import TracebackType

from tests.requirement import missing

_COUNT = itertools.count()


def check() -> None:
    """Skips the running test where it cannot make hosts; fails it in CI."""
    if os.geteuid() or not shutil.which("ip"):
        missing("hosts of one's own need root and Debian's iproute2")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Network:
    """Hosts that reach each other by name and address, within a block.

    Args:
        names: of the hosts.
        subnet: the first three numbers of their addresses.
    """

    def __init__(self, names: Sequence[str], subnet: str = "10.78.33") -> None:
        # Those of another process are none of this one's.
        prefix = f"dtrain-{os.getpid()}-{next(_COUNT)}"
        self._bridge = f"{prefix}-bridge"
        self._namespaces = [f"{prefix}-{host}" for host in range(len(names))]
        self._names = names
        self._subnet = subnet

    def address(self, host: int) -> str:
        """Returns the address of a host."""
        return f"{self._subnet}.{host + 1}"

    def on(self, host: int) -> list[str]:
        """Returns what runs the command behind it on a host."""
        return ["ip", "netns", "exec", self._namespaces[host]]

    def cut(self, host: int) -> None:
        """Cuts a host off."""
        _ip("-n", self._bridge, "link", "set", f"p{host}", "down")

    def mend(self, host: int) -> None:
        """Connects it again."""
        _ip("-n", self._bridge, "link", "set", f"p{host}", "up")

    def __enter__(self) -> Network:
        try:
            self._make()
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
        for name in (*self._namespaces, self._bridge):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)

    def _make(self) -> None:
        hosts = "127.0.0.1 localhost\n" + "".join(
            f"{self.address(host)} {name}\n"
            for host, name in enumerate(self._names)
        )
        for name in (self._bridge, *self._namespaces):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            # Mounted over /etc/hosts by `ip netns exec`.
            place = pathlib.Path("/etc/netns", name)
            place.mkdir(parents=True, exist_ok=True)
            (place / "hosts").write_text(hosts)
        bridge = ["-n", self._bridge, "link"]
        _ip(*bridge, "add", "br0", "type", "bridge")
        _ip(*bridge, "set", "br0", "up")
        for host, name in enumerate(self._namespaces):
            port = f"p{host}"
            _ip(
                *("link", "add", "eth0", "netns", name, "type", "veth"),
                *("peer", "name", port, "netns", self._bridge),
            )
            _ip(*bridge, "set", port, "master", "br0", "up")
            address = f"{self.address(host)}/24"
            _ip("-n", name, "addr", "add", address, "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
