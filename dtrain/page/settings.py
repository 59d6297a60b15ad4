"""What runs were told: beside the defaults, and beside each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.config import Config

# The page names it anyway.
_KNOWN = ("run_dir",)


def unusual(settings: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Lists the settings that are not the defaults of this version.

    Args:
        settings: as config.json has them, of any version.

    Returns:
        The value and the default, in words, by the name of the setting.
    """
    defaults = _defaults()
    return {
        name: (shown(value), shown(defaults.get(name)))
        for name, value in settings.items()
        if name not in _KNOWN and _plain(value) != _plain(defaults.get(name))
    }


def differing(all_settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lists the names of the settings in which runs differ.

    Args:
        all_settings: of each run, as config.json has them.
    """
    defaults = _defaults()
    names = dict.fromkeys(name for each in all_settings for name in each)
    return [
        name
        for name in names
        if name not in _KNOWN
        # What an older version did not write is what is the default now.
        and len(
            {
                repr(_plain(each.get(name, defaults.get(name))))
                for each in all_settings
                if each
            }
        )
        > 1
    ]


def value(settings: Mapping[str, Any], name: str) -> str:
    """Returns a setting of a run in words; empty where it is not known."""
    return shown(settings.get(name, _defaults().get(name))) if settings else ""


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(Config)}


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def shown(value: Any) -> str:
    """Writes a value as it is typed behind its flag."""
    if value is None:
        return "unknown here"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value) or "none"
