"""Which files below a folder, or in an archive, are the pictures of a data set.

One place decides for each file: it is a picture, or it is passed over for a
reason that is counted and said. Whether a picture is damaged is known only
when it is decoded; see `picture_files`.
"""

from __future__ import annotations

import collections
import os
import posixpath
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from dtrain.errors import UserError, printable
from dtrain.storage import files

ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".dib"),
    *(".webp", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# What systems and their tools leave beside pictures.
_JUNK = frozenset(
    (
        *("__macosx", "@eadir", "lost+found", "$recycle.bin", "#recycle"),
        *("system volume information", "thumbs.db", "ehthumbs.db"),
        "desktop.ini",
    )
)
_NUM_SHOWN = 8


class Listing(NamedTuple):
    """What is below a folder, or in an archive.

    Attributes:
        names: of the pictures, as class/more/a.png, in the order of the set.
        passed_over: how many of what else there is, by what it is.
        empty: folders of the first level without a picture.
        damaged: names of pictures that are left out.
        num_labels_left: labels of pictures that are not there.
    """

    names: Sequence[str]
    passed_over: Mapping[str, int]
    empty: Sequence[str] = ()
    damaged: Sequence[str] = ()
    num_labels_left: int = 0

    def below(self, folder: str) -> Listing:
        """Returns what is in one folder of the first level.

        Args:
            folder: its name.
        """
        begin = f"{folder}/"
        names = [
            name.removeprefix(begin)
            for name in self.names
            if name.startswith(begin)
        ]
        passed_over = collections.Counter(self.passed_over)
        passed_over["in other splits"] += len(self.names) - len(names)
        return Listing(_sorted(names), passed_over)

    def folders(self) -> list[str]:
        """Returns the folders of the first level with pictures, sorted."""
        return sorted({_first(name) for name in self.names} - {""})

    def said(self) -> tuple[str, ...]:
        """Says in lines what is used, passed over and damaged."""
        lines = [f"used {self.used()}"]
        if any(self.passed_over.values()):
            lines.append(f"passed over {self.others()}")
        if self.damaged:
            named = ", ".join(self.damaged[:3])
            more = ", ..." if len(self.damaged) > 3 else ""
            lines.append(f"damaged {len(self.damaged):,}: {named}{more}")
        if self.num_labels_left:
            lines.append(f"not there {self.num_labels_left:,} that have labels")
        return tuple(map(printable, lines))

    def used(self) -> str:
        """Says how many pictures there are, and of which endings."""
        return _counted(collections.Counter(map(_ending, self.names)))

    def others(self) -> str:
        """Says how many files are passed over, and why."""
        return _counted(self.passed_over)


def _first(name: str) -> str:
    folder, slash, _ = name.partition("/")
    return folder if slash else ""


def _ending(name: str) -> str:
    return posixpath.splitext(name)[1].lower() or "without an ending"


def _counted(counts: Mapping[str, int]) -> str:
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {what}" for what, count in by_count if count]
    more = len(parts) - _NUM_SHOWN
    if more > 0:
        parts = [*parts[:_NUM_SHOWN], f"{more} kinds more"]
    return f"{sum(counts.values()):,}: {', '.join(parts)}"


def _why_not(name: str, *, is_folder: bool) -> str:
    """Says why what has a name is passed over; empty if it is not."""
    if name == "..":
        return "outside of it"
    if name.startswith("."):
        return "hidden"
    if name.lower() in _JUNK:
        return f"{name}/" if is_folder else name
    if is_folder or name.lower().endswith(ENDINGS):
        return ""
    return _ending(name)


def of_names(paths: Iterable[str]) -> Listing:
    """Sorts out what is in an archive.

    Args:
        paths: of its files, with slashes.
    """
    names, passed_over = [], collections.Counter()
    for path in paths:
        *folders, name = path.split("/")
        whys = [_why_not(folder, is_folder=True) for folder in folders]
        why = next(filter(None, [*whys, _why_not(name, is_folder=False)]), "")
        if why:
            passed_over[why] += 1
        else:
            names.append(path)
    return Listing(_sorted(names), passed_over)


def of_folder(path: str) -> Listing:
    """Sorts out what is below a folder, however deep.

    Args:
        path: of the folder, which may be gs://.

    Raises:
        UserError: it, or one in it, cannot be listed.
        StoreError: the store that it is on does not answer.
    """
    names, passed_over, tops = [], collections.Counter(), set()
    # Below each are the folders that it is in, where a link may lead back.
    left = [("", frozenset((_identity(path),)))]
    while left:
        below, above = left.pop()
        for name, is_folder, odd in _entries(posixpath.join(path, below)):
            why = odd or _why_not(name, is_folder=is_folder)
            if is_folder and not why:
                inner = f"{below}{name}/"
                identity = _identity(posixpath.join(path, inner))
                tops.update([name] if not below else [])
                if identity not in above:
                    left.append((inner, above | {identity}))
                    continue
                why = "links in a circle"
            if why:
                passed_over[why] += 1
            else:
                names.append(f"{below}{name}")
    empty = tops - {_first(name) for name in names}
    return Listing(_sorted(names), passed_over, tuple(sorted(empty)))


def _sorted(names: Iterable[str]) -> list[str]:
    # Each disk lists a directory in an order of its own. By the folder of the
    # first level first, as its labels are numbered.
    return sorted(names, key=lambda name: (_first(name), name))


def _identity(path: str) -> str:
    return path if files.is_remote(path) else os.path.realpath(path)


def _entries(path: str) -> Collection[files.Item]:
    try:
        return list(files.entries(path.rstrip("/") or path))
    except files.StoreError:
        raise
    except OSError as error:
        raise UserError(
            f"{path.rstrip('/')} cannot be listed: {error.strerror}"
        ) from error
