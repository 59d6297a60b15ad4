"""Computes on the chief, while all workers listen for notices."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import TypeVar

from dtrain.cluster.workers import Workers

_Result = TypeVar("_Result")
# Between two looks.
_SECS = 0.1


def compute(
    workers: Workers,
    function: Callable[[], _Result],
    is_stopped: Callable[[], bool],
) -> _Result | None:
    """Calls a function on the chief. Every worker calls this.

    Linear algebra of a large matrix takes longer than a notice may wait.

    Args:
        workers: all of them.
        function: of NumPy alone; what it does is given up if it is stopped.
        is_stopped: asked all the time; one worker's word ends it.

    Returns:
        What the function returns; None if it was stopped, and to the others.
    """
    with contextlib.ExitStack() as stack:
        future: concurrent.futures.Future[_Result] | None = None
        if workers.is_chief:
            pool = concurrent.futures.ThreadPoolExecutor(1)
            # What is given up ends with the process.
            stack.callback(pool.shutdown, wait=False)
            future = pool.submit(function)
        is_over = is_done = False
        while not (is_over or is_done):
            if future:
                concurrent.futures.wait([future], _SECS)
            is_over, is_done = workers.agree(
                is_stopped(), future is not None and future.done()
            )
        if is_over:
            return None
        return workers.together(future.result if future else lambda: None)
