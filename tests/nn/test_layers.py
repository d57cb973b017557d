"""Layers one by one: masks, normalisation against its definition, squeeze-and-excitation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax.nn import integers, layers
from kmq_jax.nn.frames import frame_mask, mask_frames, mean_frames, stride_mask
from kmq_jax.nn.layers import BatchNorm, Conv, SqueezeExcite


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_frame_mask():
    assert frame_mask(None, 5) is None
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(frame_mask(jnp.array([3, 5, 0]), 5), expected)


def test_mask_frames_removes_whatever_was_there():
    x = np.full((2, 3, 4, 5), np.nan, np.float32)
    x[0, :2], x[1] = 1, 2
    masked = np.asarray(mask_frames(x, frame_mask(jnp.array([2, 3]), 3)))
    assert masked.sum() == 2 * 4 * 5 + 2 * 3 * 4 * 5
    assert mask_frames(x, None) is x


@pytest.mark.parametrize("time", [8, 9])
def test_a_stride_of_two_leaves_half_the_frames_rounded_up(time):
    for length in range(time + 1):
        mask = stride_mask(frame_mask(jnp.array([length]), time), 2)
        assert mask.shape == (1, -(-time // 2))
        np.testing.assert_array_equal(mask, frame_mask(jnp.array([-(-length // 2)]), mask.shape[1]))
    assert stride_mask(None, 2) is None


@pytest.mark.parametrize("axes", [(1,), (1, 2), (0, 1, 2)])
def test_mean_frames_is_the_mean_of_the_real_frames(axes):
    x = random(2, 6, 3, 4)
    lengths = (4, 6)
    if 0 in axes:
        expected = np.concatenate([x[i, :n].reshape(-1, 4) for i, n in enumerate(lengths)]).mean(0)
    else:
        expected = np.stack([x[i, :n].mean(tuple(a - 1 for a in axes)) for i, n in enumerate(lengths)])
    x[0, 4:] = np.nan
    np.testing.assert_allclose(mean_frames(x, frame_mask(jnp.array(lengths), 6), axes), expected, atol=1e-6)
    np.testing.assert_allclose(mean_frames(x[1:], None, axes), x[1:].mean(axes), atol=1e-6)
    assert not np.asarray(mean_frames(x[:1], frame_mask(jnp.array([0]), 6), (1,))).any()


@pytest.mark.parametrize(("taps", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_conv_equals_its_definition(taps, stride):
    x, layer = random(2, 5, 4, 3), Conv(6, taps, stride, use_bias=True)
    variables = layer.init(jax.random.key(0), x)
    kernel, bias = variables["params"]["kernel"], random(6, seed=1)
    y = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    around = np.pad(x, ((0, 0), (taps // 2,) * 2, (taps // 2,) * 2, (0, 0)))
    expected = np.zeros((2, -(-5 // stride), -(-4 // stride), 6)) + bias
    for t in range(expected.shape[1]):
        for f in range(expected.shape[2]):
            patch = around[:, t * stride : t * stride + taps, f * stride : f * stride + taps]
            expected[:, t, f] += np.einsum("btfi,tfio->bo", patch, kernel)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_conv_computes_in_its_dtype_and_keeps_float32_parameters():
    layer = Conv(6, dtype=jnp.bfloat16, use_bias=True)
    y, variables = layer.init_with_output(jax.random.key(0), random(2, 5, 4, 3))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def batch_norm(x, mask, train, dtype=jnp.float32):
    params = {"scale": np.float32([1.0, 2.0, 0.5]), "bias": np.float32([0.0, -1.0, 3.0])}
    stats = {"mean": np.float32([0.5, 0.0, -2.0]), "var": np.float32([1.0, 4.0, 0.25])}
    variables = {"params": params, "batch_stats": stats}
    y, new = BatchNorm(dtype).apply(variables, x, mask, train, mutable=["batch_stats"])
    return y, new["batch_stats"], params, stats


def test_batch_norm_by_running_statistics():
    x = random(2, 5, 4, 3)
    y, new, params, stats = batch_norm(x, None, False)
    expected = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert jax.tree.all(jax.tree.map(np.array_equal, new, stats))


@pytest.mark.parametrize("lengths", [None, (2, 5)])
def test_batch_norm_by_the_statistics_of_real_frames(lengths):
    x = 3 + 2 * random(2, 5, 4, 3)
    real = np.concatenate([x[i, : 5 if lengths is None else lengths[i]].reshape(-1, 3) for i in range(2)])
    mean, var = real.mean(0), real.var(0)
    if lengths:
        x[0, 2:] = np.nan
    mask = None if lengths is None else frame_mask(jnp.array(lengths), 5)
    y, new, params, stats = batch_norm(x, mask, True)
    expected = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y[0, :2], expected[0, :2], atol=1e-4)
    np.testing.assert_allclose(y[1], expected[1], atol=1e-4)
    np.testing.assert_allclose(new["mean"], 0.9 * stats["mean"] + 0.1 * mean, atol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * stats["var"] + 0.1 * var, atol=1e-4)


def test_batch_norm_of_vectors_and_in_bfloat16():
    x = random(64, 3)
    y, new, params, _ = batch_norm(x, None, True)
    np.testing.assert_allclose(np.mean(y, 0), params["bias"], atol=1e-5)
    half, half_new, _, _ = batch_norm(x.astype(jnp.bfloat16), None, True, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert half_new["mean"].dtype == jnp.float32
    np.testing.assert_allclose(half.astype(np.float32), y, atol=0.05)
    np.testing.assert_allclose(half_new["var"], new["var"], atol=0.01)


def test_batch_norm_statistics_are_global_on_a_sharded_batch():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = random(8, 5, 4, 3) + np.arange(8, dtype=np.float32).reshape(8, 1, 1, 1)
    step = jax.jit(lambda x: batch_norm(x, None, True)[:2])
    y, new = step(x)
    y4, new4 = step(jax.device_put(x, sharding))
    np.testing.assert_allclose(y4, y, atol=1e-5)
    np.testing.assert_allclose(new4["var"], new["var"], atol=1e-5)


def test_squeeze_excite_gates_by_the_mean_of_real_frames():
    x = random(2, 6, 3, 4)
    layer = SqueezeExcite()
    variables = layer.init(jax.random.key(0), x, None)
    variables = jax.tree.map(lambda leaf: leaf + 0.3, variables)
    fc1, fc2 = (jax.tree.map(np.asarray, variables["params"][name]) for name in ("fc1", "fc2"))
    y = layer.apply(variables, x, frame_mask(jnp.array([4, 6]), 6))
    for i, length in enumerate((4, 6)):
        hidden = x[i, :length].mean((0, 1)) @ fc1["kernel"] + fc1["bias"]
        gate = (hidden / (1 + np.exp(-hidden))) @ fc2["kernel"] + fc2["bias"]
        np.testing.assert_allclose(y[i], x[i] / (1 + np.exp(-gate)), atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-20], ids=["ordinary", "dead channel"])
def test_a_convolution_on_integers_is_exact(size):
    """Against sums of whole numbers in 64 bits, as an engine computes them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 6, 32)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 32, 5)).astype(np.float32) * np.float32([1, 1, 1, 1, size])
    bias = rng.normal(size=5).astype(np.float32)
    step, zero = np.float32(0.03), 100
    steps = np.abs(kernel).max(axis=(0, 1, 2)) / np.float32(127)
    integer = {"input": jnp.array([step, zero]), "kernel": jnp.asarray(steps)}
    given = {"params": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}, integers.COLLECTION: integer}
    y = np.asarray(Conv(5, 3, use_bias=True).apply(given, jnp.asarray(x)))

    q = np.clip(np.rint(x / step) + zero, 0, 255).astype(np.int64) - zero
    k = np.rint(kernel / steps).astype(np.int64)
    assert np.abs(k).max() == 127
    q = np.pad(q, ((0, 0), (1, 1), (1, 1), (0, 0)))
    sums = sum(q[:, i : i + 7, j : j + 6] @ k[i, j] for i in range(3) for j in range(3))
    unit = (steps * step).astype(np.float32)
    whole = np.rint(bias[:4] / unit[:4]).astype(np.int64)
    np.testing.assert_array_equal(y[..., :4], (sums[..., :4] + whole).astype(np.float32) * unit[:4])
    np.testing.assert_allclose(y[..., 4], sums[..., 4] * unit[4] + bias[4], atol=unit[4] / 2 + 1e-6)


def test_the_relu_of_a_sum_is_a_relu_whose_gradient_is_written_once():
    x, given = jnp.asarray(random(3, 4, 5)).at[0, 0].set(0), jnp.asarray(random(3, 4, 5, seed=1))

    def loss(relu, x):
        return jnp.sum(relu(x) * given)

    ours, theirs = (jax.grad(functools.partial(loss, relu)) for relu in (layers._relu_of_sum, nn.relu))
    np.testing.assert_array_equal(ours(x), theirs(x))
    np.testing.assert_array_equal(layers._relu_of_sum(x), nn.relu(x))
    assert "optimization_barrier" in str(jax.make_jaxpr(ours)(x))
    on_a_processor = jax.grad(functools.partial(loss, layers.relu_of_sum))
    assert str(jax.make_jaxpr(on_a_processor)(x)) == str(jax.make_jaxpr(theirs)(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_normalisation_and_gate_together_are_one_after_the_other(stride, monkeypatch):
    """As accelerators compute a training batch: output, statistics, gradients; the parameters are the same ones."""
    style, x = layers.LayerStyle(), jnp.asarray(random(3, 8, 6, 4))
    block = layers.BasicBlock(4, stride, True, style)
    variables = jax.jit(block.init, static_argnums=3)(jax.random.key(0), x, None, True)
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * random(*leaf.shape, seed=2), variables)
    given = random(3, 8 // stride, 6 // stride, 4, seed=3)

    def loss(params, x, mask=None):
        y, new = block.apply({**variables, "params": params}, x, mask, True, mutable=["batch_stats"])
        return jnp.sum(y * given), (y, new)

    def both():
        whole = jax.jit(lambda *given: jax.grad(loss, argnums=(0, 1), has_aux=True)(*given))
        program = whole.lower(variables["params"], x)
        return program.compile()(variables["params"], x), program.as_text()

    usual, program = both()
    monkeypatch.setattr(layers, "on_processor", lambda: False)
    again, other = both()
    assert jax.tree.structure(again) == jax.tree.structure(usual)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(usual)):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1, float(jnp.abs(theirs).max())))
    assert "optimization_barrier" in other and "optimization_barrier" not in program
    # Where frames are padded, or activations are rounded, each is computed by itself.
    places, run = [], functools.partial(block.apply, train=True, mutable=["batch_stats"])
    with integers.watching(lambda place, x: (places.append(place), x)[1]):
        jax.eval_shape(run, variables, x, None)
    assert "branch" in [place.rsplit("/", 1)[-1] for place in places]
    monkeypatch.setattr(layers, "sample_sums", lambda *_: pytest.fail("padded frames are no crop"))
    jax.eval_shape(run, variables, x, jnp.ones((3, 8), bool))
