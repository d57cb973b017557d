"""Level sets of a fixed pattern: against brute force, and beside k-means."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.quant import gptq
from kmq_jax.quant.levels import basis, fit_levels

ROWS = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32) + 0.3


def squared_error(rows, books):
    """Of the nearest level, without the code under test."""
    return ((rows[:, :, None] - np.asarray(books)[:, None, :]) ** 2).min(axis=2).sum(axis=1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_patterns(bits):
    books = {levels: np.asarray(fit_levels(ROWS, levels, bits)) for levels in ("uniform", "minmax", "powers")}
    for book in books.values():
        assert book.shape == (3, 2**bits) and (np.diff(book) > 0).all()
    for name in ("uniform", "minmax"):
        np.testing.assert_allclose(np.diff(books[name], 2), 0, atol=1e-5)
    np.testing.assert_allclose(books["minmax"][:, [0, -1]], np.stack([ROWS.min(1), ROWS.max(1)], 1), rtol=1e-6)
    positive = books["powers"][:, 2 ** (bits - 1) :]
    np.testing.assert_allclose(books["powers"], -books["powers"][:, ::-1], rtol=1e-6)
    np.testing.assert_allclose(positive[:, 1:] / positive[:, :-1], 2, rtol=1e-5)


@pytest.mark.parametrize("levels", ["uniform", "powers"])
def test_the_fit_is_near_the_best_of_a_grid(levels):
    book = fit_levels(ROWS, levels, 2)
    pattern = np.asarray(basis(levels, 2))[:, -1]
    offsets = np.linspace(-1, 1, 81) if levels == "uniform" else [0.0]
    grid = [o + s * pattern for o, s in itertools.product(offsets, np.linspace(0.2, 3, 141))]
    best = np.min([squared_error(ROWS, np.broadcast_to(one, (3, 4))) for one in grid], axis=0)
    found = squared_error(ROWS, book)
    assert (found <= 1.15 * best).all()  # a local optimum, as Lloyd's is
    assert (found <= squared_error(ROWS, fit_levels(ROWS, levels, 2, iterations=0)) + 1e-5).all()


def test_k_means_is_never_worse():
    best = squared_error(ROWS, quant.kmeans(ROWS, 4))
    for levels in ("uniform", "minmax", "powers"):
        assert (best <= squared_error(ROWS, fit_levels(ROWS, levels, 2)) + 1e-5).all()


def test_weights_count():
    rows = jnp.array([[0.0, 1.0, 10.0]])
    heavy = fit_levels(rows, "uniform", 1, jnp.array([[1.0, 1.0, 1e3]]))
    np.testing.assert_allclose(heavy, [[0.5, 10.0]], rtol=1e-2)
    tiny = fit_levels(rows, "uniform", 1, jnp.array([[1e-33, 1e-33, 1e-30]]))
    np.testing.assert_allclose(tiny, heavy, rtol=1e-2)


def test_error_feedback_keeps_the_pattern_and_does_better_than_the_nearest_level():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((200, 40)) @ rng.standard_normal((40, 40)) * 0.3
    moments = jnp.asarray(x.T @ x / len(x), jnp.float32)
    for levels in ("uniform", "powers"):
        known, book = basis(levels, 2), fit_levels(ROWS, levels, 2)
        fitted, index = gptq.fit(jnp.asarray(ROWS), book[:, None], moments, basis=known)
        rebuilt = known @ jnp.linalg.lstsq(known, fitted[:, 0].T)[0]
        np.testing.assert_allclose(rebuilt.T, fitted[:, 0], atol=1e-5)

        def outputs_error(values):
            difference = ROWS - np.asarray(values)
            return np.einsum("gi,ij,gj->g", difference, np.asarray(moments), difference)

        nearest = np.take_along_axis(
            np.asarray(book), np.abs(ROWS[:, :, None] - np.asarray(book)[:, None]).argmin(axis=2), 1
        )
        chosen = np.take_along_axis(np.asarray(fitted[:, 0]), np.asarray(index).astype(int), 1)
        assert (outputs_error(chosen) < outputs_error(nearest)).all()


def test_trees():
    params = {"kernel": jnp.asarray(ROWS.T)}
    spec = quant.QuantSpec(2, levels="uniform", codebook_dtype="float32")
    packed = quant.quantize_params(params, spec)
    np.testing.assert_allclose(packed["kernel"].codebook, fit_levels(ROWS, "uniform", 2), rtol=1e-6)
    latents, books = quant.init_codebooks(params, spec)
    made = quant.fake_quantize(latents, books)["kernel"]
    np.testing.assert_allclose(made, packed["kernel"].dequantize(), atol=1e-5)
    gradient = jax.grad(lambda b: jnp.sum(quant.fake_quantize(latents, b)["kernel"] ** 2))(books)
    assert float(jnp.abs(gradient["kernel"].raw_scale).min()) > 0  # the scale is learned


def test_mistakes():
    with pytest.raises(UserError, match="levels .='log'. must be one of kmeans, uniform, minmax, powers"):
        quant.QuantSpec(2, levels="log")
    for other in ({"coarse": (1,)}, {"symmetric": True}, {"pinned_zero": True}):
        with pytest.raises(UserError, match="cannot be nested"):
            quant.QuantSpec(2, levels="powers", **other)


@pytest.mark.parametrize("levels", ["uniform", "powers"])
@pytest.mark.parametrize("unit", [2.0**66, 2.0**-83])
def test_weights_may_have_any_magnitude(levels, unit):
    weights = np.stack([ROWS[0] * np.float32(unit), ROWS[1]])
    found = np.asarray(fit_levels(weights, levels, 2)) / np.float32([[unit], [1]])
    np.testing.assert_allclose(found, fit_levels(ROWS[:2], levels, 2), rtol=1e-5)
