"""Frames of padded batches: masks that say which are real, and what is done by them.

A mask is `[batch, time]`, true on real frames; None means that all are, and costs nothing.
"""

import jax
import jax.numpy as jnp


def frame_mask(lengths: jax.Array | None, time: int) -> jax.Array | None:
    """Turns lengths `[batch]` in frames into a mask `[batch, time]`, true on real frames; None stays None.

    >>> frame_mask(jnp.array([1, 3]), 3).tolist()
    [[True, False, False], [True, True, True]]
    """
    return None if lengths is None else jnp.arange(time)[None, :] < lengths[:, None]


def expand_mask(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Adds the axes by which a mask `[batch, time]` broadcasts against `x` `[batch, time, ...]`.

    >>> expand_mask(jnp.ones((2, 7), bool), jnp.zeros((2, 7, 80, 1))).shape
    (2, 7, 1, 1)
    """
    return mask.reshape(mask.shape + (1,) * (x.ndim - 2))


def mask_frames(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Sets the padded frames of `x` `[batch, time, ...]` to zero, whatever they held.

    >>> mask_frames(jnp.array([[1.0, jnp.nan]]), jnp.array([[True, False]])).tolist()
    [[1.0, 0.0]]
    """
    return x if mask is None else jnp.where(expand_mask(mask, x), x, 0)


def reflect_frames(x: jax.Array, mask: jax.Array | None, pad: int) -> jax.Array:
    """Mirrors each utterance at its two ends, as PyTorch's padding "reflect": the frame at the end is not repeated.

    Args:
        x: `[batch, time, channel]`.
        mask: `[batch, time]`; utterances must be longer than `pad`.
        pad: frames before and after.

    Returns:
        `[batch, time + 2 * pad, channel]`; the mirror follows an utterance's last real frame.

    >>> x = jnp.array([[[1.0], [2.0], [3.0], [0.0]]])
    >>> reflect_frames(x, jnp.array([[True, True, True, False]]), 1).ravel().tolist()
    [2.0, 1.0, 2.0, 3.0, 2.0, 1.0]
    """
    if not pad:
        return x
    time = x.shape[1]
    last = jnp.full((1, 1), time - 1) if mask is None else mask.sum(1, keepdims=True) - 1
    # Mirrored at frame 0, then at the last real one. Places further on are padding: any frame will do.
    place = jnp.abs(jnp.arange(-pad, time + pad))[None]
    place = jnp.clip(jnp.where(place > last, 2 * last - place, place), 0, time - 1)
    return jnp.take_along_axis(x, jnp.broadcast_to(place, (x.shape[0], time + 2 * pad))[..., None], axis=1)


def stride_mask(mask: jax.Array | None, stride: int, lost: int = 0) -> jax.Array | None:
    """The mask after a convolution.

    Args:
        mask: `[batch, time]`.
        stride: of the convolution, in time.
        lost: frames that it has fewer for want of padding: `dilation * (taps - 1)` where it is "valid", else 0.

    >>> stride_mask(jnp.array([[True, True, True, False, False]]), 2).tolist()
    [[True, True, False]]
    """
    # A frame is real where the last input that it sees is, which without padding lies `lost` frames on.
    return None if mask is None else mask[:, lost::stride]


def mean_frames(x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """Float32 mean of `x` `[batch, time, ...]` over `axes` and real frames only.

    An utterance without any real frame has mean zero.

    >>> mean_frames(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[True, True, False]]), (1,)).tolist()
    [[2.0]]
    """
    if mask is None:
        return jnp.mean(x, axes, dtype=jnp.float32)
    real = jnp.broadcast_to(expand_mask(mask, x), x.shape[:2] + (1,) * (x.ndim - 2))
    count = jnp.sum(real, axes, dtype=jnp.float32)
    # `real` has length 1 along frequency: a frame counts as often as it has values there.
    for axis in axes:
        count = count * (x.shape[axis] if axis > 1 else 1)
    return jnp.sum(mask_frames(x, mask), axes, dtype=jnp.float32) / jnp.maximum(count, 1)
