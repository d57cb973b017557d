"""Any network as an ONNX file: its graph becomes the setting of a `models.graph.GraphNetwork`, its weights parameters.

What depends on constants alone, such as look-ups in codebooks, is computed on import. Then the network and ONNX Runtime
embed the same features: a file whose embeddings differ is refused.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.core.errors import UserError, first_line
from kmq_jax.core.tree import Variables, named_leaves
from kmq_jax.interop.assemble import Imported
from kmq_jax.interop.onnx_graph import Attributes, Graph, Node
from kmq_jax.models import graph as graphs
from kmq_jax.models.speaker_model import FRONTENDS, frontend_of
from kmq_jax.nn import operators

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

LAYOUTS = ("frames-first", "features-first")
"""Of the input: `[batch, frames, features]` or `[batch, features, frames]`."""
_OLDEST, _NEWEST = 11, 25  # operator sets
_EMBEDDINGS = ("embs", "embedding", "embeddings", "emb")  # names that settle which of several outputs it is
_USUAL = ("wespeaker", "wespeaker60", "wespeaker72", "kiwano")  # front ends, by their numbers of features
_AS_INPUT = {"Squeeze", "Unsqueeze", *operators.REDUCTIONS}  # operators whose axes were an attribute once
_HALVES = {"float16": "float32", "bfloat16": "float32", "uint2": "uint8", "uint4": "uint8", "int2": "int8"}
_HALVES |= {"int4": "int8", "uint16": "int64", "int16": "int64", "uint32": "int64"}
_FRAMES, _FURTHER = 150, 37  # of the features that both embed; as many more, which are embedded as well
_TOLERANCE = 1e-3  # of the largest value of an embedding
_LONGEST_LEAST = 512  # frames that a network may need at least
_LEAF = re.compile(r"[./](weight|kernel|gamma|scale|slope)([._](codebook|quantized|slope))?$")  # of a weight's name
_FEWEST, _MOST = 4, 24  # components that names may make
_SECTIONS = 6  # components where names make none


class Asked(NamedTuple):
    """What a file may leave open; None where it does not.

    Attributes:
        frontend: name of the filterbank setting.
        layout: one of `LAYOUTS`.
        output: name of the output that is the embedding.
    """

    frontend: str | None = None
    layout: str | None = None
    output: str | None = None


NOTHING_ASKED = Asked()


def read(path: Path, asked: Asked = NOTHING_ASKED) -> Imported:
    """Makes our model of any ONNX file.

    Raises:
        UserError: the file cannot be read, an operator is unknown, a weight is missing, what the file leaves open is
            not asked for, or ONNX Runtime's embeddings are others.
    """
    graph = Graph(path)
    if not _OLDEST <= graph.opset <= _NEWEST:
        graph.fail(f"operator set {graph.opset}; {_OLDEST} to {_NEWEST} are supported")
    if graph.metadata.get("sample_rate", "16000") != "16000":
        graph.fail(f"the model is for {graph.metadata['sample_rate']} Hz, not 16000")
    layout, features = _input(graph, asked)
    output = _output(graph, asked.output)
    reader = _Reader(graph, layout)
    nodes = _before(graph, output)
    for node in nodes:
        try:
            reader.take(node)
        except UserError:
            raise
        except Exception as error:  # inputs, outputs or attributes that an operator cannot be without
            raise UserError(f"{path}: node {graph.describe(node)} is damaged: {error!r}") from error
    text = reader.text(output)
    frontend = asked.frontend or _frontend(graph, features)
    features = features or frontend_of(frontend).num_features
    network = graphs.GraphNetwork(features, 1, text)
    size = _embedding_size(graph, network, reader, output)
    network = network.clone(embedding_size=size)
    frames = _compare(graph, nodes, output, network, reader.variables, layout)
    settings = {"features": features, "embedding_size": size, "graph": text, "frames": frames}
    return Imported("graph", settings, frontend, reader.variables)


def _input(graph: Graph, asked: Asked) -> tuple[str, int | None]:
    """The layout of the features, and how many there are where the file says so."""
    if not graph.inputs:
        graph.fail("there is no input")
    value = graph.inputs[0]
    dims = [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]
    if len(dims) not in (3, 4) or (len(dims) == 4 and dims[1] != 1):
        graph.fail(f"input {value.name} of shape {dims} is not features [batch, frames, features] or their transpose")
    for other in graph.inputs[1:]:
        if len(other.type.tensor_type.shape.dim) != 1:
            graph.fail(f"input {other.name} is neither the features nor how many frames there are")
    first, second = dims[-2:]
    if first and second:
        graph.fail(f"input {value.name} of shape {dims} is of a fixed length: export the file with a free time axis")
    found = LAYOUTS[0] if second else LAYOUTS[1] if first else None
    if found and asked.layout not in (None, found):
        graph.fail(f"--layout={asked.layout} does not fit input {value.name} of shape {dims}")
    layout = found or asked.layout
    if layout is None:
        graph.fail(f"input {value.name} of shape {dims} does not tell frames from features: name --layout")
    return layout, first or second


def _frontend(graph: Graph, features: int | None) -> str:
    """The front end that a file names, or the usual one of so many features."""
    graph.check_normalised()
    named = graph.named_front_end
    known = (named, *_USUAL) if named in FRONTENDS else _USUAL
    fitting = [name for name in known if features in (None, frontend_of(name).num_features)]
    if not fitting:
        graph.fail(f"no front end gives {features} features a frame")
    return fitting[0]


def _output(graph: Graph, asked: str | None) -> str:
    names = [value.name for value in graph.outputs]
    if asked and asked not in names:
        graph.fail(f"--output={asked} must be one of {', '.join(names)}")
    likely = [
        value.name
        for value in graph.outputs
        if len(value.type.tensor_type.shape.dim) in (0, 2) and value.type.tensor_type.elem_type == 1
    ]
    named = [name for name in names if name in _EMBEDDINGS]
    sole = [asked] if asked else [some[0] for some in (names, likely, named) if len(some) == 1]
    if not sole:
        graph.fail(f"outputs {', '.join(names)}: name the embedding by --output")
    return str(sole[0])


def _before(graph: Graph, output: str) -> list[Node]:
    """The nodes that an output needs, in the file's order."""
    makers = {name: node for node in graph.nodes for name in node.output}
    needed, waiting = set(), [graph.resolve(output)]
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            waiting += map(graph.resolve, node.input)
    return [node for node in graph.nodes if id(node) in needed]


Operand = str | np.ndarray
"""An input of a node: the name of a value, or a constant."""


class _Reader:
    """A graph of ours that grows node by node."""

    def __init__(self, graph: Graph, layout: str):
        self.graph = graph
        self.variables: Variables = {"params": {}, "batch_stats": {}}
        self.sources: list[str] = []  # of each node, for messages
        self._constants: dict[str, np.ndarray] = {}
        self._numbers = {"": graphs.LEFT_OUT}
        self._origins: dict[str, str] = {}  # of what was computed from constants: the first of them
        self._literals: dict[int, np.ndarray] = {}
        self._known: dict[tuple[str, tuple[int, ...], bytes], int] = {}
        self._nodes: list[list[Any]] = []
        self._unbiased: dict[int, Attributes] = {}  # linear layers, by what they give
        self._next = graphs.FIRST
        self._largest = 16 * Path(graph.where).stat().st_size + (1 << 16)  # elements of a constant: one bit makes one
        x = graphs.FEATURES
        self._source = "of the input"
        if layout == LAYOUTS[1]:
            (x,) = self._add("Transpose", [x], {"perm": [0, 2, 1]})
        if len(graph.inputs[0].type.tensor_type.shape.dim) == 4:
            (x,) = self._add("Unsqueeze", [x, self._number(np.array([1]))], {})
        self._numbers[graph.inputs[0].name] = x
        for other in graph.inputs[1:]:
            self._numbers[other.name] = graphs.FRAMES

    def take(self, node: Node) -> None:
        """Adds a node of the file.

        Raises:
            UserError: it is not supported, or reads what is not there.
        """
        self._source = self.graph.describe(node)
        attributes = self._attributes(node)
        operands: list[Operand] = [self.graph.resolve(name) for name in node.input]
        for name in operands:
            if name not in self._numbers and not self._is_constant(name):
                self.graph.fail(f"node {self._source} reads {name}, which no node before it gives, and no tensor")
        outputs = [name for name in node.output if name]
        layer = {"Conv": self._conv, "Gemm": self._gemm, "MatMul": self._matmul, "BatchNormalization": self._norm}
        if node.op_type == "Dropout":
            self._alias(outputs[0], operands[0])
            return
        # A layer whose inputs are all constants is no layer: it is computed now, below.
        if node.op_type in layer and not all(map(self._is_constant, operands)):
            made = layer[node.op_type](operands, attributes)
            if made is not None:
                self._numbers[outputs[0]] = made
                return
        if node.op_type == "Add" and (joined := self._with_bias(operands)):
            self._numbers[outputs[0]] = joined
            return
        if node.op_type == "Gelu":
            self._numbers[outputs[0]] = self._gelu(self._number(operands[0]), attributes.get("approximate") == "tanh")
            return
        kind, operands, attributes = self._canonical(node.op_type, operands, attributes)
        if kind not in operators.KINDS:
            self.graph.fail(f"operator {node.op_type} of node {node.name or node.output[0]} is not supported")
        if all(map(self._is_constant, operands)):
            self._fold(kind, operands, attributes, outputs)
        elif kind == "Split":
            self._split(operands, attributes, outputs)
        else:
            made_all = self._add(kind, [self._number(one) for one in operands], attributes, len(outputs))
            self._numbers.update(zip(outputs, made_all))

    def text(self, output: str) -> str:
        """The graph as the setting of a network."""
        name = self.graph.resolve(output)
        if name not in self._numbers:
            self.graph.fail(f"output {output} is given by no node")
        self._source = "of the output"
        (last,) = self._add("Flatten", [self._numbers[name]], {"axis": 1})
        layers = [attributes["layer"] for kind, _, _, attributes in self._nodes if kind in graphs.LAYERS]
        components = components_of(layers)
        for kind, _, _, attributes in self._nodes:
            if kind in graphs.LAYERS:
                attributes["component"] = components[attributes["layer"]]
        text = graphs.write(self._literals, self._nodes, last)
        if len(text) > graphs.LONGEST:
            self.graph.fail(f"the graph without its weights takes {len(text)} characters")
        return text

    def _attributes(self, node: Node) -> Attributes:
        """Attributes as JSON values; tensors stay arrays."""
        found: Attributes = {}
        for name, value in self.graph.attributes(node).items():
            if isinstance(value, bytes):
                value = value.decode(errors="replace")
            elif hasattr(value, "data_type"):
                value = self.graph.array_of(value, f"of node {self._source}")
            elif not isinstance(value, int | float) and not (
                isinstance(value, Sequence) and all(isinstance(one, int) for one in value)
            ):
                self.graph.fail(f"attribute {name} of node {self._source} is not supported")
            found[name] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        return found

    def _is_constant(self, one: Operand) -> bool:
        if isinstance(one, np.ndarray) or one == "" or one in self._constants:
            return True
        return one not in self._numbers and self.graph.is_constant(one)

    def _array(self, one: Operand) -> np.ndarray | None:
        """A constant, in one of the types of `operators.TYPES`; None where it is left out."""
        if isinstance(one, np.ndarray):
            return one
        if one == "":
            return None
        if one not in self._constants:
            value = self.graph.constant(one)
            kind = _HALVES.get(value.dtype.name, value.dtype.name)
            if kind not in operators.TYPES:
                self.graph.fail(f"tensor {one} is of type {value.dtype}, which is not supported")
            if value.dtype.kind == "f" and value.size > 1 and not np.isfinite(value).all():
                self.graph.fail(f"tensor {one} holds values that are not finite")
            self._constants[one] = value.astype(kind)
        return self._constants[one]

    def _alias(self, output: str, operand: Operand) -> None:
        assert isinstance(operand, str)
        if operand in self._numbers:
            self._numbers[output] = self._numbers[operand]
        else:
            value = self._array(operand)
            assert value is not None
            self._constants[output] = value

    def _number(self, one: Operand) -> int:
        """The number of an operand; a constant becomes a literal, or a parameter where it holds many weights."""
        if isinstance(one, str) and one in self._numbers:
            return self._numbers[one]
        value = self._array(one)
        assert value is not None
        if value.dtype.kind == "f" and value.size > 1:
            assert isinstance(one, str)
            name = self._name_layer("values", one)
            self.variables["params"][name] = {"value": value.astype(np.float32)}
            (made,) = self._add("Parameter", [], {"layer": name, "shape": list(value.shape)})
            self._numbers[one] = made
            return made
        # Small constants come again and again: equal ones share a literal.
        key = value.dtype.name, value.shape, value.tobytes()
        if key not in self._known:
            self._known[key] = self._next
            self._literals[self._next] = value
            self._next += 1
        return self._known[key]

    def _add(self, kind: str, inputs: list[int], attributes: Attributes, outputs: int = 1) -> tuple[int, ...]:
        made = tuple(range(self._next, self._next + outputs))
        self._next += outputs
        self._nodes.append([kind, inputs, list(made), dict(attributes)])
        self.sources.append(self._source)
        return made

    def _fold(self, kind: str, operands: list[Operand], attributes: Attributes, outputs: list[str]) -> None:
        """Computes what depends on constants alone."""
        given = [self._array(one) for one in operands]
        try:
            made = operators.compute(kind, given, attributes, self._largest)
        except Exception as error:  # shapes or attributes that do not fit
            raise UserError(f"{self.graph.where}: node {self._source}: {first_line(error)}") from error
        self._constants.update(zip(outputs, map(np.asarray, made)))
        if isinstance(operands[0], str):
            self._origins |= dict.fromkeys(outputs, self._origins.get(operands[0], operands[0]))

    def _canonical(
        self, kind: str, operands: list[Operand], attributes: Attributes
    ) -> tuple[str, list[Operand], Attributes]:
        """An operator in the form of operator set 18, whose axes and sizes are inputs."""
        attributes = dict(attributes)
        if kind in _AS_INPUT and "axes" in attributes:
            operands = [operands[0], np.array(attributes.pop("axes"), np.int64)]
        if kind == "Split" and "split" in attributes:
            operands = [operands[0], np.array(attributes.pop("split"), np.int64)]
        if kind in ("Softmax", "LogSoftmax") and self.graph.opset < 13:
            attributes = {"axis": attributes.get("axis", 1), "flat": 1}
        if kind == "Cast":
            kind_of = self.graph.type_of(attributes["to"])
            attributes = {"to": _HALVES.get(kind_of, kind_of)}
        if kind == "ConstantOfShape":
            value = attributes.pop("value", np.zeros(1, np.float32))
            kind, operands = "Expand", [np.asarray(value).reshape(()), *operands]
        return kind, operands, attributes

    def _split(self, operands: list[Operand], attributes: Attributes, outputs: list[str]) -> None:
        """Cuts a value into parts: where their sizes are known, by one slice each."""
        x, axis = self._number(operands[0]), attributes.get("axis", 0)
        sizes = self._array(operands[1]) if len(operands) > 1 and self._is_constant(operands[1]) else None
        if sizes is None or len(sizes) != len(outputs):
            about = {"axis": axis, "num_outputs": len(outputs)}
            inputs = [x, *map(self._number, operands[1:])]
            self._numbers.update(zip(outputs, self._add("Split", inputs, about, len(outputs))))
            return
        ends = np.cumsum(sizes)
        for output, start, end in zip(outputs, ends - sizes, ends):
            cut = [self._number(np.array([n], np.int64)) for n in (start, end, axis)]
            (self._numbers[output],) = self._add("Slice", [x, *cut], {})

    def _gelu(self, x: int, approximate: bool) -> int:
        """The Gaussian error linear unit, of simpler operators: operator set 18 has none."""

        def made(kind: str, *inputs: int | float) -> int:
            given = [self._number(np.array(n, np.float32)) if isinstance(n, float) else n for n in inputs]
            return self._add(kind, given, {})[0]

        if approximate:
            cube = made("Mul", made("Mul", made("Mul", x, x), x), 0.044715)
            inner = made("Tanh", made("Mul", made("Add", x, cube), math.sqrt(2 / math.pi)))
        else:
            inner = made("Erf", made("Mul", x, math.sqrt(0.5)))
        return made("Mul", made("Mul", x, 0.5), made("Add", inner, 1.0))

    def _conv(self, operands: list[Operand], attributes: Attributes) -> int:
        if not all(map(self._is_constant, operands[1:])):
            self.graph.fail(f"the weights of node {self._source} depend on the sound")
        weight = self._array(operands[1])
        if weight is None or weight.ndim not in (3, 4):
            self.graph.fail(f"node {self._source} is no convolution over one or two axes")
        rank, taps = weight.ndim - 2, list(weight.shape[2:])  # weight: [out, in / group, taps...]
        about: Attributes = {
            "kernel_shape": taps,
            "strides": [1] * rank,
            "pads": [0] * 2 * rank,
            "dilations": [1] * rank,
        }
        about |= {"group": 1, **attributes}
        padding = about.pop("auto_pad", "NOTSET")
        if padding in ("SAME_UPPER", "SAME_LOWER") and set(about["strides"]) == {1}:
            spans = [(tap - 1) * step for tap, step in zip(taps, about["dilations"])]
            small, large = [span // 2 for span in spans], [span - span // 2 for span in spans]
            about["pads"] = small + large if padding == "SAME_UPPER" else large + small
        elif padding not in ("NOTSET", "VALID"):
            self.graph.fail(f"node {self._source} is padded by {padding} with a stride, which is not supported")
        kernel = weight.transpose(*range(2, weight.ndim), 1, 0)  # [out, in, taps...] to [taps..., in, out]
        about["channels"] = len(weight)
        return self._layer("conv", "Conv", operands, kernel, self._array([*operands, ""][2]), about)

    def _gemm(self, operands: list[Operand], attributes: Attributes) -> int | None:
        if not self._is_constant(operands[1]) or attributes.get("transA", 0):
            return None
        weight, bias = self._array(operands[1]), None
        if len(operands) > 2:
            if not self._is_constant(operands[2]):
                return None
            bias = self._array(operands[2])
        if weight is None or weight.ndim != 2:
            self.graph.fail(f"node {self._source} is no linear layer")
        kernel = attributes.get("alpha", 1.0) * (weight.T if attributes.get("transB", 0) else weight)
        if bias is not None:
            if bias.size not in (1, kernel.shape[1]):
                return None
            bias = attributes.get("beta", 1.0) * np.broadcast_to(bias.reshape(-1), kernel.shape[1:])
        return self._layer("linear", "Linear", operands, kernel, bias, {"size": kernel.shape[1]})

    def _matmul(self, operands: list[Operand], attributes: Attributes) -> int | None:
        if not self._is_constant(operands[1]):
            return None
        kernel = self._array(operands[1])
        if kernel is None or kernel.ndim != 2:
            return None
        return self._layer("linear", "Linear", operands, kernel, None, {"size": kernel.shape[1]})

    def _with_bias(self, operands: list[Operand]) -> int | None:
        """Gives a linear layer the bias that is added to its output and nowhere else; None where this is no bias."""
        for one, other in (operands, operands[::-1]):
            if not isinstance(one, str):
                continue
            layer = self._unbiased.get(self._numbers.get(one, graphs.LEFT_OUT))
            if layer is None or not self._is_constant(other) or len(self.graph.users(one)) != 1:
                continue
            bias = self._array(other)
            if bias is not None and bias.shape == (layer["size"],) and one != self.graph.resolve(self.graph.output):
                layer["bias"] = True
                self.variables["params"][layer["layer"]]["bias"] = bias.astype(np.float32)
                return self._numbers[one]
        return None

    def _layer(
        self,
        word: str,
        kind: str,
        operands: list[Operand],
        kernel: np.ndarray,
        bias: np.ndarray | None,
        about: Attributes,
    ) -> int:
        name = self._name_layer(word, operands[1])
        leaves = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias.reshape(-1)}
        self.variables["params"][name] = {leaf: np.ascontiguousarray(x, np.float32) for leaf, x in leaves.items()}
        about = {**about, "bias": bias is not None, "layer": name}
        made = self._add(kind, [self._number(operands[0])], about)[0]
        if kind == "Linear" and bias is None:
            self._unbiased[made] = self._nodes[-1][3]
        return made

    def _norm(self, operands: list[Operand], attributes: Attributes) -> int:
        if not all(map(self._is_constant, operands[1:])) or attributes.get("training_mode", 0):
            self.graph.fail(f"node {self._source} is a batch normalisation in training")
        name = self._name_layer("norm", operands[1])
        leaves = dict(zip(("scale", "bias", "mean", "var"), map(self._array, operands[1:5])))
        arrays = {leaf: np.asarray(value, np.float32) for leaf, value in leaves.items()}
        self.variables["params"][name] = {leaf: arrays[leaf] for leaf in ("scale", "bias")}
        self.variables["batch_stats"][name] = {leaf: arrays[leaf] for leaf in ("mean", "var")}
        about = {"epsilon": attributes.get("epsilon", 1e-5), "layer": name}
        return self._add("BatchNormalization", [self._number(operands[0])], about)[0]

    def _name_layer(self, word: str, weight: Operand) -> str:
        """A name for a layer that no other has: from its weight or its node where they tell one, else a number."""
        given = self._origins.get(weight, weight) if isinstance(weight, str) else ""
        base = name_of(given, self._source.split(" ", 1)[1])
        taken = self.variables["params"]
        if not base:
            return next(name for n in range(len(taken) + 1) if (name := f"{word}{n}") not in taken)
        names = (base if n == 1 else f"{base}_{n}" for n in range(1, len(taken) + 2))
        return next(name for name in names if name not in taken)


def name_of(weight: str, node: str) -> str:
    """The path of a layer as the names of its weight and its node tell it; empty where neither does.

    >>> name_of("layer1.0.conv1.weight", "Conv_3"), name_of("onnx::Conv_367", "Conv_3")
    ('layer1.0.conv1', '')
    >>> name_of("onnx::Conv_367", "/layer1/layer1.0/conv1/Conv"), name_of("stem/conv/kernel.codebook", "")
    ('layer1.0.conv1', 'stem.conv')
    """
    if "::" not in weight and re.search(r"\w[./]\w", weight):
        path = _LEAF.sub("", weight).replace("/", ".")
    elif "/" in node.strip("/"):
        steps: list[str] = []
        for step in node.strip("/").split("/")[:-1]:  # without the operator
            # "layer1/layer1.0" is how PyTorch names an element of a list.
            if steps and step.startswith(f"{steps[-1]}."):
                steps.pop()
            steps.append(step)
        path = ".".join(steps)
    elif weight and "::" not in weight and not weight.isdigit():
        path = weight
    else:
        return ""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", path).strip("._")


def components_of(layers: Sequence[str]) -> dict[str, str]:
    """Groups layers, given in running order, into components: by the beginning of their names, else into sections.

    >>> names = ["m.stem", "m.block1.a", "m.block1.b", "m.block2.a", "m.head"]
    >>> components_of(names)["m.block1.b"]
    'block1'
    >>> set(components_of([f"conv{n}" for n in range(40)]).values()) == {f"section{n}" for n in range(1, 7)}
    True
    """
    paths = {name: name.split(".") for name in layers}
    shared = 0  # steps that all paths begin with
    while paths and len({tuple(path[: shared + 1]) for path in paths.values()}) == 1:
        if min(map(len, paths.values())) <= shared + 1:
            break
        shared += 1
    for depth in range(shared + 1, shared + 4):
        found = {name: ".".join(path[shared:depth]) for name, path in paths.items()}
        if _FEWEST <= len(set(found.values())) <= _MOST:
            return found
    count = len(layers)
    sections = min(_SECTIONS, count)
    return {name: f"section{1 + place * sections // count}" for place, name in enumerate(layers)}


def _embedding_size(graph: Graph, network: graphs.GraphNetwork, reader: _Reader, output: str) -> int:
    """Checks on shapes alone that a network gives one embedding for each utterance, of a size that stays."""
    sizes = set()
    for frames in (_FRAMES, _FRAMES + 1):  # an embedding is as large for both
        features = jax.ShapeDtypeStruct((2, frames, network.features), jnp.float32)
        try:
            found, variables = jax.eval_shape(
                lambda x: network.init_with_output(jax.random.key(0), x, method="output"), features
            )
        except graphs.NodeError as error:
            raise UserError(f"{graph.where}: node {reader.sources[error.number]}: {error.reason}") from error
        if len(found.shape) != 2 or found.shape[0] != 2:
            graph.fail(f"output {output} is {found.shape} for 2 utterances, not an embedding of each")
        sizes.add(found.shape[1])
    if len(sizes) > 1:
        graph.fail(f"output {output} grows with the frames: it is no embedding")
    given = {name: leaf.shape for name, leaf in named_leaves(reader.variables)}
    for name, leaf in named_leaves(variables):
        if given[name] != leaf.shape:
            graph.fail(f"tensor of {name} has shape {given[name]}, but the graph needs {leaf.shape}")
    return int(sizes.pop())


def _compare(
    graph: Graph,
    nodes: list[Node],
    output: str,
    network: graphs.GraphNetwork,
    variables: Variables,
    layout: str,
) -> int:
    """Checks that a network gives what ONNX Runtime gives; returns the fewest frames that this can embed.

    Raises:
        UserError: it does not.
    """
    run = _session(graph, nodes, output, layout)

    def embeds(frames: int) -> bool:
        found = run(_made_up(frames, network.features))
        return found is not None and bool(np.isfinite(found).all())

    # Doubled, then halved: `low` frames are too few, `high` are enough.
    low, high = 0, 1
    while not embeds(high):
        low, high = high, 2 * high
        if high > _LONGEST_LEAST:
            graph.fail(f"ONNX Runtime gives no embedding of {low} frames")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if embeds(middle) else (middle, high)
    ours = jax.jit(lambda v, x: network.apply(v, x))
    # At two lengths: what was traced for one, or counts frames wrongly, is right at that one alone.
    for frames in (max(_FRAMES, high), max(_FRAMES, high) + _FURTHER):
        features = _made_up(frames, network.features)
        theirs = run(features)
        if theirs is None:
            graph.fail(f"ONNX Runtime gives no embedding of {frames} frames")
        found = np.asarray(ours(variables, features))
        furthest = np.abs(found - theirs.reshape(found.shape)).max() / max(np.abs(theirs).max(), 1e-30)
        if not furthest <= _TOLERANCE:
            what = f"our embeddings of {frames} frames are {furthest:.1e} from ONNX Runtime's"
            graph.fail(f"{what}: an operator is not understood")
    return high


def _made_up(frames: int, features: int) -> np.ndarray:
    """Two utterances of features about zero, `[2, frames, features]`."""
    return np.random.default_rng(frames).normal(0, 2, (2, frames, features)).astype(np.float32)


def _session(graph: Graph, nodes: list[Node], output: str, layout: str) -> "InferenceSession":
    """ONNX Runtime on the nodes of a file: features to embeddings, or None where it cannot."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("importing an ONNX graph needs ONNX Runtime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            graph.model_of(nodes, output), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions share no base class of their own
        raise UserError(f"{graph.where}: ONNX Runtime cannot open it: {str(error).splitlines()[0]}") from error
    value = graph.inputs[0]
    rank = len(value.type.tensor_type.shape.dim)
    types = {"tensor(int32)": np.int32, "tensor(float)": np.float32}
    lengths = [(one.name, types.get(one.type, np.int64)) for one in session.get_inputs()[1:]]

    def run(features: np.ndarray) -> np.ndarray | None:
        x = features if layout == LAYOUTS[0] else features.transpose(0, 2, 1)
        x = np.ascontiguousarray(x[:, None] if rank == 4 else x)
        given = {name: np.full(1, features.shape[1], kind) for name, kind in lengths}
        try:
            # One by one: a file may be for a batch of one.
            rows = [session.run(None, {value.name: row[None], **given})[0] for row in x]
        except Exception:  # too few frames, for one
            return None
        found: np.ndarray = np.stack([row.reshape(math.prod(row.shape)) for row in rows])
        return found

    return run
