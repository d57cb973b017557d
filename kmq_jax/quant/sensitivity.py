"""How sensitive each tensor is to quantization, and how many bits each then gets within a byte budget.

References:
    Dong et al., HAWQ-V2: Hessian aware trace-weighted quantization of neural networks, 2020. Sections and phases are
    those of Liu, Wang and Qian, Towards lightweight speaker verification via adaptive neural network quantization,
    2024.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import Leaf, Params, named_leaves, replace_named
from kmq_jax.quant import knapsack
from kmq_jax.quant.rules import Rules, decide
from kmq_jax.quant.transform import quantize_params, size_bytes
from kmq_jax.quant.types import HALF, QuantRule, QuantSpec, is_codebook_tensor, is_floating

Table = Mapping[str, Mapping[int, float]]
"""`{name: {bits: number}}`."""


def hessian_traces(
    loss: Callable[[Params], jax.Array],
    params: Params,
    key: jax.Array,
    draws: int = 10,
    names: Iterable[str] | None = None,
    vectorized: int = 1,
) -> dict[str, float]:
    """Estimates the trace of the loss's Hessian in each tensor, by Hutchinson's method with Rademacher draws.

    Each draw costs one Hessian-vector product for all tensors. The product is a gradient of a gradient, so the loss
    may hold functions that have only a reverse rule (`jax.custom_vjp`).

    >>> def loss(params):
    ...     return jnp.sum(params["a"] ** 2) + 5 * jnp.sum(params["b"] ** 2)
    >>> hessian_traces(loss, {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}, jax.random.key(0), draws=1)
    {'a': 12.0, 'b': 40.0}

    Args:
        loss: maps the parameters to a scalar.
        params: tree of floating-point arrays.
        key: random key.
        draws: number of random vectors; the standard error falls with its square root.
        names: the leaves to estimate; the others are held fixed. All floating-point ones where left out.
        vectorized: Hessian-vector products computed at once (`jax.vmap`); each needs the memory of a gradient.

    Returns:
        `{name: trace}`.

    Raises:
        UserError: a name is not in the tree, `draws` is not a positive multiple of `vectorized`, or a trace is not
            finite (the message names the tensor).
    """
    leaves = dict(named_leaves(params))
    floating = [name for name, leaf in leaves.items() if is_floating(leaf)]
    chosen = floating if names is None else list(names)
    if unknown := set(chosen) - set(leaves):
        raise UserError(f"{sorted(unknown)[0]} is not in the tree")
    if vectorized < 1 or draws < 1 or draws % vectorized:
        raise UserError(f"draws (={draws}) must be a positive multiple of vectorized (={vectorized})")
    point = {name: jnp.asarray(leaves[name]) for name in chosen}

    def of_chosen(values: Mapping[str, jax.Array]) -> jax.Array:
        return loss(replace_named(params, values))

    def products(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(chosen))
        vector = {n: jax.random.rademacher(k, point[n].shape, point[n].dtype) for n, k in zip(chosen, keys)}

        def slope(values: Mapping[str, jax.Array]) -> jax.Array:
            gradient = jax.grad(of_chosen)(values)
            return sum((jnp.vdot(gradient[n], vector[n]) for n in chosen), jnp.array(0.0))

        curved = jax.grad(slope)(point)
        # v^T H v, whose mean over random signs v is the trace. Other tensors' parts of H v average out.
        return {n: jnp.vdot(vector[n], curved[n]) for n in chosen}

    some = jax.jit(jax.vmap(products))
    batches = jax.random.split(key, draws).reshape(-1, vectorized)
    # A Python loop: a convolution inside lax.scan is many times slower on a CPU.
    estimates = [jax.device_get(some(keys)) for keys in batches]
    traces = {n: float(np.mean([estimate[n] for estimate in estimates])) for n in chosen}
    for name, trace in traces.items():
        if not math.isfinite(trace):
            raise UserError(f"the trace of {name} is {trace}: the loss, or its curvature, is not finite")
    return traces


def distortions(params: Params, rules: Rules, all_bits: Sequence[int] = (2, 3, 4)) -> tuple[Table, Table]:
    """Quantizes every tensor that the rules choose, at each number of bits.

    Args:
        params: tree of arrays.
        rules: see `rules.decide`; the bits in them do not matter.
        all_bits: the numbers of bits to try.

    Returns:
        `(errors, sizes)`, both `{name: {bits: number}}`: the squared error ||W - Q||^2, and the bytes of indices and
        codebook. At bits where a tensor stays as it is (`QuantSpec.only_smaller`) it has no error and its own bytes;
        one that stays at all of these bits is left out.

    >>> errors, sizes = distortions({"kernel": jnp.arange(64.0).reshape(16, 4)}, {"kernel": 4}, all_bits=(2, 4))
    >>> errors["kernel"][4], errors["kernel"][2] > 0, sizes["kernel"]
    (0.0, True, {2: 48, 4: 160})
    """
    leaves = dict(named_leaves(params))
    errors: dict[str, dict[int, float]] = {}
    sizes: dict[str, dict[int, float]] = {}
    for name, spec in decide(params, rules, any_size=True).items():
        if spec.bits == HALF:
            continue
        made: dict[int, Leaf] = {}
        for bits in all_bits:
            own = dataclasses.replace(spec, bits=bits, coarse=(), minimum_size=0)
            made[bits] = quantize_params({name: leaves[name]}, own)[name]
        if any(map(is_codebook_tensor, made.values())):
            errors[name] = {bits: _squared_error(leaves[name], leaf) for bits, leaf in made.items()}
            sizes[name] = {bits: size_bytes(leaf).total for bits, leaf in made.items()}
    return errors, sizes


def _squared_error(exact: Leaf, leaf: Leaf) -> float:
    if not is_codebook_tensor(leaf):
        return 0.0
    return float(jnp.sum(jnp.square(jnp.asarray(exact, jnp.float32) - leaf.dequantize(dtype=jnp.float32))))


def allocate(traces: Mapping[str, float], errors: Table, sizes: Table, budget: float) -> dict[str, int]:
    """Gives each tensor the bits that minimise sum Tr(H_i) ||W_i - Q_i||^2 within a byte budget, exactly.

    This is a multiple-choice knapsack, see `knapsack.cheapest`.

    >>> errors, sizes = {"a": {2: 9.0, 4: 1.0}, "b": {2: 9.0, 4: 1.0}}, {"a": {2: 10, 4: 20}, "b": {2: 10, 4: 20}}
    >>> allocate({"a": 5.0, "b": 1.0}, errors, sizes, budget=30)
    {'a': 4, 'b': 2}

    Args:
        traces: Hessian trace by name. One of zero or less, which is noise of the estimate, tells only that the tensor
            matters least: such tensors get what bytes the others leave, by their errors alone.
        errors: squared error by name and bits, from `distortions`.
        sizes: bytes by name and bits.
        budget: bytes that the sizes may sum to.

    Returns:
        `{name: bits}`.

    Raises:
        UserError: even the fewest bits exceed the budget, or there is no tensor.
    """
    names = _some(errors)
    _check_budget(sizes, names, budget)
    felt = [name for name in names if traces[name] > 0]
    if len(felt) < len(names):
        return _allocate_in_turn(traces, errors, sizes, budget, felt)
    costs = [np.array([traces[name] * error for error in errors[name].values()]) for name in names]
    bytes_of = [np.array([float(sizes[name][bits]) for bits in errors[name]]) for name in names]
    taken = knapsack.cheapest(costs, bytes_of, budget)
    return {name: list(errors[name])[choice] for name, choice in zip(names, taken)}


def _allocate_in_turn(
    traces: Mapping[str, float], errors: Table, sizes: Table, budget: float, felt: list[str]
) -> dict[str, int]:
    """As `allocate`: first for the tensors `felt`, whose traces are positive, then for the others."""
    others = {name: row for name, row in errors.items() if name not in felt}
    bits_of: dict[str, int] = {}
    # max: the fewest bits fit, which rounding must not deny.
    if felt:
        most = max(budget - _least(sizes, others), _least(sizes, felt))
        bits_of = allocate(traces, {name: errors[name] for name in felt}, sizes, most)
    left = max(budget - sum(sizes[name][bits] for name, bits in bits_of.items()), _least(sizes, others))
    bits_of |= allocate(dict.fromkeys(others, 1.0), others, sizes, left)
    return {name: bits_of[name] for name in errors}


def allocate_sections(
    traces: Mapping[str, float], errors: Table, sizes: Table, budget: float, sections: int = 4
) -> dict[str, int]:
    """As `allocate`, but all tensors of a section get the same bits.

    The tensors are sorted by trace and cut into `sections` of about as many tensors each (Liu et al., 2024).

    >>> errors, sizes = {"a": {2: 9.0, 4: 1.0}, "b": {2: 9.0, 4: 1.0}}, {"a": {2: 10, 4: 20}, "b": {2: 10, 4: 20}}
    >>> allocate_sections({"a": 5.0, "b": 1.0}, errors, sizes, budget=30, sections=1)
    {'a': 2, 'b': 2}

    Raises:
        UserError: as `allocate`, or there would be no section.
    """
    if sections < 1:
        raise UserError(f"sections (={sections}) must be 1 or more")
    names = sorted(_some(errors), key=lambda name: -traces[name])
    parts = [list(part) for part in np.array_split(np.array(names, object), min(sections, len(names)))]
    whole_traces, whole_costs, whole_sizes = {}, {}, {}
    for number, part in enumerate(parts):
        all_bits = sorted(errors[names[0]])
        felt = {name: traces[name] for name in part if traces[name] > 0}
        factors = felt or dict.fromkeys(part, 1.0)
        # To the integer program a section is one tensor, whose trace is in its costs already, or is zero.
        whole_traces[str(number)] = 1.0 if felt else 0.0
        whole_costs[str(number)] = {
            bits: sum(f * errors[name][bits] for name, f in factors.items()) for bits in all_bits
        }
        whole_sizes[str(number)] = {bits: sum(sizes[name][bits] for name in part) for bits in all_bits}
    # Many sections have too many combinations to try them all.
    chosen = allocate(whole_traces, whole_costs, whole_sizes, budget)
    return {name: chosen[str(number)] for number, part in enumerate(parts) for name in part}


def _some(errors: Table) -> list[str]:
    if not errors:
        raise UserError("there is no tensor to give bits to: the rules quantize none")
    return list(errors)


def _least(sizes: Table, names: Iterable[str]) -> float:
    return sum(min(sizes[name].values()) for name in names)


def _check_budget(sizes: Table, names: Sequence[str], budget: float) -> None:
    least = _least(sizes, names)
    if least > budget:
        raise UserError(f"a budget of {budget:.0f} bytes is too small: the fewest bits take {least:.0f}")


def rules_of(bits_of: Mapping[str, int], spec: QuantSpec) -> list[QuantRule]:
    """Makes the rules that give each tensor its own bits, and everything else as in `spec`.

    >>> rule, = rules_of({"conv1/kernel": 3}, QuantSpec(8, "tensor"))
    >>> rule.pattern, rule.spec.bits, rule.spec.granularity
    ('^conv1/kernel$', 3, 'tensor')
    """
    return [QuantRule(f"^{re.escape(name)}$", dataclasses.replace(spec, bits=bits)) for name, bits in bits_of.items()]


def phases(bits_of: Mapping[str, int]) -> list[dict[str, int]]:
    """Splits an allocation into the phases of multi-stage fine-tuning, in ascending bits.

    The first phase quantizes only the tensors of the fewest bits. Each next one adds those of the next number of bits;
    the rest stay in floating point until their turn.

    >>> phases({"a": 4, "b": 2})
    [{'b': 2}, {'a': 4, 'b': 2}]
    """
    return [{n: b for n, b in bits_of.items() if b <= most} for most in sorted(set(bits_of.values()))]
