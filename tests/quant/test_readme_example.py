"""The README's five lines, on models that are not speaker networks."""

import flax.linen as nn
import jax
import numpy as np

import kmq_jax.quant


def test_mlp_in_five_lines():
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))

    model, x = MLP(), np.random.default_rng(0).standard_normal((32, 20)).astype(np.float32)
    params = model.init(jax.random.key(0), x)
    quantized = kmq_jax.quant.quantize(params, kmq_jax.quant.QuantSpec(bits=4))  # every kernel, a codebook a channel
    y = model.apply(kmq_jax.quant.dequantize(quantized), x)
    ratio = kmq_jax.quant.size_bytes(params).total / kmq_jax.quant.size_bytes(quantized).total
    exact = np.asarray(model.apply(params, x))
    assert np.linalg.norm(y - exact) < 0.15 * np.linalg.norm(exact)
    assert ratio > 1.5  # tiny layers: codebooks are as large as indices


def test_plain_tree():
    weights = {"in": np.random.default_rng(0).standard_normal((512, 16)).astype(np.float32), "scales": [np.ones(16)]}
    rules = [kmq_jax.quant.QuantRule("in", kmq_jax.quant.QuantSpec(bits=2))]
    restored = kmq_jax.quant.dequantize(kmq_jax.quant.quantize(weights, rules))
    assert all(len(np.unique(column)) == 4 for column in restored["in"].T)
