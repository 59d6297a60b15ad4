# Any for all: the stubs that type checkers bundle are of older releases, and
# the sources make their names at run time.
from typing import Any

def __getattr__(name: str) -> Any: ...
