"""Intervals over draws of speakers, against weights computed trial by trial."""

import numpy as np
import pytest

from kmq_jax.diagnosis import resample
from kmq_jax.diagnosis.resample import SpeakerDraws, interval_of_ratio

ENROL = np.array([5, 5, 9, 9, 7, 5, 9])
TEST = np.array([5, 9, 9, 7, 7, 9, 5])


def plain(enrol, test, values, replicates, seed=0):
    """The definition: a trial weighs the product of its speakers' multiplicities, or one speaker's own."""
    names, number = np.unique(np.concatenate([enrol, test]), return_inverse=True)
    one, two = np.split(number, 2)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), replicates)
    return np.array([sum(v * (d[a] if a == b else d[a] * d[b]) for a, b, v in zip(one, two, values)) for d in draws])


@pytest.mark.parametrize("dense", [True, False])
def test_sums_are_the_weighted_sums_of_every_draw(dense, monkeypatch):
    monkeypatch.setattr(resample, "_MOST", 4000 if dense else 0)
    values = np.array([1.0, -2.0, 0.5, 0.0, 3.0, 4.0, 0.25])
    draws = SpeakerDraws(ENROL, TEST, replicates=40)
    np.testing.assert_allclose(draws.sums(values), plain(ENROL, TEST, values, 40), rtol=1e-6)
    where = np.array([1, 4])
    only = np.zeros(7)
    only[where] = [2.0, 1.0]
    np.testing.assert_allclose(draws.sums(np.array([2.0, 1.0]), where), plain(ENROL, TEST, only, 40), rtol=1e-6)
    np.testing.assert_array_equal(draws.sums(np.zeros(0), np.zeros(0, int)), np.zeros(40))


def test_trials_within_speakers_only():
    draws = SpeakerDraws([0, 1, 1], [0, 1, 1], replicates=30)
    np.testing.assert_allclose(draws.sums([1, 1, 1]), plain(np.array([0, 1, 1]), np.array([0, 1, 1]), [1] * 3, 30))


def test_many_random_trials():
    rng = np.random.default_rng(3)
    enrol, test, values = rng.integers(20, size=500), rng.integers(20, size=500), rng.standard_normal(500)
    draws = SpeakerDraws(enrol, test, replicates=25, seed=4)
    np.testing.assert_allclose(draws.sums(values), plain(enrol, test, values, 25, seed=4), rtol=1e-4, atol=1e-3)


def test_the_interval_of_a_constant_is_that_constant():
    rng = np.random.default_rng(0)
    draws = SpeakerDraws(rng.integers(9, size=200), rng.integers(9, size=200), 100)
    ones = draws.sums(np.ones(200))
    assert interval_of_ratio(draws.sums(np.full(200, 0.25)), ones) == pytest.approx([0.25, 0.25])


def test_no_interval_where_most_draws_have_nothing():
    assert interval_of_ratio(np.ones(10), np.array([1.0] * 8 + [0.0] * 2)) is None
    assert interval_of_ratio(np.zeros(0), np.zeros(0)) is None
    low, high = interval_of_ratio(np.arange(101.0), np.ones(101))
    assert (low, high) == pytest.approx((2.5, 97.5))
