"""Intervals of means over trials, by drawing speakers with replacement as in `metrics.bootstrap`."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from kmq_jax.metrics.bootstrap import percentile_interval
from kmq_jax.metrics.detection import Array, number_speakers

_DENSE = 3000  # speakers up to which a table of all pairs of them is quicker than a sparse one


class SpeakerDraws:
    """Draws of speakers, and the trials' speakers that they weight.

    A trial's weight is the product of its two speakers' multiplicities, or, within one speaker, the multiplicity
    itself. A weighted sum over trials is then a quadratic form in the multiplicities: trials are first summed by pair
    of speakers, so that a draw costs as much as there are speakers squared, however many trials there are.
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
        self._pair = enrol.astype(np.int64) * self.speakers + test
        rng = np.random.default_rng(seed)
        draws = rng.multinomial(self.speakers, np.full(self.speakers, 1 / self.speakers), replicates)
        self._copies = draws.astype(np.float32)

    def sums(self, values: ArrayLike) -> Array:
        """The weighted sum over trials of `values` `[trials]`, in every draw: `[replicates]`."""
        weights = np.asarray(values, np.float64)
        some = np.flatnonzero(weights)
        n, copies = self.speakers, self._copies
        if n <= _DENSE:
            table = np.bincount(self._pair[some], weights[some], minlength=n * n).reshape(n, n)
            own = np.diagonal(table).copy()
            np.fill_diagonal(table, 0)
            pairs = copies @ table.astype(np.float32)
        else:
            row, column = np.divmod(self._pair[some], n)
            own = np.bincount(row[row == column], weights[some][row == column], minlength=n)
            apart = row != column
            entries = (weights[some][apart], (row[apart], column[apart]))
            pairs = (sparse.coo_array(entries, shape=(n, n)).tocsr().T @ copies.T).T
        return np.einsum("rs,rs->r", pairs, copies, dtype=np.float64) + copies @ own

    def ratio(self, numerator: ArrayLike, denominator: Array) -> list[float] | None:
        """The central 95 % of a ratio of sums, such as a mean, over the draws.

        Args:
            numerator: `[trials]`.
            denominator: `[replicates]`, the `sums` of what is divided by, which often serves several ratios.

        Returns:
            `[low, high]`, or None where fewer than nine in ten draws have anything to divide by.
        """
        usable = denominator > 0
        if not len(usable) or usable.mean() < 0.9:
            return None
        return list(percentile_interval(self.sums(numerator)[usable] / denominator[usable]))
