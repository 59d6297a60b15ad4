"""What TensorFlow's graph of objects does not tell of Keras' parts.

It does not reach every variable, holds no vocabulary, and does not know what a
layer computes of its variables, or that an optimizer has none yet.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

import keras
import tensorflow as tf

from dtrain.bundle import objects
from dtrain.errors import UserError

_LOOKUPS = (keras.layers.StringLookup, keras.layers.IntegerLookup)


class Untracked(tf.train.Checkpoint):
    """What a save of a program's own objects would leave out."""


class Vocabulary(tf.train.experimental.PythonState):
    """What a lookup layer has learned from data; no variable has it.

    TensorFlow restores only the tables that can be changed, which this is not.
    """

    def __init__(self, layer: Any) -> None:
        """Takes a `StringLookup` or an `IntegerLookup`."""
        self._layer = layer
        self._table: Any = None
        self._text = ""

    def serialize(self) -> str:
        """Returns the tokens as JSON."""
        table = self._layer.lookup_table
        if table is not self._table:
            tokens = self._layer.get_vocabulary(include_special_tokens=False)
            is_text = self._layer.vocabulary_dtype == "string"
            values = [str(each) if is_text else int(each) for each in tokens]
            self._text = json.dumps(values)
            self._table = table
        return self._text

    def deserialize(self, string_value: bytes) -> None:
        """Gives the layer the vocabulary, if it has another one.

        Raises:
            ValueError: it is none.
        """
        tokens = json.loads(string_value)
        if not isinstance(tokens, list):
            raise ValueError("a vocabulary is no list")
        layer = self._layer
        # Nothing was learned when it was saved, or it is the same.
        if tokens and tokens != json.loads(self.serialize()):
            values = tf.constant(tokens, layer.vocabulary_dtype)
            # Not by `set_vocabulary`, which makes other weights, too.
            layer.lookup_table = layer._lookup_table_from_tokens(values)
            layer._record_vocabulary_size()


class Boundaries(tf.train.experimental.PythonState):
    """What a `Discretization` has learned from data; no variable has it."""

    def __init__(self, layer: Any) -> None:
        """Takes the layer, which was given a number of bins."""
        self._layer = layer

    def serialize(self) -> str:
        """Returns the boundaries as JSON, exactly; null before `adapt`."""
        boundaries = self._layer.bin_boundaries
        if boundaries is None:
            return "null"
        return json.dumps([float(each) for each in boundaries])

    def deserialize(self, string_value: bytes) -> None:
        """Gives the layer the boundaries.

        Raises:
            ValueError: they are none.
        """
        boundaries = json.loads(string_value)
        if boundaries is not None:
            self._layer.bin_boundaries = [float(each) for each in boundaries]


def untracked(parts: dict[str, Any]) -> dict[str, Any]:
    """Finds what a checkpoint of `parts` would leave out.

    TensorFlow's graph of objects does not reach the variables of
    SeedGenerators, and of layers that a subclassed model holds in a list or a
    dict; and no vocabulary.

    Args:
        parts: what `tf.train.Checkpoint` is to be made of, by name.

    Returns:
        tf.Variable by the name of its part and its position in the part; a
        `Vocabulary` or `Boundaries` by those of its layer.
    """
    root = tf.train.Checkpoint(**parts)
    reached = set()
    for trackable in tf.train.TrackableView(root).descendants():
        reached |= {id(trackable), id(objects.unwrapped(trackable))}
    left_out: dict[str, Any] = {}
    lookups: set[int] = set()
    for part, owner in _layers_and_parts(root, parts):
        for position, variable in enumerate(getattr(owner, "variables", ())):
            if not {id(variable), id(variable.value)} & reached:
                reached.add(id(variable))
                left_out[f"{part}_{position}"] = variable.value
        for position, layer in enumerate(layers_of(owner)):
            # One that was given its vocabulary has it from the program.
            if (
                isinstance(layer, _LOOKUPS)
                and id(layer) not in lookups
                and not layer._has_input_vocabulary
            ):
                lookups.add(id(layer))
                name = f"{part}_vocabulary_{position}"
                left_out[name] = Vocabulary(layer)
            is_bins = isinstance(layer, keras.layers.Discretization)
            if is_bins and layer.num_bins is not None:
                name = f"{part}_boundaries_{position}"
                left_out[name] = Boundaries(layer)
    return left_out


def _layers_and_parts(
    root: tf.train.Checkpoint, parts: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yields the parts, and the layers that are deeper in them, by name."""
    yield from parts.items()
    for name, owner in _named(root):
        if isinstance(owner, keras.Layer):
            yield name, owner


def layers_of(owner: Any) -> list[keras.Layer]:
    """Lists a layer and all that it holds; nothing for what is none."""
    is_layer = isinstance(owner, keras.Layer)
    return list(owner._flatten_layers()) if is_layer else []


def include_untracked(checkpoint: tf.train.Checkpoint) -> None:
    """Adds, as `untracked`, what TensorFlow would not save.

    Raises:
        UserError: the program has a part of that name.
    """
    parts = objects.parts_of(checkpoint)
    before = parts.pop("untracked", None)
    if before is not None and not isinstance(before, Untracked):
        raise UserError(
            "untracked is the name of what TensorFlow does not find; give the "
            "part of that name another one"
        )
    left_out = untracked(parts)
    if left_out or before is not None:
        objects.attach(checkpoint, "untracked", Untracked(**left_out))


def refuse_unbuilt(checkpoint: tf.train.Checkpoint) -> None:
    """Refuses a state with a part that has no variables yet.

    An optimizer that `compile` gave to a model may be one that nobody uses.

    Raises:
        UserError: names the part.
    """
    parts = list(_named(checkpoint))
    given = {
        id(optimizer)
        for _, part in parts
        if isinstance(part, keras.Model)
        for optimizer in _optimizers_of(part)
    }
    # But for one that the program has named.
    given -= {id(part) for part in objects.parts_of(checkpoint).values()}
    for name, part in parts:
        is_given = id(part) in given
        is_optimizer = isinstance(part, keras.Optimizer)
        if is_optimizer and not part.built and not is_given:
            raise UserError(
                f"{name} is an optimizer that is not built: it has no state "
                f"yet; call {name}.build(model.trainable_variables) before"
            )
        is_model = isinstance(part, keras.Model)
        if is_model and not part.built and not part.variables:
            raise UserError(
                f"{name} is a model that is not built: it has no variables "
                "yet; call it once, or give it an Input"
            )


def _optimizers_of(model: keras.Model) -> list[Any]:
    """Lists what `compile` gave to a model, and what that is wrapped around."""
    optimizer = getattr(model, "optimizer", None)
    return [optimizer, getattr(optimizer, "inner_optimizer", None)]


def build_compiled(
    checkpoint: tf.train.Checkpoint, optimizers: Collection[Any]
) -> bool:
    """Builds optimizers, if models were compiled with them; tells whether.

    Args:
        checkpoint: of the models.
        optimizers: those that may be built.
    """
    wanted = {id(optimizer) for optimizer in optimizers}
    has_built = False
    for _, part in list(_named(checkpoint)):
        # Where there was no `compile`, there is none.
        optimizer = getattr(part, "optimizer", None)
        if (
            isinstance(part, keras.Model)
            and part.built
            and optimizer is not None
            and id(optimizer) in wanted
            and not optimizer.built
        ):
            with part.distribute_strategy.scope():
                optimizer.build(part.trainable_variables)
            has_built = True
    return has_built


def settle(checkpoint: tf.train.Checkpoint) -> None:
    """Lets layers compute anew what they keep of variables that changed."""
    for _, part in _named(checkpoint):
        for layer in layers_of(part):
            if isinstance(layer, keras.layers.Normalization) and layer.built:
                layer.finalize_state()
            if isinstance(layer, _LOOKUPS) and hasattr(layer, "idf_weights"):
                layer.idf_weights_const = layer.idf_weights.value()


def _named(checkpoint: tf.train.Checkpoint) -> Iterator[tuple[str, Any]]:
    """Yields all objects of a state, each with its path of attributes."""
    view = objects.view_of(checkpoint)
    # A root is a part itself.
    root = view.root
    name = "" if root is checkpoint else "root"
    queue, seen = [(name, root)], {id(root)}
    if name:
        yield name, root
    while queue:
        above, owner = queue.pop(0)
        for child in view.list_children(owner):
            if id(child.ref) not in seen:
                seen.add(id(child.ref))
                inside = above if above != "root" else ""
                full = f"{inside}.{child.name}" if inside else child.name
                yield full, child.ref
                queue.append((full, child.ref))
