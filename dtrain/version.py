"""The version of this release; a checkpoint's manifest names it."""

from __future__ import annotations

VERSION = "0.1.0"
