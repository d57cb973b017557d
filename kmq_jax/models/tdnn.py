"""Time-delay networks: ECAPA-TDNN in WeSpeaker's and in SpeechBrain's layout, and the x-vector network.

Their unit is convolution, ReLU, batch normalisation, in this order: a normalisation cannot be folded into the
convolution before it.

ECAPA, `layer1` -> `layer2` -> `layer3` -> `layer4`, the last three side by side -> `mfa` -> `pool` -> `head`:

    layer1/conv, bn
    layer{2..4}/in/conv, bn; res2/unit{0..6}/conv, bn; out/conv, bn; se/fc1, fc2
    mfa/conv[, bn]                                    `bn` in SpeechBrain's
    pool/attention1[, bn], pool/attention2
    head/bn_in, head/linear

A Res2 part cuts the channels into eight chunks. WeSpeaker passes the last one through and runs the others; SpeechBrain
passes the first. SpeechBrain's convolutions mirror an utterance at its ends, WeSpeaker's see zeros there.

The x-vector network, without padding:

    frame{1..5}/conv, bn -> pool -> head/linear1, head/bn, head/linear2        normalisations without scale and bias

All convolutions and linear layers have biases. Kernels are `[time, in, out]` and `[in, out]`.

References: Desplanques et al., ECAPA-TDNN, 2020; Snyder et al., X-Vectors, 2018; structure read in
wespeaker/models/ecapa_tdnn.py and tdnn.py and in speechbrain/lobes/models/ECAPA_TDNN.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kmq_jax.models.protocol import GraphBuilder, Part, SpeakerNetwork
from kmq_jax.models.settings import check, check_counts, check_dtype, check_features
from kmq_jax.nn import whole
from kmq_jax.nn.conv import window
from kmq_jax.nn.frames import frame_mask, mask_frames, reflect_frames, stride_mask
from kmq_jax.nn.layers import TORCH_DEFAULT, BatchNorm, Conv, dense
from kmq_jax.nn.pooling import ContextPooling, StatisticsPooling

SCALE = 8  # chunks of a Res2 part
SQUEEZE = 128  # hidden units of squeeze-and-excitation
FRAMES = {"frame1": (5, 1), "frame2": (3, 2), "frame3": (3, 3), "frame4": (1, 1), "frame5": (1, 1)}  # taps, dilation
WESPEAKER, SPEECHBRAIN = "wespeaker", "speechbrain"
_PADDING = {WESPEAKER: "same", SPEECHBRAIN: "reflect"}
_PASSED = {WESPEAKER: -1, SPEECHBRAIN: 0}  # the chunk that a Res2 part passes through


class Unit(nn.Module):
    """Convolution, ReLU, batch normalisation."""

    channels: int
    taps: int
    dilation: int
    dtype: DTypeLike
    padding: str = "same"  # or "reflect", or "valid"
    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[batch, time, in]`, padded frames zero, to `[batch, time', channels]`; `mask` is that of the output.

        Padded frames of the output are zero.
        """
        padding = self.padding
        if padding == "reflect":
            x, padding = reflect_frames(x, mask, self.dilation * (self.taps // 2)), "valid"
        conv = Conv(
            self.channels,
            self.taps,
            use_bias=True,
            dtype=self.dtype,
            kernel_init=TORCH_DEFAULT,
            padding=padding,
            dilation=self.dilation,
            name="conv",
        )
        return mask_frames(BatchNorm(self.dtype, affine=self.affine, name="bn")(nn.relu(conv(x)), mask, train), mask)


class Res2(nn.Module):
    """Chunks of the channels in a chain: each is convolved together with the result of the one before it."""

    dilation: int
    layout: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[batch, time, channels]` to the same shape."""
        chunks = jnp.split(x, SCALE, axis=-1)
        passed = chunks.pop(_PASSED[self.layout])
        done: list[jax.Array] = []
        for n, chunk in enumerate(chunks):
            unit = Unit(chunk.shape[-1], 3, self.dilation, self.dtype, _PADDING[self.layout], name=f"unit{n}")
            done.append(unit(chunk + done[-1] if done else chunk, mask, train))
        return jnp.concatenate([passed, *done] if _PASSED[self.layout] == 0 else [*done, passed], axis=-1)


class _Squeeze(nn.Module):
    """Squeeze-and-excitation over time."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        hidden = nn.relu(dense(SQUEEZE, "fc1", self.dtype)(whole.mean(self, x, mask, (1,))))
        return x * nn.sigmoid(dense(x.shape[-1], "fc2", self.dtype)(hidden))[:, None]


class SeRes2Block(nn.Module):
    """1x1 unit, Res2 part, 1x1 unit, squeeze-and-excitation, and the input added."""

    dilation: int
    layout: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Maps `[batch, time, channels]`, padded frames zero, to the same."""
        y = Unit(x.shape[-1], 1, 1, self.dtype, name="in")(x, mask, train)
        y = Res2(self.dilation, self.layout, self.dtype, name="res2")(y, mask, train)
        y = Unit(x.shape[-1], 1, 1, self.dtype, name="out")(y, mask, train)
        return x + _Squeeze(self.dtype, name="se")(y, mask)


class _Aggregation(nn.Module):
    """The 1x1 convolution over the outputs of all blocks, ReLU, and in SpeechBrain's layout a normalisation."""

    channels: int
    normalize: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        conv = Conv(self.channels, 1, use_bias=True, dtype=self.dtype, kernel_init=TORCH_DEFAULT, name="conv")
        y = nn.relu(conv(x))
        return BatchNorm(self.dtype, name="bn")(y, mask, train) if self.normalize else y


class _Head(nn.Module):
    """Normalisation `bn_in` and linear layer `linear`, in float32."""

    embedding_size: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return dense(self.embedding_size, "linear")(BatchNorm(name="bn_in")(x, None, train))


class Ecapa(SpeakerNetwork):
    """ECAPA-TDNN; build one by `kmq_jax.models.registry.build`.

    Attributes:
        features: mel bands.
        embedding_size: dimension of the embedding.
        width: channels of the blocks, a multiple of 8.
        aggregated: channels before the pooling; WeSpeaker's 1536 at both widths, SpeechBrain's three times the width.
        layout: "wespeaker" or "speechbrain".
        context: whether attention sees the utterance's mean and deviation ("GLOB").
        dtype: compute dtype. Parameters, statistics, pooling and the head are float32.
    """

    features: int = 80
    embedding_size: int = 192
    width: int = 512
    aggregated: int = 1536
    layout: str = WESPEAKER
    context: bool = True
    dtype: DTypeLike = "float32"

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: one is not allowed; the message names it.
        """
        check_counts(features=self.features, embedding_size=self.embedding_size, width=self.width)
        check_counts(aggregated=self.aggregated)
        check("width", self.width % SCALE == 0, self.width, f"a multiple of {SCALE}")
        check("layout", self.layout in (WESPEAKER, SPEECHBRAIN), self.layout, f"{WESPEAKER} or {SPEECHBRAIN}")
        check_dtype(self.dtype)
        super().__post_init__()

    @nn.nowrap
    def _pool(self) -> ContextPooling:
        theirs = self.layout == SPEECHBRAIN
        floor = 1e-12 if theirs else 1e-7
        return ContextPooling(128, floor, self.context, normalize=theirs, biased=theirs, dtype=self.dtype, name="pool")

    @nn.compact
    def __call__(self, features: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Embeds a batch of utterances; see `SpeakerNetwork`.

        Raises:
            UserError: the input has not the network's number of features.
        """
        check_features(features.shape, self.features)
        mask = frame_mask(lengths, features.shape[1])
        x = mask_frames(features.astype(self.dtype), mask)
        x = Unit(self.width, 5, 1, self.dtype, _PADDING[self.layout], name="layer1")(x, mask, train)
        outputs = []
        for dilation in (2, 3, 4):
            x = SeRes2Block(dilation, self.layout, self.dtype, name=f"layer{dilation}")(x, mask, train)
            outputs.append(x)
        normalize = self.layout == SPEECHBRAIN
        mfa = _Aggregation(self.aggregated, normalize, self.dtype, name="mfa")
        pooled = self._pool()(mfa(jnp.concatenate(outputs, axis=-1), mask, train), mask, train)
        return _Head(self.embedding_size, name="head")(pooled, train)

    @nn.nowrap
    def parts(self) -> tuple[Part, ...]:
        """The four layers, the aggregation, the pooling and the head."""
        layers = [Part(f"layer{n}", f"layer{n}", distilled=True) for n in (1, 2, 3, 4)]
        return (*layers, Part("mfa", "aggregation"), Part("pool", "pooling"), Part("head", "embedding"))

    @nn.nowrap
    def chunk_step(self) -> int:
        """Any frame."""
        return 1

    @nn.nowrap
    def least_frames(self) -> int:
        """A mirror of four frames needs five."""
        return 5 if self.layout == SPEECHBRAIN else 1

    @nn.nowrap
    def to_onnx(self, graph: GraphBuilder, feats: str) -> str:
        """Adds the network to a graph."""
        x = _unit_to_onnx(graph, graph.channels_of(feats), "layer1", 5, 1, _PADDING[self.layout])
        outputs = []
        for dilation in (2, 3, 4):
            x = _block_to_onnx(graph, x, f"layer{dilation}", dilation, self.layout)
            outputs.append(x)
        x = graph.activation(graph.conv(graph.node("Concat", *outputs, axis=1), "mfa/conv"), nn.relu)
        x = graph.scale_and_shift(x, "mfa/bn", 3)
        pooled = self._pool().to_onnx(graph, x, "pool")
        return graph.linear(graph.scale_and_shift(pooled, "head/bn_in", 2), "head/linear")


def _unit_to_onnx(graph: GraphBuilder, x: str, at: str, taps: int, dilation: int, padding: str = "same") -> str:
    """A `Unit` on `[batch, channel, time]`."""
    pad = dilation * (taps // 2)
    if padding == "reflect" and pad:
        x = graph.node("Pad", x, graph.integers(0, 0, pad, 0, 0, pad), mode="reflect")
    moves = window(1, taps, padding="same" if padding == "same" else "valid", dilation=dilation)
    return graph.scale_and_shift(graph.activation(graph.conv(x, f"{at}/conv", moves), nn.relu), f"{at}/bn", 3)


def _block_to_onnx(graph: GraphBuilder, x: str, at: str, dilation: int, layout: str) -> str:
    """A `SeRes2Block` on `[batch, channel, time]`."""
    y = _unit_to_onnx(graph, x, f"{at}/in", 1, 1)
    # Channels of a chunk: an eighth of those that there are, which only the graph knows.
    size = graph.node("Div", graph.node("Shape", y, start=1, end=2), graph.integers(SCALE))
    chunks = [
        graph.node(
            "Slice",
            y,
            graph.node("Mul", size, graph.integers(n)),
            graph.node("Mul", size, graph.integers(n + 1)),
            graph.integers(1),
        )
        for n in range(SCALE)
    ]
    passed = chunks.pop(_PASSED[layout])
    done: list[str] = []
    for n, chunk in enumerate(chunks):
        given = graph.node("Add", chunk, done[-1]) if done else chunk
        done.append(_unit_to_onnx(graph, given, f"{at}/res2/unit{n}", 3, dilation, _PADDING[layout]))
    y = graph.node("Concat", *([passed, *done] if _PASSED[layout] == 0 else [*done, passed]), axis=1)
    y = _unit_to_onnx(graph, y, f"{at}/out", 1, 1)
    squeezed = graph.mean_over_time(y, f"{at}/se")
    hidden = graph.activation(graph.linear(squeezed, f"{at}/se/fc1"), nn.relu)
    gate = graph.activation(graph.linear(hidden, f"{at}/se/fc2"), nn.sigmoid)
    return graph.node("Add", x, graph.node("Mul", y, graph.node("Unsqueeze", gate, graph.integers(2))))


class _XvectorHead(nn.Module):
    """Linear, ReLU, normalisation, linear: the embedding is the last, "b"."""

    embedding_size: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(dense(self.embedding_size, "linear1")(x))
        return dense(self.embedding_size, "linear2")(BatchNorm(affine=False, name="bn")(y, None, train))


class Xvector(SpeakerNetwork):
    """The x-vector network, as WeSpeaker has it.

    Attributes:
        features: mel bands.
        embedding_size: dimension of the embedding.
        width: channels of the first four convolutions.
        pooled: channels of the fifth.
        dtype: compute dtype. Parameters, statistics, pooling and the head are float32.
    """

    features: int = 80
    embedding_size: int = 512
    width: int = 512
    pooled: int = 1500
    dtype: DTypeLike = "float32"

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: one is not allowed; the message names it.
        """
        check_counts(features=self.features, embedding_size=self.embedding_size, width=self.width, pooled=self.pooled)
        check_dtype(self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(self, features: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Embeds a batch of utterances; see `SpeakerNetwork`.

        Raises:
            UserError: the input has not the network's number of features.
        """
        check_features(features.shape, self.features)
        x, mask = features.astype(self.dtype), frame_mask(lengths, features.shape[1])
        for name, (taps, dilation) in FRAMES.items():
            # Without padding a frame of the output sees real frames alone, or is none itself.
            mask = stride_mask(mask, 1, dilation * (taps - 1))
            channels = self.pooled if name == "frame5" else self.width
            x = Unit(channels, taps, dilation, self.dtype, "valid", affine=False, name=name)(x, mask, train)
        return _XvectorHead(self.embedding_size, name="head")(StatisticsPooling(name="pool")(x, mask), train)

    @nn.nowrap
    def parts(self) -> tuple[Part, ...]:
        """The five convolutions, the pooling and the head."""
        parts, lost = [], 0
        for name, (taps, dilation) in FRAMES.items():
            lost += dilation * (taps - 1)
            parts.append(Part(name, name, lost=lost))
        return (*parts, Part("pool", "pooling"), Part("head", "embedding"))

    @nn.nowrap
    def chunk_step(self) -> int:
        """Any frame."""
        return 1

    @nn.nowrap
    def to_onnx(self, graph: GraphBuilder, feats: str) -> str:
        """Adds the network to a graph."""
        x = graph.channels_of(feats)
        for name, (taps, dilation) in FRAMES.items():
            x = _unit_to_onnx(graph, x, name, taps, dilation, "valid")
        x = graph.linear(graph.statistics(graph.frames_of(x), StatisticsPooling.floor), "head/linear1")
        return graph.linear(graph.scale_and_shift(graph.activation(x, nn.relu), "head/bn", 2), "head/linear2")
