"""Data sets beside that of --dataset, and which part of a set is meant.

    --paired=mask=map:folder:/masks         one for each image, by its name
    --paired=depth=npz:/rooms.npz#depth     an array of a file, by its place
    --unpaired=zebras=cycle_gan/horse2zebra@trainB   of an order of its own

`of` reads the flags, and `part_of` what stands behind the name, which
--dataset takes, too.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from typing import NamedTuple

from dtrain.config.learning import DataSettings
from dtrain.errors import UserError

# Kinds of --dataset that name a path.
PATHS = ("folder:", "zip:", "idx:", "npz:", "points:")
# Of these, what is no path.
POINT_SETS = ("points:grid", "points:ring")
# What an example has beside its inputs.
_TAKEN = (
    *("real_images", "labels", "latents", "uniforms", "step", "inputs"),
    *("state", "place"),
)
_MAP = "map:"
_ARRAY = re.compile(r"((?:npz|points):.*\.npz)#([^/]+)")


class Named(NamedTuple):
    """A data set beside that of --dataset.

    Attributes:
        name: under which a model finds it.
        dataset: as --dataset takes it.
        is_paired: whether it has one for each image, at the same index; else
            it has an order and a length of its own.
        is_map: whether these are label maps, a whole number for each pixel.
    """

    name: str
    dataset: str
    is_paired: bool
    is_map: bool


class Part(NamedTuple):
    """What of a data set is meant.

    Attributes:
        dataset: without what is said of its part.
        split: of a TFDS set; empty is that of --split.
        array: name of an array of an npz file, or of a feature of a TFDS set;
            empty is the usual one.
    """

    dataset: str
    split: str = ""
    array: str = ""


def of(settings: DataSettings) -> tuple[Named, ...]:
    """Reads --paired and --unpaired.

    Args:
        settings: the flags.

    Raises:
        UserError: one is malformed, or its name is taken.
    """
    found = [
        _read(flag, text)
        for flag, texts in (
            ("paired", settings.paired),
            ("unpaired", settings.unpaired),
        )
        for text in texts
    ]
    names = [each.name for each in found]
    # Where these have labels.
    names += [f"{each.name}_labels" for each in found if not each.is_paired]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(
            f"paired and unpaired ({', '.join(names)}) name {twice} twice; "
            "give each a name of its own"
        )
    return tuple(found)


def _read(flag: str, text: str) -> Named:
    name, equals, dataset = text.partition("=")
    is_map = dataset.startswith(_MAP)
    dataset = dataset.removeprefix(_MAP)
    if not equals or not dataset:
        raise UserError(
            f"{flag} ({text}) must be NAME=DATASET, such as "
            "mask=folder:/path, or NAME=map:DATASET for label maps"
        )
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(
            f"{flag} ({text}): {name!r} must be a name of Python, of letters, "
            "digits and _"
        )
    if name in _TAKEN:
        raise UserError(
            f"{flag} ({text}): {name} is taken, as are {', '.join(_TAKEN)}; "
            "choose another name"
        )
    return Named(name, dataset, is_paired=flag == "paired", is_map=is_map)


def part_of(dataset: str) -> Part:
    """Takes apart what names a data set and its part.

    Args:
        dataset: npz:/path.npz[#ARRAY], name[:config][@split][#feature] of
            TFDS, or a path, which has no part.
    """
    if dataset.startswith(PATHS):
        found = _ARRAY.fullmatch(dataset)
        return Part(found[1], array=found[2]) if found else Part(dataset)
    rest, _, array = dataset.partition("#")
    rest, _, split = rest.partition("@")
    return Part(rest, split, array)


def datasets(settings: DataSettings) -> Sequence[str]:
    """Lists all data sets of a run, that of --dataset first.

    Args:
        settings: the flags.

    Raises:
        UserError: see `of`.
    """
    return (settings.dataset, *(each.dataset for each in of(settings)))
