"""Pooling against numpy and scipy, masks, and the order of features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from kmq_jax.nn.frames import frame_mask
from kmq_jax.nn.pooling import AttentiveStatisticsPooling, StatisticsPooling, flatten_order


def frames(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_statistics_are_mean_and_unbiased_deviation_of_real_frames():
    x = 1 + 3 * frames(2, 7, 3, 4)
    expected = []
    for utt in (x[0, :5], x[1]):
        flat = utt.reshape(len(utt), -1).astype(np.float64)
        expected.append(np.concatenate([flat.mean(0), np.sqrt(flat.var(0, ddof=1) + 1e-7)]))
    np.testing.assert_allclose(StatisticsPooling().apply({}, x[1:], None)[0], expected[1], atol=1e-5)
    x[0, 5:] = np.nan
    pooled = StatisticsPooling().apply({}, x, frame_mask(jnp.array([5, 7]), 7))
    np.testing.assert_allclose(pooled, expected, atol=1e-5)


def test_statistics_do_not_cancel_far_from_zero():
    x = 1000 + frames(1, 200, 1, 8)
    deviation = StatisticsPooling().apply({}, x, None)[0, 8:]
    np.testing.assert_allclose(deviation, x.astype(np.float64).reshape(200, 8).std(0, ddof=1), rtol=1e-4)


@pytest.mark.parametrize("pooling", [StatisticsPooling(), AttentiveStatisticsPooling(4)])
@pytest.mark.parametrize("length", [0, 1])
def test_too_short_for_a_deviation_gives_its_floor(pooling, length):
    x = frames(1, 3, 2, 4)
    mask = frame_mask(jnp.array([length]), 3)
    pooled, _ = pooling.init_with_output(jax.random.key(0), x, mask)
    expected = x[0, 0].reshape(-1) if length else np.zeros(8)
    np.testing.assert_allclose(pooled[0, :8], expected, atol=1e-6)
    np.testing.assert_allclose(pooled[0, 8:], np.sqrt(pooling.floor), rtol=1e-3)


def test_attentive_statistics_weigh_each_frame_and_feature():
    x = frames(2, 7, 3, 4)
    layer = AttentiveStatisticsPooling(5)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape), jnp.float32),
        layer.init(jax.random.key(0), x, None),
    )
    one, two = (jax.tree.map(np.asarray, variables["params"][f"attention{i}"]) for i in (1, 2))
    assert one["kernel"].shape == (12, 5)
    assert two["kernel"].shape == (5, 12)
    expected = []
    for utt in (x[0, :5], x[1]):
        flat = utt.reshape(len(utt), -1).astype(np.float64)
        hidden = np.tanh(flat @ one["kernel"] + one["bias"])
        weights = softmax(hidden @ two["kernel"] + two["bias"], axis=0)
        mean = (weights * flat).sum(0)
        expected.append(np.r_[mean, np.sqrt(np.maximum((weights * flat**2).sum(0) - mean**2, 1e-5))])
    np.testing.assert_allclose(layer.apply(variables, x[1:], None)[0], expected[1], atol=1e-5)
    x[0, 5:] = np.nan
    pooled = layer.apply(variables, x, frame_mask(jnp.array([5, 7]), 7))
    np.testing.assert_allclose(pooled, expected, atol=1e-5)


def test_gradients_do_not_see_the_padding():
    x = frames(1, 7, 2, 3)
    x[0, 4:] = 0
    mask = frame_mask(jnp.array([4]), 7)
    for layer in (StatisticsPooling(), AttentiveStatisticsPooling(4)):
        variables = layer.init(jax.random.key(0), x, mask)
        gradient = jax.grad(lambda x, layer=layer, v=variables: layer.apply(v, x, mask).sum())(x)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient[0, :4]).min() > 0
        assert not np.asarray(gradient[0, 4:]).any()


def test_flatten_order_turns_channel_major_weights_into_ours():
    x = frames(2, 3, 4)  # [time, freq, channel]
    weight = frames(5, 12)
    channel_major = x.transpose(0, 2, 1).reshape(2, 12)
    ours = x.reshape(2, 12)
    np.testing.assert_allclose(ours @ weight[:, flatten_order(3, 4)].T, channel_major @ weight.T, atol=1e-5)
