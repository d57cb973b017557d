"""WeSpeaker's ResNets as ONNX files with batch normalisation folded into the convolutions, as they are published.

Structure read in wespeaker/models/resnet.py and wespeaker/bin/export_onnx.py of
https://github.com/wenet-e2e/wespeaker at dfa7419.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kmq_jax.interop.assemble import Imported, assemble
from kmq_jax.interop.onnx_graph import Graph, Node
from kmq_jax.interop.wespeaker import KERNEL_AXES, settings_of
from kmq_jax.models import registry

STAGES = 4
# Enough for mean and deviation over time as PyTorch exports them, and nothing that can make arrays grow.
_POOLING_OPS = {"Add", "Cast", "Concat", "Div", "Flatten", "Gather", "Mul", "ReduceMean", "ReduceProd", "Shape"}
_POOLING_OPS |= {"Sqrt", "Sub"}


class _Conv(NamedTuple):
    """A convolution of the graph: its node, the names of its tensors, and its output."""

    node: Node
    weight: str
    bias: str
    output: str


class _Block(NamedTuple):
    """A residual block of the graph."""

    convs: list[_Conv]
    shortcut: _Conv | None


def read(path: Path) -> Imported:
    """Makes our model of an ONNX file with folded batch normalisation.

    The graph is walked from input to output: every node and every tensor must have its place in the network. The nodes
    of the pooling are checked by the values they compute, because exporters write it in many ways.

    Raises:
        UserError: the file cannot be read, it names another front end, or a node or tensor is unknown, missing or left
            over; it is named.
    """
    graph = Graph(path)
    start = graph.input
    if graph.metadata.get("sample_rate", "16000") != "16000":
        graph.fail(f"the model is for {graph.metadata['sample_rate']} Hz, not 16000")
    graph.check_normalised()
    if graph.named_front_end not in ("", "wespeaker"):
        graph.fail(f"it names the front end {graph.named_front_end!r}, not WeSpeaker's")
    nodes = [graph.sole_user(start, "Transpose")]
    graph.expect(nodes[-1], perm=[0, 2, 1])
    nodes.append(graph.sole_user(nodes[-1].output[0], "Unsqueeze"))
    axes = graph.attributes(nodes[-1]).get("axes") or [graph.constant(name) for name in nodes[-1].input[1:]]
    if np.ravel(axes).tolist() != [1]:
        graph.fail(f"node {graph.describe(nodes[-1])} must add axis 1")
    stem = _conv(graph, graph.sole_user(nodes[-1].output[0], "Conv"))
    nodes += [stem.node, graph.sole_user(stem.output, "Relu")]
    x = nodes[-1].output[0]
    blocks: list[_Block] = []
    while any(node.op_type == "Conv" for node in graph.users(x)):
        block, walked = _block(graph, x)
        blocks.append(block)
        nodes += walked
        x = walked[-1].output[0]
    pooling, tail, linear_weight, linear_bias, shift = _head(graph, x, nodes)
    _check_pooling(graph, pooling, x, tail[0].input[0])
    nodes += [*pooling, *tail]
    for name in (linear_weight, linear_bias):
        graph.constant(name)
    graph.check_all_used(nodes)
    return _from_walk(graph, stem, blocks, linear_weight, linear_bias, shift)


def _conv(graph: Graph, node: Node) -> _Conv:
    if len(node.input) != 3:
        graph.fail(f"node {graph.describe(node)} has no bias: batch normalisation is not folded into it")
    for name in node.input[1:]:
        graph.constant(name)
    return _Conv(node, graph.resolve(node.input[1]), graph.resolve(node.input[2]), node.output[0])


def _block(graph: Graph, x: str) -> tuple[_Block, list[Node]]:
    """Walks the residual block that starts at value `x`; its last node is the ReLU that ends it."""
    convs: list[_Conv] = []
    shortcut = None
    for node in graph.users(x):
        if node.op_type == "Conv" and [user.op_type for user in graph.users(node.output[0])] == ["Add"]:
            shortcut = _conv(graph, node)
    starts = [node for node in graph.users(x) if shortcut is None or node is not shortcut.node]
    starts = [node for node in starts if node.op_type != "Add"]
    if len(starts) != 1 or starts[0].op_type != "Conv":
        others = ", ".join(graph.describe(node) for node in starts if node.op_type != "Conv") or "several convolutions"
        graph.fail(f"value {x} is read by {others}; a residual block is expected")
    nodes = [] if shortcut is None else [shortcut.node]
    following = starts[0]
    while following.op_type == "Conv":
        convs.append(_conv(graph, following))
        nodes.append(following)
        following = graph.sole_user(following.output[0], "Relu", "Add")
        nodes.append(following)
        if following.op_type == "Relu":
            following = graph.sole_user(following.output[0], "Conv")
    # A set: the sum may name its two inputs in either order.
    branches = {graph.resolve(name) for name in following.input}
    if branches != {convs[-1].output, x if shortcut is None else shortcut.output}:
        graph.fail(f"node {graph.describe(following)} does not add a block's input to its output")
    nodes.append(graph.sole_user(following.output[0], "Relu"))
    return _Block(convs, shortcut), nodes


def _head(graph: Graph, x: str, walked: Sequence[Node]) -> tuple[list[Node], list[Node], str, str, list[np.ndarray]]:
    """Splits what follows the last block into pooling and the linear layer, from which constants may be subtracted.

    Returns:
        Nodes of the pooling; nodes of the linear layer and the subtractions; the names of its weight and bias; and the
        constants that are subtracted from the embedding.
    """
    done = {id(node) for node in walked}
    rest = [node for node in graph.nodes if id(node) not in done]
    linear = next((node for node in rest if node.op_type == "Gemm"), None)
    if linear is None:
        first = f"; node {graph.describe(rest[0])} is unknown here" if rest else ""
        graph.fail(f"no linear layer (Gemm) follows the residual blocks{first}")
    if {"alpha": 1, "beta": 1, **graph.attributes(linear)} != {"alpha": 1, "beta": 1, "transB": 1}:
        graph.fail(f"node {graph.describe(linear)} is not a plain linear layer")
    if len(linear.input) != 3:
        graph.fail(f"node {graph.describe(linear)} has no bias")
    tail, shift, value = [linear], [], linear.output[0]
    while value != graph.resolve(graph.output):
        node = graph.sole_user(value, "Sub")
        if graph.resolve(node.input[0]) != value or not graph.is_constant(node.input[1]):
            graph.fail(f"node {graph.describe(node)} must subtract a constant from the embedding")
        shift.append(graph.constant(node.input[1]))
        tail.append(node)
        value = node.output[0]
    ends = {id(node) for node in tail}
    pooling = [node for node in rest if id(node) not in ends]
    return pooling, tail, graph.resolve(linear.input[1]), graph.resolve(linear.input[2]), shift


def _check_pooling(graph: Graph, nodes: list[Node], x: str, output: str) -> None:
    """Checks that nodes compute mean and deviation over time (TSTP): by their result on a few numbers."""
    for node in nodes:
        allowed = node.op_type in _POOLING_OPS
        if not allowed or (node.op_type == "Flatten" and graph.attributes(node).get("axis", 1) != 1):
            graph.fail(f"node {graph.describe(node)} is not part of a WeSpeaker ResNet with pooling TSTP")
        for name in node.input:
            if graph.is_constant(name) and graph.constant(name).size > 8:
                graph.fail(f"tensor {name} is not part of the pooling TSTP")
    sample = np.random.default_rng(0).normal(size=(2, 3, 2, 5)).astype(np.float32)  # [batch, channel, freq, time]
    sample[0, 0, 0] = 0.5  # without spread: shows what is added to the variance
    pooled = graph.evaluate(nodes, {x: sample}, output)
    deviation = np.sqrt(sample.var(axis=-1, ddof=1) + 1e-7)
    expected = np.concatenate([sample.mean(-1).reshape(2, -1), deviation.reshape(2, -1)], axis=1)
    if pooled.shape != expected.shape or not np.allclose(pooled, expected, rtol=1e-3, atol=1e-6):
        graph.fail(f"the nodes before {output} do not compute mean and unbiased deviation over time (TSTP)")


def _named(graph: Graph, stem: _Conv, blocks: list[_Block]) -> tuple[dict[str, _Conv], list[int]]:
    """Every convolution by our name of the layer, and how many blocks each stage has."""
    width = graph.constant(stem.bias).size
    counts = [0] * STAGES
    names = {"stem/conv": stem}
    for block in blocks:
        channels = graph.constant(block.convs[0].bias).size
        stage = next((i for i in range(STAGES) if channels == width << i), None)  # each has twice the channels
        if stage is None or any(counts[stage + 1 :]):
            node = graph.describe(block.convs[0].node)
            graph.fail(f"node {node} has {channels} channels, which fits no stage of a WeSpeaker ResNet")
        place = f"stage{stage + 1}/block{counts[stage]}"
        stride = 2 if counts[stage] == 0 and stage > 0 else 1
        counts[stage] += 1
        # A bottleneck steps in its 3x3 convolution, a basic block in its first.
        strided = 1 if len(block.convs) == 3 else 0
        for i, conv in enumerate(block.convs):
            _check_conv(graph, conv, stride if i == strided else 1)
            names[f"{place}/conv{i + 1}"] = conv
        if block.shortcut is not None:
            _check_conv(graph, block.shortcut, stride)
            names[f"{place}/shortcut/conv"] = block.shortcut
    _check_conv(graph, stem, 1)
    return names, counts


def _from_walk(
    graph: Graph, stem: _Conv, blocks: list[_Block], linear_weight: str, linear_bias: str, shift: list[np.ndarray]
) -> Imported:
    if not blocks:
        graph.fail("no residual block follows the first convolution")
    names, counts = _named(graph, stem, blocks)
    kinds = {len(block.convs) for block in blocks}
    if kinds not in ({2}, {3}):
        graph.fail(f"residual blocks of {sorted(kinds)} convolutions; all must have 2, or all 3")
    if graph.constant(linear_weight).ndim != 2:
        graph.fail(f"tensor {linear_weight} must have two axes")
    embedding_size, statistics = graph.constant(linear_weight).shape
    width = graph.constant(stem.bias).size
    architecture, settings = settings_of(
        counts, kinds == {3}, width, statistics, embedding_size, graph.features, "bias", graph.where
    )
    translate = {f"{ours}/kernel": conv.weight for ours, conv in names.items()}
    translate |= {f"{ours}/bias": conv.bias for ours, conv in names.items()}
    # Two layers may share a tensor, but the linear bias is ours alone: the mean embedding is folded into it.
    tensors = {theirs: graph.constant(theirs) for theirs in translate.values()}
    bias = graph.constant(linear_bias).astype(np.float64)
    for mean in shift:
        if mean.shape not in ((), bias.shape, (1, *bias.shape)):
            graph.fail(f"a constant of shape {mean.shape} is subtracted from embeddings of {embedding_size}")
        bias = bias - mean.reshape(-1)
    # The blank gives our bias a name that no tensor of the file has.
    translate |= {"head/linear/kernel": linear_weight, "head/linear/bias": f"{linear_bias} "}
    tensors |= {linear_weight: graph.constant(linear_weight), f"{linear_bias} ": bias}
    network = registry.build(architecture, **settings)

    def name_of(ours: str) -> str:
        return translate.get(ours, f"of {ours}")

    return Imported(architecture, settings, "wespeaker", assemble(network, tensors, name_of, KERNEL_AXES, graph.where))


def _check_conv(graph: Graph, conv: _Conv, stride: int) -> None:
    shape = graph.constant(conv.weight).shape
    taps = shape[-1] if shape else 0
    allowed = {"group": 1, "dilations": [1, 1], "auto_pad": b"NOTSET", "kernel_shape": [taps] * 2}
    allowed |= {"strides": [stride] * 2, "pads": [taps // 2] * 4}
    given = {"strides": [1, 1], "pads": [0] * 4, **graph.attributes(conv.node)}
    for name, value in given.items():
        if name not in allowed or value != allowed[name]:
            graph.fail(f"node {graph.describe(conv.node)} has {name} {value}; {allowed.get(name)} is expected")
