"""Decodes all pictures of a data set, and says which are damaged.

python -m dtrain.check_data --dataset=folder:/path [--move_to=DIR]
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dtrain import config as config_module
from dtrain import errors, flags
from dtrain.config import DataSettings
from dtrain.errors import UserError
from dtrain.storage import startup

if TYPE_CHECKING:
    from dtrain.data.sources.picture_files import PictureFiles


@dataclasses.dataclass(frozen=True)
class Options(DataSettings):
    """What is checked, and what is done with damaged pictures."""

    move_to: str = flags.directory(
        "Directory that damaged pictures are moved to, each into the folder "
        "that it was in; those of --paired=NAME=... below a folder NAME.",
        default="they stay",
    )

    def __post_init__(self) -> None:
        flags.check(self)


_PAGE = flags.Page(
    "python -m dtrain.check_data",
    """\
Decodes all pictures of a data set, and says which are damaged.

    python -m dtrain.check_data --dataset=folder:/path
    python -m dtrain.check_data --dataset=folder:/path --move_to=DIR

One table says what is used, passed over and damaged; a line for each damaged
picture says why. It exits with 1 where some are and stay.""",
    Options,
)
_DAMAGED = 1


def run(argv: Sequence[str]) -> int:
    """Checks the data set of a command line; returns the exit code.

    Args:
        argv: the command line, the program's name first.
    """
    if flags.answer(argv[1:], _PAGE.render):
        return errors.FINISHED
    options = Options(**flags.parse(Options, argv))
    settings = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(DataSettings)
    }
    # All that can be decoded is sound, whatever its size.
    if not options.dataset.startswith("points:"):
        settings["image_size"] = options.image_size or 1
    config = config_module.Config(**settings)
    startup.import_tensorflow()
    from dtrain.data import sources
    from dtrain.data.sources.picture_files import PictureFiles

    num_damaged = 0
    images = sources.open_files(config)
    opened = {sources.IMAGES: images, **sources.open_beside(config)}
    for name, found in opened.items():
        print(errors.printable(f"{name}={found.name}" if name else found.name))
        if not isinstance(found, PictureFiles):
            print(f"  {found.num_images:,}, all checked at each start")
            continue
        faults = _look(found)
        num_damaged += len(faults)
        if options.move_to:
            _move(
                found, faults, os.path.join(options.move_to, name).rstrip("/")
            )
    if not options.move_to:
        return _DAMAGED if num_damaged else errors.FINISHED
    print(f"moved {num_damaged:,} to {options.move_to}")
    return errors.FINISHED


def _look(found: PictureFiles) -> Mapping[int, UserError]:
    """Decodes all pictures, and prints what is found; returns the faults."""
    from dtrain.data.sources import checking

    shapes = checking.shapes(found)
    faults = checking.faults(found, shapes)
    names = enumerate(found.listing.names)
    sound = [name for index, name in names if index not in faults]
    rows = {
        "used": found.listing._replace(names=sound).used(),
        "passed over": found.listing.others(),
        "damaged": f"{len(faults):,}",
        "sizes": checking.sizes(shapes),
    }
    for name, row in rows.items():
        print(errors.printable(f"  {name:<13}{row}"))
    for fault in faults.values():
        print(errors.printable(fault.text.partition(";")[0]))
    return faults


def _move(
    found: PictureFiles, faults: Mapping[int, UserError], target: str
) -> None:
    """Moves pictures away, each into the folder that it was in.

    Raises:
        UserError: they are in an archive or a store, or cannot be moved.
    """
    for index in faults:
        name = found.listing.names[index]
        path, goal = found.store.place(name), os.path.join(target, name)
        if os.path.lexists(goal):
            raise UserError(
                f"move_to ({target}) holds {name} already; name another one"
            )
        try:
            os.makedirs(os.path.dirname(goal), exist_ok=True)
            shutil.move(path, goal)
        except OSError as error:
            raise UserError(
                f"{path} cannot be moved to {target}: {error.strerror}; only "
                "files of a folder on a disk can"
            ) from error


if __name__ == "__main__":
    errors.exit_with(lambda: run(sys.argv))
