"""One checkpoint of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from dtrain.bundle import tree as tree_lib
from dtrain.bundle.tree import Tensor, Tree
from dtrain.errors import UserError
from dtrain.toolbox import edits


def average(trees: Sequence[Tree], weights: Sequence[float]) -> Tree:
    """Computes the weighted mean of checkpoints of one program.

    It is summed in float64 and rounded once. Tensors without fractions, such
    as a step, are those of the last checkpoint.

    Args:
        trees: at least one; all of the same names, shapes and dtypes.
        weights: of each; they need not sum to 1.

    Raises:
        UserError: the trees are not of the same kind, or the weights sum to 0.
    """
    last = trees[-1]
    total = float(np.sum(weights))
    if len(weights) != len(trees) or not np.isfinite(total) or not total:
        raise UserError(
            f"weights ({', '.join(map(str, weights))}) must be {len(trees)} "
            "numbers whose sum is not 0"
        )
    for number, tree in enumerate(trees, 1):
        for name in sorted({*tree, *last}):
            if _kind(tree, name) != _kind(last, name):
                raise UserError(
                    f"{name} is {_kind(tree, name)} in checkpoint {number} and "
                    f"{_kind(last, name)} in the last one; only those of one "
                    "program can be averaged"
                )
    shares = [weight / total for weight in weights]
    return last.with_tensors(
        {
            name: _mean([tree[name] for tree in trees], shares)
            for name in last
            if tf.as_dtype(last[name].dtype).is_floating
        }
    )


def _kind(tree: Tree, name: str) -> str:
    return str(tree[name]) if name in tree.keys else "not there"


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    def read() -> np.ndarray:
        total = np.zeros(last.shape, np.float64)
        for tensor, share in zip(tensors, shares, strict=True):
            total += tensor.read().astype(np.float64) * share
        return np.asarray(total.astype(dtype))

    last = tensors[-1]
    dtype = tf.as_dtype(last.dtype).as_numpy_dtype
    return Tensor(last.dtype, last.shape, read)


def merge(base: Tree, parts: Mapping[str, Tree]) -> Tree:
    """Takes each part from its own checkpoint, and the rest from a base.

    Args:
        base: gives what no part names.
        parts: the checkpoint of each part, by its name, as `discriminator`.

    Raises:
        UserError: a part is not there, or does not fit what it replaces.
    """
    whole, new = base, {}
    for name, tree in parts.items():
        if not base.below(name):
            new[name] = tree
        elif tree is not base:
            if not tree.below(name):
                raise UserError(f"{name}: {tree_lib.unknown(tree, name)}")
            whole = edits.copy(name, tree, name)(whole)
    if not new:
        return whole
    return tree_lib.joined({**dict.fromkeys(whole.top(), whole), **new})
