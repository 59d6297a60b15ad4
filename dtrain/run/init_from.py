"""Starts a run from the weights of another checkpoint.

Only the very start looks at it: a run that goes on has weights of its own, and
the other checkpoint may be gone. What was taken is told in
`run_dir/init_from.json`.
"""

from __future__ import annotations

import json
import tempfile
from typing import NamedTuple

import tensorflow as tf

from dtrain.bundle import restore, tensors
from dtrain.bundle.tree import Tree
from dtrain.checkpoint import opening, writing
from dtrain.config import RunSettings
from dtrain.errors import UserError
from dtrain.storage import files

EMA = "ema_generator"
_GENERATOR = ("generator", EMA)
_NETWORKS = (*_GENERATOR, "discriminator")
# By the value of --init_parts, what of a GAN's checkpoint is taken.
_PARTS = {
    "generator": _GENERATOR,
    "networks": _NETWORKS,
    "all": (*_NETWORKS, "generator_optimizer", "discriminator_optimizer"),
}


class Taken(NamedTuple):
    """What a run was started from.

    Attributes:
        checkpoint: its prefix.
        step: the steps that it says were done; None if it says nothing.
        digest: as `checkpoint_tool digest` prints it.
        parts: of the new run that have their values from it.
        renamed: name in the new run by that in the checkpoint.
    """

    checkpoint: str
    step: int | None
    digest: str
    parts: tuple[str, ...]
    renamed: dict[str, str]

    def __str__(self) -> str:
        """Returns a line for the start of a run."""
        return f"init      {', '.join(self.parts)} of {self.checkpoint}"

    def write(self, run_dir: str) -> None:
        """Notes it in the directory of the run; the chief calls this.

        Args:
            run_dir: of the run.

        Raises:
            StorageError: it cannot be written to.
        """
        text = json.dumps(self._asdict(), indent=1) + "\n"
        with files.storage_errors(run_dir):
            files.write(f"{run_dir}/init_from.json", text.encode())


def take(checkpoint: tf.train.Checkpoint, config: RunSettings) -> Taken:
    """Takes weights as `--init_from` says. Every worker calls this.

    The moving average of a source that has none is its generator.

    Args:
        checkpoint: of a GAN that has not begun.
        config: with an `init_from`.

    Returns:
        What was taken.

    Raises:
        UserError: there is no such checkpoint, or it does not fit; nothing is
            changed then.
        StorageError: a disk or a store failed.
    """
    renamed = _parse_map(config.init_map)
    parts = _PARTS[config.init_parts]
    with opening.opened(config.init_from) as found:
        tree = found.tree.renamed(renamed)
        has_ema = bool(tree.below(EMA))
        taken = [name for name in parts if has_ema or name != EMA]
        target = tf.train.Checkpoint(
            **{name: getattr(checkpoint, name) for name in taken}
        )
        _restore(tree, taken, target, found.prefix)
        if not has_ema:
            average = tf.train.Checkpoint(generator=checkpoint.ema_generator)
            _restore(tree, ["generator"], average, found.prefix)
        return Taken(
            found.prefix,
            found.tree.step,
            tensors.digest(found.local),
            parts,
            renamed,
        )


def _restore(
    tree: Tree, names: list[str], target: tf.train.Checkpoint, prefix: str
) -> None:
    """Restores parts of a tree by way of a file, as all else is restored."""
    others = [name for name in tree if name.partition("/")[0] not in names]
    with tempfile.TemporaryDirectory(prefix="dtrain-") as place:
        with files.storage_errors(place):
            writing.Written(tree.without(others)).write(f"{place}/ckpt")
        restore.restore(
            target,
            f"{place}/ckpt",
            prefix,
            what="this run",
            remedy="make the model as it was, or map names by --init_map; "
            f"it holds {', '.join(tree.top()[:8])}",
        )


def _parse_map(text: str) -> dict[str, str]:
    """Reads `--init_map`.

    Raises:
        UserError: it is no list of names.
    """
    pairs: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        old, equals, new = part.partition("=")
        if not equals or not old or not new or old in pairs:
            raise UserError(
                f"init_map ({text}) must be OLD=NEW,OLD=NEW; try gen=generator"
            )
        pairs[old] = new
    return pairs
