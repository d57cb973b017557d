"""Adaptive S-norm against a plain loop."""

import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.metrics.detection import eer
from kmq_jax.scoring import snorm
from kmq_jax.scoring.cosine import cosine_scores


def table(rows, seed, dim=16):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("top_n", [2, 7, 50])
def test_agrees_with_a_plain_loop(top_n, monkeypatch):
    monkeypatch.setattr(snorm, "_CHUNK", 120)  # a few utterances at a time
    enrol, test, cohort = table(12, 0), table(9, 1), table(50, 2)
    one, two = np.random.default_rng(3).integers(9, size=(2, 40))
    scores = cosine_scores(enrol, test, one, two)
    ours = snorm.adaptive_snorm(scores, enrol, test, one, two, cohort, top_n)
    for i in range(40):
        a, b = enrol[one[i]].astype(float), test[two[i]].astype(float)
        sides = []
        for x in (a, b):
            top = sorted((cosine(x, c.astype(float)) for c in cohort), reverse=True)[:top_n]
            sides.append((cosine(a, b) - np.mean(top)) / np.std(top))
        assert ours[i] == pytest.approx(np.mean(sides), rel=1e-3, abs=1e-4)


def test_it_undoes_a_shift_of_condition():
    """Half of the recordings share a channel that lifts their scores: the pooled EER suffers, and S-norm helps."""
    rng = np.random.default_rng(0)
    speakers = rng.standard_normal((60, 32))
    channel = np.zeros(32)
    channel[0] = 8
    owner = np.repeat(np.arange(60), 6)
    noisy = np.tile([0, 0, 0, 1, 1, 1], 60)
    rows = speakers[owner] + 0.8 * rng.standard_normal((360, 32)) + noisy[:, None] * channel
    cohort = rng.standard_normal((400, 32)) + (np.arange(400) % 2)[:, None] * channel
    one, two = np.triu_indices(360, 1)
    same = noisy[one] == noisy[two]
    one, two = one[same], two[same]
    scores = cosine_scores(rows, rows, one, two)
    normed = snorm.adaptive_snorm(scores, rows, rows, one, two, cohort, 100)
    labels = owner[one] == owner[two]
    assert eer(normed, labels)[0] < 0.7 * eer(scores, labels)[0]


@pytest.mark.parametrize("top_n", [0, 1, 51])
def test_top_n_must_fit_the_cohort(top_n):
    with pytest.raises(UserError, match=rf"top_n \(={top_n}\) must lie between 2 and the cohort's size, 50"):
        snorm.cohort_statistics(table(3, 0), table(50, 1), top_n)


def test_a_flat_utterance_is_named_by_its_own_row():
    cohort = table(50, 1) * (np.arange(16) > 0)
    enrol, test = table(6, 0), table(6, 2)
    test[4] = np.arange(16) == 0
    for one, two, message in ((enrol, test, "of test embedding 4 "), (test, test, "of embedding 4 "),
                              (test, enrol, "of enrolment embedding 4 ")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            snorm.adaptive_snorm([0.5, 0.5], one, two, [3, 4], [3, 4], cohort, 5)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="16 dimensions, the cohort 8"):
        snorm.cohort_statistics(table(3, 0), table(50, 1, dim=8), 5)
    with pytest.raises(UserError, match="all the same"):
        snorm.cohort_statistics(table(3, 0), np.repeat(table(1, 1), 5, axis=0), 5)


def test_no_trials_give_no_scores():
    scores = snorm.adaptive_snorm([], table(3, 0), table(4, 1), [], [], table(5, 2), 2)
    assert scores.shape == (0,) and scores.dtype == np.float32
