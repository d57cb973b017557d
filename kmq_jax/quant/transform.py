"""Rewriting a tree of parameters: quantized tensors in place of some leaves, and back."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import map_named, match_rules, named_leaves
from kmq_jax.quant import nested
from kmq_jax.quant.codes import assign, from_groups, lookup, to_groups, where_sorted
from kmq_jax.quant.kmeans import kmeans
from kmq_jax.quant.packing import pack, unpack
from kmq_jax.quant.types import HALF, CodebookTensor, QuantRule, QuantSpec, is_codebook_tensor

Rules = QuantSpec | Sequence[QuantRule]


def decide(params: Any, rules: Rules) -> dict[str, QuantSpec]:
    """Decides which leaves are quantized, and how.

    The first rule that matches a name decides. Leaves are kept as they are where no rule matches, where the rule says
    None, where they are smaller than the rule's minimum, where they are not floating point, and where they have fewer
    than two axes (biases and normalisation), unless the rule's width is 16.

    Args:
        params: tree of arrays or of their shapes.
        rules: rules, or one spec for every leaf.

    Returns:
        `{name: spec}` of the quantized leaves, in the tree's order.

    Raises:
        UserError: a rule is the first match of no leaf, or names an axis that a leaf lacks.
    """
    if isinstance(rules, QuantSpec):
        rules = [QuantRule("", rules)]
    leaves = named_leaves(params, is_leaf=is_codebook_tensor)
    specs = match_rules([(rule.pattern, rule.spec) for rule in rules], [name for name, _ in leaves])
    chosen = {}
    for name, leaf in leaves:
        spec = specs[name]
        if spec is None or not jnp.issubdtype(getattr(leaf, "dtype", np.int32), jnp.floating):
            continue
        if leaf.size < max(spec.minimum_size, 1) or (leaf.ndim < 2 and spec.bits != HALF):
            continue
        group_axis(name, leaf.ndim, spec)
        chosen[name] = spec
    return chosen


def group_axis(name: str, ndim: int, spec: QuantSpec) -> int | None:
    """The axis that a tensor's groups lie along, not negative; None where there is one group."""
    if spec.granularity == "tensor" or spec.bits == HALF:
        return None
    if not -ndim <= spec.axis < ndim:
        raise UserError(f"{name} has {ndim} axes, so axis (={spec.axis}) is outside it")
    return spec.axis % ndim


def quantize_params(params: Any, rules: Rules, importance: Mapping[str, Any] | None = None) -> Any:
    """Replaces weights by `CodebookTensor`s: k-means codebooks and packed indices. No training.

    Args:
        params: any tree of arrays: a Linen dict, an NNX state, lists, dataclasses. Inside jit and for
            `jax.ShapeDtypeStruct` leaves (which give the quantized tree's shapes, without arithmetic) too.
        rules: see `decide`.
        importance: by leaf name, weights of the squared error in the leaf's shape, such as the diagonal of a Fisher
            or Hessian matrix.

    Returns:
        The same tree with `CodebookTensor` leaves, and with float16 leaves where the width is 16.

    Raises:
        UserError: as `decide`; or a weight is NaN or infinite, or does not fit the codebook's type (the message names
            the tensor).
    """
    specs = decide(params, rules)
    importance = importance or {}
    if unknown := set(importance) - set(specs):
        raise UserError(f"importance is given for {sorted(unknown)[0]}, which no rule quantizes")

    def rewrite(name: str, leaf: Any) -> Any:
        if name not in specs:
            return leaf
        spec = specs[name]
        encode = partial(quantize_tensor, spec=spec, axis=group_axis(name, leaf.ndim, spec))
        try:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jax.eval_shape(encode, leaf)
            return encode(leaf, importance=importance.get(name))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error

    return map_named(rewrite, params, is_leaf=is_codebook_tensor)


def quantize_tensor(tensor: Any, spec: QuantSpec, axis: int | None, importance: Any = None) -> Any:
    """Quantizes one tensor, its groups along `axis` (None: one group)."""
    tensor = where_sorted(tensor)
    if spec.bits == HALF:
        return _store(tensor, "float16")
    rows = to_groups(tensor, axis)
    if importance is not None and importance.shape != tensor.shape:
        raise UserError(f"importance has shape {importance.shape}, the tensor {tensor.shape}")
    weights = None if importance is None else to_groups(importance, axis)
    if spec.coarse:
        codebooks = nested.nested_kmeans(rows, spec.all_bits, weights, iterations=spec.iterations)
    else:
        codebook = kmeans(
            rows,
            1 << spec.bits,
            weights,
            init=spec.init,
            retention=spec.retention,
            iterations=spec.iterations,
            symmetric=spec.symmetric,
            pinned_zero=spec.pinned_zero,
        )
        codebooks = (codebook,)
    stored = tuple(_store(c, spec.codebook_dtype) for c in codebooks)
    return encode_tensor(rows, stored, tuple(tensor.shape), axis)


def _store(values: Any, dtype: str) -> jax.Array:
    stored = jnp.asarray(values).astype(dtype)
    if not isinstance(stored, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(stored))):
        raise UserError(f"some values are NaN, infinite or too large for {dtype}")
    return stored


@partial(jax.jit, static_argnames=("shape", "axis"))
def encode_tensor(rows: Any, codebooks: tuple[jax.Array, ...], shape: tuple[int, ...], axis: int | None) -> Any:
    """Gives each value of `rows` `[groups, n]` its index in given codebooks, ascending in width, and packs it."""
    exact = tuple(c.astype(jnp.float32) for c in codebooks)
    limits = nested.thresholds(exact)
    bits = codebooks[-1].shape[-1].bit_length() - 1
    return CodebookTensor(
        codebook=codebooks[-1],
        packed=pack(assign(rows, limits, 0), bits),
        coarse=codebooks[:-1],
        shape=shape,
        bits=bits,
        axis=axis,
    )


@partial(jax.jit, static_argnames=("bits",))
def indices_of(tensor: CodebookTensor, bits: int | None = None) -> jax.Array:
    """The indices of a quantized tensor, uint8 in the tensor's shape; `bits` takes the prefix of that width."""
    rows = unpack(tensor.packed, tensor.bits, tensor.group_size)
    if bits is not None:
        rows = rows >> (tensor.bits - bits)
    return from_groups(rows, tensor.shape, tensor.axis)


@partial(jax.jit, static_argnames=("bits", "dtype"))
def dequantize_tensor(tensor: CodebookTensor, bits: int | None = None, dtype: Any = jnp.float32) -> jax.Array:
    """The values of one quantized tensor."""
    codebook = tensor.codebook_of(bits).astype(dtype)
    rows = unpack(tensor.packed, tensor.bits, tensor.group_size)
    if bits is not None:
        rows = rows >> (tensor.bits - bits)
    return from_groups(lookup(rows, codebook, 0), tensor.shape, tensor.axis)


def dequantize_params(tree: Any, bits: int | None = None, dtype: Any = jnp.float32) -> Any:
    """Turns every `CodebookTensor` back into an array. May be called inside jit.

    Args:
        tree: from `quantize_params`.
        bits: read nested tensors at this width. Tensors without nested codebooks are read at their own.
        dtype: of every floating-point leaf of the result, those stored in half precision among them.

    Raises:
        UserError: `bits` is given and no tensor has it, or a nested tensor lacks it.
    """
    tensors = [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_codebook_tensor) if is_codebook_tensor(leaf)]
    if bits is not None and not any(bits in tensor.all_bits for tensor in tensors):
        have = sorted({width for tensor in tensors for width in tensor.all_bits})
        raise UserError(f"no tensor can be read at {bits} bits: there is {', '.join(map(str, have)) or 'none'}")

    def restore(leaf: Any) -> Any:
        if is_codebook_tensor(leaf):
            return dequantize_tensor(leaf, bits if leaf.coarse else None, dtype)
        if jnp.issubdtype(getattr(leaf, "dtype", np.int32), jnp.floating):
            return leaf.astype(dtype)
        return leaf

    return jax.tree.map(restore, tree, is_leaf=is_codebook_tensor)


def partition(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into its floating-point arrays, which can be differentiated, and the rest, such as indices.

    Returns:
        `(floating, rest)`, both the tree's shape with None where the other has the leaf. See `combine`.
    """

    def floating(leaf: Any) -> bool:
        return jnp.issubdtype(getattr(leaf, "dtype", np.int32), jnp.floating)

    return (
        jax.tree.map(lambda leaf: leaf if floating(leaf) else None, tree),
        jax.tree.map(lambda leaf: None if floating(leaf) else leaf, tree),
    )


def combine(floating: Any, rest: Any) -> Any:
    """Undoes `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, floating, rest, is_leaf=lambda leaf: leaf is None)


class Size(NamedTuple):
    """Bytes of a tree: packed indices, codebooks, everything else, and their sum."""

    indices: int
    codebooks: int
    other: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.indices + self.codebooks + self.other


def size_bytes(tree: Any) -> Size:
    """Counts the bytes that a tree's arrays take, quantized or not; shapes (`jax.ShapeDtypeStruct`) do as well.

    Nothing else is stored but names and shapes: a `.kmq` file is this and its header.
    """
    indices = codebooks = other = 0
    for leaf in jax.tree.leaves(tree, is_leaf=is_codebook_tensor):
        if is_codebook_tensor(leaf):
            indices += _bytes(leaf.packed)
            codebooks += sum(_bytes(c) for c in (leaf.codebook, *leaf.coarse))
        else:
            other += _bytes(leaf)
    return Size(indices, codebooks, other)


def _bytes(array: Any) -> int:
    return array.size * array.dtype.itemsize if hasattr(array, "dtype") else np.asarray(array).nbytes
