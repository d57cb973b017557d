"""Nested codebooks: one index serves several numbers of bits, each with a codebook of its own.

The b highest bits of the index are the index at b bits. So a cell at b bits is a run of 2^(bits - b) neighbouring cells
of the finest codebook, and a border may belong to several codebooks. It cannot lie at the midpoint in each of them. It
lies where the sum of their balanced errors is least.

Reference: the idea is that of Any-Precision LLM (Park et al., 2024) and Matryoshka Quantization (Nair et al., 2025).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Array
from kmq_jax.quant.kmeans import (
    check_shapes,
    count_at_most,
    kmeans,
    make_group,
    midpoints,
    one_group,
    order,
    over_groups,
    scaled,
    split_cells,
)


def _balance(codebooks: tuple[jax.Array, ...]) -> list[float]:
    """Weights of the errors at b bits: 4^b, since each bit divides the squared error by about four."""
    return [float(c.shape[-1] ** 2) for c in codebooks]


def thresholds(codebooks: tuple[jax.Array, ...]) -> jax.Array:
    """Borders between the cells of the finest of nested codebooks. With one codebook they are its midpoints.

    Args:
        codebooks: `[groups, 2^b]` float32, in ascending bits, each ascending along its rows.

    Returns:
        `[groups, 2^bits - 1]`, ascending.

    >>> thresholds((jnp.array([[0.0, 2.0, 4.0, 10.0]]),)).tolist()
    [[1.0, 3.0, 7.0]]
    """
    # A border shared by codebooks b with neighbouring centroids l_b < r_b lies where the balanced squared error
    # sum_b v_b ((x - l_b)^2 - (x - r_b)^2) vanishes: x = sum_b v_b (r_b^2 - l_b^2) / (2 sum_b v_b (r_b - l_b)).
    finest = codebooks[-1].shape[-1]
    above = below = jnp.zeros((codebooks[-1].shape[0], finest - 1))
    for codebook, weight in zip(codebooks, _balance(codebooks)):
        gap = weight * (codebook[:, 1:] - codebook[:, :-1])
        step = finest // codebook.shape[-1]
        above = above.at[:, step - 1 :: step].add(gap * midpoints(codebook))
        below = below.at[:, step - 1 :: step].add(gap)
    # Equal centroids have no border of their own: there the midpoint, which is their value, stands.
    limits = jnp.where(below > 0, above / jnp.where(below > 0, below, 1), midpoints(codebooks[-1]))
    # Codebooks may disagree, and rounding errs: borders must still ascend.
    return jax.lax.cummax(limits, axis=1)


def nested_kmeans(
    values: Array, all_bits: tuple[int, ...], weights: Array | None = None, *, iterations: int = 100
) -> tuple[jax.Array, ...]:
    """Hierarchical k-means: codebooks of several numbers of bits, whose cells nest, refined together.

    For each group two inits are refined, and the better is kept: the finest codebook with its cells merged, and the
    coarsest with its cells split. Each iteration lowers the balanced sum of the squared errors.

    >>> one, two = nested_kmeans(np.float32([[0, 1, 10, 11]]), (1, 2))
    >>> one.tolist(), two.tolist()
    ([[0.5, 10.5]], [[0.0, 1.0, 10.0, 11.0]])

    Args:
        values: `[groups, n]`. May be traced.
        all_bits: two or more numbers of bits, ascending.
        weights: importance of each value `[groups, n]`.
        iterations: of the joint refinement.

    Returns:
        The codebooks `[groups, 2^b]`, float32, in the order of `all_bits`.

    Raises:
        UserError: as `kmeans.kmeans`, or the numbers of bits do not ascend.
    """
    check_shapes(values, weights)
    if values.ndim != 2:
        raise UserError(f"values have shape {tuple(values.shape)}, not [groups, n]")
    if not all_bits or all_bits[0] < 1 or list(all_bits) != sorted(set(all_bits)):
        raise UserError(f"all_bits (={all_bits}) must be 1 or more, and ascend")
    ordered, mass = order(values, weights)
    ordered, scale = scaled(ordered)
    codebooks = over_groups(_nest, ordered, mass, None, all_bits=tuple(all_bits), iterations=iterations)
    return codebooks if scale is None else tuple(codebook / scale for codebook in codebooks)


def split_kmeans(values: Array, indices: Array, coarse: Array, all_bits: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Codebooks of more bits inside given cells: each cell's members are clustered on their own.

    >>> (two,) = split_kmeans(np.float32([[0, 1, 2, 3]]), np.uint8([[0, 1, 0, 1]]), np.float32([[1, 2]]), (2,))
    >>> two.tolist()
    [[0.0, 2.0, 1.0, 3.0]]

    Args:
        values: `[groups, n]`. May be traced.
        indices: the cell of each value, `[groups, n]`. Cells are any sets of values: they may overlap.
        coarse: centroids of the cells `[groups, 2^b]`; a cell without members takes its centroid at any bits.
        all_bits: above b, ascending.

    Returns:
        The codebooks `[groups, 2^bits]` of `all_bits`, float32, the parts of each cell ascending and side by side.
    """
    xp = jnp if isinstance(values, jax.core.Tracer) else np
    groups, cells = coarse.shape
    # [groups, cells, n]. A cell without members counts every value, as weights must not all be zero.
    member = xp.asarray(indices).astype(xp.int32)[:, None] == xp.arange(cells, dtype=xp.int32)[None, :, None]
    empty = ~member.any(-1, keepdims=True)
    weights = (member | empty).astype(xp.float32).reshape(groups * cells, -1)
    values = xp.broadcast_to(xp.asarray(values)[:, None], member.shape).reshape(groups * cells, -1)
    # Bits that an index has beyond those of its cell.
    parts = tuple(bits - (cells.bit_length() - 1) for bits in all_bits)
    books = nested_kmeans(values, parts, weights) if len(parts) > 1 else (kmeans(values, 1 << parts[0], weights),)
    centroids = jnp.asarray(coarse, jnp.float32)[:, :, None]
    return tuple(jnp.where(empty, centroids, book.reshape(groups, cells, -1)).reshape(groups, -1) for book in books)


def _nest(
    values: jax.Array,
    weights: jax.Array | None,
    key: None,
    n: jax.Array | int,
    *,
    all_bits: tuple[int, ...],
    iterations: int,
) -> tuple[jax.Array, ...]:
    """The nested codebooks of one group of n ordered values [padded]; see `nested_kmeans`."""
    group = make_group(values, n, weights)
    settings: dict[str, Any] = {"init": "optimal", "retention": 1.0, "iterations": iterations, "pinned_zero": False}
    finest, coarsest = (
        one_group(values, weights, key, n, k=1 << bits, **settings) for bits in (all_bits[-1], all_bits[0])
    )
    merged = midpoints(finest)
    split = split_cells(values, n, weights, coarsest, 1 << (all_bits[-1] - all_bits[0]))
    _, centre = group.weigh(jnp.array(0), jnp.asarray(n))

    def codebooks(limits: jax.Array, before: Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The means of the cells at all bits, and how much inertia they save, balanced."""
        inner = count_at_most(values, n, limits)
        edges = jnp.concatenate([jnp.zeros(1, jnp.int32), inner, jnp.full(1, n, jnp.int32)])
        means, saved = [], jnp.array(0.0)
        for bits, old in zip(all_bits, before):
            step = 1 << (all_bits[-1] - bits)
            mass, mean = group.weigh(edges[:-1:step], edges[step::step])
            means.append(jnp.where(mass > 0, mean, old))
            saved += 4.0**bits * jnp.sum(mass * jnp.square(mean - centre))
        return tuple(means), saved

    def empty(limits: jax.Array) -> tuple[jax.Array, ...]:
        """Centroids for cells without values: the lower border of each."""
        low = jnp.concatenate([values[:1], limits])
        return tuple(low[:: 1 << (all_bits[-1] - bits)] for bits in all_bits)

    def refine(limits: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        def step(_: object, books: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            return codebooks(thresholds(tuple(b[None] for b in books))[0], books)[0]

        books = jax.lax.fori_loop(0, iterations // 4, step, codebooks(limits, empty(limits))[0])
        return codebooks(thresholds(tuple(b[None] for b in books))[0], books)

    books, saved = jax.vmap(refine)(jnp.stack([merged, split]))
    return tuple(book[jnp.argmax(saved)] for book in books)
