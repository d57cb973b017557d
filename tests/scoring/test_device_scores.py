"""Scores on a device are those of numpy, whatever the list's length."""

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.scoring import cosine, device_scores, snorm


@pytest.fixture(scope="module")
def tables():
    rng = np.random.default_rng(0)
    return rng.standard_normal((50, 16), np.float32), rng.standard_normal((30, 16), np.float32)


@pytest.mark.parametrize("count", [1, 5, 64, 100])
def test_cosine(tables, count, monkeypatch):
    monkeypatch.setattr(device_scores, "_TRIALS", 64)
    one, two = tables
    rng = np.random.default_rng(count)
    enrol, test = rng.integers(50, size=count), rng.integers(30, size=count)
    ours = device_scores.cosine_scores(one, two, enrol, test)
    np.testing.assert_allclose(ours, cosine.cosine_scores(one, two, enrol, test), atol=1e-6)
    assert ours.dtype == np.float32 and abs(device_scores.cosine_scores(one, one, [3], [3])[0] - 1) < 1e-6


def test_no_trials(tables):
    assert device_scores.cosine_scores(*tables, [], []).shape == (0,)
    mean, deviation = device_scores.cohort_statistics(tables[0][:0], tables[1], 5)
    assert (mean.shape, deviation.shape) == ((0,), (0,))


def test_asnorm(tables, monkeypatch):
    monkeypatch.setattr(device_scores, "_COHORT_SCORES", 20 * 16)  # several chunks, the last one filled up
    one, two = tables
    rng = np.random.default_rng(1)
    cohort = rng.standard_normal((20, 16), np.float32)
    enrol, test = rng.integers(50, size=40), rng.integers(30, size=40)
    scores = cosine.cosine_scores(one, two, enrol, test)
    for a, b in zip(
        device_scores.cohort_statistics(one, cohort, 7), snorm.cohort_statistics(one, cohort, 7), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)
    statistics = device_scores.cohort_statistics
    ours = snorm.adaptive_snorm(scores, one, two, enrol, test, cohort, 7, statistics=statistics)
    np.testing.assert_allclose(ours, snorm.adaptive_snorm(scores, one, two, enrol, test, cohort, 7), atol=1e-4)


def test_mistakes_are_named(tables):
    one, two = tables
    with pytest.raises(UserError, match="16 dimensions"):
        device_scores.cosine_scores(one, two[:, :8], [0], [0])
    for scores in (device_scores.cosine_scores, cosine.cosine_scores):
        with pytest.raises(UserError, match="embedding 50 of 50"):
            scores(one, two, [50], [0])
        with pytest.raises(UserError, match="embedding -1 of 30"):
            scores(one, two, [1, 0], [-1, 0])
    with pytest.raises(UserError, match="top_n"):
        device_scores.cohort_statistics(one, two, 31)
    with pytest.raises(UserError, match="all the same"):
        device_scores.cohort_statistics(one[:2], np.ones((4, 16), np.float32), 3)
