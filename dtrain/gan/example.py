"""What an objective is given: examples, and random numbers for each of them.

A number depends on the seed, the step, the phase, the position of its example
in the global batch, and on how many draws the objective made before it: on
nothing else. So nothing random is ever saved, and any number of replicas and
micro-batches sees the same batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dtrain.errors import UserError

# TensorFlow's number of the Philox generator, whose counter counts four numbers
# of 32 bits: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
_PHILOX = 1
_NUMBERS_PER_COUNT = 4


# What is drawn, of which dtype, by its name in `Draw`.
_KINDS = {
    "normal": (tf.raw_ops.StatelessRandomNormalV2, tf.float32),
    "uniform": (tf.raw_ops.StatelessRandomUniformV2, tf.float32),
    "seeds": (tf.raw_ops.StatelessRandomUniformFullIntV2, tf.int32),
}


class Draw(NamedTuple):
    """Numbers that an objective draws for each example.

    Attributes:
        kind: normal, uniform or seeds.
        shape: of the numbers of one example.
    """

    kind: str
    shape: tuple[int, ...]


class Inputs(dict[str, tf.Tensor]):
    """What the data has of each example beside its image, by name."""

    def __missing__(self, name: str) -> tf.Tensor:
        """Says by which flag it would be there.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"the program reads example.inputs[{name!r}], and the data has "
            f"{', '.join(self) or 'nothing'} beside the images; give "
            f"--paired={name}=DATASET, or --unpaired={name}=DATASET"
        )


class Place(NamedTuple):
    """Where in a run examples are; the numbers that they draw follow from it.

    Attributes:
        seed: int64 [2], of the run, the step and the phase.
        start: int64 scalar, position of the first one in the global batch.
    """

    seed: tf.Tensor
    start: tf.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """The input of an objective: a replica's part of the batch, or less.

    Attributes:
        real_images: float32 [b, H, W, C] in [-1, 1].
        labels: int32 [b], those of the real images, and of the fakes of a
            conditional model; zeros where the data set has none.
        latents: float32 [b, latent_size], standard normal.
        uniforms: float32 [b] in [0, 1).
        step: int64 scalar, how many steps of the run are done; for what
            changes with time, which a weight that counts calls would count
            once for each micro-batch.
        inputs: what else the data has of each example, by name, [b, ...].
        state: of the program, by name, as it was before this step.
        truncation: how near to their mean a program's own `draw` is asked to
            keep its styles; 0, as in training, is not said.
        place: of the examples; None for those that draw nothing.
        drawn: what was drawn before, in the order in which it is asked for.
        record: takes down what is drawn.
    """

    real_images: tf.Tensor
    labels: tf.Tensor
    latents: tf.Tensor
    uniforms: tf.Tensor
    step: tf.Tensor
    inputs: Mapping[str, tf.Tensor] = dataclasses.field(default_factory=dict)
    state: Mapping[str, tf.Tensor] = dataclasses.field(default_factory=dict)
    truncation: float = 0.0
    place: Place | None = None
    drawn: Sequence[tf.Tensor] = ()
    record: list[Draw] | None = None
    # Handed on by `replace`, so that no two draws are alike.
    _numbers: Iterator[int] = dataclasses.field(
        default_factory=itertools.count, repr=False
    )

    def replace(self, **values: Any) -> Example:
        """Returns the examples with other values of some attributes."""
        return dataclasses.replace(self, **values)

    def normal(self, shape: tuple[int, ...] | list[int] = ()) -> tf.Tensor:
        """Draws standard normal numbers, others at each call.

        Args:
            shape: of the numbers of one example.

        Returns:
            float32 [b, *shape].
        """
        return self._next(Draw("normal", tuple(shape)))

    def uniform(self, shape: tuple[int, ...] | list[int] = ()) -> tf.Tensor:
        """Draws numbers between 0 and 1, others at each call.

        Args:
            shape: of the numbers of one example.

        Returns:
            float32 [b, *shape] in [0, 1).
        """
        return self._next(Draw("uniform", tuple(shape)))

    def seeds(self) -> tf.Tensor:
        """Draws a seed for each example, for `tf.random.stateless_*`.

        Returns:
            int32 [b, 2].
        """
        return self._next(Draw("seeds", (2,)))

    def _next(self, draw: Draw) -> tf.Tensor:
        number = next(self._numbers)
        if self.record is not None:
            self.record.append(draw)
        if number < len(self.drawn):
            return self.drawn[number]
        assert self.place is not None, "these examples draw nothing"
        return draw_at(self.place, number, draw, batch_size_of(self.latents))


def batch_size_of(batch: tf.Tensor) -> int | tf.Tensor:
    """Returns how many examples there are, if need be as an int32 scalar.

    Args:
        batch: [b, ...]; in what is exported, b is known when it is called.
    """
    size = batch.shape[0]
    return tf.shape(batch)[0] if size is None else size


@tf.autograph.experimental.do_not_convert
def draw_at(
    place: Place, number: int, draw: Draw, num_examples: int | tf.Tensor
) -> tf.Tensor:
    """Draws what the whole batch would have at these positions.

    XLA draws others than TensorFlow: call it where nothing is compiled.

    Args:
        place: of the examples.
        number: how many draws were made of them before.
        draw: what is drawn.
        num_examples: for how many examples.

    Returns:
        [num_examples, *draw.shape], in the dtype of its kind.
    """
    seed = tf.random.fold_in(place.seed, tf.constant(number, tf.int64))
    key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)
    each = math.prod(draw.shape)
    # Whole counts for each example, for any of them may come first.
    counts = -(-each // _NUMBERS_PER_COUNT)
    skipped = tf.cast(place.start * counts, tf.uint64)
    operation, dtype = _KINDS[draw.kind]
    drawn = operation(
        shape=[num_examples, counts * _NUMBERS_PER_COUNT],
        key=key,
        counter=tf.stack([counter[0] + skipped, counter[1]]),
        alg=_PHILOX,
        dtype=dtype,
    )
    return tf.reshape(drawn[:, :each], [num_examples, *draw.shape])
