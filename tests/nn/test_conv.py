"""The native convolution against XLA's, value and every derivative; the fallbacks; the choice between them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kmq_jax.core.mesh import batch_sharding, make_mesh, replicated
from kmq_jax.nn import conv
from kmq_jax.nn.cpu import library, prebuilt

# batch, time, freq, in, out, taps, stride: what the networks use, odd and even, and what fills no tile.
SHAPES = [
    (2, 13, 81, 1, 32, 3, 1),
    (3, 12, 16, 32, 32, 3, 1),
    (2, 11, 81, 32, 64, 3, 2),
    (2, 12, 40, 32, 64, 1, 2),
    (2, 7, 11, 128, 256, 1, 1),
    (1, 9, 10, 256, 256, 3, 1),
    (3, 2, 3, 5, 7, 3, 2),
    (1, 1, 1, 4, 4, 3, 2),
    (2, 40, 5, 8, 8, 3, 1),
]
needs_native = pytest.mark.skipif(not library.library(), reason="no native kernels: there is no C++ compiler")


def reference(x, kernel, strides):
    padding = [(taps // 2, taps // 2) for taps in kernel.shape[:2]]
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def example(batch, time, freq, cin, cout, taps, stride, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, time, freq, cin))
    kernel = rng.normal(size=(taps, taps, cin, cout))
    gradient = rng.normal(size=(batch, -(-time // stride), -(-freq // stride), cout))
    return [jnp.asarray(a, dtype) for a in (x, kernel, gradient)]


def assert_close(ours, theirs, tolerance):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(np.abs(theirs).max(), 1e-30))


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 5e-6), (jnp.bfloat16, 1e-2)], ids=["f32", "bf16"])
def test_value_and_gradients(shape, dtype, tolerance):
    operands, strides = example(*shape, dtype), (shape[-1],) * 2
    x, kernel, gradient = operands
    wide = [a.astype(jnp.float32) for a in operands]  # the same rounded numbers, computed in float32
    expected, expected_vjp = jax.vjp(lambda x, k: reference(x, k, strides), *wide[:2])
    value, vjp = jax.vjp(lambda x, k: conv.convolution(x, k, strides), x, kernel)
    assert value.dtype == dtype
    assert_close(value, expected, tolerance)
    for ours, theirs in zip(vjp(gradient), expected_vjp(wide[2])):
        assert ours.dtype == dtype
        assert_close(ours, theirs, tolerance)


@needs_native
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("channels", [(32, 32), (32, 64), (64, 32), (96, 40)], ids=str)
def test_bfloat16_by_matrix_tiles(channels, taps, stride):
    """Whole units of channels, which a processor with AMX multiplies by tiles; less, one and more of them."""
    for batch, time, freq in [(3, 45, 5), (2, 7, 16), (1, 7, 17), (5, 45, 40)]:
        x, kernel, gradient = example(batch, time, freq, *channels, taps, stride, jnp.bfloat16)
        value, vjp = jax.vjp(lambda x, k: conv.convolution(x, k, (stride,) * 2), x, kernel)
        ours = (value, *vjp(gradient))
        for a, b in zip(ours, summed_by_numpy(x, kernel, gradient, stride), strict=True):
            assert_close(a, b, 1e-2)  # without tiles, Winograd rounds twice


def summed_by_numpy(x, kernel, gradient, stride):
    """The convolution and its two gradients, tap by tap in float64."""
    x, kernel, gradient = (np.asarray(a, np.float64) for a in (x, kernel, gradient))
    half, (times, freqs) = kernel.shape[0] // 2, gradient.shape[1:3]
    padded = np.pad(x, [(0, 0), (half, half), (half, half), (0, 0)])
    value, dx, dk = np.zeros_like(gradient), np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in np.ndindex(kernel.shape[:2]):
        met = np.s_[:, i : i + stride * times : stride, j : j + stride * freqs : stride]
        value += padded[met] @ kernel[i, j]
        dx[met] += gradient @ kernel[i, j].T
        dk[i, j] = np.einsum("btfi,btfo->io", padded[met], gradient)
    return value, dx[:, half : half + x.shape[1], half : half + x.shape[2]], dk


@needs_native
def test_strides_may_differ():
    x, kernel, _ = example(2, 9, 10, 4, 6, 3, 1)
    for strides in [(1, 2), (2, 1), (3, 2)]:
        assert_close(conv.convolution(x, kernel, strides), reference(x, kernel, strides), 5e-6)
        ours = jax.grad(lambda x, k, s=strides: jnp.sum(jnp.sin(conv.convolution(x, k, s))), (0, 1))(x, kernel)
        theirs = jax.grad(lambda x, k, s=strides: jnp.sum(jnp.sin(reference(x, k, s))), (0, 1))(x, kernel)
        for a, b in zip(ours, theirs):
            assert_close(a, b, 5e-6)


@needs_native
@pytest.mark.parametrize("stride", [1, 2])
def test_hessian_vector_products(stride):
    """Hutchinson's estimate needs them: reverse over reverse, forward over reverse, and through two layers."""
    x, kernel, _ = example(2, 6, 7, 3, 3, 3, stride)
    direction = [jnp.asarray(np.random.default_rng(i).normal(size=a.shape), a.dtype) for i, a in enumerate((x, kernel))]

    def products(convolve):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(convolve(jnp.tanh(convolve(x, kernel, (stride,) * 2)), kernel, (stride,) * 2)))

        grad = jax.grad(loss, (0, 1))

        def along(*operands):
            return sum(jnp.vdot(a, b) for a, b in zip(grad(*operands), direction))

        reverse = jax.jit(jax.grad(along, (0, 1)))(x, kernel)
        forward = jax.jvp(grad, (x, kernel), tuple(direction))[1]
        return *reverse, *forward

    for ours, theirs in zip(products(conv.convolution), products(reference)):
        assert_close(ours, theirs, 1e-5)


@needs_native
@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (1, 3)], ids=str)
def test_vmap(in_axes):
    rng = np.random.default_rng(0)
    shapes = [[2, 6, 5, 3], [3, 3, 3, 4]]
    for shape, axis in zip(shapes, in_axes):
        if axis is not None:
            shape.insert(axis, 4)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def gradients(convolve):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(convolve(x, kernel, (2, 2))))

        return jax.vmap(jax.value_and_grad(loss, (0, 1)), in_axes)(x, kernel)

    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), gradients(conv.convolution), gradients(reference))


@needs_native
def test_the_same_sums_every_time():
    x, kernel, gradient = example(5, 30, 20, 16, 48, 3, 1)
    first = conv.kernel_gradient(x, gradient, (1, 1), (3, 3))
    for _ in range(5):
        np.testing.assert_array_equal(first, conv.kernel_gradient(x, gradient, (1, 1), (3, 3)))


@needs_native
def test_not_a_number_stays_one():
    x, kernel, _ = example(1, 4, 4, 2, 2, 3, 1, jnp.bfloat16)
    y = conv.convolution(x.at[0, 0, 0, 0].set(jnp.nan), kernel, (1, 1)).astype(jnp.float32)
    assert np.isnan(y[0, :2, :2]).all()
    assert np.isfinite(y[0, 2:, 2:]).all()


def test_several_devices_split_the_batch_without_gathering_it():
    """With more than one device the choice falls on XLA, which keeps activations where they are."""
    mesh = make_mesh()
    assert mesh.size == 4
    x, kernel, _ = example(8, 12, 16, 4, 8, 3, 1)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(conv.conv2d(x, kernel)))

    step = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(batch_sharding(mesh), replicated(mesh)))
    compiled = step.lower(x, kernel).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text  # of the kernel's gradient
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), step(x, kernel), jax.grad(loss, (0, 1))(x, kernel))


def run_python(code, **environment):
    flags = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | flags, capture_output=True, text=True, timeout=120
    )


CHOICE = """
import logging; logging.basicConfig()
import jax, jax.numpy as jnp
from kmq_jax.nn.conv import conv2d
x, k = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
print("kmq_convolution" in str(jax.make_jaxpr(conv2d)(x, k)), float(conv2d(x, k).sum()))
"""


@needs_native
def test_one_cpu_device_takes_the_native_kernel():
    result = run_python(CHOICE)
    assert result.stdout.split() == ["True", "400.0"], result.stderr


def test_switched_off():
    result = run_python(CHOICE, KMQ_JAX_NATIVE="0")
    assert result.stdout.split() == ["False", "400.0"], result.stderr


@pytest.mark.parametrize("fault", ["compiler", "directory"])
def test_falls_back_and_says_why(fault, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    if fault == "compiler":
        environment["CXX"] = "false"
    else:
        (tmp_path / "kmq_jax").mkdir()
        (tmp_path / "kmq_jax").chmod(0o777)
    result = run_python(CHOICE, **environment)
    assert result.stdout.split() == ["False", "400.0"]
    assert "XLA's own" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("rank", "taps", "stride", "padding", "dilation", "groups"),
    [(1, 5, 1, "valid", 1, 1), (1, 3, 2, "same", 2, 4), (1, 7, 1, "same", 1, 8), (2, (5, 3), (2, 1), "valid", 1, 2)],
)
def test_convolutions_of_any_rank_equal_a_plain_sum(rank, taps, stride, padding, dilation, groups):
    moves = conv.window(rank, taps, stride, padding, dilation, groups)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *(13, 9)[:rank], 8))
    kernel = rng.normal(size=(*moves.taps, 8 // groups, 16))
    found = conv.convolve(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), moves)
    padded = np.pad(x, ((0, 0), *moves.padding, (0, 0)))
    wanted = np.zeros((2, *moves.sizes(x.shape[1:-1]), 16))
    for place in np.ndindex(*wanted.shape[1:-1]):
        for tap in np.ndindex(*moves.taps):
            at = [p * s + t * d for p, s, t, d in zip(place, moves.strides, tap, moves.dilations)]
            inputs = padded[(slice(None), *at)].reshape(2, groups, -1)
            weights = kernel[tap].reshape(8 // groups, groups, -1)
            wanted[(slice(None), *place)] += np.einsum("bgi,igo->bgo", inputs, weights).reshape(2, 16)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_best_library_that_a_processor_can_run(tmp_path):
    levels = prebuilt.LEVELS["x86_64"]
    assert prebuilt.best(tmp_path, "x86_64", levels[0].needs) is None
    for level in levels[1:]:
        (tmp_path / prebuilt.file_name(level)).touch()
    names = ("v4-bf16", "v4-bf16", "v4", "v3", "v1")  # of the best, v4-amx, there is no file
    for have, name in zip((*(level.needs for level in levels[:4]), {"sse2"}), names, strict=True):
        assert prebuilt.best(tmp_path, "x86_64", frozenset(have)).name == f"kernels-x86_64-{name}.so"
    assert prebuilt.best(tmp_path, "riscv64", frozenset()) is None


def test_a_library_that_came_with_the_package_stands_in_for_a_compiler(tmp_path, monkeypatch):
    def no_compiler(directory):
        raise library.Unavailable("there is no C++ compiler")

    monkeypatch.setattr(library, "_build", no_compiler)
    monkeypatch.setattr(library, "DIRECTORY", tmp_path)
    with pytest.raises(library.Unavailable, match="compiler"):
        library._file()
    least = prebuilt.LEVELS[prebuilt.architecture()][-1]
    (tmp_path / prebuilt.file_name(least)).touch()
    assert library._file() == tmp_path / prebuilt.file_name(least)
