"""Error rates of any number of scores from a histogram of them, with what the histogram leaves open."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from kmq_jax.core.errors import UserError
from kmq_jax.metrics.detection import Array, as_trials, equal_error_point, normalised_dcf


@dataclass(frozen=True)
class Rates:
    """Error rates known from a histogram.

    The rates are exact at the edges of bins. Between two edges a score may lie anywhere, so all that is known of the
    figure of the sorted scores is that it lies within `..._bounds`.

    Attributes:
        trials: all of them.
        targets: those of the same speaker.
        eer: equal error rate, a fraction, of the curve through the edges.
        eer_bounds: the EER of the sorted scores lies between these.
        threshold: edge nearest to the equal error rate.
        min_dcf: the least normalised detection cost at an edge.
        min_dcf_bounds: that of the sorted scores lies between these.
    """

    trials: int
    targets: int
    eer: float
    eer_bounds: tuple[float, float]
    threshold: float
    min_dcf: float
    min_dcf_bounds: tuple[float, float]


class ScoreHistogram:
    """Counts of scores by bin and label. Histograms of parts of a list add up to that of the list.

    >>> counts = ScoreHistogram(-1, 1)
    >>> counts.add([0.1, 0.7, 0.4, 0.9], [0, 0, 1, 1])
    >>> counts.rates().eer
    0.5
    """

    def __init__(self, low: float, high: float, bins: int = 1 << 20):
        """Makes an empty one; scores outside `low` to `high` count in the first or the last bin.

        Raises:
            UserError: `low` is not below `high`.
        """
        if not 0 < high - low < np.inf:
            raise UserError(f"a histogram of scores from {low:g} to {high:g} has no bins")
        self.low, self.high, self.bins = low, high, bins
        # A row for nontargets, one for targets: 16 MB at the default number of bins.
        self.counts = np.zeros((2, bins), np.int64)

    def add(self, scores: ArrayLike, labels: ArrayLike) -> None:
        """Counts scores `[trials]` with labels `[trials]`, true for targets.

        Raises:
            UserError: lengths differ, a label is neither 0 nor 1, or a score is not finite.
        """
        scores, labels = as_trials(scores, labels)
        if not np.isfinite(scores).all():
            raise UserError(f"score {int(np.argmin(np.isfinite(scores)))} is not finite")
        place = (scores - self.low) * (self.bins / (self.high - self.low))
        place = np.clip(place, 0, self.bins - 1).astype(np.int64)  # before the cast, which turns huge scores around
        for label in (0, 1):
            self.counts[label] += np.bincount(place[labels == label], minlength=self.bins)

    def rates(self, p_target: float = 0.01) -> Rates:
        """The error rates of what was counted.

        Args:
            p_target: prior of a target, for minDCF.

        Raises:
            UserError: there is no target trial, or no nontarget trial.
        """
        # How many scores of either class lie below each edge, `[2, bins + 1]`.
        below = np.pad(np.cumsum(self.counts, axis=1), ((0, 0), (1, 0)))
        nontargets, targets = (int(n) for n in below[:, -1])
        if not targets or not nontargets:
            raise UserError(f"error rates need target and nontarget trials, got {targets} and {nontargets}")
        # At an edge, scores below it are rejected.
        p_miss, p_fa = below[1] / targets, 1 - below[0] / nontargets
        kept = np.flatnonzero(np.append(True, np.diff(p_miss) - np.diff(p_fa) > 0))  # edges that change nothing go
        p_miss, p_fa = p_miss[kept], p_fa[kept]
        edges = self.low + kept * ((self.high - self.low) / self.bins)
        rate, point = equal_error_point(p_miss, p_fa)
        # The two rates cross between the last edge at which false alarms prevail and the one after it.
        after = max(int(np.sum(p_miss < p_fa)), 1)
        bounds = _between(p_miss, p_fa, after)
        costs = normalised_dcf(p_miss, p_fa, p_target)
        # Within a bin misses are at least those of its lower edge, false alarms at least those of its upper edge.
        least = normalised_dcf(p_miss[:-1], p_fa[1:], p_target).min()
        return Rates(
            targets + nontargets,
            targets,
            float(rate),
            bounds,
            float(edges[int(point)]),
            float(costs.min()),
            (float(min(least, costs.min())), float(costs.min())),
        )


def _between(p_miss: Array, p_fa: Array, after: int) -> tuple[float, float]:
    """The bounds of an equal error rate that lies between the edges `after - 1` and `after`."""
    # In that bin misses can only rise and false alarms only fall, each between its values at the two edges.
    low = max(p_miss[after - 1], p_fa[after])
    high = min(p_miss[after], p_fa[after - 1])
    return float(min(low, high)), float(max(low, high))
