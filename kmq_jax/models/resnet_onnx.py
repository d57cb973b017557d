"""Residual networks as ONNX graphs, block by block. Values are `[batch, channel, time, freq]`."""

from typing import TYPE_CHECKING

import flax.linen as nn

from kmq_jax.models.protocol import GraphBuilder
from kmq_jax.nn.conv import window
from kmq_jax.nn.layers import Bottleneck, PreActivationBlock
from kmq_jax.nn.pooling import AttentiveStatisticsPooling, StatisticsPooling

if TYPE_CHECKING:
    from kmq_jax.models.resnet import ResNet


def network(graph: GraphBuilder, resnet: "ResNet", feats: str) -> str:
    """Adds a whole network, from features `[batch, time, features]` to the embedding."""
    x = graph.node("Unsqueeze", feats, graph.integers(1))
    stem = nn.silu if resnet.stem_activation == "silu" else nn.relu
    x = graph.activation(graph.conv(x, "stem/conv", norm="stem/bn"), stem)
    stride = 1
    for part in resnet.parts():
        if "/" in part.name:  # a block of a stage
            # A part's stride counts from the input; the block's own is what it adds.
            x = _block(graph, resnet, x, part.name, part.stride // stride)
            stride = part.stride
    # Every stride rounds up, so all of them together do.
    size = -(-resnet.features // stride) * resnet.channels[-1] * resnet.block.expansion
    # The channel runs fastest, as in nn.pooling, so that the weights that follow need no permutation.
    frames = graph.frames_of(x, size)
    if resnet.attentive:
        pooled = graph.attentive_statistics(frames, "pool", AttentiveStatisticsPooling.floor)
    else:
        pooled = graph.statistics(frames, StatisticsPooling.floor)
    if resnet.normalize_head:
        pooled = graph.scale_and_shift(pooled, "head/bn_in", 2)
    return graph.linear(pooled, "head/linear", "head/bn" if resnet.normalize_head else None)


def _conv(graph: GraphBuilder, x: str, layer: str, norm: str | None, taps: int = 3, stride: int = 1) -> str:
    return graph.conv(x, layer, window(2, taps, stride), norm)


def _block(graph: GraphBuilder, resnet: "ResNet", x: str, at: str, stride: int) -> str:
    if resnet.block is PreActivationBlock:
        options = dict(resnet.block_options)
        act = options["activation"]
        y = graph.activation(graph.scale_and_shift(x, f"{at}/bn1", 4), act)
        y = graph.rounded(_conv(graph, y, f"{at}/conv1", f"{at}/bn2", stride=stride), f"{at}/inner1")
        y = graph.rounded(_conv(graph, graph.activation(y, act), f"{at}/conv2", f"{at}/bn3"), f"{at}/inner2")
        y = _conv(graph, graph.activation(y, act), f"{at}/conv3", None, options["last_taps"])
        return _finish(graph, x, graph.rounded(y, f"{at}/branch"), at, stride)
    x = graph.rounded(x, f"{at}/input")
    if resnet.block is Bottleneck:
        y = graph.activation(_conv(graph, x, f"{at}/conv1", f"{at}/bn1", 1), nn.relu)
        y = graph.activation(_conv(graph, y, f"{at}/conv2", f"{at}/bn2", stride=stride), nn.relu)
        y = _conv(graph, y, f"{at}/conv3", f"{at}/bn3", 1)
    else:
        y = graph.activation(_conv(graph, x, f"{at}/conv1", f"{at}/bn1", stride=stride), nn.relu)
        y = _conv(graph, y, f"{at}/conv2", f"{at}/bn2")
    return graph.activation(_finish(graph, x, graph.rounded(y, f"{at}/branch"), at, stride), nn.relu)


def _finish(graph: GraphBuilder, x: str, y: str, at: str, stride: int) -> str:
    """Squeeze-and-excitation of the branch `y`, where there is any, and the sum with the block's input `x`."""
    if graph.has(f"{at}/se"):
        over_frequency = graph.node("ReduceMean", y, graph.integers(3), keepdims=0)
        squeezed = graph.mean_over_time(over_frequency, f"{at}/se")
        gate = graph.linear(graph.activation(graph.linear(squeezed, f"{at}/se/fc1"), nn.silu), f"{at}/se/fc2")
        gate = graph.node("Unsqueeze", graph.node("Sigmoid", gate), graph.integers(2, 3))
        y = graph.node("Mul", y, gate)
    if graph.has(f"{at}/shortcut"):
        x = _conv(graph, x, f"{at}/shortcut/conv", f"{at}/shortcut/bn", 1, stride)
        x = graph.rounded(x, f"{at}/skipped")
    return graph.node("Add", y, x)
