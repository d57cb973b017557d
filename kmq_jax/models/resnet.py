"""Residual speaker-embedding networks: Kiwano's family and WeSpeaker's.

    features [batch, time, mel] -> stem -> stage1..stage4 -> pool -> head -> embedding [batch, embedding_size]

Both are one Linen module, `ResNet`, in different settings. `kiwano` makes ResNet-18/36 (post-activation) and
50/101/200 (pre-activation) as used in the study of quantization errors that this project reproduces: SiLU stem,
channels 128/128/256/256, squeeze-and-excitation in the first two stages, attentive statistics pooling, and a head of
BN, linear, BN. `wespeaker` makes WeSpeaker's: ReLU stem, channels 32/64/128/256, basic blocks or bottlenecks with
four times the channels, statistics pooling and a linear head.

Parameter names, which quantization rules, imports and diagnosis rely on. Stages count from 1, blocks from 0; every
convolution and linear layer holds `kernel`, every batch normalisation `scale` and `bias` (and, in `batch_stats`,
`mean` and `var`).

    stem/conv, stem/bn
    stage{1..4}/block{n}/conv1, bn1, conv2, bn2[, conv3, bn3]
    stage{1..4}/block{n}/shortcut/conv, shortcut/bn      where stride or channels change
    stage{1..4}/block{n}/se/fc1, se/fc2                  with a bias; stages 1 and 2 of Kiwano's
    pool/attention1, pool/attention2                     with a bias; Kiwano's
    head/linear                                          with a bias
    head/bn_in, head/bn                                  before and after `linear`; Kiwano's

With `norm="bias"` batch normalisation is folded away: convolutions that it followed have a `bias` of their own and
no `bn` is left, but for the `bn1` of pre-activation blocks, which acts on a sum and stays as scale and bias.

Kernels are `[time, freq, in, out]` and linear kernels `[in, out]`. Kiwano's convolution weights are
`[out, in, time, freq]`, WeSpeaker's `[out, in, freq, time]`. Where the pooled features appear (rows of
`pool/attention1/kernel`, columns of `pool/attention2`, and, means before deviations, `head/bn_in` and the rows of
`head/linear/kernel`) they are flattened with the channel fastest; `nn.pooling.flatten_order` permutes imported ones.

Convolutions start as in the originals: Kiwano's by Kaiming's normal (fan out), WeSpeaker's by PyTorch's default.

References: Kiwano https://github.com/mrouvier/kiwano, WeSpeaker https://github.com/wenet-e2e/wespeaker (structure read
in kiwano/model/resnet.py and wespeaker/models/resnet.py; He et al. 2016 for both kinds of block).
"""

from collections.abc import Sequence
from typing import Any, TypeAlias, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from kmq_jax.models import resnet_onnx
from kmq_jax.models.protocol import GraphBuilder, Part, SpeakerNetwork
from kmq_jax.models.settings import check, check_counts, check_dtype, check_features, is_count
from kmq_jax.nn.frames import frame_mask, mask_frames, stride_mask
from kmq_jax.nn.layers import (
    CONVOLUTION,
    KAIMING_NORMAL,
    STATISTICS,
    TORCH_DEFAULT,
    BasicBlock,
    Block,
    Bottleneck,
    ConvNorm,
    LayerStyle,
    PreActivationBlock,
    dense,
)
from kmq_jax.nn.pooling import AttentiveStatisticsPooling, StatisticsPooling

Option: TypeAlias = Any
"""The value of an attribute that only some blocks have: a function for `activation`, a number for `last_taps`."""
STRIDES = (1, 2, 2, 2)
SMOKE = {"width": 8, "blocks": (1, 1, 1, 1), "embedding_size": 32}
"""Settings of a network that passes through a whole run in seconds."""
ACTIVATIONS = {"silu": nn.silu, "relu": nn.relu}
KEPT: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "statistics": (STATISTICS,),
    "convolutions": (STATISTICS, CONVOLUTION),
}
"""What blocks that are recomputed in the backward pass keep from the forward pass, by the name of a policy.

Statistics are two numbers a channel, and save reading an activation once more for each normalisation. With what
convolutions give, no convolution is computed twice: about half of the memory of a network that keeps everything.
"""


class Stage(nn.Module):
    """Residual blocks `block0`, `block1`, ...; the first has the stage's stride.

    Attributes:
        block: kind of block.
        count: how many.
        channels: inner channels of each.
        stride: step of the first block in time and frequency.
        squeeze: whether blocks end in squeeze-and-excitation.
        style: how layers are made.
        options: further attributes of every block.
        remat: recompute a block's activations in the backward pass instead of keeping them.
        keeps: which of them are kept all the same; see `KEPT`.
    """

    block: type[Block]
    count: int
    channels: int
    stride: int
    squeeze: bool
    style: LayerStyle
    options: tuple[tuple[str, Option], ...]
    remat: bool = False
    keeps: str = "statistics"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> tuple[jax.Array, jax.Array | None]:
        """Maps `[batch, time, freq, channel]` and its mask to the stage's output and mask."""
        block = self.block
        if self.remat:
            policy = jax.checkpoint_policies.save_only_these_names(*KEPT[self.keeps])
            # Argument 3 is `train`, counting the module as 0: a Python bool, not an array.
            block = nn.remat(self.block, static_argnums=(3,), policy=policy)
        for n in range(self.count):
            stride = self.stride if n == 0 else 1
            x = block(self.channels, stride, self.squeeze, self.style, **dict(self.options), name=f"block{n}")(
                x, mask, train
            )
            mask = stride_mask(mask, stride)
        return x, mask


class Head(nn.Module):
    """From pooled statistics to the embedding, in float32: (BN `bn_in`), linear `linear`, (BN `bn`).

    Attributes:
        embedding_size: dimension of the embedding.
        style: how layers are made; `norm="bias"` means that both normalisations are folded into `linear`.
        normalize: whether there are normalisations.
    """

    embedding_size: int
    style: LayerStyle
    normalize: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, statistics]` to float32 `[batch, embedding_size]`."""
        if self.normalize:
            x = self.style.normalize(x, None, train, name="bn_in")
        x = dense(self.embedding_size, "linear")(x)
        if self.normalize:
            x = self.style.normalize(x, None, train, name="bn")
        return x


class ResNet(SpeakerNetwork):
    """A residual speaker-embedding network; build one by `kmq_jax.models.registry.build`.

    Attributes:
        features: features a frame, the last axis of the input.
        embedding_size: dimension of the embedding.
        block: kind of residual block.
        blocks: how many of them in each stage.
        channels: inner channels of each stage.
        stem_activation: name of the activation after the first convolution.
        block_options: further attributes of every block, as pairs, so that a network is hashable: a static argument.
        squeeze_stages: how many stages, from the first, have squeeze-and-excitation.
        attentive: attentive statistics pooling, else plain.
        normalize_head: whether the head has batch normalisations.
        kernel_init: how convolution kernels start.
        norm: "batch", or "bias" for folded batch normalisation.
        dtype: compute dtype. Parameters, batch statistics, pooling and the head are float32.
        remat: recompute each block in the backward pass; less memory, about a third more arithmetic.
        keeps: what blocks keep all the same; see `KEPT`.
    """

    block: type[Block]
    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    stem_activation: str
    block_options: tuple[tuple[str, Option], ...]
    squeeze_stages: int
    attentive: bool
    normalize_head: bool
    kernel_init: Initializer
    norm: str = "batch"
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    keeps: str = "statistics"

    @nn.compact
    def __call__(self, features: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Embeds a batch of utterances.

        Args:
            features: `[batch, time, features]`, any float dtype.
            lengths: int `[batch]`, real frames of each utterance; what lies beyond is ignored. None: all are real.
            train: normalise by the batch's statistics, and update the running ones (`mutable=["batch_stats"]`).

        Returns:
            Float32 `[batch, embedding_size]`.

        Raises:
            UserError: the input has not the network's number of features.
        """
        check_features(features.shape, self.features)
        style = LayerStyle(self.norm, self.dtype, self.kernel_init, named=self.remat)
        mask = frame_mask(lengths, features.shape[1])
        x = mask_frames(features.astype(self.dtype)[..., None], mask)
        x = ConvNorm(self.channels[0], 3, 1, style, name="stem")(x, mask, train)
        x = mask_frames(ACTIVATIONS[self.stem_activation](x), mask)
        for i, (count, channels, stride) in enumerate(zip(self.blocks, self.channels, STRIDES)):
            options = (i < self.squeeze_stages, style, self.block_options, self.remat, self.keeps)
            stage = Stage(self.block, count, channels, stride, *options, name=f"stage{i + 1}")
            x, mask = stage(x, mask, train)
        if self.attentive:
            pooled = AttentiveStatisticsPooling(self.channels[-1] // 2, dtype=self.dtype, name="pool")(x, mask)
        else:
            pooled = StatisticsPooling(name="pool")(x, mask)
        # Float32 whatever the compute dtype: rounding here would show in every score.
        head_style = LayerStyle(self.norm, jnp.float32, self.kernel_init)
        return Head(self.embedding_size, head_style, self.normalize_head, name="head")(pooled, train)

    @nn.nowrap
    def parts(self) -> tuple[Part, ...]:
        """The stem, every block, the pooling and the head. Distillation compares the outputs of the four stages."""
        parts, stride = [Part("stem", "stem")], 1
        for i, count in enumerate(self.blocks):
            # Strides multiply: a frame of stage 4 stands for eight of the input.
            stage, stride = f"stage{i + 1}", stride * STRIDES[i]
            parts += [Part(f"{stage}/block{n}", stage, stride, distilled=n == count - 1) for n in range(count)]
        return (*parts, Part("pool", "pooling"), Part("head", "embedding"))

    @nn.nowrap
    def chunk_step(self) -> int:
        """A frame of the last stage."""
        return max(part.stride for part in self.parts())

    @nn.nowrap
    def without_remat(self) -> "ResNet":
        """The same network that keeps all activations."""
        return self.clone(remat=False)

    @nn.nowrap
    def keeping(self, what: str) -> "ResNet":
        """The same network, of whose recomputed blocks `what` is kept (`KEPT`)."""
        return self.clone(keeps=what)

    @nn.nowrap
    def to_onnx(self, graph: GraphBuilder, feats: str) -> str:
        """Adds the network to a graph."""
        return resnet_onnx.network(graph, self, feats)


def kiwano(
    *,
    blocks: Sequence[int],
    preactivation: bool,
    width: int = 128,
    features: int = 81,
    embedding_size: int = 256,
    norm: str = "batch",
    dtype: DTypeLike = "float32",
    activation: str = "silu",
    last_taps: int = 1,
    remat: bool = False,
) -> ResNet:
    """Makes a network of Kiwano's family.

    Args:
        blocks: residual blocks in each of the four stages.
        preactivation: pre-activation blocks of three convolutions, else post-activation blocks of two.
        width: channels of the first two stages; the last two have twice as many.
        features: features a frame; Kiwano's front end gives 80 mel bands and the log energy.
        embedding_size: dimension of the embedding.
        norm: "batch", or "bias" for folded batch normalisation.
        dtype: compute dtype, "float32", "bfloat16" or "float16".
        activation: "silu" or "relu", within pre-activation blocks; post-activation blocks use ReLU.
        last_taps: kernel size, 1 or 3, of the third convolution of pre-activation blocks; Kiwano's own
            `KiwanoResNet` has 3.
        remat: recompute each block in the backward pass.

    Raises:
        UserError: a value is not allowed; the message names the setting.
    """
    check_counts(width=width)
    check("activation", activation in ACTIVATIONS, activation, f"one of {', '.join(ACTIVATIONS)}")
    check("last_taps", last_taps in (1, 3), last_taps, "1 or 3")
    return ResNet(
        block=PreActivationBlock if preactivation else BasicBlock,
        channels=(width, width, 2 * width, 2 * width),
        stem_activation="silu",
        block_options=(("activation", ACTIVATIONS[activation]), ("last_taps", last_taps)) if preactivation else (),
        squeeze_stages=2,
        attentive=True,
        normalize_head=True,
        kernel_init=KAIMING_NORMAL,
        **_common(blocks, features, embedding_size, norm, dtype, remat),
    )


def wespeaker(
    *,
    blocks: Sequence[int],
    bottleneck: bool,
    width: int = 32,
    features: int = 80,
    embedding_size: int = 256,
    norm: str = "batch",
    dtype: DTypeLike = "float32",
    remat: bool = False,
) -> ResNet:
    """Makes a network of WeSpeaker's family (`two_emb_layer=False`).

    Args:
        blocks: residual blocks in each of the four stages.
        bottleneck: blocks of 1x1, 3x3, 1x1 convolutions with four times the channels, else of two 3x3.
        width: channels of the first stage (`m_channels`); each stage doubles them.
        features: mel bands.
        embedding_size: dimension of the embedding.
        norm: "batch", or "bias" for folded batch normalisation, as in the published ONNX files.
        dtype: compute dtype, "float32", "bfloat16" or "float16".
        remat: recompute each block in the backward pass.

    Raises:
        UserError: a value is not allowed; the message names the setting.
    """
    check_counts(width=width)
    return ResNet(
        block=Bottleneck if bottleneck else BasicBlock,
        channels=(width, 2 * width, 4 * width, 8 * width),
        stem_activation="relu",
        block_options=(),
        squeeze_stages=0,
        attentive=False,
        normalize_head=False,
        kernel_init=TORCH_DEFAULT,
        **_common(blocks, features, embedding_size, norm, dtype, remat),
    )


class _Common(TypedDict):
    blocks: tuple[int, ...]
    features: int
    embedding_size: int
    norm: str
    dtype: DTypeLike
    remat: bool


def _common(
    blocks: Sequence[int], features: int, embedding_size: int, norm: str, dtype: DTypeLike, remat: bool
) -> _Common:
    """Checks the settings that both families have, and returns them as attributes of `ResNet`."""
    is_list = isinstance(blocks, Sequence) and not isinstance(blocks, str)
    check("blocks", is_list and len(blocks) == 4 and all(map(is_count, blocks)), blocks, "four positive integers")
    check_counts(features=features, embedding_size=embedding_size)
    check("norm", norm in ("batch", "bias"), norm, "batch or bias")
    check("remat", isinstance(remat, bool), remat, "true or false")
    check_dtype(dtype)
    return {
        "blocks": tuple(blocks),
        "features": features,
        "embedding_size": embedding_size,
        "norm": norm,
        "dtype": jnp.dtype(dtype),
        "remat": remat,
    }
