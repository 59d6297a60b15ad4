"""Starts a run from the weights of another checkpoint.

Only the first start of a run reads it: later the run has weights of its own,
and the other checkpoint may be gone. `run_dir/init_from.json` says what was
taken.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from dtrain.bundle import (
    fit,
    keras_state,
    objects,
    placing,
    problems,
    restore,
    tensors,
)
from dtrain.bundle.tree import Tree, tops
from dtrain.checkpoint import opening, writing
from dtrain.config import RunSettings
from dtrain.errors import UserError
from dtrain.run import best
from dtrain.storage import files, temporary

_EMA = "ema_"
_UNTRACKED = "untracked"


def _parts_of(checkpoint: tf.train.Checkpoint, which: str) -> tuple[str, ...]:
    """Names what of a GAN's checkpoint is taken by a value of --init_parts."""
    parts = objects.parts_of(checkpoint)
    averages = [name for name in parts if name.startswith(_EMA)]
    averaged = [name.removeprefix(_EMA) for name in averages]
    if which == "generator":
        return (*averaged, *averages)
    others = [
        name
        for name, part in parts.items()
        if isinstance(part, keras.Model) and name not in (*averages, *averaged)
    ]
    networks = (*averaged, *averages, *others)
    if which == "networks":
        return networks
    optimizers = [
        f"{name}_optimizer" for name in networks if f"{name}_optimizer" in parts
    ]
    return (*networks, *optimizers, *(("state",) if "state" in parts else ()))


class Taken(NamedTuple):
    """What a run was started from.

    Attributes:
        checkpoint: its prefix.
        step: the steps that were done there; None if it does not say.
        digest: of all its variables, as `checkpoint_tool digest` prints it.
        parts: of the new run that have their values from it.
        renamed: the name of a part in the new run, by that in the checkpoint.
        left: what of the checkpoint is not taken, a name for all below it.
        new: what the checkpoint does not have, as `--init_new` says.
    """

    checkpoint: str
    step: int | None
    digest: str
    parts: tuple[str, ...]
    renamed: dict[str, str]
    left: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        """Returns a line for the start of a run."""
        lines = [f"init      {', '.join(self.parts)} of {self.checkpoint}"]
        for words, names in (("not taken", self.left), ("new", self.new)):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                lines.append(f"{words}: {', '.join(names[:8])}{more}")
        return "; ".join(lines)

    def write(self, run_dir: str) -> None:
        """Writes `init_from.json`; the chief calls this.

        Raises:
            StorageError: it cannot be written to.
        """
        text = json.dumps(self._asdict(), indent=1) + "\n"
        with files.storage_errors(run_dir):
            files.write(f"{run_dir}/init_from.json", text.encode())


class Source(NamedTuple):
    """What a run begins from.

    Attributes:
        checkpoint: its prefix.
        digest: of what was taken by a start that was killed before it had
            saved anything; "" if this start is the first.
    """

    checkpoint: str
    digest: str = ""


def find(config: RunSettings) -> Source:
    """Finds what a run begins from; the chief calls this, for all workers.

    `--init_from` may name the directory of a run that goes on: a start that
    was killed and the next one must not take two of its states.

    Args:
        config: with an `init_from`.

    Raises:
        UserError: there is no such checkpoint, or init_from.json is damaged.
        StorageError: a disk or a store failed.
    """
    path = f"{config.run_dir}/init_from.json"
    with files.storage_errors(path):
        data = files.read(path)
    if data is None:
        return Source(opening.resolve(best.prefix_of(config.init_from)))
    try:
        values = json.loads(data)
        source = Source(values["checkpoint"], values["digest"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged; remove it to begin from what "
            f"{config.init_from} has now"
        ) from error
    return Source(str(source.checkpoint), str(source.digest))


def take(
    checkpoint: tf.train.Checkpoint, config: RunSettings, source: Source
) -> Taken:
    """Takes weights from `--init_from`. Every worker calls this.

    Where it has no moving average, the network is taken for that too.

    Args:
        checkpoint: of a GAN that has not begun.
        config: with an `init_from`.
        source: what `find` returned on the chief.

    Raises:
        UserError: there is no such checkpoint, it does not fit, or it is not
            what the run has begun from before.
        StorageError: a disk or a store failed.
    """
    renamed = _parse_map(config.init_map)
    parts = _parts_of(checkpoint, config.init_parts)
    new = tuple(filter(None, config.init_new.split(",")))
    with opening.opened(source.checkpoint) as opened:
        digest = tensors.digest(opened.local)
        if source.digest not in ("", digest):
            raise UserError(
                f"{opened.prefix} is not what the run has begun from: its "
                f"digest was {source.digest[:12]} and is {digest[:12]}; bring "
                "it back, or name another run_dir to start over"
            )
        tree = opened.tree.renamed(renamed)
        averages = [part for part in parts if _lacks_average(tree, part)]
        taken = [name for name in parts if name not in averages]
        part = _Part.of(checkpoint, taken, taken)
        _check_new(new, part)
        _restore(tree, part, opened.prefix, new)
        if averages:
            names = [name.removeprefix(_EMA) for name in averages]
            average = _Part.of(checkpoint, averages, names)
            _restore(tree, average, opened.prefix, new)
        return Taken(
            checkpoint=opened.prefix,
            step=opened.tree.step,
            digest=digest,
            parts=parts,
            renamed=renamed,
            left=_left(tree, part, new),
            new=new,
        )


def _lacks_average(tree: Tree, part: str) -> bool:
    return part.startswith(_EMA) and not tree.below(part)


class _Part(NamedTuple):
    """Some parts of the checkpoint of a GAN.

    Attributes:
        target: of these parts, with what TensorFlow does not reach of them,
            such as the layers that a subclassed model holds in a list.
        sources: what each of its tensors is called in a whole checkpoint, by
            its name in `target`.
    """

    target: tf.train.Checkpoint
    sources: dict[str, str]

    @classmethod
    def of(
        cls,
        checkpoint: tf.train.Checkpoint,
        parts: Sequence[str],
        names: Sequence[str],
    ) -> _Part:
        """Takes parts of a GAN's, to be restored from those of other names."""
        held: dict[str, Any] = {
            name: getattr(checkpoint, part)
            for part, name in zip(parts, names, strict=True)
        }
        untracked = keras_state.untracked(held)
        if untracked:
            held[_UNTRACKED] = tf.train.Checkpoint(**untracked)
        target, whole = tf.train.Checkpoint(**held), _names(checkpoint)
        for part, name in zip(parts, names, strict=True):
            if part != name:
                # Its variables are those of the other, in the same order.
                for one, other in zip(
                    getattr(checkpoint, part).variables,
                    getattr(checkpoint, name).variables,
                    strict=True,
                ):
                    whole[id(one.value)] = whole[id(other.value)]
        sources = {
            name: whole[variable]
            for variable, name in _names(target).items()
            if variable in whole
        }
        return cls(target, sources)

    def has(self, name: str) -> bool:
        """Tells whether a tensor of another checkpoint is of these parts."""
        top, _, rest = name.partition("/")
        if top == _UNTRACKED:
            # As in generator_3 and generator_vocabulary_0.
            top = re.sub(
                r"(_vocabulary|_weights|_boundaries)?_\d+(/.*)?$", "", rest
            )
        return hasattr(self.target, top)


def _names(checkpoint: tf.train.Checkpoint) -> dict[int, str]:
    """Returns the names of variables by their id."""
    owners = objects.walk(checkpoint).owners
    names = {key: name for name, key in fit.of_objects(checkpoint).keys.items()}
    return {
        id(objects.unwrapped(owner)): names[key]
        for key, owner in owners.items()
    }


def _restore(tree: Tree, part: _Part, prefix: str, new: Sequence[str]) -> None:
    """Writes parts of a tree to a file, and restores it as any checkpoint.

    What `new` names is not taken.
    """
    program = fit.of_objects(part.target)
    held = ", ".join(tree.top()[:8])
    if new:
        tree = _grown(tree, program, part, new, prefix)
    else:
        tree = _fitting(tree, program, part)
    with temporary.directory("init") as path:
        with files.storage_errors(path):
            writing.WritableTree(tree).write(f"{path}/ckpt")
        restore.restore(
            part.target,
            f"{path}/ckpt",
            prefix,
            what="this run",
            remedy="make the model as it was, or map names by --init_map; "
            f"it holds {held}",
        )


def _fitting(tree: Tree, program: Tree, part: _Part) -> Tree:
    """Takes what is of these parts, in the form that the program has it."""
    whole = {
        name: tree[source]
        for name, source in part.sources.items()
        if source in tree.keys
    }
    tree = tree.without([name for name in tree if not part.has(name)])
    # TensorFlow numbers saves by it, and makes one where there is none.
    used = {*part.sources.values(), "save_counter"}
    if used.issuperset(tree) and {*whole, "save_counter"}.issuperset(program):
        return program.with_tensors(whole)
    if fit.compare(tree, program):
        # Of TensorFlow 1 or Keras 2, whose names lead to the same another way.
        with contextlib.suppress(UserError):
            return placing.place(_without_slots(tree), program, {})
    return tree


def _check_new(new: Sequence[str], part: _Part) -> None:
    """Refuses names of blocks that are not there.

    Raises:
        UserError: nothing has one of these names.
    """
    program = fit.of_objects(part.target)
    for name in new:
        if not any(_is_of(tensor, name) for tensor in program):
            raise UserError(
                f"init_new ({name}) names nothing that is taken; that is "
                + ", ".join(program.top()[:8])
            )


def _left(tree: Tree, part: _Part, new: Sequence[str]) -> tuple[str, ...]:
    """Names what is not taken, but for what counts saves."""
    if new:
        program = fit.of_objects(part.target)
        sources = {part.sources.get(name, name) for name in program}
        rest = [
            name
            for name in tree
            if name not in sources or any(_is_of(name, each) for each in new)
        ]
    else:
        rest = [name for name in tree if not part.has(name)]
    return tuple(
        problems.tops([name for name in rest if name != "save_counter"], tree)
    )


def _grown(
    tree: Tree, program: Tree, part: _Part, new: Sequence[str], prefix: str
) -> Tree:
    """Puts what is new in the program, as it was made, to what is taken.

    Raises:
        UserError: something else is missing, or of another shape.
    """
    fresh = {
        tensor
        for tensor in program
        if any(_is_of(tensor, name) for name in new)
    }
    sources = {name: part.sources.get(name, name) for name in program}
    lacking = [
        name
        for name, source in sources.items()
        if name not in (*fresh, "save_counter")
        and (source not in tree.keys or str(tree[source]) != str(program[name]))
    ]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(
            f"{prefix} does not have {lacking[0]}{more} as this run has it; "
            "name by --init_new what is new, as in generator/block"
        )
    taken = {
        name: tree[source]
        for name, source in sources.items()
        if name not in fresh and source in tree.keys
    }
    return program.with_tensors(taken)


def _is_of(tensor: str, name: str) -> bool:
    """Tells whether a tensor is of a block, of its average or of its slots."""
    pattern = "/".join(re.escape(part) for part in name.split("/"))
    pattern = pattern.replace(r"\*", "[^/]*")
    return bool(re.search(rf"(^|/)(ema_)?{pattern}(/|$)", tensor))


def _without_slots(tree: Tree) -> Tree:
    """Leaves out what TensorFlow 1 keeps below a variable, as w/Adam of w."""
    slots = [
        name
        for name in tree
        if any(top in tree.keys for top in tops(name.rpartition("/")[0]))
    ]
    return tree.without(slots)


def _parse_map(text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        old, equals, new = part.partition("=")
        if not equals or not old or not new or old in pairs:
            raise UserError(
                f"init_map ({text}) must be OLD=NEW,OLD=NEW; try gen=generator"
            )
        pairs[old] = new
    return pairs
