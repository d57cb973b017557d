"""Level sets with a fixed pattern: uniform levels, powers of two. k-means is free to put every level where it likes.

A group's levels are `offset + scale * pattern`, or `scale * pattern`: a linear map of one or two numbers, its *basis*.
Where k-means refits every centroid by the mean of its members, here the map is refitted by least squares.

References:
    Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, 2018
    (uniform, by the least and greatest weight). Esser et al., Learned step size quantization, 2020 (uniform, the scale
    learned). Li et al., Lightweight speaker verification by uniform and powers-of-two quantization, 2210.17326, 2022.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kmq_jax.quant.codes import assign, lookup
from kmq_jax.quant.kmeans import in_range, midpoints, scaled

LEVELS = ("kmeans", "uniform", "minmax", "powers")
"""Free centroids; uniform levels, their scale and offset fitted; uniform from the least to the greatest weight; powers
of two of both signs, their scale fitted."""


def basis(levels: str, bits: int) -> jax.Array | None:
    """The basis of a level set, `[2^bits, 1 or 2]`, levels ascending: a group's levels are a linear map of it.

    It is None where levels are free.

    >>> basis("powers", 2).ravel().tolist()
    [-1.0, -0.5, 0.5, 1.0]
    >>> basis("uniform", 1).tolist()
    [[1.0, -1.0], [1.0, 1.0]]
    """
    count = 1 << bits
    if levels == "powers":
        positive = 2.0 ** jnp.arange(1 - count // 2, 1)
        return jnp.concatenate([-positive[::-1], positive])[:, None]
    if levels in ("uniform", "minmax"):
        return jnp.stack([jnp.ones(count), jnp.linspace(-1.0, 1.0, count)], axis=1)
    return None


def fit_levels(
    rows: jax.Array, levels: str, bits: int, weights: jax.Array | None = None, iterations: int = 60
) -> jax.Array:
    """Fits the levels of each group: assignment and least squares in turns.

    Of three starts the best is kept: the whole range of the weights, 0.7 of it, and 0.45 of it. Outside jit weights may
    have any magnitude; inside it their squares must fit float32.

    Args:
        rows: weights `[groups, n]`.
        levels: one of `LEVELS` but "kmeans"; of "minmax" nothing is fitted.
        bits: of an index.
        weights: of the squared error, `[groups, n]`.
        iterations: of the fit.

    Returns:
        `[groups, 2^bits]`, ascending.

    >>> fit_levels(jnp.array([[0.0, 1.0, 2.0, 3.0]]), "uniform", 1).round(3).tolist()
    [[0.5, 2.5]]
    >>> fit_levels(jnp.array([[-4.0, -2.0, 2.0, 4.0]]), "powers", 2).round(3).tolist()
    [[-4.0, -2.0, 2.0, 4.0]]
    """
    # The least and the greatest of each group tell its magnitude.
    _, scale = scaled(jnp.stack([jnp.min(rows, axis=1), jnp.max(rows, axis=1)], axis=1))
    if scale is None:
        return _fit(rows, levels, bits, weights, iterations)
    return _fit(rows * scale, levels, bits, weights, iterations) / scale


@partial(jax.jit, static_argnames=("levels", "bits", "iterations"))
def _fit(rows: jax.Array, levels: str, bits: int, weights: jax.Array | None, iterations: int) -> jax.Array:
    rows = jnp.asarray(rows, jnp.float32)
    weights = jnp.ones_like(rows) if weights is None else in_range(weights)
    known = basis(levels, bits)
    assert known is not None
    low, high = jnp.min(rows, axis=1), jnp.max(rows, axis=1)
    # theta, what a group's levels are made of: (offset, scale), or the scale alone.
    if levels == "powers":
        offset, scale = [], jnp.maximum(jnp.abs(low), jnp.abs(high))
    else:
        offset, scale = [0.5 * (low + high)], 0.5 * (high - low)
    if levels == "minmax":
        return jnp.stack([*offset, scale], axis=1) @ known.T

    def again(_: int, theta: jax.Array) -> jax.Array:
        chosen = known[assign(rows, midpoints(theta @ known.T), 0)]  # [groups, n, d]
        power = jnp.einsum("gnd,gn,gne->gde", chosen, weights, chosen)
        one = jnp.eye(known.shape[1])[None]
        # A weak pull towards theta, for groups whose members do not determine it; 1e-30 where there is nothing else.
        hold = 1e-6 * jnp.trace(power, axis1=1, axis2=2)[:, None, None] * one
        wanted = jnp.einsum("gnd,gn->gd", chosen, weights * rows)[..., None] + hold @ theta[..., None]
        solved = jnp.linalg.solve(power + hold + 1e-30 * one, wanted)[..., 0]
        # A scale that is not positive would turn the order of the levels around.
        return jnp.where(solved[:, -1:] > 0, solved, theta)

    books, errors = [], []
    for share in (1.0, 0.7, 0.45):
        theta = jnp.stack([*offset, share * scale], axis=1)
        book = jax.lax.fori_loop(0, iterations, again, theta) @ known.T
        books.append(book)
        errors.append(jnp.sum(weights * jnp.square(rows - lookup(assign(rows, midpoints(book), 0), book, 0)), axis=1))
    best = jnp.argmin(jnp.stack(errors), axis=0)
    return jnp.take_along_axis(jnp.stack(books), best[None, :, None], axis=0)[0]
