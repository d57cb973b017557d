"""Reading ONNX files: constants, and nodes found by what they compute from."""

import math
import os
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np

from kmq_jax.core.errors import UserError, reason_of
from kmq_jax.models.onnx_export import Node, Onnx, require_onnx

Attributes: TypeAlias = dict[str, Any]
"""Of a node, by name: numbers, texts, lists of them, and arrays."""

_LARGEST_RESULT = 1 << 26  # elements that a node may compute


class Graph:
    """The graph of an ONNX file, to be walked from its input to its output.

    `Identity` nodes are looked through, `Constant` nodes are constants like the initializers. Each constant that is
    read is marked; `check_all_used` names what is left.

    Attributes:
        where: the file, for messages.
        inputs, outputs: the graph's, as the file describes them.
        metadata: the file's properties.
        nodes: all but constants, in the file's order.
    """

    def __init__(self, path: Path):
        """Reads a file; data outside it is refused.

        Raises:
            UserError: it cannot be read or is not ONNX.
        """
        self._onnx = require_onnx()
        self.where = str(path)
        try:
            model = self._onnx.load(path, load_external_data=False)
        except OSError as error:
            raise UserError(f"cannot read {path}: {reason_of(error)}") from error
        except Exception as error:  # whatever protobuf makes of a file that is not ONNX
            raise UserError(f"{path} is not an ONNX file, or it was cut short") from error
        graph = model.graph
        self._largest = 2 * os.path.getsize(path)  # no element takes less than half a byte
        self._check_complete(graph.node)
        self._aliases = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._used: set[str] = set()
        self.nodes = []
        for node in graph.node:
            if node.domain not in ("", "ai.onnx"):
                self.fail(f"node {self.describe(node)} is of the unknown operator set {node.domain!r}")
            if node.op_type == "Constant":
                self._tensors[node.output[0]] = self._constant_of(node)
            elif node.op_type != "Identity":
                self.nodes.append(node)
        outputs = [name for node in graph.node for name in node.output if name]
        if len(set(outputs)) < len(outputs):  # otherwise a walk could go in circles
            self.fail("two nodes give values of the same name")
        self._initializers = {tensor.name for tensor in graph.initializer}
        if graph.sparse_initializer:
            self.fail("sparse tensors are not supported")
        self.inputs = [value for value in graph.input if value.name not in self._initializers]
        self.outputs = list(graph.output)
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
        self._users = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(map(self.resolve, node.input)):  # once, as in x * x
                self._users[name].append(node)

    def _check_complete(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if not node.output or node.op_type == "Identity" and not node.input:
                self.fail(f"node {node.op_type} {node.name} lacks an input or an output")

    def _constant_of(self, node: Node) -> Onnx:
        """The tensor of a `Constant` node."""
        (name, value), *others = self.attributes(node).items() or [("", None)]
        kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
        if others or (name != "value" and name not in kinds):
            self.fail(f"node {self.describe(node)} is a constant that is not a tensor")
        return value if name == "value" else self._onnx.numpy_helper.from_array(np.asarray(value, kinds[name]))

    @cached_property
    def input(self) -> str:
        """The name of the one input.

        Raises:
            UserError: there is not one input and one output.
        """
        if len(self.inputs) != 1 or len(self.outputs) != 1:
            self.fail(f"{len(self.inputs)} inputs and {len(self.outputs)} outputs; one of each is expected")
        return str(self.inputs[0].name)

    @property
    def output(self) -> str:
        """The name of the first output."""
        return str(self.outputs[0].name)

    @property
    def features(self) -> int | None:
        """The last axis of the first input, None where it is not fixed."""
        last = self.inputs[0].type.tensor_type.shape.dim[-1:]
        return last[0].dim_value or None if last else None

    @property
    def named_front_end(self) -> str:
        """The front end that the file names; "" where it names none. It may be one that is unknown here.

        Our own files say `frontend`. Others say `framework`, as sherpa-onnx reads it.
        """
        return self.metadata.get("frontend") or self.metadata.get("framework", "").replace("3d-speaker", "3dspeaker")

    def check_normalised(self) -> None:
        """Refuses a file whose features are normalised in another way than ours.

        Raises:
            UserError: it says so.
        """
        normalised = self.metadata.get("feature_normalize_type", "")
        if normalised not in ("", "global-mean"):
            self.fail(
                f"its features are normalised by {normalised!r}, ours by their mean; --frontend takes ours all the same"
            )

    def fail(self, message: str) -> NoReturn:
        """Raises a UserError that names the file."""
        raise UserError(f"{self.where}: {message}")

    def describe(self, node: Node) -> str:
        """A node's operator and name."""
        return f"{node.op_type} {node.name or node.output[0]}"

    def resolve(self, name: str) -> str:
        """The value that a name stands for, behind `Identity` nodes."""
        # At most a step for each: `Identity` nodes in a circle must not hang the reader.
        for _ in self._aliases:
            if name not in self._aliases:
                break
            name = self._aliases[name]
        return name

    def attributes(self, node: Node) -> Attributes:
        """A node's attributes as Python values."""
        return {a.name: self._onnx.helper.get_attribute_value(a) for a in node.attribute}

    def is_constant(self, name: str) -> bool:
        """Whether a value is an initializer or a constant."""
        return self.resolve(name) in self._tensors

    def constant(self, name: str) -> np.ndarray:
        """The array of an initializer or a constant; it counts as used.

        Raises:
            UserError: it is missing, lies outside the file, or its size is not that of its data.
        """
        name = self.resolve(name)
        if name not in self._tensors:
            self.fail(f"tensor {name} is missing")
        value = self.array_of(self._tensors[name], name)
        self._used.add(name)
        return value

    def array_of(self, tensor: Onnx, name: str) -> np.ndarray:
        """The array of a tensor of the file.

        Raises:
            UserError: it lies outside the file, or its size is not that of its data.
        """
        if tensor.data_location == self._onnx.TensorProto.EXTERNAL or tensor.external_data:
            self.fail(f"tensor {name} lies outside the file, which is not supported")
        if any(n < 0 for n in tensor.dims) or math.prod(tensor.dims) > self._largest:
            self.fail(f"tensor {name} of shape {tuple(tensor.dims)} claims more data than the file holds")
        try:
            value: np.ndarray = self._onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # sizes that disagree, unknown types
            raise UserError(f"{self.where}: tensor {name} is damaged: {error}") from error
        return value

    def type_of(self, code: int) -> str:
        """The name of a type that is given by its number in ONNX, such as "float32"."""
        try:
            return str(np.dtype(self._onnx.helper.tensor_dtype_to_np_dtype(code)).name)
        except (KeyError, TypeError):
            return f"number {code}"

    def users(self, value: str) -> list[Node]:
        """The nodes that read a value."""
        return self._users[value]

    def sole_user(self, value: str, *op_types: str) -> Node:
        """The one node that reads a value, which must be one of `op_types`.

        Raises:
            UserError: there is none, several, or another; the message names it.
        """
        users = self.users(value)
        expected = " or ".join(op_types)
        if len(users) != 1:
            self.fail(f"value {value} is read by {len(users)} nodes; one {expected} is expected")
        if users[0].op_type not in op_types:
            self.fail(f"node {self.describe(users[0])} is unknown here; {expected} is expected")
        return users[0]

    def expect(self, node: Node, **attributes: object) -> None:
        """Checks a node's attributes; those not named must be absent.

        Raises:
            UserError: one differs.
        """
        given = self.attributes(node)
        for name in sorted(set(given) | set(attributes)):
            if given.get(name) != attributes.get(name):
                self.fail(
                    f"node {self.describe(node)} has {name} {given.get(name)}; {attributes.get(name)} is expected"
                )

    def evaluate(self, nodes: list[Node], inputs: dict[str, np.ndarray], output: str) -> np.ndarray:
        """Computes one value by the reference implementation of onnx, numpy alone.

        Raises:
            UserError: the nodes cannot be computed.
        """
        helper = self._onnx.helper
        from onnx.reference import ReferenceEvaluator  # slow to import, and only needed here

        names = dict.fromkeys(self.resolve(name) for node in nodes for name in node.input)
        constants = [self._onnx.numpy_helper.from_array(self.constant(n), n) for n in names if self.is_constant(n)]
        renamed = []
        for node in nodes:
            copy = self._onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = map(self.resolve, node.input)
            renamed.append(copy)
        values = dict(inputs) | {tensor.name: self._onnx.numpy_helper.to_array(tensor) for tensor in constants}
        try:
            # Node by node: so the size of each result is known before it is computed.
            for node in renamed:
                given = {name: np.asarray(values[name]) for name in node.input if name}
                if (size := _result_size(node.op_type, list(given.values()))) > _LARGEST_RESULT:
                    self.fail(f"node {self.describe(node)} would compute {size:,} values")
                infos = [
                    helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
                    for name, value in given.items()
                ]
                outputs = [
                    helper.make_tensor_value_info(n, self._onnx.TensorProto.UNDEFINED, None) for n in node.output
                ]
                graph = helper.make_graph([node], "part", infos, outputs)
                model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
                with np.errstate(all="ignore"):
                    values |= dict(zip(node.output, ReferenceEvaluator(model).run(None, given)))
            return np.asarray(values[output])
        except UserError:
            raise
        except Exception as error:  # shapes or attributes that do not fit
            reason = (str(error).strip().split("\n") or [""])[0]
            raise UserError(f"{self.where}: the nodes before {output} cannot be computed: {reason}") from error

    def model_of(self, nodes: list[Node], output: str) -> bytes:
        """An ONNX file of some nodes with the constants that they read, from all inputs to one output."""
        kept, read = [], set()
        for node in nodes:
            copy = self._onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = map(self.resolve, node.input)
            kept.append(copy)
            read |= set(copy.input)
        tensors = []
        for name in sorted(read & set(self._tensors)):
            tensors.append(self._onnx.TensorProto())
            tensors[-1].CopyFrom(self._tensors[name])
            tensors[-1].name = name
        helper = self._onnx.helper
        # Behind `Identity` nodes, which are left out above, the output has the name that they stand for.
        given = helper.make_tensor_value_info(self.resolve(output), self._onnx.TensorProto.FLOAT, None)
        graph = helper.make_graph(kept, "part", self.inputs, [given], tensors)
        opset = [helper.make_opsetid("", self.opset)]
        version = helper.find_min_ir_version_for(opset)
        file: bytes = helper.make_model(graph, opset_imports=opset, ir_version=version).SerializeToString()
        return file

    def check_all_used(self, nodes: list[Node]) -> None:
        """Checks that a walk has understood everything.

        Raises:
            UserError: a node is not among `nodes`, or a constant was not read.
        """
        understood = {id(node) for node in nodes}
        for node in self.nodes:
            if id(node) not in understood:
                self.fail(f"node {self.describe(node)} is not part of the network")
        for name in sorted(self._initializers - self._used):
            self.fail(f"tensor {name} is not part of the network")


def _result_size(kind: str, given: list[np.ndarray]) -> int:
    """The most elements that a node can give, of the operators that the pooling may have."""
    if kind in ("Add", "Sub", "Mul", "Div", "Pow"):
        return math.prod(np.broadcast_shapes(*(value.shape for value in given)))
    if kind == "Gather":
        return math.prod(value.size for value in given)
    return sum(max(value.size, value.ndim) for value in given)  # `Shape` gives as many values as axes
