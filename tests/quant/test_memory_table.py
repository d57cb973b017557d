"""The memory table of the paper (Odyssey 2026, arXiv 2606.08078), every cell, counted on shapes alone."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kmq_jax import quant

registry = pytest.importorskip("kmq_jax.models.registry")

MIB = 1 << 20
CLASSIFIER = jax.ShapeDtypeStruct((5994, 256), jnp.float32)


@functools.cache
def shapes(name):
    model = registry.build(name)
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 300, 81), jnp.float32))


@functools.cache
def size(name, bits):
    rules = [
        quant.QuantRule("params/.*kernel$", quant.QuantSpec(bits, only_smaller=False)),  # the paper counts all
        # Biases beside quantized kernels are kept in half precision; those of batch normalisation are not.
        quant.QuantRule(r"params/.*(fc\d|attention\d|linear)/bias$", quant.QuantSpec(16)),
    ]
    return quant.size_bytes(quant.quantize_params(shapes(name), rules))


@pytest.mark.parametrize(
    "bits, indices, codebooks, published, total",
    [(4, 7.102, 0.371, 13.535, 7.68), (3, 5.327, 0.186, 11.574, 5.72), (2, 3.551, 0.093, 9.706, 3.85)],
)
def test_resnet36(bits, indices, codebooks, published, total):
    measured = size("resnet36", bits)
    assert round(measured.indices / MIB, 3) == indices
    assert round(measured.codebooks / MIB, 3) == codebooks
    assert round(measured.total / MIB, 2) == total
    with_classifier = measured.total + quant.size_bytes(CLASSIFIER).total
    # The paper divides all bits by 8; here each channel's indices fill whole bytes. Only the stem's 9 weights do not.
    padding = 128 * (-(-9 * bits // 8) - 9 * bits / 8)
    assert measured.indices - padding == 14_894_208 * bits / 8
    assert round((with_classifier - padding) / MIB, 3) == published


@pytest.mark.parametrize("bits, total", [(4, 30.83), (3, 22.91), (2, 15.39)])
def test_resnet200(bits, total):
    assert round(size("resnet200", bits).total / MIB, 2) == total


@pytest.mark.parametrize("name, total, tensors", [("resnet36", 57.0, 53), ("resnet200", 229.0, 259)])
def test_floating_point(name, total, tensors):
    variables = shapes(name)
    assert round(quant.size_bytes(variables).total / MIB, 1) == total
    kernels = [leaf for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim >= 2]
    assert len(kernels) == tensors


@pytest.mark.parametrize(
    "name, weights, channels", [("resnet36", 14_894_208, 12_160), ("resnet200", 59_835_520, 51_200)]
)
def test_counts(name, weights, channels):
    kernels = [leaf for leaf in jax.tree.leaves(shapes(name)["params"]) if leaf.ndim >= 2]
    assert sum(leaf.size for leaf in kernels) == weights
    assert sum(leaf.shape[-1] for leaf in kernels) == channels
