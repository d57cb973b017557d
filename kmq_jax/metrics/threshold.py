"""Which threshold keeps a wanted false-accept rate, and how uncertain that is where the speakers are few.

Bootstrap percentiles are far too narrow here: a few speakers show no errors at most thresholds, and draws of them show
none either. So draws of speakers (`metrics.bootstrap`) only tell how much a rate varies, and thereby how many
independent trials it is worth. The interval is Clopper and Pearson's for so many trials, with Student's factor for the
speakers (Korn and Graubard). A pair of speakers counts as one such trial at most, however many recordings it has: that
makes intervals too wide rather than too narrow. `tests/metrics/test_threshold.py` simulates how often they hold the
truth.

References:
    Korn and Graubard, "Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data", 1998. Woodruff, "Confidence intervals for medians and other position measures", 1952. Hanley and
    Lippman-Hand, "If nothing goes wrong, is everything all right?", 1983 (the rule of three).
"""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.core.errors import UserError
from kmq_jax.metrics.bootstrap import draw_speakers
from kmq_jax.metrics.detection import Array, check_trials, number_speakers
from kmq_jax.metrics.operating import OperatingPoint, threshold_at

_RULE_OF_THREE = 3.0  # over the number of trials: what a rate may be, at 95 %, where no trial errs
_HALF = 4  # times as many speakers halve an interval that shrinks as 1 / sqrt(speakers)


@dataclasses.dataclass(frozen=True)
class Rate:
    """An error rate and its uncertainty.

    Attributes:
        value: a fraction.
        low: lower end of its 95 % interval.
        high: upper end.
        trials: how many it was counted on.
        units: how many independent trials would tell as much: at most the pairs of speakers, or the speakers.
    """

    value: float
    low: float
    high: float
    trials: int
    units: float


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A threshold for a wanted false-accept rate.

    Attributes:
        value: accept when `score >= value`.
        low: lower end of its 95 % interval. At its ends, the false-accept rate seen is an end of that rate's interval.
        high: upper end; None where the speakers are too few to give one.
        wanted: the false-accept rate asked for, a fraction.
        false_accept: of trials between two speakers; `units` are pairs of speakers.
        false_reject: of trials within one speaker; `units` are speakers.
        speakers: how many there are.
        pairs: pairs of speakers that were compared.
    """

    value: float
    low: float
    high: float | None
    wanted: float
    false_accept: Rate
    false_reject: Rate
    speakers: int
    pairs: int

    @property
    def smallest(self) -> float:
        """The smallest false-accept rate that so many pairs of speakers can tell from zero."""
        return 1 / self.false_accept.units

    @property
    def rule_of_three(self) -> float:
        """The upper 95 % limit of the false-accept rate, had no pair of speakers been confused."""
        return min(1.0, _RULE_OF_THREE / self.false_accept.units)

    @property
    def speakers_needed(self) -> int:
        """An estimate of how many speakers it takes to tell the wanted rate from zero."""
        wanted = self.pairs / self.false_accept.units / self.wanted  # how many pairs like these
        # Solved for n: n (n - 1) / 2 pairs of n speakers. Rounding must not add a speaker.
        return math.ceil((1 + math.sqrt(1 + 8 * wanted)) / 2 - 1e-9)

    @property
    def speakers_to_halve(self) -> int:
        """An estimate of how many more speakers would halve the intervals."""
        return (_HALF - 1) * self.speakers


def choose_threshold(
    scores: ArrayLike,
    labels: ArrayLike,
    enrol_speaker: ArrayLike,
    test_speaker: ArrayLike,
    false_accept: float = 0.01,
    replicates: int = 1000,
    seed: int = 0,
) -> Threshold:
    """Finds the lowest threshold that keeps a wanted false-accept rate, its error rates, and their intervals.

    Args:
        scores: `[trials]`, finite, of any scale; higher is more alike.
        labels: `[trials]`, true where both sides are of one speaker.
        enrol_speaker: `[trials]`, a nonnegative integer for the speaker of each enrolment.
        test_speaker: `[trials]`, the same for the test recording.
        false_accept: the wanted rate, a fraction.
        replicates: draws of speakers.
        seed: of the draws.

    Raises:
        UserError: a class of trials is missing, labels contradict the speakers, the rate lies outside (0, 1), or no
            score that occurs keeps it.

    >>> scores, enrol, test = [0.9, 0.8, 0.7, 0.1, 0.2, 0.3], [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]
    >>> found = choose_threshold(scores, np.equal(enrol, test), enrol, test)
    >>> found.value, found.false_accept.value, found.false_reject.value
    (0.7, 0.0, 0.0)
    >>> found.pairs, found.false_accept.high > 0.7, found.high  # three speakers tell next to nothing
    (3, True, None)
    """
    if not 0 < false_accept < 1:
        raise UserError(f"`false_accept` (={false_accept:g}) must lie between 0 and 1")
    scores, labels = check_trials(scores, labels)
    enrol, test, speakers = number_speakers(enrol_speaker, test_speaker, len(scores))
    if (labels != (enrol == test)).any():
        raise UserError("labels must be true where both sides are of one speaker, and only there")
    value = threshold_at(scores, labels, OperatingPoint("far", false_accept))
    draws = draw_speakers(speakers, replicates, seed)
    # One number for a pair of speakers, whichever of them enrols.
    pair = np.minimum(enrol, test) * speakers + np.maximum(enrol, test)
    accepts, rejects = (
        _rate((scores >= value) != labels, labels == side, pair, draws.astype(np.float64)) for side in (False, True)
    )
    low, high = _thresholds_between(scores, labels, value, accepts)
    pairs = len(np.unique(pair[~labels]))
    return Threshold(value, low, high, false_accept, accepts, rejects, speakers, pairs)


def _rate(wrong: Array, used: Array, pair: Array, draws: Array) -> Rate:
    """The share of wrong trials among those used, with the interval of `clopper_pearson`.

    Args:
        wrong: `[trials]` bool.
        used: `[trials]` bool; all of two speakers, or all of one.
        pair: `[trials]`, the two speakers of each: `lower * speakers + higher`.
        draws: `[replicates, speakers]`, multiplicities.
    """
    speakers = draws.shape[1]
    groups, place = np.unique(pair[used], return_inverse=True)
    one, two = groups // speakers, groups % speakers
    errors, sizes = np.bincount(place, wrong[used]), np.bincount(place)
    # A speaker drawn twice is compared with another twice as often; with itself, within each copy (metrics.bootstrap).
    drawn = [_drawn(draws, one, two, values) for values in (errors, sizes)]
    usable = drawn[1] > 0
    varies = float(np.var(drawn[0][usable] / drawn[1][usable])) if usable.any() else 0.0
    value = float(errors.sum() / sizes.sum())
    spread = value * (1 - value)
    # Of n independent trials a rate p varies by p (1 - p) / n: solved for n. Without errors nothing varies.
    units = min(float(len(groups)), spread / varies) if spread and varies else float(len(groups))
    low, high = clopper_pearson(value, max(units, 1.0), len(np.union1d(one, two)))
    return Rate(value, low, high, int(sizes.sum()), max(units, 1.0))


def _drawn(draws: Array, one: Array, two: Array, values: Array) -> Array:
    """Sums values `[groups]` of pairs of speakers in every draw, `[replicates]`."""
    if (one == two).all():
        return draws[:, one] @ values
    # The sum over pairs of draws[one] * value * draws[two], as a product of matrices.
    table = np.zeros((draws.shape[1],) * 2)
    table[one, two] = values
    found: Array = ((draws @ table) * draws).sum(axis=1)
    return found


def clopper_pearson(rate: float, units: float, speakers: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Clopper-Pearson interval of a rate counted on so many independent trials, wider where the speakers are few.

    Args:
        rate: the share that was seen.
        units: independent trials; need not be whole.
        speakers: how many there are; `units` itself was estimated from them.
        confidence: how often the interval should hold the truth.

    Returns:
        `(low, high)`, fractions.

    >>> [round(end, 4) for end in clopper_pearson(0.1, 10, speakers=10**9)]  # one of ten: the textbook's
    [0.0025, 0.445]
    """
    from scipy import stats  # slow to import, and needed here alone

    tail = (1 - confidence) / 2
    # The normal quantile over Student's: below one where the degrees of freedom are few.
    factor = (stats.norm.ppf(tail) / stats.t.ppf(tail, max(speakers - 1, 1))) ** 2
    size = max(units * factor, 1.0)
    hits = rate * size
    low = float(stats.beta.ppf(tail, hits, size - hits + 1)) if hits > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, size - hits)) if hits < size else 1.0
    return low, high


def _thresholds_between(scores: Array, labels: Array, value: float, accepts: Rate) -> tuple[float, float | None]:
    """The thresholds at which the false-accept rate is the upper and the lower end of its interval (Woodruff)."""
    most = 1 - 1 / accepts.trials  # all accepted is no threshold
    low = threshold_at(scores, labels, OperatingPoint("far", min(accepts.high, most))) if most else value
    # Where the lower end allows not one false accept, the threshold could lie anywhere above.
    if accepts.low * accepts.trials < 1:
        return min(low, value), None
    try:
        return min(low, value), max(value, threshold_at(scores, labels, OperatingPoint("far", accepts.low)))
    except UserError:
        return min(low, value), None
