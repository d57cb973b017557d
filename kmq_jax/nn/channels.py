"""Sums over all positions of each channel, and the per-channel affine map whose gradient needs them.

Batch normalisation consists of the two. XLA's reductions on a CPU go through float32 copies of bfloat16 activations; on
a single CPU device a kernel of nn/cpu reads the activations as they are, once for both sums. Elsewhere XLA sums, over
the whole batch where that is sharded.

Where a gate for each utterance follows, sums by utterance and channel serve both: `sample_sums`, `scale_samples`.

All of these functions differentiate backwards, to any order.
"""

import jax
import jax.numpy as jnp

from kmq_jax.nn.cpu import library


def by_channel(values: jax.Array, x: jax.Array) -> jax.Array:
    """Values `[channels]` in as many axes as `x` `[..., channels]` has.

    >>> by_channel(jnp.ones(3), jnp.ones((2, 5, 3))).shape
    (1, 1, 3)
    """
    return values.reshape((1,) * (x.ndim - 1) + (-1,))


@jax.custom_vjp
def channel_sums(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums `x`, and `x * y`, over all axes but the last.

    Args:
        x: `[..., channels]`.
        y: like `x`.

    Returns:
        `[2, channels]` float32.

    >>> channel_sums(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 1.0], [2.0, 2.0]])).tolist()
    [[4.0, 6.0], [7.0, 10.0]]
    """
    if x.dtype == y.dtype and x.size and library.usable(x.dtype):
        result = jax.ShapeDtypeStruct((2, x.shape[-1]), jnp.float32)
        return jax.ffi.ffi_call("kmq_channel_sums", result, vmap_method="sequential")(x, y)
    axes = tuple(range(x.ndim - 1))
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.stack([jnp.sum(x, axes), jnp.sum(x * y, axes)])


def _channel_sums_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = residuals
    # d/dx of sum(x) and sum(x y) is 1 and y; d/dy is 0 and x.
    of_sum, of_product = gradient.reshape(2, *(1,) * (x.ndim - 1), -1)
    return (of_sum + of_product * y).astype(x.dtype), (of_product * x).astype(y.dtype)


channel_sums.defvjp(lambda x, y: (channel_sums(x, y), (x, y)), _channel_sums_backward)


@jax.custom_vjp
def scale_and_shift(x: jax.Array, slope: jax.Array, shift: jax.Array) -> jax.Array:
    """Computes `x * slope + shift` in float32.

    Args:
        x: `[..., channels]`.
        slope: `[channels]` float32.
        shift: `[channels]` float32.

    Returns:
        Of the shape and dtype of `x`.

    >>> scale_and_shift(jnp.array([[1.0, 2.0]]), jnp.array([2.0, 3.0]), jnp.array([0.0, 1.0])).tolist()
    [[2.0, 7.0]]
    """
    return (x * by_channel(slope, x) + by_channel(shift, x)).astype(x.dtype)


def _scale_and_shift_backward(
    residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, slope = residuals
    # Both gradients are sums over all positions, which one pass gives together.
    of_shift, of_slope = channel_sums(gradient, x)
    return scale_and_shift(gradient, slope, jnp.zeros_like(slope)), of_slope, of_shift


scale_and_shift.defvjp(
    lambda x, slope, shift: (scale_and_shift(x, slope, shift), (x, slope)), _scale_and_shift_backward
)


@jax.custom_vjp
def sample_sums(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums `x`, and `x * y`, of each utterance and channel, in one pass.

    Args:
        x: `[batch, ..., channels]`.
        y: like `x`.

    Returns:
        `[2, batch, channels]` float32.

    >>> sample_sums(jnp.array([[[1.0], [3.0]]]), jnp.array([[[1.0], [2.0]]])).tolist()
    [[[4.0]], [[7.0]]]
    """
    axes = tuple(range(1, x.ndim - 1))
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.stack([jnp.sum(x, axes), jnp.sum(x * y, axes)])


def _sample_sums_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = residuals
    of_sum, of_product = (_spread(part, x) for part in gradient)
    return (of_sum + of_product * y).astype(x.dtype), (of_product * x).astype(y.dtype)


sample_sums.defvjp(lambda x, y: (sample_sums(x, y), (x, y)), _sample_sums_backward)


@jax.custom_vjp
def scale_samples(x: jax.Array, slope: jax.Array, shift: jax.Array) -> jax.Array:
    """Computes `x * slope + shift` in float32, of each utterance and channel.

    Args:
        x: `[batch, ..., channels]`.
        slope: `[batch, channels]` float32.
        shift: `[batch, channels]` float32.

    Returns:
        Of the shape and dtype of `x`.

    >>> scale_samples(jnp.array([[[1.0], [3.0]]]), jnp.array([[2.0]]), jnp.array([[1.0]])).tolist()
    [[[3.0], [7.0]]]
    """
    return (x * _spread(slope, x) + _spread(shift, x)).astype(x.dtype)


def _scale_samples_backward(
    residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, slope = residuals
    of_shift, of_slope = sample_sums(gradient, x)
    return scale_samples(gradient, slope, jnp.zeros_like(slope)), of_slope, of_shift


scale_samples.defvjp(lambda x, slope, shift: (scale_samples(x, slope, shift), (x, slope)), _scale_samples_backward)


def _spread(values: jax.Array, x: jax.Array) -> jax.Array:
    """Values `[batch, channels]` against `x` `[batch, ..., channels]`."""
    return values.reshape(values.shape[0], *(1,) * (x.ndim - 2), -1)
