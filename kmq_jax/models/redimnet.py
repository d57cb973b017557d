"""ReDimNet: each frame is seen now as channels by frequencies, now as one row of as many values.

    stem -> stage0 .. -> weighted sum of all outputs -> pool -> head

A stage sums all outputs so far, weighted value by value, sees them as `[freq, channel]`, folds frequencies into
channels, runs 2-D blocks, and sees the result as a row again, which a time-context block may mix over time.

    stem/conv, stem/norm
    stage{s}/sum/weights                            `[outputs so far, freq * channel]`, but for stage 0
    stage{s}/fold
    stage{s}/block{n}/conv, bn, pointwise                                                 "convnext"
    stage{s}/block{n}/conv1, pointwise1, bn1, conv2, pointwise2, bn2[, se/fc1, se/fc2]    "resnet", "resnet_se"
    stage{s}/squeeze/conv, bn, pointwise           where the stage widens
    stage{s}/context/reduce, norm, mix{0..3}/conv, bn, pointwise, attend/query, key, value, out, norm1, fc1, fc2,
        norm2, expand
    sum/weights, pool/attention1, pool/attention2, head[/bn_in], head/linear

Kernels are `[time, freq, in, out]`, `[time, in, out]` and `[in, out]`. A row holds the channel fastest.

References: Yakovlev et al., Reshape Dimensions Network for Speaker Recognition, 2024; structure and tables read in
wespeaker/models/redimnet.py and IDRnD's redimnet/model.py. IDRnD's weights have tables of their own.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros
from jax.typing import DTypeLike

from kmq_jax.core.errors import UserError
from kmq_jax.models.protocol import GraphBuilder, Part, SpeakerNetwork
from kmq_jax.models.settings import check, check_counts, check_dtype, check_features, is_count
from kmq_jax.nn import whole
from kmq_jax.nn.conv import window
from kmq_jax.nn.frames import frame_mask, mask_frames
from kmq_jax.nn.layers import TORCH_DEFAULT, BatchNorm, Conv, dense
from kmq_jax.nn.pooling import ContextPooling, flatten_frames

BLOCKS = ("convnext", "resnet", "resnet_se")
MIXES = (7, 19, 31, 59)  # taps of the time-context block's convolutions
HEADS = 4
EPSILON = 1e-6  # of layer normalisations, and of `squeeze/bn`


class Stage(NamedTuple):
    """A row of a stage table: frequencies folded into one, blocks, widening, and the reduction of the time context."""

    stride: int
    blocks: int
    widening: int
    reduction: int  # 0: no time context


def _conv(
    channels: int, taps: int | tuple[int, int], dtype: DTypeLike, name: str, bias: bool = True, **more: Any
) -> Conv:
    return Conv(channels, taps, use_bias=bias, dtype=dtype, kernel_init=TORCH_DEFAULT, name=name, **more)


class ConvNext(nn.Module):
    """Grouped convolution, BN, GELU, 1x1 convolution, and the input added. One or two dimensions."""

    taps: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[batch, time, (freq,) channel]` to the same shape."""
        y = _conv(x.shape[-1], self.taps, self.dtype, "conv", groups=self.groups)(mask_frames(x, mask))
        y = nn.gelu(BatchNorm(self.dtype, name="bn")(y, mask, train), approximate=False)
        return x + _conv(x.shape[-1], 1, self.dtype, "pointwise")(y)


class _FrequencySqueeze(nn.Module):
    """Squeeze-and-excitation of the frequencies: gates from their means over channels and time."""

    hidden: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        # Over time by `whole`, so that a long recording can be taken chunk by chunk.
        means = whole.mean(self, x, mask, (1,)).mean(-1)
        hidden = nn.relu(dense(self.hidden, "fc1", self.dtype)(means))
        return x * nn.sigmoid(dense(x.shape[2], "fc2", self.dtype)(hidden))[:, None, :, None]


class ResNetBlock(nn.Module):
    """Grouped 3x3 and 1x1 convolution, ReLU, BN, the same without ReLU, (squeeze), the input added, ReLU."""

    groups: int
    squeeze: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[batch, time, freq, channel]` to the same shape."""
        channels = x.shape[-1]
        y = x
        for n in (1, 2):
            y = _conv(channels, 3, self.dtype, f"conv{n}", bias=False, groups=self.groups)(mask_frames(y, mask))
            y = _conv(channels, 1, self.dtype, f"pointwise{n}")(y)
            y = BatchNorm(self.dtype, name=f"bn{n}")(nn.relu(y) if n == 1 else y, mask, train)
        if self.squeeze:
            y = _FrequencySqueeze(min(64, max(channels, 32)), self.dtype, name="se")(y, mask)
        return nn.relu(x + y)


class _Squeeze(nn.Module):
    """From a widened stage's channels back to those that a row holds."""

    channels: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        y = _conv(self.channels, 3, self.dtype, "conv", groups=self.groups)(mask_frames(x, mask))
        y = nn.gelu(BatchNorm(self.dtype, epsilon=EPSILON, name="bn")(y, mask, train), approximate=False)
        return _conv(self.channels, 1, self.dtype, "pointwise")(y)


def _layer_norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(EPSILON, use_fast_variance=False, name=name)


class Attend(nn.Module):
    """A post-norm transformer layer."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps `[batch, time, channel]` to the same shape."""
        batch, time, size = x.shape

        def heads(name: str) -> jax.Array:
            return dense(size, name, self.dtype)(x).reshape(batch, time, HEADS, -1)

        # The usual 1 / sqrt(values of a head), taken into the query.
        query, key, value = heads("query") * (size // HEADS) ** -0.5, heads("key"), heads("value")
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
        if mask is not None:
            # Not minus infinity: a row of padding alone would then be NaN, and so would its gradient.
            logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits, axis=-1), mask_frames(value, mask))
        x = _layer_norm("norm1")(x + dense(size, "out", self.dtype)(mixed.reshape(batch, time, size)))
        hidden = nn.gelu(dense(size, "fc1", self.dtype)(x), approximate=True)
        return _layer_norm("norm2")(x + dense(size, "fc2", self.dtype)(hidden))


class TimeContext(nn.Module):
    """A row is reduced, mixed over time by depthwise convolutions and attention, and expanded again."""

    reduction: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[batch, time, values]` to the same shape."""
        size = x.shape[-1] // self.reduction
        y = _layer_norm("norm")(_conv(size, 1, self.dtype, "reduce")(x))
        for n, taps in enumerate(MIXES):
            y = ConvNext(taps, size, self.dtype, name=f"mix{n}")(y, mask, train)
        y = Attend(self.dtype, name="attend")(y, mask)
        return x + _conv(x.shape[-1], 1, self.dtype, "expand")(y)


class WeightedSum(nn.Module):
    """The sum of rows, by weights for each value that come to one."""

    @nn.compact
    def __call__(self, rows: list[jax.Array]) -> jax.Array:
        """Maps rows `[batch, time, values]` to one."""
        if len(rows) == 1:
            return rows[0]
        # Zeros at the start: the plain mean of all rows so far.
        weights = nn.softmax(self.param("weights", zeros, (len(rows), rows[0].shape[-1])), axis=0)
        return functools.reduce(jnp.add, [weight[None, None] * row for weight, row in zip(weights, rows)])


class _Stage(nn.Module):
    """One stage: rows so far in, one row out."""

    stage: Stage
    shape: tuple[int, int]  # frequencies and channels before
    block: str
    group_divisor: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, rows: list[jax.Array], mask: jax.Array | None, train: bool) -> jax.Array:
        (freqs, channels), stage = self.shape, self.stage
        x = WeightedSum(name="sum")(rows)
        x = x.reshape(*x.shape[:2], freqs, channels)
        # As many neighbouring frequencies become channels as the stride tells: a row keeps its number of values.
        channels *= stage.stride
        wide, fold = channels * stage.widening, (1, stage.stride)
        x = _conv(wide, fold, self.dtype, "fold", stride=fold, padding="valid")(x)
        for n in range(stage.blocks):
            name = f"block{n}"
            groups = wide // self.group_divisor
            if self.block == "convnext":
                x = ConvNext(3, groups, self.dtype, name=name)(x, mask, train)
            else:
                x = ResNetBlock(groups, self.block == "resnet_se", self.dtype, name=name)(x, mask, train)
        if stage.widening != 1:
            x = _Squeeze(channels, channels // self.group_divisor, self.dtype, name="squeeze")(x, mask, train)
        x = flatten_frames(x)
        return TimeContext(stage.reduction, self.dtype, name="context")(x, mask, train) if stage.reduction else x


class _Stem(nn.Module):
    """3x3 convolution and a normalisation over channels."""

    channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _layer_norm("norm")(_conv(self.channels, 3, self.dtype, "conv")(x))


class _Head(nn.Module):
    """Perhaps a normalisation, and a linear layer; in float32."""

    embedding_size: int
    normalize: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = BatchNorm(name="bn_in")(x, None, train) if self.normalize else x
        return dense(self.embedding_size, "linear")(x)


class ReDimNet(SpeakerNetwork):
    """ReDimNet; build one by `kmq_jax.models.registry.build("redimnet_b0")` to `"redimnet_b6"`.

    Attributes:
        features: mel bands.
        embedding_size: dimension of the embedding.
        width: channels behind the first convolution.
        block: kind of 2-D block, "convnext", "resnet" or "resnet_se".
        group_divisor: channels of a group of grouped convolutions.
        stages: rows of the stage table: stride, blocks, widening, reduction (0: no time context).
        context: whether the pooling's attention sees the whole utterance.
        head_norm: whether a normalisation precedes the last layer, as in IDRnD's; WeSpeaker's have none.
        dtype: compute dtype. Parameters, statistics, pooling and the head are float32.
    """

    features: int = 72
    embedding_size: int = 192
    width: int = 16
    block: str = "convnext"
    group_divisor: int = 4
    stages: tuple[tuple[int, ...], ...] = ((1, 2, 1, 12),)
    context: bool = True
    head_norm: bool = False
    dtype: DTypeLike = "float32"

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: one is not allowed; the message names it.
        """
        check_counts(features=self.features, embedding_size=self.embedding_size, width=self.width)
        check_counts(group_divisor=self.group_divisor)
        check("block", self.block in BLOCKS, self.block, f"one of {', '.join(BLOCKS)}")
        check_dtype(self.dtype)
        # From a file they come as lists, which cannot be hashed as a static argument of jit.
        self.stages = tuple(tuple(stage) for stage in self.stages)
        for i, stage in enumerate(self.stages):
            check(f"stages[{i}]", len(stage) == 4, stage, "stride, blocks, widening, reduction")
            check_counts(**{f"stages[{i}].{name}": n for name, n in zip(("stride", "blocks", "widening"), stage)})
            check(f"stages[{i}].reduction", stage[3] == 0 or is_count(stage[3]), stage[3], "a positive integer or 0")
        self._check_sizes()
        super().__post_init__()

    @nn.nowrap
    def _check_sizes(self) -> None:
        """Refuses stages whose strides, reductions or groups do not divide what they must."""
        freqs, channels = self.features, self.width
        for stride, _, widening, reduction in self.stages:
            size = self.features * self.width // reduction if reduction else HEADS
            if freqs % stride or size < HEADS or size % HEADS:
                raise UserError(
                    f"stages (={self.stages}) do not divide {self.features} features, {self.width} channels"
                )
            freqs, channels = freqs // stride, channels * stride
            for n in (channels, channels * widening):
                groups = n // self.group_divisor
                fits = groups > 0 and n % groups == 0
                check("group_divisor", fits, self.group_divisor, f"one that makes equal groups of {n} channels")

    @nn.nowrap
    def _shapes(self) -> list[tuple[Stage, tuple[int, int]]]:
        """Each stage, and the frequencies and channels before it."""
        found, freqs, channels = [], self.features, self.width
        for row in self.stages:
            stage = Stage(*row)
            found.append((stage, (freqs, channels)))
            freqs, channels = freqs // stage.stride, channels * stage.stride
        return found

    @nn.nowrap
    def _pool(self) -> ContextPooling:
        return ContextPooling(128, 1e-7, self.context, dtype=self.dtype, name="pool")

    @nn.compact
    def __call__(self, features: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Embeds a batch of utterances; see `SpeakerNetwork`.

        Raises:
            UserError: the input has not the network's number of features.
        """
        check_features(features.shape, self.features)
        mask = frame_mask(lengths, features.shape[1])
        x = mask_frames(features.astype(self.dtype)[..., None], mask)
        rows = [flatten_frames(_Stem(self.width, self.dtype, name="stem")(x))]
        for i, (stage, shape) in enumerate(self._shapes()):
            made = _Stage(stage, shape, self.block, self.group_divisor, self.dtype, name=f"stage{i}")
            # Later stages convolve over the ends of utterances: what stands behind them must stay zero.
            rows.append(mask_frames(made(rows, mask, train), mask))
        pooled = self._pool()(WeightedSum(name="sum")(rows), mask, train)
        return _Head(self.embedding_size, self.head_norm, name="head")(pooled, train)

    @nn.nowrap
    def parts(self) -> tuple[Part, ...]:
        """The stem, every block and context of the stages, the pooling and the head."""
        parts = [Part("stem", "stem")]
        for i, row in enumerate(self.stages):
            name, stage = f"stage{i}", Stage(*row)
            inner = [f"{name}/sum", f"{name}/fold", *(f"{name}/block{n}" for n in range(stage.blocks))]
            inner += [f"{name}/squeeze"] if stage.widening != 1 else []
            inner += [f"{name}/context"] if stage.reduction else []
            parts += [Part(part, name, distilled=part == inner[-1]) for part in inner]
        return (*parts, Part("sum", "pooling"), Part("pool", "pooling"), Part("head", "embedding"))

    @nn.nowrap
    def to_onnx(self, graph: GraphBuilder, feats: str) -> str:
        """Adds the network to a graph; rows are `[batch, time, values]`."""
        x = graph.conv(graph.node("Unsqueeze", feats, graph.integers(1)), "stem/conv")
        frames = graph.node("Transpose", x, perm=[0, 2, 3, 1])
        size = self.features * self.width
        rows = [graph.node("Reshape", graph.layer_norm(frames, "stem/norm", EPSILON), graph.integers(0, 0, size))]
        for i, (stage, shape) in enumerate(self._shapes()):
            rows.append(_stage_to_onnx(graph, rows, f"stage{i}", stage, shape, self))
        x = graph.channels_of(_sum_to_onnx(graph, rows, "sum"))
        pooled = self._pool().to_onnx(graph, x, "pool")
        return graph.linear(graph.scale_and_shift(pooled, "head/bn_in", 2), "head/linear")


def _gelu(graph: GraphBuilder, x: str) -> str:
    """The exact GELU, x / 2 * (1 + erf(x / sqrt 2))."""
    half = graph.node("Mul", x, graph.number(0.5))
    erf = graph.node("Erf", graph.node("Mul", x, graph.number(math.sqrt(0.5))))
    return graph.node("Mul", half, graph.node("Add", erf, graph.number(1.0)))


def _tanh_gelu(graph: GraphBuilder, x: str) -> str:
    """The GELU's approximation by a hyperbolic tangent, as the transformer layer has it."""
    cube = graph.node("Mul", graph.node("Mul", x, x), x)
    inner = graph.node("Add", x, graph.node("Mul", cube, graph.number(0.044715)))
    tanh = graph.node("Tanh", graph.node("Mul", inner, graph.number(math.sqrt(2 / math.pi))))
    return graph.node("Mul", graph.node("Mul", x, graph.number(0.5)), graph.node("Add", tanh, graph.number(1.0)))


def _sum_to_onnx(graph: GraphBuilder, rows: list[str], at: str) -> str:
    if len(rows) == 1:
        return rows[0]
    weights = graph.node("Softmax", graph.parameter(f"{at}/weights"), axis=0)
    total = ""
    for n, row in enumerate(rows):
        term = graph.node("Mul", row, graph.node("Gather", weights, graph.integers(n), axis=0))
        total = graph.node("Add", total, term) if total else term
    return total


def _convnext_to_onnx(graph: GraphBuilder, x: str, at: str, rank: int, taps: int, groups: int) -> str:
    y = graph.conv(x, f"{at}/conv", window(rank, taps, groups=groups))
    y = _gelu(graph, graph.scale_and_shift(y, f"{at}/bn", rank + 2))
    return graph.node("Add", x, graph.conv(y, f"{at}/pointwise"))


def _resnet_to_onnx(graph: GraphBuilder, x: str, at: str, groups: int) -> str:
    y = x
    for n in (1, 2):
        y = graph.conv(y, f"{at}/conv{n}", window(2, 3, groups=groups))
        y = graph.conv(y, f"{at}/pointwise{n}")
        y = graph.scale_and_shift(graph.activation(y, nn.relu) if n == 1 else y, f"{at}/bn{n}", 4)
    if graph.has(f"{at}/se"):
        means = graph.node("ReduceMean", y, graph.integers(1, 2), keepdims=0)
        gate = graph.linear(graph.activation(graph.linear(means, f"{at}/se/fc1"), nn.relu), f"{at}/se/fc2")
        y = graph.node("Mul", y, graph.node("Unsqueeze", graph.activation(gate, nn.sigmoid), graph.integers(1, 2)))
    return graph.activation(graph.node("Add", x, y), nn.relu)


def _stage_to_onnx(
    graph: GraphBuilder, rows: list[str], at: str, stage: Stage, shape: tuple[int, int], network: ReDimNet
) -> str:
    freqs, channels = shape
    x = graph.node("Reshape", _sum_to_onnx(graph, rows, f"{at}/sum"), graph.integers(0, 0, freqs, channels))
    fold = (1, stage.stride)
    x = graph.conv(graph.node("Transpose", x, perm=[0, 3, 1, 2]), f"{at}/fold", window(2, fold, fold, "valid"))
    channels *= stage.stride
    groups = channels * stage.widening // network.group_divisor
    for n in range(stage.blocks):
        if network.block == "convnext":
            x = _convnext_to_onnx(graph, x, f"{at}/block{n}", 2, 3, groups)
        else:
            x = _resnet_to_onnx(graph, x, f"{at}/block{n}", groups)
    if stage.widening != 1:
        x = graph.conv(x, f"{at}/squeeze/conv", window(2, 3, groups=channels // network.group_divisor))
        x = _gelu(graph, graph.scale_and_shift(x, f"{at}/squeeze/bn", 4, EPSILON))
        x = graph.conv(x, f"{at}/squeeze/pointwise")
    row = graph.frames_of(x, network.features * network.width)
    if not stage.reduction:
        return row
    size = network.features * network.width // stage.reduction
    x = graph.frames_of(graph.conv(graph.channels_of(row), f"{at}/context/reduce"))
    x = graph.channels_of(graph.layer_norm(x, f"{at}/context/norm", EPSILON))
    for n, taps in enumerate(MIXES):
        x = _convnext_to_onnx(graph, x, f"{at}/context/mix{n}", 1, taps, size)
    x = _attend_to_onnx(graph, graph.frames_of(x), f"{at}/context/attend", size)
    return graph.node("Add", row, graph.frames_of(graph.conv(graph.channels_of(x), f"{at}/context/expand")))


def _attend_to_onnx(graph: GraphBuilder, x: str, at: str, size: int) -> str:
    def heads(name: str, perm: list[int]) -> str:
        y = graph.node("Reshape", graph.linear_frames(x, f"{at}/{name}"), graph.integers(0, 0, HEADS, size // HEADS))
        return graph.node("Transpose", y, perm=perm)

    query = graph.node("Mul", heads("query", [0, 2, 1, 3]), graph.number((size // HEADS) ** -0.5))
    weights = graph.node("Softmax", graph.node("MatMul", query, heads("key", [0, 2, 3, 1])), axis=-1)
    mixed = graph.node("Transpose", graph.node("MatMul", weights, heads("value", [0, 2, 1, 3])), perm=[0, 2, 1, 3])
    mixed = graph.linear_frames(graph.node("Reshape", mixed, graph.integers(0, 0, size)), f"{at}/out")
    x = graph.layer_norm(graph.node("Add", x, mixed), f"{at}/norm1", EPSILON)
    hidden = _tanh_gelu(graph, graph.linear_frames(x, f"{at}/fc1"))
    return graph.layer_norm(graph.node("Add", x, graph.linear_frames(hidden, f"{at}/fc2")), f"{at}/norm2", EPSILON)


TABLES: dict[str, dict[str, object]] = {
    "redimnet_b0": {
        "features": 60, "width": 10, "block": "resnet", "group_divisor": 1,
        "stages": ((1, 2, 1, 30), (2, 3, 2, 30), (1, 3, 3, 30), (2, 4, 2, 10), (1, 3, 1, 10)),
    },
    "redimnet_b1": {
        "features": 72, "width": 12, "block": "convnext", "group_divisor": 8,
        "stages": ((1, 2, 1, 0), (2, 3, 1, 0), (3, 4, 1, 12), (2, 5, 1, 12), (2, 3, 1, 8)),
    },
    "redimnet_b2": {
        "features": 72, "width": 16, "block": "convnext", "group_divisor": 4,
        "stages": ((1, 2, 1, 12), (2, 2, 1, 12), (1, 3, 1, 12), (2, 4, 1, 8), (1, 4, 1, 8), (2, 4, 1, 4)),
    },
    "redimnet_b3": {
        "features": 72, "width": 16, "block": "resnet_se", "group_divisor": 1,
        "stages": ((1, 6, 4, 32), (2, 6, 2, 32), (1, 8, 2, 32), (2, 10, 2, 16), (1, 10, 1, 16), (2, 8, 1, 16)),
    },
    "redimnet_b4": {
        "features": 72, "width": 32, "block": "resnet_se", "group_divisor": 1,
        "stages": ((1, 4, 2, 48), (2, 4, 2, 48), (1, 6, 2, 48), (2, 6, 1, 32), (1, 8, 1, 24), (2, 4, 1, 16)),
    },
    "redimnet_b5": {
        "features": 72, "width": 32, "block": "resnet_se", "group_divisor": 16,
        "stages": ((1, 4, 2, 48), (2, 4, 2, 48), (1, 6, 2, 48), (2, 6, 1, 32), (1, 8, 1, 24), (2, 4, 1, 16)),
    },
    "redimnet_b6": {
        "features": 72, "width": 32, "block": "resnet", "group_divisor": 32,
        "stages": ((1, 4, 4, 32), (2, 6, 2, 32), (1, 6, 2, 24), (3, 8, 1, 24), (1, 8, 1, 16), (2, 8, 1, 16)),
    },
}  # fmt: skip
"""Settings of WeSpeaker's seven networks."""
