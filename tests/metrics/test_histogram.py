"""Error rates from a histogram: the sorted scores' own lie within the bounds, and parts add up."""

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.metrics.detection import eer, min_dcf
from kmq_jax.metrics.histogram import ScoreHistogram


def scores_of(seed, count=3000):
    rng = np.random.default_rng(seed)
    labels = rng.random(count) < 0.2
    return np.clip(rng.normal(0.1, 0.15, count) + 0.3 * labels, -1, 1).astype(np.float32), labels


@pytest.mark.parametrize("bins", [8, 100, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_sorted_scores_lie_within_the_bounds(bins, seed):
    scores, labels = scores_of(seed)
    counts = ScoreHistogram(-1, 1, bins)
    counts.add(scores, labels)
    rates = counts.rates(p_target=0.05)
    assert (rates.trials, rates.targets) == (len(scores), labels.sum())
    exact, _ = eer(scores, labels)
    assert rates.eer_bounds[0] - 1e-12 <= exact <= rates.eer_bounds[1] + 1e-12
    assert rates.eer_bounds[0] - 1e-12 <= rates.eer <= rates.eer_bounds[1] + 1e-12
    cost = min_dcf(scores, labels, 0.05)
    assert rates.min_dcf_bounds[0] - 1e-12 <= cost <= rates.min_dcf_bounds[1] + 1e-12
    if bins > 1000:  # hardly two scores share a bin
        assert rates.eer == pytest.approx(exact, abs=1e-3) and rates.min_dcf == pytest.approx(cost, abs=1e-3)


def test_parts_add_up():
    scores, labels = scores_of(0)
    whole, one, two = (ScoreHistogram(-1, 1, 64) for _ in range(3))
    whole.add(scores, labels)
    one.add(scores[:1000], labels[:1000])
    two.add(scores[1000:], labels[1000:])
    one.counts += two.counts
    assert one.rates() == whole.rates()


def test_counts_of_billions_of_trials():
    """More than 32 bits hold, in a bin and in all: every figure is that of the counts, and one more still counts."""
    counts, billion = ScoreHistogram(-1, 1, 4), 10**9
    counts.counts[0] = 9 * billion, 0, 3 * billion, 0  # a quarter of either class beyond the other
    counts.counts[1] = 0, 2 * billion, 0, 6 * billion
    rates = counts.rates()
    assert (rates.trials, rates.targets) == (20 * billion, 8 * billion)
    assert rates.eer == pytest.approx(0.25) and rates.threshold == 0.0
    counts.add([-0.9, 0.9], [0, 1])
    more = counts.counts.copy()
    assert more[0, 0] == 9 * billion + 1 and more[1, 3] == 6 * billion + 1
    counts.counts += more  # as of another process
    rates = counts.rates()
    assert (rates.trials, rates.targets) == (40 * billion + 4, 16 * billion + 2)


def test_separable_scores_and_scores_at_the_ends():
    counts = ScoreHistogram(-1, 1, 4)
    counts.add([-1.0, -5.0, -1e300, 1.0, 7.0, 1e300], [0, 0, 0, 1, 1, 1])
    rates = counts.rates()
    assert (rates.eer, rates.min_dcf) == (0, 0)


def test_mistakes():
    counts = ScoreHistogram(-1, 1, 4)
    with pytest.raises(UserError, match="score 1 is not finite"):
        counts.add([0.0, np.nan], [0, 1])
    with pytest.raises(UserError, match="labels must be 0 or 1, got 2"):
        counts.add([0.0, 0.5], [0, 2])
    with pytest.raises(UserError, match="do not fit"):
        counts.add([0.0, 0.5], [0])
    with pytest.raises(UserError, match="from 1 to 1 has no bins"):
        ScoreHistogram(1, 1)
    counts.add([0.0], [0])
    with pytest.raises(UserError, match="need target and nontarget trials, got 0 and 1"):
        counts.rates()
