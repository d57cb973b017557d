"""A threshold from few speakers: hand-made cases, and how often the intervals hold the truth in a simulation."""

import numpy as np
import pytest
from scipy.stats import beta, norm

from kmq_jax.core.errors import UserError
from kmq_jax.metrics.threshold import choose_threshold, clopper_pearson


def pairs(speakers, each):
    owner = np.repeat(np.arange(speakers), each)
    one, two = np.triu_indices(len(owner), 1)
    return owner[one], owner[two], owner[one] == owner[two], one, two


def hand_made(speakers=5, each=2):
    """Nontarget trials score 0.01, 0.02, ..., in order; target trials 1."""
    enrol, test, same, _, _ = pairs(speakers, each)
    scores = np.ones(len(same))
    scores[~same] = np.arange(1, (~same).sum() + 1) / 100
    return scores, same, enrol, test


def test_the_threshold_is_the_lowest_that_keeps_the_rate():
    scores, same, enrol, test = hand_made()
    found = choose_threshold(scores, same, enrol, test, 0.1)
    assert (~same).sum() == 40
    assert found.value == pytest.approx(0.37)  # 0.37, 0.38, 0.39 and 0.40 are accepted: 4 of 40
    assert found.false_accept.value == pytest.approx(0.1) and found.false_reject.value == 0
    assert (found.false_accept.trials, found.false_reject.trials, found.speakers, found.pairs) == (40, 5, 5, 10)
    assert found.low < found.value and found.high is None
    assert found.speakers_to_halve == 15


def test_without_a_false_accept_the_pairs_of_speakers_bound_the_rate():
    scores, same, enrol, test = hand_made()
    found = choose_threshold(scores, same, enrol, test, 0.01)
    assert found.value == 1 and found.false_accept.value == 0 and found.high is None
    assert found.false_accept.units == 10 and found.false_reject.units == 5
    assert found.smallest == pytest.approx(1 / 10) and found.rule_of_three == pytest.approx(3 / 10)
    assert found.speakers_needed == 15  # 15 * 14 / 2 = 105 pairs, the first count of at least 1 / 0.01


def test_what_does_not_change_the_answer():
    scores, same, enrol, test = hand_made(8, 3)
    scores = scores + 0.3 * np.random.default_rng(0).standard_normal(len(scores))
    order = np.random.default_rng(1).permutation(len(scores))
    found = choose_threshold(scores, same, enrol, test, 0.05)
    assert choose_threshold(scores[order], same[order], test[order], enrol[order], 0.05) == found
    doubled = choose_threshold(2 * scores, same, enrol, test, 0.05)
    assert doubled.value == 2 * found.value and doubled.false_accept == found.false_accept


def test_the_interval_is_the_textbooks_where_speakers_are_many_and_wider_where_they_are_few():
    low, high = clopper_pearson(0.2, 50, speakers=10**9)
    assert (low, high) == pytest.approx((beta.ppf(0.025, 10, 41), beta.ppf(0.975, 11, 40)), rel=1e-6)
    fewer = clopper_pearson(0.2, 50, speakers=4)
    assert fewer[0] < low and fewer[1] > high
    assert clopper_pearson(0.0, 30, 10**9)[1] == pytest.approx(1 - 0.025 ** (1 / 30), rel=1e-6)
    assert clopper_pearson(1.0, 30, 10**9)[1] == 1


def test_one_speaker_who_is_taken_for_all_others_widens_the_interval():
    enrol, test, same, _, _ = pairs(30, 2)
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.random(len(same))
    alike = np.where(same, 2, noise)
    spread, one = alike.copy(), alike.copy()
    wolf = ~same & ((enrol == 3) | (test == 3))
    one[wolf] += 1
    spread[rng.choice(np.flatnonzero(~same), wolf.sum(), replace=False)] += 1
    by_one, by_many = (choose_threshold(scores, same, enrol, test, 0.05) for scores in (one, spread))
    assert by_one.false_accept.value == pytest.approx(by_many.false_accept.value)
    assert by_one.false_accept.units < by_many.false_accept.units / 4
    assert by_one.false_accept.high > 1.5 * by_many.false_accept.high


@pytest.mark.parametrize("rate", [0, 1, -0.1, float("nan")])
def test_rates_outside_are_refused(rate):
    with pytest.raises(UserError, match=r"`false_accept` \(=.*\) must lie between 0 and 1"):
        choose_threshold(*hand_made(), rate)


def test_trials_that_cannot_tell_are_refused():
    scores, same, enrol, test = hand_made()
    with pytest.raises(UserError, match="no target trials"):
        choose_threshold(scores[~same], same[~same], enrol[~same], test[~same])
    with pytest.raises(UserError, match="no nontarget trials"):
        choose_threshold(scores[same], same[same], enrol[same], test[same])
    with pytest.raises(UserError, match="labels must be true where"):
        choose_threshold(scores, ~same, enrol, test)
    with pytest.raises(UserError, match="no score that occurs"):
        choose_threshold(np.where(same, 0.0, 1.0), same, enrol, test)


def simulated(speakers, each, spread, rng):
    """Scores with effects of speakers, pairs and recordings, and the true rates at a threshold and the true threshold.

    `spread` is the standard deviation of a speaker's and of a pair's effect among impostors.
    """
    enrol, test, same, one, two = pairs(speakers, each)
    person, own = rng.normal(0, spread, speakers), rng.normal(0, 0.6, speakers)
    pair = rng.normal(0, spread, (speakers, speakers))
    recording = rng.normal(0, 0.3, speakers * each)
    scores = np.where(same, 4 + own[enrol], person[enrol] + person[test] + pair[enrol, test])
    scores = scores + recording[one] + recording[two] + rng.normal(0, 0.5, len(same))
    within = 2 * 0.3**2 + 0.5**2
    impostors, clients = np.sqrt(3 * spread**2 + within), np.sqrt(0.6**2 + within)
    return (scores, same, enrol, test), impostors, clients


# Floors are what was measured, less two standard errors: intervals are too wide for 8 speakers, and a little too narrow
# where 20 differ much from one another and the rate is small.
@pytest.mark.parametrize(
    ("speakers", "each", "spread", "wanted", "least"),
    [(8, 5, 0.2, 0.01, 0.97), (8, 5, 0.5, 0.05, 0.93), (20, 3, 0.5, 0.01, 0.87)],
)
def test_how_often_intervals_hold_the_truth_for_new_speakers(speakers, each, spread, wanted, least):
    rng = np.random.default_rng(7)
    held, naive = [], []
    for _ in range(100):
        trials, impostors, clients = simulated(speakers, each, spread, rng)
        found = choose_threshold(*trials, wanted, replicates=200)
        true_far, true_frr = norm.sf(found.value / impostors), norm.cdf((found.value - 4) / clients)
        true_threshold = impostors * norm.isf(wanted)
        accept, reject = found.false_accept, found.false_reject
        top = np.inf if found.high is None else found.high
        ends = [
            (accept.low, true_far, accept.high),
            (reject.low, true_frr, reject.high),
            (found.low, true_threshold, top),
        ]
        held.append([low <= truth <= high for low, truth, high in ends])
        # As if trials were independent: what the intervals are there to avoid.
        low, high = clopper_pearson(accept.value, accept.trials, 10**9)
        naive.append(low <= true_far <= high)
    coverage = np.mean(held, axis=0)
    assert (coverage >= least).all(), coverage
    assert np.mean(naive) < 0.8 < coverage.min()
