import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.quant import QuantSpec
from kmq_jax.quant.nested import split_kmeans, thresholds

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.standard_normal((1000, 4)).astype(np.float32), "v": RNG.laplace(size=(1000, 3)).astype(np.float32)}
NESTED = QuantSpec(4, coarse=(2, 3))


def error(a, b):
    return float(np.mean((np.asarray(a) - np.asarray(b)) ** 2))


def test_one_file_serves_every_width_nearly_as_well():
    result = quant.quantize_params(PARAMS, NESTED)
    for bits, slack in ((2, 1.1), (3, 1.12), (4, 1.15)):
        alone = quant.dequantize_params(quant.quantize_params(PARAMS, QuantSpec(bits)))
        nested = quant.dequantize_params(result, bits=bits)
        for name, values in PARAMS.items():
            assert error(nested[name], values) <= slack * error(alone[name], values), (name, bits)


def test_size_is_that_of_the_widest_and_the_small_codebooks():
    alone, nested = (quant.size_bytes(quant.quantize_params(PARAMS, spec)) for spec in (QuantSpec(4), NESTED))
    assert nested.indices == alone.indices
    assert nested.codebooks == alone.codebooks + 7 * (4 + 8) * 2


def test_smaller_widths_are_prefixes():
    tensor = quant.quantize_params(PARAMS, NESTED)["w"]
    four, two = quant.indices_of(tensor), quant.indices_of(tensor, 2)
    np.testing.assert_array_equal(two, four >> 2)
    book = np.asarray(tensor.coarse[0], np.float32)
    expected = book[np.arange(4)[None, :], np.asarray(four) >> 2]
    np.testing.assert_array_equal(quant.dequantize_params({"w": tensor}, bits=2)["w"], expected)


def test_thresholds_by_hand():
    # One width: midpoints. Two: the border that 1 and 2 bits share balances both, errors weighed 4 to 16.
    fine, coarse = jnp.array([[0.0, 1.0, 2.0, 5.0]]), jnp.array([[0.5, 4.0]])
    np.testing.assert_allclose(thresholds((fine,)), [[0.5, 1.5, 3.5]])
    shared = (4 * (4.0**2 - 0.5**2) + 16 * (2.0**2 - 1.0**2)) / (2 * (4 * 3.5 + 16 * 1.0))
    np.testing.assert_allclose(thresholds((coarse, fine)), [[0.5, shared, 3.5]], rtol=1e-6)


def test_unknown_width():
    result = quant.quantize_params(PARAMS, NESTED)
    with pytest.raises(UserError, match="5 bits: there is 2, 3, 4"):
        quant.dequantize_params(result, bits=5)


def test_training_shares_latents_between_widths():
    latents, books = quant.init_codebooks(PARAMS, NESTED)
    stored = quant.pack(latents, books)
    for bits in (2, 3, 4):
        found = jax.jit(lambda p, b, bits=bits: quant.fake_quantize(p, b, bits=bits))(latents, books)
        jax.tree.map(np.testing.assert_array_equal, found, quant.dequantize_params(stored, bits=bits))

    def loss(state):
        return sum(jnp.sum(quant.fake_quantize(*state, bits=b)["w"] ** 2) for b in (2, 3, 4))

    gradient, of_books = jax.grad(loss)((latents, books))
    assert np.all(np.abs(gradient["w"]) > 0)
    assert all(np.any(np.asarray(x) != 0) for x in (*of_books["w"].coarse, of_books["w"].centroids))
    moved = quant.lloyd_update(latents, books, rate=0.5)
    assert [c.shape for c in moved["w"].coarse] == [(4, 4), (4, 8)]


def test_cells_are_split_each_on_its_own():
    # Cells that overlap: 0 holds 0, 1, 10, 11 and cell 2 holds 5, 7; 1 and 3 are empty.
    values = np.array([[0.0, 5.0, 1.0, 10.0, 7.0, 11.0]], np.float32)
    cells, narrow = np.array([[0, 2, 0, 0, 2, 0]]), np.array([[3.0, -1.0, 6.0, 9.0]], np.float32)
    three, four = split_kmeans(values, cells, narrow, (3, 4))
    np.testing.assert_allclose(three, [[0.5, 10.5, -1, -1, 5, 7, 9, 9]])
    np.testing.assert_allclose(four[0, :4], [0, 1, 10, 11])
    assert {5.0, 7.0} <= set(np.asarray(four[0, 8:12]))  # the other two have no members
    np.testing.assert_allclose(jax.jit(split_kmeans, static_argnums=3)(values, cells, narrow, (3,))[0], three)


def grown(dtype="float16"):
    """A network whose narrow codebooks were moved, as by training, and what grows from it."""
    narrow = quant.quantize_params(PARAMS, QuantSpec(2, codebook_dtype=dtype))
    moved = {
        name: dataclasses.replace(t, codebook=t.codebook[:, ::-1] * np.array(1.3, dtype)) for name, t in narrow.items()
    }
    return moved, *quant.grow_codebooks(PARAMS, moved, NESTED)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_growing_keeps_the_narrow_network_however_latents_move(dtype):
    narrow, latents, books = grown(dtype)
    for shift in (0.0, 0.7):
        stored = quant.pack(jax.tree.map(lambda x, s=shift: x + s, latents), books)
        for name, tensor in stored.items():
            np.testing.assert_array_equal(quant.indices_of(tensor, 2), quant.indices_of(narrow[name]))
            # In half precision exactly; in single, a value divided by the scale and multiplied again may round.
            tolerance = 0 if dtype == "float16" else 3e-7
            np.testing.assert_allclose(tensor.coarse[0], narrow[name].codebook, rtol=tolerance)


def test_wider_widths_are_nearest_within_the_cell():
    narrow, latents, books = grown()
    stored = quant.pack(latents, books)
    for name, tensor in stored.items():
        cell = np.asarray(quant.indices_of(narrow[name]))
        for bits, slack in ((3, 1.12), (4, 1.02)):  # 4 bits decide borders that both share
            parts = 1 << (bits - 2)
            choices = np.asarray(tensor.codebook_of(bits), np.float32).reshape(-1, 4, parts)
            channel = np.arange(choices.shape[0])[None, :]
            least = np.min(np.abs(choices[channel, cell] - PARAMS[name][..., None]), -1)
            found = quant.dequantize_params({"w": tensor}, bits=bits)["w"]
            assert error(found, PARAMS[name]) <= slack * np.mean(least**2)
            assert error(found, PARAMS[name]) < error(quant.dequantize_params(narrow)[name], PARAMS[name]) / 3
            trained = jax.jit(lambda p, b, bits=bits: quant.fake_quantize(p, b, bits=bits))(latents, books)
            np.testing.assert_array_equal(trained[name], found)


def test_centroids_of_a_cell_stay_in_it():
    _, latents, books = grown()
    book = books["w"]
    moved = dataclasses.replace(book, centroids=book.centroids + 5 * RNG.standard_normal(book.centroids.shape))
    for before, after in zip((*moved.coarse, moved.centroids), moved.constrained()):
        cells = [np.asarray(x).reshape(4, 4, -1) for x in (before, after)]
        np.testing.assert_array_equal(np.sort(cells[0], -1), cells[1])


def test_growing_from_another_network():
    narrow = quant.quantize_params(PARAMS, QuantSpec(3))
    with pytest.raises(UserError, match=r"v: the coarse network must hold it at the fewest of \(2, 3, 4\) bits"):
        quant.grow_codebooks(PARAMS, narrow, NESTED)
    for bad in ({"v": narrow["v"]}, PARAMS, {**PARAMS, "v": quant.quantize_params(PARAMS, QuantSpec(2))["w"]}):
        with pytest.raises(UserError, match="coarse network"):
            quant.grow_codebooks(PARAMS, bad, NESTED)


def test_grown_codebooks_keep_what_the_narrow_network_gave_them():
    narrow, latents, books = grown()
    moved = jax.tree.map(lambda x: 1.5 * x, latents)
    wide = quant.fake_quantize(moved, books)
    again = quant.reassign(moved, books)
    jax.tree.map(np.testing.assert_array_equal, quant.fake_quantize(moved, again), wide)
    updated = quant.lloyd_update(moved, books, rate=1.0)
    found = quant.fake_quantize(moved, updated, bits=2)
    jax.tree.map(np.testing.assert_array_equal, found, quant.dequantize_params(narrow))
    assert np.any(updated["w"].centroids != books["w"].centroids)


def test_what_cannot_be_nested_is_refused():
    for shape in ((1, 0), (0, 4), ()):
        with pytest.raises(UserError, match="no values"):
            quant.nested_kmeans(np.zeros(shape, np.float32), (1, 2))
    with pytest.raises(UserError, match=r"shape \(4,\), not \[groups, n\]"):
        quant.nested_kmeans(np.zeros(4, np.float32), (1, 2))
    for bits in ((2, 1), (2, 2), (0, 2), ()):
        with pytest.raises(UserError, match="all_bits .* must be 1 or more, and ascend"):
            quant.nested_kmeans(np.ones((1, 4), np.float32), bits)
    latents, books = quant.init_codebooks(PARAMS, NESTED)
    with pytest.raises(UserError, match="no codebook has 7 bits"):
        quant.fake_quantize(latents, books, bits=np.int64(7))
    found = quant.fake_quantize(latents, books, bits=np.int64(2))
    jax.tree.map(np.testing.assert_array_equal, found, quant.fake_quantize(latents, books, bits=2))
