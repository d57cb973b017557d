"""What is quantized and how (`QuantSpec`, `QuantRule`), and a quantized tensor (`CodebookTensor`)."""

import dataclasses
import math
from typing import Any

import jax

from kmq_jax.core.errors import UserError

GRANULARITIES = ("channel", "tensor")
HALF = 16
"""The width that stands for half-precision floating point, without a codebook."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` indices of `bits` bits each take."""
    return (count * bits + 7) // 8


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized.

    Attributes:
        bits: width of an index, 1 to 8: 2^bits centroids. 16 stores the tensor in half precision, without a codebook.
        granularity: "channel", one codebook for each index of `axis`, or "tensor", one for all.
        axis: the output-channel axis; the last one for `[..., in, out]` and `[height, width, in, out]` kernels.
        minimum_size: tensors with fewer elements stay as they are.
        codebook_dtype: how centroids are stored, "float16" or "float32".
        coarse: further, smaller widths, such as (2, 3) beside `bits=4`, whose index is a prefix of the stored one.
        init, retention, iterations, symmetric, pinned_zero: see `kmeans.kmeans`. At 1 bit, `symmetric` is the static
            binary quantizer (plus and minus the mean magnitude); without it both centroids are free.
    """

    bits: int
    granularity: str = "channel"
    axis: int = -1
    minimum_size: int = 0
    codebook_dtype: str = "float16"
    coarse: tuple[int, ...] = ()
    init: str = "optimal"
    retention: float = 0.9
    iterations: int = 60
    symmetric: bool = False
    pinned_zero: bool = False

    def __post_init__(self):
        """Checks every field.

        Raises:
            UserError: a field is outside its range.
        """
        if self.bits not in (*range(1, 9), HALF):
            raise UserError(f"bits (={self.bits}) must be 1 to 8, or 16 for half precision")
        if self.granularity not in GRANULARITIES:
            raise UserError(f"granularity (={self.granularity!r}) must be one of {', '.join(GRANULARITIES)}")
        if self.codebook_dtype not in ("float16", "float32"):
            raise UserError(f"codebook_dtype (={self.codebook_dtype!r}) must be float16 or float32")
        object.__setattr__(self, "coarse", tuple(sorted(self.coarse)))
        if self.coarse and (self.bits == HALF or not 1 <= self.coarse[0] <= self.coarse[-1] < self.bits):
            raise UserError(f"coarse widths (={self.coarse}) must be 1 or more and below bits (={self.bits})")
        if len(set(self.coarse)) != len(self.coarse):
            raise UserError(f"coarse widths (={self.coarse}) must differ")
        if self.coarse and (self.symmetric or self.pinned_zero):
            raise UserError("nested codebooks cannot be symmetric or have a pinned zero")

    @property
    def all_bits(self) -> tuple[int, ...]:
        """Every width the tensor can be read at, ascending."""
        return (*self.coarse, self.bits)


@dataclasses.dataclass(frozen=True)
class QuantRule:
    """Quantizes the tensors whose "/"-joined name the regular expression `pattern` is found in; None keeps them."""

    pattern: str
    spec: QuantSpec | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodebookTensor:
    """A tensor as packed indices into codebooks.

    Invariants, which `validate` checks (nothing is checked on construction, as jax constructs trees with any leaves):
    - a group is one index of `axis`, its elements in the row-major order of the other axes; with `axis` None the
      whole tensor is one group. There are `groups` groups of `group_size` elements.
    - `codebook` is floating point `[groups, 2^bits]`.
    - `packed` is uint8 `[groups, ceil(group_size * bits / 8)]`: a little-endian stream of bits, element i of a group
      in bits `i * bits` to `(i + 1) * bits - 1`, unused bits zero.
    - each array of `coarse` is the codebook `[groups, 2^b]` of a smaller width b, ascending; the b-bit index is the
      b highest bits of the stored one.
    - `axis`, where not None, is not negative.
    """

    codebook: jax.Array
    packed: jax.Array
    coarse: tuple[jax.Array, ...] = ()
    shape: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    bits: int = dataclasses.field(default=8, metadata={"static": True})
    axis: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def groups(self) -> int:
        """Number of codebooks of each width."""
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
    def all_bits(self) -> tuple[int, ...]:
        """Every width it can be read at, ascending."""
        return (*(c.shape[-1].bit_length() - 1 for c in self.coarse), self.bits)

    def codebook_of(self, bits: int | None = None) -> jax.Array:
        """The codebook of one width, the widest where `bits` is None.

        Raises:
            UserError: there is no codebook of that width.
        """
        if bits is None or bits == self.bits:
            return self.codebook
        if bits not in self.all_bits:
            raise UserError(f"no codebook of {bits} bits: there is {', '.join(map(str, self.all_bits))}")
        return self.coarse[self.all_bits.index(bits)]

    def validate(self) -> None:
        """Checks the invariants against the arrays' shapes and types.

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
        widths = self.all_bits
        if list(widths) != sorted(set(widths)):
            raise ValueError(f"widths (={widths}) must ascend")
        for bits, codebook in zip(widths, (*self.coarse, self.codebook)):
            if str(codebook.dtype) not in ("float16", "float32", "bfloat16"):
                raise ValueError(f"the {bits}-bit codebook is {codebook.dtype}, not floating point")
            if tuple(codebook.shape) != (self.groups, 1 << bits):
                raise ValueError(f"the {bits}-bit codebook has shape {codebook.shape}, not {(self.groups, 1 << bits)}")


def is_codebook_tensor(leaf: Any) -> bool:
    """Whether a leaf is a `CodebookTensor`, for the `is_leaf` of jax's tree functions."""
    return isinstance(leaf, CodebookTensor)
