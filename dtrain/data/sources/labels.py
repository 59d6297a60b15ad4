"""Labels as people write them -> int32 [n] in [0, num_classes).

One `numbered` for all: whole numbers from 0 or from 1, names, one-hot rows, a
column. The labels of pictures stand in a table beside them: StyleGAN's
`dataset.json` ({"labels": [["00000/a.png", 3], ...]}), a JSON object of name
and label, or a CSV of two columns.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import io
import json
import os
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dtrain.data.sources import source
from dtrain.errors import UserError

_MAX_CLASSES = 100_000


class Labelled(NamedTuple):
    """What a table says of pictures.

    Attributes:
        labels: int32 [n]; None where it says that there are none.
        num_others: how many more pictures it names, which are not there.
    """

    labels: np.ndarray | None
    num_others: int = 0


def numbered(name: str, labels: np.ndarray, num_images: int) -> np.ndarray:
    """Makes class numbers of labels.

    Args:
        name: of the labels, for an error.
        labels: [n] or [n, 1] of whole numbers from 0 or from 1, or of texts,
            which are numbered in their order; or one-hot, [n, classes].
        num_images: how many there must be.

    Returns:
        int32 [n], at least 0.

    Raises:
        UserError: they are something else.
    """
    shape = labels.shape
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    is_one_hot = _is_one_hot(labels)
    if is_one_hot:
        labels = labels.argmax(axis=1)
    if labels.shape != (num_images,):
        raise UserError(
            f"{name} is {source.shown(shape) or 'one number'}; there must be "
            f"one label for each of the {num_images} images"
        )
    if labels.dtype.kind in "SU":
        labels = _of_texts(labels)
    if labels.dtype.kind == "f" and (labels == np.rint(labels)).all():
        labels = labels.clip(-1, _MAX_CLASSES).astype(np.int64)
    if labels.dtype.kind not in "iub":
        other = f"is of type {labels.dtype}"
        if labels.dtype.kind == "f":
            other = f"has {labels[labels != np.rint(labels)][0]:g}"
        raise UserError(
            f"{name} {other}; labels must be whole numbers, names or one-hot"
        )
    labels = labels.astype(np.int64)
    if labels.min() < 0 or labels.max() >= _MAX_CLASSES:
        raise UserError(
            f"{name} lies in [{labels.min()}, {labels.max()}]; labels must "
            f"count the classes from 0, at most {_MAX_CLASSES} of them"
        )
    if labels.min() == 1 and not is_one_hot:
        # Or a class that no image has would be drawn.
        labels -= 1
    return labels.astype(np.int32)


def _is_one_hot(labels: np.ndarray) -> bool:
    if labels.ndim != 2 or labels.dtype.kind not in "iubf":
        return False
    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all())


def _of_texts(labels: np.ndarray) -> np.ndarray:
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "latin-1")
    are_decimal = np.char.isdecimal(labels).all()
    if are_decimal and labels.dtype.itemsize <= 4 * 9:
        return labels.astype(np.int64)
    if not are_decimal:
        # A class has another name than 0.5 or -1.
        with contextlib.suppress(ValueError):
            return labels.astype(np.float64)
    return np.unique(labels, return_inverse=True)[1]


def of_pictures(
    path: str, content: bytes, names: Sequence[str], root: str = ""
) -> Labelled:
    """Reads a table of labels.

    Args:
        path: of the table, whose ending tells its form.
        content: of the table.
        names: of the pictures, as class/a.png.
        root: path of the folder that they are in.

    Raises:
        UserError: it is no such table, or has no label for a picture.
    """
    try:
        text = content.decode("utf-8-sig")
        if path.endswith(".json"):
            rows = _rows_of_json(json.loads(text))
        else:
            rows = _rows_of_csv(text)
        if rows is None:
            return Labelled(None)
        table = _table(rows, root)
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(
            f"{path} is no table of labels: {source.reason(error)}"
        ) from error
    keys = _keys(table, names)
    missing = [name for name in names if name not in keys]
    if missing:
        base = posixpath.basename(missing[0])
        is_vague = {base, posixpath.splitext(base)[0]} & table.keys()
        raise UserError(
            f"{path} has no label for {len(missing):,} of {len(names):,} "
            f"pictures, such as {missing[0]}; "
            + (
                "several have that name: write it with its folder"
                if is_vague
                else "add them, move these pictures away, or give --labels=none"
            )
        )
    labels = _as_array([table[keys[name]] for name in names])
    used = {*keys.values()}
    others = [key for key in table if key not in used]
    if others[:1] == [next(iter(table), None)] and not path.endswith(".json"):
        # A header is the first row, of no picture.
        del others[0]
    numbers = numbered(f"the labels in {path}", labels, len(names))
    return Labelled(numbers, len(others))


def _rows_of_json(table: Any) -> Iterable[tuple[str, Any]] | None:
    if isinstance(table, dict) and "labels" in table:
        table = table["labels"]
    if table is None:
        return None
    if not isinstance(table, (dict, list)):
        raise ValueError("it must be a list of names and labels")
    rows = list(table.items() if isinstance(table, dict) else table)
    for row in rows:
        is_pair = isinstance(row, (list, tuple)) and len(row) == 2
        if not is_pair or not isinstance(row[0], str):
            raise ValueError("it must hold a name and a label for each picture")
    return rows


def _rows_of_csv(text: str) -> Iterable[tuple[str, Any]]:
    first = text.partition("\n")[0]
    separator = next((each for each in "\t;" if each in first), ",")
    rows = list(csv.reader(io.StringIO(text), delimiter=separator))
    wrong = next((row for row in rows if len(row) not in (0, 2)), None)
    if wrong is not None:
        raise ValueError(
            f"a row has {len(wrong)} columns; there must be two, of the name "
            "and the label"
        )
    # A header is the row of no picture.
    return [(row[0].strip(), row[1].strip()) for row in rows if row]


def _table(rows: Iterable[tuple[str, Any]], root: str) -> dict[str, Any]:
    """Returns the labels by the names in a table, as those in the folder.

    Raises:
        ValueError: one has two labels, or an empty one.
    """
    above = {posixpath.normpath(each) + "/" for each in _paths(root)}
    table: dict[str, Any] = {}
    for name, label in rows:
        key = posixpath.normpath(name.replace("\\", "/"))
        key = next(
            (key[len(each) :] for each in above if key.startswith(each)), key
        )
        if label == "":
            raise ValueError(f"{name} has an empty label")
        if table.setdefault(key, label) != label:
            raise ValueError(f"{name} has two labels")
    return table


def _paths(root: str) -> set[str]:
    """Returns what a table may call the folder: from /, or from here."""
    if not root or "://" in root:
        return {root} - {""}
    return {root, os.path.abspath(root), os.path.relpath(root)} - {"."}


def _keys(table: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Finds what a table calls each picture; without those that it has not.

    It may name pictures without their ending, or without their folder where
    that is enough.
    """
    bases = [posixpath.basename(name) for name in names]
    counts = collections.Counter(bases)
    keys = {}
    for name, base in zip(names, bases, strict=True):
        tried = [name, posixpath.splitext(name)[0]]
        if counts[base] == 1:
            tried += [base, posixpath.splitext(base)[0]]
        key = next((key for key in tried if key in table), None)
        if key is not None:
            keys[name] = key
    return keys


def _as_array(labels: Sequence[Any]) -> np.ndarray:
    kinds = {type(label) for label in labels}
    if kinds <= {int, float} and all(abs(label) < 2**31 for label in labels):
        return np.array(labels, np.float64)
    if kinds == {str}:
        return np.array(labels)
    if kinds == {list} and len({len(label) for label in labels}) == 1:
        flat = [value for label in labels for value in label]
        if {type(value) for value in flat} <= {int, float}:
            return np.array(labels, np.float64)
    # `numbered` says what is wrong with it.
    return np.array([repr(label) for label in labels], object)


def of_folders(names: Sequence[str]) -> np.ndarray | None:
    """Numbers the folders of the first level; None if there are none.

    Args:
        names: of the pictures, as class/more/a.png.
    """
    folders = [name.partition("/")[0] for name in names if "/" in name]
    if len(folders) < len(names):
        return None
    numbers = {each: number for number, each in enumerate(sorted({*folders}))}
    return np.array([numbers[folder] for folder in folders], np.int32)


def num_classes(labels: np.ndarray | None) -> int:
    """Returns how many classes there are; 0 without labels."""
    return 0 if labels is None else int(labels.max()) + 1
