"""What `checkpoint_tool` does, one function for each of its commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from dtrain import errors
from dtrain.bundle import tensors
from dtrain.bundle.tree import Tree
from dtrain.checkpoint import listing, opening, writing
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.errors import UserError
from dtrain.storage import files
from dtrain.toolbox import (
    combining,
    comparison,
    edits,
    inspection,
    interchange,
    keeping,
    parsing,
)

# As diff(1) and fsck(8) say it.
_DIFFERS = 1
# How often a line of progress is written anew.
_EVERY_SECS = 0.2


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(errors.printable(line))


def inspect(arguments: argparse.Namespace) -> int:
    """Shows what is in a checkpoint."""
    with opening.opened(arguments.checkpoint) as found:
        tree = found.tree
        names = list(tree)
        if arguments.filter:
            names = edits.matching(tree, arguments.filter)
        rows = []
        with _progress(
            "looked at", sum(tree[name].num_bytes for name in names)
        ) as done:
            for row in inspection.rows(
                tree, names, read=not arguments.no_values
            ):
                rows.append(row)
                done(row.num_bytes)
        if not arguments.json:
            print(found.prefix)
            _print(inspection.lines(rows))
            return errors.FINISHED
        content = {
            "checkpoint": found.prefix,
            "step": found.manifest.step if found.manifest else None,
            "tensors": [inspection.to_json(row) for row in rows],
            "totals": inspection.totals(rows),
        }
    print(json.dumps(content, indent=1))
    return errors.FINISHED


def cat(arguments: argparse.Namespace) -> int:
    """Prints the values of a tensor.

    Raises:
        UserError: the name or the slice is of none.
    """
    wanted = parsing.slices(arguments.slice)
    with opening.opened(arguments.checkpoint) as found:
        names = edits.matching(found.tree, arguments.name)
        if len(names) > 1:
            raise UserError(
                f"{arguments.name} stands for {len(names)} tensors; name one, "
                f"as {names[0]}"
            )
        value = found.tree[names[0]].read()
    try:
        taken = value[wanted]
    except IndexError as error:
        raise UserError(
            f"slice ({arguments.slice}): {names[0]} has the shape "
            f"{list(value.shape)}: {error}"
        ) from error
    print(
        np.array2string(
            np.asarray(taken), threshold=sys.maxsize, floatmode="unique"
        )
    )
    return errors.FINISHED


def diff(arguments: argparse.Namespace) -> int:
    """Shows what differs; exits with 1 if anything does.

    Raises:
        UserError: the tolerance is none.
    """
    if not arguments.tolerance >= 0:
        raise UserError(f"tolerance ({arguments.tolerance}) must be at least 0")
    with (
        opening.opened(arguments.a) as a,
        opening.opened(arguments.b) as b,
    ):
        return _print_differences(a.tree, b.tree, arguments.tolerance)


def _print_differences(a: Tree, b: Tree, tolerance: float = 0.0) -> int:
    number = 0
    for each in comparison.differences(a, b, tolerance):
        _print([str(each)])
        number += 1
    same = len({*a, *b}) - number
    print(f"{number:,} differ, {same:,} are the same")
    return _DIFFERS if number else errors.FINISHED


def verify(arguments: argparse.Namespace) -> int:
    """Reads all of one checkpoint, or of all of a directory."""
    path = arguments.checkpoint.rstrip("/")
    prefixes = [row.prefix for row in listing.find(path)] or [
        opening.resolve(path)
    ]
    damaged = 0
    for prefix in prefixes:
        try:
            text = _verified(prefix)
        except (UserError, DamagedError) as error:
            damaged += 1
            text = f"DAMAGED  {prefix}  {error}"
        _print([text])
    return _DIFFERS if damaged else errors.FINISHED


def _verified(prefix: str) -> str:
    """Reads all of a checkpoint.

    Raises:
        DamagedError: it is not what was written.
        UserError: likewise, of another program's.
    """
    made = opening.manifest_of(prefix)
    if made:
        path, step = opening.target(prefix)
        with files.storage_errors(prefix):
            CheckpointDirectory(path).verify(step)
        return f"ok       {prefix}  {len(made.tensors)} tensors"
    with opening.opened(prefix) as found:
        for name in found.tree:
            if found.tree[name].dtype != "variant":
                found.tree[name].read()
        count = len(found.tree)
    # Another program keeps no checksum of what was in its memory.
    return f"ok       {prefix}  {count} tensors, by TensorFlow's checksums"


def digest(arguments: argparse.Namespace) -> int:
    """Prints one SHA-256 over all variables."""
    with opening.opened(arguments.checkpoint) as found:
        print(f"{tensors.digest(found.local)}  {found.prefix}")
    return errors.FINISHED


def edit(arguments: argparse.Namespace) -> int:
    """Makes another checkpoint by edits.

    Raises:
        UserError: an edit cannot be done; nothing is written.
    """
    if bool(arguments.output) == arguments.dry_run:
        raise UserError("name the result, --output=DIR/ckpt-N, or --dry_run")
    wishes = _read_edits(arguments.edits)
    wishes += [
        parsing.wish(verb, text) for verb, text in arguments.wishes or []
    ]
    if not wishes:
        raise UserError(
            "there is no edit, as --drop=NAME; see edit --help for all"
        )
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(opening.opened(arguments.checkpoint))

        def source(path: str) -> Tree:
            return stack.enter_context(opening.opened(path)).tree

        tree = found.tree
        for each in parsing.make(wishes, source):
            tree = each(tree)
        if arguments.dry_run:
            _print_differences(found.tree, tree)
            return errors.FINISHED
        _commit(tree, arguments.output, found.manifest)
    return errors.FINISHED


def _read_edits(path: str) -> list[parsing.Wish]:
    """Reads a file of edits; none if no file is named.

    Raises:
        UserError: there is none, or it holds none.
    """
    return parsing.load(_read(path), path) if path else []


def _read(path: str) -> bytes:
    """Reads a small file.

    Raises:
        UserError: there is none.
        StorageError: it cannot be read.
    """
    with files.storage_errors(path):
        data = files.read(path)
    if data is None:
        raise UserError(f"there is no file {path}")
    return data


def _commit(tree: Tree, output: str, made: Manifest | None = None) -> None:
    """Writes a tree.

    Args:
        tree: what is written.
        output: as in `edited/ckpt-5000`.
        made: what was noted of its only source is noted of it too.
    """
    facts: dict[str, Any] = {}
    if made:
        _check_number(tree, output)
        facts = {"metrics": dict(made.metrics), "run": dict(made.run)}
    total = sum(tree[name].num_bytes for name in tree)
    with _progress("written", total) as done:
        writing.commit(tree, output, facts, done)
    print(f"wrote {output}: {len(tree)} tensors, {listing.size(total)}")


def _check_number(tree: Tree, output: str) -> None:
    """Refuses a name by which dtrain would take a state for another step's.

    Raises:
        UserError: it is one.
    """
    _, number = opening.target(output)
    step = tree.step
    if step is not None and step != number:
        raise UserError(
            f"output ({output}): it is of step {step}; call it ckpt-{step}, or "
            f"add --set_step={number}"
        )


def average(arguments: argparse.Namespace) -> int:
    """Computes the mean of checkpoints.

    Raises:
        UserError: they are not of one program.
    """
    paths = arguments.checkpoints
    weights = [1.0] * len(paths)
    if arguments.weights:
        try:
            weights = [float(each) for each in arguments.weights.split(",")]
        except ValueError as error:
            raise UserError(
                f"weights ({arguments.weights}) must be numbers, as in 1,1,2"
            ) from error
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(opening.opened(path)) for path in paths]
        mean = combining.average([each.tree for each in found], weights)
        _commit(mean, arguments.output)
    return errors.FINISHED


def merge(arguments: argparse.Namespace) -> int:
    """Takes each part from its own checkpoint.

    Raises:
        UserError: a part is not there.
    """
    pairs = [part.partition("=") for part in arguments.parts]
    for part, (name, _, path) in zip(arguments.parts, pairs, strict=True):
        if not name or not path:
            raise UserError(
                f"{part} must be NAME=CKPT, as in generator=a/ckpt-5"
            )
    with contextlib.ExitStack() as stack:
        found = {
            path: stack.enter_context(opening.opened(path))
            for path in dict.fromkeys(path for _, _, path in pairs)
        }
        base = found[pairs[0][2]]
        parts = {name: found[path].tree for name, _, path in pairs}
        for name, tree in parts.items():
            edits.matching(tree, name)
        whole = combining.merge(base.tree, parts)
        _commit(whole, arguments.output)
    return errors.FINISHED


def export(arguments: argparse.Namespace) -> int:
    """Writes tensors to a file, or the EMA generator as a model."""
    output = arguments.output
    if not output.endswith((".safetensors", ".npz")):
        return _export_model(arguments)
    with opening.opened(arguments.checkpoint) as found:
        names = list(found.tree)
        if arguments.filter:
            names = edits.matching(found.tree, arguments.filter)
        total = sum(found.tree[name].num_bytes for name in names)
        with _progress("written", total) as done:
            interchange.write(found.tree, names, output, done)
    print(f"wrote {output}: {len(names)} tensors, {listing.size(total)}")
    return errors.FINISHED


def _export_model(arguments: argparse.Namespace) -> int:
    """Writes the EMA generator of a run.

    Raises:
        UserError: the checkpoint is not one of a run of dtrain.
    """
    # Networks take a while to import, and no other command needs them.
    from dtrain.run import export

    if arguments.filter:
        raise UserError(
            f"filter ({arguments.filter}) is for .safetensors and .npz; a "
            "model is written whole"
        )
    prefix = opening.resolve(arguments.checkpoint)
    path, step = opening.target(prefix)
    run_dir = os.path.dirname(os.path.abspath(path))
    if files.is_remote(path):
        run_dir = path.rpartition("/")[0]
    export.save(export.restore(run_dir, step), arguments.output)
    print(f"wrote {arguments.output}: the EMA generator of {prefix}")
    return errors.FINISHED


def import_(arguments: argparse.Namespace) -> int:
    """Makes a checkpoint of a file of tensors."""
    path = arguments.map
    names = interchange.read_map(_read(path), path) if path else {}
    with contextlib.ExitStack() as stack:
        tree = stack.enter_context(interchange.opened(arguments.file))
        if arguments.into:
            found = stack.enter_context(opening.opened(arguments.into))
            tree = interchange.place(
                tree, found.tree, names, is_partial=arguments.partial
            )
        elif names:
            tree = tree.renamed(names)
        _commit(tree, arguments.output)
    return errors.FINISHED


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows on a terminal how far something is.

    Args:
        what: is done.
        total: bytes.

    Yields:
        To be called with the bytes that were done since the last call.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    done, shown = 0, 0.0

    def show(num_bytes: int) -> None:
        nonlocal done, shown
        done += num_bytes
        if time.monotonic() - shown > _EVERY_SECS:
            shown = time.monotonic()
            line = f"{what} {listing.size(done)} of {listing.size(total)}"
            print(f"\r{line:40}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print(f"\r{'':40}\r", end="", file=sys.stderr, flush=True)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    command.__name__.rstrip("_"): command
    for command in (
        *(inspect, cat, diff, verify, digest),
        *(edit, average, merge),
        *(export, import_),
        *(keeping.prune, keeping.pin, keeping.unpin),
    )
}
