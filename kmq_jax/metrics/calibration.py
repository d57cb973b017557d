"""Scores as evidence: Cllr, minCllr, and maps from scores to log likelihood ratios or to another system's scores.

All likelihood ratios are natural logarithms; Cllr is in bits.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json
from kmq_jax.metrics.detection import Array, check_trials, number_speakers

_RIDGE = 1e-7  # on the slope, for scores of unit spread and a loss that is a weighted mean
_BINS = 2048  # of scores in cross-calibration
_REACH = 4  # how far out scores count in a fit, in widths of the middle halves of both classes


def cllr(llrs: ArrayLike, labels: ArrayLike) -> float:
    """Cost of log likelihood ratios, in bits: 0 for perfect evidence, 1 for none at all; bad calibration can exceed 1.

    Args:
        llrs: natural-log likelihood ratios `[trials]`. One of -inf for a target trial, or +inf for a nontarget trial,
            makes the cost infinite.
        labels: `[trials]`, true for target trials.

    References:
        Brummer and du Preez, "Application-independent evaluation of speaker detection", CSL 2006.

    >>> round(cllr([0.0, 0.0], [0, 1]), 6), round(cllr([-20.0, 20.0], [0, 1]), 6)  # no evidence, perfect evidence
    (1.0, 0.0)
    """
    llrs, labels = check_trials(llrs, labels, finite=False)
    costs = [np.logaddexp(0, -llrs[labels]).mean(), np.logaddexp(0, llrs[~labels]).mean()]
    return float(np.mean(costs) / np.log(2))


def min_cllr(scores: ArrayLike, labels: ArrayLike) -> float:
    """Cllr after the best monotone calibration, found on these very trials (pool adjacent violators).

    Trials below all targets get -inf and those above all nontargets +inf; both are right, and cost nothing.

    Args:
        scores: `[trials]`.
        labels: `[trials]`, true for target trials.

    >>> min_cllr([0.1, 0.4, 0.6, 0.9], [0, 0, 1, 1])
    0.0
    """
    scores, labels = check_trials(scores, labels)
    order = np.argsort(scores)
    # Tied scores are one point: no map can tell them apart.
    group = np.concatenate([[0], np.cumsum(np.diff(scores[order]) != 0)])
    size, targets = np.bincount(group), np.bincount(group, labels[order])
    fit = isotonic_regression(targets / size, weights=size)
    blocks = fit.blocks[:-1]  # where each pooled block starts; the last entry is the end
    size, targets = np.add.reduceat(size, blocks), np.add.reduceat(targets, blocks)
    nontargets = size - targets
    with np.errstate(divide="ignore"):
        llrs = np.log(targets) - np.log(nontargets) + np.log(nontargets.sum() / targets.sum())
    # Blocks without trials of a class are left out of its sum: 0 times infinity would be NaN.
    hit, rejected = targets > 0, nontargets > 0
    miss_cost = np.sum(targets[hit] * np.logaddexp(0, -llrs[hit])) / targets.sum()
    fa_cost = np.sum(nontargets[rejected] * np.logaddexp(0, llrs[rejected])) / nontargets.sum()
    return float((miss_cost + fa_cost) / (2 * np.log(2)))


@dataclass(frozen=True)
class AffineMap:
    """`scale * score + offset`: what logistic calibration fits.

    >>> AffineMap(2.0, -1.0)([0.0, 1.0]).tolist()
    [-1.0, 1.0]
    """

    scale: float
    offset: float

    def __call__(self, scores: ArrayLike) -> Array:
        """Maps scores of any shape."""
        return self.scale * np.asarray(scores, np.float64) + self.offset

    def to_dict(self) -> Json:
        """A value that JSON can hold; `map_from_dict` reads it."""
        return {"kind": "affine", "scale": self.scale, "offset": self.offset}


@dataclass(frozen=True, eq=False)
class IsotonicMap:
    """A nondecreasing piecewise-linear map, constant outside its knots.

    Attributes:
        x: `[knots]`, strictly ascending.
        y: `[knots]`, nondecreasing.

    >>> IsotonicMap(np.array([0.0, 1.0]), np.array([0.0, 10.0]))([-1.0, 0.5, 2.0]).tolist()
    [0.0, 5.0, 10.0]
    """

    x: Array
    y: Array

    def __call__(self, scores: ArrayLike) -> Array:
        """Maps scores of any shape."""
        return np.interp(np.asarray(scores, np.float64), self.x, self.y)

    def to_dict(self) -> Json:
        """A value that JSON can hold; `map_from_dict` reads it."""
        return {"kind": "isotonic", "x": self.x.tolist(), "y": self.y.tolist()}


def map_from_dict(value: Any) -> AffineMap | IsotonicMap:
    """Reads what `to_dict` of either map wrote.

    Raises:
        UserError: the value is not such a map, or one that falls: more alike must not score less.

    >>> map_from_dict(AffineMap(2.0, -1.0).to_dict())
    AffineMap(scale=2.0, offset=-1.0)
    """
    try:
        if value["kind"] == "affine":
            numbers = np.array([value["scale"], value["offset"]], np.float64)
            fine = bool(np.isfinite(numbers).all())
            made: AffineMap | IsotonicMap = AffineMap(*numbers.tolist())
        elif value["kind"] == "isotonic":
            x, y = (np.asarray(value[key], np.float64) for key in "xy")
            fine = bool(x.ndim == 1 and x.shape == y.shape and x.size and np.isfinite([x, y]).all())
            fine = fine and bool((np.diff(x) > 0).all() and (np.diff(y) >= 0).all())
            made = IsotonicMap(x, y)
        else:
            raise UserError(f"a calibration of kind {value['kind']!r} is not known")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"not a calibration map: {error!r}") from error
    if not fine:
        raise UserError(f"a calibration of kind {value['kind']!r} has impossible numbers")
    if isinstance(made, AffineMap) and made.scale < 0:
        raise UserError(f"a map of scale {made.scale} falls: more alike must not score less")
    return made


def fit_logistic(scores: ArrayLike, labels: ArrayLike, p_target: float = 0.5) -> AffineMap:
    """Prior-weighted logistic regression from scores to log likelihood ratios.

    Both classes are weighted to the prior `p_target`, and its log odds are taken off afterwards. So the result does not
    depend on the shares of the classes in the list. A small ridge penalty keeps the slope finite where the scores
    separate the classes perfectly; elsewhere it does not show. A score far out of both classes counts as less far
    (`_within_reach`).

    Args:
        scores: `[trials]`, finite.
        labels: `[trials]`, true for target trials.
        p_target: the prior at which the fit is best, above 0 and below 1.

    Raises:
        UserError: as `detection.check_trials`, or `p_target` is out of range.

    References:
        Brummer and du Preez 2006.

    >>> fitted = fit_logistic([0.0, 1.0, 2.0, 1.0, 2.0, 3.0], [0, 0, 0, 1, 1, 1])
    >>> round(-fitted.offset / fitted.scale, 3)  # the score that is no evidence either way
    1.5
    """
    scores, labels = check_trials(scores, labels)
    scores = _within_reach(scores, labels)
    return _fit_logistic(scores, labels.astype(np.float64), (~labels).astype(np.float64), p_target)


def _within_reach(scores: Array, labels: Array) -> Array:
    """Clips scores `[trials]` that lie far outside both classes; ordinarily there are none.

    A score that was normalised by a cohort that hardly varies can be thousands of times the others. A spread or bins
    that reach up to it would leave no detail for these.
    """
    middles = [np.quantile(scores[labels == side], (0.25, 0.75)) for side in (False, True)]
    low, high = np.min(middles), np.max(middles)
    reach = _REACH * (high - low) or np.inf  # where most scores are tied, nothing is known to be far out
    return np.clip(scores, low - reach, high + reach)


def _fit_logistic(scores: Array, targets: Array, nontargets: Array, p_target: float) -> AffineMap:
    """As `fit_logistic`, for scores `[points]` that each stand for so many `targets` and `nontargets`, `[points]`."""
    if not 0 < p_target < 1:
        raise UserError(f"p_target (={p_target}) must lie between 0 and 1")
    both = targets + nontargets
    # The fit runs on scores of mean 0 and spread 1, so that the ridge means the same on any scale.
    centre = np.average(scores, weights=both)
    spread = np.sqrt(np.average((scores - centre) ** 2, weights=both)) or 1.0
    x = (scores - centre) / spread
    targets = targets * (p_target / targets.sum())
    both = targets + nontargets * ((1 - p_target) / nontargets.sum())

    def loss(ab: Array) -> tuple[float, Array]:
        # Weighted cross entropy: -sum(targets log p + nontargets log(1 - p)) with p = expit(z).
        z = ab[0] * x + ab[1]
        error = both * expit(z) - targets
        value = both @ np.logaddexp(0, z) - targets @ z + _RIDGE * ab[0] ** 2 / 2
        return value, np.array([error @ x + _RIDGE * ab[0], error.sum()])

    def curvature(ab: Array) -> Array:
        p = expit(ab[0] * x + ab[1])
        h = both * p * (1 - p)
        slope, cross = (h * x) @ x + _RIDGE, h @ x
        return np.array([[slope, cross], [cross, h.sum()]])

    best = minimize(loss, np.zeros(2), jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-9})
    # Back to the scale of the scores, and from posterior log odds to log likelihood ratios.
    scale = float(best.x[0] / spread)
    return AffineMap(scale, float(best.x[1] - scale * centre - np.log(p_target / (1 - p_target))))


def fit_isotonic(scores: ArrayLike, values: ArrayLike, weights: ArrayLike | None = None) -> IsotonicMap:
    """The nondecreasing map from scores to values with the least squared error.

    Values may be another system's scores of the same trials, or labels.

    Args:
        scores: `[trials]`, finite.
        values: `[trials]`, finite.
        weights: `[trials]`, positive; all one where left out.

    Raises:
        UserError: shapes differ, there is no trial, a score or value is not finite, or a weight is not positive.

    >>> fit_isotonic([0.0, 1.0, 2.0], [0.0, 3.0, 1.0])([0.0, 2.0]).tolist()
    [0.0, 2.0]
    """
    from sklearn.isotonic import IsotonicRegression

    scores, values = np.asarray(scores, np.float64), np.asarray(values, np.float64)
    if scores.ndim != 1 or scores.shape != values.shape or scores.size == 0:
        raise UserError(f"scores of shape {scores.shape} do not fit values of shape {values.shape}")
    if not (np.isfinite(scores).all() and np.isfinite(values).all()):
        raise UserError("scores and values of an isotonic map must be finite")
    if weights is not None and not (np.shape(weights) == scores.shape and (np.asarray(weights) > 0).all()):
        raise UserError(f"weights of an isotonic map must be {len(scores)} positive numbers")
    model = IsotonicRegression(out_of_bounds="clip").fit(scores, values, weights)
    return IsotonicMap(np.asarray(model.X_thresholds_), np.asarray(model.y_thresholds_))


def cross_calibrate(
    scores: ArrayLike,
    labels: ArrayLike,
    enrol_speaker: ArrayLike,
    test_speaker: ArrayLike,
    p_target: float = 0.5,
    folds: int = 10,
    seed: int = 0,
) -> Array:
    """Log likelihood ratios of every trial, each calibrated on trials of other speakers only.

    Speakers are dealt into folds. A trial whose speakers lie in folds i and j is mapped by the logistic fit on the
    trials that have no speaker in either. For these fits the scores are counted in 2,048 bins, each at the mean of its
    scores, which moves a ratio by some 1e-4; scores far out are treated as in `fit_logistic`.

    Args:
        scores: `[trials]`.
        labels: `[trials]`, true for target trials.
        enrol_speaker: `[trials]`, nonnegative integers.
        test_speaker: `[trials]`, nonnegative integers.
        p_target: prior of the fit.
        folds: number of folds; with fewer speakers, each is a fold.
        seed: of the deal.

    Returns:
        Natural-log likelihood ratios `[trials]`.

    Raises:
        UserError: some fit is left without target or nontarget trials: there are too few speakers.

    >>> scores = [0.9, 0.8, 0.7, 0.9, 0.1, 0.2, 0.3, 0.2, 0.1, 0.3]
    >>> enrol, test = [0, 1, 2, 3, 0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 1, 2, 3, 2, 3, 3]
    >>> llrs = cross_calibrate(scores, np.equal(enrol, test), enrol, test)
    >>> bool((llrs[:4] > 0).all() and (llrs[4:] < 0).all())
    True
    """
    scores, labels = check_trials(scores, labels)
    enrol, test, speakers = number_speakers(enrol_speaker, test_speaker, len(scores))
    folds = min(folds, speakers)
    fold_of = np.random.default_rng(seed).permutation(speakers) % folds
    # Numbers the folds of a trial's two speakers: row and column of `maps` in one.
    pair = fold_of[enrol] * folds + fold_of[test]

    near = _within_reach(scores, labels)
    lowest, highest = near.min(), near.max()
    bins = np.minimum((near - lowest) * (_BINS / max(highest - lowest, 1e-300)), _BINS - 1).astype(np.int64)
    size = np.bincount(bins, minlength=_BINS)
    used = size > 0
    centres = np.bincount(bins, near, _BINS)[used] / size[used]
    # How many trials fall into each fold of enrolment, fold of test, label and bin.
    counts = np.bincount((pair * 2 + labels) * _BINS + bins, minlength=folds**2 * 2 * _BINS)
    counts = counts.reshape(folds, folds, 2, _BINS)[..., used].astype(np.float64)

    maps = np.zeros((folds, folds, 2))
    for i, j in itertools.combinations_with_replacement(range(folds), 2):
        others = np.delete(np.arange(folds), [i, j])
        if not counts[[i, j], [j, i]].any():
            continue  # no trial needs this map
        nontargets, targets = counts[np.ix_(others, others)].sum(axis=(0, 1))
        if not (targets.any() and nontargets.any()):
            raise UserError(f"{speakers} speakers are too few for calibration on other speakers")
        fit = _fit_logistic(centres, targets, nontargets, p_target)
        maps[i, j] = maps[j, i] = fit.scale, fit.offset
    scale, offset = maps.reshape(-1, 2)[pair].T
    return scale * scores + offset
