"""Networks as ONNX files: float weights as they are, quantized ones as packed indices and codebooks.

The graph goes from `feats` `[batch, frames, features]`, mean-normalised, to `embs` `[batch, size]`, the names that
WeSpeaker's files have. A network says by `to_onnx` which layers it has; here is what each of them becomes. Batch
normalisation is folded into the convolution or linear layer before it; where none is, it stays as scale and shift.
Quantized weights are looked up in the graph, which a runtime does once, when it loads the file.

How indices are stored: at 4 bits as uint4 (operator set 21), at 2 bits as uint2 (operator set 25), at 7 and 8 bits as
bytes. Other bits, and these in files of an older operator set, are a stream of bits in bytes, which plain integer
arithmetic unpacks: they take no more room than their bits.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, atomic_write
from kmq_jax.core.tree import Leaf, Variables, named_leaves
from kmq_jax.interop.onnx_graph import Node, Onnx, require_onnx
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.nn.conv import Window, window
from kmq_jax.nn.layers import BatchNorm
from kmq_jax.quant.codes import from_groups
from kmq_jax.quant.types import CodebookTensor, is_codebook_tensor

OLDEST_OPSET = 18
_NATIVE = {4: (21, "UINT4"), 2: (25, "UINT2"), 7: (OLDEST_OPSET, "UINT8"), 8: (OLDEST_OPSET, "UINT8")}
_CONV_AXES = {3: (2, 1, 0), 4: (3, 2, 0, 1)}  # from [time, (freq,) in, out] to [out, in, time, (freq)]
_LINEAR_AXES = (1, 0)
Affine = tuple[np.ndarray, np.ndarray]


def export(
    path: Path,
    network: SpeakerNetwork,
    variables: Variables,
    metadata: Mapping[str, str] | None = None,
    bits: int | None = None,
    opset: int | None = None,
) -> int:
    """Writes a network as an ONNX file.

    Args:
        path: the file.
        network: the module that the variables are of.
        variables: `{"params": tree, "batch_stats": tree}`; leaves of `params` may be `CodebookTensor`s.
        metadata: properties to write into the file.
        bits: read nested codebooks at these; None takes the most.
        opset: operator set; None takes the oldest that has a type for all bits in use.

    Returns:
        The operator set of the file.

    Raises:
        UserError: onnx is not installed, the operator set is too old or unknown, a nested tensor lacks these bits, or
            the file cannot be written.
    """
    model = build(network, variables, metadata, bits, opset)
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return model.opset_import[0].version


def build(
    network: SpeakerNetwork,
    variables: Variables,
    metadata: Mapping[str, str] | None = None,
    bits: int | None = None,
    opset: int | None = None,
) -> Onnx:
    """Makes the `onnx.ModelProto` that `export` writes; see there."""
    onnx = require_onnx()
    leaves = {
        name: leaf if is_codebook_tensor(leaf) else np.asarray(leaf)
        for name, leaf in named_leaves(variables["params"], is_leaf=is_codebook_tensor)
    }
    statistics = {name: np.asarray(leaf) for name, leaf in named_leaves(variables.get("batch_stats", {}))}
    graph = _Graph(onnx, leaves, statistics, bits, _opset(onnx, leaves, bits, opset))
    graph.named("embs", "Identity", network.to_onnx(graph, "feats"))
    return graph.model(network, metadata or {})


def _opset(onnx: Onnx, leaves: Mapping[str, Leaf], bits: int | None, opset: int | None) -> int:
    newest = onnx.defs.onnx_opset_version()
    if opset is not None:
        if not OLDEST_OPSET <= opset <= newest:
            raise UserError(f"opset (={opset}) must be {OLDEST_OPSET} to {newest}")
        return opset
    used = {_bits_of(leaf, bits) for leaf in leaves.values() if is_codebook_tensor(leaf)}
    needed = [since for native, (since, _) in _NATIVE.items() if native in used and since <= newest]
    return max(needed, default=OLDEST_OPSET)


def _bits_of(tensor: CodebookTensor, bits: int | None) -> int:
    """The bits at which a tensor is read; those without nested codebooks leave no choice."""
    return bits if bits is not None and tensor.coarse else tensor.bits


def _indices(tensor: CodebookTensor, bits: int) -> np.ndarray:
    """The indices of a tensor in its shape, by numpy: jax would compile for every shape."""
    stream = np.unpackbits(np.asarray(tensor.packed), axis=1, bitorder="little")[:, : tensor.group_size * tensor.bits]
    digits = stream.reshape(tensor.groups, tensor.group_size, tensor.bits)[..., tensor.bits - bits :]
    # Of a nested tensor the index at fewer bits is the upper bits of that at the most.
    rows: Leaf = np.bitwise_or.reduce(digits << np.arange(bits, dtype=np.uint8), axis=-1)
    return np.asarray(from_groups(rows, tensor.shape, tensor.axis))


class _Graph:
    """An ONNX graph that grows node by node, and the parameters it is made from."""

    def __init__(
        self, onnx: Onnx, leaves: Mapping[str, Leaf], statistics: Mapping[str, np.ndarray], bits: int | None, opset: int
    ):
        self._onnx = onnx
        self._leaves = leaves
        self._statistics = statistics
        self._bits = bits
        self._opset = opset
        self._nodes: list[Node] = []
        self._tensors: dict[str, Onnx] = {}

    def node(self, operator: str, *inputs: str, **attributes: object) -> str:
        """Adds a node and returns the name of its output."""
        return self.named(f"{operator}_{len(self._nodes)}", operator, *inputs, **attributes)

    def named(self, output: str, operator: str, *inputs: str, **attributes: object) -> str:
        """Adds a node whose output has a name of its own."""
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def array(self, name: str, value: ArrayLike, dtype: DTypeLike | None = None) -> str:
        """Adds an initializer, once, and returns its name."""
        if name not in self._tensors:
            self._tensors[name] = self._onnx.numpy_helper.from_array(np.ascontiguousarray(value, dtype), name)
        return name

    def integers(self, *values: int) -> str:
        """An initializer of int64 numbers, shared by all that need the same."""
        return self.array("integers_" + "_".join(map(str, values)), values, np.int64)

    def number(self, value: float) -> str:
        """A float32 scalar initializer."""
        return self.array(f"number_{value}", np.float32(value))

    def cast(self, x: str, dtype: str) -> str:
        return self.node("Cast", x, to=getattr(self._onnx.TensorProto, dtype))

    def affine(self, name: str, epsilon: float = BatchNorm.epsilon) -> Affine | None:
        """Slope and shift of the batch normalisation `name` in evaluation; None where the network has none there."""
        measured = f"{name}/mean" in self._statistics
        if f"{name}/scale" in self._leaves:
            # In float64, so that what is folded together is rounded once.
            slope = self._leaves[f"{name}/scale"].astype(np.float64)
            shift = self._leaves[f"{name}/bias"].astype(np.float64)
        elif measured:
            slope, shift = 1.0, 0.0
        else:
            return None
        if measured:
            slope = slope / np.sqrt(self._statistics[f"{name}/var"].astype(np.float64) + epsilon)
            shift = shift - self._statistics[f"{name}/mean"] * slope
        return slope, shift

    def bias(self, layer: str, norm: str | None) -> str | None:
        """The bias of a layer, with the normalisation after it folded in; None where there is neither."""
        given = self._leaves.get(f"{layer}/bias")
        affine = self.affine(norm) if norm else None
        if affine is None:
            return None if given is None else self.array(f"{layer}/bias", given, np.float32)
        slope, shift = affine
        return self.array(f"{layer}/bias", shift if given is None else shift + slope * given, np.float32)

    def kernel(self, layer: str, norm: str | None, axes: tuple[int, ...]) -> str:
        """The kernel of a layer, transposed by `axes` to `[out, in, ...]`, with the normalisation's slope folded in."""
        name = f"{layer}/kernel"
        leaf = self._leaves[name]
        affine = self.affine(norm) if norm else None
        slope = None if affine is None else affine[0].reshape(-1, *[1] * (len(axes) - 1))
        if not is_codebook_tensor(leaf) and leaf.dtype != np.float16:
            # Float32 is folded now; float16 and codebooks stay as they are, and a node multiplies the slope in.
            value = leaf.transpose(axes)
            return self.array(name, value if slope is None else value * slope, np.float32)
        if is_codebook_tensor(leaf):
            weight = self.dequantize(name, leaf, axes)
        else:
            weight = self.cast(self.array(name, leaf.transpose(axes)), "FLOAT")
        return weight if slope is None else self.node("Mul", weight, self.array(f"{name}.slope", slope, np.float32))

    def dequantize(self, name: str, tensor: CodebookTensor, axes: tuple[int, ...]) -> str:
        """Looks the indices of a tensor, transposed by `axes`, up in its codebooks."""
        bits = _bits_of(tensor, self._bits)
        codebook = np.asarray(tensor.codebook_of(bits))
        indices = _indices(tensor, bits).transpose(axes)
        # Groups first; a tensor whose groups lie along its inputs is turned back afterwards.
        place = 0 if tensor.axis is None else axes.index(tensor.axis)
        grouped = np.moveaxis(indices, place, 0)
        rows = self.indices(f"{name}.indices", grouped.reshape(tensor.groups, -1), bits)
        table = self.array(f"{name}.codebook", codebook)
        if codebook.dtype != np.float32:
            table = self.cast(table, "FLOAT")
        values = self.node("GatherElements", table, rows, axis=1)
        values = self.node("Reshape", values, self.integers(*grouped.shape))
        if place:
            back = list(range(1, len(axes)))
            back.insert(place, 0)
            values = self.node("Transpose", values, perm=back)
        return values

    def indices(self, name: str, rows: np.ndarray, bits: int) -> str:
        """Stores indices `[groups, n]` in `bits` bits each; gives them as integers."""
        since, dtype = _NATIVE.get(bits, (None, ""))
        if since is not None and since <= self._opset:
            per_byte = 8 // bits
            flat = np.pad(rows.ravel(), (0, -rows.size % per_byte)).reshape(-1, per_byte)
            packed = np.bitwise_or.reduce(flat << (bits * np.arange(per_byte, dtype=np.uint8)), axis=1)
            kind = getattr(self._onnx.TensorProto, dtype)
            data = packed.astype(np.uint8).tobytes()
            self._tensors[name] = self._onnx.helper.make_tensor(name, kind, rows.shape, data, raw=True)
            return self.cast(name, "INT32")
        # Eight indices fill exactly `bits` bytes: an integer of at most 48 bits, taken apart by division. (With 56
        # bits ONNX Runtime's sum of integers is not exact.)
        groups, n = rows.shape
        padded = np.pad(rows, ((0, 0), (0, -n % 8)))
        stream = np.packbits((padded[..., None] >> np.arange(bits)) & 1, axis=None, bitorder="little")
        stored = self.array(name, stream.reshape(groups, -1, bits))
        parts = self.node("Mul", self.cast(stored, "INT64"), self.integers(*(1 << 8 * i for i in range(bits))))
        whole = self.node("ReduceSum", parts, self.integers(2), keepdims=1)
        eights = self.node("Div", whole, self.integers(*(1 << bits * i for i in range(8))))
        unpacked = self.node("Mod", eights, self.integers(1 << bits))
        unpacked = self.node("Reshape", unpacked, self.integers(groups, padded.shape[1]))
        if n == padded.shape[1]:
            return unpacked
        return self.node("Slice", unpacked, self.integers(0), self.integers(n), self.integers(1))

    def conv(self, x: str, layer: str, moves: Window | None = None, norm: str | None = None) -> str:
        """Convolves `[batch, channel, time, (freq)]`; the normalisation `norm` after it is folded in.

        Args:
            x: the input.
            layer: path of the layer.
            moves: how the kernel moves; None takes step 1 and "same" padding.
            norm: path of the normalisation that follows, if any.
        """
        shape = self._leaves[f"{layer}/kernel"].shape
        moves = moves or window(len(shape) - 2, shape[:-2])
        inputs = [x, self.kernel(layer, norm, _CONV_AXES[len(shape)]), self.bias(layer, norm)]
        more: Json = {} if set(moves.dilations) == {1} else {"dilations": list(moves.dilations)}
        more |= {} if moves.groups == 1 else {"group": moves.groups}
        return self.node(
            "Conv",
            *(name for name in inputs if name is not None),
            kernel_shape=list(moves.taps),
            strides=list(moves.strides),
            pads=[before for before, _ in moves.padding] + [after for _, after in moves.padding],
            **more,
        )

    def linear(self, x: str, layer: str, norm: str | None = None) -> str:
        """A linear layer on `[batch, in]`."""
        inputs = [x, self.kernel(layer, norm, _LINEAR_AXES), self.bias(layer, norm)]
        return self.node("Gemm", *(name for name in inputs if name is not None), transB=1)

    def linear_frames(self, x: str, layer: str) -> str:
        """A linear layer on `[batch, time, in]`."""
        weight = self.node("Transpose", self.kernel(layer, None, _LINEAR_AXES), perm=[1, 0])
        y = self.node("MatMul", x, weight)
        bias = self.bias(layer, None)
        return y if bias is None else self.node("Add", y, bias)

    def parameter(self, name: str) -> str:
        """A parameter in its own layout."""
        leaf = self._leaves[name]
        if is_codebook_tensor(leaf):
            return self.dequantize(name, leaf, tuple(range(leaf.ndim)))
        return self.array(name, leaf, np.float32)

    def layer_norm(self, x: str, norm: str, epsilon: float) -> str:
        """A normalisation over the last axis."""
        given = [self.parameter(f"{norm}/{leaf}") for leaf in ("scale", "bias")]
        return self.node("LayerNormalization", x, *given, axis=-1, epsilon=epsilon)

    def scale_and_shift(self, x: str, norm: str, ndim: int, epsilon: float = BatchNorm.epsilon) -> str:
        """A batch normalisation that no layer precedes; channels are axis 1."""
        affine = self.affine(norm, epsilon)
        if affine is None:
            return x
        slope, shift = (value.reshape(1, -1, *[1] * (ndim - 2)) for value in affine)
        x = self.node("Mul", x, self.array(f"{norm}/slope", slope, np.float32))
        return self.node("Add", x, self.array(f"{norm}/shift", shift, np.float32))

    def activation(self, x: str, function: Callable[[jax.Array], jax.Array]) -> str:
        """ReLU, SiLU, sigmoid or hyperbolic tangent."""
        if function is nn.silu:
            return self.node("Mul", x, self.node("Sigmoid", x))
        named: dict[Callable[[jax.Array], jax.Array], str] = {nn.relu: "Relu", nn.sigmoid: "Sigmoid", nn.tanh: "Tanh"}
        if function in named:
            return self.node(named[function], x)
        raise UserError(f"activation {function} has no ONNX form here")

    def frames_of(self, x: str, size: int | None = None) -> str:
        """Turns `[batch, channel, time]`, or with a `size` `[batch, channel, time, freq]`, to `[batch, time, size]`."""
        if size is None:
            return self.node("Transpose", x, perm=[0, 2, 1])
        frames = self.node("Transpose", x, perm=[0, 2, 3, 1])
        return self.node("Reshape", frames, self.integers(0, 0, size))

    def channels_of(self, frames: str) -> str:
        """Turns `[batch, time, channel]` to `[batch, channel, time]`."""
        return self.node("Transpose", frames, perm=[0, 2, 1])

    def statistics(self, frames: str, floor: float) -> str:
        """Mean and unbiased deviation over time of `[batch, time, in]`, as `nn.pooling.StatisticsPooling`."""
        mean = self.node("ReduceMean", frames, self.integers(1), keepdims=1)
        centred = self.node("Sub", frames, mean)
        squares = self.node("ReduceSum", self.node("Mul", centred, centred), self.integers(1), keepdims=0)
        count = self.cast(self.node("Gather", self.node("Shape", frames), self.integers(1)), "FLOAT")
        divisor = self.node("Max", self.node("Sub", count, self.number(1)), self.number(1))
        variance = self.node("Add", self.node("Div", squares, divisor), self.number(floor))
        return self._concatenate(mean, variance)

    def attentive_statistics(self, frames: str, pooling: str, floor: float) -> str:
        """Weighted mean and deviation over time, as `nn.pooling.AttentiveStatisticsPooling` of that name."""
        hidden = self.node("Tanh", self.linear_frames(frames, f"{pooling}/attention1"))
        weights = self.node("Softmax", self.linear_frames(hidden, f"{pooling}/attention2"), axis=1)
        mean = self.node("ReduceSum", self.node("Mul", weights, frames), self.integers(1), keepdims=1)
        centred = self.node("Sub", frames, mean)
        squares = self.node("Mul", weights, self.node("Mul", centred, centred))
        variance = self.node("ReduceSum", squares, self.integers(1), keepdims=0)
        return self._concatenate(mean, self.node("Max", variance, self.number(floor)))

    def _concatenate(self, mean: str, variance: str) -> str:
        mean = self.node("Squeeze", mean, self.integers(1))
        return self.node("Concat", mean, self.node("Sqrt", variance), axis=1)

    def has(self, module: str) -> bool:
        """Whether the network has parameters below `module`."""
        return any(name.startswith(f"{module}/") for name in self._leaves)

    def model(self, network: SpeakerNetwork, metadata: Mapping[str, str]) -> Onnx:
        """The finished model, checked."""
        helper, kind = self._onnx.helper, self._onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self._nodes,
            "speaker_embedding",
            [helper.make_tensor_value_info("feats", kind, ["B", "T", network.features])],
            [helper.make_tensor_value_info("embs", kind, ["B", network.embedding_size])],
            list(self._tensors.values()),
        )
        opset = [helper.make_opsetid("", self._opset)]
        model = helper.make_model(graph, opset_imports=opset, producer_name="kmq_jax")
        model.ir_version = helper.find_min_ir_version_for(opset)
        helper.set_model_props(model, dict(metadata))
        self._onnx.checker.check_model(model)
        return model
