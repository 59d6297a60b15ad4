"""What TensorFlow's graph of objects does not tell of Keras' parts.

It does not reach every variable, holds no vocabulary, and does not know what a
layer computes of its variables, or that an optimizer has none yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from dtrain.bundle import learned, objects
from dtrain.errors import UserError

# What overrides `build` and makes no variables of its own there.
_STATELESS: tuple[type, ...] = (
    # Of Add, Concatenate and the like.
    keras.layers.Add.__base__ or keras.layers.Add,
    keras.layers.TextVectorization,
    keras.layers.Wrapper,
    keras.Model,
)


class Untracked(tf.train.Checkpoint):
    """What a save of a program's own objects would leave out."""


def untracked(parts: dict[str, Any]) -> dict[str, Any]:
    """Finds what a checkpoint of `parts` would leave out.

    TensorFlow's graph of objects does not reach the variables of
    SeedGenerators, and of layers that a subclassed model holds in a list or a
    dict; and no vocabulary.

    Args:
        parts: what `tf.train.Checkpoint` is to be made of, by name.

    Returns:
        tf.Variable by the name of its part and its position in the part; a
        `learned.Learned` by those of its layer.
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
            if isinstance(layer, learned.LOOKUPS) and id(layer) not in lookups:
                lookups.add(id(layer))
                name = f"{part}_vocabulary_{position}"
                left_out[name] = learned.Vocabulary(layer)
                if layer.output_mode == "tf_idf" and id(layer) not in reached:
                    name = f"{part}_weights_{position}"
                    left_out[name] = learned.Weights(layer)
            is_bins = isinstance(layer, keras.layers.Discretization)
            if is_bins and layer.num_bins is not None:
                name = f"{part}_boundaries_{position}"
                left_out[name] = learned.Boundaries(layer)
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
        if isinstance(part, keras.Model) and is_unbuilt(part):
            raise UserError(
                f"{name} is a model that is not built: it has no variables "
                "yet; call it once, or give it an Input"
            )


def is_unbuilt(part: Any) -> bool:
    """Tells whether this is a layer that makes variables when it is called.

    A model that was never called may be of others, which are built.

    Args:
        part: anything; only a layer of Keras, or a model, can be one.
    """
    if not isinstance(part, keras.Layer) or part.built:
        return False
    if isinstance(part, keras.Model) and not part.variables:
        return True
    # Those that are there may be seeds.
    return not part.trainable_variables and any(
        _makes_variables(each) and not each.built for each in layers_of(part)
    )


def _makes_variables(layer: Any) -> bool:
    if isinstance(layer, keras.layers.Normalization):
        return layer.input_mean is None
    overrides = type(layer).build is not keras.Layer.build
    return overrides and not isinstance(layer, _STATELESS)


def unbuilt_layers(checkpoint: tf.train.Checkpoint) -> dict[str, keras.Layer]:
    """Finds layers of which a save has nothing yet, by name.

    A layer that a model which was called has not called is no mistake.
    """
    parts = list(_named(checkpoint))
    inside = {
        id(inner)
        for _, part in parts
        for inner in layers_of(part)
        if inner is not part
    }
    return {
        name: part
        for name, part in parts
        if id(part) not in inside and is_unbuilt(part)
    }


def unseen_unbuilt(checkpoint: tf.train.Checkpoint) -> dict[str, keras.Layer]:
    """Finds likewise those that TensorFlow does not find, as in a list."""
    parts = list(_named(checkpoint))
    seen = {id(part) for _, part in parts}
    return {
        f"{name}.{layer.name}": layer
        for name, part in parts
        for layer in layers_of(part)
        if id(layer) not in seen and is_unbuilt(layer)
    }


def unbuilt_said(found: Mapping[str, keras.Layer]) -> str:
    """Says which layers are not built, and what builds them.

    Args:
        found: at least one, by name.
    """
    named = [
        f"{name} ({type(layer).__name__})" for name, layer in found.items()
    ]
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    which, verb = ("it", "is") if len(named) == 1 else ("each", "are")
    normalizes = any(
        isinstance(layer, keras.layers.Normalization)
        for layer in found.values()
    )
    way = f"adapt {which}" if normalizes else f"build {which}"
    return (
        f"{', '.join(named[:3])}{more} {verb} not built: {way}, or call "
        f"{which} once"
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
            learned.settle(layer)


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
