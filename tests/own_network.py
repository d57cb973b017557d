"""A network that is no ResNet, added by a user in fewer than sixty lines. Tests whose subject is no network train it:
it is compiled in a fraction of a ResNet's time."""

from typing import Any

import flax.linen as nn

from kmq_jax.models import registry
from kmq_jax.models.protocol import Part, SpeakerNetwork
from kmq_jax.nn.conv import window
from kmq_jax.nn.frames import frame_mask, mask_frames, stride_mask
from kmq_jax.nn.layers import BatchNorm, Conv, dense
from kmq_jax.nn.pooling import StatisticsPooling

FRAMES = {"frame1": (5, 1), "frame2": (3, 2), "frame3": (1, 1)}  # taps and dilation, without padding
CUT = {"frame1": 4, "frame2": 8, "frame3": 8}  # frames lost so far


class Unit(nn.Module):
    """conv -> ReLU -> BN."""

    channels: int
    taps: int
    dilation: int
    dtype: Any

    @nn.compact
    def __call__(self, x, mask, train):
        conv = Conv(self.channels, self.taps, 1, True, self.dtype, padding="valid", dilation=self.dilation, name="conv")
        return BatchNorm(self.dtype, name="bn")(nn.relu(conv(x)), mask, train)


class Tdnn(SpeakerNetwork):
    features: int = 81
    embedding_size: int = 16
    width: int = 24
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, features, lengths=None, train=False):
        x, mask = features.astype(self.dtype), frame_mask(lengths, features.shape[1])
        for name, (taps, dilation) in FRAMES.items():
            mask = stride_mask(mask, 1, dilation * (taps - 1))
            x = Unit(self.width, taps, dilation, self.dtype, name=name)(x, mask, train)
        return dense(self.embedding_size, "embedding")(StatisticsPooling(name="pool")(mask_frames(x, mask), mask))

    @nn.nowrap
    def parts(self):
        return *(Part(name, name, lost=CUT[name]) for name in FRAMES), Part("pool", "pool"), Part("embedding", "head")

    @nn.nowrap
    def to_onnx(self, graph, feats):
        x = graph.channels_of(feats)
        for name, (taps, dilation) in FRAMES.items():
            moves = window(1, taps, padding="valid", dilation=dilation)
            x = graph.scale_and_shift(graph.activation(graph.conv(x, f"{name}/conv", moves), nn.relu), f"{name}/bn", 3)
        return graph.linear(graph.statistics(graph.frames_of(x), StatisticsPooling.floor), "embedding")


registry.register("own_tdnn", Tdnn, smoke={"width": 8, "embedding_size": 8})
