"""Names of what is traced, that are the same in each start of a run.

They are TensorFlow's own business, and end in a count of all that a process has
made so far: more in a run that is restored than in one that begins. XLA's cache
on a disk compares them.
"""

from __future__ import annotations

from tensorflow.python.framework import ops

# More than is made before a step is traced; counted in ten milliseconds.
_FROM = 2**17


def begin() -> None:
    """Counts on to a round number, from which what is traced next is named.

    While it is traced, no other thread may run operations.
    """
    while ops.uid() % _FROM:
        pass
