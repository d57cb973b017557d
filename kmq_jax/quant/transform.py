"""Rewriting a tree of parameters: quantized tensors in place of some leaves, and back."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Array, Leaf, Params, map_named, named_leaves
from kmq_jax.quant.codes import assign, known_now, to_groups, where_sorted
from kmq_jax.quant.kmeans import in_range, kmeans, scaled
from kmq_jax.quant.levels import fit_levels
from kmq_jax.quant.nested import nested_kmeans, thresholds
from kmq_jax.quant.packing import pack_bits
from kmq_jax.quant.rules import Rules, decide, group_axis
from kmq_jax.quant.types import HALF, CodebookTensor, QuantSpec, is_codebook_tensor, is_floating, storage_type, stored


def quantize_params(
    params: Params,
    rules: Rules | None = None,
    *,
    bits: int | None = None,
    importance: Mapping[str, Array] | None = None,
) -> Params:
    """Replaces weights by `CodebookTensor`s: k-means codebooks and packed indices. No training.

    Args:
        params: any tree of arrays: a Linen dict, an NNX state, lists, dataclasses. Inside jit and for
            `jax.ShapeDtypeStruct` leaves (which give the quantized tree's shapes, without arithmetic) too.
        rules: a `QuantSpec` for every leaf, or `QuantRule`s, or `{"regular expression": bits, spec or None}`. What is
            kept whatever they say: see `rules.decide`.
        bits: in place of rules: this many for every leaf.
        importance: by leaf name, weights of the squared error in the leaf's shape, zero or more, such as the diagonal
            of a Fisher or Hessian matrix. Only their shares within a channel count.

    Returns:
        The same tree with `CodebookTensor` leaves, and with float16 leaves where a rule says 16 bits.

    Raises:
        UserError: as `decide`; or a weight is NaN or infinite, or codebooks of its type cannot hold it (the message
            names the tensor).

    >>> params = {"kernel": jnp.arange(128.0).reshape(64, 2), "bias": jnp.zeros(2)}
    >>> quantized = quantize_params(params, bits=4)
    >>> quantized["kernel"]
    CodebookTensor(shape=(64, 2), bits=4, axis=1, float32)
    >>> mixed = quantize_params({"in": params, "out": params}, {"^in/": 2, "kernel$": 4})
    >>> mixed["in"]["kernel"].bits, mixed["out"]["kernel"].bits
    (2, 4)
    """
    specs = decide(params, rules, bits=bits)
    importance = importance or {}
    if unknown := set(importance) - set(specs):
        raise UserError(f"importance is given for {sorted(unknown)[0]}, which no rule quantizes")

    def rewrite(name: str, leaf: Leaf) -> Leaf:
        if name not in specs:
            return leaf
        spec = specs[name]
        encode = partial(quantize_tensor, spec=spec, axis=group_axis(name, leaf.ndim, spec))
        try:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jax.eval_shape(encode, leaf)
            with known_now(leaf, importance.get(name)):
                made = encode(leaf, importance=importance.get(name))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        # Centroids too small for float16 are float32, which shapes alone do not tell.
        grew = spec.only_smaller and is_codebook_tensor(made) and made.nbytes >= leaf.size * leaf.dtype.itemsize
        return leaf if grew else made

    return map_named(rewrite, params, is_leaf=is_codebook_tensor)


def quantize_tensor(tensor: Array, spec: QuantSpec, axis: int | None, importance: jax.Array | None = None) -> Leaf:
    """Quantizes one tensor, whatever its size.

    Args:
        tensor: floating point, any shape.
        spec: how.
        axis: where its groups lie; None is one group.
        importance: see `quantize_params`, in the tensor's shape.

    Returns:
        A `CodebookTensor`; at 16 bits a float16 array, or bfloat16 and types of 8 bits as they are.

    Raises:
        UserError: a value or a weight of the error is not finite, shapes differ, or the type of codebooks cannot hold
            the centroids.

    >>> quantize_tensor(np.ones((3, 2), np.float32), QuantSpec(1), axis=1)
    CodebookTensor(shape=(3, 2), bits=1, axis=1, float32)
    """
    dtype = jax.dtypes.canonicalize_dtype(tensor.dtype).name
    if spec.bits == HALF:
        # bits=4: refused only where float16 would lose more than 1/32 of the tensor.
        return tensor if dtype == "bfloat16" or tensor.dtype.itemsize < 2 else stored(tensor, "float16", bits=4)
    tensor = where_sorted(tensor)
    rows = to_groups(tensor, axis)
    if importance is not None and importance.shape != tensor.shape:
        raise UserError(f"importance has shape {importance.shape}, the tensor {tensor.shape}")
    weights = None if importance is None else in_range(to_groups(importance, axis))
    codebooks = fit_codebooks(rows, spec, weights)
    kept_in = storage_type(codebooks, spec)
    books = tuple(book.astype(kept_in) for book in codebooks)
    # Borders are found from products of centroids, which must fit float32: far magnitudes are brought near 1.
    _, scale = scaled(codebooks[-1])
    if scale is None:
        return encode_tensor(rows, books, tuple(tensor.shape), axis, dtype)
    near = tuple(book.astype(jnp.float32) * scale for book in books)
    encoded = encode_tensor(rows * scale, near, tuple(tensor.shape), axis, dtype)
    return dataclasses.replace(encoded, codebook=books[-1], coarse=books[:-1])


def fit_codebooks(rows: Array, spec: QuantSpec, weights: Array | None = None) -> tuple[jax.Array, ...]:
    """Places the centroids of a tensor, by whichever method its spec asks for.

    Args:
        rows: `[groups, n]`, the groups of the tensor.
        spec: how.
        weights: of the squared error, `[groups, n]`.

    Returns:
        `[groups, 2^b]` float32 for each of `spec.all_bits`.

    Raises:
        UserError: a value or a weight is not finite (not seen inside jit).

    >>> [codebook.tolist() for codebook in fit_codebooks(np.float32([[0, 1, 10, 11]]), QuantSpec(2, coarse=(1,)))]
    [[[0.5, 10.5]], [[0.0, 1.0, 10.0, 11.0]]]
    """
    if spec.levels != "kmeans":
        return (fit_levels(rows, spec.levels, spec.bits, weights, spec.iterations),)
    if spec.coarse:
        return nested_kmeans(rows, spec.all_bits, weights, iterations=spec.iterations)
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
    return (codebook,)


@partial(jax.jit, static_argnames=("shape", "axis", "dtype"))
def encode_tensor(
    rows: jax.Array, codebooks: tuple[jax.Array, ...], shape: tuple[int, ...], axis: int | None, dtype: str = "float32"
) -> CodebookTensor:
    """Gives each value its index in given codebooks, and packs it.

    Args:
        rows: `[groups, n]`, the groups of a tensor as `codes.to_groups` gives them.
        codebooks: `[groups, 2^b]`, in ascending bits, each ascending along its rows.
        shape: of the tensor.
        axis: where its groups lie; None is one group.
        dtype: the tensor's type, which dequantization gives back.

    Returns:
        The packed tensor, with these codebooks.

    >>> encode_tensor(jnp.array([[0.1, 0.9]]), (jnp.array([[0.0, 1.0]]),), (2,), None).indices().tolist()
    [0, 1]
    """
    limits = thresholds(tuple(codebook.astype(jnp.float32) for codebook in codebooks))
    bits = codebooks[-1].shape[-1].bit_length() - 1
    return CodebookTensor(
        codebook=codebooks[-1],
        packed=pack_bits(assign(rows, limits, 0), bits),
        coarse=codebooks[:-1],
        shape=shape,
        bits=bits,
        axis=axis,
        dtype_name=dtype,
    )


def indices_of(tensor: CodebookTensor, bits: int | None = None) -> jax.Array:
    """The indices of a quantized tensor, uint8 in the tensor's shape; with `bits`, their first so many bits.

    >>> indices_of(quantize_params(jnp.array([[1.0, 5.0, 5.0, 9.0, 13.0]]), QuantSpec(2, "tensor"))).tolist()
    [[0, 1, 1, 2, 3]]
    """
    return tensor.indices(bits)


def dequantize_params(tree: Params, bits: int | None = None, dtype: DTypeLike | None = None) -> Params:
    """Turns every `CodebookTensor` back into an array. May be called inside jit.

    Args:
        tree: from `quantize_params`. A batch of trees, as `jax.vmap` or `flax.jax_utils.replicate` makes them, gives a
            batch of parameters.
        bits: read nested tensors at this many bits. Tensors without nested codebooks are read at their own.
        dtype: of every floating-point leaf of the result; None is that of the parameters before. Leaves in float16
            are then taken for those stored at 16 bits, and come back as float32, unless a quantized tensor says that
            the parameters were float16 throughout.

    Returns:
        The same tree with an array in place of every `CodebookTensor`.

    Raises:
        UserError: `bits` is given and no tensor has it, or a nested tensor lacks it; or a quantized tensor is a dict of
            its arrays, as checkpoints restored without a target hold it (the message names it).
        ValueError: a tensor's arrays do not fit its shape.

    >>> params = {"kernel": jnp.arange(128.0).reshape(64, 2), "bias": jnp.zeros(2)}
    >>> restored = dequantize_params(quantize_params(params, bits=4))
    >>> bool(jnp.max(jnp.abs(restored["kernel"] - params["kernel"])) <= 4.0)  # 16 centroids for 64 steps of 2
    True
    """
    leaves = named_leaves(tree, is_leaf=lambda node: is_codebook_tensor(node) or _is_in_parts(node))
    for name, leaf in leaves:
        if _is_in_parts(leaf):
            raise UserError(
                f"{name or 'the tree'} holds the arrays of a quantized tensor without its shape and bits: "
                "restore the checkpoint with a target, such as jax.eval_shape(lambda: quantized)"
            )
    tensors = [leaf for _, leaf in leaves if is_codebook_tensor(leaf)]
    if bits is not None and not any(bits in tensor.all_bits for tensor in tensors):
        have = sorted({other for tensor in tensors for other in tensor.all_bits})
        raise UserError(f"no tensor can be read at {bits} bits: there is {', '.join(map(str, have)) or 'none'}")
    all_half = any(tensor.dtype == jnp.float16 for tensor in tensors)

    def restore(leaf: Leaf) -> Leaf:
        if is_codebook_tensor(leaf):
            return leaf.dequantize(bits if leaf.coarse else None, dtype)
        if not is_floating(leaf):
            return leaf
        own = jnp.float32 if leaf.dtype == jnp.float16 and not all_half else leaf.dtype
        return leaf.astype(jax.dtypes.canonicalize_dtype(own if dtype is None else dtype))

    return jax.tree.map(restore, tree, is_leaf=is_codebook_tensor)


def _is_in_parts(node: Params) -> bool:
    """Whether a node of a tree is the dict that a checkpoint makes of a `CodebookTensor`."""
    return isinstance(node, Mapping) and {"packed", "codebook"} <= set(node) <= {"packed", "codebook", "coarse"}


def partition(tree: Params) -> tuple[Params, Params]:
    """Splits a tree into floating-point arrays, which can be differentiated, and the rest, such as indices.

    Returns:
        `(floating, rest)`, both the tree's shape with None where the other has the leaf. See `combine`.

    >>> partition({"index": np.arange(2), "step": np.float32(0.5)})
    ({'index': None, 'step': np.float32(0.5)}, {'index': array([0, 1]), 'step': None})
    """
    return (
        jax.tree.map(lambda leaf: leaf if is_floating(leaf) else None, tree),
        jax.tree.map(lambda leaf: None if is_floating(leaf) else leaf, tree),
    )


def combine(floating: Params, rest: Params) -> Params:
    """Undoes `partition`.

    >>> combine({"a": 1.5, "b": None}, {"a": None, "b": 2})
    {'a': 1.5, 'b': 2}
    """
    return jax.tree.map(lambda a, b: b if a is None else a, floating, rest, is_leaf=lambda leaf: leaf is None)


class Size(NamedTuple):
    """Bytes of a tree: packed indices, codebooks, everything else, and their sum.

    >>> Size(indices=32000, codebooks=2048, other=256).total
    34304
    """

    indices: int
    codebooks: int
    other: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.indices + self.codebooks + self.other


def size_bytes(tree: Params) -> Size:
    """Counts the bytes that a tree's arrays take, quantized or not; shapes (`jax.ShapeDtypeStruct`) do as well.

    Nothing else is stored but names and shapes: a `.kmq` file is this and its header.

    >>> shapes = {"kernel": jax.ShapeDtypeStruct((1000, 64), "float32"), "bias": jax.ShapeDtypeStruct((64,), "float32")}
    >>> size_bytes(shapes).total, size_bytes(quantize_params(shapes, bits=4))
    (256256, Size(indices=32000, codebooks=2048, other=256))
    """
    indices = codebooks = other = 0
    for leaf in jax.tree.leaves(tree, is_leaf=is_codebook_tensor):
        if is_codebook_tensor(leaf):
            indices += _bytes(leaf.packed)
            codebooks += leaf.nbytes - _bytes(leaf.packed)
        else:
            other += _bytes(leaf)
    return Size(indices, codebooks, other)


def _bytes(array: Leaf) -> int:
    return array.size * array.dtype.itemsize if hasattr(array, "dtype") else np.asarray(array).nbytes
