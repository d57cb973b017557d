"""Rules: which leaves of a tree are quantized, and how."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Leaf, Params, match_rules, named_leaves
from kmq_jax.quant.packing import packed_bytes
from kmq_jax.quant.types import HALF, QuantRule, QuantSpec, is_codebook_tensor, is_floating, is_whole

Rules: TypeAlias = QuantSpec | Sequence[QuantRule] | Mapping[str, int | QuantSpec | None]
"""One spec for every leaf; or rules; or `{"regular expression": bits, spec, or None to keep it}`, first match wins."""

_VECTORS = re.compile(r"(^|/)(bias|scale)$")  # stacked by `nn.scan` they have two axes, but are no kernels


def as_rules(rules: Rules | None = None, bits: int | None = None) -> list[QuantRule]:
    """Brings every form of rules into one.

    Args:
        rules: see `Rules`.
        bits: in place of rules: `QuantSpec(bits)` for every leaf.

    Returns:
        Rules in their order; the first whose pattern is found in a name decides.

    Raises:
        UserError: both or neither are given, or a value is no number of bits.

    >>> as_rules(bits=4) == as_rules(QuantSpec(4)) == as_rules({"": 4}) == [QuantRule("", QuantSpec(4))]
    True
    >>> as_rules({"head": None, "kernel$": 2})[0]
    QuantRule(pattern='head', spec=None)
    """
    if (rules is None) == (bits is None):
        raise UserError("give either rules, such as {'kernel$': 4}, or bits, such as bits=4")
    if bits is not None:
        return [QuantRule("", QuantSpec(bits))]
    if isinstance(rules, QuantSpec):
        return [QuantRule("", rules)]
    if isinstance(rules, Mapping):
        return [QuantRule(pattern, _as_spec(pattern, value)) for pattern, value in rules.items()]
    if not isinstance(rules, Sequence) or not all(isinstance(rule, QuantRule) for rule in rules):
        raise UserError(f"rules (={rules!r}) must be a QuantSpec, QuantRules or a dict of regular expressions")
    return list(rules)


def _as_spec(pattern: str, value: int | QuantSpec | None) -> QuantSpec | None:
    if value is None or isinstance(value, QuantSpec):
        return value
    if not is_whole(value):
        raise UserError(f"rule {pattern!r} (={value!r}) must be a number of bits, a QuantSpec or None")
    return QuantSpec(value)


def decide(
    params: Params, rules: Rules | None = None, *, bits: int | None = None, any_size: bool = False
) -> dict[str, QuantSpec]:
    """Decides which leaves are quantized, and how.

    The first rule that matches a name decides. A leaf is kept as it is where
    - no rule matches, or the rule says None;
    - it is not floating point, or is quantized already;
    - it is smaller than the rule's minimum, or would not shrink and the rule minds (`only_smaller`);
    - it is a bias or a scale of a normalisation: it has fewer than two axes, or its name ends in `bias` or `scale`, as
      in the stacks of `nn.scan`. At 16 bits, which need no codebook, these are stored too.

    Args:
        params: tree of arrays or of their shapes.
        rules: see `Rules`.
        bits: in place of rules, for every leaf.
        any_size: also choose leaves that would not shrink, where the bits in the rules are not yet the final ones.

    Returns:
        `{name: spec}` of the quantized leaves, in the tree's order.

    Raises:
        UserError: the tree has no leaf, a rule is the first match of no leaf, or it names an axis that a leaf lacks.

    >>> from jax import ShapeDtypeStruct as Shape
    >>> layer = {"kernel": Shape((64, 32), "float32"), "bias": Shape((32,), "float32")}
    >>> {name: spec.bits for name, spec in decide({"in": layer, "out": layer}, {"^in/": 2, "kernel$": 4}).items()}
    {'in/kernel': 2, 'out/kernel': 4}
    """
    leaves = named_leaves(params, is_leaf=is_codebook_tensor)
    pairs = [(rule.pattern, rule.spec) for rule in as_rules(rules, bits)]
    if pairs and not leaves:
        raise UserError("there is nothing to quantize: the tree has no leaf")
    specs = match_rules(pairs, [name for name, _ in leaves])
    chosen = {}
    for name, leaf in leaves:
        spec = specs[name]
        if spec is not None and _is_quantized(name, leaf, spec, any_size):
            chosen[name] = spec
    return chosen


def _is_quantized(name: str, leaf: Leaf, spec: QuantSpec, any_size: bool) -> bool:
    if not is_floating(leaf) or leaf.size < max(spec.minimum_size, 1):
        return False
    if spec.bits == HALF:
        return True
    if leaf.ndim < 2 or _VECTORS.search(name):
        return False
    axis = group_axis(name, leaf.ndim, spec)
    return any_size or not spec.only_smaller or _quantized_bytes(leaf, spec, axis) < leaf.size * leaf.dtype.itemsize


def _quantized_bytes(leaf: Leaf, spec: QuantSpec, axis: int | None) -> int:
    """Bytes of a leaf's indices and codebooks, once quantized. The indices of each group fill whole bytes."""
    groups = 1 if axis is None else leaf.shape[axis]
    centroids = sum(1 << bits for bits in spec.all_bits)
    itemsize = 2 if spec.codebook_dtype == "float16" else 4
    return groups * (packed_bytes(leaf.size // groups, spec.bits) + itemsize * centroids)


def group_axis(name: str, ndim: int, spec: QuantSpec) -> int | None:
    """The axis that a tensor's groups lie along, not negative; None where there is one group.

    >>> group_axis("conv/kernel", 4, QuantSpec(4))
    3

    Raises:
        UserError: the tensor lacks the spec's axis.
    """
    if spec.granularity == "tensor" or spec.bits == HALF:
        return None
    if not -ndim <= spec.axis < ndim:
        raise UserError(f"{name} has {ndim} axes, so axis (={spec.axis}) is outside it")
    return spec.axis % ndim
