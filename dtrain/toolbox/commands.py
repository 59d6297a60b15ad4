"""What `checkpoint_tool` does, one function for each of its commands."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from dtrain import errors
from dtrain.bundle import fingerprint, placing, tensors
from dtrain.bundle.tree import Tree
from dtrain.checkpoint import listing, opening, writing
from dtrain.checkpoint.directory import CheckpointDirectory
from dtrain.checkpoint.manifest import DamagedError, Manifest
from dtrain.errors import UserError
from dtrain.storage import files
from dtrain.tensorfiles import containers
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
# Of a file; a SavedModel is a directory without one, or with a slash behind.
_ENDINGS = (".keras", ".safetensors", ".npz")


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(errors.printable(line))


def inspect(arguments: argparse.Namespace) -> int:
    """Shows what is in a checkpoint."""
    with interchange.opened(arguments.checkpoint) as checkpoint:
        tree, names = (
            checkpoint.tree,
            _chosen(checkpoint.tree, arguments.filter),
        )
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
            print(checkpoint.prefix)
            _print(inspection.lines(rows))
            return errors.FINISHED
        content = {
            "checkpoint": checkpoint.prefix,
            "step": checkpoint.manifest.step if checkpoint.manifest else None,
            "tensors": [inspection.to_json(row) for row in rows],
            "totals": inspection.totals(rows),
        }
    print(json.dumps(content, indent=1))
    return errors.FINISHED


def _chosen(tree: Tree, pattern: str) -> list[str]:
    return edits.matching(tree, pattern) if pattern else list(tree)


def cat(arguments: argparse.Namespace) -> int:
    """Prints the values of a tensor.

    Raises:
        UserError: the name is not of one tensor, or the slice is outside it.
    """
    wanted = parsing.slices(arguments.slice)
    with interchange.opened(arguments.checkpoint) as checkpoint:
        names = edits.matching(checkpoint.tree, arguments.name)
        if arguments.name in names:
            # Below it are others, as what TensorFlow 1 keeps for a variable.
            names = [arguments.name]
        if len(names) > 1:
            raise UserError(
                f"{arguments.name} stands for {len(names)} tensors; name one, "
                f"as {names[0]}"
            )
        value = checkpoint.tree[names[0]].read()
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
        UserError: the tolerance is below 0.
    """
    if not arguments.tolerance >= 0:
        raise UserError(f"tolerance ({arguments.tolerance}) must be at least 0")
    with (
        interchange.opened(arguments.a) as a,
        interchange.opened(arguments.b) as b,
    ):
        return _print_differences(a.tree, b.tree, arguments.tolerance)


def _print_differences(a: Tree, b: Tree, tolerance: float = 0.0) -> int:
    number = 0
    for difference in comparison.differences(a, b, tolerance):
        _print([str(difference)])
        number += 1
    same = len({*a, *b}) - number
    print(f"{number:,} differ, {same:,} are the same")
    return _DIFFERS if number else errors.FINISHED


def verify(arguments: argparse.Namespace) -> int:
    """Reads all of one checkpoint, or of all of a directory."""
    path = arguments.checkpoint.rstrip("/")
    prefixes = [row.prefix for row in listing.find(path)]
    if not prefixes:
        is_file = path.endswith(containers.SUFFIXES)
        prefixes = [path if is_file else opening.resolve(path)]
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
    """Reads all of a checkpoint, and says that it is what was written."""
    manifest = opening.manifest_of(prefix)
    if manifest:
        path, step = opening.target(prefix)
        with files.storage_errors(prefix):
            CheckpointDirectory(path).verify(step)
        return f"ok       {prefix}  {len(manifest.tensors)} tensors"
    with interchange.opened(prefix) as checkpoint:
        for name in checkpoint.tree:
            if checkpoint.tree[name].dtype != "variant":
                checkpoint.tree[name].read()
        count = len(checkpoint.tree)
        # Another program keeps no checksum of what was in its memory.
        by = "TensorFlow's checksums" if checkpoint.local else "reading all"
    return f"ok       {prefix}  {count} tensors, by {by}"


def digest(arguments: argparse.Namespace) -> int:
    """Prints one SHA-256 over all variables."""
    with interchange.opened(arguments.checkpoint) as source:
        if source.local:
            total = tensors.digest(source.local)
        else:
            total = fingerprint.digest(
                (name, source.tree[name].read()) for name in source.tree
            )
        print(f"{total}  {source.prefix}")
    return errors.FINISHED


def edit(arguments: argparse.Namespace) -> int:
    """Makes another checkpoint by edits.

    Raises:
        UserError: an edit cannot be done; nothing is written.
    """
    if bool(arguments.output) == arguments.dry_run:
        raise UserError("name the result, --output=DIR/ckpt-N, or --dry_run")
    path = arguments.edits
    wishes = parsing.load(_read(path), path) if path else []
    wishes += [
        parsing.wish(verb, text) for verb, text in arguments.wishes or []
    ]
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(
            interchange.opened(arguments.checkpoint)
        )

        def source(path: str) -> Tree:
            return stack.enter_context(interchange.opened(path)).tree

        tree = checkpoint.tree
        for one_edit in parsing.make(wishes, source):
            tree = one_edit(tree)
        if arguments.dry_run:
            _print_differences(checkpoint.tree, tree)
            return errors.FINISHED
        _commit(tree, arguments.output, checkpoint.manifest)
    return errors.FINISHED


def _read(path: str) -> bytes:
    with files.storage_errors(path):
        data = files.read(path)
    if data is None:
        raise UserError(f"there is no file {path}")
    return data


def _commit(tree: Tree, output: str, source: Manifest | None = None) -> None:
    """Writes a tree; of an edited checkpoint with its source's facts.

    Raises:
        UserError: dtrain would take it by its name for another step's.
    """
    facts: dict[str, Any] = {}
    if source:
        _, number = opening.target(output)
        step = tree.step
        if step not in (None, number):
            raise UserError(
                f"output ({output}): it is of step {step}; call it "
                f"ckpt-{step}, or add --set_step={number}"
            )
        facts = {"metrics": dict(source.metrics), "run": dict(source.run)}
    total = sum(tree[name].num_bytes for name in tree)
    with _progress("written", total) as done:
        writing.commit(tree, output, facts, done)
    print(f"wrote {output}: {len(tree)} tensors, {listing.size(total)}")


def average(arguments: argparse.Namespace) -> int:
    """Computes the mean of checkpoints.

    Raises:
        UserError: the weights are no numbers.
    """
    paths = arguments.checkpoints
    weights = [1.0] * len(paths)
    if arguments.weights:
        try:
            weights = [float(weight) for weight in arguments.weights.split(",")]
        except ValueError as error:
            raise UserError(
                f"weights ({arguments.weights}) must be numbers, as in 1,1,2"
            ) from error
    with contextlib.ExitStack() as stack:
        trees = [
            stack.enter_context(interchange.opened(path)).tree for path in paths
        ]
        _commit(combining.average(trees, weights), arguments.output)
    return errors.FINISHED


def merge(arguments: argparse.Namespace) -> int:
    """Takes each part from its own checkpoint.

    Raises:
        UserError: a part is not written as NAME=CKPT.
    """
    pairs = [part.partition("=") for part in arguments.parts]
    for part, (name, _, path) in zip(arguments.parts, pairs, strict=True):
        if not name or not path:
            raise UserError(
                f"{part} must be NAME=CKPT, as in generator=a/ckpt-5"
            )
    with contextlib.ExitStack() as stack:
        trees = {
            path: stack.enter_context(interchange.opened(path)).tree
            for path in dict.fromkeys(path for _, _, path in pairs)
        }
        parts = {name: trees[path] for name, _, path in pairs}
        for name, tree in parts.items():
            edits.matching(tree, name)
        whole = combining.merge(trees[pairs[0][2]], parts)
        _commit(whole, arguments.output)
    return errors.FINISHED


def export(arguments: argparse.Namespace) -> int:
    """Writes tensors to a file, or the EMA generator as a model.

    Raises:
        UserError: the name of the file is that of another format.
    """
    output = arguments.output
    ending = os.path.splitext(output)[1]
    if ending and ending not in _ENDINGS:
        close = difflib.get_close_matches(ending, _ENDINGS, 1)
        raise UserError(
            f"output ({output}) cannot be written as {ending}; use "
            f"{close[0] if close else ', '.join(_ENDINGS)}, or a directory, "
            "with a slash at its end, for a SavedModel"
        )
    arguments.checkpoint = _meant(arguments.checkpoint)
    if not output.endswith((".safetensors", ".npz")):
        return _export_model(arguments)
    if arguments.network:
        raise UserError(
            f"network ({arguments.network}) is for models; of a file of "
            f"tensors, choose by --filter='{arguments.network}/*'"
        )
    with interchange.opened(arguments.checkpoint) as checkpoint:
        names = _chosen(checkpoint.tree, arguments.filter)
        total = sum(checkpoint.tree[name].num_bytes for name in names)
        with _progress("written", total) as done:
            interchange.write(checkpoint.tree, names, output, done)
    print(f"wrote {output}: {len(names)} tensors, {listing.size(total)}")
    return errors.FINISHED


def _meant(path: str) -> str:
    """Returns the checkpoint that RUN_DIR/best means; any other path as is."""
    if os.path.basename(path.rstrip("/")) != "best":
        return path
    # What a run is takes a while to import.
    from dtrain.run import best

    return best.prefix_of(path)


def _export_model(arguments: argparse.Namespace) -> int:
    # Networks take a while to import, and no other command needs them.
    from dtrain.run import export

    if arguments.filter:
        raise UserError(
            f"filter ({arguments.filter}) is for .safetensors and .npz; a "
            "model is written whole"
        )
    prefix = opening.resolve(arguments.checkpoint)
    manifest = opening.manifest_of(prefix)
    if not manifest or not manifest.run:
        raise UserError(
            f"{prefix} is of no run of dtrain, whose EMA generator alone can "
            "be written as a model; use .safetensors or .npz"
        )
    path, step = opening.target(prefix)
    run_dir = os.path.dirname(os.path.abspath(path))
    if files.is_remote(path):
        run_dir = path.rpartition("/")[0]
    trained = export.restore(run_dir, step, arguments.model)
    what = export.save(trained, arguments.output, arguments.network)
    print(f"wrote {arguments.output}: {what} of {prefix}")
    if arguments.output.endswith(".keras"):
        _, network = trained.network(arguments.network)
        if modules := export.modules_of(network):
            print(
                f"keras.models.load_model needs import {', '.join(modules)} "
                "before"
            )
    return errors.FINISHED


def import_(arguments: argparse.Namespace) -> int:
    """Makes a checkpoint of a file of tensors."""
    path = arguments.map
    names = interchange.read_map(_read(path), path) if path else {}
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(interchange.opened(arguments.file))
        tree = source.tree
        if arguments.into:
            checkpoint = stack.enter_context(interchange.opened(arguments.into))
            tree = placing.place(
                tree,
                checkpoint.tree,
                names,
                source.labels,
                is_partial=arguments.partial,
            )
        elif names:
            tree = tree.renamed(names)
        _commit(tree, arguments.output)
    return errors.FINISHED


@contextlib.contextmanager
def _progress(verb: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows on a terminal how far something is.

    Yields what is to be called with the bytes done since the last call.
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
            line = f"{verb} {listing.size(done)} of {listing.size(total)}"
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
