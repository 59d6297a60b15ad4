"""Starts a run from the weights of another checkpoint.

Only the first start of a run reads it: later the run has weights of its own,
and the other checkpoint may be gone. `run_dir/init_from.json` says what was
taken.
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
        step: the steps that were done there; None if it does not say.
        digest: of all its variables, as `checkpoint_tool digest` prints it.
        parts: of the new run that have their values from it.
        renamed: the name of a part in the new run, by that in the checkpoint.
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
        """Writes `init_from.json`; the chief calls this.

        Raises:
            StorageError: it cannot be written to.
        """
        text = json.dumps(self._asdict(), indent=1) + "\n"
        with files.storage_errors(run_dir):
            files.write(f"{run_dir}/init_from.json", text.encode())


def take(checkpoint: tf.train.Checkpoint, config: RunSettings) -> Taken:
    """Takes weights from `--init_from`. Every worker calls this.

    If it has no moving average, its generator is taken for that too.

    Args:
        checkpoint: of a GAN that has not begun.
        config: with an `init_from`.

    Raises:
        UserError: there is no such checkpoint, or it does not fit.
        StorageError: a disk or a store failed.
    """
    renamed = _parse_map(config.init_map)
    parts = _PARTS[config.init_parts]
    with opening.opened(config.init_from) as source:
        tree = source.tree.renamed(renamed)
        has_ema = bool(tree.below(EMA))
        taken = [name for name in parts if has_ema or name != EMA]
        target = tf.train.Checkpoint(
            **{name: getattr(checkpoint, name) for name in taken}
        )
        _restore(tree, taken, target, source.prefix)
        if not has_ema:
            average = tf.train.Checkpoint(generator=checkpoint.ema_generator)
            _restore(tree, ["generator"], average, source.prefix)
        digest = tensors.digest(source.local)
        return Taken(source.prefix, source.tree.step, digest, parts, renamed)


def _restore(
    tree: Tree, names: list[str], target: tf.train.Checkpoint, prefix: str
) -> None:
    """Writes parts of a tree to a file, and restores it as any checkpoint."""
    others = [name for name in tree if name.partition("/")[0] not in names]
    with tempfile.TemporaryDirectory(prefix="dtrain-") as path:
        with files.storage_errors(path):
            writing.WritableTree(tree.without(others)).write(f"{path}/ckpt")
        restore.restore(
            target,
            f"{path}/ckpt",
            prefix,
            what="this run",
            remedy="make the model as it was, or map names by --init_map; "
            f"it holds {', '.join(tree.top()[:8])}",
        )


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
