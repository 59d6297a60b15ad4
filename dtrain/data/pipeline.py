"""The batches of a run: a pure function of (seed, step, worker).

The images that the discriminator sees in a run are counted by their position
p = 0, 1, 2, ...: draw d takes batch_size of them, from d * batch_size on, and a
step takes `discriminator_steps` draws. At position p is image permutation(seed,
epoch)(p mod n) of the n images, where epoch = p // n. So nothing of the input
has to be saved, any step is reached at once, and a batch is the same however
many replicas share it. Whether an image is mirrored follows from the seed and
its position, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from dtrain.cluster import strategy as strategy_lib
from dtrain.config import Config
from dtrain.data.sources import Source, memory, pictures
from dtrain.errors import UserError

# With its default, 4, the indices that RandomIndexShuffle gives to neighbouring
# positions, and with neighbouring seeds, correlate.
_ROUNDS = 8
# The constants of splitmix64: Steele, Lea and Flood, "Fast splittable
# pseudorandom number generators", OOPSLA 2014.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
# Of the seed of mirroring, apart from that of the order.
_MIRRORING = 1
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
# Batches of a replica that are ready before they are asked for.
_PREFETCH = 4


class Batch(NamedTuple):
    """What one replica sees of one draw.

    Attributes:
        positions: int64 [b], consecutive; of the images in the run.
        images: float32 [b, H, W, C] in [-1, 1].
        labels: int32 [b] in [0, num_classes), or zeros without labels.
    """

    positions: tf.Tensor
    images: tf.Tensor
    labels: tf.Tensor


class Part(NamedTuple):
    """The part of every draw that one worker reads.

    Attributes:
        batch_size: images of a draw, of all replicas.
        num_replicas: of all workers; divides batch_size.
        num_workers: divides num_replicas.
        worker: in [0, num_workers).
    """

    batch_size: int
    num_replicas: int
    num_workers: int
    worker: int

    @property
    def replica_batch_size(self) -> int:
        """Images of a draw that one replica sees."""
        return self.batch_size // self.num_replicas

    @property
    def local_replicas(self) -> int:
        """Replicas of this worker."""
        return self.num_replicas // self.num_workers

    def first_position(self, element: Any) -> Any:
        """Returns where in the run an element of the worker's input starts.

        A worker reads one element for each of its replicas and each draw;
        an element holds `replica_batch_size` consecutive positions.

        Args:
            element: its number, counted from the first draw of the run; an
                int, or int64 [].
        """
        draw = element // self.local_replicas
        replica = self.worker * self.local_replicas
        replica += element % self.local_replicas
        return draw * self.batch_size + replica * self.replica_batch_size


def sample_indices(
    positions: tf.Tensor, seed: int, num_images: int
) -> tf.Tensor:
    """Returns which image is shown at each position of a run.

    Args:
        positions: int64 [b], at least 0.
        seed: of the run.
        num_images: of the source.

    Returns:
        int64 [b] in [0, num_images); over the positions of an epoch a
        permutation.
    """
    # The public tf.random.experimental.index_shuffle pads a batch of seeds
    # wrongly.
    return tf.raw_ops.RandomIndexShuffle(
        index=positions % num_images,
        seed=_permutation_seeds(seed, positions // num_images),
        max_index=tf.constant(num_images - 1, tf.int64),
        rounds=_ROUNDS,
    )


def _permutation_seeds(seed: int, epochs: tf.Tensor) -> tf.Tensor:
    """Returns seeds, uint32 [b, 3], for the permutations of epochs.

    They have to look random, for RandomIndexShuffle itself mixes them little.
    """
    gamma = _uint64(_GOLDEN_GAMMA)
    state = _mix(_uint64(seed))
    state += tf.bitcast(epochs, tf.uint64) * gamma
    first, second = _mix(state), _mix(state + gamma)
    words = (first, tf.bitwise.right_shift(first, _uint64(32)), second)
    low = [tf.bitwise.bitwise_and(word, _uint64(2**32 - 1)) for word in words]
    return tf.cast(tf.stack(low, axis=-1), tf.uint32)


def _mix(bits: tf.Tensor) -> tf.Tensor:
    """Mixes uint64 numbers as splitmix64 does; a bijection."""
    for shift, factor in _MIX:
        shifted = tf.bitwise.right_shift(bits, _uint64(shift))
        bits = tf.bitwise.bitwise_xor(bits, shifted) * _uint64(factor)
    return bits


def _uint64(value: int) -> tf.Tensor:
    return tf.constant(value, tf.uint64)


def make_iterator(
    source: Source, config: Config, strategy: tf.distribute.Strategy, step: int
) -> Any:
    """Makes the input of a run from a step on. Every worker calls this.

    A batch_size that the replicas cannot share is a UserError.

    Args:
        source: of the images.
        config: `batch_size`, `seed` and `discriminator_steps` count.
        strategy: whose replicas share the batches.
        step: number of steps already taken.

    Returns:
        An iterator for `strategy.run`; each element is one draw, of which
        each replica sees its `Batch`.
    """
    strategy_lib.check_batch(config, strategy)

    def make_dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
        part = Part(
            config.batch_size,
            context.num_replicas_in_sync,
            context.num_input_pipelines,
            context.input_pipeline_id,
        )
        first_draw = step * config.discriminator_steps
        return make_dataset_of_part(source, config, part, first_draw)

    return iter(strategy.distribute_datasets_from_function(make_dataset))


def make_dataset_of_part(
    source: Source, config: Config, part: Part, first_draw: int
) -> tf.data.Dataset:
    """Makes the endless input of one worker.

    Args:
        source: of the images.
        config: `seed` and `mirror` count.
        part: which part of each draw the worker reads.
        first_draw: the draw to start at.

    Returns:
        Elements of `Batch`, one for each local replica in turn.
    """

    # AutoGraph is for what a user brings: it takes a second of every start.
    @tf.autograph.experimental.do_not_convert
    def fetch(element: tf.Tensor) -> tuple[tf.Tensor, Any]:
        start = part.first_position(element)
        size = part.replica_batch_size
        positions = start + tf.range(size, dtype=tf.int64)
        indices = sample_indices(positions, config.seed, source.num_images)
        return positions, source.fetch(indices)

    @tf.autograph.experimental.do_not_convert
    def scale(positions: tf.Tensor, read: Any) -> Batch:
        images, labels = read
        images = tf.ensure_shape(
            images, (part.replica_batch_size, *source.image_shape)
        )
        labels = tf.ensure_shape(labels, (part.replica_batch_size,))
        return _as_seen(positions, images, labels, config)

    # Four maps: op determinism lets only one thread at a time run Python, as
    # `fetch` may, but many decode. What is large is decoded one by one.
    elements = tf.data.Dataset.range(
        first_draw * part.local_replicas, tf.int64.max
    )
    # One thread is plenty for gathering from memory.
    threads = None if source.in_memory else pictures.NUM_THREADS
    dataset = elements.map(fetch, threads)
    dataset = dataset.map(_of_read(source.decode), threads)
    dataset = dataset.map(_of_read(source.finish)).map(scale, threads)
    options = tf.data.Options()
    options.deterministic = True
    # All that it would tune is set here, and its thread delays the end.
    options.autotune.enabled = False
    return dataset.prefetch(_PREFETCH).with_options(options)


def _as_seen(
    positions: tf.Tensor, images: tf.Tensor, labels: tf.Tensor, config: Config
) -> Batch:
    if config.mirror:
        is_mirrored = mirrored(positions, config.seed)[:, None, None, None]
        images = tf.where(is_mirrored, tf.reverse(images, [2]), images)
    return Batch(positions, tf.cast(images, tf.float32) / 127.5 - 1, labels)


def mirrored(positions: tf.Tensor, seed: int) -> tf.Tensor:
    """Tells, bool [b], whether the image at a position is mirrored.

    Args:
        positions: int64 [b], of the run.
        seed: of the run.
    """
    state = _mix(_mix(_uint64(seed)) + _uint64(_MIRRORING))
    state += tf.bitcast(positions, tf.uint64) * _uint64(_GOLDEN_GAMMA)
    return tf.equal(_mix(state) % _uint64(2), _uint64(1))


def first_images(source: Source, config: Config, num_images: int) -> tf.Tensor:
    """Reads the first images of a run as the run sees them.

    Args:
        source: of the images.
        config: `seed` and `mirror` count.
        num_images: at most so many.

    Returns:
        float32 [n, H, W, C] in [-1, 1].

    Raises:
        UserError: one cannot be read.
        OpError: another time it could be.
    """
    number = min(num_images, source.num_images)
    # On the host, as the input of a run.
    with tf.device("CPU:0"):
        positions = tf.range(number, dtype=tf.int64)
        indices = sample_indices(positions, config.seed, source.num_images)
        try:
            images, labels = _read(source, indices)
        except tf.errors.OpError as error:
            fault = source.find_fault(indices.numpy().tolist())
            if fault is None:
                raise
            mistake = source.refusal(fault)
            raise mistake from error
        return _as_seen(positions, images, labels, config).images


def _read(source: Source, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    if source.in_memory:
        return source.read(indices)
    # Photographs take a tenth of a second each.
    each = tf.data.Dataset.from_tensor_slices(indices).batch(1)
    images, labels = zip(*memory.read(source, each), strict=True)
    return tf.concat(images, 0), tf.concat(labels, 0)


def _of_read(
    action: Callable[[Any], Any],
) -> Callable[[tf.Tensor, Any], tuple[tf.Tensor, Any]]:
    """Makes an action on what was read one that hands the positions on."""

    @tf.autograph.experimental.do_not_convert
    def act(positions: tf.Tensor, read: Any) -> tuple[tf.Tensor, Any]:
        return positions, action(read)

    return act


def explain(
    error: Exception, source: Source, config: Config, step: int
) -> UserError | None:
    """Finds the image that made a step fail; None if it was none.

    TensorFlow does not say which file it could not decode. Since it is known
    which images the failed steps have, they are tried again one by one.

    Args:
        error: what running the steps raised.
        source: of the images.
        config: of the run.
        step: number of steps taken before the loop that failed.
    """
    if source.in_memory or not isinstance(error, tf.errors.OpError):
        return None
    draws_per_step = config.discriminator_steps
    first = step * draws_per_step * config.batch_size
    # One step more than the loop took, for what was read ahead.
    num_draws = (config.steps_per_loop + 1) * draws_per_step
    positions = tf.range(first, first + num_draws * config.batch_size)
    indices = sample_indices(
        tf.cast(positions, tf.int64), config.seed, source.num_images
    )
    return source.find_fault(dict.fromkeys(indices.numpy().tolist()))
