"""Rounding a layer's weights so that its outputs, not the weights themselves, stay near: error feedback.

Weights are rounded one input after the other; what an output loses by rounding one weight is made up for by those
still to come, as far as their inputs are correlated. Centroids are then refitted to the outputs, and the two steps
alternate. All that is needed of the inputs is their second moments.

References: error feedback, Frantar et al., GPTQ: accurate post-training quantization, 2022; with codebooks, van Baalen
et al., GPTVQ, 2024; targets for inputs that are quantized themselves, Li et al., GPTAQ, 2025.
"""

from functools import partial

import jax
import jax.numpy as jnp

_BLOCK = 64
_REFITTED = 16  # centroids; more are near enough to every weight as they are, and cost far more to refit


@jax.jit
def corrected(rows: jax.Array, second: jax.Array, cross: jax.Array, ridge: float = 0.3) -> jax.Array:
    """Weights that give on the inputs x' of a quantized network nearly what `rows` give on the inputs x.

    Args:
        rows: weights `[groups, n]`.
        second: mean of x' x'^T, `[n, n]`.
        cross: mean of x' (x - x')^T, `[n, n]`.
        ridge: how strongly the weights hold to `rows`, relative to the inputs' mean power.

    Returns:
        `[groups, n]`.
    """
    factor = jax.scipy.linalg.cho_factor(_damped(second, ridge))
    return rows + jax.scipy.linalg.cho_solve(factor, cross @ rows.T).T


@partial(jax.jit, static_argnames=("iterations", "free"))
def fit(
    rows: jax.Array,
    codebook: jax.Array,
    second: jax.Array,
    parents: jax.Array | None = None,
    *,
    iterations: int = 2,
    free: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Rounds with feedback, refits the centroids, and so on, and refits them once more in the end.

    Args:
        rows: weights `[groups, n]`.
        codebook: centroids to start from `[groups, cells, parts]`.
        second: second moments of the inputs `[n, n]`.
        parents: the cell of each weight `[groups, n]`, whose parts it may take; None where there is one cell.
        iterations: how often to begin again with refitted centroids.
        free: False keeps the centroids as they are. Above 16 of them they always stay.

    Returns:
        `(codebook [groups, cells, parts], ascending in each cell; indices [groups, n], cell * parts + part, uint8)`.
    """
    cell = jnp.zeros(rows.shape, jnp.int32) if parents is None else parents.astype(jnp.int32)
    count = codebook.shape[1] * codebook.shape[2]
    if not free or count > _REFITTED:
        part = _round(rows, codebook, second, cell)
        return codebook, (cell * codebook.shape[2] + part).astype(jnp.uint8)

    def again(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codebook = state[0]
        index = cell * codebook.shape[2] + _round(rows, codebook, second, cell)
        codebook = _refit(rows, index, codebook.reshape(-1, count), second).reshape(codebook.shape)
        order = jnp.argsort(codebook, axis=-1)
        rank = jnp.argsort(order, axis=-1) + codebook.shape[2] * jnp.arange(codebook.shape[1])[None, :, None]
        index = jnp.take_along_axis(rank.reshape(-1, count), index, axis=1)
        return jnp.take_along_axis(codebook, order, axis=-1), index

    codebook, index = jax.lax.fori_loop(0, iterations + 1, again, (codebook, jnp.zeros_like(cell)))
    return codebook, index.astype(jnp.uint8)


def _damped(second: jax.Array, share: float) -> jax.Array:
    """Second moments with a share of their mean power added to each; of inputs that are all zero, the identity."""
    power = jnp.mean(jnp.diag(second))
    return second + jnp.where(power > 0, share * power, 1.0) * jnp.eye(second.shape[0])


def _round(
    rows: jax.Array, codebook: jax.Array, second: jax.Array, cell: jax.Array, damping: float = 0.01
) -> jax.Array:
    """The part `[groups, n]` that each weight takes of its cell. Inputs of the most power are rounded first.

    With the inverse of the second moments U^T U, U upper triangular, rounding weight j leaves the error e_j = (w_j -
    q_j) / U_jj, which the later weights take on as -e_j U_j. They do within a block at once, and beyond it by a matrix
    product when the block is done.
    """
    n = rows.shape[1]
    order = jnp.argsort(-jnp.diag(second))
    moments = _damped(second, damping)[order][:, order]
    lower = jnp.linalg.cholesky(moments[::-1, ::-1])
    upper = jax.scipy.linalg.solve_triangular(lower, jnp.eye(n), lower=True)[::-1, ::-1]
    pad = -n % _BLOCK
    upper = jnp.pad(upper, (0, pad)) + jnp.diag((jnp.arange(n + pad) >= n).astype(jnp.float32))
    rows, cell = (jnp.pad(x[:, order], ((0, 0), (0, pad))) for x in (rows, cell))
    place = jnp.arange(n + pad)

    def block(i: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, taken = state
        begin = i * _BLOCK
        inner = jax.lax.dynamic_slice(upper, (begin, begin), (_BLOCK, _BLOCK))

        def column(j: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            weights, taken, errors = state
            choices = jnp.take_along_axis(codebook, cell[:, begin + j].reshape(-1, 1, 1), axis=1)[:, 0]
            chosen = jnp.argmin(jnp.abs(weights[:, j, None] - choices), axis=-1)
            value = jnp.take_along_axis(choices, chosen[:, None], axis=1)[:, 0]
            error = (weights[:, j] - value) / inner[j, j]
            later = jnp.where(jnp.arange(_BLOCK) > j, inner[j], 0.0)
            return (
                weights - error[:, None] * later[None],
                taken.at[:, begin + j].set(chosen),
                errors.at[:, j].set(error),
            )

        weights = jax.lax.dynamic_slice(rows, (0, begin), (rows.shape[0], _BLOCK))
        _, taken, errors = jax.lax.fori_loop(0, _BLOCK, column, (weights, taken, jnp.zeros_like(weights)))
        across = jax.lax.dynamic_slice(upper, (begin, 0), (_BLOCK, n + pad))
        return rows - errors @ jnp.where(place[None] >= begin + _BLOCK, across, 0.0), taken

    taken = jnp.zeros(rows.shape, jnp.int32)
    _, taken = jax.lax.fori_loop(0, (n + pad) // _BLOCK, block, (rows, taken))
    return jnp.zeros((rows.shape[0], n), jnp.int32).at[:, order].set(taken[:, :n])


def _refit(rows: jax.Array, index: jax.Array, codebook: jax.Array, second: jax.Array) -> jax.Array:
    """The centroids `[groups, K]` of least squared error of the outputs; those without members stay."""
    k = codebook.shape[1]

    def one(row: jax.Array, index: jax.Array, centroids: jax.Array) -> jax.Array:
        member = jax.nn.one_hot(index, k)
        spread = second @ member
        power = member.T @ spread
        hold = jnp.where(jnp.trace(power) > 0, 1e-4 * jnp.trace(power) / k, 1.0)
        return jnp.linalg.solve(power + hold * jnp.eye(k), spread.T @ row + hold * centroids)

    return jax.lax.map(lambda group: one(*group), (rows, index, codebook))
