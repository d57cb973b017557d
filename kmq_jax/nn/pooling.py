"""Pooling over time: from frames `[batch, time, freq, channel]` to one vector an utterance.

Each frame is flattened with the channel running fastest: its feature `f * channels + c` is channel `c` at frequency
`f`. PyTorch networks (Kiwano's and WeSpeaker's) flatten `c * freqs + f` instead; `flatten_order` is the permutation by
which weights that read such features are imported. Means come first in the output, deviations second, each in that
order. Statistics are float32 whatever the compute dtype.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kmq_jax.nn.layers import dense, expand_mask, mask_frames, mean_frames


def flatten_order(freqs: int, channels: int) -> np.ndarray:
    """Positions, in a channel-major (PyTorch) flattening, of the features in this package's order.

    With `w` `[out, channels * freqs]` a PyTorch weight, `w[:, flatten_order(freqs, channels)]` reads the features of
    this package.

    Returns:
        int `[freqs * channels]`.

    >>> flatten_order(freqs=2, channels=3).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    return np.arange(channels * freqs).reshape(channels, freqs).T.reshape(-1)


def flatten_frames(x: jax.Array) -> jax.Array:
    """Flattens `[batch, time, freq, channel]` to `[batch, time, freq * channel]`, the channel running fastest.

    >>> flatten_frames(jnp.zeros((1, 7, 10, 4))).shape
    (1, 7, 40)
    """
    return x.reshape(*x.shape[:2], -1)


def segment_means(x: jax.Array, mask: jax.Array | None, size: int) -> jax.Array:
    """Float32 means over real frames of segments that follow one another; the last may be shorter.

    Args:
        x: `[batch, time, channel]`; padded frames hold zeros.
        mask: `[batch, time]`. A segment without a real frame has mean zero.
        size: frames of a segment.

    Returns:
        `[batch, ceil(time / size), channel]`.

    >>> segment_means(jnp.array([[[1.0], [3.0], [5.0]]]), None, 2).ravel().tolist()
    [2.0, 5.0]
    """
    batch, time, channels = x.shape
    real = jnp.ones((1, time)) if mask is None else mask.astype(jnp.float32)
    pad = -time % size
    sums = jnp.pad(x, ((0, 0), (0, pad), (0, 0))).reshape(batch, -1, size, channels).sum(2, dtype=jnp.float32)
    count = jnp.pad(real, ((0, 0), (0, pad))).reshape(len(real), -1, size).sum(2)
    return sums / jnp.maximum(count, 1)[..., None]


class StatisticsPooling(nn.Module):
    """Mean and unbiased standard deviation over time, without parameters (WeSpeaker's TSTP).

    An utterance of a single pooled frame has variance 0 (PyTorch: NaN).

    Attributes:
        floor: added to the variance, 1e-7 in WeSpeaker.
    """

    floor: float = 1e-7

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps `[batch, time, freq, channel]` to float32 `[batch, 2 * freq * channel]`."""
        frames = flatten_frames(x).astype(jnp.float32)
        mean = mean_frames(frames, mask, (1,))
        # In two passes: E[x^2] - mean^2 would cancel.
        squares = mask_frames(jnp.square(frames - mean[:, None, :]), mask).sum(1)
        count = jnp.full((1, 1), x.shape[1]) if mask is None else mask.sum(1, keepdims=True)
        # A single frame is divided by 1 and not by 0: its deviation is the root of `floor`.
        deviation = jnp.sqrt(squares / jnp.maximum(count - 1, 1) + self.floor)
        return jnp.concatenate([mean, deviation], axis=-1)


class AttentiveStatisticsPooling(nn.Module):
    """Attention-weighted mean and standard deviation over time, with one weight a frame and feature.

    Weights are the softmax over real frames of `attention2(tanh(attention1(x)))`.

    References: Okabe et al., Attentive Statistics Pooling for Deep Speaker Embedding, 2018; floor as in Kiwano.

    Attributes:
        hidden: channels between the two linear maps.
        floor: the variance is at least this.
        dtype: compute dtype of the linear maps.
    """

    hidden: int
    floor: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps `[batch, time, freq, channel]` to float32 `[batch, 2 * freq * channel]`."""
        frames = mask_frames(flatten_frames(x), mask)
        hidden = jnp.tanh(dense(self.hidden, "attention1", self.dtype)(frames))
        logits = dense(frames.shape[-1], "attention2", self.dtype)(hidden).astype(jnp.float32)
        if mask is not None:
            # The lowest finite number and not -inf: an utterance without frames must not turn into NaN.
            logits = jnp.where(expand_mask(mask, logits), logits, jnp.finfo(jnp.float32).min)
        weights = nn.softmax(logits, axis=1)
        frames = frames.astype(jnp.float32)
        mean = jnp.sum(weights * frames, axis=1)
        # Equal to sum(w x^2) - mean^2, without its cancellation.
        variance = jnp.sum(weights * jnp.square(frames - mean[:, None, :]), axis=1)
        return jnp.concatenate([mean, jnp.sqrt(jnp.maximum(variance, self.floor))], axis=-1)
