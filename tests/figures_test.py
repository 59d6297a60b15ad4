"""Figures against their formulas, written down in another way, and by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import linalg

from dtrain.config import figures as table
from dtrain.errors import UserError
from dtrain.quality import classes, figures, frechet, kernel, neighbours
from dtrain.quality.sample import Rows, Sample

SOME = np.random.default_rng(5)


def rows_of(
    features: np.ndarray,
    labels: np.ndarray | None = None,
    probabilities: np.ndarray | None = None,
) -> Rows:
    size = len(features)
    if labels is None:
        labels = np.zeros(size)
    if probabilities is None:
        probabilities = np.zeros([size, 0])
    return Rows(
        features.astype(np.float32),
        probabilities.astype(np.float32),
        labels.astype(np.int32),
    )


def sample_of(
    rows: Rows, *, batch: int = 100, keeps_rows: bool = True
) -> Sample:
    sample = Sample(
        len(rows.labels),
        rows.features.shape[1],
        rows.probabilities.shape[1],
        keeps_rows=keeps_rows,
    )
    for start in range(0, len(rows.labels), batch):
        sample.add(rows.cut(start, start + batch))
    return sample


# The Fréchet distance.


def test_frechet_by_the_root_of_the_product() -> None:
    one = SOME.normal(size=(200, 6)) @ SOME.normal(size=(6, 6))
    other = SOME.normal(size=(90, 6)) @ SOME.normal(size=(6, 6)) + 0.5
    c1, c2 = np.cov(one.T), np.cov(other.T)
    shift = one.mean(0) - other.mean(0)
    expected = shift @ shift + np.trace(
        c1 + c2 - 2 * np.real(linalg.sqrtm(c1 @ c2))
    )
    got = frechet.distance(frechet.of(one), frechet.of(other))
    assert got == pytest.approx(expected, rel=1e-9)


def test_frechet_of_known_gaussians() -> None:
    # Of commuting covariances it is |m1-m2|^2 + sum (s1 - s2)^2.
    mean, s1, s2 = np.array([1.0, -2.0, 0.0]), [1, 2, 3], [4, 2, 1]
    one = frechet.Moments(np.zeros(3), np.diag(np.square(s1)).astype(float))
    other = frechet.Moments(mean, np.diag(np.square(s2)).astype(float))
    assert frechet.distance(one, other) == pytest.approx(5 + 9 + 0 + 4)


@hypothesis.given(st.integers(2, 40), st.integers(1, 30), st.integers(0, 99))
@hypothesis.settings(max_examples=25)
def test_frechet_of_a_set_and_itself_is_none(
    size: int, width: int, seed: int
) -> None:
    """Also of fewer images than features, whose covariance has no inverse."""
    moments = frechet.of(
        np.random.default_rng(seed).normal(5, 3, size=(size, width))
    )
    scale = np.trace(moments.covariance)
    assert frechet.distance(moments, moments) <= 1e-6 * scale


def test_moments_of_two_sets_together() -> None:
    one, other = SOME.normal(size=(7, 4)), SOME.normal(2, 3, size=(12, 4))
    got = frechet.merged(frechet.of(one), 7, frechet.of(other), 12)
    expected = frechet.of(np.concatenate([one, other]))
    np.testing.assert_allclose(got.mean, expected.mean)
    np.testing.assert_allclose(got.covariance, expected.covariance)


# The kernel distance.


def test_kernel_distance_by_its_sums() -> None:
    one, other = SOME.normal(size=(5, 3)), SOME.normal(1, 1, size=(5, 3))

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    pairs = list(itertools.permutations(range(5), 2))
    expected = sum(k(one[i], one[j]) + k(other[i], other[j]) for i, j in pairs)
    expected /= 20
    expected -= 2 * sum(k(x, y) for x in one for y in other) / 25
    got = kernel.squared_discrepancy(one, other)
    assert got == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_of_one_distribution_is_none_within_its_error() -> None:
    one, other, far = SOME.normal(size=(3, 400, 5))
    same = kernel.distance(one, other, seed=1, num_subsets=20)
    assert abs(same.value) < 0.1
    apart = kernel.distance(one, far + 1, seed=1, num_subsets=20)
    assert apart.value > 10 * apart.error > 0
    assert apart == kernel.distance(one, far + 1, seed=1, num_subsets=20)
    assert apart != kernel.distance(one, far + 1, seed=2, num_subsets=20)


# Neighbours.


def by_hand(samples: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    """The definitions, one pair after the other."""

    def radius(points: np.ndarray, index: int, k: int) -> float:
        others = [
            math.dist(points[index], point)
            for number, point in enumerate(points)
            if number != index
        ]
        # A copy of a neighbour is within reach.
        return sorted(others)[k - 1] * (1 + 1e-6)

    of_real = {
        k: [radius(real, i, k) for i in range(len(real))] for k in (1, 3, 5)
    }
    of_made = [radius(samples, i, 3) for i in range(len(samples))]
    far = [[math.dist(x, y) for y in real] for x in samples]
    made, given = range(len(samples)), range(len(real))
    nearest = [min(given, key=row.__getitem__) for row in far]

    def is_in(sample: int, image: int, k: int) -> bool:
        return far[sample][image] <= of_real[k][image]

    return {
        "precision": np.mean(
            [any(is_in(j, i, 3) for i in given) for j in made]
        ),
        "recall": np.mean(
            [any(far[j][i] <= of_made[j] for j in made) for i in given]
        ),
        "density": np.mean(
            [sum(is_in(j, i, 5) for i in given) / 5 for j in made]
        ),
        "coverage": np.mean([any(is_in(j, i, 5) for j in made) for i in given]),
        "copy_score": np.mean([is_in(j, nearest[j], 1) for j in made]),
    }


@pytest.mark.parametrize("block_bytes", [2**20, 1500])
def test_neighbours_by_their_definitions(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", block_bytes)
    real, samples = SOME.normal(size=(40, 3)), SOME.normal(0.5, 1, size=(30, 3))
    samples[:3] = real[:3]
    found = neighbours.among(samples, real, neighbours.balls(real))
    expected = by_hand(samples, real)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value), name
    order = np.linalg.norm(samples[:, None] - real, axis=2).argsort(1)
    nearest = neighbours.nearest(samples, real, 4)
    np.testing.assert_array_equal(nearest, order[:, :4])


def test_copies_and_new_images() -> None:
    real, new = SOME.normal(size=(2, 300, 4))
    reach = neighbours.balls(real)
    assert neighbours.among(real[:50], real, reach).copy_score == 1
    assert 0.3 < neighbours.among(new, real, reach).copy_score < 0.7
    assert neighbours.among(new + 9, real, reach).copy_score == 0


# Classes.


def inception_score_by_hand(
    probabilities: np.ndarray, num_splits: int
) -> float:
    scores = []
    for part in np.array_split(probabilities, num_splits):
        marginal = part.mean(0)
        divergences = [(p * np.log(p / marginal)).sum() for p in part]
        scores.append(math.exp(np.mean(divergences)))
    return float(np.mean(scores))


def test_inception_score_by_its_formula() -> None:
    probabilities = SOME.dirichlet([0.3] * 7, size=200)
    sample = sample_of(
        rows_of(np.zeros([200, 1]), probabilities=probabilities), batch=33
    )
    names = ("split_counts", "split_probabilities", "split_negentropies")
    got = classes.inception_score(*map(sample.sums_of, names))
    expected = inception_score_by_hand(probabilities, classes.NUM_SPLITS)
    assert got == pytest.approx(expected, rel=1e-5)


def test_inception_score_has_its_bounds() -> None:
    clear = np.eye(10)[np.arange(100) % 10]
    one, none = np.eye(10)[np.zeros(100, int)], np.full([100, 10], 0.1)
    for probabilities, expected in ((clear, 10.0), (one, 1.0), (none, 1.0)):
        sample = sample_of(
            rows_of(np.zeros([100, 2]), probabilities=probabilities)
        )
        found = figures.measure(
            ("inception_score",), figures.reference(sample), sample, 0
        )
        assert found["inception_score"] == pytest.approx(expected)


def test_reverse_kl_by_hand() -> None:
    samples, real = np.array([3.0, 1.0, 0.0]), np.array([4.0, 2.0, 2.0])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.25)
    assert classes.reverse_kl(samples, real) == pytest.approx(expected)
    assert classes.reverse_kl(real, real) == 0
    # A class that is not there counts as half an image.
    assert classes.reverse_kl(
        np.array([0.0, 2.0]), np.array([8.0, 0.0])
    ) == pytest.approx(math.log(16))


def test_figures_of_labelled_samples() -> None:
    labels = np.arange(60) % 3
    shown = np.eye(4)[labels]
    centres = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    real = centres[labels] + SOME.normal(size=(60, 2))
    # The second class is drawn where the third is asked for.
    drawn = np.where(labels == 2, 1, labels)
    made = centres[drawn] + SOME.normal(size=(60, 2))
    reference = figures.reference(sample_of(rows_of(real, labels, shown)))
    sample = sample_of(rows_of(made, labels, np.eye(4)[drawn]))
    names = ("modes_covered", "reverse_kl", "conditional_accuracy")
    found = figures.measure(
        (*names, "intra_class_distance"), reference, sample, 0
    )
    assert found["modes_covered"] == 2
    assert found["conditional_accuracy"] == pytest.approx(2 / 3)
    expected = (1 / 3) * math.log(1) + (2 / 3) * math.log(2)
    assert found["reverse_kl"] == pytest.approx(expected)
    by_class = [
        frechet.distance(
            frechet.of(real[labels == label]), frechet.of(made[labels == label])
        )
        for label in range(3)
    ]
    got = found["intra_class_distance"]
    assert got == pytest.approx(np.mean(by_class), rel=1e-5)


# What is added up.


@hypothesis.given(
    st.lists(st.integers(90, 700), min_size=1, max_size=5), st.integers(0, 9)
)
@hypothesis.settings(max_examples=8)
def test_sums_do_not_depend_on_batches(batches: list[int], seed: int) -> None:
    """To the bit, and neither if it is interrupted in between."""
    chance = np.random.default_rng(seed)
    total = 1100
    rows = rows_of(
        chance.normal(3, 1, size=(total, 3)),
        chance.integers(0, 4, total),
        chance.dirichlet([1.0] * 4, size=total),
    )
    expected = sample_of(rows).to_arrays()
    sample = Sample(total, 3, 4, keeps_rows=True)
    start = 0
    for size in itertools.cycle(batches):
        if start >= total:
            break
        sample.add(rows.cut(start, start + size))
        start += size
        again = Sample(total, 3, 4, keeps_rows=True)
        again.take(sample.to_arrays())
        sample = again
    assert sample.num_seen == total
    for name, array in sample.to_arrays().items():
        np.testing.assert_array_equal(array, expected[name])


def test_a_sample_takes_none_of_another_kind() -> None:
    other = sample_of(rows_of(SOME.normal(size=(20, 4)))).to_arrays()
    with pytest.raises(ValueError, match="is of another sample"):
        Sample(20, 3, 0, keeps_rows=True).take(other)
    del other["num_added"]
    with pytest.raises(KeyError):
        Sample(20, 4, 0, keeps_rows=True).take(other)


def test_parts_together_are_a_reference_of_the_whole() -> None:
    rows = rows_of(SOME.normal(size=(50, 3)))
    whole = figures.reference(sample_of(rows))
    parts = figures.reference(
        sample_of(rows.cut(0, 25)), sample_of(rows.cut(25))
    )
    np.testing.assert_allclose(parts.moments.mean, whole.moments.mean)
    np.testing.assert_allclose(
        parts.moments.covariance, whole.moments.covariance
    )
    np.testing.assert_array_equal(parts.rows.features, whole.rows.features)
    np.testing.assert_array_equal(parts.balls.around, whole.balls.around)
    moments = figures.reference(sample_of(rows, keeps_rows=False))
    assert moments.rows is None
    np.testing.assert_allclose(
        moments.moments.covariance, whole.moments.covariance
    )


# Generators that are broken in a way that one knows.


def test_figures_tell_broken_generators_apart() -> None:
    """The order that each figure is to see; see docs/quality.md."""
    labels = np.arange(400) % 4
    centres = 4 * np.eye(4)
    real = centres[labels] + 0.5 * SOME.normal(size=(400, 4))
    made = {
        "good": centres[labels] + 0.5 * SOME.normal(size=(400, 4)),
        "rough": centres[labels] + 0.9 * SOME.normal(size=(400, 4)),
        "noise": SOME.normal(1, 3, size=(400, 4)),
        "constant": np.tile(real.mean(0), (400, 1)),
        "one mode": centres[0] + 0.5 * SOME.normal(size=(400, 4)),
        "copies": real[SOME.permutation(400)],
    }

    def seen(features: np.ndarray) -> np.ndarray:
        away = np.square(features[:, None] - centres).sum(-1)
        weights = np.exp(-(away - away.min(1, keepdims=True)))
        return weights / weights.sum(1, keepdims=True)

    reference = figures.reference(sample_of(rows_of(real, labels, seen(real))))
    found = {
        name: figures.measure(
            tuple(table.FIGURES),
            reference,
            sample_of(rows_of(features, labels, seen(features))),
            0,
        )
        for name, features in made.items()
    }
    assert found["copies"]["copy_score"] == 1
    for name in ("good", "rough", "noise", "constant", "one mode"):
        assert found[name]["copy_score"] < 0.7, name
    blind = {
        # Figures that do not see what is wrong, by what they are.
        "noise": {"copy_score", "modes_covered", "recall"},
        "constant": {"copy_score"},
        "one mode": {"precision", "density", "copy_score"},
        "rough": {"copy_score", "modes_covered", "recall"},
    }
    for name, cannot in blind.items():
        for figure, facts in table.FIGURES.items():
            if figure in cannot:
                continue
            good, bad = found["good"][figure], found[name][figure]
            is_better = good < bad if facts.best == "min" else good > bad
            assert is_better, (name, figure, good, bad)


# The table.


def test_names_are_checked() -> None:
    assert table.chosen("figures", "") == ()
    names = ("precision", "recall")
    assert table.chosen("figures", "precision,recall") == names
    with pytest.raises(UserError, match=r"figures \(fid\) must be of frechet"):
        table.chosen("figures", "precision,fid")
    with pytest.raises(UserError, match="names a figure twice"):
        table.chosen("figures", "recall,recall")


def test_the_best_way_is_known() -> None:
    assert table.best_of("frechet_distance") == "min"
    assert table.best_of("coverage") == "max"
    assert table.best_of("generator_loss") == "min"
    assert table.best_of("sample_spread") == "max"
    needs = table.lacking("conditional_accuracy", (table.CLASSES,))
    assert needs == (table.LABELS, table.CONDITIONAL)
