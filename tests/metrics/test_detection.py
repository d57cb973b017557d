"""Detection metrics against exact fractions over every threshold, and against scikit-learn."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from scipy.spatial import cKDTree
from scipy.special import ndtri
from sklearn.metrics import roc_curve

from kmq_jax.core.errors import UserError
from kmq_jax.metrics import detection

# Few distinct values, so that ties within and across the classes abound.
trial_lists = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40).filter(
    lambda trials: len({label for _, label in trials}) == 2
)


def exact_points(scores, labels):
    """(threshold, misses, false alarms) at every threshold, in exact fractions: O(n^2), no sorting of trials."""
    targets = [s for s, label in zip(scores, labels) if label]
    nontargets = [s for s, label in zip(scores, labels) if not label]
    return [
        (
            t,
            Fraction(sum(s < t for s in targets), len(targets)),
            Fraction(sum(s >= t for s in nontargets), len(nontargets)),
        )
        for t in sorted(set(scores)) + [float("inf")]
    ]


def exact_eer(scores, labels):
    """Where the polygon through the points meets the diagonal."""
    points = exact_points(scores, labels)
    for (_, miss0, fa0), (_, miss1, fa1) in zip(points, points[1:]):
        if miss1 >= fa1:
            share = (fa0 - miss0) / ((fa0 - miss0) + (miss1 - fa1))
            return miss0 + share * (miss1 - miss0)
    raise AssertionError


def exact_min_dcf(scores, labels, p_target, c_miss, c_fa):
    p = Fraction(p_target).limit_denominator(10**6)
    costs = [c_miss * p * miss + c_fa * (1 - p) * fa for _, miss, fa in exact_points(scores, labels)]
    return min(costs) / min(c_miss * p, c_fa * (1 - p))


@settings(max_examples=200, deadline=None)
@given(trial_lists, st.sampled_from([(0.01, 1, 1), (0.5, 1, 1), (0.05, 10, 1), (0.9, 1, 3)]))
def test_agrees_with_exact_fractions_on_tied_scores(trials, costs):
    scores, labels = zip(*trials)
    rate, threshold = detection.eer(scores, labels)
    assert rate == pytest.approx(float(exact_eer(scores, labels)), abs=1e-12)
    assert detection.min_dcf(scores, labels, *costs) == pytest.approx(float(exact_min_dcf(scores, labels, *costs)))
    # The threshold is a point of the list at which the two rates are as near to each other as anywhere.
    points = {t: abs(miss - fa) for t, miss, fa in exact_points(scores, labels)}
    assert threshold in points
    finite = [gap for t, gap in points.items() if np.isfinite(t)]
    assert points[threshold] == min(finite)


@settings(max_examples=50, deadline=None)
@given(trial_lists, st.randoms(use_true_random=False))
def test_order_of_trials_does_not_matter(trials, random):
    shuffled = random.sample(trials, len(trials))
    assert detection.eer(*zip(*trials)) == detection.eer(*zip(*shuffled))
    assert detection.min_dcf(*zip(*trials)) == detection.min_dcf(*zip(*shuffled))


@pytest.mark.parametrize("decimals", [None, 2, 1])
@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0, 8.0])
def test_agrees_with_scikit_learn(decimals, shift):
    rng = np.random.default_rng(0)
    labels = rng.random(5000) < 0.2
    scores = rng.standard_normal(5000) + shift * labels
    if decimals is not None:
        scores = scores.round(decimals)
    fpr, tpr, _ = roc_curve(labels, scores)
    theirs = brentq(lambda x: 1 - x - interp1d(fpr, tpr)(x), 0, 1, xtol=1e-12)
    assert detection.eer(scores, labels)[0] == pytest.approx(theirs, abs=1e-6)
    cost = np.min(0.01 * (1 - tpr) + 0.99 * fpr) / 0.01
    assert detection.min_dcf(scores, labels) == pytest.approx(cost, abs=1e-6)


def test_hand_made_case():
    """Targets .9 .8 .3, nontargets .7 .2 .1 .0: at .7 one miss of three and one false alarm of four."""
    scores, labels = [0.9, 0.8, 0.3, 0.7, 0.2, 0.1, 0.0], [1, 1, 1, 0, 0, 0, 0]
    thresholds, p_miss, p_fa = detection.operating_points(scores, labels)
    np.testing.assert_allclose(thresholds, [0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, np.inf])
    np.testing.assert_allclose(p_miss, np.array([0, 0, 0, 0, 1, 1, 2, 3]) / 3)
    np.testing.assert_allclose(p_fa, np.array([4, 3, 2, 1, 1, 0, 0, 0]) / 4)
    # Between .3 and .7 the false alarms stay at 1/4 while the misses rise through it.
    assert detection.eer(scores, labels) == (0.25, 0.7)
    assert detection.min_dcf(scores, labels, p_target=0.5) == pytest.approx(1 / 4)
    assert detection.min_dcf(scores, labels) == pytest.approx(1 / 3)


def test_decisions_at_the_threshold_have_the_reported_rates():
    rng = np.random.default_rng(1)
    labels = rng.random(4000) < 0.5
    scores = (rng.standard_normal(4000) + 2 * labels).astype(np.float32)
    rate, threshold = detection.eer(scores, labels)
    accepted = scores >= threshold
    assert np.mean(~accepted[labels]) == pytest.approx(rate, abs=1e-3)
    assert np.mean(accepted[~labels]) == pytest.approx(rate, abs=1e-3)


@pytest.mark.parametrize(
    ("scores", "labels", "rate", "threshold", "cost"),
    [
        ([1.0, 0.0], [1, 0], 0.0, 1.0, 0.0),  # one trial each, right
        ([0.0, 1.0], [1, 0], 1.0, 1.0, 1.0),  # one trial each, wrong
        ([0.5, 0.5], [1, 0], 0.5, 0.5, 1.0),  # a tie is a coin
        ([2.0] * 10, [1] * 3 + [0] * 7, 0.5, 2.0, 1.0),  # constant scores
    ],
)
def test_degenerate_lists(scores, labels, rate, threshold, cost):
    assert detection.eer(scores, labels) == (rate, threshold)
    assert detection.min_dcf(scores, labels) == cost


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [0, 0], "no target trials among 2"),
        ([1.0, 2.0], [1, 1], "no nontarget trials among 2"),
        ([], [], "no target trials among 0"),
        ([1.0, np.nan, np.nan], [1, 0, 1], "2 of 3 scores are not finite, the first is trial 2"),
        ([1.0, np.inf], [1, 0], "1 of 2 scores are not finite"),
        ([1.0, 2.0], [1, 2], "labels must be 0 or 1, got 2"),
        ([1.0, 2.0], [1, 0, 1], "do not fit"),
        ([[1.0, 2.0]], [[1, 0]], "do not fit"),
    ],
)
def test_mistakes_are_named(scores, labels, message):
    with pytest.raises(UserError, match=message):
        detection.eer(scores, labels)


def test_costs_are_checked():
    with pytest.raises(UserError, match="p_target"):
        detection.min_dcf([1.0, 0.0], [1, 0], p_target=1.0)


def test_act_dcf_counts_errors_at_the_bayes_threshold():
    threshold = np.log(99)
    llrs = [threshold, threshold - 1e-9, threshold + 1, -3, np.inf, -np.inf]
    labels = [1, 1, 0, 0, 1, 0]
    # One of three targets missed, one of three nontargets accepted.
    assert detection.act_dcf(llrs, labels) == pytest.approx((0.01 / 3 + 0.99 / 3) / 0.01)
    assert detection.act_dcf(llrs, labels, p_target=0.5) == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="not finite"):
        detection.act_dcf([np.nan, 0.0], [1, 0])


def test_act_dcf_is_never_below_min_dcf():
    rng = np.random.default_rng(2)
    labels = rng.random(2000) < 0.3
    llrs = 4 * rng.standard_normal(2000) + 6 * labels
    for p_target in (0.001, 0.01, 0.5, 0.9):
        assert detection.act_dcf(llrs, labels, p_target) >= detection.min_dcf(llrs, labels, p_target)


def test_det_curve_keeps_the_shape_with_few_points():
    rng = np.random.default_rng(3)
    labels = rng.random(100_000) < 0.5
    scores = rng.standard_normal(100_000) + 2 * labels
    p_fa, p_miss, thresholds = detection.det_curve(scores, labels, 500)
    assert len(p_fa) <= 500
    all_thresholds, all_miss, all_fa = detection.operating_points(scores, labels)
    kept = np.searchsorted(all_thresholds, thresholds)
    np.testing.assert_array_equal(all_miss[kept], p_miss)
    np.testing.assert_array_equal(all_fa[kept], p_fa)
    assert (p_fa[0], p_miss[0], p_fa[-1], p_miss[-1]) == (1, 0, 0, 1)
    # As drawn, every point left out lies within a 500th of the curve's length (about 17) of one kept.
    inside = (all_fa > 1e-4) & (all_miss > 1e-4)
    kept = (p_fa > 0) & (p_miss > 0) & (p_fa < 1) & (p_miss < 1)
    tree = cKDTree(ndtri(np.stack([p_fa, p_miss], 1)[kept]))
    distance, _ = tree.query(ndtri(np.stack([all_fa, all_miss], 1)[inside]), p=np.inf)
    assert distance.max() < 17 / 500
    short = detection.det_curve(scores[:50], labels[:50], 500)
    assert len(short[0]) == 51


def test_speakers_are_numbered_however_far_apart_they_are():
    enrol, test, speakers = detection.number_speakers([10**15, 1], np.array([2**63, 7], np.uint64), 2)
    assert (enrol.tolist(), test.tolist(), speakers) == ([2, 0], [3, 1], 4)
    rng = np.random.default_rng(0)
    near = rng.integers(0, 50, (2, 200))
    for far in (near, near * 10**12):
        found = detection.number_speakers(*far, 200)
        expected = np.unique(near, return_inverse=True)[1].reshape(2, 200)
        np.testing.assert_array_equal(found[:2], expected)
        assert found[2] == len(np.unique(near))
