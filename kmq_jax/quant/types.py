"""What is quantized and how (`QuantSpec`, `QuantRule`), and a quantized tensor (`CodebookTensor`)."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Array, Leaf, Params
from kmq_jax.quant.codes import from_groups, lookup
from kmq_jax.quant.kmeans import INITS
from kmq_jax.quant.levels import LEVELS
from kmq_jax.quant.packing import packed_bytes, unpack_bits

GRANULARITIES = ("channel", "tensor")
HALF = 16
"""The number of bits that stands for half-precision floating point, without a codebook."""


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized.

    >>> QuantSpec(4, coarse=(3, 2)).all_bits
    (2, 3, 4)

    Attributes:
        bits: bits of an index, 1 to 8: 2^bits centroids. 16 stores the tensor in half precision, without a codebook.
        granularity: "channel", one codebook for each index of `axis`, or "tensor", one for all.
        axis: the output-channel axis; the last one for `[..., in, out]` and `[height, width, in, out]` kernels.
        minimum_size: tensors with fewer elements stay as they are.
        codebook_dtype: how centroids are stored, "float16" or "float32"; the latter too where some of the groups are
            too small for the former.
        levels: "kmeans", or a pattern that a scale alone (and an offset) fits, see `levels.LEVELS`.
        coarse: fewer bits at which the tensor can be read too, such as (2, 3) beside `bits=4`. Their index is a prefix
            of the stored one, and each has a codebook of its own.
        init, retention: see `kmeans.kmeans`; of single, free codebooks. Nested ones and other `levels` start their own
            way.
        iterations, symmetric, pinned_zero: see `kmeans.kmeans`. At 1 bit, `symmetric` is the static binary quantizer
            (plus and minus the mean magnitude); without it both centroids are free.
        only_smaller: tensors that would not shrink stay as they are. A small tensor does not where its codebooks take
            what its indices save: at 8 bits, 512 bytes of codebook a channel. Without it every tensor is quantized,
            as training does, whose networks may go on at other bits.
    """

    bits: int
    granularity: str = "channel"
    axis: int = -1
    minimum_size: int = 0
    codebook_dtype: str = "float16"
    levels: str = "kmeans"
    coarse: tuple[int, ...] = ()
    init: str = "optimal"
    retention: float = 0.9
    iterations: int = 60
    symmetric: bool = False
    pinned_zero: bool = False
    only_smaller: bool = True

    def __post_init__(self):
        """Checks every field.

        Raises:
            UserError: a field is outside its range.
        """
        if not is_whole(self.bits) or self.bits not in (*range(1, 9), HALF):
            raise UserError(f"bits (={self.bits}) must be 1 to 8, or 16 for half precision")
        if self.granularity not in GRANULARITIES:
            raise UserError(f"granularity (={self.granularity!r}) must be one of {', '.join(GRANULARITIES)}")
        if self.codebook_dtype not in ("float16", "float32"):
            raise UserError(f"codebook_dtype (={self.codebook_dtype!r}) must be float16 or float32")
        if self.levels not in LEVELS:
            raise UserError(f"levels (={self.levels!r}) must be one of {', '.join(LEVELS)}")
        if not is_whole(self.axis):
            raise UserError(f"axis (={self.axis!r}) must be a whole number")
        if not isinstance(self.coarse, Sequence) or not all(map(is_whole, self.coarse)):
            raise UserError(f"coarse bits (={self.coarse!r}) must be whole numbers, such as (2, 3)")
        self._check_fit()
        if self.levels != "kmeans" and (self.coarse or self.symmetric or self.pinned_zero):
            raise UserError(f"levels (={self.levels!r}) cannot be nested, symmetric or have a pinned zero")
        # Sorted once, so that specs are equal in whatever order their bits were given.
        object.__setattr__(self, "coarse", tuple(sorted(self.coarse)))
        if self.coarse and (self.bits == HALF or not 1 <= self.coarse[0] <= self.coarse[-1] < self.bits):
            raise UserError(f"coarse bits (={self.coarse}) must be 1 or more and below bits (={self.bits})")
        if len(set(self.coarse)) != len(self.coarse):
            raise UserError(f"coarse bits (={self.coarse}) must differ")
        if self.coarse and (self.symmetric or self.pinned_zero):
            raise UserError("nested codebooks cannot be symmetric or have a pinned zero")

    def _check_fit(self) -> None:
        if self.init not in INITS:
            raise UserError(f"init (={self.init!r}) must be one of {', '.join(INITS)}")
        if not isinstance(self.retention, numbers.Real) or not 0 < self.retention <= 1:
            raise UserError(f"retention (={self.retention}) must be above 0 and at most 1")
        for name in ("iterations", "minimum_size"):
            if not is_whole(getattr(self, name)) or getattr(self, name) < 0:
                raise UserError(f"{name} (={getattr(self, name)}) must be a whole number, 0 or more")

    @property
    def all_bits(self) -> tuple[int, ...]:
        """Every number of bits the tensor can be read at, ascending."""
        return (*self.coarse, self.bits)


@dataclasses.dataclass(frozen=True)
class QuantRule:
    """Quantizes the tensors whose "/"-joined name the regular expression `pattern` is found in; None keeps them.

    The first rule that a name matches counts.

    >>> rules = [QuantRule("^stem/", None), QuantRule("kernel$", QuantSpec(bits=4))]
    """

    pattern: str
    spec: QuantSpec | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CodebookTensor:
    """A tensor as packed indices into codebooks.

    Nothing is checked on construction, as jax constructs trees with any leaves. Reading checks the arrays' shapes.
    `validate` checks what shapes and types tell of these invariants:
    - a group is one index of `axis`, its elements in the row-major order of the other axes; with `axis` None the
      whole tensor is one group. There are `groups` groups of `group_size` elements.
    - `codebook` is floating point `[groups, 2^bits]`.
    - `packed` is uint8 `[groups, ceil(group_size * bits / 8)]`: a little-endian stream of bits, element i of a group
      in bits `i * bits` to `(i + 1) * bits - 1`, unused bits zero.
    - each array of `coarse` is the codebook `[groups, 2^b]` of fewer bits b, ascending; the b-bit index is the b
      highest bits of the stored one.
    - `axis`, where not None, is not negative.

    A batch of tensors has the same axes in front of each of its arrays, as `jax.vmap` and `flax.jax_utils.replicate`
    make them. `shape`, `size` and `ndim` are then of one tensor, and `dequantize` gives `[..., *shape]`.

    Attributes:
        codebook: see above.
        packed: see above.
        coarse: see above.
        shape: of the tensor.
        bits: bits of an index.
        axis: where groups lie.
        dtype_name: the type of the tensor that was quantized, and of what `dequantize` gives.

    >>> import kmq_jax
    >>> tensor = kmq_jax.quantize_params({"kernel": jnp.arange(8.0).reshape(4, 2)}, bits=2)["kernel"]
    >>> tensor, tensor.codebook.shape, tensor.packed.shape
    (CodebookTensor(shape=(4, 2), bits=2, axis=1, float32), (2, 4), (2, 1))
    >>> np.asarray(tensor).tolist()  # four centroids hold four weights of a channel exactly
    [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    """

    codebook: jax.Array
    packed: jax.Array
    coarse: tuple[jax.Array, ...] = ()
    shape: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    bits: int = dataclasses.field(default=8, metadata={"static": True})
    axis: int | None = dataclasses.field(default=None, metadata={"static": True})
    dtype_name: str = dataclasses.field(default="float32", metadata={"static": True})

    def __repr__(self) -> str:
        nested = f", coarse={self.all_bits[:-1]}" if self.coarse else ""
        return f"CodebookTensor(shape={self.shape}, bits={self.bits}{nested}, axis={self.axis}, {self.dtype_name})"

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """The dequantized tensor, for numpy."""
        if copy is False:
            raise ValueError("a CodebookTensor becomes an array only by dequantization, which copies")
        return np.asarray(self.dequantize(), dtype)

    @property
    def groups(self) -> int:
        """Number of codebooks for each number of bits."""
        return 1 if self.axis is None else self.shape[self.axis]

    @property
    def group_size(self) -> int:
        """Number of elements that share a codebook."""
        return math.prod(self.shape) // self.groups

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The type of the tensor that was quantized, and of what `dequantize` gives."""
        return jnp.dtype(self.dtype_name)

    @property
    def nbytes(self) -> int:
        """Bytes that indices and codebooks take."""
        return sum(x.size * x.dtype.itemsize for x in (self.packed, self.codebook, *self.coarse))

    @property
    def all_bits(self) -> tuple[int, ...]:
        """Every number of bits it can be read at, ascending."""
        # A codebook of b bits has 2^b columns, a number of b + 1 binary digits.
        return (*(c.shape[-1].bit_length() - 1 for c in self.coarse), self.bits)

    def codebook_of(self, bits: int | None = None) -> jax.Array:
        """The codebook for a number of bits; the most where `bits` is None.

        Raises:
            UserError: there is no such codebook.
        """
        if bits is None or bits == self.bits:
            return self.codebook
        if bits not in self.all_bits:
            raise UserError(f"no codebook of {bits} bits: there is {', '.join(map(str, self.all_bits))}")
        return self.coarse[self.all_bits.index(bits)]

    def indices(self, bits: int | None = None) -> jax.Array:
        """The indices, uint8 in the tensor's shape; those of fewer `bits` are the prefixes of the stored ones.

        Raises:
            ValueError: the arrays do not fit `shape`.
        """
        self.codebook_of(bits)
        return _over_batch(partial(_indices, bits=bits), self)

    def dequantize(self, bits: int | None = None, dtype: DTypeLike | None = None) -> jax.Array:
        """The values of the tensor. May be called inside jit.

        Args:
            bits: which of nested codebooks; None is that of the most bits.
            dtype: of the result; None is the type of the tensor that was quantized.

        Raises:
            UserError: there is no codebook of `bits`.
            ValueError: the arrays do not fit `shape`: a piece of the tensor, say, as `shard_map` cuts it.
        """
        self.codebook_of(bits)
        return _over_batch(partial(_dequantized, bits=bits, dtype=self.dtype if dtype is None else dtype), self)

    def batch_shape(self) -> tuple[int, ...]:
        """The axes in front of a batch of tensors; () for one.

        Raises:
            ValueError: the arrays do not fit `shape`.
        """
        lead = tuple(self.packed.shape[:-2])
        row = packed_bytes(self.group_size, self.bits)
        if tuple(self.packed.shape) != (*lead, self.groups, row):
            raise ValueError(f"packed has shape {self.packed.shape}, not {(self.groups, row)}, in {self!r}")
        for codebook in (*self.coarse, self.codebook):
            if tuple(codebook.shape[:-1]) != (*lead, self.groups):
                raise ValueError(f"a codebook has shape {codebook.shape}, not {(*lead, self.groups)} rows, in {self!r}")
        if self.codebook.shape[-1] != 1 << self.bits:
            raise ValueError(f"the codebook has {self.codebook.shape[-1]} columns, not {1 << self.bits}, in {self!r}")
        return lead

    def validate(self) -> None:
        """Checks the invariants of one tensor against the arrays' shapes and types.

        Raises:
            ValueError: one does not hold; the message names it.
        """
        if not (isinstance(self.bits, int) and 1 <= self.bits <= 8):
            raise ValueError(f"bits (={self.bits}) must be 1 to 8")
        if not all(isinstance(n, int) and n > 0 for n in self.shape):
            raise ValueError(f"shape (={self.shape}) must be of positive integers")
        if self.axis is not None and not 0 <= self.axis < len(self.shape):
            raise ValueError(f"axis (={self.axis}) must be None or 0 to {len(self.shape) - 1}")
        row = packed_bytes(self.group_size, self.bits)
        if str(self.packed.dtype) != "uint8" or tuple(self.packed.shape) != (self.groups, row):
            raise ValueError(f"packed is {self.packed.dtype} {self.packed.shape}, not uint8 {(self.groups, row)}")
        if list(self.all_bits) != sorted(set(self.all_bits)):
            raise ValueError(f"bits (={self.all_bits}) must ascend")
        for bits, codebook in zip(self.all_bits, (*self.coarse, self.codebook)):
            if str(codebook.dtype) not in ("float16", "float32", "bfloat16"):
                raise ValueError(f"the {bits}-bit codebook is {codebook.dtype}, not floating point")
            if tuple(codebook.shape) != (self.groups, 1 << bits):
                raise ValueError(f"the {bits}-bit codebook has shape {codebook.shape}, not {(self.groups, 1 << bits)}")
        if self.dtype_name not in ("float16", "float32", "float64", "bfloat16"):
            raise ValueError(f"dtype (={self.dtype_name!r}) must be floating point")


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, of Python or of numpy.

    >>> is_whole(4), is_whole(np.int64(4)), is_whole(True), is_whole(4.0)
    (True, True, False, False)
    """
    # True is an int to Python.
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _over_batch(read: Callable[[CodebookTensor], jax.Array], tensor: CodebookTensor) -> jax.Array:
    """Reads a tensor, or each tensor of a batch."""
    # Every array has the batch axes in front, so each vmap takes one of them off all.
    for _ in tensor.batch_shape():
        read = jax.vmap(read)
    return read(tensor)


@partial(jax.jit, static_argnames="bits")
def _indices(tensor: CodebookTensor, bits: int | None) -> jax.Array:
    return from_groups(_rows(tensor, bits), tensor.shape, tensor.axis)


@partial(jax.jit, static_argnames=("bits", "dtype"))
def _dequantized(tensor: CodebookTensor, bits: int | None, dtype: DTypeLike | None) -> jax.Array:
    values = lookup(_rows(tensor, bits), tensor.codebook_of(bits).astype(dtype), 0)
    return from_groups(values, tensor.shape, tensor.axis)


def _rows(tensor: CodebookTensor, bits: int | None) -> jax.Array:
    rows = unpack_bits(tensor.packed, tensor.bits, tensor.group_size)
    # The first bits of an index are its index among fewer centroids: that is what makes codebooks nested.
    return rows if bits is None else rows >> (tensor.bits - bits)


def is_codebook_tensor(leaf: Leaf) -> TypeGuard[CodebookTensor]:
    """Whether a leaf is a `CodebookTensor`, for the `is_leaf` of jax's tree functions.

    >>> import kmq_jax
    >>> tree = kmq_jax.quantize_params({"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}, bits=4)
    >>> jax.tree.map(is_codebook_tensor, tree, is_leaf=is_codebook_tensor)
    {'bias': False, 'kernel': True}
    """
    return isinstance(leaf, CodebookTensor)


def codebook_tensors(tree: Params) -> list[CodebookTensor]:
    """The quantized tensors of a tree, in its order.

    >>> import kmq_jax
    >>> tree = kmq_jax.quantize_params({"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}, bits=4)
    >>> codebook_tensors(tree)
    [CodebookTensor(shape=(64, 64), bits=4, axis=1, float32)]
    """
    return [leaf for leaf in jax.tree.leaves(tree, is_codebook_tensor) if is_codebook_tensor(leaf)]


def is_floating(leaf: Leaf) -> bool:
    """Whether a leaf is an array of floating-point numbers, or the shape of one, and not quantized.

    >>> is_floating(np.ones(2)), is_floating(np.arange(2)), is_floating(1.5)
    (True, False, False)
    """
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and not is_codebook_tensor(leaf) and jnp.issubdtype(dtype, jnp.floating)


def stored(values: Array, dtype: str, bits: int = 8) -> jax.Array:
    """Rounds values to the type they are stored in.

    Args:
        values: floating point; centroids, say.
        dtype: "float16", for example.
        bits: of the index. At b bits rounding may lose 2^-(b + 1) of the values, half of what k-means loses itself.

    Raises:
        UserError: some are NaN, infinite or too large for the type; or so small that the type loses much of them
            (not seen inside jit).

    >>> stored(np.float32([0.5, -2.0]), "float16").tolist()
    [0.5, -2.0]
    """
    exact = jnp.asarray(values)
    rounded = exact.astype(dtype)
    # A traced value is not known yet, so nothing can be refused.
    if isinstance(rounded, jax.core.Tracer):
        return rounded
    if not bool(jnp.all(jnp.isfinite(rounded))):
        raise UserError(f"some values are NaN, infinite or too large for {dtype}")
    if _lost(exact, rounded, bits):
        raise UserError(
            f"values of up to {np.max(np.abs(exact)):.2g} are too small for {dtype}: "
            "scale them, or store them in float32 (codebook_dtype)"
        )
    return rounded


def storage_type(codebooks: Sequence[Array], spec: QuantSpec) -> str:
    """The type that a tensor's centroids are stored in.

    All are stored in float32 where float16 would do for most groups but would lose some small ones, such as a channel
    of 1e-7 among channels of 1.

    >>> storage_type([np.float32([[-1, 1], [-1e-8, 1e-8]])], QuantSpec(1))
    'float32'

    Args:
        codebooks: `[groups, centroids]` of each of `spec.all_bits`.
        spec: how the tensor is quantized.

    Raises:
        UserError: see `stored`.
    """
    rounded = [stored(book, spec.codebook_dtype, bits) for bits, book in zip(spec.all_bits, codebooks)]
    if isinstance(rounded[0], jax.core.Tracer):
        return spec.codebook_dtype
    lost = [_lost(exact, half, bits, axis=1).any() for exact, half, bits in zip(codebooks, rounded, spec.all_bits)]
    return "float32" if any(lost) else spec.codebook_dtype


def _lost(exact: Array, rounded: Array, bits: int, axis: int | None = None) -> np.ndarray:
    """Whether rounding loses more than a share 2^-(b + 1): k-means of b bits itself leaves an error of about 2^-b."""
    # In double precision, where the square of the smallest float32 is not yet zero.
    found, wanted = np.float64(rounded), np.float64(exact)
    lost: np.ndarray = np.linalg.norm(found - wanted, axis=axis) > 0.5 ** (bits + 1) * np.linalg.norm(wanted, axis=axis)
    return lost
