"""What is saved of a loop is all that TensorFlow would save, as it is then."""

from __future__ import annotations

import pathlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import dtrain
from dtrain.bundle import learned
from dtrain.checkpoint import retention
from dtrain.checkpoint.manager import CheckpointManager
from dtrain.errors import UserError
from tests import foreign

layers = keras.layers


def net() -> keras.Sequential:
    return keras.Sequential(
        [keras.Input((2,)), layers.Dense(3), layers.Dropout(0.5, seed=1)]
    )


def rooted_model() -> tf.train.Checkpoint:
    model = net()
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    return tf.train.Checkpoint(model, optimizer=optimizer)


class Module(tf.Module):
    """Has a variable."""

    def __init__(self) -> None:
        super().__init__()
        self.v = tf.Variable([1.0, 2.0])


class Listing(keras.Model):
    """Holds a layer with a seed where TensorFlow does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [layers.Dense(2), layers.Dropout(0.5, seed=1)]
        self.spare = [layers.Dense(2)]

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        for part in self.parts:
            inputs = part(inputs)
        return inputs


def rooted_list() -> tf.train.Checkpoint:
    model = Listing()
    model(tf.zeros([1, 2]))
    return tf.train.Checkpoint(root=model)


ROOTED = {
    "model and optimizer": rooted_model,
    "model alone": lambda: tf.train.Checkpoint(net()),
    "by keyword": lambda: tf.train.Checkpoint(root=net()),
    "module": lambda: tf.train.Checkpoint(Module(), step=tf.Variable(0)),
    "layers in a list": rooted_list,
}


@pytest.mark.parametrize("make_rooted", ROOTED.values(), ids=ROOTED)
def test_a_root_is_saved_as_tensorflow_saves_it(
    make_rooted: Callable[[], tf.train.Checkpoint], tmp_path: pathlib.Path
) -> None:
    state = make_rooted()
    stock = {*foreign.saved(state.write(f"{tmp_path}/stock/ckpt"))}
    with CheckpointManager(state, tmp_path / "ours") as manager:
        change(state.root)
        wanted = numbers(state.root)
        manager.save(1, wait=True)
    ours = {*foreign.saved(f"{tmp_path}/ours/ckpt-1")}
    extra = {key.partition("/")[0] for key in ours - stock}
    assert stock <= ours
    assert extra <= {"save_counter", "untracked"}
    again = make_rooted()
    with CheckpointManager(again, tmp_path / "ours") as manager:
        assert manager.restore() == 1
    np.testing.assert_equal(numbers(again.root), wanted)


def change(owner: Any) -> None:
    for variable in owner.variables:
        ones = tf.ones(variable.shape, variable.dtype)
        variable.assign(ones * 7)


def numbers(owner: Any) -> list[np.ndarray]:
    return [np.array(variable) for variable in owner.variables]


def test_a_weak_reference_to_a_root(tmp_path: pathlib.Path) -> None:
    module = Module()
    state = tf.train.Checkpoint(root=weakref.ref(module))
    with CheckpointManager(state, tmp_path) as manager:
        manager.save(1)
        module.v.assign([0.0, 0.0])
        manager.restore()
    np.testing.assert_array_equal(module.v, [1.0, 2.0])


def attach(state: tf.train.Checkpoint) -> None:
    state.extra = tf.Variable(5.0)


def replace(state: tf.train.Checkpoint) -> None:
    state.v = tf.Variable(6.0)


def append(state: tf.train.Checkpoint) -> None:
    state.blocks.append(tf.Variable(7.0))


def attach_below(state: tf.train.Checkpoint) -> None:
    state.module.w = Module()


def grow(state: tf.train.Checkpoint) -> None:
    """A GAN that is given a larger block, and an optimizer of that."""
    state.grown = net()
    state.grown_optimizer = keras.optimizers.SGD(momentum=0.9)
    state.grown_optimizer.build(state.grown.trainable_variables)


def build_unseen(state: tf.train.Checkpoint) -> None:
    state.model.spare[0].build((None, 2))


def build(state: tf.train.Checkpoint) -> None:
    """What was not used is used after all."""
    state.compiled.optimizer.build(state.compiled.trainable_variables)


def growing() -> tf.train.Checkpoint:
    model = Listing()
    model(tf.zeros([1, 2]))
    compiled = net()
    compiled.compile()
    return tf.train.Checkpoint(
        v=tf.Variable(1.0),
        blocks=[tf.Variable(2.0)],
        module=Module(),
        model=model,
        compiled=compiled,
    )


@pytest.mark.parametrize(
    "change_state",
    [attach, replace, append, attach_below, grow, build_unseen, build],
)
def test_what_comes_after_the_first_save_is_saved(
    change_state: Callable[[tf.train.Checkpoint], None], tmp_path: pathlib.Path
) -> None:
    state = growing()
    with CheckpointManager(state, tmp_path / "ours") as manager:
        manager.save(1)
        change_state(state)
        # All that TensorFlow would write, under its keys.
        stock = foreign.saved(state.write(f"{tmp_path}/stock/ckpt"))
        manager.save(2, wait=True)
        ours = foreign.saved(f"{tmp_path}/ours/ckpt-2")
        assert stock.keys() <= ours.keys()
        # Ours is the step.
        stock.pop("save_counter/.ATTRIBUTES/VARIABLE_VALUE", None)
        for key, value in stock.items():
            np.testing.assert_array_equal(ours[key], value, key)
        # A Dropout's seed each, and the weights of layers in lists.
        unseen = [key for key in ours if key.startswith("untracked/")]
        assert len(unseen) == {grow: 5, build_unseen: 6}.get(change_state, 4)
        assert manager.restore() == 2
    again = growing()
    change_state(again)
    with CheckpointManager(again, tmp_path / "ours") as manager:
        assert manager.restore() == 2
        if change_state is replace:
            assert manager.restore(1) == 1
            return
        # What was before it grew is another state.
        with pytest.raises(UserError, match="does not fit") as why:
            manager.restore(1)
    assert "  missing " in str(why.value)


def test_what_is_attached_and_not_built_is_named(
    tmp_path: pathlib.Path,
) -> None:
    state = growing()
    with CheckpointManager(state, tmp_path) as manager:
        state.later = keras.optimizers.Adam()
        with pytest.raises(UserError, match="later is an optimizer that is"):
            manager.save(1)
        del state.later
        state.blocks[0] = tf.Variable(1.0)
        with pytest.raises(UserError, match="TensorFlow cannot save this"):
            manager.save(1)


def compiled_root() -> tf.train.Checkpoint:
    model = net()
    model.compile()
    return tf.train.Checkpoint(model)


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("make", [growing, compiled_root])
def test_an_optimizer_of_compile(
    make: Callable[[], tf.train.Checkpoint],
    is_used: bool,
    tmp_path: pathlib.Path,
) -> None:
    """The default one, that nobody builds, or only once it is used."""

    def model_of(state: tf.train.Checkpoint) -> keras.Model:
        return state.compiled if make is growing else state.root

    state = make()
    model = model_of(state)
    if is_used:
        model.optimizer.build(model.trainable_variables)
        change(model.optimizer)
    with CheckpointManager(state, tmp_path) as manager:
        manager.save(1)
    again = make()
    with CheckpointManager(again, tmp_path) as manager:
        assert manager.restore() == 1
    np.testing.assert_equal(
        numbers(model_of(again).optimizer), numbers(model.optimizer)
    )
    named = tf.train.Checkpoint(model=(new := net()), own=net())
    new.compile()
    named.optimizer = new.optimizer
    with pytest.raises(UserError, match="optimizer is an optimizer that is"):
        CheckpointManager(named, tmp_path)


class Python(tf.train.experimental.PythonState):
    """Counts in Python."""

    def __init__(self) -> None:
        self.count = 0
        self.threads: set[int] = set()

    def serialize(self) -> str:
        self.threads.add(threading.get_ident())
        return str(self.count)

    def deserialize(self, string_value: bytes) -> None:
        self.count = int(string_value)


class Custom(tf.__internal__.tracking.Trackable):
    """Saves what it likes."""

    def __init__(self) -> None:
        self.v = tf.Variable(0.0)

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return {"half": self.v / 2, "whole": self.v}

    def _restore_from_tensors(self, restored: dict[str, tf.Tensor]) -> Any:
        return self.v.assign(restored["half"] * 2)


class Thing:
    """What is saved, how it is used once, and what it shows then."""

    def __init__(
        self,
        make: Callable[[], Any],
        use: Callable[[Any], object],
        show: Callable[[Any], object],
    ) -> None:
        self.make = make
        self.use = use
        self.show = show


def table() -> Any:
    return tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, 0)


def dense_table() -> Any:
    return tf.lookup.experimental.DenseHashTable(
        tf.int64, tf.float32, 0.0, empty_key=-1, deleted_key=-2
    )


def iterator() -> Any:
    return iter(tf.data.Dataset.range(100).shuffle(10, seed=1).batch(2))


def insert(table: Any) -> None:
    size = table.size()
    key = tf.strings.as_string(size) if table.key_dtype == tf.string else size
    table.insert([key], tf.ones([1], table.value_dtype))


THINGS = {
    "table": Thing(table, insert, lambda t: int(t.size())),
    "dense table": Thing(dense_table, insert, lambda t: int(t.size())),
    "iterator": Thing(iterator, next, lambda i: next(i).numpy().tolist()),
    "python": Thing(
        Python, lambda p: setattr(p, "count", p.count + 1), lambda p: p.count
    ),
    "custom": Thing(
        Custom, lambda c: c.v.assign_add(2.0), lambda c: c.v.numpy()
    ),
    "generator": Thing(
        lambda: tf.random.Generator.from_seed(1),
        lambda g: g.normal([1]),
        lambda g: g.normal([1]).numpy().tolist(),
    ),
}


@pytest.mark.parametrize("thing", THINGS.values(), ids=THINGS)
def test_what_is_no_variable(thing: Thing, tmp_path: pathlib.Path) -> None:
    """It is as it was when it was saved, whatever has come after."""

    def state_of(part: Any) -> tf.train.Checkpoint:
        return tf.train.Checkpoint(part=part, v=tf.Variable(1.0))

    part = thing.make()
    with CheckpointManager(state_of(part), tmp_path) as manager:
        for step in (1, 2, 3):
            thing.use(part)
            manager.save(step)
        for _ in range(3):
            thing.use(part)
        again = thing.make()
        with CheckpointManager(state_of(again), tmp_path) as other:
            manager.steps()
            assert other.restore() == 3
        expected = thing.make()
        for _ in range(3):
            thing.use(expected)
        assert thing.show(again) == thing.show(expected)
        # TensorFlow has the same keys.
        stock = state_of(part).save(f"{tmp_path}/stock/ckpt")
        keys = foreign.keys(stock), foreign.keys(f"{tmp_path}/ckpt-3")
        assert keys[0] == keys[1]
    if isinstance(part, Python):
        assert part.threads == {threading.get_ident()}


def test_an_iterator_that_cannot_be_saved(tmp_path: pathlib.Path) -> None:
    """What TensorFlow says, in a line."""

    def numbers() -> Iterator[int]:
        yield from range(10)

    dataset = tf.data.Dataset.from_generator(
        numbers, output_signature=tf.TensorSpec((), tf.int64)
    )
    state = tf.train.Checkpoint(batches=iter(dataset))
    with pytest.raises(UserError, match="TensorFlow cannot save this") as why:
        CheckpointManager(state, tmp_path)
    assert "\n" not in str(why.value)
    assert "leave it out" in str(why.value)


WORDS = [["cat"], ["dog"], ["dog"], ["bird"], ["dog"], ["cat"]]


def adapted(make_layer: Callable[[], Any], data: Any) -> Callable[[bool], Any]:
    def make_adapted(is_adapted: bool) -> Any:
        layer = make_layer()
        if is_adapted:
            layer.adapt(data)
        return layer

    return make_adapted


LAYERS = {
    "normalization": (
        adapted(
            layers.Normalization,
            np.array([[1.0, 5.0], [3.0, 9.0]], "float32"),
        ),
        [[2.0, 3.0]],
    ),
    "strings": (adapted(layers.StringLookup, WORDS), WORDS),
    "integers": (
        adapted(layers.IntegerLookup, np.array([[7], [9], [9]])),
        [[9], [7], [1]],
    ),
    "counts": (
        adapted(
            lambda: layers.StringLookup(output_mode="count", max_tokens=9),
            WORDS,
        ),
        WORDS,
    ),
    "text": (adapted(layers.TextVectorization, ["a b a", "c a"]), ["b a"]),
    "text by weight": (
        adapted(
            lambda: layers.TextVectorization(output_mode="tf_idf"),
            ["a b a", "c a"],
        ),
        ["b a"],
    ),
    "strings by weight": (
        adapted(
            lambda: layers.StringLookup(
                output_mode="tf_idf", max_tokens=9, pad_to_max_tokens=True
            ),
            WORDS,
        ),
        WORDS,
    ),
    "integers by weight": (
        adapted(
            lambda: layers.IntegerLookup(output_mode="tf_idf"),
            np.array([[7], [9], [9]]),
        ),
        [[9], [7], [1]],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_not_adapted_again(
    name: str, tmp_path: pathlib.Path
) -> None:
    make_layer, data = LAYERS[name]

    def model_of(is_adapted: bool) -> tuple[Any, keras.Model]:
        layer = make_layer(is_adapted)
        if name == "normalization" and not layer.built:
            layer.build((None, 2))
        # TensorFlow does not look into this one.
        return layer, keras.Sequential([layer])

    layer, model = model_of(is_adapted=True)
    state = tf.train.Checkpoint(model=model, v=tf.Variable(1.0))
    model.built = True
    with CheckpointManager(state, tmp_path) as manager:
        manager.save(1)
    again, model = model_of(is_adapted=False)
    model.built = True
    state = tf.train.Checkpoint(model=model, v=tf.Variable(1.0))
    with CheckpointManager(state, tmp_path) as manager:
        assert manager.restore() == 1
    given = tf.constant(data)
    np.testing.assert_array_equal(again(given), layer(given))
    # But into this.
    state = tf.train.Checkpoint(layer=layer)
    with CheckpointManager(state, tmp_path / "seen") as manager:
        manager.save(1)
    seen = make_layer(False)
    state = tf.train.Checkpoint(layer=seen)
    with CheckpointManager(state, tmp_path / "seen") as manager:
        assert manager.restore() == 1
    np.testing.assert_array_equal(seen(given), layer(given))


def test_a_layer_that_was_adapted_to_other_data(
    tmp_path: pathlib.Path,
) -> None:
    """What was saved counts, be it of another size."""

    def lookup(words: list[list[str]]) -> Any:
        layer = layers.StringLookup(output_mode="count")
        layer.adapt(tf.constant(words))
        return layer

    layer, other = lookup(WORDS), lookup([["fish"]])
    with CheckpointManager(tf.train.Checkpoint(l=layer), tmp_path) as manager:
        manager.save(1)
    with CheckpointManager(tf.train.Checkpoint(l=other), tmp_path) as manager:
        manager.restore()
    np.testing.assert_array_equal(
        other(tf.constant(WORDS)), layer(tf.constant(WORDS))
    )


VOCABULARIES: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "strings": (lambda v: layers.StringLookup(vocabulary=v), ["p", "q"]),
    "inverse": (
        lambda v: layers.StringLookup(vocabulary=v, invert=True),
        ["p", "q"],
    ),
    "integers": (lambda v: layers.IntegerLookup(vocabulary=v), [7, 9]),
    "text": (lambda v: layers.TextVectorization(vocabulary=v), ["p", "q"]),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_that_the_program_gives(
    name: str, tmp_path: pathlib.Path
) -> None:
    """Another order is another program; what comes behind it is not."""
    make_layer, words = VOCABULARIES[name]
    more = [*words, max(words) * 2]

    def manager(words: list[Any]) -> CheckpointManager:
        state = tf.train.Checkpoint(
            net=keras.Sequential([layer := make_layer(words)]),
            layer=layer,
            v=tf.Variable(float(len(words))),
        )
        state.net.built = True
        return CheckpointManager(state, tmp_path)

    with manager(words) as first:
        first.save(1)
    with manager(more) as longer:
        assert longer.restore() == 1
    for other in (words[::-1], words[:1]):
        with manager(other) as wrong:
            with pytest.raises(UserError, match=r"token \d of .* is .* there"):
                wrong.restore()
            # No variable is changed.
            assert wrong._checkpoint.v.numpy() == len(other)


def test_a_vocabulary_that_was_not_saved_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the program gives was in no checkpoint of an older dtrain."""

    def state() -> tf.train.Checkpoint:
        return tf.train.Checkpoint(
            words=layers.StringLookup(vocabulary=["p", "q"]), v=tf.Variable(1.0)
        )

    with monkeypatch.context() as patch:
        patch.setattr(learned, "LOOKUPS", ())
        with CheckpointManager(state(), tmp_path) as manager:
            manager.save(1)
    with CheckpointManager(state(), tmp_path) as manager:
        assert manager.restore() == 1


def test_a_layer_that_is_not_built(tmp_path: pathlib.Path) -> None:
    """To drop its values, and be rid of the error, is no remedy."""

    def state(is_built: bool) -> tf.train.Checkpoint:
        model = Listing()
        model(tf.zeros([1, 2]))
        parts = {
            "dense": layers.Dense(2),
            "images": layers.Normalization(axis=(1, 2)),
        }
        if is_built:
            parts["dense"].build((None, 3))
            parts["images"].adapt(np.ones([2, 3, 4], "float32"))
            model.spare[0].build((None, 2))
        return tf.train.Checkpoint(model=model, parts=parts)

    with CheckpointManager(state(is_built=True), tmp_path) as manager:
        manager.save(1)
    with (
        CheckpointManager(state(is_built=False), tmp_path) as manager,
        pytest.raises(UserError, match="left over; parts/dense") as why,
    ):
        manager.restore()
    told = str(why.value)
    assert "(Dense), parts/images (Normalization), model.dense" in told
    assert "are not built: adapt each, or call each once, before" in told
    assert "--" not in told


@pytest.mark.parametrize("axis", [-1, None])
def test_a_normalization_is_built_by_what_was_saved(
    axis: int | None, tmp_path: pathlib.Path
) -> None:
    layer = layers.Normalization(axis=axis)
    images = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3)
    layer.adapt(images)
    with CheckpointManager(tf.train.Checkpoint(l=layer), tmp_path) as manager:
        manager.save(1)
    again = layers.Normalization(axis=axis)
    with CheckpointManager(tf.train.Checkpoint(l=again), tmp_path) as manager:
        assert manager.restore() == 1
        assert manager.restore() == 1
    np.testing.assert_array_equal(again(images), layer(images))


def test_a_save_of_what_is_not_built(tmp_path: pathlib.Path) -> None:
    """TensorFlow says nothing: there are no variables."""
    model = keras.Sequential([layers.Dense(2), layers.Dropout(0.5, seed=1)])
    with pytest.raises(UserError, match="model is a model that is not built"):
        CheckpointManager(tf.train.Checkpoint(model=model), tmp_path)
    module = Module()
    module.add, module.dense = layers.Add(), layers.Dense(2)
    module.given = layers.Normalization(mean=0.0, variance=1.0)
    with CheckpointManager(
        tf.train.Checkpoint(module=module), tmp_path
    ) as manager:
        with pytest.warns(
            UserWarning, match=r"^module\.dense \(Dense\) is not built: build"
        ):
            manager.save(1)
        module.dense.build((None, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            manager.save(2, wait=True)
    assert "module/dense/_kernel" in {
        key.partition("/.")[0] for key in foreign.keys(f"{tmp_path}/ckpt-2")
    }


def test_what_is_deep_in_lists_and_modules(tmp_path: pathlib.Path) -> None:
    """A seed, the weights of a layer in a list, a vocabulary."""

    def make(is_adapted: bool) -> tuple[tf.train.Checkpoint, Any, Any]:
        model, lookup = Listing(), layers.StringLookup()
        model(tf.zeros([1, 2]))
        if is_adapted:
            lookup.adapt(tf.constant(WORDS))
        module = Module()
        module.models = {"one": [model], "two": net()}
        return tf.train.Checkpoint(module=module, steps=[lookup]), model, lookup

    state, model, lookup = make(is_adapted=True)
    with CheckpointManager(state, tmp_path) as manager:
        change(model)
        manager.save(1)
    again, restored, other = make(is_adapted=False)
    with CheckpointManager(again, tmp_path) as manager:
        manager.restore()
    np.testing.assert_equal(numbers(restored), numbers(model))
    assert other.get_vocabulary() == lookup.get_vocabulary()


def test_a_vocabulary_that_is_none(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a checkpoint from outside."""
    monkeypatch.setattr(learned.Vocabulary, "serialize", lambda _: "5")
    model = keras.Sequential([layers.StringLookup()])
    model.built = True
    state = tf.train.Checkpoint(model=model, v=tf.Variable(1.0))
    with CheckpointManager(state, tmp_path) as manager:
        manager.save(1)
        with pytest.raises(UserError, match="a vocabulary is no list"):
            manager.restore()


def test_a_manager_that_is_closed_saves_no_more(tmp_path: pathlib.Path) -> None:
    state = tf.train.Checkpoint(weight=tf.Variable(1.0))
    manager = CheckpointManager(state, tmp_path)
    manager.save(1)
    manager.close()
    with pytest.raises(UserError, match="this manager is closed"):
        manager.save(2)


def test_boundaries_that_were_learned_come_back(tmp_path: pathlib.Path) -> None:
    """A layer of Keras has them in no variable."""

    def layer(data: list[float] | None) -> keras.layers.Discretization:
        made = keras.layers.Discretization(num_bins=3, name="bins")
        if data is not None:
            made.adapt(np.array(data, np.float32))
        return made

    learned = layer([0.1, 1.3, 2.7, 8.0])
    with CheckpointManager(
        tf.train.Checkpoint(bins=learned), tmp_path
    ) as first:
        first.save(1, wait=True)
    for other in (layer(None), layer([100.0, 200.0, 300.0])):
        state = tf.train.Checkpoint(bins=other)
        with CheckpointManager(state, tmp_path) as again:
            again.restore()
        np.testing.assert_array_equal(
            other.bin_boundaries, learned.bin_boundaries
        )


def test_facts_of_another_kind(tmp_path: pathlib.Path) -> None:
    state = tf.train.Checkpoint(weight=tf.Variable(1.0))
    with CheckpointManager(
        state, tmp_path, policies=[retention.Best(1, "loss")]
    ) as manager:
        with pytest.raises(UserError, match=r"must be dtrain.Facts, as in"):
            manager.save(1, {"loss": 3.0})
        for step, loss in enumerate((3.0, 1.0, 2.0), 1):
            manager.save(step, dtrain.Facts(metrics={"loss": loss}), wait=True)
        assert manager.steps() == [2, 3]
