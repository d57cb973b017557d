"""Detection metrics of trial scores: EER, minDCF, actDCF and the DET curve.

A trial is accepted when `score >= threshold`. An operating point is what one threshold gives: the miss rate (targets
rejected) and the false-alarm rate (nontargets accepted). No threshold separates tied scores, so they make one operating
point, whatever their order in the list.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from kmq_jax.core.errors import UserError

Array = NDArray[Any]


def check_trials(scores: ArrayLike, labels: ArrayLike, finite: bool = True) -> tuple[Array, Array]:
    """Checks scores and labels and returns them as float64 and bool.

    Args:
        scores: `[trials]`.
        labels: `[trials]`, true (or 1) for target trials, false (or 0) for nontarget trials.
        finite: also refuse infinite scores.

    Raises:
        UserError: lengths differ, a label is neither 0 nor 1, a score is not a number, or one of the two classes has
            no trial.

    >>> check_trials([0.5, 2], [1, 0])
    (array([0.5, 2. ]), array([ True, False]))
    """
    scores, labels = as_trials(scores, labels)
    bad = ~np.isfinite(scores) if finite else np.isnan(scores)
    if bad.any():
        first = int(np.argmax(bad))
        raise UserError(f"{bad.sum()} of {len(scores)} scores are not finite, the first is trial {first + 1}")
    targets = int(labels.sum())
    if targets == 0 or targets == len(labels):
        raise UserError(f"no {'nontarget' if targets else 'target'} trials among {len(labels)} trials")
    return scores, labels


def as_trials(scores: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """Scores as float64 and labels as bool, whatever the scores and however many trials of either class.

    Raises:
        UserError: lengths differ, or a label is neither 0 nor 1.

    >>> as_trials([0.5], [1])
    (array([0.5]), array([ True]))
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise UserError(f"scores of shape {scores.shape} do not fit labels of shape {labels.shape}")
    if labels.dtype != bool:
        if not np.isin(labels, (0, 1)).all():
            raise UserError(f"labels must be 0 or 1, got {labels[~np.isin(labels, (0, 1))][0]}")
        labels = labels.astype(bool)
    return scores, labels


def number_speakers(enrol: ArrayLike, test: ArrayLike, trials: int) -> tuple[Array, Array, int]:
    """Renumbers the speakers of trials from 0 without gaps.

    Args:
        enrol: `[trials]`, a nonnegative integer for the speaker of each enrolment.
        test: `[trials]`, the same for the test utterance.
        trials: the number expected.

    Returns:
        The new numbers of both sides, and how many speakers there are.

    Raises:
        UserError: the numbers do not fit the trials.

    >>> number_speakers([7, 3], [3, 9], 2)
    (array([1, 0]), array([0, 2]), 3)
    """
    sides = [np.asarray(side) for side in (enrol, test)]
    for side in sides:
        if side.shape != (trials,) or not np.issubdtype(side.dtype, np.integer) or side.min() < 0:
            raise UserError(f"speakers must be {trials} nonnegative integers, got {side.dtype} of shape {side.shape}")
    if max(side.max() for side in sides) > 100 * trials:  # so far apart that a table of all would not fit
        ranks = np.unique(np.concatenate([side.astype(np.uint64) for side in sides]), return_inverse=True)[1]
        sides = [ranks[:trials], ranks[trials:]]
    occurs = np.zeros(max(side.max() for side in sides) + 1, bool)
    for side in sides:
        occurs[side] = True
    number = np.cumsum(occurs) - 1
    return number[sides[0]], number[sides[1]], int(occurs.sum())


def operating_points(scores: ArrayLike, labels: ArrayLike) -> tuple[Array, Array, Array]:
    """Every operating point of a set of scores, one for each distinct score and one that rejects all.

    Args:
        scores: `[trials]`.
        labels: `[trials]`, true for target trials.

    Returns:
        `thresholds, p_miss, p_fa`, each `[points]`. Thresholds ascend; the last is infinite.

    >>> thresholds, p_miss, p_fa = operating_points([0.2, 0.5, 0.8], [0, 1, 1])
    >>> thresholds.tolist(), p_miss.tolist(), p_fa.tolist()
    ([0.2, 0.5, 0.8, inf], [0.0, 0.0, 0.5, 1.0], [1.0, 0.0, 0.0, 0.0])
    """
    scores, labels = check_trials(scores, labels)
    order = np.argsort(scores)
    scores, labels = scores[order], labels[order]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(scores)) + 1])
    # How many trials each threshold rejects: those that come before its score, in the end all.
    rejected = np.append(starts, len(scores))
    misses = np.concatenate([[0], np.cumsum(labels)])[rejected]
    targets, nontargets = misses[-1], len(scores) - misses[-1]
    thresholds = np.append(scores[starts], np.inf)
    return thresholds, misses / targets, (nontargets - (rejected - misses)) / nontargets


def equal_error_point(p_miss: Array, p_fa: Array) -> tuple[Array, Array]:
    """Where the two error rates of a curve meet.

    The curve joins neighbouring operating points by straight lines, as `scipy.optimize.brentq` on an interpolated
    `sklearn.metrics.roc_curve` would, which is how the VoxCeleb toolkits compute the EER.

    Args:
        p_miss: `[..., points]`, ascending from 0 to 1.
        p_fa: `[..., points]`, descending from 1 to 0.

    Returns:
        The EER `[...]` and the index `[...]` of the operating point at which the rates are nearest each other (never
        the last, which rejects all).

    >>> rate, point = equal_error_point(np.array([0.0, 0.1, 0.3, 1.0]), np.array([1.0, 0.3, 0.1, 0.0]))
    >>> round(float(rate), 6), int(point)
    (0.2, 2)
    """
    above = np.sum(p_miss < p_fa, axis=-1, keepdims=True)  # the first point at which misses prevail
    miss0, miss1 = (np.take_along_axis(p_miss, above - i, -1)[..., 0] for i in (1, 0))
    fa0, fa1 = (np.take_along_axis(p_fa, above - i, -1)[..., 0] for i in (1, 0))
    gap0, gap1 = fa0 - miss0, miss1 - fa1  # gap0 > 0 and gap1 >= 0
    # The gap between the rates is linear along the segment; the EER lies where it is zero.
    rate = miss0 + (miss1 - miss0) * gap0 / (gap0 + gap1)
    above = above[..., 0]
    # The nearer of the segment's two ends, but never the point that rejects all.
    lower = (gap0 < gap1) | (above == p_miss.shape[-1] - 1)
    return rate, np.where(lower, above - 1, above)


def eer(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """Equal error rate.

    Args:
        scores: `[trials]`.
        labels: `[trials]`, true for target trials.

    Returns:
        The EER as a fraction (see `equal_error_point`), and the threshold of the operating point nearest to it: a
        score that occurs, to be used as `score >= threshold`.

    Raises:
        UserError: there are no target or no nontarget trials, or a score is not finite.

    >>> eer([0.1, 0.4, 0.6, 0.9], [0, 0, 1, 1])  # separable: no errors at 0.6
    (0.0, 0.6)
    >>> eer([0.1, 0.6, 0.4, 0.9], [0, 0, 1, 1])[0]  # one of two targets is below one of two nontargets
    0.5
    """
    thresholds, p_miss, p_fa = operating_points(scores, labels)
    rate, point = equal_error_point(p_miss, p_fa)
    return float(rate), float(thresholds[point])


def normalised_dcf(
    p_miss: ArrayLike, p_fa: ArrayLike, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> Array:
    """The detection cost, divided by the cost of accepting all or of rejecting all, whichever is less.

    Args:
        p_miss: miss rates, any shape.
        p_fa: false-alarm rates, the same shape.
        p_target: prior probability of a target trial.
        c_miss: cost of a miss.
        c_fa: cost of a false alarm.

    Returns:
        The cost, in the shape of the rates: 0 without errors, 1 for the better of those two.

    Raises:
        UserError: a prior or a cost is out of range.

    References:
        NIST Speaker Recognition Evaluation plans, 1998 onwards.

    >>> normalised_dcf([0.0, 1.0, 0.1], [1.0, 0.0, 0.1], p_target=0.5).tolist()  # accept all, reject all, in between
    [1.0, 1.0, 0.2]
    """
    if not 0 < p_target < 1 or c_miss <= 0 or c_fa <= 0:
        raise UserError(
            f"p_target (={p_target}) must lie between 0 and 1, c_miss (={c_miss}) and c_fa (={c_fa}) above 0"
        )
    miss, fa = c_miss * p_target, c_fa * (1 - p_target)
    return (miss * np.asarray(p_miss) + fa * np.asarray(p_fa)) / min(miss, fa)


def min_dcf(
    scores: ArrayLike, labels: ArrayLike, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> float:
    """Normalised detection cost at the best threshold, between 0 and 1.

    Args and errors as `eer` and `normalised_dcf`.

    >>> min_dcf([0.1, 0.6, 0.4, 0.9], [0, 0, 1, 1], p_target=0.5)
    0.5
    """
    _, p_miss, p_fa = operating_points(scores, labels)
    return float(normalised_dcf(p_miss, p_fa, p_target, c_miss, c_fa).min())


def act_dcf(
    llrs: ArrayLike, labels: ArrayLike, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> float:
    """Normalised detection cost at the Bayes threshold, for calibrated scores. It can exceed 1.

    Args:
        llrs: natural-log likelihood ratios `[trials]`; infinite values are allowed.
        labels: `[trials]`, true for target trials.
        p_target: prior probability of a target trial.
        c_miss: cost of a miss.
        c_fa: cost of a false alarm.

    >>> act_dcf([-3.0, -2.0, 1.0, -1.0], [0, 0, 1, 1], p_target=0.5)  # one of two targets is below 0
    0.5
    """
    llrs, labels = check_trials(llrs, labels, finite=False)
    accepted = llrs >= bayes_threshold(p_target, c_miss, c_fa)
    return float(normalised_dcf(np.mean(~accepted[labels]), np.mean(accepted[~labels]), p_target, c_miss, c_fa))


def bayes_threshold(p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0) -> float:
    """The natural-log likelihood ratio at which accepting and rejecting cost the same; above it, accepting costs less.

    >>> bayes_threshold(p_target=0.5)
    0.0
    """
    return float(np.log(c_fa * (1 - p_target)) - np.log(c_miss * p_target))


def det_curve(scores: ArrayLike, labels: ArrayLike, max_points: int = 1000) -> tuple[Array, Array, Array]:
    """Operating points for drawing a DET curve, thinned where the eye cannot tell (see `thin`).

    Args:
        scores: `[trials]`.
        labels: `[trials]`, true for target trials.
        max_points: about how many points to keep.

    Returns:
        `p_fa, p_miss, thresholds`, each `[points]`, in ascending order of thresholds.

    References:
        Martin et al., "The DET curve in assessment of detection task performance", Eurospeech 1997.

    >>> p_fa, p_miss, thresholds = det_curve([0.2, 0.5, 0.8], [0, 1, 1])
    >>> p_fa.tolist(), p_miss.tolist()
    ([1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 1.0])
    """
    thresholds, p_miss, p_fa = operating_points(scores, labels)
    keep = thin(p_miss, p_fa, max_points)
    return p_fa[keep], p_miss[keep], thresholds[keep]


def thin(p_miss: Array, p_fa: Array, max_points: int) -> Array:
    """Chooses points evenly spaced along a DET curve, on the normal-deviate axes that it is drawn on.

    Args:
        p_miss: `[points]`, ascending from 0 to 1.
        p_fa: `[points]`, descending from 1 to 0.
        max_points: about how many points to keep; a curve of no more is kept whole.

    Returns:
        Indices of the points to keep, ascending; the first and the last are among them.

    >>> thin(np.linspace(0, 1, 5), np.linspace(1, 0, 5), max_points=10).tolist()
    [0, 1, 2, 3, 4]
    """
    if len(p_miss) <= max_points:
        return np.arange(len(p_miss))
    # A rate of 0 or 1 lies at infinity: stop half a step of the rate short of it.
    sides = [np.clip(p, step / 2, 1 - step / 2) for p in (p_miss, p_fa) for step in [_smallest_step(p)]]
    # Length along the curve, as the sum of both axes' moves; then one point for each cell of equal length.
    length = np.concatenate([[0], np.cumsum(np.sum(np.abs(np.diff(ndtri(sides), axis=1)), axis=0))])
    cell = np.floor(length / length[-1] * (max_points - 2))
    return np.flatnonzero(np.concatenate([[True], cell[1:] != cell[:-1]]) | (np.arange(len(cell)) == len(cell) - 1))


def _smallest_step(p: Array) -> float:
    steps = np.abs(np.diff(p))
    return float(steps[steps > 0].min())
