"""Mean normalisation over real frames."""

import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.frontend.normalize import mean_normalize

FEATURES = np.random.default_rng(0).standard_normal((3, 20, 5)).astype(np.float32) * 4 - 9


def test_all_frames_real():
    expected = FEATURES - FEATURES.mean(1, dtype=np.float64, keepdims=True)
    np.testing.assert_allclose(mean_normalize(jnp.asarray(FEATURES)), expected, atol=1e-5)


@pytest.mark.parametrize("padding", [0.0, 1e6, np.nan, np.inf])
def test_padding_does_not_count_and_becomes_zero(padding):
    lengths = np.array([20, 7, 1])
    padded = FEATURES.copy()
    for row, length in zip(padded, lengths):
        row[length:] = padding
    together = np.asarray(mean_normalize(jnp.asarray(padded), jnp.asarray(lengths)))
    for row, alone, length in zip(together, FEATURES, lengths):
        single = mean_normalize(jnp.asarray(alone[None, :length]))
        np.testing.assert_allclose(row[:length], single[0], atol=1e-5)
        np.testing.assert_array_equal(row[length:], 0)


def test_no_frames_and_more_frames_than_there_are():
    result = np.asarray(mean_normalize(jnp.asarray(FEATURES), jnp.array([0, 25, 20])))
    np.testing.assert_array_equal(result[0], 0)
    np.testing.assert_allclose(result[1], FEATURES[1] - FEATURES[1].mean(0), atol=1e-5)


def test_a_constant_channel_disappears():
    channel = np.linspace(-3, 3, 5, dtype=np.float32)
    plain = mean_normalize(jnp.asarray(FEATURES))
    np.testing.assert_allclose(mean_normalize(jnp.asarray(FEATURES + channel)), plain, atol=1e-5)


def test_one_utterance_needs_its_batch_axis():
    with pytest.raises(UserError, match=r"\(20, 5\)"):
        mean_normalize(jnp.asarray(FEATURES[0]))
