"""Sums of channels and batch normalisation on them: NumPy's numbers in float64, PyTorch's gradients, every derivative.

The tests run on four simulated devices, where the kernel is not chosen: the `kernel` fixture chooses it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kmq_jax.core.mesh import batch_sharding, make_mesh
from kmq_jax.nn.channels import channel_sums, scale_and_shift
from kmq_jax.nn.cpu import library
from kmq_jax.nn.layers import BatchNorm


@pytest.fixture(params=["native", "xla"])
def kernel(request, monkeypatch):
    if request.param == "native":
        if not library.library():
            pytest.skip("no native kernels: there is no C++ compiler")
        monkeypatch.setattr(library, "usable", lambda dtype: dtype in (jnp.float32, jnp.bfloat16))
    jax.clear_caches()  # the choice is made when a function is traced
    yield request.param
    jax.clear_caches()


def random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(1 + np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", [(3, 37, 29, 32), (5, 1, 1, 1), (4, 9, 5, 48), (2, 11, 7, 100), (6, 256)], ids=str)
def test_sums(shape, dtype, kernel):
    x, y = random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype)
    sums = jax.jit(lambda x, y: channel_sums(x, y))(x, y)
    assert ("kmq_channel_sums" in str(jax.make_jaxpr(channel_sums)(x, y))) == (kernel == "native")
    axes = tuple(range(len(shape) - 1))
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert sums.dtype == jnp.float32
    scale = np.stack([np.abs(x).sum(axes), np.abs(x * y).sum(axes)])
    np.testing.assert_allclose(np.stack([x.sum(axes), (x * y).sum(axes)]) / scale, sums / scale, atol=1e-6)


def test_many_rows_lose_nothing(kernel):
    x = jnp.full((40, 200, 80, 8), 0.1)
    np.testing.assert_allclose(channel_sums(x, x)[0], 64_000 * np.float64(np.float32(0.1)) * 10, rtol=1e-5)


def test_the_same_sums_every_time(kernel):
    x = random(7, 100, 33, 32)
    for _ in range(5):
        np.testing.assert_array_equal(channel_sums(x, x), channel_sums(x, x))


def test_gradients_of_the_second_order(kernel):
    x, y, slope, shift = random(2, 3, 4), random(2, 3, 4, seed=1), random(4, seed=2), random(4, seed=3)
    check_grads(lambda x, y: jnp.sin(channel_sums(x, y)), (x, y), order=2, modes=["rev"], atol=0.02, rtol=0.02)
    check_grads(
        lambda *a: jnp.sin(scale_and_shift(*a)), (x, slope, shift), order=2, modes=["rev"], atol=0.02, rtol=0.02
    )


def test_vmap(kernel):
    x, y = random(3, 4, 5, 6), random(3, 4, 5, 6, seed=1)
    expected = np.stack([channel_sums(a, b) for a, b in zip(x, y)])
    np.testing.assert_allclose(jax.vmap(channel_sums)(x, y), expected, rtol=1e-5)


def test_normalisation_and_its_gradients_are_those_of_pytorch(kernel):
    torch = pytest.importorskip("torch")
    x, weights = random(4, 6, 5, 3), random(4, 6, 5, 3, seed=1)
    scale, bias = random(3, seed=2), random(3, seed=3)
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}

    def loss(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        y, _ = BatchNorm().apply(variables, x, None, True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y) * weights)

    ours = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, scale, bias)
    operands = [torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (x, scale, bias)]
    y = torch.nn.functional.batch_norm(operands[0].movedim(-1, 1), None, None, *operands[1:], training=True)
    theirs = torch.sum(torch.sin(y.movedim(1, -1)) * torch.tensor(np.asarray(weights, np.float64)))
    theirs.backward()
    np.testing.assert_allclose(ours[0], theirs.item(), atol=1e-5 * np.abs(weights).sum())
    for a, b in zip(ours[1], operands):
        np.testing.assert_allclose(a, b.grad, atol=1e-5 * b.grad.abs().max().item())


def test_several_devices_sum_the_whole_batch():
    mesh = make_mesh()
    x, y = random(8, 5, 4, 3), random(8, 5, 4, 3, seed=1)
    compiled = jax.jit(channel_sums, in_shardings=(batch_sharding(mesh),) * 2).lower(x, y).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(x, y), channel_sums(x, y), rtol=1e-5)
