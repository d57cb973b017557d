import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax.quant import gptq


def inputs_of(n, count, seed=0):
    """Correlated inputs `[count, n]`, some of far more power than others."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(n, n)) * np.exp(rng.normal(size=n))[None]
    return (rng.normal(size=(count, n)) @ mixing).astype(np.float32)


def case(n=100, groups=6, k=4, seed=0):
    """Weights, ascending codebooks and second moments of inputs."""
    rng = np.random.default_rng(seed + 1)
    x = inputs_of(n, 4 * n, seed)
    book = np.sort(rng.normal(size=(groups, k)), axis=1).astype(np.float32)
    return rng.normal(size=(groups, n)).astype(np.float32), book, (x.T @ x / len(x)).astype(np.float32)


def output_error(rows, values, second):
    """Mean squared error of the outputs, over all groups."""
    off = np.asarray(rows, np.float64) - np.asarray(values, np.float64)
    return np.mean(np.sum((off @ second) * off, axis=1))


def nearest(rows, book):
    return np.argmin(np.abs(rows[:, :, None] - book[:, None]), axis=-1)


def values_of(book, index):
    return np.take_along_axis(np.asarray(book).reshape(len(index), -1), np.asarray(index, np.int64), axis=1)


def rounded_by_definition(rows, book, second, damping=0.01):
    """One input after the other: each error is spread over those to come by a linear regression on all of them.

    With what is left of the inputs to come, the best answer to an error of one weight is -H_rr^-1 H_rj, which needs
    no Cholesky factor and no order of updates.
    """
    rows, second = rows.astype(np.float64), second.astype(np.float64)
    order = np.argsort(-np.diag(second), kind="stable")
    moments = second + damping * np.mean(np.diag(second)) * np.eye(len(second))
    index = np.zeros(rows.shape, np.int64)
    for g, row in enumerate(rows.copy()):
        for place, j in enumerate(order):
            index[g, j] = np.argmin(np.abs(row[j] - book[g]))
            error, rest = row[j] - book[g, index[g, j]], order[place + 1 :]
            row[rest] += error * np.linalg.solve(moments[np.ix_(rest, rest)], moments[rest, j])
    return index


def test_rounding_is_the_regression_of_the_definition():
    rows, book, second = case(n=130)  # more than two blocks, the last not full
    found, index = gptq.fit(rows, book[:, None], second, free=False)
    np.testing.assert_array_equal(found, book[:, None])
    assert index.dtype == jnp.uint8
    assert np.mean(np.asarray(index) != rounded_by_definition(rows, book, second)) < 0.01


@pytest.mark.parametrize("k", [2, 4, 16, 64])
def test_outputs_are_nearer_than_with_the_nearest_centroids(k):
    rows, book, second = case(k=k)
    plain = output_error(rows, values_of(book, nearest(rows, book)), second)
    found, index = gptq.fit(rows, book[:, None], second)
    assert output_error(rows, values_of(found, index), second) < 0.6 * plain
    assert found.shape == (6, 1, k)
    assert np.all(np.diff(np.asarray(found), axis=-1) >= 0)


def test_centroids_are_the_best_for_the_outputs():
    """No change of a centroid that has members lowers the error: the gradient vanishes."""
    rows, book, second = case()
    found, index = gptq.fit(rows, book[:, None], second)

    def error(book):
        off = jnp.take_along_axis(book[:, 0], index.astype(jnp.int32), axis=1) - rows
        return jnp.sum((off @ second) * off)

    scale = float(error(jnp.zeros_like(found)))
    assert np.max(np.abs(jax.grad(error)(found))) < 2e-3 * scale
    assert np.max(np.abs(jax.grad(error)(jnp.asarray(book[:, None])))) > 1e-2 * scale


def test_weights_stay_in_the_cells_that_they_are_given():
    rows, book, second = case(k=8)
    cells = np.random.default_rng(3).integers(0, 4, rows.shape).astype(np.uint8)
    found, index = gptq.fit(rows, book.reshape(6, 4, 2), second, cells)
    np.testing.assert_array_equal(np.asarray(index) >> 1, cells)
    assert found.shape == (6, 4, 2)
    assert np.all(np.diff(np.asarray(found), axis=-1) >= 0)


def test_inputs_without_correlation_are_rounded_to_the_nearest():
    rows, book, _ = case()
    second = np.diag(np.random.default_rng(1).uniform(1, 2, rows.shape[1])).astype(np.float32)
    _, index = gptq.fit(rows, book[:, None], second, free=False)
    np.testing.assert_array_equal(index, nearest(rows, book))


def test_a_layer_that_is_given_nothing_is_rounded_to_the_nearest():
    rows, book, second = case()
    found, index = gptq.fit(rows, book[:, None], np.zeros_like(second))
    np.testing.assert_array_equal(index, nearest(rows, book))
    np.testing.assert_allclose(found[:, 0], book, rtol=1e-5)
    np.testing.assert_array_equal(gptq.corrected(rows, np.zeros_like(second), np.zeros_like(second)), rows)


def test_corrected_weights_are_a_ridge_regression():
    """Of the reference's outputs on the quantized network's inputs, held to the weights."""
    rows, _, _ = case(n=20)
    x = inputs_of(20, 200)
    own = x + 0.5 * inputs_of(20, 200, seed=5)
    second, cross = own.T @ own / 200, own.T @ (x - own) / 200
    found = gptq.corrected(rows, second, cross, ridge=0.3)
    hold = np.sqrt(0.3 * np.mean(np.diag(second)) * 200)
    problem = np.concatenate([own, hold * np.eye(20)])
    target = np.concatenate([x @ rows.T, hold * rows.T])
    expected = np.linalg.lstsq(problem, target, rcond=None)[0].T
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(gptq.corrected(rows, second, np.zeros_like(cross)), rows, rtol=1e-6)
