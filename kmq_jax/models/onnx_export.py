"""Networks as ONNX files: float weights as they are, quantized ones as packed indices and codebooks.

The graph goes from `feats` `[batch, frames, features]`, mean-normalised, to `embs` `[batch, size]`, the names that
WeSpeaker's files have. A network says by `to_onnx` which layers it has; here is what each of them becomes. Batch
normalisation is folded into the convolution or linear layer before it; where none is, it stays as scale and shift.
Quantized weights are looked up in the graph, which a runtime does once, when it loads the file.

How indices are stored: at 4 bits as uint4 (operator set 21), at 2 bits as uint2 (operator set 25), at 7 and 8 bits as
bytes. Other bits, and these in files of an older operator set, are a stream of bits in bytes, which plain integer
arithmetic unpacks: they take no more room than their bits.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from kmq_jax.core.errors import UserError
from kmq_jax.core.files import Json, atomic_write
from kmq_jax.core.tree import Leaf, Variables, named_leaves
from kmq_jax.frontend import FbankConfig, FrontEnd, MelConfig, spectrum_operators
from kmq_jax.frontend.mel import DECIBEL_FLOOR, LOG_OFFSET, LOUDEST
from kmq_jax.models.protocol import SpeakerNetwork
from kmq_jax.nn import integers
from kmq_jax.nn.conv import Window, window
from kmq_jax.nn.layers import BatchNorm
from kmq_jax.nn.pooling import weighted_statistics
from kmq_jax.nn.whole import Moments
from kmq_jax.quant.codes import from_groups
from kmq_jax.quant.types import CodebookTensor, is_codebook_tensor

OLDEST_OPSET = 18
# By bits: the operator set since which there is a type for such indices, and the type.
_NATIVE = {4: (21, "UINT4"), 2: (25, "UINT2"), 7: (OLDEST_OPSET, "UINT8"), 8: (OLDEST_OPSET, "UINT8")}
_CONV_AXES = {3: (2, 1, 0), 4: (3, 2, 0, 1)}  # from [time, (freq,) in, out] to [out, in, time, (freq)]
_LINEAR_AXES = (1, 0)
Affine = tuple[np.ndarray, np.ndarray]
_BIAS_LIMIT = 2.0**30  # a bias in steps must fit into 32 bits beside the products

Onnx: TypeAlias = Any
"""The package onnx, and what it makes: it has no types that can be named."""

Node: TypeAlias = Any
"""A node of a graph, `onnx.NodeProto`."""

Shape: TypeAlias = Sequence[str | int]
"""Of a value: sizes, and names of those that are free."""

Indices = Literal["smallest", "uint4"]
"""How packed indices are stored: as small as the operator set allows; or of up to 4 bits as uint4 (set 21)."""


def require_onnx() -> Onnx:
    """Imports onnx.

    Raises:
        UserError: it is not installed.
    """
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise UserError("ONNX files need the onnx package: pip install onnx") from None
    return onnx


def export(
    path: Path,
    network: SpeakerNetwork,
    variables: Variables,
    metadata: Mapping[str, str] | None = None,
    bits: int | None = None,
    opset: int | None = None,
    indices: Indices = "smallest",
    fbank: FrontEnd | None = None,
) -> int:
    """Writes a network as an ONNX file.

    Args:
        path: the file.
        network: the module that the variables are of.
        variables: `{"params": tree, "batch_stats": tree}`; leaves of `params` may be `CodebookTensor`s.
        metadata: properties to write into the file.
        bits: read nested codebooks at these; None takes the most.
        opset: operator set; None takes the oldest that has a type for all bits in use.
        indices: how indices of fewer than 4 bits are stored.
        fbank: a filterbank to put into the graph, whose input is then `wave` `[batch, samples]`, full scale 1.

    Returns:
        The operator set of the file.

    Raises:
        UserError: onnx is not installed, the operator set is too old or unknown, a nested tensor lacks these bits, or
            the file cannot be written.
    """
    model = build(network, variables, metadata, bits, opset, indices, fbank)
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return model.opset_import[0].version


def build(
    network: SpeakerNetwork,
    variables: Variables,
    metadata: Mapping[str, str] | None = None,
    bits: int | None = None,
    opset: int | None = None,
    indices: Indices = "smallest",
    fbank: FrontEnd | None = None,
) -> Onnx:
    """Makes the `onnx.ModelProto` that `export` writes; see there."""
    graph = _graph(network, variables, bits, opset, indices)
    if fbank is None:
        shapes: dict[str, Shape] = {"feats": ["B", "T", network.features]}
    else:
        shapes = {"wave": ["B", "N"]}
        graph.named("feats", "Identity", graph.features("wave", fbank))
    graph.named("embs", "Identity", network.to_onnx(graph, "feats"))
    return graph.model(shapes, {"embs": ["B", network.embedding_size]}, metadata or {})


@dataclasses.dataclass(frozen=True)
class Whole:
    """Where a graph looks at all frames of an utterance, as `nn.whole` has it.

    Attributes:
        place: its name.
        frames: the value that holds them, `[batch, time, values]` or `[batch, values, time]`.
        logits: the value of their weights' logits, of that shape; None: each weighs 1.
        axis: that of time.
        outputs: the values that are made of them, with their shapes.
        finish: makes these of the whole utterance's moments.
    """

    place: str
    frames: str
    logits: str | None
    axis: int
    outputs: Mapping[str, Shape]
    finish: Callable[[Moments], Sequence[np.ndarray]]

    def values(self, moments: Moments) -> dict[str, np.ndarray]:
        """The outputs by name, float32."""
        return {name: np.asarray(value, np.float32) for name, value in zip(self.outputs, self.finish(moments))}


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A model in graphs for recordings that are too long for one run.

    Attributes:
        filterbank: from `wave` `[batch, samples]` to `logmel` `[batch, frames, features]`, the mean not removed.
        alone: from `feats` `[batch, frames, features]` to the frames and logits of all places.
        given: the same, but what places give is an input; None where only the embedding depends on it.
        head: from what places give to `embs`.
        wholes: the places, in running order.
    """

    filterbank: Onnx
    alone: Onnx
    given: Onnx | None
    head: Onnx
    wholes: tuple[Whole, ...]


def build_pieces(network: SpeakerNetwork, variables: Variables, fbank: FbankConfig, bits: int | None = None) -> Pieces:
    """Makes a model's graph in pieces, cut where it looks at all frames of an utterance; see `build`.

    Raises:
        UserError: the network has no ONNX form.
    """
    graph = _graph(network, variables, bits, None, "smallest")
    graph.named("embs", "Identity", network.to_onnx(graph, "feats"))
    front = _graph(network, {"params": {}}, bits, None, "smallest")
    front.named("logmel", "Identity", front.filterbank("wave", fbank))
    feats: dict[str, Shape] = {"feats": ["B", "T", network.features]}
    values = [value for whole in graph.wholes for value in (whole.frames, whole.logits) if value is not None]
    # Axes behind the batch may be of any size; each needs a name of its own.
    seen: dict[str, Shape] = {value: ["B", f"{value}.1", f"{value}.2"] for value in values}
    made = {name: shape for whole in graph.wholes for name, shape in whole.outputs.items()}
    return Pieces(
        front.model({"wave": ["B", "N"]}, {"logmel": ["B", "T", network.features]}, {}),
        graph.model(feats, seen, {}),
        graph.model({**feats, **made}, seen, {}) if len(graph.wholes) > 1 else None,
        graph.model(made, {"embs": ["B", network.embedding_size]}, {}),
        tuple(graph.wholes),
    )


def _graph(
    network: SpeakerNetwork, variables: Variables, bits: int | None, opset: int | None, indices: Indices
) -> "_Graph":
    onnx = require_onnx()
    leaves = {
        name: leaf if is_codebook_tensor(leaf) else np.asarray(leaf)
        for name, leaf in named_leaves(variables["params"], is_leaf=is_codebook_tensor)
    }
    statistics = {name: np.asarray(leaf) for name, leaf in named_leaves(variables.get("batch_stats", {}))}
    rounds = {name: np.asarray(leaf) for name, leaf in named_leaves(variables.get(integers.COLLECTION, {}))}
    return _Graph(onnx, leaves, statistics, rounds, bits, _opset(onnx, leaves, bits, opset, indices), indices)


def _opset(onnx: Onnx, leaves: Mapping[str, Leaf], bits: int | None, opset: int | None, indices: Indices) -> int:
    newest = onnx.defs.onnx_opset_version()
    if opset is not None:
        if not OLDEST_OPSET <= opset <= newest:
            raise UserError(f"opset (={opset}) must be {OLDEST_OPSET} to {newest}")
        return opset
    used = {_stored_bits(_bits_of(leaf, bits), indices) for leaf in leaves.values() if is_codebook_tensor(leaf)}
    needed = [since for native, (since, _) in _NATIVE.items() if native in used and since <= newest]
    return max(needed, default=OLDEST_OPSET)


def _bits_of(tensor: CodebookTensor, bits: int | None) -> int:
    """The bits at which a tensor is read; those without nested codebooks leave no choice."""
    return bits if bits is not None and tensor.coarse else tensor.bits


def _stored_bits(bits: int, indices: Indices) -> int:
    """The bits that an index takes in the file."""
    return 4 if indices == "uint4" and bits < 4 else bits


def _indices(tensor: CodebookTensor, bits: int) -> np.ndarray:
    """The indices of a tensor in its shape, by numpy: jax would compile for every shape."""
    stream = np.unpackbits(np.asarray(tensor.packed), axis=1, bitorder="little")[:, : tensor.group_size * tensor.bits]
    digits = stream.reshape(tensor.groups, tensor.group_size, tensor.bits)[..., tensor.bits - bits :]
    # The lowest bit comes first; the index of a nested tensor at fewer bits is the upper bits of the whole one.
    rows: Leaf = np.sum(digits << np.arange(bits, dtype=np.uint8), axis=-1, dtype=np.uint8)
    return np.asarray(from_groups(rows, tensor.shape, tensor.axis))


class _Graph:
    """An ONNX graph that grows node by node, and the parameters it is made from."""

    def __init__(
        self,
        onnx: Onnx,
        leaves: Mapping[str, Leaf],
        statistics: Mapping[str, np.ndarray],
        rounds: Mapping[str, np.ndarray],
        bits: int | None,
        opset: int,
        indices: Indices,
    ):
        self._onnx = onnx
        self._leaves = leaves
        self._statistics = statistics
        self._rounds = rounds
        self._bits = bits
        self._opset = opset
        self._stored = indices
        self._before_relu: dict[str, str] = {}
        self.wholes: list[Whole] = []
        self._rounded: dict[tuple[str, bytes], str] = {}
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
            self._tensors[name] = self._onnx.numpy_helper.from_array(np.asarray(value, dtype, order="C"), name)
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

    def bias_values(self, layer: str, norm: str | None) -> np.ndarray | None:
        """The bias of a layer, with the normalisation after it folded in; None where there is neither."""
        given = self._leaves.get(f"{layer}/bias")
        affine = self.affine(norm) if norm else None
        if affine is None:
            return given
        slope, shift = affine
        return np.asarray(shift if given is None else shift + slope * given)

    def bias(self, layer: str, norm: str | None) -> str | None:
        """The same as an initializer."""
        values = self.bias_values(layer, norm)
        return None if values is None else self.array(f"{layer}/bias", values, np.float32)

    def rounded(self, x: str, place: str) -> str:
        """Rounds activations to 8 bits where the network has a step for this place: see `nn.integers.rounded`."""
        if place not in self._rounds:
            return x
        grid = self._rounds[place]
        same = grid.tobytes()
        if grid[1] == 0:
            # What lies below the least level is cut there: a ReLU before it has no effect.
            x = self._before_relu.get(x, x)
        if (x, same) not in self._rounded:
            step = self.array(f"{place}.step", grid[0], np.float32)
            zero = self.array(f"{place}.zero", grid[1], np.uint8)
            y = self.node("DequantizeLinear", self.node("QuantizeLinear", x, step, zero), step, zero)
            # What is on these levels already stays as it is: a second rounding would only be more nodes.
            self._rounded[x, same] = self._rounded[y, same] = y
        return self._rounded[x, same]

    def integer_weights(self, layer: str, norm: str | None, axes: tuple[int, ...]) -> tuple[str, str | None]:
        """The kernel of a layer as 8-bit integers `[out, in, ...]`, its bias as 32-bit ones, both in their steps.

        A runtime looks the kernel up in its codebooks when it loads the file, and then multiplies integers.
        """
        name = f"{layer}/kernel"
        tensor, steps = self._leaves[name], self._rounds[name].astype(np.float64)
        bits = _bits_of(tensor, self._bits)
        table = np.asarray(tensor.codebook_of(bits), np.float64) / np.maximum(steps, 1e-30)[:, None]
        table = np.clip(np.round(table), -integers.LARGEST, integers.LARGEST)
        affine = self.affine(norm) if norm else None
        slope = np.ones(len(steps)) if affine is None else np.broadcast_to(affine[0], steps.shape)
        values, inputs = self.bias_values(layer, norm), float(self._rounds[f"{layer}/input"][0])
        least = np.float64(1e-30) if values is None else np.abs(values) / (inputs * _BIAS_LIMIT)
        # A dead channel has a step so small that its bias would overflow: it gets a larger one, and smaller integers.
        scale = np.maximum(steps * np.abs(slope), np.maximum(least, 1e-30))
        table = np.round(table * (steps * slope / scale)[:, None]).astype(np.int8)
        indices = _indices(tensor, bits).transpose(axes)
        rows = indices.reshape(tensor.groups, -1)
        # An index of 7 or 8 bits takes a byte, as the weight itself does: no codebook is needed.
        if bits >= 7:
            whole = self.array(name, np.take_along_axis(table, rows, axis=1).reshape(indices.shape))
        else:
            found = self.indices(f"{name}.indices", rows, bits)
            # All codebooks in one row: those of channel c begin at c * 2^bits.
            first = np.arange(tensor.groups)[:, None] << bits
            native = self._is_native(_stored_bits(bits, self._stored))
            offsets = self.array(f"{name}.first", first, np.int32 if native else np.int64)
            whole = self.node("Gather", self.array(f"{name}.codebook", table.ravel()), self.node("Add", found, offsets))
            whole = self.node("Reshape", whole, self.integers(*indices.shape))
        zeros = self.array(f"zeros_{len(steps)}", np.zeros(len(steps), np.int8))
        weight = self.node("DequantizeLinear", whole, self.array(f"{name}.step", scale, np.float32), zeros, axis=0)
        if values is None:
            return weight, None
        scale = scale.astype(np.float32) * np.float32(inputs)  # as a runtime computes it
        bias = self.array(f"{layer}/bias", np.round(np.asarray(values, np.float64) / scale), np.int32)
        return weight, self.node("DequantizeLinear", bias, self.array(f"{layer}/bias.step", scale), axis=0)

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

    def _is_native(self, bits: int) -> bool:
        return bits in _NATIVE and _NATIVE[bits][0] <= self._opset

    def indices(self, name: str, rows: np.ndarray, bits: int) -> str:
        """Stores indices `[groups, n]` of so many bits; gives them as integers: int32 of a native type, else int64."""
        bits = _stored_bits(bits, self._stored)
        if self._is_native(bits):
            dtype = _NATIVE[bits][1]
            per_byte = 8 // bits
            flat = np.pad(rows.ravel(), (0, -rows.size % per_byte)).reshape(-1, per_byte)
            packed = np.sum(flat << (bits * np.arange(per_byte, dtype=np.uint8)), axis=1, dtype=np.uint8)
            kind = getattr(self._onnx.TensorProto, dtype)
            data = packed.tobytes()
            self._tensors[name] = self._onnx.helper.make_tensor(name, kind, rows.shape, data, raw=True)
            return self.cast(name, "INT32")
        # Eight indices fill exactly `bits` bytes. Each is taken from the byte it begins in and the next one: no number
        # on the way exceeds 16 bits. All eight as one integer would overflow in OpenVINO, whose int64 are int32.
        groups, n = rows.shape
        padded = np.pad(rows, ((0, 0), (0, -n % 8)))
        stream = np.packbits((padded[..., None] >> np.arange(bits)) & 1, axis=None, bitorder="little")
        stored = self.cast(self.array(name, stream.reshape(groups, -1, bits)), "INT64")
        first, shift = np.divmod(bits * np.arange(8), 8)
        low = self.node("Gather", stored, self.integers(*first), axis=2)
        # Where an index ends within its first byte, the remainder below removes whatever the next one adds.
        high = self.node("Gather", stored, self.integers(*np.minimum(first + 1, bits - 1)), axis=2)
        both = self.node("Add", low, self.node("Mul", high, self.integers(256)))
        unpacked = self.node("Mod", self.node("Div", both, self.integers(*(1 << shift))), self.integers(1 << bits))
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
        axes = _CONV_AXES[len(shape)]
        if f"{layer}/kernel" in self._rounds:
            inputs = [self.rounded(x, f"{layer}/input"), *self.integer_weights(layer, norm, axes)]
        else:
            inputs = [x, self.kernel(layer, norm, axes), self.bias(layer, norm)]
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
            y = self.node(named[function], x)
            if function is nn.relu:
                self._before_relu[y] = x
            return y
        raise UserError(f"activation {function} has no ONNX form here")

    def frames_of(self, x: str, size: int | None = None) -> str:
        """Turns `[batch, channel, time]`, or with a `size` `[batch, channel, time, freq]`, to `[batch, time, size]`."""
        if size is None:
            return self.node("Transpose", x, perm=[0, 2, 1])
        return self.node("Reshape", self.node("Transpose", x, perm=[0, 2, 3, 1]), self.integers(0, 0, size))

    def channels_of(self, frames: str) -> str:
        """Turns `[batch, time, channel]` to `[batch, channel, time]`."""
        return self.node("Transpose", frames, perm=[0, 2, 1])

    def whole(
        self,
        place: str,
        frames: str,
        outputs: Mapping[str, Shape],
        finish: Callable[[Moments], Sequence[np.ndarray]],
        logits: str | None = None,
        axis: int = 1,
    ) -> None:
        """Notes a place where the graph looks at all frames; see `Whole`."""
        self.wholes.append(Whole(place, frames, logits, axis, outputs, finish))

    def mean_over_time(self, x: str, place: str) -> str:
        """Mean over time of `[batch, channel, time]`, as `nn.whole.mean` in the module `place`."""
        mean = self.node("ReduceMean", x, self.integers(2), keepdims=0)
        self.whole(f"{place}/mean", x, {mean: ["B", "C"]}, lambda found: [found.mean[None]], axis=2)
        return mean

    def statistics(self, frames: str, floor: float, pooling: str = "pool") -> str:
        """Mean and unbiased deviation over time of `[batch, time, in]`, as `nn.pooling.StatisticsPooling`."""
        mean = self.node("ReduceMean", frames, self.integers(1), keepdims=1)
        centred = self.node("Sub", frames, mean)
        squares = self.node("ReduceSum", self.node("Mul", centred, centred), self.integers(1), keepdims=0)
        count = self.cast(self.node("Gather", self.node("Shape", frames), self.integers(1)), "FLOAT")
        divisor = self.node("Max", self.node("Sub", count, self.number(1)), self.number(1))
        variance = self.node("Add", self.node("Div", squares, divisor), self.number(floor))
        pooled = self._concatenate(mean, variance)

        def finish(found: Moments) -> list[np.ndarray]:
            deviation = np.sqrt(found.squares / np.maximum(found.weight - 1, 1) + floor)
            return [np.concatenate([found.mean, deviation])[None]]

        self.whole(f"{pooling}/statistics", frames, {pooled: ["B", "P"]}, finish)
        return pooled

    def attentive_statistics(self, frames: str, pooling: str, floor: float) -> str:
        """Weighted mean and deviation over time, as `nn.pooling.AttentiveStatisticsPooling` of that name."""
        hidden = self.node("Tanh", self.linear_frames(frames, f"{pooling}/attention1"))
        return self.weighted_pooling(frames, self.linear_frames(hidden, f"{pooling}/attention2"), pooling, floor)

    def weighted_pooling(self, frames: str, logits: str, pooling: str, floor: float, axis: int = 1) -> str:
        """Mean and deviation over the axis of time, weighted by the softmax of logits, as `nn.whole.weighted`."""
        weights = self.node("Softmax", logits, axis=axis)
        mean = self.node("ReduceSum", self.node("Mul", weights, frames), self.integers(axis), keepdims=1)
        centred = self.node("Sub", frames, mean)
        squares = self.node("Mul", weights, self.node("Mul", centred, centred))
        variance = self.node("ReduceSum", squares, self.integers(axis), keepdims=0)
        pooled = self._concatenate(mean, self.node("Max", variance, self.number(floor)), axis)
        finish = functools.partial(weighted_statistics, floor=floor)
        self.whole(f"{pooling}/weighted", frames, {pooled: ["B", "P"]}, finish, logits, axis)
        return pooled

    def _concatenate(self, mean: str, variance: str, axis: int = 1) -> str:
        mean = self.node("Squeeze", mean, self.integers(axis))
        return self.node("Concat", mean, self.node("Sqrt", variance), axis=1)

    def has(self, module: str) -> bool:
        """Whether the network has parameters below `module`."""
        return any(name.startswith(f"{module}/") for name in self._leaves)

    def features(self, wave: str, fbank: FrontEnd) -> str:
        """What a network sees of `wave` `[batch, samples]`, as `frontend.features_of`."""
        features = self.mel(wave, fbank) if isinstance(fbank, MelConfig) else self.filterbank(wave, fbank)
        return self.mean_normalize(features) if fbank.subtract_mean else features

    def mel(self, wave: str, config: MelConfig) -> str:
        """Features of `wave` `[batch, samples]`, as `frontend.fbank` with these settings, by matrix products."""
        if config.raised_to is not None:
            squares = self.node("ReduceMean", self.node("Mul", wave, wave), self.integers(1), keepdims=1)
            # Digital silence has no level; it is left as it is whatever the factor.
            level = self.node("Max", self.node("Sqrt", squares), self.number(1e-30))
            factor = self.node("Div", self.number(10 ** (config.raised_to / 20)), level)
            wave = self.node("Mul", wave, self.node("Max", factor, self.number(1)))
        if config.preemphasis:
            # The first sample has the second before it, as if the wave were mirrored.
            first = self.node("Slice", wave, self.integers(1), self.integers(2), self.integers(1))
            others = self.node("Slice", wave, self.integers(0), self.integers(-1), self.integers(1))
            before = self.node("Concat", first, others, axis=1)
            wave = self.node("Sub", wave, self.node("Mul", before, self.number(config.preemphasis)))
        ends = self.integers(0, config.margin // 2, 0, config.margin // 2)
        wave = self.node("Pad", wave, ends, mode="reflect" if config.mirrored else "constant")
        transform, filters = spectrum_operators(config)
        spectrum = self.node("MatMul", self._frames(wave, config), self.array("mel.transform", transform))
        energies = self.node("MatMul", self.node("Mul", spectrum, spectrum), self.array("mel.filters", filters))
        if config.scale == "power":
            return energies
        if config.scale == "log":
            return self.node("Log", self.node("Add", energies, self.number(LOG_OFFSET)))
        # 10 log10 of the energies, none more than LOUDEST below the recording's loudest.
        nepers = self.node("Log", self.node("Max", energies, self.number(DECIBEL_FLOOR)))
        decibels = self.node("Mul", nepers, self.number(10 / math.log(10)))
        loudest = self.node("ReduceMax", decibels, self.integers(1, 2), keepdims=1)
        return self.node("Max", decibels, self.node("Sub", loudest, self.number(LOUDEST)))

    def filterbank(self, wave: str, fbank: FbankConfig) -> str:
        """Log-mel features of `wave` `[batch, samples]`, as `frontend.fbank`, by matrix products."""
        transform, filters = spectrum_operators(fbank)
        frames = self._frames(self.node("Mul", wave, self.number(fbank.waveform_scale)), fbank)
        frames = self.node("Sub", frames, self.node("ReduceMean", frames, self.integers(2), keepdims=1))
        spectrum = self.node("MatMul", frames, self.array("fbank.transform", transform))
        energies = self.node("MatMul", self.node("Mul", spectrum, spectrum), self.array("fbank.filters", filters))
        if fbank.use_energy:
            energy = self.node("ReduceSum", self.node("Mul", frames, frames), self.integers(2), keepdims=1)
            energies = self.node("Concat", energy, energies, axis=2)
        return self.node("Log", self.node("Max", energies, self.number(float(np.finfo(np.float32).eps))))

    def _frames(self, wave: str, fbank: FrontEnd) -> str:
        """Cuts `[batch, samples]` into overlapping frames `[batch, frames, length]`, as `frontend.fbank` does."""
        # A frame is a few blocks side by side. The i-th blocks of all frames are one slice of the wave's blocks.
        block = math.gcd(fbank.shift, fbank.length)
        step = fbank.shift // block
        samples = self.node("Gather", self.node("Shape", wave), self.integers(1))
        usable = self.node("Div", samples, self.integers(block))
        usable = self.node("Mul", usable, self.integers(block))
        wave = self.node("Slice", wave, self.integers(0), usable, self.integers(1))
        blocks = self.node("Reshape", wave, self.integers(0, -1, block))
        steps = self.node("Div", self.node("Sub", samples, self.integers(fbank.length)), self.integers(fbank.shift))
        last = self.node("Mul", steps, self.integers(step))
        pieces = []
        for i in range(fbank.length // block):
            end = self.node("Add", last, self.integers(i + 1))
            piece = self.node("Slice", blocks, self.integers(i), end, self.integers(1), self.integers(step))
            pieces.append(piece)
        return self.node("Concat", *pieces, axis=2)

    def mean_normalize(self, features: str) -> str:
        """Subtracts the mean over time of `[batch, time, features]`."""
        return self.node("Sub", features, self.node("ReduceMean", features, self.integers(1), keepdims=1))

    def model(self, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], metadata: Mapping) -> Onnx:
        """The finished model of what leads from inputs to outputs, checked.

        Args:
            inputs: shapes by name; any value of the graph can be one. Those that nothing reads are left out.
            outputs: shapes by name.
            metadata: properties of the file.
        """
        helper, kind = self._onnx.helper, self._onnx.TensorProto.FLOAT
        nodes = self._between(set(inputs), outputs)
        read = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            "speaker_embedding",
            [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items() if name in read],
            [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
            [tensor for name, tensor in self._tensors.items() if name in read],
        )
        opset = [helper.make_opsetid("", self._opset)]
        model = helper.make_model(graph, opset_imports=opset, producer_name="kmq_jax")
        model.ir_version = helper.find_min_ir_version_for(opset)
        helper.set_model_props(model, dict(metadata))
        self._onnx.checker.check_model(model)
        return model

    def _between(self, inputs: set[str], outputs: Iterable[str]) -> list[Node]:
        """The nodes, in order, that outputs need once the inputs are given."""
        makers = {name: node for node in self._nodes for name in node.output}
        needed, waiting = set(), list(outputs)
        while waiting:
            name = waiting.pop()
            if name in makers and name not in needed and name not in inputs:
                needed.add(name)
                waiting += makers[name].input
        return [node for node in self._nodes if node.output[0] in needed]
