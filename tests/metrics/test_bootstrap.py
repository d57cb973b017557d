"""The speaker bootstrap against lists in which every trial is really repeated."""

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.metrics import bootstrap, detection


def trial_list(speakers, trials, shift=1.5, decimals=6, seed=0):
    rng = np.random.default_rng(seed)
    enrol = rng.integers(speakers, size=trials)
    labels = rng.random(trials) < 0.4
    test = np.where(labels, enrol, (enrol + rng.integers(1, speakers, trials)) % speakers)
    effect = 0.5 * rng.standard_normal(speakers)
    scores = rng.standard_normal(trials) + effect[enrol] + effect[test] + shift * labels
    return scores.round(decimals), labels, enrol, test


def repeated(scores, labels, enrol, test, draw):
    """The list as the drawn speakers would have made it, trial by trial."""
    times = [draw[e] if e == t else draw[e] * draw[t] for e, t in zip(enrol, test)]
    return np.repeat(scores, times), np.repeat(labels, times)


@pytest.mark.parametrize(("speakers", "trials", "decimals"), [(12, 400, 6), (12, 400, 0), (4, 60, 1), (50, 3000, 2)])
def test_replicates_are_the_metrics_of_repeated_trials(speakers, trials, decimals):
    scores, labels, enrol, test = trial_list(speakers, trials, decimals=decimals)
    replicates = 25
    ours = bootstrap.speaker_bootstrap(scores, labels, enrol, test, replicates, seed=3)
    draws = np.random.default_rng(3).multinomial(speakers, np.full(speakers, 1 / speakers), replicates)
    lists = [repeated(scores, labels, enrol, test, draw) for draw in draws]
    lists = [(s, y) for s, y in lists if 0 < y.sum() < len(y)]
    np.testing.assert_allclose(ours.eer, [detection.eer(*one)[0] for one in lists], atol=1e-9)
    np.testing.assert_allclose(ours.min_dcf, [detection.min_dcf(*one) for one in lists], atol=1e-9)


def test_many_copies_of_one_speaker_do_not_overflow():
    """Products beyond a byte: two speakers drawn 17 and 300 times."""
    rng = np.random.default_rng(0)
    enrol, test = rng.integers(0, 20, (2, 4000))
    labels = enrol == test
    draws = np.zeros((1, 20), np.int64)
    draws[0, :2] = 17, 300
    sums = bootstrap._weight_sums(labels.astype(int), enrol, test, draws)
    weights = np.where(labels, draws[0, enrol], draws[0, enrol] * draws[0, test])
    assert sums[:, 0].tolist() == [weights[~labels].sum(), weights[labels].sum()]


def test_thinned_curves_agree_with_whole_ones(monkeypatch):
    scores, labels, enrol, test = trial_list(100, 30_000)
    whole = bootstrap.speaker_bootstrap(scores, labels, enrol, test, 50)
    monkeypatch.setattr(bootstrap, "_MAX_SEGMENTS", 1024)
    thinned = bootstrap.speaker_bootstrap(scores, labels, enrol, test, 50)
    assert not np.array_equal(whole.eer, thinned.eer)
    np.testing.assert_allclose(thinned.eer, whole.eer, rtol=2e-3)
    np.testing.assert_allclose(thinned.min_dcf, whole.min_dcf, rtol=5e-3)


def test_intervals_cover_the_truth():
    """Of 40 lists drawn from one population, about 95 % of the intervals hold the population's EER."""
    population = trial_list(3000, 400_000, seed=99)
    truth = detection.eer(*population[:2])[0]
    held = 0
    for seed in range(40):
        draws = bootstrap.speaker_bootstrap(*trial_list(40, 3000, seed=seed), replicates=200, seed=seed)
        low, high = bootstrap.percentile_interval(draws.eer)
        held += low <= truth <= high
    assert 34 <= held <= 40


def test_speakers_matter():
    """With strong speaker effects the interval is much wider than one that takes trials for independent."""
    scores, labels, enrol, test = trial_list(30, 20_000)
    speakers = bootstrap.speaker_bootstrap(scores, labels, enrol, test, 300).eer
    unique = np.arange(len(scores))  # every trial has speakers of its own
    trials = bootstrap.speaker_bootstrap(
        scores, labels, unique, np.where(labels, unique, unique + len(scores)), 300
    ).eer
    assert speakers.std() > 2 * trials.std()


def test_draws_depend_on_the_seed_alone():
    scores, labels, enrol, test = trial_list(20, 500)
    one, two = (bootstrap.speaker_bootstrap(scores, labels, enrol, test, 20, seed=1) for _ in range(2))
    np.testing.assert_array_equal(one.eer, two.eer)
    other = bootstrap.speaker_bootstrap(scores, labels, enrol, test, 20, seed=2)
    assert not np.array_equal(one.eer, other.eer)
    # Another system on the same trials: the same draws, so equal scores give equal replicates.
    paired = bootstrap.speaker_bootstrap(2 * scores + 1, labels, enrol + 7, test + 7, 20, seed=1)
    np.testing.assert_allclose(paired.eer, one.eer, atol=1e-12)


def test_replicates_without_a_class_are_left_out():
    """Two speakers: half of the draws have one speaker only, and no nontarget trial."""
    draws = bootstrap.speaker_bootstrap([0.9, 0.8, 0.1, 0.2], [1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0], 400)
    assert 150 < len(draws.eer) < 250
    assert not draws.eer.any()


@pytest.mark.parametrize(
    ("enrol", "message"), [([0], "2 nonnegative"), ([0, -1], "nonnegative"), ([0.0, 1.0], "integers")]
)
def test_mistakes_are_named(enrol, message):
    with pytest.raises(UserError, match=message):
        bootstrap.speaker_bootstrap([1.0, 0.0], [1, 0], enrol, [0, 1])
    with pytest.raises(UserError, match=r"`replicates` \(=0\) must be at least 1"):
        bootstrap.speaker_bootstrap([1.0, 0.0], [1, 0], [0, 1], [0, 2], replicates=0)
    with pytest.raises(UserError, match="no target"):
        bootstrap.speaker_bootstrap([1.0, 0.0], [0, 0], [0, 1], [1, 0])


def test_speakers_from_targets():
    enrol, test, labels = [0, 1, 3, 0, 5], [1, 2, 4, 3, 5], [1, 1, 1, 0, 1]
    found = bootstrap.speakers_from_targets(enrol, test, labels, 7)
    assert len(found) == 7
    assert found[0] == found[1] == found[2] != found[3] == found[4]
    assert len(set(found)) == 4
