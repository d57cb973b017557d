"""Convolution, batch normalisation, squeeze-and-excitation and the residual blocks, exact for padded batches.

Activations are `[batch, time, channel]` or `[batch, time, freq, channel]`. A mask `[batch, time]` says which frames are
real; None means all, and costs nothing. Padded frames are zero wherever a convolution reads them, because an utterance
alone sees zeros beyond its end: the blocks here set them to zero after each activation. A stride of 2 keeps frames 0,
2, 4, ...: the mask after it is `mask[:, ::2]`, and a length of L becomes ceil(L / 2).

Linen names a parameter after the `name=` given here; models/resnet.py lists the names.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer, ones, variance_scaling, zeros
from jax.typing import DTypeLike

from kmq_jax.nn import integers, whole
from kmq_jax.nn.channels import by_channel, channel_sums, sample_sums, scale_and_shift, scale_samples
from kmq_jax.nn.conv import Pair, Window, convolve, window
from kmq_jax.nn.frames import mask_frames, stride_mask

Activation = Callable[[jax.Array], jax.Array]

CONVOLUTION, STATISTICS = "convolution", "statistics"
"""Names by which rematerialization knows what a convolution gives, and the moments that a batch is normalised by."""

KAIMING_NORMAL: Initializer = variance_scaling(2.0, "fan_out", "normal")
"""`kaiming_normal_(mode="fan_out", nonlinearity="relu")` of PyTorch, as Kiwano starts its convolutions."""
TORCH_DEFAULT: Initializer = variance_scaling(1 / 3, "fan_in", "uniform")
"""What PyTorch gives layers that nobody initialises: WeSpeaker's convolutions, and every linear layer here."""


@jax.custom_vjp
def _relu_of_sum(x: jax.Array) -> jax.Array:
    return nn.relu(x)


def _relu_backward(y: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.optimization_barrier(jnp.where(y > 0, gradient, 0)),)


_relu_of_sum.defvjp(lambda x: (nn.relu(x), nn.relu(x)), _relu_backward)


def relu_of_sum(x: jax.Array) -> jax.Array:
    """The ReLU that ends a residual block.

    Up to four passes over whole activations begin with its gradient: sums for the gate and the normalisation, the
    normalisation's gradient, the skipped branch. On accelerators memory bounds these passes, and XLA would read the
    ReLU's output beside the gradient in each of them, only to mask it anew. Behind a barrier the masked gradient is
    written once. That saves two or three readings of an activation in each block. On a CPU nothing changes.

    Args:
        x: of any shape.

    >>> relu_of_sum(jnp.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    return nn.relu(x) if on_processor() else _relu_of_sum(x)


def on_processor() -> bool:
    """Whether programs are made for a CPU. There they stay exactly those that the published results were made with."""
    return jax.default_backend() == "cpu"


def dense(features: int, name: str, dtype: DTypeLike = jnp.float32) -> nn.Dense:
    """A linear layer with a bias. The kernel starts as in PyTorch, the bias at zero."""
    return nn.Dense(features, dtype=dtype, kernel_init=TORCH_DEFAULT, name=name)


class Conv(nn.Module):
    """Convolution over time, or over time and frequency, by the axes of its input.

    Parameters: `kernel` `[*taps, in / groups, out]` and, where asked for, `bias` `[out]`.

    Attributes:
        channels: output channels.
        taps: kernel size; here and below one number stands for all axes.
        stride: step between outputs.
        use_bias: whether to add a bias.
        dtype: the compute dtype; parameters are float32.
        kernel_init: how the kernel starts.
        padding: "same", "valid" or numbers; see `nn.conv.window`.
        dilation: distance between taps.
        groups: parts of the channels that do not see each other.
    """

    channels: int
    taps: int | tuple[int, ...] = 3
    stride: int | tuple[int, ...] = 1
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = KAIMING_NORMAL
    padding: str | tuple[Pair, ...] = "same"
    dilation: int | tuple[int, ...] = 1
    groups: int = 1

    @nn.nowrap
    def window(self, x: jax.Array) -> Window:
        """How the kernel moves over `x`."""
        return window(x.ndim - 2, self.taps, self.stride, self.padding, self.dilation, self.groups)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, time, (freq,) in]` to `[batch, time', (freq',) out]`, with "same" ceil(size / stride) each."""
        moves = self.window(x)
        kernel = self.param("kernel", self.kernel_init, (*moves.taps, x.shape[-1] // self.groups, self.channels))
        bias = self.param("bias", zeros, (self.channels,)) if self.use_bias else None
        x, kernel, step = integers.levels(self, x, kernel)
        # The parameter stays float32; only the arithmetic is in the compute dtype. Levels are exact in bfloat16, too,
        # but their sums are beyond float16.
        dtype = self.dtype if step is None or self.dtype != jnp.float16 else jnp.float32
        y = convolve(x.astype(dtype), kernel.astype(dtype), moves)
        if step is not None:
            return integers.from_sums(y.astype(jnp.float32), bias, step).astype(self.dtype)
        return y if bias is None else y + by_channel(bias.astype(self.dtype), y)


class BatchNorm(nn.Module):
    """Batch normalisation over real frames, with PyTorch's settings and float32 statistics.

    Parameters `scale` and `bias`, statistics `mean` and `var`, all `[channels]`. In a jit-compiled step on a sharded
    batch the statistics are those of the global batch. The running variance is biased, as is the one that a training
    batch is normalised by (PyTorch's running variance is unbiased).

    Attributes:
        dtype: dtype of the output.
        momentum: share of the old running statistics that one training step keeps (1 - 0.1 of PyTorch).
        epsilon: added to the variance.
        use_statistics: False leaves only the scale and the bias, into which the statistics are folded.
        affine: whether there are a learned scale and bias.
        named: whether a training batch's statistics are named, for rematerialization to keep; see `LayerStyle`.
    """

    dtype: DTypeLike = jnp.float32
    momentum: float = 0.9
    epsilon: float = 1e-5
    use_statistics: bool = True
    affine: bool = True
    named: bool = False

    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Normalises each channel of `x` `[batch, (time, freq,) channels]`.

        Args:
            x: activations.
            mask: `[batch, time]`, frames that count in the statistics of a training batch.
            train: normalise by the batch's statistics and update the running ones, else by the running ones.
        """
        slope, shift = self.line(x, mask, train)
        # `scale_and_shift` gives the dtype of its input: the finer of the two, so that rounding comes last.
        x = x.astype(jnp.promote_types(x.dtype, self.dtype))
        return scale_and_shift(x, slope, shift).astype(self.dtype)

    @nn.compact
    def line(
        self, x: jax.Array, mask: jax.Array | None, train: bool, sums: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Slope and shift `[channels]` of the map by which `x` is normalised; updates the running statistics.

        Args:
            x: activations.
            mask: as above.
            train: as above.
            sums: those of `x` and of its squares, `[2, channels]`, where they are known.
        """
        channels = x.shape[-1:]
        if self.affine:
            slope, shift = self.param("scale", ones, channels), self.param("bias", zeros, channels)
        else:
            slope, shift = jnp.ones(channels), jnp.zeros(channels)
        if self.use_statistics:
            running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
            running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
            mean, var = running_mean.value, running_var.value
            if train:
                mean, var = self._batch_statistics(x, mask, sums)
                if self.named:
                    mean, var = checkpoint_name(mean, STATISTICS), checkpoint_name(var, STATISTICS)
                # `init` runs on made-up features, which must leave no trace in the statistics.
                if not self.is_initializing():
                    running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                    running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
            # Scale, bias and statistics become one affine map, so that x is read once.
            slope = slope * jax.lax.rsqrt(var + self.epsilon)
            shift = shift - mean * slope
        return slope, shift

    def _batch_statistics(
        self, x: jax.Array, mask: jax.Array | None, sums: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        count: int | jax.Array = x.size // x.shape[-1]
        if mask is not None:
            # Real frames times the values of a frame; at least 1, for a batch of padding alone.
            count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32) * (count // mask.size), 1)
        if sums is None:
            x = mask_frames(x, mask)
            sums = channel_sums(x, x)
        mean, square = sums / count
        # One pass over memory, as both sums are made together. The price: of a channel whose mean is thousands of times
        # its deviation, little but rounding is left of the variance.
        # By rounding the difference may even fall just below zero, and its root would be NaN.
        return mean, jnp.maximum(square - jnp.square(mean), 0)


@dataclasses.dataclass(frozen=True)
class LayerStyle:
    """How one network makes its convolutions and normalisations.

    Attributes:
        norm: "batch", or "bias" for a network whose batch normalisations are folded into the convolutions before
            them, which then carry a bias.
        dtype: compute dtype.
        kernel_init: how convolution kernels start.
        named: whether what convolutions give and the statistics of a batch get the names `CONVOLUTION` and
            `STATISTICS`, by which a policy of `jax.checkpoint` keeps them.
    """

    norm: str = "batch"
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = KAIMING_NORMAL
    named: bool = False

    def conv(
        self, x: jax.Array, channels: int, taps: int, stride: int | Pair = 1, *, name: str, before_norm: bool = True
    ) -> jax.Array:
        """Convolves; with `norm="bias"` a bias is added in place of the normalisation that would follow."""
        use_bias = before_norm and self.norm == "bias"
        y: jax.Array = Conv(channels, taps, stride, use_bias, self.dtype, self.kernel_init, name=name)(x)
        return checkpoint_name(y, CONVOLUTION) if self.named else y

    def normalize(
        self, x: jax.Array, mask: jax.Array | None, train: bool, *, name: str, after_conv: bool = True
    ) -> jax.Array:
        """Batch-normalises; with `norm="bias"` nothing is left, or an affine map where no convolution precedes."""
        if self.norm == "bias" and after_conv:
            return x
        layer = BatchNorm(self.dtype, use_statistics=self.norm == "batch", named=self.named, name=name)
        return layer(x, mask, train)


class ConvNorm(nn.Module):
    """A convolution `conv` and its batch normalisation `bn`: the stem, and shortcuts that change the shape."""

    channels: int
    taps: int
    stride: int | Pair
    style: LayerStyle

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[batch, time, freq, in]` to `[batch, time', freq', channels]`; `mask` is that of the output."""
        x = self.style.conv(x, self.channels, self.taps, self.stride, name="conv")
        return self.style.normalize(x, mask, train, name="bn")


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation without reduction: linear `fc1`, SiLU, linear `fc2`, sigmoid, gate on each channel.

    References: Hu et al., Squeeze-and-Excitation Networks, 2018.
    """

    dtype: DTypeLike = jnp.float32

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Scales the channels of `x` `[batch, time, freq, channel]` by gates made from their means over real frames."""
        return x * self.gate(whole.mean(self, x, mask, (1, 2)))[:, None, None, :]

    @nn.compact
    def gate(self, squeezed: jax.Array) -> jax.Array:
        """The gates of means, both `[batch, channel]`."""
        size = squeezed.shape[-1]
        return nn.sigmoid(dense(size, "fc2", self.dtype)(nn.silu(dense(size, "fc1", self.dtype)(squeezed))))


class Block(nn.Module):
    """What the residual blocks share.

    Attributes:
        channels: inner channels; `expansion` times as many come out.
        stride: step in time and frequency.
        squeeze: whether squeeze-and-excitation `se` ends the residual branch.
        style: how layers are made.
    """

    channels: int
    stride: int
    squeeze: bool
    style: LayerStyle
    expansion = 1

    def finish(self, x: jax.Array, y: jax.Array, mask: jax.Array | None, train: bool, gated: bool = False) -> jax.Array:
        """Adds the block's input `x`, through `shortcut` where the shape changes, to the branch `y`.

        `mask` is that of the output. `gated`: the branch has been through squeeze-and-excitation already.
        """
        if self.squeeze and not gated:
            y = SqueezeExcite(self.style.dtype, name="se")(y, mask)
        if self.stride != 1 or x.shape[-1] != y.shape[-1]:
            x = ConvNorm(y.shape[-1], 1, self.stride, self.style, name="shortcut")(x, mask, train)
            x = integers.rounded(self, x, "skipped")
        return x + y


class BasicBlock(Block):
    """Post-activation: conv3x3, BN, ReLU, conv3x3, BN, (SE), add, ReLU. Expects and returns masked frames."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[batch, time, freq, in]` to `[batch, time', freq', channels]`; `mask` is that of the input."""
        after = stride_mask(mask, self.stride)
        x = integers.rounded(self, x, "input")
        y = self.style.conv(x, self.channels, 3, self.stride, name="conv1")
        # The next convolution reads beyond an utterance's end, and must find zeros there, as in the utterance alone.
        y = mask_frames(nn.relu(self.style.normalize(y, after, train, name="bn1")), after)
        y = self.style.conv(y, self.channels, 3, name="conv2")
        # Away from CPUs, crops (no mask) take one map for both, unless the branch is rounded before the gate.
        plain = train and after is None and self.style.norm == "batch" and not integers.at_work(self, "branch")
        gated = self.squeeze and plain and not on_processor()
        if gated:
            y = self._normalized_and_gated(y)
        else:
            y = integers.rounded(self, self.style.normalize(y, after, train, name="bn2"), "branch")
        return mask_frames(relu_of_sum(self.finish(x, y, after, train, gated)), after)

    def _normalized_and_gated(self, y: jax.Array) -> jax.Array:
        """Normalisation and gate of a training batch of crops as one map by utterance and channel.

        Sums by utterance and channel give the statistics of the batch and the means that gates are made from, and in
        the backward pass the gradients of both: an activation is read three times less than by one after the other.
        """
        sums = sample_sums(y, y)
        norm = BatchNorm(self.style.dtype, named=self.style.named, name="bn2")
        slope, shift = norm.line(y, None, True, sums.sum(axis=1))
        slope, shift = slope[None], shift[None]
        means = slope * sums[0] / (y.size // (y.shape[0] * y.shape[-1])) + shift
        gate = SqueezeExcite(self.style.dtype, name="se").gate(means).astype(jnp.float32)
        return scale_samples(y, gate * slope, gate * shift)


class Bottleneck(Block):
    """Post-activation: conv1x1, conv3x3 (the stride is here), conv1x1 to four times the channels; add, ReLU."""

    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[batch, time, freq, in]` to `[batch, time', freq', 4 channels]`; `mask` is that of the input."""
        after = stride_mask(mask, self.stride)
        x = integers.rounded(self, x, "input")
        y = self.style.conv(x, self.channels, 1, name="conv1")
        y = mask_frames(nn.relu(self.style.normalize(y, mask, train, name="bn1")), mask)
        y = self.style.conv(y, self.channels, 3, self.stride, name="conv2")
        # Not masked: the 1x1 convolution that follows looks at no neighbour.
        y = nn.relu(self.style.normalize(y, after, train, name="bn2"))
        y = self.style.conv(y, self.expansion * self.channels, 1, name="conv3")
        y = integers.rounded(self, self.style.normalize(y, after, train, name="bn3"), "branch")
        return mask_frames(relu_of_sum(self.finish(x, y, after, train)), after)


class PreActivationBlock(Block):
    """Pre-activation: three times BN, activation, convolution (3x3, 3x3 and `last_taps`), (SE), add.

    The sum is not masked: padded frames of the output are not zero, and the next block masks what it reads.

    Attributes:
        activation: SiLU in the networks of the paper; some of Kiwano's have ReLU.
        last_taps: kernel size of the third convolution, 1 or 3.
    """

    activation: Activation = nn.silu
    last_taps: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[batch, time, freq, in]` to `[batch, time', freq', channels]`; `mask` is that of the input."""
        after = stride_mask(mask, self.stride)
        y = self.style.normalize(x, mask, train, name="bn1", after_conv=False)
        y = self.style.conv(mask_frames(self.activation(y), mask), self.channels, 3, self.stride, name="conv1")
        y = self._rounded(self.style.normalize(y, after, train, name="bn2"), "inner1")
        y = self.style.conv(mask_frames(self.activation(y), after), self.channels, 3, name="conv2")
        y = self._rounded(self.style.normalize(y, after, train, name="bn3"), "inner2")
        y = mask_frames(self.activation(y), after)
        # No normalisation follows, so with folded ones there is no bias either.
        y = self.style.conv(y, self.channels, self.last_taps, name="conv3", before_norm=False)
        return self.finish(x, integers.rounded(self, y, "branch"), after, train)

    def _rounded(self, y: jax.Array, place: str) -> jax.Array:
        # An engine rounds once, after the activation, only where that is a ReLU.
        return y if self.activation is nn.relu else integers.rounded(self, y, place)
