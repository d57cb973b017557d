"""Confidence intervals of EER and minDCF by resampling speakers.

Trials share utterances and speakers, so they are far from independent, and an interval that resamples trials is much
too narrow. The unit drawn with replacement here is the speaker. A speaker drawn m times stands for m speakers who
happen to be alike:

- A trial between two speakers occurs once for every pair of their copies: its weight is the product of the two
  multiplicities.
- A trial between two utterances of one speaker occurs once within each copy: its weight is the multiplicity, not its
  square. (An utterance of one copy against an utterance of another copy would be a nontarget trial between alike
  speakers that nobody recorded; it is left out.)

References:
    Poh and Bengio, "Performance generalization in biometric authentication using joint user-specific and sample
    bootstraps", IEEE PAMI 2007. Snijders and Borgatti, "Non-parametric standard errors and tests for network
    statistics", Connections 1999 (the bootstrap of vertices, for data on pairs). Owen, "The pigeonhole bootstrap",
    Annals of Applied Statistics 2007 (the product of multiplicities, and that it errs on the wide side).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from kmq_jax.core.errors import UserError
from kmq_jax.metrics.detection import Array, check_trials, equal_error_point, normalised_dcf, number_speakers, thin

_MAX_SEGMENTS = 4096  # thresholds tried at most: bounds the sums of weights `[2 * segments, replicates]`
_BLOCK = 128  # trials weighted at a time: their rows stay in the cache, and 128 weights of a byte add up within 16 bits


@dataclass(frozen=True)
class Bootstrap:
    """The metrics of every usable replicate: one that drew no target trial, or no nontarget trial, is left out.

    Attributes:
        eer: `[replicates]`, fractions.
        min_dcf: `[replicates]`.
    """

    eer: Array
    min_dcf: Array


def speaker_bootstrap(
    scores: ArrayLike,
    labels: ArrayLike,
    enrol_speaker: ArrayLike,
    test_speaker: ArrayLike,
    replicates: int = 1000,
    seed: int = 0,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
) -> Bootstrap:
    """EER and minDCF of `replicates` draws of speakers with replacement.

    The draws depend on `seed` and the number of speakers only, so two systems scored on one trial list get the same
    ones, and the difference of their replicates is a paired bootstrap.

    Args:
        scores: `[trials]`.
        labels: `[trials]`, true for target trials.
        enrol_speaker: `[trials]`, a nonnegative integer for the speaker of each enrolment.
        test_speaker: `[trials]`, the same for the test utterance.
        replicates: number of draws, at least one.
        seed: of the random draws.
        p_target: prior probability of a target trial, for minDCF.
        c_miss: cost of a miss.
        c_fa: cost of a false alarm.

    Raises:
        UserError: as `eer`, the speakers do not fit the trials, or there are no draws.

    >>> scores = [0.9, 0.8, 0.7, 0.1, 0.2, 0.3]
    >>> enrol, test = [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]
    >>> draws = speaker_bootstrap(scores, [1, 1, 1, 0, 0, 0], enrol, test, replicates=50)
    >>> float(draws.eer.max())  # separable whoever is drawn
    0.0
    """
    if replicates < 1:
        raise UserError(f"`replicates` (={replicates}) must be at least 1")
    scores, labels = check_trials(scores, labels)
    enrol, test, speakers = number_speakers(enrol_speaker, test_speaker, len(scores))
    order = np.argsort(scores)
    labels, enrol, test = labels[order], enrol[order], test[order]
    segment = _segments(scores[order], labels)
    draws = draw_speakers(speakers, replicates, seed)

    # Of each segment an even row for nontargets and an odd one for targets.
    sums = _weight_sums(2 * segment + labels, enrol, test, draws)
    fa, miss = (np.cumsum(sums[side::2], axis=0, dtype=np.float64) for side in (0, 1))
    # Cumulated over ascending scores: what lies below a threshold is missed (targets) or rightly rejected.
    usable = (fa[-1] > 0) & (miss[-1] > 0)
    # The padding is the point that accepts all.
    p_miss, p_rejected = (np.pad(x[:, usable] / x[-1, usable], ((1, 0), (0, 0))).T for x in (miss, fa))
    p_fa = 1 - p_rejected
    costs = normalised_dcf(p_miss, p_fa, p_target, c_miss, c_fa).min(axis=-1)
    return Bootstrap(equal_error_point(p_miss, p_fa)[0], costs)


def draw_speakers(speakers: int, replicates: int, seed: int) -> Array:
    """How often each speaker is drawn, `[replicates, speakers]`: each time as many as there are, with replacement.

    >>> draw_speakers(3, replicates=2, seed=0).sum(axis=1).tolist()
    [3, 3]
    """
    return np.random.default_rng(seed).multinomial(speakers, np.full(speakers, 1 / speakers), replicates)


def enough(usable: int, replicates: int) -> bool:
    """Whether an interval can be given: at most one draw in ten lacks a class of trials. The rest stand for all then.

    >>> enough(90, replicates=100), enough(89, replicates=100), enough(0, replicates=0)
    (True, False, False)
    """
    return usable >= max(1, 0.9 * replicates)


def percentile_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """The central interval that holds the share `confidence` of bootstrap replicates `[replicates]`.

    >>> percentile_interval(range(101), confidence=0.5)
    (25.0, 75.0)
    """
    low, high = np.quantile(np.asarray(values), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def speakers_from_targets(enrol: ArrayLike, test: ArrayLike, labels: ArrayLike, utterances: int) -> Array:
    """Finds the speaker of each utterance from a trial list alone: target trials join utterances of one speaker.

    A speaker whose utterances are not all joined by chains of target trials counts as several, which narrows the
    intervals.

    Args:
        enrol: `[trials]`, utterance indices.
        test: `[trials]`, utterance indices.
        labels: `[trials]`, true for target trials.
        utterances: number of utterances.

    Returns:
        A speaker number for each utterance `[utterances]`.

    >>> speakers_from_targets([0, 1, 2], [1, 2, 3], [1, 0, 1], utterances=4).tolist()
    [0, 0, 1, 1]
    """
    labels = np.asarray(labels, bool)
    pairs = np.asarray(enrol)[labels], np.asarray(test)[labels]
    joined = sparse.coo_array((np.ones(len(pairs[0]), np.int8), pairs), shape=(utterances, utterances))
    return connected_components(joined, directed=False)[1]


def _segments(scores: Array, labels: Array) -> Array:
    """Numbers the segments of sorted trials `[trials]`: the stretches between the thresholds that are tried.

    Where only trials of one class lie between two thresholds, the curve is a straight line there, and both metrics lie
    at its ends or on it, whatever the weights. So neighbours of one class share a segment, and nothing is lost. Tied
    trials always share one. If there are more than `_MAX_SEGMENTS` such thresholds, about that many are tried, evenly
    spaced along the curve.
    """
    # Tied trials are one group; its kind is 0 for nontargets only, 1 for targets only, 2 for both.
    group = np.concatenate([[0], np.cumsum(scores[1:] != scores[:-1])])
    size, targets = np.bincount(group), np.bincount(group, labels)
    kind = np.where(targets == 0, 0, np.where(targets == size, 1, 2))
    # A tie of both classes is a segment of its own: within it no threshold can lie.
    segment = np.concatenate([[0], np.cumsum((kind[1:] != kind[:-1]) | (kind[1:] == 2))])
    miss, fa = (np.cumsum(np.bincount(segment, x)) for x in (targets, size - targets))
    ends = thin(np.append(0, miss / miss[-1]), np.append(1, 1 - fa / fa[-1]), _MAX_SEGMENTS + 1)
    # A segment joins the later ones up to the next threshold that was kept.
    return (np.searchsorted(ends[1:], segment, side="right"))[group]


def _weight_sums(row: Array, enrol: Array, test: Array, draws: Array) -> Array:
    """Sums the trial weights in each row, for every replicate.

    Args:
        row: `[trials]`.
        enrol: `[trials]`, speaker numbers.
        test: `[trials]`, speaker numbers.
        draws: `[replicates, speakers]`, multiplicities.

    Returns:
        `[rows, replicates]`, with an even number of rows.
    """
    order = np.argsort(row, kind="stable")
    row, enrol, test = row[order], enrol[order], test[order]
    # One row of multiplicities for each speaker, with all replicates side by side: in bytes while the products fit.
    dtype, wide = (np.uint8, np.uint16) if draws.max() ** 2 < 256 else (np.uint32, np.uint32)
    copies = np.ones((draws.shape[1] + 1, len(draws)), dtype)
    copies[:-1] = draws.T
    second = np.where(enrol == test, len(copies) - 1, test)  # a speaker against itself: times the row of ones
    sums = np.zeros((row[-1] + 2 - row[-1] % 2, len(draws)), np.uint32)
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    for start, stop in zip(starts, np.append(starts[1:], len(row))):
        for i in range(start, stop, _BLOCK):
            block = slice(i, min(i + _BLOCK, stop))
            weights = copies.take(enrol[block], axis=0)
            weights *= copies.take(second[block], axis=0)
            sums[row[start]] += weights.sum(axis=0, dtype=wide)
    return sums
