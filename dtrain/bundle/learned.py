"""What a layer of Keras learns from data by `adapt`, before it is trained.

A vocabulary and the boundaries of bins are in no variable, and the weights of
`tf_idf` and of a Normalization are in variables that `adapt` makes. A process
that goes on from a checkpoint need not adapt again: it has them from there.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

LOOKUPS = (keras.layers.StringLookup, keras.layers.IntegerLookup)


class Learned(tf.train.experimental.PythonState, abc.ABC):
    """What a layer has learned and no variable has, as text."""

    @abc.abstractmethod
    def begin(self, string_value: bytes) -> None:
        """Gives it to a layer that has none, and looks at it for any other.

        Args:
            string_value: what was saved.

        Raises:
            ValueError: it is none, or not that which the program gives.
        """


class Vocabulary(Learned):
    """What a lookup layer looks up; no variable has it.

    TensorFlow restores only the tables that can be changed, which this is not.
    """

    def __init__(self, layer: Any) -> None:
        """Takes a `StringLookup` or an `IntegerLookup`."""
        self._layer = layer
        self._table: Any = None
        self._text = ""

    @property
    def is_given(self) -> bool:
        """Whether the layer has it from the program, and not from data."""
        return self._layer._has_input_vocabulary

    def serialize(self) -> str:
        """Returns the tokens as JSON."""
        table = self._layer.lookup_table
        if table is not self._table:
            tokens = self._layer.get_vocabulary(include_special_tokens=False)
            convert = str if self._is_text else int
            self._text = json.dumps([convert(each) for each in tokens])
            self._table = table
        return self._text

    def deserialize(self, string_value: bytes) -> None:
        """Gives the layer the vocabulary, if it has another one.

        Raises:
            ValueError: it is none, or not that which the program gives.
        """
        tokens, own = self._tokens(string_value), json.loads(self.serialize())
        if self.is_given:
            self._check_given(tokens, own)
        # Nothing was learned when it was saved, or it is the same.
        elif tokens and tokens != own:
            layer = self._layer
            values = tf.constant(tokens, layer.vocabulary_dtype)
            # Not by `set_vocabulary`, which makes other weights, too.
            layer.lookup_table = layer._lookup_table_from_tokens(values)
            # It would be refused to have another size than before.
            layer._frozen_vocab_size = None
            layer._record_vocabulary_size()

    def begin(self, string_value: bytes) -> None:
        """See `Learned.begin`."""
        if self.is_given or json.loads(self.serialize()) == []:
            self.deserialize(string_value)
        else:
            self._tokens(string_value)

    @property
    def _is_text(self) -> bool:
        return self._layer.vocabulary_dtype == "string"

    def _tokens(self, string_value: bytes) -> list[Any]:
        tokens = json.loads(string_value)
        kind = str if self._is_text else int
        if not isinstance(tokens, list) or {*map(type, tokens)} - {kind}:
            raise ValueError(
                f"a vocabulary is no list of {kind.__name__} values"
            )
        return tokens

    def _check_given(self, saved: Sequence[Any], own: Sequence[Any]) -> None:
        """Refuses another token at the place of one; there may be more.

        Raises:
            ValueError: there is another one.
        """
        for number, token in enumerate(saved):
            here = own[number] if number < len(own) else "none"
            if here != token:
                raise ValueError(
                    f"token {number} of {self._layer.name} is {token!r} there "
                    f"and {here!r} in the program; give it the vocabulary that "
                    "it had, in that order"
                )


class Weights(Learned):
    """The weights of a layer of `tf_idf` that TensorFlow does not find."""

    def __init__(self, layer: Any) -> None:
        """Takes a `StringLookup` or an `IntegerLookup`."""
        self._layer = layer

    def serialize(self) -> str:
        """Returns the weights as JSON, exactly; null before `adapt`."""
        weights = getattr(self._layer, "idf_weights", None)
        if weights is None:
            return "null"
        return json.dumps([float(each) for each in weights.numpy()])

    def deserialize(self, string_value: bytes) -> None:
        """Gives the layer the weights.

        Raises:
            ValueError: they are none.
        """
        weights = _numbers(string_value)
        if weights is not None:
            make_weights(self._layer, weights)

    def begin(self, string_value: bytes) -> None:
        """See `Learned.begin`."""
        weights = _numbers(string_value)
        if weights is not None and lacks_weights(self._layer):
            make_weights(self._layer, weights)


class Boundaries(Learned):
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
        boundaries = _numbers(string_value)
        if boundaries is not None:
            self._layer.bin_boundaries = boundaries

    def begin(self, string_value: bytes) -> None:
        """See `Learned.begin`."""
        boundaries = _numbers(string_value)
        if self._layer.bin_boundaries is None:
            self._layer.bin_boundaries = boundaries


def _numbers(string_value: bytes) -> list[float] | None:
    numbers = json.loads(string_value)
    if numbers is None:
        return None
    if not isinstance(numbers, list) or {*map(type, numbers)} - {float}:
        raise ValueError("what a layer has learned is no list of numbers")
    return numbers


def lacks_weights(layer: Any) -> bool:
    """Tells whether a layer is one of `tf_idf` that was never adapted."""
    return (
        isinstance(layer, LOOKUPS)
        and layer.output_mode == "tf_idf"
        and not hasattr(layer, "idf_weights")
    )


def make_weights(layer: Any, values: Any) -> None:
    """Makes what `adapt` makes of a layer of `tf_idf`.

    Args:
        layer: a lookup.
        values: a number for each token.
    """
    made = tf.constant(values, keras.config.floatx())
    layer.idf_weights = tf.Variable(made, trainable=False)
    settle(layer)


def input_shape(layer: Any, shape: Sequence[int]) -> tuple[Any, ...] | None:
    """Returns what to build a Normalization with; None where nobody can tell.

    Args:
        layer: not built.
        shape: of its mean.
    """
    if layer.axis == () and not shape:
        return (None,)
    # What has more dimensions is normalized likewise, by the last.
    if layer.axis == (-1,) and len(shape) == 1:
        return (None, *shape)
    return None


def settle(layer: Any) -> None:
    """Lets a layer compute anew what it keeps of variables that changed."""
    if isinstance(layer, keras.layers.Normalization) and layer.built:
        layer.finalize_state()
    if isinstance(layer, LOOKUPS) and hasattr(layer, "idf_weights"):
        layer.idf_weights_const = layer.idf_weights.value()
