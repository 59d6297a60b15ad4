"""What a run is worth: measured by the program, as a person calls it."""

from __future__ import annotations

import functools
import json
import math
import pathlib
import random
import re
import shutil
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from dtrain import checkpoint_tool, errors, evaluate
from dtrain import main as dtrain_main
from dtrain.config import Config
from dtrain.data import sources
from dtrain.errors import UserError
from dtrain.gan import state as gan_lib
from dtrain.quality import (
    choosing,
    classifier,
    extraction,
    figure_log,
    kept,
)
from dtrain.quality.evaluation import Evaluation, Wanted
from dtrain.quality.extractors import Extractor, Pixels
from dtrain.quality.inception import Inception
from dtrain.quality.real_images import RealImages
from dtrain.quality.saying import Slowly
from dtrain.run import best, init_from
from dtrain.tensorfiles import containers
from tests import hostile_files, replicas, runs

SMALL = ("--num_images=24", "--extractor=pixels")
LABELS = {"modes_covered", "reverse_kl", "conditional_accuracy"}


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "_FEWEST_STEPS", 10)
    monkeypatch.setattr(classifier, "_EPOCHS", 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of digits, by their class, of two checkpoints."""
    run_dir = tmp_path_factory.mktemp("evaluate") / "run"
    code = dtrain_main.run(
        [
            "main",
            *runs.SMALL,
            f"--run_dir={run_dir}",
            "--conditional",
            "--num_steps=4",
            "--checkpoint_every_steps=2",
        ]
    )
    assert code == errors.FINISHED
    return run_dir


@pytest.fixture
def run_dir(trained: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of that run."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def measure(run_dir: pathlib.Path, *arguments: str) -> None:
    cache = run_dir.parent / "cache"
    code = evaluate.run(
        [
            "evaluate",
            f"--run_dir={run_dir}",
            f"--cache_dir={cache}",
            *arguments,
        ]
    )
    assert code == errors.FINISHED


def written(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    text = (run_dir / "figures.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# The program.


def test_figures_with_their_protocol_and_floor(
    run_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(run_dir, "--num_images=40", "--nearest=3")
    protocol, _, head, *rows = capsys.readouterr().out.splitlines()
    assert protocol.startswith("protocol  classifier ")
    assert "40 samples (seed 0, average weights) against 40 real" in protocol
    assert re.split("  +", head) == ["figure", "better", "step 4", "floor"]
    assert [row.split()[:2] for row in rows[:2]] == [
        ["frechet_distance", "small"],
        ["kernel_distance", "small"],
    ]
    [line] = written(run_dir)
    assert (line["step"], line["checkpoint"]) == (4, "ckpt-4")
    assert line["protocol"]["num_real"] == 40
    assert set(line["protocol"]) == set(figure_log.Protocol._fields)
    assert len(line["protocol"]["digest"]) == 64
    assert set(line["figures"]) == set(line["floor"])
    assert LABELS | {"frechet_distance", "kernel_distance_error"} < set(
        line["figures"]
    )
    assert all(math.isfinite(each) for each in line["figures"].values())
    # What has not learned anything is worse than the data.
    figures, floors = line["figures"], line["floor"]
    assert figures["frechet_distance"] > floors["frechet_distance"]
    assert figures["recall"] < floors["recall"]
    picture = Image.open(run_dir / "nearest/step-000004.png")
    # Three rows: a sample, and five images of the data.
    columns, rows = (side for side in picture.size)
    assert columns / (6 * 9 + 1) == rows / (3 * 9 + 1)


def test_what_was_measured_is_not_measured_again(
    run_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(run_dir, *SMALL)
    measure(run_dir, *SMALL, "--checkpoint=all")
    output = capsys.readouterr()
    assert output.err.count("step 4 was measured before") == 1
    # The best of each row has a star.
    *_, row = (
        line for line in output.out.splitlines() if line.startswith("density")
    )
    assert len(row.split()) == 6
    lines = written(run_dir)
    assert [line["step"] for line in lines] == [4, 0, 2]
    # A protocol of its own is another one.
    measure(run_dir, *SMALL, "--seed=1", "--figures=recall,precision")
    measure(run_dir, *SMALL, "--weights=raw")
    lines = written(run_dir)
    assert [line["step"] for line in lines] == [4, 0, 2, 4, 4]
    assert list(lines[3]["figures"]) == ["recall", "precision"]
    # A state is known by its weights, not by its number alone.
    text = (run_dir / "figures.jsonl").read_text()
    state = lines[0]["state"]
    (run_dir / "figures.jsonl").write_text(text.replace(state, "0" * 32))
    measure(run_dir, *SMALL)
    assert len(written(run_dir)) == 6
    # Where no figure compares pairs, nothing shows what is nearest.
    for _ in range(2):
        measure(run_dir, *SMALL, "--seed=2", "--figures=frechet_distance")
    assert "step 4 was measured before" in capsys.readouterr().err
    assert len(written(run_dir)) == 7
    # What shows it is drawn again where it is gone, and not written again.
    picture = run_dir / "nearest/step-000004.png"
    picture.unlink()
    measure(run_dir, *SMALL)
    assert picture.exists()
    assert len(written(run_dir)) == 7


def test_the_best_checkpoint(run_dir: pathlib.Path) -> None:
    measure(run_dir, *SMALL, "--checkpoint=all", "--figures=frechet_distance")
    values = {
        line["step"]: line["figures"]["frechet_distance"]
        for line in written(run_dir)
    }
    expected = min(values, key=lambda step: values[step])
    assert best.step_of(str(run_dir)) == expected
    prefix = f"{run_dir}/checkpoints/ckpt-{expected}"
    assert best.prefix_of(f"{run_dir}/best") == prefix
    assert best.prefix_of(str(run_dir)) == str(run_dir)
    # Which is a name wherever a checkpoint is named.
    config = Config(run_dir=str(run_dir.parent), init_from=f"{run_dir}/best")
    assert init_from.find(config).checkpoint == prefix
    output = run_dir.parent / "best.safetensors"
    code = checkpoint_tool.run(
        ["export", f"{run_dir}/best", f"--output={output}"]
    )
    assert code == errors.FINISHED
    with containers.open_file(str(output)) as held:
        assert held.read("step") == expected
    measure(run_dir, *SMALL, "--checkpoint=best", "--seed=3")
    assert written(run_dir)[-1]["step"] == expected
    # That is another protocol now, of which one checkpoint is known.
    (run_dir / f"checkpoints/ckpt-{expected}.index").unlink()
    with pytest.raises(UserError, match="has its frechet_distance measured"):
        best.step_of(str(run_dir))


def test_lines_that_are_damaged_are_left_out(run_dir: pathlib.Path) -> None:
    measure(run_dir, *SMALL)
    path = run_dir / "figures.jsonl"
    [line] = figure_log.read(str(run_dir))
    whole = path.read_text()
    for damage in (
        *("", "{", "[]", "1e999", "[" * 100_000, '{"step": 1}'),
        whole.replace('"step": 4', '"step": "4"'),
        whole.replace('"num_real": 24', '"num_real": 24.5'),
        whole.replace('"secs": ', '"secs": 1e9999'),
        whole[: len(whole) // 2],
    ):
        path.write_text(f"{damage}\n{whole}{damage.rstrip()}")
        assert figure_log.read(str(run_dir)) == [line], damage[:40]
    figure_log.append(str(run_dir), line)
    assert figure_log.read(str(run_dir)) == [line, line]


# Whoever draws a sample with whom.


CONDITIONAL = Config(
    batch_size=64, base_channels=2, latent_size=4, conditional=True
)


@functools.cache
def digits() -> sources.Data:
    return sources.open_data(CONDITIONAL)


@functools.cache
def gan_on(num_replicas: int) -> gan_lib.GAN:
    """Returns the same state, on so many replicas; 0 is without a strategy."""
    strategy = replicas.alone().strategy
    if num_replicas:
        strategy = replicas.mirrored(num_replicas)
    shape = digits().source.image_shape
    return gan_lib.GAN(CONDITIONAL, strategy, shape, 10)


class Given(Evaluation):
    """An evaluation of the digits by their pixels."""

    def __init__(
        self, num_replicas: int, cache_dir: str = "", **wanted: Any
    ) -> None:
        gan = gan_on(num_replicas)
        workers = replicas.alone()._replace(strategy=gan.strategy)
        data = digits()
        self.gan = gan
        self.extractor = Pixels(data.source.image_shape)
        super().__init__(
            gan,
            data,
            self.extractor,
            workers,
            Wanted(**{"num_images": 50, **wanted}),
            cache_dir,
            Slowly(lambda _: None),
        )

    def figures(self) -> dict[str, Any]:
        result = self.measure(0, None, lambda: False)
        assert result
        return {**result.line.figures, "nearest": result.nearest}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return Given(0).figures()


@pytest.mark.parametrize(
    ("num_replicas", "size"), [(0, 3), (1, 32), (2, 32), (2, 5), (4, 32)]
)
def test_figures_do_not_depend_on_replicas_and_batches(
    num_replicas: int,
    size: int,
    alone: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = Pixels.at_once
    monkeypatch.setattr(Pixels, "at_once", size)
    got = Given(num_replicas).figures()
    assert set(got) == set(alone)
    for name, value in alone.items():
        # To the bit, where as many are computed at once.
        away = 0.0 if size == usual else 1e-6
        np.testing.assert_allclose(got[name], value, rtol=away, err_msg=name)


def test_a_stopped_evaluation_goes_on_where_it_was(
    alone: dict[str, Any],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Pixels, "at_once", 8)
    half = str(tmp_path / "half.safetensors")
    asked = 0

    def is_stopped_at(last: int) -> Any:
        def is_stopped() -> bool:
            nonlocal asked
            asked += 1
            return asked >= last

        return is_stopped

    # In the real images, twice; in the samples; in the computation.
    for last in (2, 3, 4):
        asked = 0
        given = Given(0, str(tmp_path / "cache"))
        assert given.measure(0, None, is_stopped_at(last), half) is None
        assert asked <= last + 1
    rounds: list[int] = []
    take = extraction.Extraction._round

    def counting(self: Any, start: int) -> Any:
        rounds.append(start)
        return take(self, start)

    monkeypatch.setattr(extraction.Extraction, "_round", counting)
    given = Given(0, str(tmp_path / "cache"))
    result = given.measure(0, None, lambda: False, half)
    assert result
    for name, value in result.line.figures.items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-6, err_msg=name)
    # It did not begin anew.
    assert len(rounds) < 14
    # And what is kept of another state is not taken.
    other = Given(0, str(tmp_path / "cache"), seed=5)
    assert other.measure(0, None, lambda: False, half)


def test_real_images_are_looked_at_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Given(0, str(tmp_path)).figures()
    looked = []
    monkeypatch.setattr(
        RealImages, "_add", lambda *_: looked.append(1) or False
    )
    again = Given(0, str(tmp_path)).figures()
    assert not looked
    assert {**first, "nearest": 0} == {**again, "nearest": 0}
    # Of another seed other images are taken, so it is another key.
    assert Given(0, str(tmp_path), seed=1).measure(0, None, bool) is None
    assert looked
    # One that is damaged is not taken.
    [path] = tmp_path.glob("real-*")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert Given(0, str(tmp_path)).measure(0, None, bool) is None


def test_a_cache_of_other_data_is_refused(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "a.safetensors")
    arrays = {"x": np.arange(6.0).reshape(2, 3), "y": np.array(3)}
    kept.write(path, {"seed": 1}, arrays)
    found = kept.read(path, {"seed": 1})
    assert found
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(UserError, match="was computed from something else"):
        kept.read(path, {"seed": 2})
    assert kept.read(str(tmp_path / "none"), {}) is None


# Extractors.


def made(text: str, tmp_path: pathlib.Path, **settings: Any) -> Extractor:
    config = Config(**settings)
    return choosing.make(
        text,
        sources.open_source(config),
        config,
        replicas.alone(),
        str(tmp_path),
        Slowly(lambda _: None),
    )


def test_pixels_of_large_images_are_of_smaller_ones() -> None:
    small = Pixels((28, 28, 1))
    assert (small.num_features, small.resize) == (784, "none")
    images = tf.random.stateless_uniform([2, 28, 28, 1], [1, 2])
    features, classes = small(images)
    np.testing.assert_array_equal(features, tf.reshape(images, [2, -1]))
    assert classes.shape == (2, 0)
    large = Pixels((64, 128, 3))
    assert large.resize == "13x26 area"
    features, _ = large(tf.ones([2, 64, 128, 3]))
    assert features.shape == (2, large.num_features)
    assert large.num_features <= 1024
    np.testing.assert_allclose(features, 1, rtol=1e-5)
    assert large.digest != small.digest


def test_a_classifier_is_the_same_each_time(tmp_path: pathlib.Path) -> None:
    first = made("auto", tmp_path / "a")
    assert first.name == "classifier"
    assert (first.num_classes, first.knows_labels) == (10, True)
    # Whatever else has drawn random numbers.
    tf.random.set_seed(9)
    tf.random.normal([3])
    assert made("classifier", tmp_path / "b").digest == first.digest
    # From the cache it is not trained.
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            classifier.Classifier, "train", lambda *_: calls.append(1)
        )
        assert made("classifier", tmp_path / "a").digest == first.digest
    assert not calls
    images = tf.zeros([3, 8, 8, 1])
    features, probabilities = first(images)
    assert features.shape == (3, first.num_features)
    np.testing.assert_allclose(tf.reduce_sum(probabilities, 1), 1, rtol=1e-5)


def frozen_graph(*, pool: str = "pool_3", batch: int = 1) -> bytes:
    """A graph with the names and the habits of the one of the FID."""
    with tf.Graph().as_default() as graph:
        image = tf.compat.v1.placeholder(tf.float32, [batch, None, None, 3])
        image = tf.identity(image, "ExpandDims")
        resized = tf.compat.v1.image.resize_bilinear(image, [6, 6])
        scaled = (resized - 128) / 128
        kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 5))
        conv = tf.nn.relu(tf.nn.conv2d(scaled, kernel.astype("f"), 1, "SAME"))
        pooled = tf.nn.avg_pool2d(conv, 6, 1, "VALID", name=pool)
        flat = tf.reshape(pooled, [1, 5], name="pool_3/_reshape")
        weights = np.random.default_rng(1).normal(size=(5, 7)).astype("f")
        with tf.name_scope("softmax/logits"):
            logits = tf.linalg.matmul(flat, tf.constant(weights), name="MatMul")
        tf.nn.softmax(logits + 3.0, name="softmax")
        definition = graph.as_graph_def(add_shapes=True)
    return definition.SerializeToString()


def test_the_frozen_graph_takes_any_batch(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "graph.pb"
    path.write_bytes(frozen_graph())
    extractor = made(f"inception:{path}", tmp_path)
    assert (extractor.name, extractor.num_features) == ("inception", 5)
    assert (extractor.num_classes, extractor.knows_labels) == (7, False)
    assert "299" in extractor.resize
    images = tf.random.stateless_uniform([4, 8, 8, 1], [1, 2], -1.0, 1.0)
    features, classes = tf.function(extractor)(images)
    # By TensorFlow 1, one by one, in the range that it wants.
    with tf.Graph().as_default():
        definition = tf.compat.v1.GraphDef.FromString(path.read_bytes())
        tf.import_graph_def(definition, name="")
        with tf.compat.v1.Session() as session:
            expected = [
                session.run(
                    "pool_3:0", {"ExpandDims:0": np.tile(one, [1, 1, 1, 3])}
                )
                for one in np.split((images.numpy() + 1) * 127.5, 4)
            ]
    expected = np.concatenate(expected).reshape(4, 5)
    np.testing.assert_allclose(features, expected, rtol=1e-5)
    weights = np.random.default_rng(1).normal(size=(5, 7))
    logits = expected @ weights
    powers = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(
        classes, powers / powers.sum(1, keepdims=True), rtol=1e-4
    )
    assert made(f"inception:{path}#{extractor.digest[:9]}", tmp_path)


def test_a_damaged_graph_is_refused_or_read(
    tmp_path: pathlib.Path,
) -> None:
    sound, path, said = frozen_graph(), tmp_path / "graph.pb", []
    # The same each time: one in thousands ends TensorFlow itself, which a
    # digest behind the name prevents.
    chance = random.Random(0)
    for _ in range(15):
        path.write_bytes(hostile_files.damaged(sound, chance))
        try:
            Inception(f"inception:{path}", (8, 8, 1))
        except UserError as error:
            said.append(str(error))
    assert said
    assert not any("\n" in each for each in said)


OWN = """
import keras

NUMBER = 3

def make(image_shape):
    return keras.Sequential([keras.Input(image_shape), keras.layers.Flatten()])

def image(image_shape):
    return keras.Sequential([keras.Input(image_shape), keras.layers.ReLU()])

def number(image_shape):
    return 3

def raises(image_shape):
    raise KeyError("weights")
"""


def test_a_model_of_ones_own(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_extractor.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    extractor = made("own_extractor:make", tmp_path)
    assert (extractor.name, extractor.num_features) == (
        "own_extractor:make",
        64,
    )
    features, classes = extractor(tf.ones([3, 8, 8, 1]))
    assert (features.shape, classes.shape) == ((3, 64), (3, 0))


# Mistakes.


def refused(**wanted: Any) -> Any:
    return lambda: Given(0, **wanted)


BAD_OPTIONS = {
    "--checkpoint=latest": r"checkpoint \(latest\) must be newest, best, all",
    "--checkpoint=-3": r"checkpoint \(-3\) must be newest",
    "--figures=fid": r"figures \(fid\) must be of frechet_distance, kernel",
    "--figures=recall,recall": r"\(recall,recall\) names a figure twice",
    "--weights=ema": r"weights \(ema\) must be one of average, raw",
    "--seed=-1": r"seed \(-1\) must be at least 0",
    "--num_images=x": r"num_images \(x\) must be a whole number",
    "--nearest=65": r"nearest \(65\) must be below 65",
    "--strategy=tpu": r"strategy \(tpu\) must be one of default, mirrored",
    "--figurs=recall": r"no flag --figurs; did you mean --figures",
}


@pytest.mark.parametrize("flag", BAD_OPTIONS)
def test_a_wrong_option(flag: str) -> None:
    with pytest.raises(UserError, match=BAD_OPTIONS[flag]):
        evaluate.run(["evaluate", "--run_dir=none", flag])


BAD_EXTRACTORS = {
    "resnet": r"extractor \(resnet\) must be pixels, classifier, inception:",
    "inception:": r"\(inception:\) must name a file.*inception-2015-12-05.tgz",
    "inception:none.pb": r"must name a file, and there is none: it is classify",
    "inception:.": r"must name a file",
    "inception:damaged.pb": r"is no frozen graph; it is damaged or another",
    "inception:other.pb": r"has no node pool_3, so it is not the graph of the",
    "inception:graph.pb#abc": r"the digest of the file is [0-9a-f]{64}; it is",
    "none_such:make": r"extractor \(none_such:make\): there is no module none_",
    "own_extractor:none": r"module own_extractor has no 'none'",
    "own_extractor:NUMBER": r"of type int; it must be a function \(image_shape",
    "own_extractor:number": r"returned int; it must return a keras.Model",
    "own_extractor:image": r"turns 2 images into \(2, 8, 8, 1\); its features",
    "own_extractor:raises": r"raised KeyError: 'weights'",
    "own/extractor.py:make": r"must name a module, not a file",
}


@pytest.mark.parametrize("text", BAD_EXTRACTORS)
def test_a_wrong_extractor(
    text: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_extractor.py").write_text(OWN)
    (tmp_path / "graph.pb").write_bytes(frozen_graph())
    (tmp_path / "other.pb").write_bytes(frozen_graph(pool="pool_4"))
    (tmp_path / "damaged.pb").write_bytes(frozen_graph()[5:-3])
    with pytest.raises(UserError, match=BAD_EXTRACTORS[text]) as raised:
        made(text, tmp_path)
    assert "\n" not in str(raised.value)


def test_a_classifier_needs_labels(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "plain.npz", x=np.zeros([20, 8, 8, 1], np.uint8))
    with pytest.raises(UserError, match="trained on labels, and the data has"):
        made("classifier", tmp_path, dataset=f"npz:{tmp_path}/plain.npz")
    assert made("auto", tmp_path, dataset=f"npz:{tmp_path}/plain.npz").name == (
        "pixels"
    )


BAD_WANTS = [
    (Wanted(num_images=3), r"num_images \(3\) must be at least 12"),
    (Wanted(num_real=3), r"num_real \(3\) must be at least 12"),
    (Wanted(("inception_score",)), r"\(inception_score\) needs an extractor"),
    (Wanted(("reverse_kl",)), r"needs an extractor that knows the labels"),
]


@pytest.mark.parametrize(("wanted", "said"), BAD_WANTS)
def test_what_cannot_be_measured(wanted: Wanted, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Given(0, **wanted._asdict())


def test_images_that_are_not_finite() -> None:
    given = Given(0)
    [weight, *_] = given.gan.averages["generator"].weights
    before = weight.numpy()
    weight.assign(tf.fill(weight.shape, math.nan))
    with pytest.raises(UserError, match="image 0 has features that are not fi"):
        given.figures()
    weight.assign(before)


def test_runs_that_cannot_be_measured(
    run_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    place = str(tmp_path)
    labels = np.arange(20) % 10
    images = np.zeros([20, 9, 9, 1], np.uint8)
    np.savez(f"{place}/small.npz", x=images, y=labels)
    np.savez(f"{place}/few.npz", x=images[:, 1:, 1:], y=labels % 3)
    np.savez(f"{place}/plain.npz", x=images[:, 1:, 1:])
    for arguments, said in (
        ((f"--run_dir={place}",), "holds no run"),
        (("--checkpoint=3",), "no checkpoint of step 3; there: 0, 2, 4"),
        (("--checkpoint=best",), "has its frechet_distance measured; run pyth"),
        ((f"--dataset=npz:{place}/none.npz",), "must name an npz file"),
        (
            (f"--dataset=npz:{place}/small.npz",),
            "20 images 9x9x1, 10 classes, and those",
        ),
        ((f"--dataset=npz:{place}/few.npz",), "has 3 classes, and that of"),
        ((f"--dataset=npz:{place}/plain.npz",), "conditional needs labels"),
    ):
        with pytest.raises(UserError, match=said):
            measure(run_dir, *SMALL, *arguments)
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint yet; wait until"):
        measure(run_dir, *SMALL)


def test_a_cache_that_cannot_be_written_is_no_error(
    run_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir.parent / "cache").write_text("")
    measure(run_dir, *SMALL, "--figures=frechet_distance")
    assert "cache" in capsys.readouterr().err
    assert len(written(run_dir)) == 1
