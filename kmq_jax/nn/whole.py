"""Statistics over a whole utterance, by name, so that a long one can go through a network in chunks.

A layer that looks at all frames at once (pooling, squeeze-and-excitation) asks for their statistics here. Usually that
is plain arithmetic. Within `collecting`, a chunk hands over its own frames at each place instead, and goes on with the
statistics that it is given. Places are named by the path of their module, such as "stage1/block0/se/mean".
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from kmq_jax.core.tree import Array
from kmq_jax.nn.frames import expand_mask, mask_frames, mean_frames

LOWEST = float(jnp.finfo(jnp.float32).min)
"""A logit that weighs nothing. Finite: an utterance without frames must not turn into NaN."""


class Moments(NamedTuple):
    """What frames add up to, each with the weight `exp(logit - top)`; without logits each weighs 1.

    Attributes:
        top: `[..., values]` the largest logit; 0 without logits.
        weight: `[..., values]` sum of the weights.
        mean: `[..., values]` weighted mean.
        squares: `[..., values]` weighted sum of squared distances from the mean.
    """

    top: Array
    weight: Array
    mean: Array
    squares: Array


Collect: TypeAlias = Callable[[str, jax.Array, jax.Array | None, jax.Array | None], Moments]
"""Called as `collect(place, frames, mask, logits)`; gives the moments of the whole utterance."""

_collect: contextvars.ContextVar[Collect | None] = contextvars.ContextVar("collect", default=None)


@contextlib.contextmanager
def collecting(collect: Collect) -> Iterator[None]:
    """A context in which statistics over the whole utterance are those that `collect` gives."""
    token = _collect.set(collect)
    try:
        yield
    finally:
        _collect.reset(token)


def moments(frames: jax.Array, mask: jax.Array | None, logits: jax.Array | None = None) -> Moments:
    """The moments of real frames.

    Args:
        frames: `[batch, time, values]`.
        mask: `[batch, time]`.
        logits: of the weights, of the same shape as the frames; None: each weighs 1.

    >>> found = moments(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[True, True, False]]))
    >>> [float(value[0, 0]) for value in found]
    [0.0, 2.0, 2.0, 2.0]
    """
    frames = frames.astype(jnp.float32)
    if logits is None:
        top = jnp.zeros_like(frames[:, 0])
        weights = jnp.ones_like(frames)
    else:
        logits = logits if mask is None else jnp.where(expand_mask(mask, logits), logits, LOWEST)
        top = logits.max(1)
        weights = jnp.exp(logits - top[:, None])
    weights = mask_frames(weights, mask)
    total = weights.sum(1)
    mean = (weights * mask_frames(frames, mask)).sum(1) / jnp.maximum(total, 1e-30)
    squares = (weights * jnp.square(mask_frames(frames - mean[:, None], mask))).sum(1)
    return Moments(top, total, mean, squares)


def mean(module: nn.Module, x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """The mean of `x` `[batch, time, ...]` over `axes`, 1 among them, and real frames: see `frames.mean_frames`."""
    collect = _collect.get()
    if collect is None:
        return mean_frames(x, mask, axes)
    # The other axes first: over time the mean of these means is the mean of all.
    frames = jnp.mean(x, tuple(axis for axis in axes if axis != 1), dtype=jnp.float32)
    flat = frames.reshape(*frames.shape[:2], -1)
    found = collect("/".join((*module.path, "mean")), flat, mask, None).mean
    return jnp.asarray(found).reshape(x.shape[0], *frames.shape[2:])


def statistics(module: nn.Module, frames: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean `[batch, values]`, squares about it, and count `[batch, 1]` of real frames `[batch, time, values]`."""
    collect = _collect.get()
    if collect is not None:
        found = collect("/".join((*module.path, "statistics")), frames, mask, None)
        return jnp.asarray(found.mean), jnp.asarray(found.squares), jnp.asarray(found.weight)[:, :1]
    mean = mean_frames(frames, mask, (1,))
    # In two passes: E[x^2] - mean^2 would cancel.
    squares = mask_frames(jnp.square(frames - mean[:, None, :]), mask).sum(1)
    count = jnp.full((1, 1), frames.shape[1]) if mask is None else mask.sum(1, keepdims=True)
    return mean, squares, count


def weighted(
    module: nn.Module, frames: jax.Array, logits: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance `[batch, values]` of real frames `[batch, time, values]`, weighted by the softmax of logits."""
    collect = _collect.get()
    if collect is not None:
        found = collect("/".join((*module.path, "weighted")), frames, mask, logits)
        return jnp.asarray(found.mean), jnp.asarray(found.squares) / jnp.maximum(jnp.asarray(found.weight), 1e-30)
    if mask is not None:
        logits = jnp.where(expand_mask(mask, logits), logits, LOWEST)
    weights = nn.softmax(logits, axis=1)
    mean = jnp.sum(weights * frames, axis=1)
    # Equal to sum(w x^2) - mean^2, without its cancellation.
    return mean, jnp.sum(weights * jnp.square(frames - mean[:, None, :]), axis=1)
