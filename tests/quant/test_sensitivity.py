import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kmq_jax import quant
from kmq_jax.core.errors import UserError
from kmq_jax.quant import QuantSpec

RNG = np.random.default_rng(0)


def test_traces_are_exact_where_the_hessian_is_diagonal():
    params = {"a": jnp.ones((3, 2)), "b": {"c": jnp.full(5, 2.0)}}

    def loss(p):
        return 1.5 * jnp.sum(p["a"] ** 2) + jnp.sum(p["b"]["c"] ** 4)

    found = quant.hessian_traces(loss, params, jax.random.key(0), draws=2, vectorized=2)
    assert found == pytest.approx({"a": 3 * 6, "b/c": 5 * 12 * 4}, rel=1e-5)
    assert list(quant.hessian_traces(loss, params, jax.random.key(0), draws=1, names=["a"])) == ["a"]


def test_traces_converge_on_a_full_hessian_with_only_a_reverse_rule():
    matrix = jnp.asarray(np.cov(RNG.standard_normal((6, 30))).astype(np.float32))

    @jax.custom_vjp
    def apply(x):
        return matrix @ x

    apply.defvjp(lambda x: (matrix @ x, None), lambda _, g: (matrix.T @ g,))
    found = quant.hessian_traces(
        lambda p: 0.5 * p["x"] @ apply(p["x"]), {"x": jnp.ones(6)}, jax.random.key(1), draws=256, vectorized=64
    )
    assert found["x"] == pytest.approx(float(jnp.trace(matrix)), rel=0.1)


def problem(layers=5):
    traces = {f"layer{i}": float(t) for i, t in enumerate(RNG.exponential(size=layers) * 10)}
    count = {name: int(n) for name, n in zip(traces, RNG.integers(100, 900, layers))}
    errors = {name: {b: count[name] * 4.0**-b for b in (2, 3, 4)} for name in traces}
    sizes = {name: {b: count[name] * b // 8 + 2 * 2**b for b in (2, 3, 4)} for name in traces}
    return traces, errors, sizes


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_allocation_is_the_best_of_all(share):
    traces, errors, sizes = problem()
    low, high = (sum(s[b] for s in sizes.values()) for b in (2, 4))
    budget = low + share * (high - low)

    def cost(widths):
        return sum(traces[n] * errors[n][b] for n, b in widths.items())

    def size(widths):
        return sum(sizes[n][b] for n, b in widths.items())

    every = [dict(zip(traces, c)) for c in itertools.product((2, 3, 4), repeat=len(traces))]
    best = min(cost(w) for w in every if size(w) <= budget)
    found = quant.allocate(traces, errors, sizes, budget)
    assert size(found) <= budget and cost(found) == pytest.approx(best, rel=1e-6)
    sections = quant.allocate_sections(traces, errors, sizes, budget)
    assert size(sections) <= budget and cost(sections) >= best * (1 - 1e-9)
    with pytest.raises(UserError, match="budget"):
        quant.allocate(traces, errors, sizes, low - 1)


def test_a_budget_is_kept_to_the_byte():
    # Five bytes of thirty million: what a solver's tolerance would let pass.
    errors = {name: {2: 9.0, 4: 1.0} for name in "ab"}
    sizes = {"a": {2: 10_000_000, 4: 20_000_005}, "b": {2: 10_000_000, 4: 25_000_000}}
    for budget, bits in ((30_000_004, 2), (30_000_005, 4)):
        assert quant.allocate({"a": 1.0, "b": 1.0}, errors, sizes, budget) == {"a": bits, "b": 2}


def test_many_tensors_of_unlike_weight_are_allocated_as_well_as_by_another_solver():
    from scipy import optimize

    names, all_bits = [f"layer{i}" for i in range(60)], range(2, 9)
    traces = dict(zip(names, np.exp(RNG.normal(0, 3, 60))))
    count = dict(zip(names, RNG.integers(1000, 900_000, 60)))
    errors = {n: {b: count[n] * 4.0**-b * float(np.exp(RNG.normal(0, 0.3))) for b in all_bits} for n in names}
    sizes = {n: {b: int(count[n]) * b // 8 + 2**b for b in all_bits} for n in names}
    choices = [(n, b) for n in names for b in all_bits]
    cost = np.array([traces[n] * errors[n][b] for n, b in choices])
    one_each = np.array([[float(n == name) for n, _ in choices] for name in names])
    for share in (0.01, 0.2, 0.6):
        low, high = (sum(pick(s.values()) for s in sizes.values()) for pick in (min, max))
        budget = low + share * (high - low)
        size = np.array([sizes[n][b] / budget for n, b in choices])
        other = optimize.milp(
            cost / cost.max(),
            constraints=[optimize.LinearConstraint(one_each, 1, 1), optimize.LinearConstraint(size, -np.inf, 1)],
            integrality=np.ones(len(choices)),
            bounds=optimize.Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "presolve": False},
        )
        found = quant.allocate(traces, errors, sizes, budget)
        assert sum(sizes[n][b] for n, b in found.items()) <= budget
        total = sum(traces[n] * errors[n][b] for n, b in found.items()) / cost.max()
        assert total <= other.fun + 1e-9 and total >= other.fun * (1 - 1e-3) - 2e-6  # the solver's own gap


def test_sections_share_a_width_and_follow_the_traces():
    traces, errors, sizes = problem(8)
    widths = quant.allocate_sections(traces, errors, sizes, 1e9)
    assert set(widths.values()) == {4}
    budget = 1.3 * sum(s[2] for s in sizes.values())
    widths = quant.allocate_sections(traces, errors, sizes, budget)
    order = sorted(traces, key=lambda name: -traces[name])
    assert all(widths[order[i]] == widths[order[i + 1]] for i in range(0, 8, 2))


def test_distortions_rules_and_stages():
    params = {"a": {"w": RNG.standard_normal((30, 4)).astype(np.float32)}, "b": RNG.standard_normal((30, 4))}
    params["b"] = params["b"].astype(np.float32)
    errors, sizes = quant.distortions(params, QuantSpec(2), all_bits=(2, 3))
    whole = quant.quantize_params(params, QuantSpec(3))
    error = np.sum((quant.dequantize_params(whole)["a"]["w"] - params["a"]["w"]) ** 2)
    assert errors["a/w"][3] == pytest.approx(float(error), rel=1e-5)
    assert sizes["a/w"] == {2: 4 * 8 + 32, 3: 4 * 12 + 64}
    widths = {"a/w": 3, "b": 2}
    mixed = quant.quantize_params(params, quant.rules_of(widths, QuantSpec(4)))
    assert (mixed["a"]["w"].bits, mixed["b"].bits) == (3, 2)
    assert quant.phases({"a": 4, "b": 2, "c": 3}) == [{"b": 2}, {"b": 2, "c": 3}, {"a": 4, "b": 2, "c": 3}]


def test_mistakes():
    def loss(params):  # whose curvature at zero is infinite
        return jnp.sum(jnp.abs(params["w"]) ** 1.5)

    with pytest.raises(UserError, match="the trace of w is"):
        quant.hessian_traces(loss, {"w": jnp.zeros(3)}, jax.random.key(0), draws=1)
    for allocate in (quant.allocate, quant.allocate_sections):
        with pytest.raises(UserError, match="no tensor"):
            allocate({}, {}, {}, 10.0)


def test_what_has_no_trace_gets_what_the_others_leave():
    names, bits = ("a", "b", "c"), (2, 4, 6)
    errors, sizes = ({name: {b: f(b) for b in bits} for name in names} for f in (lambda b: 4.0**-b, lambda b: 10 * b))
    traces = {"a": 1.0, "b": -0.1, "c": 1.0}
    assert quant.allocate(traces, errors, sizes, 180) == dict.fromkeys(names, 6)
    assert quant.allocate(traces, errors, sizes, 160) == {"a": 6, "b": 4, "c": 6}
    assert quant.allocate(traces, errors, sizes, 120)["b"] == 2
    assert quant.allocate(dict.fromkeys(names, 0.0), errors, sizes, 120) == dict.fromkeys(names, 4)
    assert quant.allocate_sections(traces, errors, sizes, 180, 3) == dict.fromkeys(names, 6)
    assert quant.allocate_sections(traces, errors, sizes, 160, 3) == {"a": 6, "b": 4, "c": 6}
    with pytest.raises(UserError, match=r"sections .=0. must be 1 or more"):
        quant.allocate_sections(traces, errors, sizes, 180, 0)
