"""Packing against arithmetic on Python's integers."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmq_jax.quant import pack_bits, unpack_bits

shapes = st.tuples(st.sampled_from([1, 3]), st.integers(1, 41))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), shapes, st.integers(0, 2**32 - 1))
def test_bit_exact(bits, shape, seed):
    indices = np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(np.uint8)
    packed = np.asarray(pack_bits(indices, bits))
    assert packed.dtype == np.uint8 and packed.shape == (shape[0], -(-shape[1] * bits // 8))
    for row, codes in zip(packed, indices):
        stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
        assert int.from_bytes(row.tobytes(), "little") == stream
    np.testing.assert_array_equal(unpack_bits(packed, bits, shape[1]), indices)


@pytest.mark.parametrize("bits", range(1, 9))
def test_inside_jit(bits):
    indices = np.random.default_rng(bits).integers(0, 1 << bits, (2, 5, 19)).astype(np.uint8)
    there_and_back = jax.jit(lambda x: unpack_bits(pack_bits(x, bits), bits, 19))
    np.testing.assert_array_equal(there_and_back(indices), indices)
