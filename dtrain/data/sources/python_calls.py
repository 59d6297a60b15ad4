"""Python functions inside input pipelines, without a hang at the end.

The threads of tf.data read ahead. If one calls Python while the interpreter
ends, it never returns, and TensorFlow waits for it for ever. So the calls go
through a gate that is shut before: from then on each call fails at once, until
the buffers are full of failures, which nobody asks for, and the threads rest.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

_QUIET_SECS = 0.1
_PATIENCE_SECS = 10.0


class _Gate:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shut = False
        self._inside = 0
        self._arrived = 0

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            self._arrived += 1
            if self._shut:
                raise RuntimeError("the program is ending")
            self._inside += 1
        try:
            return function(*arguments)
        finally:
            with self._lock:
                self._inside -= 1

    def shut(self) -> None:
        """Refuses calls from now on; returns when no more of them come."""
        self._shut = True
        deadline = time.monotonic() + _PATIENCE_SECS
        seen = 0
        while self._inside or seen != self._arrived:
            if time.monotonic() > deadline:
                return
            seen = self._arrived
            time.sleep(_QUIET_SECS)


_GATE = _Gate()
atexit.register(_GATE.shut)


def numpy_function(
    function: Callable[..., Any], inputs: Sequence[tf.Tensor], types: Any
) -> Any:
    """Calls a pure Python function as `tf.numpy_function` does.

    Args:
        function: takes and returns NumPy arrays.
        inputs: its arguments.
        types: dtype of each result, or of the only one.
    """

    @tf.autograph.experimental.do_not_convert
    def call(*arguments: Any) -> Any:
        return _GATE.call(function, *arguments)

    return tf.numpy_function(call, inputs, types, stateful=False)
