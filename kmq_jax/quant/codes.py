"""Values to indices and back, on tensors in their own layout: groups lie along one axis."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.core.tree import Array

_CHAIN = 16  # up to so many centroids, a chain of comparisons or selections is faster than gathers


def where_sorted(tensor: Array) -> Array:
    """The tensor as float32, as an array of the library that is to sort it: on a CPU outside jit that is numpy."""
    if isinstance(tensor, jax.core.Tracer) or jax.default_backend() != "cpu":
        return jnp.asarray(tensor, jnp.float32)
    return np.asarray(tensor, np.float32)


def known_now(*arrays: Array | None) -> contextlib.AbstractContextManager[None]:
    """A context in which arithmetic on known arrays is done at once, even while a function around it is traced.

    >>> weights = np.ones((3, 2), np.float32)
    >>> def largest():
    ...     with known_now(weights):
    ...         return float(jnp.max(weights))  # within jit alone this would be a traced value, and no float
    >>> jax.jit(largest)().item()
    1.0
    """
    tracing = isinstance(jnp.zeros(()), jax.core.Tracer)
    if not tracing or any(isinstance(array, jax.core.Tracer) for array in arrays):
        return contextlib.nullcontext()
    return jax.ensure_compile_time_eval()


def to_groups(tensor: jax.Array, axis: int | None) -> jax.Array:
    """Brings a tensor into rows `[groups, group_size]`; takes numpy arrays too, and gives back the same kind.

    >>> to_groups(np.arange(6).reshape(3, 2), 1).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    if axis is None:
        return tensor.reshape(1, -1)
    order = (axis, *(i for i in range(tensor.ndim) if i != axis))
    return tensor.transpose(order).reshape(tensor.shape[axis], -1)


def from_groups(rows: jax.Array, shape: tuple[int, ...], axis: int | None) -> jax.Array:
    """Undoes `to_groups`.

    >>> from_groups(np.array([[0, 2, 4], [1, 3, 5]]), (3, 2), 1).tolist()
    [[0, 1], [2, 3], [4, 5]]
    """
    if axis is None:
        return rows.reshape(shape)
    others = [i for i in range(len(shape)) if i != axis]
    moved = rows.reshape(shape[axis], *(shape[i] for i in others))
    return moved.transpose([0 if i == axis else 1 + others.index(i) for i in range(len(shape))])


def along(values: jax.Array, ndim: int, axis: int | None) -> jax.Array:
    """Reshapes `[groups]`, one value for each group, to broadcast against a tensor whose groups lie along `axis`.

    >>> along(jnp.array([1.0, 2.0]), 3, 1).shape
    (1, 2, 1)
    """
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])


def assign(tensor: jax.Array, thresholds: jax.Array, axis: int | None) -> jax.Array:
    """Counts the thresholds below each element: its index.

    Args:
        tensor: any shape, groups along `axis`.
        thresholds: ascending `[groups, K - 1]`, K a power of two; an element equal to one belongs below it.
        axis: None where all elements share a group.

    Returns:
        uint8, the tensor's shape.

    >>> assign(jnp.array([0.2, 0.5, 3.0, 9.0]), jnp.array([[0.5, 1.0, 4.0]]), None).tolist()
    [0, 0, 2, 3]
    """
    k = thresholds.shape[1] + 1
    index = jnp.zeros(tensor.shape, jnp.uint8)
    if k <= _CHAIN:
        for i in range(k - 1):
            index += (tensor > along(thresholds[:, i], tensor.ndim, axis)).astype(jnp.uint8)
        return index
    # A binary search: each step decides one bit of the index, the highest first.
    for bit in reversed(range((k - 1).bit_length())):
        above = index + jnp.uint8(1 << bit)
        limit = _gather(thresholds, above - jnp.uint8(1), axis)
        index = jnp.where(tensor > limit, above, index)
    return index


def lookup(indices: jax.Array, codebook: jax.Array, axis: int | None) -> jax.Array:
    """Gives each index (any shape, groups along `axis`) its centroid from `codebook` `[groups, K]`, exactly.

    >>> lookup(jnp.uint8([0, 1, 1]), jnp.array([[0.5, 2.0]]), None).tolist()
    [0.5, 2.0, 2.0]
    """
    k = codebook.shape[1]
    if k > _CHAIN:
        return _gather(codebook, indices, axis)
    values = jnp.broadcast_to(along(codebook[:, 0], indices.ndim, axis), indices.shape)
    for i in range(1, k):
        values = jnp.where(indices == i, along(codebook[:, i], indices.ndim, axis), values)
    return values


def _gather(table: jax.Array, column: jax.Array, axis: int | None) -> jax.Array:
    """Takes from each group's row of `table` `[groups, K]` the entries in the columns that `column` names."""
    group = along(jnp.arange(table.shape[0]), column.ndim, axis)
    flat = group * table.shape[1] + column.astype(jnp.int32)
    return table.reshape(-1).at[flat].get(mode="promise_in_bounds")
