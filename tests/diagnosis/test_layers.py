"""Weight distortion by hand, Hessian traces against the exact Hessian, rank correlations against scipy."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from kmq_jax import quant
from kmq_jax.diagnosis import layers
from kmq_jax.diagnosis.correlation import spearman
from kmq_jax.models import registry
from kmq_jax.ptq.options import QuantizeOptions
from kmq_jax.ptq.quantize import rules_of


def tensor(indices, codebook, bits=1, shape=(4, 2)):
    """A tensor of two output channels; `indices` and `codebook` by channel."""
    packed = quant.pack_bits(jnp.asarray(indices, jnp.uint8), bits)
    return quant.CodebookTensor(jnp.asarray(codebook, jnp.float32), packed, (), shape, bits, 1)


WEIGHTS = np.array([[1.0, 4.0], [1.0, 4.0], [3.0, 4.0], [3.0, 4.0]])


def test_distortion_by_hand():
    # Channel 0 becomes 0 0 3 3, channel 1 becomes 5 5 5 5.
    row = layers.weight_row(WEIGHTS, tensor([[0, 0, 1, 1], [1, 1, 1, 1]], [[0.0, 3.0], [9.0, 5.0]]))
    assert row["squared_error"] == pytest.approx(2 + 4)
    power, of_values, product = 84.0, 18 + 100.0, 18 + 80.0
    assert row["relative_error"] == pytest.approx(np.sqrt(6 / power))
    assert row["sqnr_db"] == pytest.approx(10 * np.log10(power / 6))
    assert row["cosine"] == pytest.approx(product / np.sqrt(power * of_values))
    assert row["codebook_use"] == 0.75  # both entries of one codebook, one of the other
    assert row["entropy"] == pytest.approx(0.5)  # a bit in one channel, none in the other
    assert row["effective_bits"] == pytest.approx((8 * 1 + 4 * 32) / 8)
    assert row["tensor_bits"] == 1


def test_a_copy_is_without_distortion():
    row = layers.weight_row(WEIGHTS, WEIGHTS.copy())
    assert row["relative_error"] == row["squared_error"] == 0
    assert row["sqnr_db"] == np.inf and row["cosine"] == pytest.approx(1)
    assert row["codebook_use"] is row["entropy"] is row["effective_bits"] is row["tensor_bits"] is None


def test_a_tensor_of_zeros_is_no_copy_of_another():
    ones, zeros = np.ones((4, 2)), np.zeros((4, 2))
    dead, made_up, both = (layers.weight_row(*pair) for pair in ((ones, zeros), (zeros, ones), (zeros, zeros)))
    assert (dead["cosine"], dead["relative_error"], dead["sqnr_db"]) == (0, 1, 0)
    assert (made_up["cosine"], made_up["relative_error"], made_up["sqnr_db"]) == (0, np.inf, -np.inf)
    assert (both["cosine"], both["relative_error"], both["sqnr_db"]) == (1, 0, np.inf)


def test_half_precision_is_told_and_a_rule_keeps_it():
    half = layers.weight_row(WEIGHTS, quant.quantize_params({"kernel": np.float32(WEIGHTS)}, bits=16)["kernel"])
    assert half["tensor_bits"] == 16
    about = {"weights": 8, "bits": 2}
    rows = [
        half | about | {"layer": "a", "damage": 9.0},
        half | about | {"layer": "b", "damage": 1.0, "tensor_bits": 2},
    ]
    assert [rule["bits"] for rule in layers.more_bits(rows, 2)] == [16, 3]


def test_outliers_are_told_by_their_own_channel():
    weights = np.tile(np.array([[1.0, -1.0], [-1.0, 1.0]]), (20, 1))
    weights[0, 0] = 50.0  # far out for channel 0; channel 1 has none
    assert layers.weight_row(weights, weights)["outlier_share"] == pytest.approx(1 / 80)


def test_a_nested_tensor_is_measured_at_the_width_it_is_read_at():
    weights = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    leaf = quant.quantize_params({"w": weights}, quant.QuantSpec(4, coarse=(2,)))["w"]
    wide, narrow = layers.weight_row(weights, leaf), layers.weight_row(weights, leaf, 2)
    assert (wide["tensor_bits"], narrow["tensor_bits"]) == (4, 2)
    assert narrow["relative_error"] > 2 * wide["relative_error"]
    assert narrow["entropy"] <= 2 < wide["entropy"] <= 4
    assert narrow["effective_bits"] < wide["effective_bits"]


def test_index_shares():
    shares = layers.index_shares(np.array([[0, 0, 1, 3], [2, 2, 2, 2]], np.uint8), 4)
    np.testing.assert_array_equal(shares, [[0.5, 0.25, 0, 0.25], [0, 0, 1, 0]])


@pytest.fixture(scope="module")
def small():
    network = registry.build("wespeaker_resnet34", width=2, blocks=[1, 1, 1, 1], embedding_size=4, features=8)
    return network, registry.initialize(network, jax.random.key(0))


def test_hessian_traces_are_near_the_exact_ones(small):
    network, variables = small
    features = jax.random.normal(jax.random.key(1), (2, 16, 8))
    name = "stem/conv/kernel"

    def embed(kernel):
        params = dict(variables["params"], stem={**variables["params"]["stem"], "conv": {"kernel": kernel}})
        rows = network.apply({**variables, "params": params}, features, train=False)
        return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)

    kernel = variables["params"]["stem"]["conv"]["kernel"]
    here = jax.jit(embed)(kernel)
    slope = jax.grad(lambda k: jnp.mean(1 - jnp.sum(embed(k) * here, -1)))
    exact = jax.jit(jax.jacrev(slope))(kernel)
    trace = float(np.trace(np.asarray(exact).reshape(kernel.size, kernel.size)))
    found = layers.hessian_traces(network, variables, features, [name], draws=60)
    assert trace > 0 and found[name] == pytest.approx(trace, rel=0.4)


def test_spearman_s_correlation_is_scipy_s():
    rng = np.random.default_rng(2)
    x, y = np.round(rng.standard_normal((5, 30)), 1), np.round(rng.standard_normal((5, 30)), 1)
    wanted = [stats.spearmanr(a, b)[0] for a, b in zip(x, y)]
    np.testing.assert_allclose(spearman(x, y), wanted)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))


def test_correlation_rows_have_the_sign_of_what_should_foretell():
    rows = [
        {"bits": 2, "relative_error": e, "sqnr_db": -e, "cosine": 1.0, "damage": e**2, "hessian_trace": 1 / e}
        for e in (0.1, 0.3, 0.2, 0.5, 0.4)
    ] + [{"bits": 2, "relative_error": 9.0, "damage": None}]
    found = {row["predictor"]: row for row in layers.correlation_rows(rows, replicates=200)}
    assert found["relative_error"]["spearman"] == pytest.approx(1) and found["relative_error"]["layers"] == 5
    assert found["relative_error"]["spearman_ci95"] == pytest.approx([1, 1])
    assert found["sqnr_db"]["spearman"] == pytest.approx(1)
    assert found["hessian_trace"]["spearman"] == pytest.approx(-1)
    assert found["hessian_trace"]["explained"] == pytest.approx(1)
    assert found["cosine"]["spearman"] is None and found["entropy"]["layers"] == 0


def test_kernels_of_finds_quantized_ones_too(small):
    _, variables = small
    names = layers.kernels_of(variables)
    params = quant.quantize_params(variables["params"], [quant.QuantRule("stage1.*kernel$", quant.QuantSpec(2))])
    assert layers.kernels_of({"params": params}) == names and "head/linear/kernel" in names
    assert dataclasses.is_dataclass(params["stage1"]["block0"]["conv1"]["kernel"])


def test_half_of_the_damage_gets_a_bit_more_where_it_costs_least(tmp_path):
    def row(layer, weights, damage, tensor_bits=2):
        return {"layer": layer, "weights": weights, "damage": damage, "bits": 2, "tensor_bits": tensor_bits}

    rows = [row("stem", 9, 0.0, None), row("big", 1000, 5.0), row("s.1/conv", 10, 4.0), row("last", 500, 2.0, 8)]
    rules = layers.more_bits([*rows, row("other", 1, 99.0) | {"bits": 4}], 2)
    assert [rule["bits"] for rule in rules] == [None, 3, 3, 8]
    assert rules[2]["pattern"] == r"^s\.1/conv/kernel$"
    assert layers.more_bits([row("unmeasured", 10, None)], 2) == layers.more_bits(rows, 3) == []
    # As the command that takes them reads them.
    file = tmp_path / "rules-2.json"
    file.write_text(json.dumps(rules))
    read = rules_of(QuantizeOptions(bits=2, rules=file))
    assert [rule.spec and rule.spec.bits for rule in read] == [None, 3, 3, 8, 2]
