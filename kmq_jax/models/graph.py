"""Networks that came as ONNX graphs of no known family: the graph is a setting, its weights are named parameters.

A setting holds the graph as JSON: operators with the numbers of the values that they read and give. Convolutions,
linear layers and batch normalisations are layers as in every other network, so that the walk sees them; what else the
graph holds in weights is a parameter `value`. `interop.onnx_network` makes the text of a file.

    {"literals": [[value, type, shape, base64], ...],
     "nodes": [[kind, [values read], [values given], {attributes}], ...],
     "output": value}

Values are numbered: 0 is the features `[batch, time, features]`, 1 the frames of each utterance `[batch]`, -1 an input
that is left out. A node reads only what stands before it, so a graph has no circles.

Nothing masks padded frames: a batch holds utterances of one length. Batch normalisation is by the running statistics,
in training too, and these stay as they are.
"""

import base64
import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import zeros
from jax.typing import DTypeLike

from kmq_jax.core.errors import UserError, first_line
from kmq_jax.core.files import parse_json
from kmq_jax.core.tree import Array
from kmq_jax.models import walk
from kmq_jax.models.protocol import GraphBuilder, Part, SpeakerNetwork
from kmq_jax.models.settings import check_counts, check_dtype, check_features
from kmq_jax.nn import operators
from kmq_jax.nn.conv import Window, window
from kmq_jax.nn.layers import TORCH_DEFAULT, BatchNorm, Conv

FEATURES, FRAMES, FIRST = 0, 1, 2
"""Numbers of the two values that a graph is given, and of the first of its own."""
LEFT_OUT = -1
LAYERS = ("Conv", "Linear", "BatchNormalization", "Parameter")
"""Kinds of nodes that have parameters; the other kinds are `nn.operators.KINDS`."""
LONGEST = 4 << 20
"""Characters of a graph."""
_MOST_NODES = 20_000
_LARGEST_PARAMETER = 1 << 28  # elements
_LARGEST_NUMBER = 1 << 16  # of channels, taps, steps, pads
_A_FRAME = 1 << 18  # elements that a value may have for each frame of the batch: channels, or a row of attention
_KNOWN = 1 << 24  # elements of all values that are known while tracing

Order = tuple[int, ...]


class NodeError(UserError):
    """A node cannot be computed.

    Attributes:
        number: its place among the nodes.
        reason: why.
    """

    def __init__(self, number: int, kind: str, reason: str):
        super().__init__(f"node {number} of the graph ({kind}): {reason}")
        self.number, self.reason = number, reason


@dataclasses.dataclass(frozen=True)
class Node:
    """An operator or a layer of a graph.

    Attributes:
        kind: one of `LAYERS` or of `nn.operators.KINDS`.
        inputs, outputs: numbers of values.
        attributes: of the operator; of a layer also `layer`, its name, and `component`.
        last: values that no later node reads.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attributes: operators.Attributes
    last: tuple[int, ...]

    @property
    def layer(self) -> str:
        """The name of the layer."""
        name: str = self.attributes["layer"]
        return name


@dataclasses.dataclass(frozen=True)
class Graph:
    """What the text of a graph says.

    Attributes:
        literals: constants by the number of the value.
        nodes: in running order.
        output: the value that is the embedding.
    """

    literals: Mapping[int, np.ndarray]
    nodes: tuple[Node, ...]
    output: int


def write(literals: Mapping[int, np.ndarray], nodes: Sequence[Sequence[object]], output: int) -> str:
    """The text of a graph; see the module's docstring.

    Args:
        literals: constants by the number of the value.
        nodes: `(kind, values read, values given, attributes)` in running order.
        output: the value that is the embedding.

    >>> write({}, [["Relu", [0], [2], {}]], 2)
    '{"literals":[],"nodes":[["Relu",[0],[2],{}]],"output":2}'
    """
    held = [[n, x.dtype.name, x.shape, base64.b64encode(x.tobytes()).decode()] for n, x in literals.items()]
    return json.dumps({"literals": held, "nodes": nodes, "output": output}, separators=(",", ":"))


def read(text: str) -> Graph:
    """Reads the text of a graph, which may come from anyone.

    Raises:
        UserError: it is too long, is no graph, or a node reads what is not there.

    >>> found = read(write({}, [["Relu", [0], [2], {}]], 2))
    >>> found.nodes[0].kind, found.output
    ('Relu', 2)
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise UserError("`graph` must be a text of at most 4 MiB")
    return _read(text)


@functools.lru_cache(maxsize=16)
def _read(text: str) -> Graph:
    try:
        given = parse_json(text)
        literals = {_count(n): _literal(*one) for n, *one in given["literals"]}
        nodes = [_node(*one) for one in given["nodes"]]
        output = given["output"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"`graph` is not the text of a graph: {error}") from error
    if len(nodes) > _MOST_NODES:
        raise UserError(f"`graph` has {len(nodes)} nodes")
    if min(literals, default=FIRST) < FIRST:
        raise UserError("`graph` has a literal in place of the features")
    known, layers = {FEATURES, FRAMES, *literals}, set()
    for number, node in enumerate(nodes):
        if unknown := set(node.inputs) - known - {LEFT_OUT}:
            raise NodeError(number, node.kind, f"value {min(unknown)} is not there")
        if node.kind in LAYERS and node.layer in layers:
            raise NodeError(number, node.kind, f"there are two layers {node.layer}")
        if len(set(node.outputs) - known) < len(node.outputs):
            raise NodeError(number, node.kind, "a value is given twice")
        known |= set(node.outputs)
        layers |= {node.layer} if node.kind in LAYERS else set()
    if not isinstance(output, int) or output not in known:
        raise UserError("`graph` has no output")
    return Graph(literals, _with_last(nodes, output), output)


def _literal(kind: str, shape: list[int], data: str) -> np.ndarray:
    if kind not in operators.TYPES:
        raise ValueError(f"a literal of type {kind!r}")
    value = np.frombuffer(base64.b64decode(data, validate=True), np.dtype(kind))
    return value.reshape([_count(n) for n in shape])


def _count(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _node(kind: str, inputs: list[int], outputs: list[int], attributes: operators.Attributes) -> Node:
    if kind not in LAYERS and kind not in operators.KINDS:
        raise ValueError(f"the operator {kind!r} is unknown")
    if not all(isinstance(n, int) for n in (*inputs, *outputs)) or not outputs or min(outputs) < FIRST:
        raise ValueError(f"values of a node {kind} are numbers")
    for name, value in attributes.items():
        many: list[object] = value if isinstance(value, list) else [value]
        if not (isinstance(value, str) or all(isinstance(one, int | float) for one in many)):
            raise ValueError(f"attribute {name!r} of a node {kind}")
    if kind in LAYERS:
        for name in ("layer", "component"):
            value = attributes[name]
            if not isinstance(value, str) or not value or "/" in value or "#" in value:
                raise ValueError(f"{value!r} cannot name a {name}")
        flat = [one for value in attributes.values() for one in (value if isinstance(value, list) else [value])]
        if kind != "Parameter" and any(isinstance(one, int) and not 0 <= one <= _LARGEST_NUMBER for one in flat):
            raise ValueError(f"a number of layer {attributes['layer']}")
    return Node(kind, tuple(inputs), tuple(outputs), attributes, ())


def _with_last(nodes: Sequence[Node], output: int) -> tuple[Node, ...]:
    """Notes with each node what no later one reads, so that memory is given back early."""
    needed, found = {output}, []
    for node in reversed(nodes):
        last = {n for n in (*node.inputs, *node.outputs) if n != LEFT_OUT} - needed
        needed |= last
        found.append(dataclasses.replace(node, last=tuple(sorted(last))))
    return tuple(reversed(found))


@dataclasses.dataclass(frozen=True)
class _Held:
    """A value of the graph as it lies in memory: axis i is axis `order[i]` of the value, channels last.

    Values keep this order from one convolution to the next wherever operators do not care, so nothing is transposed.
    """

    array: jax.Array
    order: Order

    def plain(self) -> jax.Array:
        """The value with its axes in the graph's order."""
        return self.ordered(tuple(range(self.array.ndim)))

    def ordered(self, order: Order) -> jax.Array:
        """The value with its axes in another order."""
        return self.array if order == self.order else self.array.transpose([self.order.index(axis) for axis in order])


_Value = _Held | np.ndarray | None


def _held(array: Array) -> _Held | np.ndarray:
    return array if operators.is_static(array) else _Held(array, tuple(range(array.ndim)))


def _channels_last(rank: int) -> Order:
    return (0, *range(2, rank), 1)


class Values(nn.Module):
    """A parameter `value` that is no layer's."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        """The parameter."""
        value: jax.Array = self.param("value", zeros, self.shape)
        return value


class GraphNetwork(SpeakerNetwork):
    """A network as its graph says; `kmq-jax import_model` makes one of an ONNX file.

    Attributes:
        features: features a frame.
        embedding_size: dimension of the embedding.
        graph: the graph; see the module's docstring.
        frames: the fewest that the graph can embed.
        dtype: compute dtype of convolutions and linear layers.
    """

    features: int = 80
    embedding_size: int = 192
    graph: str = ""
    frames: int = 1
    dtype: DTypeLike = "float32"
    masks_lengths = False

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: one is not allowed; the message names it.
        """
        check_counts(features=self.features, embedding_size=self.embedding_size, frames=self.frames)
        check_dtype(self.dtype)
        if self.graph:
            read(self.graph)
        super().__post_init__()

    @nn.nowrap
    def _read(self) -> Graph:
        if not self.graph:
            raise UserError("model graph is the graph of an ONNX file: import_model makes one")
        return read(self.graph)

    def __call__(self, features: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Embeds a batch of utterances of one length; see `SpeakerNetwork`. `lengths` and `train` change nothing.

        Raises:
            UserError: the input has not the network's number of features, or a node cannot be computed.
        """
        check_features(features.shape, self.features)
        embeddings, wanted = self.output(features), (len(features), self.embedding_size)
        if embeddings.shape != wanted:
            raise UserError(f"the graph gives values {embeddings.shape}, not embeddings {wanted}")
        return embeddings.astype(jnp.float32)

    @nn.compact
    def output(self, features: jax.Array) -> jax.Array:
        """What the graph gives for features `[batch, time, features]`, of any shape.

        Raises:
            UserError: a node cannot be computed.
        """
        graph, (batch, time) = self._read(), features.shape[:2]
        values: dict[int, _Value] = {LEFT_OUT: None, **graph.literals}
        values[FEATURES] = _held(jnp.asarray(features).astype(self.dtype))
        values[FRAMES] = np.full(batch, time, np.int64)
        # What one value may take, and a budget for all that are known while tracing: the graph may come from anyone.
        most, known = _A_FRAME * max(batch * time, 1024), max(_KNOWN, 64 * batch * time)
        for number, node in enumerate(graph.nodes):
            try:
                made = self._run(node, [values[n] for n in node.inputs], most, known)
                if len(made) != len(node.outputs):
                    raise ValueError(f"it gives {len(made)} values, not {len(node.outputs)}")
            except UserError:
                raise
            except Exception as error:  # shapes or attributes that do not fit, of whatever kind numpy and JAX raise
                raise NodeError(number, node.kind, first_line(error)) from error
            known -= sum(one.size for one in made if isinstance(one, np.ndarray))
            values.update(zip(node.outputs, made))
            for n in node.last:
                values.pop(n)
        found = values[graph.output]
        return found.plain() if isinstance(found, _Held) else jnp.asarray(found)

    def _run(self, node: Node, given: list[_Value], most: int, known: int) -> list[_Held | np.ndarray]:
        """Computes a node; `most` bounds its result, `known` one that is known while tracing."""
        if node.kind in LAYERS:
            return [self._layer(node, given, most)]
        if node.kind == "Transpose" and isinstance(given[0], _Held):
            return [_transposed(given[0], node.attributes.get("perm"))]
        order, arrays, attributes = _aligned(node, given)
        static = all(one is None or operators.is_static(one) for one in arrays)
        made = operators.compute(node.kind, arrays, attributes, known if static else most)
        if order is None:
            return [_held(one) for one in made]
        return [_Held(one, order) for one in made]

    def _layer(self, node: Node, given: list[_Value], most: int) -> _Held:
        attributes = node.attributes
        if node.kind == "Parameter":
            shape = tuple(attributes["shape"])
            _check_parameter(shape)
            return _Held(Values(shape, name=node.layer)(), tuple(range(len(shape))))
        held = given[0]
        if not isinstance(held, _Held):
            raise ValueError("its input does not depend on the sound")
        if node.kind == "Linear":
            x, size = held.plain(), attributes["size"]
            _check_parameter((x.shape[-1], size))
            layer = nn.Dense(size, attributes["bias"], self.dtype, kernel_init=TORCH_DEFAULT, name=node.layer)
            return _Held(layer(x), tuple(range(x.ndim)))
        order = _channels_last(held.array.ndim)
        x = held.ordered(order)
        if node.kind == "BatchNormalization":
            norm = BatchNorm(x.dtype, epsilon=attributes["epsilon"], name=node.layer)
            return _Held(norm(x, None, train=False), order)
        return _Held(self._conv(node, x, most), order)

    def _conv(self, node: Node, x: jax.Array, most: int) -> jax.Array:
        about, rank = node.attributes, x.ndim - 2
        moves = _moves(about, rank)
        lengths = {len(one) for one in moves[:4]}  # of taps, strides, padding, dilations
        if lengths != {rank} or x.shape[-1] % moves.groups or about["channels"] % moves.groups:
            raise ValueError(f"it does not fit values of {rank} axes and {x.shape[-1]} channels")
        if min(*moves.taps, *moves.strides, *moves.dilations) < 1 or min(moves.sizes(x.shape[1:-1])) < 1:
            raise ValueError(f"values of {x.shape[1:-1]} are too few for {moves.taps} taps")
        _check_parameter((*moves.taps, x.shape[-1] // moves.groups, about["channels"]))
        if math.prod((x.shape[0], *moves.sizes(x.shape[1:-1]), about["channels"])) > most:
            raise ValueError("it would give too many values")
        layer = Conv(
            about["channels"],
            moves.taps,
            moves.strides,
            about["bias"],
            self.dtype,
            TORCH_DEFAULT,
            moves.padding,
            moves.dilations,
            moves.groups,
            name=node.layer,
        )
        return layer(x)

    @nn.nowrap
    def parts(self) -> tuple[Part, ...]:
        """Every layer in running order; the last of each component is what distillation compares."""
        layers = [node for node in self._read().nodes if node.kind in LAYERS]
        # A bare parameter does not depend on the sound: there is nothing to compare.
        last = {node.attributes["component"]: node.layer for node in layers if node.kind != "Parameter"}
        return tuple(
            Part(node.layer, component, whole=True, distilled=last.get(component) == node.layer)
            for node in layers
            for component in [node.attributes["component"]]
        )

    @nn.nowrap
    def least_frames(self) -> int:
        """The fewest frames for which ONNX Runtime gave an embedding when the file was imported."""
        return self.frames

    @nn.nowrap
    def to_onnx(self, graph: GraphBuilder, feats: str) -> str:
        """Adds the graph to another one, its layers with their weights as they are now."""
        ranks = {layer.name: len(layer.inputs) for layer in walk.layers(self)}
        own = self._read()
        names = {LEFT_OUT: "", FEATURES: feats}
        names |= {n: graph.array(f"literal_{n}", value) for n, value in own.literals.items()}
        if any(FRAMES in node.inputs for node in own.nodes):
            shape = graph.node("Shape", feats)
            # They hold 0, 1, 2: axis 0 is the batch, axis 1 the frames.
            one, two, three = (graph.integers(n) for n in (0, 1, 2))
            frames, batch = graph.node("Slice", shape, two, three), graph.node("Slice", shape, one, two)
            names[FRAMES] = graph.node("Expand", frames, batch)
        for node in own.nodes:
            if len(node.outputs) > 1:
                raise UserError(f"a graph with {node.kind} into {len(node.outputs)} parts of unknown size has no form")
            names[node.outputs[0]] = _to_onnx(graph, node, [names[n] for n in node.inputs], ranks)
        return names[own.output]


def _moves(about: operators.Attributes, rank: int) -> Window:
    """How the convolution of these attributes moves over values of so many axes beside batch and channels."""
    taps, strides, dilations = (tuple(about[name]) for name in ("kernel_shape", "strides", "dilations"))
    padding = tuple(zip(about["pads"][:rank], about["pads"][rank:]))
    return window(rank, taps, strides, padding, dilations, about["group"])


def _check_parameter(shape: tuple[int, ...]) -> None:
    if math.prod(shape) > _LARGEST_PARAMETER or min(shape, default=1) < 1:
        raise ValueError(f"parameters of shape {shape} are not supported")


def _transposed(x: _Held, perm: list[int] | None) -> _Held:
    """Another order of a value's axes: nothing moves in memory."""
    axes = list(range(x.array.ndim))[::-1] if perm is None else perm
    if sorted(axes) != list(range(x.array.ndim)):
        raise ValueError(f"perm {axes} does not fit {x.array.ndim} axes")
    # Memory axis i held axis `order[i]`, which stands where `axes` names it now.
    return _Held(x.array, tuple(axes.index(axis) for axis in x.order))


def _aligned(node: Node, given: list[_Value]) -> tuple[Order | None, list[Array], operators.Attributes]:
    """The arrays that an operator computes with, and the order of their axes; None where it is the graph's.

    Operators that do not care get values as they lie in memory.
    """
    kept = [one for one in given if isinstance(one, _Held)]
    # Only operands with all axes can decide the order; those with fewer broadcast.
    rank = max((np.ndim(one.array if isinstance(one, _Held) else one) for one in given if one is not None), default=0)
    orders = [one.order for one in kept if len(one.order) == rank and one.order != tuple(range(rank))]
    reduces = node.kind in operators.REDUCTIONS and node.attributes.get("keepdims", 1) and len(given) > 1
    if not orders or not (node.kind in operators.ELEMENTWISE or node.kind == "Concat" or reduces):
        return None, [one.plain() if isinstance(one, _Held) else one for one in given], node.attributes
    order = orders[0]
    if reduces:
        known = given[1]
        if isinstance(known, _Held):
            raise ValueError("its axes depend on the sound")
        # From axes of the graph to axes in memory.
        axes = None if known is None else np.array([_in_memory(int(n), order) for n in known.ravel()])
        return order, [kept[0].array, axes], node.attributes
    attributes = dict(node.attributes)
    if node.kind == "Concat":
        attributes["axis"] = _in_memory(attributes["axis"], order)
    return order, [_in_order(one, order) for one in given], attributes


def _in_memory(axis: int, order: Order) -> int:
    """Where an axis of the graph lies in memory. One that is out of range stays so: the operator refuses it."""
    rank = len(order)
    return order.index(axis % rank) if -rank <= axis < rank else axis


def _in_order(value: _Value, order: Order) -> Array:
    if value is None or np.ndim(value if not isinstance(value, _Held) else value.array) == 0:
        return value.array if isinstance(value, _Held) else value
    if isinstance(value, _Held) and len(value.order) == len(order):
        return value.ordered(order)
    # Fewer axes: ones in front, as broadcasting would add them, then the common order.
    plain = value.plain() if isinstance(value, _Held) else value
    return plain.reshape((1,) * (len(order) - plain.ndim) + plain.shape).transpose(order)


def _to_onnx(graph: GraphBuilder, node: Node, inputs: list[str], ranks: Mapping[str, int]) -> str:
    about = node.attributes
    if node.kind == "Parameter":
        return graph.parameter(f"{node.layer}/value")
    if node.kind == "Linear":
        write_layer = graph.linear if ranks[node.layer] == 2 else graph.linear_frames
        return write_layer(inputs[0], node.layer)
    if node.kind == "BatchNormalization":
        return graph.scale_and_shift(inputs[0], node.layer, ranks[node.layer], about["epsilon"])
    if node.kind == "Conv":
        return graph.conv(inputs[0], node.layer, _moves(about, len(about["kernel_shape"])))
    if node.kind == "Cast":
        return graph.cast(inputs[0], {"float32": "FLOAT", "float64": "DOUBLE"}.get(about["to"], about["to"].upper()))
    attributes = {name: value for name, value in about.items() if name != "flat"}
    return graph.node(node.kind, *inputs, **attributes)
