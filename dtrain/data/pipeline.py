"""The batches of a run: a pure function of (seed, step, worker).

The images that the discriminator sees in a run are counted by their position
p = 0, 1, 2, ...: draw d takes batch_size of them, from d * batch_size on, and a
step takes some draws. At position p is image permutation(seed, epoch)(p mod n)
of the n images, where epoch = p // n. So nothing of the input has to be saved,
any step is reached at once, and a batch is the same however many replicas share
it. Whether an image is mirrored follows from the seed and its position, too.

What is paired with the images is read at the same index and mirrored with them.
What is not is read at the same positions, as from a run of its own: by its own
length, and by a seed that follows from that of the run and from its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from dtrain.cluster import strategy as strategy_lib
from dtrain.config import Config
from dtrain.data.sources import IMAGES, Data, Source, memory, pictures
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
# What small batches of images in memory cost is to call the operations that
# make them, a dozen for the order alone: so these make many batches at once.
_MOST_AT_ONCE = 64
_BYTES_AT_ONCE = 4 * 2**20


class Batch(NamedTuple):
    """What one replica sees of one draw.

    Attributes:
        positions: int64 [b], consecutive; of the images in the run.
        images: float32 [b, H, W, C] in [-1, 1].
        labels: int32 [b] in [0, num_classes), or zeros without labels.
        inputs: what else there is, by name, [b, ...] of `Data.specs`: images
            as above, label maps int32 [b, H, W], and numbers.
    """

    positions: tf.Tensor
    images: tf.Tensor
    labels: tf.Tensor
    inputs: Mapping[str, tf.Tensor] = {}


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


def _indices(
    data: Data, positions: tf.Tensor, seed: int
) -> dict[str, tf.Tensor]:
    """Returns what each of `data.every` shows at positions."""
    indices = sample_indices(positions, seed, data.source.num_images)
    found = dict.fromkeys(data.every, indices)
    for name, source in data.unpaired.items():
        own_seed = seed_of(seed, name)
        found[name] = sample_indices(positions, own_seed, source.num_images)
    return found


def seed_of(seed: int, name: str) -> int:
    """Returns the seed of an unpaired data set, below 2**64.

    Args:
        seed: of the run.
        name: of the data set.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def make_iterator(
    data: Data,
    config: Config,
    strategy: tf.distribute.Strategy,
    step: int,
    draws_per_step: int,
) -> Any:
    """Makes the input of a run from a step on. Every worker calls this.

    A batch_size that the replicas cannot share is a UserError.

    Args:
        data: all that is read.
        config: `batch_size`, `seed` and `mirror` count.
        strategy: whose replicas share the batches.
        step: number of steps already taken.
        draws_per_step: batches that a step takes.

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
        return make_dataset_of_part(data, config, part, step * draws_per_step)

    return iter(strategy.distribute_datasets_from_function(make_dataset))


def make_dataset_of_part(
    data: Data, config: Config, part: Part, first_draw: int
) -> tf.data.Dataset:
    """Makes the endless input of one worker.

    Args:
        data: all that is read.
        config: `seed` and `mirror` count.
        part: which part of each draw the worker reads.
        first_draw: the draw to start at.

    Returns:
        Elements of `Batch`, one for each local replica in turn.
    """
    every, size = data.every, part.replica_batch_size
    count = _elements_at_once(data, size)

    # AutoGraph is for what a user brings: it takes a second of every start.
    @tf.autograph.experimental.do_not_convert
    def fetch(element: tf.Tensor) -> tuple[tf.Tensor, Any]:
        starts = part.first_position(element + tf.range(count, dtype=tf.int64))
        positions = starts[:, None] + tf.range(size, dtype=tf.int64)
        positions = tf.reshape(positions, [count * size])
        indices = _indices(data, positions, config.seed)
        return positions, {
            name: every[name].fetch(of_it) for name, of_it in indices.items()
        }

    @tf.autograph.experimental.do_not_convert
    def scale(positions: tf.Tensor, read: Any) -> Batch:
        return _as_seen(data, config, positions, read)

    # Four maps: op determinism lets only one thread at a time run Python, as
    # `fetch` may, but many decode. What is large is decoded one by one.
    elements = tf.data.Dataset.range(
        first_draw * part.local_replicas, tf.int64.max, count
    )
    decode = _of_each(data, lambda source, fetched: source.decode(fetched))
    finish = _of_each(data, lambda source, decoded: source.finish(decoded))
    # One thread is plenty for gathering from memory.
    threads = None if _in_memory(data) else pictures.NUM_THREADS
    dataset = elements.map(fetch, threads).map(decode, threads)
    dataset = dataset.map(finish).map(scale, threads)
    if count > 1:
        dataset = _cut(dataset, size)
    return dataset.prefetch(_PREFETCH).with_options(_options())


def _options() -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    # All that it would tune is set here, and its thread delays the end.
    options.autotune.enabled = False
    # Nor is there anything to fuse, and to look takes a third of a second.
    options.experimental_optimization.apply_default_optimizations = False
    return options


def _cut(dataset: tf.data.Dataset, size: int) -> tf.data.Dataset:
    """Makes batches of `size` of larger ones, without an end."""
    # Of what may end, the last batch might be smaller for a strategy.
    endless = tf.data.experimental.assert_cardinality(
        tf.data.INFINITE_CARDINALITY
    )
    return dataset.rebatch(size, drop_remainder=True).apply(endless)


def _elements_at_once(data: Data, size: int) -> int:
    """Returns how many elements of a worker's input are made at once.

    Args:
        data: all that is read.
        size: examples of an element.
    """
    if not _in_memory(data):
        return 1
    bytes_of_one = sum(
        each.spec.shape.num_elements() * each.spec.dtype.size
        for each in data.every.values()
    )
    most = _BYTES_AT_ONCE // (size * bytes_of_one)
    return max(1, min(most, _MOST_AT_ONCE))


def _in_memory(data: Data) -> bool:
    return all(source.in_memory for source in data.every.values())


def _of_each(
    data: Data, action: Callable[[Source, Any], Any]
) -> Callable[[tf.Tensor, Any], tuple[tf.Tensor, Any]]:
    """Makes an action on what was read one that hands the positions on."""

    @tf.autograph.experimental.do_not_convert
    def act(positions: tf.Tensor, read: Any) -> tuple[tf.Tensor, Any]:
        return positions, {
            name: action(data.every[name], of_it)
            for name, of_it in read.items()
        }

    return act


def _as_seen(
    data: Data, config: Config, positions: tf.Tensor, read: Any
) -> Batch:
    """Makes a batch of what was read of each of `data.every`."""
    size, seen, labels = positions.shape[0], {}, {}
    is_mirrored = mirrored(positions, config.seed) if config.mirror else None
    for name, source in data.every.items():
        stored, labels[name] = read[name]
        is_turned = is_mirrored
        if config.mirror and name in data.unpaired:
            is_turned = mirrored(positions, seed_of(config.seed, name))
        stored = tf.ensure_shape(stored, (size, *source.stored_shape))
        seen[name] = source.seen(stored, is_turned)
        labels[name] = tf.ensure_shape(labels[name], (size,))
    images, inputs = seen.pop(IMAGES), seen
    for name, source in data.unpaired.items():
        if source.num_classes:
            inputs[f"{name}_labels"] = labels[name]
    return Batch(positions, images, labels[IMAGES], inputs)


def mirrored(positions: tf.Tensor, seed: int) -> tf.Tensor:
    """Tells, bool [b], whether the image at a position is mirrored.

    Args:
        positions: int64 [b], of the run.
        seed: of the run.
    """
    state = _mix(_mix(_uint64(seed)) + _uint64(_MIRRORING))
    state += tf.bitcast(positions, tf.uint64) * _uint64(_GOLDEN_GAMMA)
    return tf.equal(_mix(state) % _uint64(2), _uint64(1))


def first_batch(data: Data, config: Config, num_examples: int) -> Batch:
    """Reads the first examples of a run as the run sees them.

    An image that cannot be read is a UserError.

    Args:
        data: all that is read.
        config: `seed` and `mirror` count.
        num_examples: how many.

    Returns:
        Those of the first positions.
    """
    # On the host, as the input of a run.
    with tf.device("CPU:0"):
        positions = tf.range(num_examples, dtype=tf.int64)
        stored = {
            name: read(data.every[name], indices)
            for name, indices in _indices(data, positions, config.seed).items()
        }
        return _as_seen(data, config, positions, stored)


def read(source: Source, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Reads examples of one data set, as they are stored; see `Source.read`.

    Args:
        source: the data set.
        indices: int64 [b] in [0, num_images).

    Raises:
        UserError: one cannot be read.
        OpError: another time it could be.
    """
    if source.in_memory:
        return source.read(indices)
    # Photographs take a tenth of a second each.
    each = tf.data.Dataset.from_tensor_slices(indices).batch(1)
    try:
        images, labels = zip(*memory.read(source, each), strict=True)
    except tf.errors.OpError as error:
        fault = source.find_fault(indices.numpy().tolist())
        if fault is None:
            raise
        mistake = source.refusal(fault)
        raise mistake from error
    return tf.concat(images, 0), tf.concat(labels, 0)


def explain(
    error: Exception, data: Data, config: Config, step: int, draws_per_step: int
) -> UserError | None:
    """Finds the image that made a step fail; None if it was none.

    TensorFlow does not say which file it could not decode. Since it is known
    which images the failed steps have, they are tried again one by one.

    Args:
        error: what running the steps raised.
        data: all that is read.
        config: of the run.
        step: number of steps taken before the loop that failed.
        draws_per_step: batches that a step takes.
    """
    if not isinstance(error, tf.errors.OpError):
        return None
    first = step * draws_per_step * config.batch_size
    # One step more than the loop took, for what was read ahead.
    num_draws = (config.steps_per_loop + 1) * draws_per_step
    positions = tf.range(
        first, first + num_draws * config.batch_size, dtype=tf.int64
    )
    for name, indices in _indices(data, positions, config.seed).items():
        source = data.every[name]
        if not source.in_memory:
            fault = source.find_fault(dict.fromkeys(indices.numpy().tolist()))
            if fault is not None:
                return fault
    return None
