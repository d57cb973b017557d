"""Pooling over time: from frames `[batch, time, freq, channel]` to one vector an utterance.

Each frame is flattened with the channel running fastest: its feature `f * channels + c` is channel `c` at frequency
`f`. PyTorch networks (Kiwano's and WeSpeaker's) flatten `c * freqs + f` instead; `flatten_order` is the permutation by
which weights that read such features are imported. Means come first in the output, deviations second, each in that
order. Statistics are float32 whatever the compute dtype.
"""

from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kmq_jax.nn import whole
from kmq_jax.nn.frames import mask_frames
from kmq_jax.nn.layers import TORCH_DEFAULT, BatchNorm, Conv, dense

GraphBuilder: TypeAlias = Any
"""`models.protocol.GraphBuilder`, which this layer does not import."""


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


def weighted_statistics(found: whole.Moments, floor: float) -> list[np.ndarray]:
    """Weighted mean and deviation `[1, 2 * values]` of an utterance, by numpy; the variance is at least `floor`.

    >>> weighted_statistics(whole.Moments(*np.float64([[0], [2], [3], [8]])), floor=0.0)[0].tolist()
    [[3.0, 2.0]]
    """
    variance = np.maximum(found.squares / np.maximum(found.weight, 1e-30), floor)
    return [np.concatenate([found.mean, np.sqrt(variance)])[None]]


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
        mean, squares, count = whole.statistics(self, frames, mask)
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
        mean, variance = whole.weighted(self, frames.astype(jnp.float32), logits, mask)
        return jnp.concatenate([mean, jnp.sqrt(jnp.maximum(variance, self.floor))], axis=-1)


class ContextPooling(nn.Module):
    """Attentive statistics pooling whose attention may see the utterance: each frame, its mean and its deviation.

    Weights are the softmax over real frames of `attention2(tanh(attention1(x)))`, or in SpeechBrain's form
    `attention2(tanh(bn(relu(attention1(x)))))`. Both attentions are 1x1 convolutions with a bias.

    Attributes:
        hidden: channels between the two.
        floor: lower bound of the weighted variance and of a biased one of the context; added to an unbiased one.
        context: whether attention sees mean and deviation of the utterance.
        normalize: SpeechBrain's form.
        biased: the deviation of the context is biased.
        dtype: compute dtype of the attentions.

    References: Desplanques et al., ECAPA-TDNN, 2020.
    """

    hidden: int
    floor: float
    context: bool
    normalize: bool = False
    biased: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[batch, time, channel]` to float32 `[batch, 2 * channel]`."""
        x = mask_frames(x, mask).astype(jnp.float32)
        seen = x
        if self.context:
            mean, squares, count = whole.statistics(self, x, mask)
            if self.biased:
                deviation = jnp.sqrt(jnp.maximum(squares / jnp.maximum(count, 1), self.floor))
            else:
                deviation = jnp.sqrt(squares / jnp.maximum(count - 1, 1) + self.floor)
            context = jnp.concatenate([mean, deviation], axis=-1)[:, None]
            seen = jnp.concatenate([x, jnp.broadcast_to(context, (*x.shape[:2], context.shape[-1]))], axis=-1)

        def pointwise(channels: int, name: str) -> Conv:
            return Conv(channels, 1, use_bias=True, dtype=self.dtype, kernel_init=TORCH_DEFAULT, name=name)

        hidden = pointwise(self.hidden, "attention1")(seen)
        if self.normalize:
            hidden = BatchNorm(self.dtype, name="bn")(nn.relu(hidden), mask, train)
        logits = pointwise(x.shape[-1], "attention2")(jnp.tanh(hidden)).astype(jnp.float32)
        mean, variance = whole.weighted(self, x, logits, mask)
        return jnp.concatenate([mean, jnp.sqrt(jnp.maximum(variance, self.floor))], axis=-1)

    @nn.nowrap
    def to_onnx(self, graph: GraphBuilder, x: str, at: str) -> str:
        """Adds the pooling to a graph.

        Args:
            graph: the graph.
            x: `[batch, channel, time]`.
            at: path of the module.

        Returns:
            `[batch, 2 * channel]`.
        """
        seen = x
        if self.context:
            mean = graph.node("ReduceMean", x, graph.integers(2), keepdims=1)
            centred = graph.node("Sub", x, mean)
            squares = graph.node("ReduceSum", graph.node("Mul", centred, centred), graph.integers(2), keepdims=1)
            count = graph.node("Shape", x, start=2, end=3)
            if not self.biased:
                count = graph.node("Max", graph.node("Sub", count, graph.integers(1)), graph.integers(1))
            variance = graph.node("Div", squares, graph.cast(count, "FLOAT"))
            floored = graph.node("Max" if self.biased else "Add", variance, graph.number(self.floor))
            like = graph.node("Shape", x)
            deviation = graph.node("Sqrt", floored)
            outputs = {name: ["B", "C", 1] for name in (mean, deviation)}
            graph.whole(f"{at}/statistics", x, outputs, self._context_of, axis=2)
            context = [graph.node("Expand", value, like) for value in (mean, deviation)]
            seen = graph.node("Concat", x, *context, axis=1)
        hidden = graph.conv(seen, f"{at}/attention1")
        if self.normalize:
            hidden = graph.scale_and_shift(graph.activation(hidden, nn.relu), f"{at}/bn", 3)
        logits = graph.conv(graph.node("Tanh", hidden), f"{at}/attention2")
        pooled: str = graph.weighted_pooling(x, logits, at, self.floor, axis=2)
        return pooled

    @nn.nowrap
    def _context_of(self, found: whole.Moments) -> list[np.ndarray]:
        """Mean and deviation `[1, channel, 1]` of the whole utterance, as attention sees them."""
        if self.biased:
            variance = np.maximum(found.squares / np.maximum(found.weight, 1), self.floor)
        else:
            variance = found.squares / np.maximum(found.weight - 1, 1) + self.floor
        return [value[None, :, None] for value in (np.asarray(found.mean), np.sqrt(variance))]
