"""Restores a checkpoint, or changes nothing and says why.

TensorFlow finds late that a checkpoint does not fit: it has written to half of
the variables by then, and names nothing that a person would know.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dtrain.bundle import fit, keras_state, learned, objects, problems, reader
from dtrain.bundle.fit import Misfit
from dtrain.bundle.graph import VALUE
from dtrain.bundle.literal import literal
from dtrain.bundle.tree import Tensor, Tree, is_below
from dtrain.errors import StorageError, UserError
from dtrain.storage import files

# What TensorFlow raises where names or shapes are not those of the variables.
_MISFITS = (AssertionError, ValueError, tf.errors.InvalidArgumentError)


def restore(
    checkpoint: tf.train.Checkpoint,
    prefix: str,
    name: str,
    *,
    what: str = "the program",
    remedy: str = "",
    is_stock: bool = False,
) -> None:
    """Restores all variables, or none.

    What `adapt` makes, or `build` of a Normalization, is made where it lacks.

    Args:
        checkpoint: what is restored into; its variables exist.
        prefix: where the checkpoint is, on the disk of this machine.
        name: its path for people: `prefix` may be a copy.
        what: what it should fit, for the error.
        remedy: what can be done if it does not fit.
        is_stock: whether it may lack what TensorFlow does not find and
            `untracked` holds, which then stays as it is.

    Raises:
        UserError: something is missing, left over, of another shape, dtype
            or vocabulary; no variable is changed then.
        StorageError: it is damaged.
        OSError: the disk cannot be read.
    """
    headline = f"{name} does not fit {what}: "
    tree = _read(prefix)
    comparison = _compare(tree, checkpoint, headline)
    misfit = comparison.misfit
    is_partial = comparison.lacks_untracked(is_stock=is_stock)
    if misfit and not is_partial:
        said = f"{headline}{misfit.counts()}; {comparison.remedy or remedy}"
        raise UserError(said.rstrip("; "), misfit.lines(name))
    status = _restored(checkpoint, prefix, headline)
    if is_partial and is_stock:
        warnings.warn(
            f"{name} was saved by TensorFlow, which finds no vocabularies, nor "
            "all seeds and layers: what is in untracked stays as it was made",
            stacklevel=2,
        )
    if is_partial or "save_counter" not in tree.keys:
        # Written by `Checkpoint.write`: there is no counter to restore.
        status.expect_partial()
    else:
        _check(status, headline, remedy)


def _read(prefix: str) -> Tree:
    try:
        return reader.read(prefix)
    except UserError as error:
        # It was whole a moment ago, so the disk is at fault.
        raise StorageError(str(error)) from error


def _compare(
    tree: Tree, checkpoint: tf.train.Checkpoint, headline: str
) -> _Comparison:
    try:
        return _Comparison(tree, checkpoint)
    except UserError:
        raise
    except ValueError as error:
        # Of what a layer has learned.
        raise UserError(f"{headline}{_first_line(error)}") from error


def _restored(
    checkpoint: tf.train.Checkpoint, prefix: str, headline: str
) -> Any:
    try:
        with files.os_errors(), literal(prefix) as plain:
            status = checkpoint.restore(plain)
    except ValueError as error:
        # Of what an object reads by itself, as a vocabulary.
        raise UserError(f"{headline}{_first_line(error)}") from error
    keras_state.settle(checkpoint)
    return status


def _check(status: Any, headline: str, remedy: str) -> None:
    """Refuses what TensorFlow has not restored as a whole.

    Raises:
        UserError: it has not.
    """
    try:
        # Objects without variables have to be there, too.
        status.assert_consumed()
    except _MISFITS as error:
        # Or TensorFlow prints, at exit, a line for each value without a place.
        tf.get_logger().setLevel("ERROR")
        first = _first_line(error)
        raise UserError(f"{headline}{first}; {remedy}".rstrip("; ")) from error


class _Comparison:
    """A checkpoint beside a program, once what can be made there is made.

    Attributes:
        misfit: why it does not fit; None if it does.
        remedy: which layers are to be built before; empty if none are.
    """

    def __init__(self, tree: Tree, checkpoint: tf.train.Checkpoint) -> None:
        """Compares, makes what can be made, and compares again.

        Raises:
            ValueError: what a layer has learned is none, or another.
        """
        self._tree = tree
        self._checkpoint = checkpoint
        self._look()
        if self._begin_layers():
            self._look()
        self.misfit = fit.compare(tree, self._want)
        if self.misfit and self._build_optimizers(self.misfit):
            self._look()
            self.misfit = fit.compare(tree, self._want)
        self.remedy = ""
        unbuilt = self._find_unbuilt(self.misfit) if self.misfit else {}
        if self.misfit and self._build_normalizations(self.misfit, unbuilt):
            self._look()
            self.misfit = fit.compare(tree, self._want)
        elif self.misfit and unbuilt:
            self.remedy = f"{keras_state.unbuilt_said(unbuilt)}, before"
            # To drop what there is for them is none.
            self.misfit = self.misfit._replace(renames={}, casts={}, drops=())

    def _look(self) -> None:
        """Finds the objects of the program, each with its number in the file.

        Those that are not in the file have none.
        """
        self._want = fit.of_objects(self._checkpoint)
        view = objects.view_of(self._checkpoint)
        self._owners = view.breadth_first_traversal()[0]
        self._pairs = [
            (self._owners[number], node)
            for number, node in problems.matched(self._tree, self._want).items()
        ]

    def _begin_layers(self) -> bool:
        """Gives layers what they have not learned; tells of new variables."""
        has_made = False
        for owner, node in self._pairs:
            if isinstance(owner, learned.Learned):
                saved = self._saved(node, "py_state")
                if saved is not None:
                    owner.begin(np.asarray(saved.read()).item())
            if learned.lacks_weights(owner):
                for child in self._tree.graph.nodes[node].children:
                    saved = self._saved(child.node_id, VALUE)
                    if child.local_name == "idf_weights" and saved is not None:
                        learned.make_weights(owner, np.zeros(saved.shape))
                        has_made = True
        return has_made

    def _saved(self, node: int, attribute: str) -> Tensor | None:
        """Returns what the file has of one of its objects."""
        for each in self._tree.graph.nodes[node].attributes:
            if each.name == attribute:
                return self._tree.tensors.get(each.checkpoint_key)
        return None

    def _build_optimizers(self, misfit: Misfit) -> bool:
        """Builds those of `compile` that the file has; tells whether."""
        used = [
            self._owners[node]
            for name, node in self._want.optimizers.items()
            if any(is_below(left, name) for left in misfit.left_over)
        ]
        return keras_state.build_compiled(self._checkpoint, used)

    def _find_unbuilt(self, misfit: Misfit) -> dict[str, keras.Layer]:
        """Finds layers without variables that the file has some for."""
        names = {place.node: name for name, place in self._tree.places.items()}
        found: dict[str, keras.Layer] = {}
        for owner, node in self._pairs:
            name = names.get(node, "")
            if (
                keras_state.is_unbuilt(owner)
                and any(is_below(left, name) for left in misfit.left_over)
                and not any(is_below(name, above) for above in found)
            ):
                found[name] = owner
        if any(is_below(left, "untracked") for left in misfit.left_over):
            found.update(keras_state.unseen_unbuilt(self._checkpoint))
        return found

    def _build_normalizations(
        self, misfit: Misfit, unbuilt: Mapping[str, keras.Layer]
    ) -> bool:
        """Builds them, if all fits then; tells whether."""
        shapes = {}
        for name, layer in unbuilt.items():
            mean = f"{name}/adapt_mean"
            is_one = isinstance(layer, keras.layers.Normalization)
            if not is_one or mean not in self._tree.keys:
                return False
            shapes[name] = learned.input_shape(layer, self._tree[mean].shape)
        is_all = not (misfit.missing or misfit.differing) and all(
            any(is_below(left, name) for name in shapes)
            for left in misfit.left_over
        )
        if not is_all or not unbuilt or None in shapes.values():
            return False
        for name, layer in unbuilt.items():
            layer.build(shapes[name])
        return True

    def lacks_untracked(self, *, is_stock: bool) -> bool:
        """Tells whether all that is missing may be missing.

        Args:
            is_stock: whether that is all of `untracked`, or only vocabularies
                that the program gives, which were not saved once.
        """
        misfit = self.misfit
        if misfit is None or misfit.left_over or misfit.differing:
            return False
        optional = ["untracked"] if is_stock else self._given()
        return all(
            any(is_below(name, top) for top in optional)
            for name in misfit.missing
        )

    def _given(self) -> list[str]:
        return [
            name
            for name, place in self._want.places.items()
            if isinstance(self._owners[place.node], learned.Vocabulary)
            and self._owners[place.node].is_given
        ]


def _first_line(error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    # TensorFlow goes on with its graph of objects.
    return first.removesuffix(": attributes {").rstrip(".:")
