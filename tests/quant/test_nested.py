import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.quant import QuantSpec
from kmq_jax.quant.nested import thresholds

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.standard_normal((1000, 4)).astype(np.float32), "v": RNG.laplace(size=(1000, 3)).astype(np.float32)}
NESTED = QuantSpec(4, coarse=(2, 3))


def error(a, b):
    return float(np.mean((np.asarray(a) - np.asarray(b)) ** 2))


def test_one_file_serves_every_width_nearly_as_well():
    result = quant.quantize(PARAMS, NESTED)
    for bits, slack in ((2, 1.1), (3, 1.12), (4, 1.15)):
        alone = quant.dequantize(quant.quantize(PARAMS, QuantSpec(bits)))
        nested = quant.dequantize(result, bits=bits)
        for name, values in PARAMS.items():
            assert error(nested[name], values) <= slack * error(alone[name], values), (name, bits)


def test_size_is_that_of_the_widest_and_the_small_codebooks():
    alone, nested = (quant.size_bytes(quant.quantize(PARAMS, spec)) for spec in (QuantSpec(4), NESTED))
    assert nested.indices == alone.indices
    assert nested.codebooks == alone.codebooks + 7 * (4 + 8) * 2


def test_smaller_widths_are_prefixes():
    tensor = quant.quantize(PARAMS, NESTED)["w"]
    four, two = quant.indices_of(tensor), quant.indices_of(tensor, 2)
    np.testing.assert_array_equal(two, four >> 2)
    book = np.asarray(tensor.coarse[0], np.float32)
    expected = book[np.arange(4)[None, :], np.asarray(four) >> 2]
    np.testing.assert_array_equal(quant.dequantize({"w": tensor}, bits=2)["w"], expected)


def test_thresholds_by_hand():
    # One width: midpoints. Two: the border that 1 and 2 bits share balances both, errors weighed 4 to 16.
    fine, coarse = jnp.array([[0.0, 1.0, 2.0, 5.0]]), jnp.array([[0.5, 4.0]])
    np.testing.assert_allclose(thresholds((fine,)), [[0.5, 1.5, 3.5]])
    shared = (4 * (4.0**2 - 0.5**2) + 16 * (2.0**2 - 1.0**2)) / (2 * (4 * 3.5 + 16 * 1.0))
    np.testing.assert_allclose(thresholds((coarse, fine)), [[0.5, shared, 3.5]], rtol=1e-6)


def test_unknown_width():
    result = quant.quantize(PARAMS, NESTED)
    with pytest.raises(UserError, match="5 bits: there is 2, 3, 4"):
        quant.dequantize(result, bits=5)


def test_training_shares_latents_between_widths():
    latents, books = quant.init_codebooks(PARAMS, NESTED)
    stored = quant.export(latents, books)
    for bits in (2, 3, 4):
        found = jax.jit(lambda p, b, bits=bits: quant.fake_quantize(p, b, bits=bits))(latents, books)
        jax.tree.map(np.testing.assert_array_equal, found, quant.dequantize(stored, bits=bits))

    def loss(state):
        return sum(jnp.sum(quant.fake_quantize(*state, bits=b)["w"] ** 2) for b in (2, 3, 4))

    gradient, of_books = jax.grad(loss)((latents, books))
    assert np.all(np.abs(gradient["w"]) > 0)
    assert all(np.any(np.asarray(x) != 0) for x in (*of_books["w"].coarse, of_books["w"].centroids))
    moved = quant.lloyd_update(latents, books, rate=0.5)
    assert [c.shape for c in moved["w"].coarse] == [(4, 4), (4, 8)]
