"""Operating points: the threshold for a wanted error rate or cost, and its uncertainty."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.core.errors import UserError
from kmq_jax.metrics.bootstrap import draw_speakers, enough, percentile_interval
from kmq_jax.metrics.detection import Array, as_trials, check_trials, eer, number_speakers, operating_points

FORMS = "eer, far=RATE, frr=RATE or dcf=P_TARGET"


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold is wanted for.

    Attributes:
        kind: "eer", "far" (false-accept rate at most `value`), "frr" (false-reject rate at most `value`) or "dcf"
            (least detection cost at the target prior `value`, both costs 1).
        value: a fraction below 1; unused by "eer".
    """

    kind: str
    value: float = 0.0

    def __post_init__(self) -> None:
        """Checks both.

        Raises:
            UserError: the kind is unknown, or the value out of range.
        """
        if self.kind != "eer" and not (self.kind in ("far", "frr", "dcf") and 0 <= self.value < 1):
            raise UserError(f"operating point {str(self)!r} must be {FORMS}, with a number between 0 and 1")

    def __str__(self) -> str:
        return self.kind if self.kind == "eer" else f"{self.kind}={self.value:g}"


def parse_point(text: str) -> OperatingPoint:
    """Reads `eer`, `far=0.01`, `frr=0.01` or `dcf=0.01`.

    Raises:
        UserError: it is none of them, or the number does not lie between 0 and 1.

    >>> parse_point("far=0.01")
    OperatingPoint(kind='far', value=0.01)
    """
    kind, _, number = text.partition("=")
    if text == "eer":
        return OperatingPoint("eer")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if kind not in ("far", "frr", "dcf") or not 0 < value < 1:
        raise UserError(f"operating point {text!r} must be {FORMS}, with a number between 0 and 1")
    return OperatingPoint(kind, value)


def threshold_at(scores: ArrayLike, labels: ArrayLike, point: OperatingPoint) -> float:
    """The threshold of an operating point: accept when `score >= threshold`.

    For "far" it is the lowest score that occurs whose false-accept rate is at most the wanted one, for "frr" the
    highest whose false-reject rate is. "far" needs nontarget trials only, "frr" target trials only.

    Args:
        scores: `[trials]`, finite.
        labels: `[trials]`, true for target trials.
        point: what is wanted.

    Raises:
        UserError: the trials it needs are missing, or no threshold short of rejecting everything gets there.

    >>> scores, labels = [0.1, 0.3, 0.5, 0.4, 0.8], [0, 0, 0, 1, 1]
    >>> [threshold_at(scores, labels, parse_point(text)) for text in ("eer", "far=0.2", "frr=0.2")]
    [0.5, 0.8, 0.4]
    """
    if point.kind == "eer":
        return eer(scores, labels)[1]
    if point.kind == "dcf":
        thresholds, p_miss, p_fa = operating_points(scores, labels)
        # Without the last point: no score that occurs rejects all.
        best = int(np.argmin(point.value * p_miss[:-1] + (1 - point.value) * p_fa[:-1]))
        return float(thresholds[best])
    values, target = as_trials(scores, labels)
    if not np.isfinite(values).all():
        raise UserError(f"score {int(np.argmin(np.isfinite(values)))} is not finite")
    own = np.sort(values[target == (point.kind == "frr")])
    if not len(own):
        raise UserError(f"no {'target' if point.kind == 'frr' else 'nontarget'} trials to find {point} by")
    # Rounding must not lose a trial: 0.29 * 100 is 28.999999999999996.
    allowed = min(int(np.floor(point.value * len(own) * (1 + 1e-12))), len(own) - 1)
    if point.kind == "frr":
        return float(own[allowed])  # at most `allowed` targets lie below it; those tied with it are accepted
    # At most `allowed` nontargets may be accepted: the threshold is the lowest score above all other nontargets.
    limit = own[len(own) - allowed - 1]
    above = values[values > limit]
    if not len(above):
        raise UserError(f"no score that occurs has a false-accept rate of at most {point.value:g}")
    return float(above.min())


def error_rates(scores: ArrayLike, labels: ArrayLike, threshold: float) -> tuple[float | None, float | None]:
    """False-accept and false-reject rates at a threshold, as fractions; None for a class without trials.

    >>> error_rates([0.1, 0.6, 0.4, 0.9], [0, 0, 1, 1], threshold=0.5)
    (0.5, 0.5)
    """
    accept, target = np.asarray(scores) >= threshold, np.asarray(labels, bool)
    far = float(accept[~target].mean()) if (~target).any() else None
    return far, float(1 - accept[target].mean()) if target.any() else None


def threshold_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    enrol_speaker: ArrayLike,
    test_speaker: ArrayLike,
    point: OperatingPoint,
    replicates: int = 200,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The central 95 % of the threshold over draws of speakers (trials weighted as in `metrics.bootstrap`).

    Args:
        scores: `[trials]`.
        labels: `[trials]`.
        enrol_speaker: `[trials]`, nonnegative integers.
        test_speaker: `[trials]`, nonnegative integers.
        point: what is wanted.
        replicates: number of draws.
        seed: of the draws.

    Returns:
        `(low, high)`, or None where too few draws have both classes of trials.

    >>> scores = [0.9, 0.8, 0.7, 0.1, 0.2, 0.3]
    >>> enrol, test = [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]
    >>> low, high = threshold_interval(scores, np.equal(enrol, test), enrol, test, OperatingPoint("eer")) or (0, 0)
    >>> low <= high
    True
    """
    scores, labels = check_trials(scores, labels)
    enrol, test, speakers = number_speakers(enrol_speaker, test_speaker, len(scores))
    order = np.argsort(scores)
    scores, labels, enrol, test = scores[order], labels[order], enrol[order], test[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # the last trial of each score
    found = []
    for draw in draw_speakers(speakers, replicates, seed):
        weight = np.where(enrol == test, draw[enrol], draw[enrol] * draw[test])
        miss, fa = np.cumsum(weight * labels)[ends], np.cumsum(weight * ~labels)[ends]
        if miss[-1] and fa[-1]:
            # At the score of an end: what lies below it is rejected.
            p_miss, p_fa = (np.append(0, side[:-1]) / side[-1] for side in (miss, fa))
            found.append(scores[ends[_pick(p_miss, 1 - p_fa, point)]])
    return percentile_interval(found) if enough(len(found), replicates) else None


def _pick(p_miss: Array, p_fa: Array, point: OperatingPoint) -> int:
    """The index of the operating point on a curve `[thresholds]`; thresholds ascend."""
    if point.kind == "eer":
        return int(np.argmin(np.abs(p_miss - p_fa)))
    if point.kind == "dcf":
        return int(np.argmin(point.value * p_miss + (1 - point.value) * p_fa))
    if point.kind == "frr":
        # The last one whose miss rate is low enough: the first rejects nobody, so there is one.
        return int(np.searchsorted(p_miss, point.value * (1 + 1e-12), side="right")) - 1
    within = p_fa <= point.value * (1 + 1e-12)
    # In some draws no threshold is strict enough: then the strictest counts.
    return int(np.argmax(within)) if within.any() else len(p_fa) - 1
