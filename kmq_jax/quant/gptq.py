"""GPTQ with codebooks: rounds weights so that the error of a layer's outputs is small, not that of the weights.

Symbols are GPTQ's. `W` `[groups, n]` are weights, a row for each output. `Q` are their rounded values. `H` `[n, n]` are
the second moments E[x x^T] of the layer's inputs x, GPTQ's Hessian up to a factor: all that is needed of the inputs.

References:
    Frantar et al., GPTQ: accurate post-training quantization, 2022 (error feedback).
    van Baalen et al., GPTVQ, 2024 (with codebooks).
    Li et al., GPTAQ, 2025 (targets for inputs that are quantized themselves).
"""

from functools import partial

import jax
import jax.numpy as jnp

_BLOCK = 64  # inputs whose errors are passed on to all later inputs at once, by one matrix product
_FINE = 512  # up to so many inputs, inputs and outputs are padded to whole blocks; above it only inputs, to four
_MANY = 8  # outputs are padded from so many on; a depthwise convolution is fitted one output at a time
_TURNS = 3  # of rounding and refitting
_DAMPING = 0.01  # GPTQ's share of the inputs' mean power
_REFITTED = 16  # centroids that are refitted, at most; of more, one is near every weight, and refitting costs far more


@jax.jit
def corrected(W: jax.Array, H: jax.Array, cross: jax.Array, ridge: float = 0.3) -> jax.Array:
    """Changes weights so that on the inputs x' of a quantized network they give nearly what `W` gives on the inputs x.

    Ridge regression on the outputs: W + W cross^T (H + ridge)^-1. The target is that of GPTAQ.

    Args:
        W: weights `[groups, n]`.
        H: E[x' x'^T], `[n, n]`.
        cross: E[x' (x - x')^T], `[n, n]`.
        ridge: how strongly the weights hold to `W`, relative to the inputs' mean power.

    Returns:
        The changed weights `[groups, n]`.

    >>> corrected(jnp.array([[1.0, 2.0]]), jnp.eye(2), jnp.eye(2), ridge=1.0).tolist()  # x = 2 x'
    [[1.5, 3.0]]
    """
    factor = jax.scipy.linalg.cho_factor(_damped(H, ridge, len(H)))
    return W + jax.scipy.linalg.cho_solve(factor, cross @ W.T).T


def fit(
    W: jax.Array,
    codebook: jax.Array,
    H: jax.Array,
    parents: jax.Array | None = None,
    *,
    free: bool = True,
    basis: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Rounds weights with error feedback and refits the centroids, in turns.

    Args:
        W: weights `[groups, n]`.
        codebook: initial centroids `[groups, cells, parts]`.
        H: second moments of the inputs `[n, n]`.
        parents: the cell of each weight `[groups, n]`, whose parts it may take; None where there is one cell.
        free: False keeps the centroids as they are. Above 16 of them they always stay.
        basis: `[parts, 1 or 2]`: the levels of the one cell stay a linear map of it, see `levels.basis`. None leaves
            every centroid free.

    Returns:
        `(codebook [groups, cells, parts], ascending in each cell; indices [groups, n], cell * parts + part, uint8)`.

    >>> codebook, index = fit(jnp.array([[0.1, 0.9, 1.1]]), jnp.array([[[0.0, 1.0]]]), jnp.eye(3), free=False)
    >>> index.tolist()
    [[0, 1, 1]]
    """
    (groups, n), (_, cells, parts) = W.shape, codebook.shape
    # For few inputs compiling costs more than fitting. Padded, layers of many sizes and 2 to 4 bits share one program.
    few = n <= _FINE
    void = _REFITTED - parts if few and free and basis is None and cells == 1 and parts < _REFITTED else 0
    inputs = -n % (_BLOCK if few else 4 * _BLOCK)
    outputs = -groups % _BLOCK if few and groups >= _MANY else 0
    cell = None if parents is None else jnp.asarray(parents)
    arrays = _padded(jnp.asarray(W), jnp.asarray(codebook), jnp.asarray(H), cell, (outputs, void, inputs))
    codebook, index = _fit(*arrays, n, parts, basis, free=free)
    return codebook[:groups, :, :parts], index[:groups, :n]


@partial(jax.jit, static_argnames="more")
def _padded(
    W: jax.Array, codebook: jax.Array, H: jax.Array, parents: jax.Array | None, more: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Pads with outputs, void centroids, and inputs without power: `more` says how many of each.

    Inputs without power are rounded last, and what they become does not count. No output depends on another.

    Returns:
        Weights, codebook, H and the cell of each weight.
    """
    outputs, void, inputs = more
    cell = jnp.zeros(W.shape, jnp.int32) if parents is None else parents.astype(jnp.int32)
    around = (0, outputs), (0, inputs)
    book = jnp.pad(codebook, ((0, outputs), (0, 0), (0, void)))
    return jnp.pad(W, around), book, jnp.pad(H, ((0, inputs), (0, inputs))), jnp.pad(cell, around)


@partial(jax.jit, static_argnames="free")
def _fit(
    W: jax.Array,
    codebook: jax.Array,
    H: jax.Array,
    cell: jax.Array,
    n: jax.Array,
    parts: jax.Array,
    basis: jax.Array | None,
    *,
    free: bool,
) -> tuple[jax.Array, jax.Array]:
    """`fit` of padded arrays whose first `n` inputs, and first `parts` of each cell, count."""
    count = codebook.shape[1] * codebook.shape[2]
    if not free or count > _REFITTED:
        part = _round(W, codebook, H, cell, n, parts)
        return codebook, (cell * codebook.shape[2] + part).astype(jnp.uint8)
    real = jnp.arange(codebook.shape[2]) < parts

    def again(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codebook = state[0]
        index = cell * codebook.shape[2] + _round(W, codebook, H, cell, n, parts)
        filled = codebook.shape[1] * parts
        codebook = _refit(W, index, codebook.reshape(-1, count), H, filled, basis).reshape(codebook.shape)
        # Refitted centroids may have crossed: sort each cell's, and let the indices follow.
        order = jnp.argsort(jnp.where(real, codebook, jnp.inf), axis=-1)  # void ones stay last
        # The inverse of the order is the new place of each centroid in its cell; then it is counted through all cells.
        rank = jnp.argsort(order, axis=-1) + codebook.shape[2] * jnp.arange(codebook.shape[1])[None, :, None]
        index = jnp.take_along_axis(rank.reshape(-1, count), index, axis=1)
        return jnp.take_along_axis(codebook, order, axis=-1), index

    codebook, index = jax.lax.fori_loop(0, _TURNS, again, (codebook, jnp.zeros_like(cell)))
    return codebook, index.astype(jnp.uint8)


def _damped(H: jax.Array, damping: float, n: jax.Array | int) -> jax.Array:
    """H with a share of the mean power of its n inputs on the diagonal; the identity where all inputs are zero."""
    power = jnp.trace(H) / n
    return H + jnp.where(power > 0, damping * power, 1.0) * jnp.eye(H.shape[0])


def _round(
    W: jax.Array,
    codebook: jax.Array,
    H: jax.Array,
    cell: jax.Array,
    n: jax.Array,
    parts: jax.Array,
) -> jax.Array:
    """The part `[groups, n]` that each weight takes of its cell. Inputs of the most power are rounded first.

    With H^-1 = U^T U, U upper triangular, rounding column j leaves the error E_j = (W_j - Q_j) / U_jj, and the columns
    still to come take on -E_j U_j. Columns of the same block do so at once, later ones by one matrix product when the
    block is done.
    """
    count = W.shape[1]
    order = jnp.argsort(-jnp.diag(H))
    H = _damped(H, _DAMPING, n)[order][:, order]
    # With both axes reversed, Cholesky gives H = R R^T with R upper triangular. U is its inverse; H is never inverted.
    lower = jnp.linalg.cholesky(H[::-1, ::-1])
    U = jax.scipy.linalg.solve_triangular(lower, jnp.eye(count), lower=True)[::-1, ::-1]
    W, cell = W[:, order], cell[:, order]
    place, void = jnp.arange(count), jnp.arange(codebook.shape[2]) >= parts

    def block(i: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        W, taken = state
        begin = i * _BLOCK
        inner = jax.lax.dynamic_slice(U, (begin, begin), (_BLOCK, _BLOCK))

        def column(j: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            part, taken, E = state
            choices = jnp.take_along_axis(codebook, cell[:, begin + j].reshape(-1, 1, 1), axis=1)[:, 0]
            chosen = jnp.argmin(jnp.where(void, jnp.inf, jnp.abs(part[:, j, None] - choices)), axis=-1)
            Q = jnp.take_along_axis(choices, chosen[:, None], axis=1)[:, 0]
            error = (part[:, j] - Q) / inner[j, j]
            later = jnp.where(jnp.arange(_BLOCK) > j, inner[j], 0.0)
            return part - error[:, None] * later[None], taken.at[:, begin + j].set(chosen), E.at[:, j].set(error)

        part = jax.lax.dynamic_slice(W, (0, begin), (W.shape[0], _BLOCK))
        _, taken, E = jax.lax.fori_loop(0, _BLOCK, column, (part, taken, jnp.zeros_like(part)))
        across = jax.lax.dynamic_slice(U, (begin, 0), (_BLOCK, count))
        return W - E @ jnp.where(place[None] >= begin + _BLOCK, across, 0.0), taken

    taken = jnp.zeros(W.shape, jnp.int32)
    _, taken = jax.lax.fori_loop(0, count // _BLOCK, block, (W, taken))
    return jnp.zeros_like(taken).at[:, order].set(taken)  # back in the order of the inputs


def _refit(
    W: jax.Array,
    index: jax.Array,
    codebook: jax.Array,
    H: jax.Array,
    filled: jax.Array | int,
    basis: jax.Array | None = None,
) -> jax.Array:
    """The centroids `[groups, K]` of the least squared error of the outputs; those without members stay.

    The first `filled` centroids count, the others are void. With M the one-hot memberships `[n, K]` of a row w, the
    centroids c minimise (w - M c)^T H (w - M c). Where levels have a basis B, c is B theta, and theta is sought.
    """
    k = codebook.shape[1]

    def solved(M: jax.Array, w: jax.Array, before: jax.Array, count: jax.Array | int) -> jax.Array:
        HM = H @ M
        power = M.T @ HM
        # A weak pull towards the values before: it holds centroids without members, and makes the system solvable.
        hold = jnp.where(jnp.trace(power) > 0, 1e-4 * jnp.trace(power) / count, 1.0)
        return jnp.linalg.solve(power + hold * jnp.eye(M.shape[1]), HM.T @ w + hold * before)

    def one(w: jax.Array, index: jax.Array, centroids: jax.Array) -> jax.Array:
        M = jax.nn.one_hot(index, k)
        if basis is None:
            return solved(M, w, centroids, filled)
        before = jnp.linalg.lstsq(basis, centroids)[0]
        theta = solved(M @ basis, w, before, basis.shape[1])
        return basis @ jnp.where(theta[-1] > 0, theta, before)  # a scale below zero would reverse their order

    # A row at a time, as each has a matrix M of its own.
    return jax.lax.map(lambda group: one(*group), (W, index, codebook))
