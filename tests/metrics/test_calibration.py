"""Cllr, logistic and isotonic calibration against scikit-learn and by hand."""

import json

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from kmq_jax.core.errors import UserError
from kmq_jax.metrics import calibration


def overlapping(trials=4000, share=0.2, shift=2.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random(trials) < share
    return rng.standard_normal(trials) + shift * labels, labels


def test_cllr_by_hand():
    # A target at odds 3:1 costs log2(1 + 1/3), a nontarget at 1:1 one bit.
    assert calibration.cllr([np.log(3), 0.0], [1, 0]) == pytest.approx((np.log2(4 / 3) + 1) / 2)
    assert calibration.cllr([0.0] * 7, [1, 1, 0, 0, 0, 0, 0]) == pytest.approx(1)
    assert calibration.cllr([np.inf, -np.inf], [1, 0]) == 0
    assert calibration.cllr([-np.inf, -1.0], [1, 0]) == np.inf


def test_cllr_of_true_likelihood_ratios_is_least():
    scores, labels = overlapping(20_000)
    llrs = 2 * scores - 2  # of N(2, 1) against N(0, 1)
    costs = [calibration.cllr(a * llrs + b, labels) for a, b in [(1, 0), (1.3, 0), (0.7, 0), (1, 0.5), (1, -0.5)]]
    assert np.argmin(costs) == 0


@pytest.mark.parametrize("decimals", [6, 1, 0])
def test_min_cllr_agrees_with_isotonic_regression(decimals):
    scores, labels = overlapping()
    scores = scores.round(decimals)
    p = IsotonicRegression(y_min=0, y_max=1).fit(scores, labels.astype(float)).predict(scores)
    with np.errstate(divide="ignore"):
        llrs = np.log(p) - np.log1p(-p) - np.log(labels.sum() / (~labels).sum())
    assert calibration.min_cllr(scores, labels) == pytest.approx(calibration.cllr(llrs, labels), abs=1e-9)


def test_min_cllr_is_a_bound_and_knows_the_extremes():
    scores, labels = overlapping()
    least = calibration.min_cllr(scores, labels)
    assert least <= calibration.cllr(calibration.fit_logistic(scores, labels)(scores), labels)
    assert calibration.min_cllr(np.exp(scores), labels) == pytest.approx(least)  # any increasing map will do
    assert calibration.min_cllr([0, 1, 2, 3], [0, 0, 1, 1]) == 0
    assert calibration.min_cllr([0, 1, 2, 3], [1, 1, 0, 0]) == pytest.approx(1)
    assert calibration.min_cllr([5.0] * 4, [0, 1, 0, 0]) == pytest.approx(1)


@pytest.mark.parametrize("p_target", [0.5, 0.01])
def test_logistic_agrees_with_scikit_learn(p_target):
    scores, labels = overlapping()
    weights = np.where(labels, p_target / labels.mean(), (1 - p_target) / (~labels).mean())
    theirs = LogisticRegression(C=1e6, tol=1e-10, max_iter=1000).fit(scores[:, None], labels, weights)
    ours = calibration.fit_logistic(scores, labels, p_target)
    assert ours.scale == pytest.approx(theirs.coef_[0, 0], rel=1e-4)
    assert ours.offset == pytest.approx(theirs.intercept_[0] - np.log(p_target / (1 - p_target)), rel=1e-3, abs=1e-4)


def test_logistic_does_not_depend_on_class_shares_or_units():
    scores, labels = overlapping()
    ours = calibration.fit_logistic(scores, labels)
    repeated = np.concatenate([scores, scores[labels]]), np.concatenate([labels, labels[labels]])
    again = calibration.fit_logistic(*repeated)
    assert (again.scale, again.offset) == pytest.approx((ours.scale, ours.offset), rel=1e-5)
    np.testing.assert_allclose(calibration.fit_logistic(1e4 * scores - 7, labels)(1e4 * scores - 7), ours(scores), 1e-5)


@pytest.mark.parametrize("scores", [[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
def test_logistic_stays_finite_without_overlap_or_spread(scores):
    fitted = calibration.fit_logistic(scores, [0, 0, 1, 1])
    llrs = fitted(scores)
    assert np.isfinite(llrs).all()
    assert calibration.cllr(llrs, [0, 0, 1, 1]) <= 1 + 1e-9


def test_isotonic_agrees_with_scikit_learn_and_clips():
    rng = np.random.default_rng(0)
    scores = rng.uniform(-1, 1, 3000).round(2)
    values = scores**3 + 0.1 * rng.standard_normal(3000)
    ours = calibration.fit_isotonic(scores, values)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(scores, values)
    grid = np.linspace(-2, 2, 1001).reshape(7, 143)
    np.testing.assert_allclose(ours(grid), theirs.predict(grid.ravel()).reshape(7, 143), atol=1e-12)
    assert np.all(np.diff(ours(np.sort(grid.ravel()))) >= 0)
    assert ours(-99.0) == ours(-1.0)
    assert ours(99.0) == ours(1.0)


def test_isotonic_of_one_score_is_constant():
    ours = calibration.fit_isotonic([0.5, 0.5], [1.0, 3.0])
    np.testing.assert_array_equal(ours([0.0, 0.5, 1.0]), 2.0)


def test_maps_survive_json():
    scores, labels = overlapping(500)
    for fitted in (calibration.fit_logistic(scores, labels), calibration.fit_isotonic(scores, labels)):
        again = calibration.map_from_dict(json.loads(json.dumps(fitted.to_dict())))
        np.testing.assert_array_equal(again(scores), fitted(scores))


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"kind": "affine"},
        {"kind": "affine", "scale": "x", "offset": 0},
        {"kind": "affine", "scale": float("nan"), "offset": 0},
        {"kind": "isotonic", "x": [0, 1], "y": [1, 0]},
        {"kind": "isotonic", "x": [1, 1], "y": [0, 1]},
        {"kind": "isotonic", "x": [0, 1], "y": [0]},
        {"kind": "isotonic", "x": [], "y": []},
        {"kind": "isotonic", "x": [[0], [1, 2]], "y": []},
        {"kind": "spline"},
    ],
)
def test_broken_maps_are_refused(value):
    with pytest.raises(UserError, match="calibration"):
        calibration.map_from_dict(value)


@pytest.mark.parametrize(
    ("scores", "values", "message"),
    [([], [], "do not fit"), ([1.0], [1.0, 2.0], "do not fit"), ([np.nan], [1.0], "finite")],
)
def test_isotonic_names_mistakes(scores, values, message):
    with pytest.raises(UserError, match=message):
        calibration.fit_isotonic(scores, values)


def speaker_trials(speakers=30, each=4, seed=0):
    """All pairs of a small corpus with speaker effects: scores, labels, both speakers."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(speakers), each)
    centre = rng.standard_normal((speakers, 8))
    points = centre[owner] + 0.7 * rng.standard_normal((len(owner), 8))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    one, two = np.triu_indices(len(owner), 1)
    return np.sum(points[one] * points[two], axis=1), owner[one] == owner[two], owner[one], owner[two]


def test_cross_calibration_fits_on_other_speakers():
    scores, labels, enrol, test = speaker_trials(12)
    llrs = calibration.cross_calibrate(scores, labels, enrol, test, folds=12)
    # With one speaker a fold, a trial's map is the fit on the trials without either of its speakers.
    for i in (0, 5, 200, 1000):
        speakers = (enrol[i], test[i])
        others = ~np.isin(enrol, speakers) & ~np.isin(test, speakers)
        expected = calibration.fit_logistic(scores[others], labels[others])(scores[i])
        assert llrs[i] == pytest.approx(expected, abs=1e-3)  # the bins


def test_a_score_far_out_does_not_flatten_the_fits():
    # As normalised by a cohort that hardly varies. On the right side it is no evidence against any fit.
    scores, labels, enrol, test = speaker_trials(20)
    expected = calibration.fit_logistic(scores, labels)
    llrs = calibration.cross_calibrate(scores, labels, enrol, test)
    far = scores.copy()
    far[np.flatnonzero(labels)[0]] = 1e6
    fitted = calibration.fit_logistic(far, labels)
    assert (fitted.scale, fitted.offset) == pytest.approx((expected.scale, expected.offset), rel=0.05)
    moved = calibration.cross_calibrate(far, labels, enrol, test)
    assert np.median(np.abs(moved - llrs)) < 0.1 and np.median(np.abs(llrs)) > 1


def test_cross_calibration_costs_more_than_cheating_and_little():
    scores, labels, enrol, test = speaker_trials(60)
    cheating = calibration.cllr(calibration.fit_logistic(scores, labels)(scores), labels)
    honest = calibration.cllr(calibration.cross_calibrate(scores, labels, enrol, test), labels)
    assert cheating < honest < 1.1 * cheating


def test_cross_calibration_says_when_speakers_are_too_few():
    scores, labels, enrol, test = speaker_trials(3)
    with pytest.raises(UserError, match="3 speakers are too few"):
        calibration.cross_calibrate(scores, labels, enrol, test)
    with pytest.raises(UserError, match="nonnegative integers"):
        calibration.cross_calibrate(scores, labels, enrol - 1, test)


@pytest.mark.parametrize("weights", [[0, -1], [1, 0], [1, np.nan], [1.0]])
def test_weights_that_are_not_positive_are_refused(weights):
    with pytest.raises(UserError, match="must be 2 positive numbers"):
        calibration.fit_isotonic([0.0, 1.0], [0.0, 1.0], weights)
