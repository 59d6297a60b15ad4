"""Notices that this process is to end, seen by the training loop.

A handler sets a flag and does nothing else: nothing is saved inside it. The
loop asks `requested` between two calls to the devices, saves, and exits with
`errors.RUN_AGAIN`. A second Ctrl-C ends the process at once, without harm,
since a checkpoint takes its name only when it is whole. A second SIGTERM does
not: schedulers and launchers send it twice, to a process and to its group.
"""

from __future__ import annotations

import signal
import types


class Watcher:
    """Watches for SIGINT and SIGTERM.

    To be armed after the strategy is built: a MultiWorkerMirroredStrategy
    puts a C++ handler over Python's for SIGTERM, which swallows it.
    """

    def __init__(self) -> None:
        self._notice = ""
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was told to end."""
        return bool(self._notice)

    @property
    def notice(self) -> str:
        """Name of the signal that came, as in `SIGTERM`; empty before."""
        return self._notice

    def arm(self) -> None:
        """Installs the handlers. Only the main thread may."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def disarm(self) -> None:
        """Puts the previous handlers back; does nothing if not armed."""
        while self._previous:
            number, previous = self._previous.popitem()
            signal.signal(number, previous)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self._notice = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        previous = self._previous.get(number)
        # Python's own SIGINT handler would raise KeyboardInterrupt here.
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)
