"""Bounds the harmful flips that a cascade makes on new speakers, from calibration trials that share speakers.

A trial is lost where stopping early makes a harmful flip: the reference decides right, and the level at which the trial
stopped, which is not the last, decides wrong. The risk is the mean loss on a new list, made like the calibration list
from new speakers. `walk` finds the cheapest gates whose risk is bounded. The end of this file says why two of the three
bounds hold; the third, `survey`, is approximate.

References:
    Angelopoulos et al., "Learn then test", 2021; "Conformal risk control", 2022. Bates et al., "Distribution-free,
    risk-controlling prediction sets", 2021. Laufer-Goldshtein et al., "Efficiently controlling multiple risks with
    Pareto testing", 2022. Korn and Graubard, "Confidence intervals for proportions with small expected number of
    positive counts estimated from survey data", 1998. Hoeffding, "Probability inequalities for sums of bounded random
    variables", 1963.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from kmq_jax.cascade.options import BOUNDS
from kmq_jax.core.errors import UserError
from kmq_jax.metrics.detection import Array, number_speakers


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which speakers the trials of a list compare. Speakers are numbered from 0.

    Attributes:
        speakers: how many there are.
        trials: how many there are.
        one: `[pairs]`, the lower speaker of each pair that has trials.
        two: `[pairs]`, the higher one. If all trials are targets, each speaker is paired with itself.
        pair: `[trials]`, the pair of each nontarget trial, or -1.
        target: `[trials]`, the speaker of each target trial, or -1.
        share: the share of target trials, p in the formula of the risk.
        units: how many independent terms the mean over pairs is worth.
        degree: the largest share of the pairs that one speaker belongs to.
    """

    speakers: int
    trials: int
    one: Array
    two: Array
    pair: Array
    target: Array
    share: float
    units: int
    degree: float

    def losses(self, lost: ArrayLike) -> Array:
        """The loss of each pair `[pairs]`, from 0 to 1, from the losses of trials `[trials]`: h at the file's end."""
        values = np.asarray(lost, np.float64)
        own = _means(self.target, values, self.speakers)
        # Without nontarget trials a pair is one speaker with itself.
        between = 0.0 if self.share == 1 else _means(self.pair, values, len(self.one))
        return self.share * (own[self.one] + own[self.two]) / 2 + (1 - self.share) * between


def _means(group: Array, values: Array, size: int) -> Array:
    """The mean of the values of each group `[size]`, 0 for an empty one; group -1 is left out."""
    used = group >= 0
    sums = np.bincount(group[used], values[used], size)
    return sums / np.maximum(np.bincount(group[used], minlength=size), 1)


def pair_up(enrol_speaker: ArrayLike, test_speaker: ArrayLike, labels: ArrayLike, share: float | None = None) -> Pairs:
    """Finds which pairs of speakers a trial list compares.

    Speakers without target trials are left out, unless the list has none at all.

    Args:
        enrol_speaker: `[trials]`, nonnegative integers.
        test_speaker: `[trials]`, nonnegative integers.
        labels: `[trials]` bool.
        share: of target trials in the whole list, where these trials are a part of it; their own where left out. A part
            that keeps the trials within a group of speakers has a larger share of target trials than the whole.

    Raises:
        UserError: the pairs are worth fewer than two independent terms, or a class that the whole list has is missing.

    >>> enrol, test = [0, 1, 2, 3, 0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 1, 2, 3, 2, 3, 3]  # four speakers, all with all
    >>> pairs = pair_up(enrol, test, np.equal(enrol, test))
    >>> pairs.speakers, len(pairs.one), pairs.units, pairs.degree
    (4, 6, 2, 0.5)
    """
    target = np.asarray(labels, bool)
    if not len(target):
        raise UserError("the risk rule has no trials within one of its two groups of speakers")
    enrol, test, speakers = number_speakers(enrol_speaker, test_speaker, len(target))
    if share is None:
        share = float(target.mean())
    elif (share > 0 and not target.any()) or (share < 1 and target.all()):
        raise UserError("the risk rule has no trials of one class within one of its two groups of speakers")
    has = np.bincount(enrol[target], minlength=speakers) > 0
    own = np.where(target, enrol, -1)
    if share == 1:
        one = two = np.flatnonzero(has)
        pair, units, degree = np.full(len(target), -1), len(one), 1 / len(one)
    else:
        # With target trials in the risk, both speakers of a pair must have some.
        counts = ~target & ((has[enrol] & has[test]) | (share == 0))
        # A pair's number, the same whichever side each speaker is on.
        code = np.minimum(enrol, test) * speakers + np.maximum(enrol, test)
        used, place = np.unique(code[counts], return_inverse=True)
        one, two = used // speakers, used % speakers
        pair = np.full(len(target), -1)
        pair[counts] = place
        degrees = np.bincount(np.concatenate([one, two]), minlength=speakers)
        most, vertices = int(np.max(degrees, initial=0)), int((degrees > 0).sum())
        # A complete graph splits into (nearly) perfect matchings; any other may need a colour more than its degree.
        complete = most == vertices - 1 and 2 * len(one) == vertices * most
        units = vertices // 2 if complete else len(one) // (most + 1)
        degree = most / max(len(one), 1)
    if units < 2:
        raise UserError(f"the risk rule has too few speakers: {speakers} in one of its two groups")
    return Pairs(speakers, len(target), one, two, pair, own, share, units, degree)


def hoeffding_bentkus(rate: float, units: int, delta: float) -> float:
    """Upper bound on the expectation of terms in [0, 1], by Hoeffding and Bentkus (Bates et al. 2021).

    Args:
        rate: the mean that was seen, a fraction.
        units: how many independent terms it is the mean of.
        delta: one minus the confidence.

    >>> round(hoeffding_bentkus(0.0, 100, 0.05), 4)
    0.0295
    """
    if rate >= 1:
        return 1.0

    # How far the chance of so low a rate lies above delta, in logarithms: the bound is the mean where it crosses zero.
    def excess(mean: float) -> float:
        r = min(rate, mean)
        divergence = (r * np.log(r / mean) if r > 0 else 0.0) + (1 - r) * np.log((1 - r) / (1 - mean))
        hoeffding = -units * divergence
        # 1 is the logarithm of Bentkus's factor e. The 1e-9 keeps `ceil` from adding one where the product is whole.
        bentkus = 1 + stats.binom.logcdf(np.ceil(units * rate - 1e-9), units, mean)
        return float(min(hoeffding, bentkus) - np.log(delta))

    # The bound is above the rate. The ends stay off 0 and 1, where the logarithms are not finite.
    low, high = max(rate, 1e-12), 1 - 1e-12
    if excess(high) > 0:
        return 1.0
    return float(optimize.brentq(excess, low, high, xtol=1e-10))


def conformal(rate: float, degree: float) -> float:
    """Bound on the *expected* risk of the gates that are chosen by this bound. It has no confidence level.

    The expectation is over calibration sets and a new pair of speakers (conformal risk control, for pairs).

    Args:
        rate: the mean loss of calibration pairs.
        degree: see `Pairs`.

    >>> round(conformal(0.01, 0.02), 4)
    0.0481
    """
    # Add two new speakers to the calibration speakers. The pairs with a new one are at most `2 * degree` times as many
    # as the old pairs, and each may lose 1.
    return (rate + 2 * degree) / (1 + 2 * degree)


def speakers_needed(alpha: float, delta: float) -> dict[str, int]:
    """How many certifying speakers each proven bound needs for `alpha` if all are compared with all, without a flip.

    Args:
        alpha: the risk that is allowed.
        delta: one minus the confidence; the conformal bound has none.

    >>> speakers_needed(0.005, 0.05)
    {'hoeffding-bentkus': 1196, 'conformal': 796}
    """
    # At a risk of alpha, u independent pairs show no loss with chance (1 - alpha)^u. A complete list of n speakers is
    # worth n / 2 such pairs.
    pairs = int(np.ceil(np.log(delta) / np.log1p(-alpha) - 1e-9))
    # `conformal` with rate 0 and a degree of 2 / n.
    return {"hoeffding-bentkus": 2 * pairs, "conformal": int(np.ceil(4 * (1 - alpha) / alpha - 1e-9))}


def survey(losses: Array, worst: Array, pairs: Pairs, delta: float) -> float:
    """Approximate upper bound on the risk, by Korn and Graubard: the bound of Clopper and Pearson for fewer trials.

    The number of trials is divided by the design effect: how much more the mean varies over speakers (by the jackknife)
    than it would over independent trials. A few flips do not show this effect, so it is at least that of `worst`.

    The bound assumes that speakers unlike any seen are rare. It fails more often than `delta` says where a few speakers
    in a hundred make most of the flips, or where speakers differ with heavy tails. The other two bounds do not assume
    this, and are wider.

    Args:
        losses: `[pairs]`.
        worst: `[pairs]`, losses of gates that flip much.
        pairs: the design.
        delta: one minus the confidence.
    """
    speakers = int((np.bincount(np.concatenate([pairs.one, pairs.two])) > 0).sum())
    rate, effect = float(losses.mean()), 1.0
    for values in (losses, worst):
        p = float(values.mean())
        if 0 < p < 1:
            effect = max(
                effect, _jackknife_variance(values, pairs.one, pairs.two, pairs.speakers) * pairs.trials / (p * (1 - p))
            )
    # Korn and Graubard's correction for few speakers: Student's quantile in place of the normal one.
    ratio = stats.norm.ppf(1 - delta) / stats.t.ppf(1 - delta, speakers - 1)
    size = max(pairs.trials / effect * ratio**2, 1.0)
    hits = rate * size  # not whole: Clopper and Pearson's bound as a quantile of the beta distribution takes it
    return 1.0 if hits >= size else float(stats.beta.ppf(1 - delta, hits + 1, size - hits))


def speaker_error(values: ArrayLike, enrol_speaker: ArrayLike, test_speaker: ArrayLike) -> float:
    """Standard error of the mean of trial values `[trials]`, by the jackknife that leaves out one speaker at a time.

    Args:
        values: `[trials]`.
        enrol_speaker: `[trials]`, nonnegative integers.
        test_speaker: `[trials]`, nonnegative integers.

    >>> round(speaker_error([0.0, 0.0, 1.0], [0, 0, 1], [1, 2, 2]), 3), speaker_error([1.0, 1.0], [0, 1], [1, 2])
    (0.667, 0.0)
    """
    value = np.asarray(values, np.float64)
    one, two, speakers = number_speakers(enrol_speaker, test_speaker, len(value))
    return float(np.sqrt(_jackknife_variance(value, one, two, speakers)))


def _jackknife_variance(values: Array, one: Array, two: Array, speakers: int) -> float:
    """Variance of the mean of values `[items]`, each of one speaker or of a pair; 1 where it cannot be told."""
    # A value counts for both speakers of a pair, and once where they are the same.
    pair = one != two
    ends, both = np.concatenate([one, two[pair]]), np.concatenate([values, values[pair]])
    size = np.bincount(ends, minlength=speakers)
    # Without a speaker who is in every value, there would be nothing left to take the mean of.
    used = (size > 0) & (size < len(values))
    left = (values.sum() - np.bincount(ends, both, speakers)[used]) / (len(values) - size[used])
    n = len(left)
    return float((n - 1) / n * np.sum((left - left.mean()) ** 2)) if n > 1 else 1.0


def bounds(losses: Array, worst: Array, pairs: Pairs, delta: float) -> dict[str, float]:
    """Every bound on the risk, by name.

    Args:
        losses: `[pairs]`, of the gates in question (`Pairs.losses`).
        worst: `[pairs]`, of gates that flip much; `survey` alone looks at them.
        pairs: the design.
        delta: one minus the confidence.
    """
    rate = float(losses.mean())
    return {
        "survey": survey(losses, worst, pairs, delta),
        "hoeffding-bentkus": hoeffding_bentkus(rate, pairs.units, delta),
        "conformal": conformal(rate, pairs.degree),
    }


def walk(path: Iterable[Array], worst: Array, pairs: Pairs, alpha: float, delta: float, bound: str) -> int:
    """How many steps of a path of gates keep their risk at `alpha` or below.

    Args:
        path: for each step the losses of trials `[trials]` bool, from the safest gates to the cheapest.
        worst: `[trials]` bool, losses of gates that flip much.
        pairs: the design of these trials.
        alpha: the risk that is allowed.
        delta: one minus the confidence.
        bound: one of `BOUNDS`.

    Returns:
        The number of steps before the first whose bound exceeds alpha.

    Raises:
        UserError: the bound is unknown.
    """
    if bound not in BOUNDS:
        raise UserError(f"bound {bound!r} must be one of {', '.join(BOUNDS)}")
    steps, ever, much = 0, np.zeros(pairs.trials, bool), pairs.losses(worst)
    for lost in path:
        if bound == "conformal":  # its proof needs losses that never fall along the path
            ever |= lost
            lost = ever
        if bounds(pairs.losses(lost), much, pairs, delta)[bound] > alpha:
            break
        steps += 1
    return steps


# Why the bounds hold: that of Hoeffding and Bentkus, and the conformal one. There is no proof of the survey bound.
#
# The risk. With the share p of target trials in the calibration list (the whole list, before speakers are dealt),
#
#     R = p E[l_i] + (1 - p) E[m_ij],
#
# where l_i is the mean loss of speaker i's target trials, and m_ij that of the trials between speakers i and j. All
# speakers count alike, and so do all pairs, however many trials they have.
#
# Why pairs. Trials are not independent. Neither are the losses of speakers, since a nontarget trial belongs to two.
# Draw speakers independently. Then h(i, j) = p (l_i + l_j) / 2 + (1 - p) m_ij lies between 0 and 1, has mean R for
# every pair, and is independent over pairs that share no speaker. Its mean over all pairs is a U-statistic: the mean,
# over all ways of matching speakers off, of means of n/2 independent terms. Any bound that rests on the mean of a
# convex function, as the bounds of Hoeffding and Bentkus do, holds for it with n/2 terms (Hoeffding 1963, section 5).
#
# How many independent terms. Where only some pairs have trials, these are the edges of a graph. By Vizing's theorem and
# de Werra's equitable colourings they split into matchings of at least edges / (largest degree + 1) pairs. That number
# takes the place of n/2 (`Pairs.units`).
#
# Why there is no correction for many tests. Speakers are dealt into two groups. Maps, threshold and a path of gates,
# from the safest to the cheapest, come from trials within the first group. On trials within the second, the path is
# walked from its safe end for as long as the upper bound on R is at most alpha. Each step is a test at level delta, and
# the walk stops at the first that fails: "learn then test" with a fixed sequence.
