"""Puts what stands beside the images of a run into their order.

Pictures are paired by their names below their folders, endings aside: a/1.jpg
with a/1.png. All else is paired by its place, and must be as many.
"""

from __future__ import annotations

import collections
import posixpath
from collections.abc import Iterable, Mapping, Sequence

from dtrain.data.sources.picture_files import PictureFiles
from dtrain.data.sources.source import Source
from dtrain.errors import UserError, printable

_NUM_NAMED = 20


def pair(
    images: Source, others: Mapping[str, Source]
) -> tuple[Source, dict[str, Source]]:
    """Pairs the images of a run with what stands beside them.

    Of pictures, those are left out whose partner is left out as damaged.

    Args:
        images: of the run.
        others: by the names that the user gave them.

    Returns:
        Both, as many, in one order.

    Raises:
        UserError: an image has no partner, or something is not as many.
    """
    folders = {
        name: other
        for name, other in others.items()
        if isinstance(other, PictureFiles)
    }
    if isinstance(images, PictureFiles):
        images = _with_partners(images, folders)
        stems = list(map(_stem, images.listing.names))
        folders = {
            name: _in_order(other, stems) for name, other in folders.items()
        }
    paired = {**others, **folders}
    for name, other in paired.items():
        if other.num_images != images.num_images:
            raise UserError(
                f"paired ({name}={other.name}) holds {other.num_images:,} "
                f"examples, and {images.name} {images.num_images:,}; there "
                "must be one for each image" + _left_out(images)
            )
    return images, paired


def _left_out(images: Source) -> str:
    damaged = images.listing.damaged if isinstance(images, PictureFiles) else ()
    if not damaged:
        return ""
    return f" ({len(damaged):,} are left out as damaged: take them away)"


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _with_partners(
    images: PictureFiles, folders: Mapping[str, PictureFiles]
) -> PictureFiles:
    """Leaves out the images whose partners are damaged.

    Raises:
        UserError: one has no partner at all.
    """
    names = images.listing.names
    kept: Sequence[int] = range(len(names))
    for name, other in folders.items():
        has, damaged = (
            set(map(_stem, some))
            for some in (other.listing.names, other.listing.damaged)
        )
        lacking = [each for each in names if _stem(each) not in has | damaged]
        if lacking:
            mistake = _no_partner(images, f"{name}={other.name}", lacking)
            raise mistake
        kept = [index for index in kept if _stem(names[index]) in has]
    if len(kept) == len(names):
        return images
    left_out = set(range(len(names))) - set(kept)
    damaged = [names[index] for index in sorted(left_out)]
    return images.only(kept, damaged=[*images.listing.damaged, *damaged])


def _no_partner(
    images: PictureFiles, other: str, lacking: Sequence[str]
) -> UserError:
    more = ", ..." if len(lacking) > 3 else ""
    return UserError(
        printable(
            f"paired ({other}) has no picture for {len(lacking):,} of the "
            f"{images.num_images:,} of {images.name}: "
            f"{', '.join(lacking[:3])}{more}; it must hold one of the same "
            "name, endings aside, for each"
        ),
        [printable(f"  {name}") for name in lacking[:_NUM_NAMED]],
    )


def _in_order(other: PictureFiles, stems: Iterable[str]) -> PictureFiles:
    """Puts pictures into the order of their partners; leaves out the rest.

    Raises:
        UserError: two have one name.
    """
    names = other.listing.names
    indices = {_stem(name): index for index, name in enumerate(names)}
    if len(indices) < len(names):
        counts = collections.Counter(map(_stem, names))
        first = counts.most_common(1)[0][0]
        same = [name for name in names if _stem(name) == first]
        raise UserError(
            printable(
                f"{other.store.place(same[0])} and {other.store.place(same[1])}"
                " have one name, and either may be meant; remove one"
            )
        )
    kept = [indices[stem] for stem in stems]
    passed_over = collections.Counter(other.listing.passed_over)
    passed_over["without a partner"] += len(names) - len({*kept})
    return other.only(kept, passed_over=passed_over)
