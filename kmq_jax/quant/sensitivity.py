"""How much each tensor minds being quantized, and the widths that a byte budget then allows.

Reference: Dong et al., HAWQ-V2: Hessian aware trace-weighted quantization of neural networks, 2020; the sections and
the stages are those of Liu, Wang and Qian, Towards lightweight speaker verification via adaptive neural network
quantization, 2024.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from kmq_jax.core.errors import UserError
from kmq_jax.core.tree import map_named, named_leaves
from kmq_jax.quant.transform import Rules, decide, dequantize_tensor, quantize_params, size_bytes
from kmq_jax.quant.types import HALF, QuantRule, QuantSpec

Table = Mapping[str, Mapping[int, float]]


def hessian_traces(
    loss: Callable[[Any], jax.Array],
    params: Any,
    key: jax.Array,
    draws: int = 10,
    names: Iterable[str] | None = None,
    vectorized: int = 1,
) -> dict[str, float]:
    """Estimates the trace of the loss's Hessian in each tensor, by Hutchinson's method with Rademacher draws.

    One Hessian-vector product a draw serves every tensor. It is a gradient of a gradient, so that functions with only
    a reverse rule (`jax.custom_vjp`) may be part of the loss.

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
        UserError: a name is not in the tree, or `draws` is not a positive multiple of `vectorized`.
    """
    leaves = dict(named_leaves(params))
    floating = [name for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    chosen = floating if names is None else list(names)
    if unknown := set(chosen) - set(leaves):
        raise UserError(f"{sorted(unknown)[0]} is not in the tree")
    if vectorized < 1 or draws < 1 or draws % vectorized:
        raise UserError(f"draws (={draws}) must be a positive multiple of vectorized (={vectorized})")
    point = {name: jnp.asarray(leaves[name]) for name in chosen}

    def of_chosen(values: Mapping[str, jax.Array]) -> jax.Array:
        return loss(map_named(lambda name, leaf: values.get(name, leaf), params))

    def products(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(chosen))
        vector = {n: jax.random.rademacher(k, point[n].shape, point[n].dtype) for n, k in zip(chosen, keys)}

        def slope(values: Mapping[str, jax.Array]) -> jax.Array:
            gradient = jax.grad(of_chosen)(values)
            return sum((jnp.vdot(gradient[n], vector[n]) for n in chosen), jnp.array(0.0))

        curved = jax.grad(slope)(point)
        return {n: jnp.vdot(vector[n], curved[n]) for n in chosen}

    some = jax.jit(jax.vmap(products))
    batches = jax.random.split(key, draws).reshape(-1, vectorized)
    # A Python loop: a convolution inside lax.scan is many times slower on a CPU.
    estimates = [jax.device_get(some(keys)) for keys in batches]
    return {n: float(np.mean([estimate[n] for estimate in estimates])) for n in chosen}


def distortions(params: Any, rules: Rules, widths: Sequence[int] = (2, 3, 4)) -> tuple[Table, Table]:
    """Quantizes every tensor that the rules choose at each width.

    Args:
        params: tree of arrays.
        rules: see `transform.decide`; the widths in them do not matter.
        widths: the widths to try.

    Returns:
        `(errors, sizes)`, both `{name: {bits: number}}`: the squared error ||W - Q||^2, and the bytes of indices and
        codebook.
    """
    leaves = dict(named_leaves(params))
    errors: dict[str, dict[int, float]] = {}
    sizes: dict[str, dict[int, float]] = {}
    for name, spec in decide(params, rules).items():
        if spec.bits == HALF:
            continue
        errors[name], sizes[name] = {}, {}
        for bits in widths:
            spec_of_width = dataclasses.replace(spec, bits=bits, coarse=())
            quantized = quantize_params({name: leaves[name]}, spec_of_width)[name]
            errors[name][bits] = float(jnp.sum(jnp.square(leaves[name] - dequantize_tensor(quantized))))
            sizes[name][bits] = size_bytes(quantized).total
    return errors, sizes


def allocate(traces: Mapping[str, float], errors: Table, sizes: Table, budget: float) -> dict[str, int]:
    """Gives each tensor the width that minimises sum Tr(H_i) ||W_i - Q_i||^2 within a byte budget, exactly.

    A multiple-choice knapsack, solved as an integer program.

    Args:
        traces: Hessian trace by name; one below zero, which is noise of the estimate, counts as zero.
        errors: squared error by name and width, from `distortions`.
        sizes: bytes by name and width.
        budget: bytes that the sizes may sum to.

    Returns:
        `{name: bits}`.

    Raises:
        UserError: even the smallest widths exceed the budget.
    """
    names = list(errors)
    _check_budget(sizes, names, budget)
    choices = [(name, bits) for name in names for bits in errors[name]]
    cost = np.array([_cost(traces, errors, name, bits) for name, bits in choices])
    size = np.array([float(sizes[name][bits]) for name, bits in choices])
    one_each = np.array([[float(name == chosen) for chosen, _ in choices] for name in names])
    # Scaled, as the solver's tolerances are absolute; its relative gap is left at zero for the exact optimum.
    solution = optimize.milp(
        cost / max(cost.max(), 1e-300),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(size[None, :] / budget, -np.inf, 1),
        ],
        integrality=np.ones(len(choices)),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        raise UserError(f"no widths were found within {budget:.0f} bytes: {solution.message}")
    return {name: bits for (name, bits), x in zip(choices, solution.x) if x > 0.5}


def allocate_sections(
    traces: Mapping[str, float], errors: Table, sizes: Table, budget: float, sections: int = 4
) -> dict[str, int]:
    """As `allocate`, but with one width for each of a few sections of tensors, as in the paper.

    The tensors are sorted by trace and cut into `sections` of as equal a number as can be; every combination of
    widths is tried.
    """
    names = sorted(errors, key=lambda name: -traces[name])
    _check_budget(sizes, names, budget)
    parts = [list(part) for part in np.array_split(np.array(names, object), min(sections, len(names)))]
    best: tuple[float, tuple[int, ...]] | None = None
    for combination in itertools.product(sorted(errors[names[0]]), repeat=len(parts)):
        pairs = [(name, bits) for part, bits in zip(parts, combination) for name in part]
        if sum(sizes[name][bits] for name, bits in pairs) > budget:
            continue
        cost = sum(_cost(traces, errors, name, bits) for name, bits in pairs)
        if best is None or cost < best[0]:
            best = cost, combination
    assert best is not None  # the smallest width everywhere is within the budget
    return {name: bits for part, bits in zip(parts, best[1]) for name in part}


def _cost(traces: Mapping[str, float], errors: Table, name: str, bits: int) -> float:
    return max(traces[name], 0.0) * errors[name][bits]


def _check_budget(sizes: Table, names: Sequence[str], budget: float) -> None:
    least = sum(min(sizes[name].values()) for name in names)
    if least > budget:
        raise UserError(f"a budget of {budget:.0f} bytes is too small: the smallest widths take {least:.0f}")


def rules_of(widths: Mapping[str, int], spec: QuantSpec) -> list[QuantRule]:
    """Makes the rules that give each tensor of `widths` its own width, and everything else as in `spec`."""
    return [QuantRule(f"^{re.escape(name)}$", dataclasses.replace(spec, bits=bits)) for name, bits in widths.items()]


def stages(widths: Mapping[str, int]) -> list[dict[str, int]]:
    """Splits an allocation into the stages of multi-stage fine-tuning, of ascending width.

    The first stage quantizes the tensors of the smallest width only, each next one those of the next width too; the
    rest stay in floating point until their turn.
    """
    return [{n: b for n, b in widths.items() if b <= most} for most in sorted(set(widths.values()))]
