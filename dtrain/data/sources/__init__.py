"""What a run reads: `open_source` opens what --dataset names, `open_data` all.

data = open_data(config)
data.source                 # the real images
data.paired["mask"]         # one for each of them, at the same index
data.unpaired["zebras"]     # of an order and a length of their own
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn

import tensorflow as tf

from dtrain import flags
from dtrain.config import Config, DataSettings, further
from dtrain.data import digits
from dtrain.data.sources import (
    archive,
    arrays,
    checking,
    folder,
    idx,
    memory,
    npz,
    pairing,
    points,
    source,
)
from dtrain.data.sources.picture_files import PictureFiles
from dtrain.data.sources.source import Source, Wanted
from dtrain.errors import UserError
from dtrain.storage import access, files

__all__ = ["IMAGES", "Data", "Source", "open_data", "open_source"]

_KINDS = {
    "folder": folder.open_folder,
    "idx": idx.open_idx,
    "npz": npz.open_npz,
    "points": points.open_points,
    "zip": archive.open_zip,
}
# The name that the images of --dataset have among the others.
IMAGES = ""
_NONE: Mapping[str, Source] = types.MappingProxyType({})


class Data(NamedTuple):
    """All that a run reads.

    Attributes:
        source: the real images.
        paired: what there is of each of them, by name, at the same index.
        unpaired: further data sets by name.
    """

    source: Source
    paired: Mapping[str, Source] = _NONE
    unpaired: Mapping[str, Source] = _NONE

    @property
    def further(self) -> dict[str, Source]:
        """What there is beside the images, by name."""
        return {**self.paired, **self.unpaired}

    @property
    def every(self) -> dict[str, Source]:
        """All of them by name; the real images by `IMAGES`."""
        return {IMAGES: self.source, **self.further}

    @property
    def specs(self) -> dict[str, tf.TensorSpec]:
        """Shape and type of what one example has beside its image, by name."""
        specs = {name: each.spec for name, each in self.further.items()}
        label = tf.TensorSpec((), tf.int32)
        for name, each in self.unpaired.items():
            specs |= {f"{name}_labels": label} if each.num_classes else {}
        return specs

    def said(self) -> list[str]:
        """Says in lines what there is, and of its files."""
        named = [("data      ", self.source)]
        named += [
            (f"paired    {name}=", each) for name, each in self.paired.items()
        ]
        named += [
            (f"unpaired  {name}=", each) for name, each in self.unpaired.items()
        ]
        return [
            line
            for begin, each in named
            for line in (
                f"{begin}{each.name}: {each.said()}",
                *(f"files     {line}" for line in each.files),
            )
        ]


def open_source(
    config: Config, report: memory.Report = memory.to_stderr
) -> Source:
    """Opens the images of a run, in memory if they fit.

    Call it after the strategy is made, for TensorFlow cannot be configured for
    several workers once it has run anything; and outside of its scope, or the
    images are mirrored.

    Args:
        config: the fields of the group Data count, and `conditional`.
        report: called with a line of progress if reading takes long.

    Returns:
        The images, converted to `image_size` and `channels`.

    Raises:
        UserError: there is no such data set, or it is malformed.
    """
    origin = _open_images(config, report)
    return _into_memory([origin], config, report)[0]


def open_data(config: Config, report: memory.Report = memory.to_stderr) -> Data:
    """Opens all that a run reads; see `open_source`.

    Args:
        config: the fields of the group Data count, and `conditional`.
        report: called with a line of progress if reading takes long.

    Raises:
        UserError: there is no such data set, or it is malformed, or what is
            paired with the images does not fit them.
    """
    images = _open_images(config, report)
    paired, unpaired = {}, {}
    for named in further.of(config):
        settings, wanted = _named(named, config)
        with _by_its_flag(named):
            opened = _open_sound(settings, report, wanted)
        (paired if named.is_paired else unpaired)[named.name] = opened
    images, paired = pairing.pair(images, paired)
    origins = [images, *paired.values(), *unpaired.values()]
    images, *others = _into_memory(origins, config, report)
    return Data(
        images,
        dict(zip(paired, others, strict=False)),
        dict(zip(unpaired, others[len(paired) :], strict=True)),
    )


def _named(
    named: further.Named, config: DataSettings
) -> tuple[DataSettings, Wanted]:
    """Returns by which flags a set beside that of --dataset is read."""
    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(DataSettings)
    }
    settings |= {"dataset": named.dataset, "paired": (), "unpaired": ()}
    if config.labels not in ("auto", "folders", "none"):
        # A table of the images of --dataset.
        settings["labels"] = "auto"
    wanted = Wanted(
        is_map=named.is_map, has_labels=not named.is_paired, is_further=True
    )
    return DataSettings(**settings), wanted


@contextlib.contextmanager
def _by_its_flag(named: further.Named) -> Iterator[None]:
    """Says by which flag a data set was given that has a mistake.

    Raises:
        UserError: there is one.
    """
    flag = "paired" if named.is_paired else "unpaired"
    try:
        yield
    except UserError as error:
        # A remedy names the flag whose rules these are.
        told = str(error).replace("--dataset=", f"--{flag}={named.name}=")
        raise UserError(f"{flag} ({named.name}): {told}") from error


def _open_images(config: Config, report: memory.Report) -> Source:
    origin = _open_sound(config, report, source.USUAL)
    if config.conditional and not origin.num_classes:
        raise UserError(
            f"conditional needs labels, and {config.dataset} has none"
        )
    return origin


def _open_sound(
    config: DataSettings, report: memory.Report, wanted: Wanted
) -> Source:
    """Opens a data set of which no picture is known to be damaged."""
    if _is_embedded(config) and not wanted.is_map:
        return _open_embedded(config, report, wanted)
    origin = _open(config, report, wanted)
    if isinstance(origin, PictureFiles):
        if config.skip_damaged:
            origin = checking.sound(origin, report)
        elif origin.first_fault:
            raise origin.refusal(origin.first_fault)
    return origin


def _into_memory(
    origins: Sequence[Source], config: DataSettings, report: memory.Report
) -> list[Source]:
    """Loads what fits: the first ones, if not all of them do."""
    left_gib = config.cache_gib
    loaded = []
    for origin in origins:
        if not origin.in_memory and memory.fits(origin, left_gib):
            origin = memory.load(origin, report)
        if origin.in_memory:
            left_gib -= origin.num_bytes / 2**30
        loaded.append(origin)
    return loaded


def open_files(config: Config) -> PictureFiles:
    """Opens the pictures of a folder or an archive, damaged ones among them.

    Args:
        config: the fields of the group Data count.

    Raises:
        UserError: there are none, or the data set is of another kind.
    """
    origin = None
    if config.dataset.startswith(("folder:", "zip:")):
        origin = _open(config, memory.to_stderr, source.USUAL)
    if not isinstance(origin, PictureFiles):
        raise UserError(
            f"dataset ({config.dataset}) must be folder:/path or zip:/path; "
            "of other kinds all is checked at each start"
        )
    return origin


def open_beside(config: Config) -> dict[str, Source]:
    """Opens what stands beside the images, damaged pictures among them.

    Args:
        config: the fields of the group Data count.

    Returns:
        What there is by its name; not yet paired.

    Raises:
        UserError: one is malformed, or not there.
    """
    opened = {}
    for named in further.of(config):
        settings, wanted = _named(named, config)
        with _by_its_flag(named):
            opened[named.name] = _open(settings, memory.to_stderr, wanted)
    return opened


def _open(
    config: DataSettings, report: memory.Report, wanted: Wanted
) -> Source:
    part = further.part_of(config.dataset)
    kind, colon, path = part.dataset.partition(":")
    wanted = wanted._replace(array=part.array)
    opener = _KINDS.get(kind) if colon else None
    if opener is None and _is_path(config.dataset):
        _refuse_path(config.dataset)
    if opener is None:
        # Few runs need TFDS, which takes a while to import.
        from dtrain.data.sources import prepared

        if part.split:
            config = dataclasses.replace(config, split=part.split)
        return prepared.open_prepared(config, report, wanted)
    if not path:
        raise UserError(f"dataset ({config.dataset}) names no path")
    return opener(flags.expand_home(path), config, wanted)


def _is_path(dataset: str) -> bool:
    """Tells a path from a name of TFDS, which may have a / in it."""
    return files.is_remote(dataset) or dataset.startswith(
        (os.sep, "~", f".{os.sep}", f"..{os.sep}")
    )


def _refuse_path(dataset: str) -> NoReturn:
    path = os.path.expanduser(dataset)
    with access.to("dataset", path):
        likely = source.kind_of(path)
    remedy = f"try --dataset={likely}" if likely else "and nothing is there"
    raise UserError(
        f"dataset ({dataset}) is a path; it must be folder:/path, zip:/path, "
        f"idx:/path, npz:/path or the name of a TFDS data set: {remedy}"
    )


def _is_embedded(config: DataSettings) -> bool:
    """Tells whether the whole of the embedded set is wanted, in memory.

    For a part of it TFDS has to say which images are in it, and where a
    directory is named the set is prepared there.
    """
    return (
        config.dataset == "digits"
        and config.split == "train"
        and not config.data_dir
        and config.cache_gib > 0
    )


def _open_embedded(
    config: DataSettings, report: memory.Report, wanted: Wanted
) -> Source:
    images, labels = digits.read()
    origin = arrays.ArraySource(
        config, images, labels if wanted.has_labels else None
    )
    if origin.image_shape != images.shape[1:]:
        return memory.load(origin, report)
    return memory.MemorySource(origin, memory.aligned(images), labels)
