"""Whether the memory holds what a file says it holds, before it is read."""

from __future__ import annotations

from dtrain.errors import UserError
from dtrain.storage import host_memory


def check(name: str, num_bytes: int) -> None:
    """Refuses what the memory does not hold.

    Args:
        name: of the file, or of what is in it.
        num_bytes: that it takes.

    Raises:
        UserError: they are more than are free.
    """
    free = host_memory.available_bytes()
    if num_bytes > free:
        raise UserError(
            f"{name} says it takes {host_memory.gib(num_bytes)} of memory, and "
            f"{host_memory.gib(free)} are free; use a smaller part of the set, "
            "or folder:/path, which is read image by image"
        )
