"""Cosine scores against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from kmq_jax.core.errors import UserError
from kmq_jax.scoring import cosine


def table(rows, dim=256, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


@pytest.mark.parametrize("trials", [0, 1, 1023, 1024, 5000])
def test_agrees_with_scikit_learn(trials):
    enrol, test = table(40), 100 * table(60, seed=1)
    rng = np.random.default_rng(2)
    one, two = rng.integers(40, size=trials), rng.integers(60, size=trials)
    scores = cosine.cosine_scores(enrol, test, one, two)
    assert scores.dtype == np.float32
    expected = cosine_similarity(enrol.astype(np.float64), test.astype(np.float64))
    np.testing.assert_allclose(scores, expected[one, two], atol=2e-6)


def test_symmetric_and_bounded():
    rows = table(50)
    one, two = np.triu_indices(50)
    scores = cosine.cosine_scores(rows, rows, one, two)
    np.testing.assert_array_equal(scores, cosine.cosine_scores(rows, rows, two, one))
    assert scores.max() <= 1
    np.testing.assert_allclose(scores[one == two], 1, atol=1e-6)


def test_score_of_a_trial_does_not_depend_on_its_neighbours():
    rows = table(30)
    one, two = np.random.default_rng(0).integers(30, size=(2, 3000))
    scores = cosine.cosine_scores(rows, rows, one, two)
    np.testing.assert_array_equal(scores[1500:1510], cosine.cosine_scores(rows, rows, one[1500:1510], two[1500:1510]))


def test_length_does_not_matter():
    rows = np.array([[3e12, 4e12], [3e-12, 4e-12], [4.0, -3.0]], np.float32)
    np.testing.assert_allclose(cosine.cosine_scores(rows, rows, [0, 0], [1, 2]), [1, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("enrol", "test", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), "3 dimensions, test embeddings 4"),
        (np.ones(3), np.ones((2, 3)), r"must be \[utterances, dim\]"),
        (np.array([[1.0, 0], [0, 0]]), np.ones((2, 2)), "embedding 1 is zero or not finite"),
        (np.array([[1e30, 0], [0, 1]]), np.ones((2, 2)), "embedding 0 is zero or not finite"),
        (np.array([[np.nan, 0], [0, 1]]), np.ones((2, 2)), "embedding 0 is zero or not finite"),
    ],
)
def test_mistakes_are_named(enrol, test, message):
    with pytest.raises(UserError, match=message):
        cosine.cosine_scores(enrol, test, [0], [0])


def test_average_by_hand():
    rows = np.array([[2.0, 0], [0, 5], [0, -1]])
    np.testing.assert_allclose(cosine.average(rows, [[0, 1], [2], [0, 0, 1]]), [[0.5, 0.5], [0, -1], [2 / 3, 1 / 3]])
    for groups in ([], [[0], []]):
        with pytest.raises(UserError, match="at least one utterance"):
            cosine.average(rows, groups)
