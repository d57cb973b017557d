"""Intervals of means over trials, by drawing speakers with replacement as in `metrics.bootstrap`."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from kmq_jax.metrics.bootstrap import draw_speakers, percentile_interval
from kmq_jax.metrics.detection import Array, number_speakers

T = TypeVar("T")
R = TypeVar("R")

_MOST = 4000  # speakers up to which a table of all pairs of them is made
_SPARSE = 30  # a sparse table is quicker where it holds fewer than one in so many pairs


class SpeakerDraws:
    """Draws of speakers, and the trials' speakers that they weight.

    A trial's weight is the product of its two speakers' multiplicities, or, within one speaker, the multiplicity
    itself. A weighted sum over trials is then a quadratic form in the multiplicities: trials are first summed by pair
    of speakers, so that a draw costs as much as there are speakers squared, however many trials there are.

    >>> draws = SpeakerDraws([0, 0, 1], [0, 1, 1], replicates=50)
    >>> total, weights = draws.sums([3.0, 3.0, 3.0]), draws.sums([1.0, 1.0, 1.0])
    >>> bool(np.allclose(total, 3 * weights))
    True
    """

    def __init__(self, enrol_speaker: ArrayLike, test_speaker: ArrayLike, replicates: int = 1000, seed: int = 0):
        """Makes the draws.

        Args:
            enrol_speaker: `[trials]`, a nonnegative integer for the speaker of each enrolment.
            test_speaker: `[trials]`, the same for the test utterance.
            replicates: number of draws.
            seed: of the draws.
        """
        enrol, test = np.asarray(enrol_speaker), np.asarray(test_speaker)
        enrol, test, self.speakers = number_speakers(enrol, test, len(enrol))
        pair = enrol.astype(np.int64) * self.speakers + test
        order = np.argsort(pair, kind="stable")
        starts = np.flatnonzero(np.diff(pair[order], prepend=-1))
        self._place = np.empty(len(pair), np.int64)  # of each trial's pair among those that occur
        self._place[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(pair))))
        self._order, self._starts = order, starts
        self._pairs = pair[order][starts]  # the pairs that occur, as places in a table of all pairs
        self._apart = self._pairs // self.speakers != self._pairs % self.speakers
        self._copies = draw_speakers(self.speakers, replicates, seed).astype(np.float32)

    def sums(self, values: ArrayLike, where: Array | None = None) -> Array:
        """Sums over trials in every draw.

        Args:
            values: `[trials]`; or `[k]`, those of the trials `where`, all others being zero.
            where: `[k]`, trials; each may come once.

        Returns:
            `[replicates]`, linear in the values.
        """
        values = np.asarray(values, np.float64)
        if where is None:
            weights = np.add.reduceat(values[self._order], self._starts)
        else:
            weights = np.bincount(self._place[where], values, minlength=len(self._starts))
        n, copies = self.speakers, self._copies
        # Trials within one speaker weigh as its copies, not as their square: they are kept apart.
        own = np.zeros(n, np.float32)
        own[self._pairs[~self._apart] // n] = weights[~self._apart]
        total = (copies @ own).astype(np.float64)
        some = np.flatnonzero(self._apart & (weights != 0))
        # A dense table where most pairs occur; else a sparse one. Both give the same sums.
        if n <= _MOST and len(some) * _SPARSE > n * n:
            table = np.zeros(n * n, np.float32)
            table[self._pairs[some]] = weights[some]
            pairs = copies @ table.reshape(n, n)
        elif len(some):
            entries = weights[some].astype(np.float32), np.divmod(self._pairs[some], n)
            # copies @ table, turned: a sparse array stands on the left.
            pairs = (sparse.coo_array(entries, shape=(n, n)).tocsr().T @ copies.T).T
        else:
            return total
        return total + np.vecdot(pairs, copies)


def in_threads(task: Callable[[T], R], jobs: Iterable[T]) -> list[R]:
    """The results of `task` on every job, in order. numpy releases the interpreter's lock, so that all cores have work.

    >>> in_threads(abs, [-1, 2, -3])
    [1, 2, 3]
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(task, jobs))


def interval_of_ratio(numerator: Array, denominator: Array) -> list[float] | None:
    """The central 95 % of a ratio of sums, such as a mean, over draws.

    Args:
        numerator: `[replicates]`, `SpeakerDraws.sums` of what is averaged.
        denominator: `[replicates]`, those of the weights.

    Returns:
        `[low, high]`, or None where fewer than nine in ten draws have anything to divide by.

    >>> interval_of_ratio(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    [0.5, 0.5]
    """
    usable = denominator > 0
    if not len(usable) or usable.mean() < 0.9:
        return None
    return list(percentile_interval(numerator[usable] / denominator[usable]))
