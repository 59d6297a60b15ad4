"""Tells which workers' names this machine cannot resolve, while all wait.

Each worker connects to each other one, so each must be able to resolve every
name. A name may take a while to be known, as that of a pod that is not there
yet: so nobody is told at once, and nothing ends for it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

_PATIENCE_SECS = 5.0
_PAUSE_SECS = 0.5
_MOST_NAMED = 3


@contextlib.contextmanager
def told_if_unknown(
    hosts: Sequence[str],
    say: Callable[[str], None],
    patience_secs: float = _PATIENCE_SECS,
) -> Iterator[None]:
    """Says once, while the block runs, which names cannot be resolved.

    Args:
        hosts: names or addresses.
        say: is given one line, from another thread.
        patience_secs: for which a name may be unknown.
    """
    over = threading.Event()
    # A name server that does not answer keeps a thread for many seconds.
    thread = threading.Thread(
        target=_watch, args=(hosts, say, patience_secs, over), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()


def _watch(
    hosts: Sequence[str],
    say: Callable[[str], None],
    patience_secs: float,
    over: threading.Event,
) -> None:
    unknown = dict.fromkeys(hosts, "")
    while not over.is_set():
        for host in list(unknown):
            reason = _problem(host)
            if reason and not over.is_set():
                unknown[host] = reason
            else:
                del unknown[host]
        if not unknown:
            return
        if patience_secs <= 0:
            say(_line(unknown))
            return
        patience_secs -= _PAUSE_SECS
        over.wait(_PAUSE_SECS)


def _problem(host: str) -> str:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _line(unknown: dict[str, str]) -> str:
    named = ", ".join(
        f"{host} ({reason})"
        for host, reason in list(unknown.items())[:_MOST_NAMED]
    )
    more = len(unknown) - _MOST_NAMED
    return (
        f"this machine cannot resolve {named}"
        + (f" and {more} more" if more > 0 else "")
        + "; every worker must resolve the name of every other: correct the "
        "list of workers, or give addresses; waiting for it meanwhile"
    )
